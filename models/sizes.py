"""What nets and models ask of their sizes."""

from collections.abc import Sequence

__all__ = ["check_sizes"]


def check_sizes(function: str, /, **sizes: float | Sequence[float]) -> None:
    """Raise a ValueError that names the function and its first argument with a size that is not positive."""
    for name, size in sizes.items():
        if min(size if isinstance(size, Sequence) else (size,), default=1) <= 0:
            raise ValueError(f"{function}: argument `{name}` must be positive; got {size}")
