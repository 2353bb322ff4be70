"""Shapes of batches, for the many small laws of a training step: torch's own function is slow."""

import torch
from torch.distributions import Distribution

__all__ = ["broadcast_shapes", "check_expandable"]


def broadcast_shapes(shape: torch.Size, *others: torch.Size) -> torch.Size:
    """Do what `torch.broadcast_shapes` does, at once where there is nothing to do."""
    return shape if all(other == shape for other in others) else torch.broadcast_shapes(shape, *others)


def check_expandable(distribution: Distribution, batch_shape: torch.Size) -> None:
    """Raise a ValueError if the batch shape of a distribution does not broadcast to another one."""
    try:
        fits = broadcast_shapes(batch_shape, distribution.batch_shape) == batch_shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(
            f"{type(distribution).__name__}: batch shape {tuple(distribution.batch_shape)} cannot be expanded to "
            f"{tuple(batch_shape)}"
        )
