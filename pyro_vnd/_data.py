"""Data as every function of the library takes them: a tensor, a tuple of tensors, or a mapping of keyword arguments."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor

__all__ = ["Data", "as_arguments"]

Data: TypeAlias = Tensor | Sequence[Any] | Mapping[str, Any]


def as_arguments(data: Data) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments with which models and guides are called: `model(*args, **kwargs)`.

    Args:
        data: A tensor, the one argument; a tuple or list, the arguments in order, or a mapping, arguments by name.

    Returns:
        Positional arguments and keyword arguments.

    Example:
        >>> import torch
        >>> as_arguments(torch.zeros(2))
        ((tensor([0., 0.]),), {})
        >>> as_arguments({"x": 1.0})
        ((), {'x': 1.0})
    """
    if isinstance(data, Mapping):
        return (), dict(data)
    return (tuple(data), {}) if isinstance(data, tuple | list) else ((data,), {})
