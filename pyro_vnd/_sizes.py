"""What everything that makes nets asks of its sizes."""

from collections.abc import Sequence
from numbers import Integral
from typing import Any

__all__ = ["check_sizes", "is_integer"]


def is_integer(value: Any) -> bool:
    """Return whether a value is an integer, of Python or NumPy, and no truth value.

    Example:
        >>> is_integer(3), is_integer(3.0), is_integer(True)
        (True, False, False)
    """
    return isinstance(value, Integral) and not isinstance(value, bool)


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
