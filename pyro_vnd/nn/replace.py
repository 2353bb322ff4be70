"""Modules put in place of others."""

from collections.abc import Mapping

from torch import nn

__all__ = ["replace_modules"]


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
