"""What a fresh sample remembers of how it was made, for as long as nobody changes it."""

from typing import Any

from torch import Tensor

__all__ = ["recall", "remember"]


def remember(value: Tensor, making: Any) -> Tensor:
    """Attach to a sample what its value alone does not hold; copies of the sample do not have it."""
    value._making = (making, value._version)  # type: ignore[attr-defined]
    return value


def recall(value: Tensor) -> Any | None:
    """Return what was attached to a sample, or None for other tensors and samples changed in place."""
    making, version = getattr(value, "_making", (None, None))
    return making if version == value._version else None
