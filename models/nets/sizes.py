"""What every constructor asks of its sizes."""

from collections.abc import Sequence


def check_sizes(**sizes: float | Sequence[float]) -> None:
    """Raises a ValueError that names the first argument with a size that is not positive."""
    for name, size in sizes.items():
        if any(each <= 0 for each in (size if isinstance(size, Sequence) else (size,))):
            raise ValueError(f"`{name}` must be positive; got {size}")
