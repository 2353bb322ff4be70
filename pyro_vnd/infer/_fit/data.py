"""Data of a fit: their checks and shuffled mini-batches."""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyro_vnd._data import Data, as_arguments, check_rows, map_parts, named_parts, num_rows, shapes

__all__ = ["check_data", "first_rows", "shuffled_batches"]


def check_data(data: Data, validation: Data | None = None) -> None:
    """Check that data are tensors with the same number of rows, all finite, and the validation data like them.

    Args:
        data: Data to train on.
        validation: Data that were held back.

    Raises:
        ValueError: If they are no such data.
    """
    check_rows("fit", data)
    if validation is None:
        return
    check_rows("fit", validation, "validation")
    if _shapes_of_a_row(validation) != _shapes_of_a_row(data):
        raise ValueError(
            f"fit: argument `validation` must be like `data` of shapes {shapes(data)}; got {shapes(validation)}"
        )


def _shapes_of_a_row(data: Data) -> Any:
    return as_arguments(map_parts(lambda x: x.shape[1:], data))


def first_rows(data: Data, batch_size: int) -> Data:
    """Return the first batch of data as they are ordered."""
    return map_parts(lambda x: x[:batch_size], data)


def shuffled_batches(data: Data, batch_size: int) -> Iterator[Data]:
    """Yield batches of shuffled rows, without those that do not fill a last one; all rows as they are if one batch."""
    total = num_rows(data)
    if batch_size == total:
        yield data
        return
    order = torch.randperm(total)
    orders = {x.device: order.to(x.device) for x in named_parts(data).values()}
    for start in range(0, total - batch_size + 1, batch_size):
        rows = {device: order[start : start + batch_size] for device, order in orders.items()}
        yield map_parts(partial(_rows_of, rows), data)


def _rows_of(rows: Mapping[torch.device, Tensor], x: Tensor) -> Tensor:
    return x.index_select(0, rows[x.device])
