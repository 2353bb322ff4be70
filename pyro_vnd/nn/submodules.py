"""Parts of a net exchanged for others."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

__all__ = ["computed_tensors", "replace_modules"]


def replace_modules(net: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Replace modules wherever a net holds them, under all of their names, in place.

    Args:
        net: The net.
        replacements: New modules by the old ones, of which none is within another.

    Returns:
        The net, or what replaces it.

    Example:
        >>> net = nn.Sequential(nn.ReLU(), nn.Tanh())
        >>> replace_modules(net, {net[0]: nn.GELU()})[0]
        GELU(approximate='none')
    """
    places = [(name, part) for name, part in net.named_modules(remove_duplicate=False) if name and part in replacements]
    for name, part in places:
        net.set_submodule(name, replacements[part])
    return replacements.get(net, net)


def computed_tensors(net: nn.Module) -> dict[int, Any]:
    """Return copies of tensors that modules computed, such as weights that hooks make, which deepcopy refuses."""
    tensors = [value for part in net.modules() for value in vars(part).values() if isinstance(value, Tensor)]
    return {id(value): value.detach().clone() for value in tensors if not value.is_leaf}
