"""Data of a fit: their checks and shuffled mini-batches."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

__all__ = ["check_data", "minibatches"]


def check_data(data: Tensor | Sequence[Tensor], name: str = "data") -> list[Tensor]:
    """Return data as tensors with the same number of rows, all finite.

    Args:
        data: A tensor or several.
        name: Name of the argument of `fit`.

    Returns:
        The tensors.

    Raises:
        ValueError: If they are no such data.
    """
    tensors = [data] if isinstance(data, Tensor) else list(data)
    for i, rows in enumerate(tensors):
        if not isinstance(rows, Tensor) or rows.dim() == 0:
            raise ValueError(f"fit: argument `{name}[{i}]` must be a tensor with rows; got {type(rows).__name__}")
        if rows.is_floating_point() and not torch.isfinite(rows).all():
            raise ValueError(f"fit: argument `{name}[{i}]` of shape {tuple(rows.shape)} must be finite; got NaN or inf")
    shapes = [tuple(rows.shape) for rows in tensors]
    if not tensors or len({shape[0] for shape in shapes}) > 1 or shapes[0][0] == 0:
        raise ValueError(
            f"fit: argument `{name}` must be tensors with the same number of rows, at least 1; got {shapes}"
        )
    return tensors


def minibatches(tensors: list[Tensor], batch_size: int) -> Iterator[list[Tensor]]:
    """Yield batches of shuffled rows, without those that do not fill a last one; all rows as they are if one batch."""
    num_data = len(tensors[0])
    if batch_size == num_data:
        yield tensors
        return
    order = torch.randperm(num_data)
    orders = {x.device: order.to(x.device) for x in tensors}
    for start in range(0, num_data - batch_size + 1, batch_size):
        yield [x.index_select(0, orders[x.device][start : start + batch_size]) for x in tensors]
