"""What we use of torch and Pyro that they do not promise."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

__all__ = ["recall", "remember", "replace_modules"]


def remember(value: Tensor, making: Any) -> Tensor:
    """Attach to a sample what its value alone does not hold; copies of the sample do not have it."""
    value._making = (making, value._version)  # type: ignore[attr-defined]
    return value


def recall(value: Tensor) -> Any | None:
    """Return what was attached to a sample, or None for other tensors and samples changed in place."""
    making, version = getattr(value, "_making", (None, None))
    return making if version == value._version else None


def replace_modules(net: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Replace modules wherever a net holds them, under all of their names, in place.

    Args:
        net: The net.
        replacements: New modules by the old ones.

    Returns:
        The net, or what replaces it.
    """
    for parent in list(net.modules()):  # before the new ones are in, which may hold the old
        for name, child in list(parent._modules.items()):
            if child is not None and child in replacements:
                setattr(parent, name, replacements[child])
    return replacements.get(net, net)
