"""What everything that makes nets asks of its sizes."""

from collections.abc import Sequence

__all__ = ["check_sizes"]


def check_sizes(function: str, /, **sizes: float | Sequence[float]) -> None:
    """Raise a ValueError that names the function and its first argument with a size that is not positive.

    Example:
        >>> check_sizes("lenet", channels=(20, 0))
        Traceback (most recent call last):
        ValueError: lenet: argument `channels` must be positive; got (20, 0)
    """
    for name, size in sizes.items():
        if any(each <= 0 for each in (size if isinstance(size, Sequence) else (size,))):
            raise ValueError(f"{function}: argument `{name}` must be positive; got {size}")
