"""Shapes of batches, for the many small laws of a training step: torch's own function is slow."""

import torch

__all__ = ["broadcast_shapes", "plain_broadcast_shapes"]

plain_broadcast_shapes = torch.broadcast_shapes


def broadcast_shapes(shape: torch.Size, *others: torch.Size) -> torch.Size:
    """Do what `torch.broadcast_shapes` does, at once where there is nothing to do."""
    return shape if all(other == shape for other in others) else plain_broadcast_shapes(shape, *others)
