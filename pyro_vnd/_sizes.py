"""What is asked of numbers: of the sizes of nets, and of whatever has bounds."""

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

__all__ = ["check_sizes", "is_integer", "is_number", "is_within"]


def is_integer(value: Any) -> bool:
    """Return whether a value is an integer, of Python or NumPy, and no truth value.

    Example:
        >>> is_integer(3), is_integer(3.0), is_integer(True)
        (True, False, False)
    """
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Return whether a value is one real number, of Python, NumPy or torch, and no truth value.

    Example:
        >>> is_number(0.5), is_number(torch.tensor([0.5])), is_number("0.5"), is_number(True)
        (True, True, False, False)
    """
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_complex() and value.dtype != torch.bool
    return isinstance(value, Real) and not isinstance(value, bool)


def is_within(value: Any, least: float = -math.inf, most: float = math.inf, *, above: float = -math.inf) -> bool:
    """Return whether a value is one finite number, from `least` to `most` and larger than `above`.

    Example:
        >>> is_within(0.5, 0, 1), is_within(0, above=0), is_within(float("nan")), is_within([1.0])
        (True, False, False, False)
    """
    try:
        return is_number(value) and math.isfinite(value) and least <= value <= most and bool(value > above)
    except OverflowError:  # an integer beyond all floats
        return False


def check_sizes(function: str, /, **sizes: int | Sequence[int]) -> None:
    """Raise a ValueError that names the function and its first argument with a size that is no positive integer.

    Example:
        >>> check_sizes("lenet", channels=(20, 0))
        Traceback (most recent call last):
        ValueError: lenet: argument `channels` must be positive; got (20, 0)
    """
    for name, size in sizes.items():
        each = list(size) if isinstance(size, Sequence) else [size]
        if not all(map(is_integer, each)):
            raise ValueError(f"{function}: argument `{name}` must be integers >= 1; got {size!r}")
        if any(one <= 0 for one in each):
            raise ValueError(f"{function}: argument `{name}` must be positive; got {size}")
