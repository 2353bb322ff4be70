"""A copy of a net in which only what is followed is left: without wrappers, and with weights that are parameters."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.weight_norm import remove_weight_norm

from pyro_vnd._compat import forget_weight_norm, weight_norm_of
from pyro_vnd.nn.recognition import as_torch_has_it
from pyro_vnd.nn.submodules import computed_tensors, replace_modules
from pyro_vnd.nn.tracing import unpack_attention, unpack_recurrent

__all__ = ["prepared"]


def prepared(net: nn.Module, excluded: tuple[str, ...]) -> nn.Module:
    """Return a copy of a net to be nested.

    Weights of `weight_norm`, old and new, become parameters, and so do those that a convolution with a forward of its
    own computes from its parameters, as weight standardisation does: the same function, whose weights are the starting
    means. Modules that compute what RMSNorm or LayerNorm does become these. Attention and recurrent nets are taken
    apart. Wrappers of nets for several devices are left away.

    Args:
        net: The net.
        excluded: Names of modules to leave alone.

    Raises:
        ValueError: If a part of the net was compiled.
    """
    if isinstance(net, nn.DataParallel | nn.parallel.DistributedDataParallel):
        net = net.module
    for name, part in net.named_modules():
        if type(part).__name__ == "OptimizedModule":  # torch has no public name for it
            which = f"its part {name!r}" if name else "it"
            raise ValueError(
                f"nest: argument `net` must be the net itself; {which} is what torch.compile made of one. "
                "Nest first, and compile afterwards"
            )
    copied = copy.deepcopy(net, computed_tensors(net) | _empty_tables(net))
    for name, part in copied.named_modules():
        if not any(f"{name}.".startswith(f"{each}.") for each in excluded):
            _keep_normalised_weights(part)
    return unpack_recurrent(unpack_attention(_recognised(copied, excluded), excluded), excluded)


def _empty_tables(net: nn.Module) -> dict[int, Any]:
    """Return copies of empty tables, such as a module has a dozen of for hooks: deepcopy takes its time over each."""
    tables = [value for part in net.modules() for value in vars(part).values() if type(value) in (dict, OrderedDict)]
    return {id(value): type(value)() for value in tables if not value}


def _keep_normalised_weights(part: nn.Module) -> None:
    kind = weight_norm_of(part)
    if kind == "hook":
        with torch.no_grad():
            remove_weight_norm(part)
    elif kind == "parametrization":
        layer: Any = part
        weight = layer.weight.detach().clone()
        # torch's own removal would change the class, which is that of the net given, too.
        layer.__class__ = parametrize.type_before_parametrizations(layer)
        del layer.parametrizations
        layer.register_parameter("weight", nn.Parameter(weight))
        forget_weight_norm(layer)


def _recognised(net: nn.Module, excluded: tuple[str, ...]) -> nn.Module:
    """Replace parts by layers of torch that compute the same, in place."""
    found = {
        part: same
        for name, part in net.named_modules()
        if name and not any(f"{name}.".startswith(f"{each}.") for each in excluded)
        if (same := as_torch_has_it(part)) is not None
    }
    return replace_modules(net, found)
