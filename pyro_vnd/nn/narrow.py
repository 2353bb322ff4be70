"""Extraction of physically smaller, plain torch nets."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from pyro_vnd._compat import replace_modules
from pyro_vnd._state import module_mode
from pyro_vnd.nn.axis import take
from pyro_vnd.nn.layers import NestedLayer
from pyro_vnd.nn.net import NestedNet
from pyro_vnd.nn.norms import BATCH_NORMS, NestedNorm
from pyro_vnd.nn.tracing.attention import Attention

__all__ = ["narrow", "recalibrate_batchnorm"]


@torch.no_grad()
def narrow(
    net: NestedNet, width: float | int | Mapping[str, float | int], draw: Mapping[str, Tensor] | None = None
) -> nn.Module:
    """Cut a nested net to a width: a plain, physically smaller torch net.

    Its outputs are those of the masked net to rounding, and it needs neither Pyro nor this library: its class is that
    of the net that was nested, its layers are torch's own. BatchNorm keeps the statistics of training, which are those
    of all widths together: see `recalibrate_batchnorm`.

    Args:
        net: The nested net.
        width: A fraction in (0, 1] for all groups, a number of blocks, or a mapping from group to either; groups that
            it leaves out stay whole.
        draw: A draw of the weights by name of their site, such as `net.guide(x)` returns; the posterior mean by
            default.

    Returns:
        A new module in the mode (training or evaluation) of the nested one, which shares no memory with it.

    Raises:
        ValueError: If a width is invalid, or the draw lacks a site.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from pyro_vnd.nn import nest
        >>> plain = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 3))
        >>> narrow(nest(plain, torch.zeros(1, 8), num_blocks=16), 0.25)
        Sequential(
          (0): Linear(in_features=8, out_features=16, bias=True)
          (1): ReLU()
          (2): Linear(in_features=16, out_features=3, bias=True)
        )
    """
    if not isinstance(net, NestedNet):
        raise ValueError(f"narrow: argument `net` must be a NestedNet, as `nest` returns; got {type(net).__name__}")
    widths = net._check_cut(width, sliced=True).widths
    kept = {name: net.widths[name].kept_units(value) for name, value in widths.items()}
    narrowed: dict[int, Any] = {}
    for name, module in net.net.named_modules():
        if isinstance(module, NestedLayer):
            site = f"{net.prefix}{name}" if name else f"{net.prefix}layer"
            narrowed[id(module)] = _narrow_layer(module, kept, site, draw)
        elif isinstance(module, NestedNorm):
            narrowed[id(module)] = _narrow_norm(module, kept)
    # A copy takes what the memo has in place of copying it: wide weights are never copied.
    plain = copy.deepcopy(net.net, narrowed)
    return replace_modules(
        plain, {module: _as_graph(module) for module in plain.modules() if isinstance(module, Attention)}
    )


def _as_graph(module: nn.Module) -> fx.GraphModule:
    """Turn a module of this library into one of torch."""
    graph = fx.Tracer().trace(module)
    for node in graph.nodes:
        node.type = None  # names of types could not be saved
    return fx.GraphModule(module, graph, class_name=type(module).__name__)


def _narrow_layer(layer: NestedLayer, kept: dict[str, int], site: str, draw: Mapping[str, Tensor] | None) -> nn.Module:
    index = layer.output_axis.index(kept), layer.input_axis.index(kept)
    plain = copy.copy(layer.plain)
    plain._parameters = dict(plain._parameters)
    for name, mean in layer.plain.named_parameters():
        value = mean
        if draw is not None and name in layer.log_scales:
            if f"{site}.{name}" not in draw:
                raise ValueError(f"narrow: argument `draw` has no value for site {f'{site}.{name}'!r}")
            value = draw[f"{site}.{name}"]
            if value.shape != mean.shape:
                raise ValueError(
                    f"narrow: argument `draw` has shape {tuple(value.shape)} at site {f'{site}.{name}'!r}; expected "
                    f"{tuple(mean.shape)}: draw outside of `cut(..., sliced=True)`"
                )
        cut = layer.take(name, value, index).detach().clone(memory_format=torch.contiguous_format)
        setattr(plain, name, nn.Parameter(cut, requires_grad=mean.requires_grad))
    num_in, num_out = _length(index[1], layer.input_axis.size), _length(index[0], layer.output_axis.size)
    if isinstance(plain, nn.Linear):
        plain.in_features, plain.out_features = num_in, num_out
    else:
        plain.in_channels, plain.out_channels = num_in, num_out
        if plain.groups > 1:
            plain.groups = plain.groups * num_in // layer.input_axis.size
    return plain


def _narrow_norm(norm: NestedNorm, kept: dict[str, int]) -> nn.Module:
    index = norm.axis.index(kept)
    plain = copy.deepcopy(norm.plain)
    size = _length(index, norm.axis.size)
    for name, value in [*plain.named_parameters()]:
        setattr(plain, name, nn.Parameter(take(value, index, 0).clone(), requires_grad=value.requires_grad))
    for name, value in [*plain.named_buffers()]:
        if value.dim() == 1:
            setattr(plain, name, take(value, index, 0).clone())
    if isinstance(plain, nn.GroupNorm):
        groups = plain.num_groups if plain.num_groups == 1 else plain.num_groups * size // plain.num_channels
        plain.num_groups, plain.num_channels = groups, size
    elif isinstance(plain, nn.LayerNorm | nn.RMSNorm):
        plain.normalized_shape = (size,)
    elif isinstance(plain, nn.PReLU):
        plain.num_parameters = size
    else:
        plain.num_features = size
    return plain


def _length(index: slice | Tensor | None, size: int) -> int:
    if index is None:
        return size
    return index.stop if isinstance(index, slice) else len(index)


@torch.no_grad()
def recalibrate_batchnorm(net: nn.Module, data: Iterable[Any]) -> nn.Module:
    """Replace the running statistics of all BatchNorm layers by averages over data, in place.

    A nested net's running statistics mix all widths; each narrowed net wants its own. Statistics are reset and become
    cumulative averages over the batches, whose order then does not matter; dropout and other layers are in evaluation
    mode meanwhile. Only the inputs of training data are needed, no labels.

    Args:
        net: A net with BatchNorm layers, such as `narrow` returns.
        data: Batches of inputs, or tuples that begin with them.

    Returns:
        The same net.

    Raises:
        ValueError: If the loader is empty.

    Source: Yu and Huang, arXiv 1903.05134, section 3.3 (statistics after training, for each width).

    Example:
        >>> import torch
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4))
        >>> _ = recalibrate_batchnorm(net, [torch.randn(32, 2) for _ in range(3)])
        >>> net[1].num_batches_tracked
        tensor(3)
    """
    norms: list[Any] = [module for module in net.modules() if isinstance(module, BATCH_NORMS)]
    if not norms:
        return net
    with _calibrating(net, norms):
        seen = False
        for batch in data:
            if not seen:
                for norm in norms:
                    norm.reset_running_stats()
            seen = True
            net(batch[0] if isinstance(batch, tuple | list) else batch)
    if not seen:
        raise ValueError("recalibrate_batchnorm: argument `data` has no batches")
    return net


@contextmanager
def _calibrating(net: nn.Module, norms: list[Any]) -> Iterator[None]:
    """Put norms into training mode with cumulative averages, and everything else into evaluation mode."""
    momenta = [norm.momentum for norm in norms]
    with module_mode([net], training=False):
        for norm in norms:
            norm.training, norm.momentum = True, None
        try:
            yield
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
