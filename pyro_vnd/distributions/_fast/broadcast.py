"""Shapes of batches, for the many small laws of a training step: torch's own function is slow."""

from collections.abc import Sequence

import torch

__all__ = ["broadcast_shapes", "plain_broadcast_shapes"]

plain_broadcast_shapes = torch.broadcast_shapes


def broadcast_shapes(*shapes: Sequence[int]) -> torch.Size:
    """Do what `torch.broadcast_shapes` does, for tuples of sizes; its errors are raised by itself."""
    result: Sequence[int] = ()
    for shape in shapes:
        if shape == result:
            continue
        longer, shorter = (shape, result) if len(shape) > len(result) else (result, shape)
        joined, start = list(longer), len(longer) - len(shorter)
        for i, size in enumerate(shorter, start):
            if size != joined[i] and size != 1:
                if joined[i] != 1:
                    return plain_broadcast_shapes(*shapes)
                joined[i] = size
        result = tuple(joined)
    return torch.Size(result)
