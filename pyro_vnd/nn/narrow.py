"""Extraction of physically smaller, plain torch nets."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pyro_vnd._data import Batch, Rows, input_batches
from pyro_vnd._inputs import explain_inputs
from pyro_vnd._state import module_mode
from pyro_vnd.nn.axis import Index, kept_channels, take
from pyro_vnd.nn.depth import stand_in, take_out
from pyro_vnd.nn.layers import NestedLayer
from pyro_vnd.nn.model import NestedModel
from pyro_vnd.nn.net import NestedNet
from pyro_vnd.nn.norms import BATCH_NORMS, NestedNorm, sizes_of
from pyro_vnd.nn.submodules import computed_tensors, replace_modules
from pyro_vnd.nn.tracing.attention import Attention, as_graph
from pyro_vnd.nn.tracing.recurrent import Cell, Recurrent
from pyro_vnd.nn.width import Rounding

__all__ = [
    "drawn_parts",
    "narrow",
    "narrow_layer",
    "narrow_to_blocks",
    "narrowed_parts",
    "recalibrate_batchnorm",
    "recalibrated",
]


@torch.no_grad()
def narrow(
    net: NestedNet | NestedModel,
    width: float | int | Mapping[str, float | int] | None = None,
    draw: Mapping[str, Tensor] | None = None,
    *,
    rounding: Rounding | None = None,
    budget: float | int | None = None,
    cost: Literal["macs", "parameters", "latency"] = "macs",
    data: Rows | None = None,
) -> nn.Module:
    """Narrow a nested net to a width, or to a budget: a plain, physically smaller torch net.

    Its outputs are those of the masked net up to floating point, and it needs neither Pyro nor this library: its class
    is that of the net that was nested, its layers are torch's own. What was kept of each group is in the attribute
    `narrowed_to`, a dictionary from group to numbers of blocks and units, and in the representation. BatchNorm keeps
    the statistics of training, which are those of all widths together: see `recalibrate_batchnorm`.

    Args:
        net: The nested net, or the model of it with its likelihood.
        width: A fraction in (0, 1] for all groups (a float), a number of blocks (an int), or a mapping from group to
            either; groups that it leaves out stay whole. 1.0 is the whole net, 1 a single block.
        draw: A draw of the weights by name of their site, such as `net.guide(x)` returns; the posterior mean by
            default.
        rounding: As in `Width.kept_blocks`: without it, a fraction that is no number of blocks is an error.
        budget: In place of a width, the most that the narrowed net may cost: its widths are those of
            `widths_for(net, budget, cost, data)`, which has more arguments, for BatchNorm say.
        cost: What the budget is of: "macs", "parameters" or "latency".
        data: Validation data that the widths for a budget are chosen by, if any.

    Returns:
        A new module in the mode (training or evaluation) of the nested one, which shares no memory with it.

    Raises:
        ValueError: If a width is invalid or does not fit a group, or the draw lacks a site; if there is neither a width
            nor a budget, or both.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from pyro_vnd.nn import nest
        >>> plain = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 3))
        >>> narrow(nest(plain, torch.zeros(1, 8), num_blocks=16), 0.25)
        Sequential(
          narrowed to 16 of 64 units (4 of 16 blocks) of group 0
          (0): Linear(in_features=8, out_features=16, bias=True)
          (1): ReLU()
          (2): Linear(in_features=16, out_features=3, bias=True)
        )
    """
    model, net = net, net.net if isinstance(net, NestedModel) else net
    if not isinstance(net, NestedNet):
        raise ValueError(f"narrow: argument `net` must be a NestedNet, as `nest` returns; got {type(net).__name__}")
    if (width is None) == (budget is None):
        raise ValueError(f"narrow: give exactly one of `width` and `budget`; got {width!r} and {budget!r}")
    if budget is not None:
        from pyro_vnd.nn.budgets import widths_for  # which narrows nets to see what they cost

        width = widths_for(model, budget, cost, data)
    assert width is not None
    blocks = {name: each.num_blocks for name, each in net.widths.items()} | net.kept_blocks(width, rounding)
    return narrow_to_blocks(net, blocks, draw)


@torch.no_grad()
def narrow_to_blocks(net: NestedNet, blocks: Mapping[str, int], draw: Mapping[str, Tensor] | None = None) -> nn.Module:
    """Narrow a nested net to numbers of blocks that fit it, one for each group; `narrow` without its checks."""
    return narrowed_parts(net, blocks, draw)[0]


def narrowed_parts(
    net: NestedNet, blocks: Mapping[str, int], draw: Mapping[str, Tensor] | None
) -> tuple[nn.Module, dict[int, Any]]:
    """Do what `narrow_to_blocks` does; say also what took the place of modules and tensors, by their ids."""
    kept = {name: each.kept_units(blocks[name]) for name, each in net.widths.items()}
    narrowed: dict[int, Any] = {}
    dropped = [block for block in net.blocks if block.is_dropped(kept)]
    narrowed.update((id(block.module), stand_in(block)) for block in dropped)
    gone = {part for block in dropped for part in block.module.modules()}
    own_channels = [own for own in net.own_channels if own.module not in gone]
    for own in own_channels:
        cut = own.values(kept)
        for name in own.parameters.keys() & cut.keys():
            narrowed[id(own.tensor(name))] = _copied(cut[name], own.tensor(name))
    if draw is not None:
        for name, each in net.random_parameters.items():
            if each.module in gone:
                continue
            value = _drawn(draw, f"{net.prefix}{name}", each.mean)
            narrowed[id(each.mean)] = _copied(each.take(value, kept), each.mean)
    for name, module in net.net.named_modules():
        if module in gone:
            continue
        if isinstance(module, NestedLayer):
            index = module.output_axis.index(kept), module.input_axis.index(kept)
            narrowed[id(module)] = narrow_layer(module, index, net.site_of(name), draw, narrowed)
        elif isinstance(module, NestedNorm):
            narrowed[id(module)] = _narrow_norm(module, kept)
    # A copy takes what the memo has in place of copying it: wide weights are never copied.
    plain = copy.deepcopy(net.net, computed_tensors(net.net) | narrowed)
    of_torch: dict[nn.Module, nn.Module] = {}
    for module in plain.modules():
        if isinstance(module, Attention):
            of_torch[module] = as_graph(module)
        elif isinstance(module, Recurrent | Cell):
            of_torch[module] = module.as_torch_has_it()
    plain = replace_modules(plain, of_torch)
    for own in own_channels:
        vars(plain.get_submodule(own.path)).update(own.counts(kept))
    take_out(plain, [block.path for block in dropped if block.can_go])
    _say_what_is_left(plain, net, blocks, kept)
    return plain, narrowed


def drawn_parts(net: NestedNet, blocks: Mapping[str, int]) -> Iterator[tuple[str, Tensor, Callable[[Tensor], Tensor]]]:
    """Yield the site of each random parameter, its mean, and what returns the part of a draw that is kept.

    Args:
        net: The nested net.
        blocks: As in `narrow_to_blocks`.
    """
    kept = {name: each.kept_units(blocks[name]) for name, each in net.widths.items()}
    for name, each in net.random_parameters.items():
        yield f"{net.prefix}{name}", each.mean, partial(each.take, kept=kept)
    for name, layer in net.layers.items():
        index = layer.output_axis.index(kept), layer.input_axis.index(kept)
        for key in layer.log_scales:
            yield f"{net.site_of(name)}.{key}", layer.plain.get_parameter(key), partial(layer.take, key, index=index)


def _copied(value: Tensor, like: Tensor) -> Tensor:
    copied = value.detach().clone(memory_format=torch.contiguous_format)
    return nn.Parameter(copied, requires_grad=like.requires_grad) if isinstance(like, nn.Parameter) else copied


def _say_what_is_left(plain: nn.Module, net: NestedNet, blocks: Mapping[str, int], kept: Mapping[str, int]) -> None:
    """Put the width in effect on a narrowed net and into its representation, by means of Python alone."""
    left, lines = {}, []
    for name, width in net.widths.items():
        some, units = blocks[name], kept[name]
        left[name] = {"blocks": some, "num_blocks": width.num_blocks, "units": units, "num_units": width.num_units}
        share = f"{units} of {width.num_units} units ({some} of {width.num_blocks} blocks)"
        lines.append(f"narrowed to {share} of group {name}")
    # On the instance, since the class is not ours, and from builtins, so that it can be pickled without this library.
    own = [plain.extra_repr()] if plain.extra_repr() else []
    vars(plain).update(narrowed_to=left, extra_repr=partial(str, "\n".join(own + lines)))


def narrow_layer(
    layer: NestedLayer,
    index: tuple[Index, Index],
    site: str,
    draw: Mapping[str, Tensor] | None,
    known: dict[int, Any] | None = None,
) -> nn.Module:
    """Make a plain layer of some outputs and inputs of a nested one, at the posterior mean or with a draw.

    Args:
        layer: The nested layer.
        index: Which outputs, and which inputs.
        site: Name of its sites, without that of the parameter.
        draw: As in `narrow`.
        known: Parameters that were narrowed before, by their ids, and are shared with others; this layer's are added.

    Returns:
        A new module.

    Raises:
        ValueError: If the draw lacks a site, or has a part of it only.
    """
    memo: dict[int, Any] = {}
    known = {} if known is None else known
    for name, mean in layer.plain.named_parameters():
        if id(mean) in known:
            memo[id(mean)] = known[id(mean)]
            continue
        value = mean
        if draw is not None and name in layer.log_scales:
            value = _drawn(draw, f"{site}.{name}", mean)
        memo[id(mean)] = known[id(mean)] = _copied(layer.take(name, value, index), mean)
    plain = copy.deepcopy(layer.plain, memo)
    num_out, num_in = (
        kept_channels(each, axis.size) for each, axis in zip(index, (layer.output_axis, layer.input_axis), strict=True)
    )
    if isinstance(plain, nn.Linear):
        plain.in_features, plain.out_features = num_in, num_out
    else:
        plain.in_channels, plain.out_channels = num_in, num_out
        if plain.groups > 1:
            plain.groups = plain.groups * num_in // layer.input_axis.size
    return plain


def _drawn(draw: Mapping[str, Tensor], site: str, like: Tensor) -> Tensor:
    """Return the value of a site, of which all was drawn."""
    if site not in draw:
        raise ValueError(f"narrow: argument `draw` has no value for site {site!r}")
    if draw[site].shape != like.shape:
        raise ValueError(
            f"narrow: argument `draw` has shape {tuple(draw[site].shape)} at site {site!r}; expected "
            f"{tuple(like.shape)}: draw outside of `cut(..., sliced=True)`"
        )
    return draw[site]


def _narrow_norm(norm: NestedNorm, kept: dict[str, int]) -> nn.Module:
    index = norm.axis.index(kept)
    plain = copy.deepcopy(norm.plain)
    size = kept_channels(index, norm.axis.size)
    for name, value in [*plain.named_parameters()]:
        setattr(plain, name, nn.Parameter(take(value, {0: index}).clone(), requires_grad=value.requires_grad))
    for name, value in [*plain.named_buffers()]:
        if value.dim() == 1:
            setattr(plain, name, take(value, {0: index}).clone())
    vars(plain).update(sizes_of(plain, size))
    return plain


@torch.no_grad()
def recalibrate_batchnorm(net: nn.Module, data: Rows, *, batch_size: int = 256, num_inputs: int = 1) -> nn.Module:
    """Replace the running statistics of all BatchNorm layers by those of data, in place.

    A nested net's running statistics mix all widths; each narrowed net wants its own. Mean and variance are over all
    rows, however they are batched; what reaches a layer is normalised by its batch in the layers before, so that
    batches want to be large. Dropout and other layers are in evaluation mode meanwhile. Only the inputs of training
    data are needed, no labels.

    Args:
        net: A net with BatchNorm layers, such as `narrow` returns.
        data: Training inputs: a tensor, a tuple or list of tensors that begins with them, or a mapping in which they
            are "x" or come first; or batches, each a tensor or a sequence, from a `DataLoader` or a generator.
        batch_size: Rows of a batch, where data are tensors.
        num_inputs: How many tensors of a batch are inputs, in order; 0 for a net that takes all but "y" by name.

    Returns:
        The same net.

    Raises:
        ValueError: If there are no data, or they are not finite, or a layer sees one value of each channel only, or the
            tensors of a tuple have different numbers of rows or look like batches. The net is then as it was.

    Source: Yu and Huang, arXiv 1903.05134, section 3.3 (statistics after training, for each width).

    Example:
        >>> import torch
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4))
        >>> _ = recalibrate_batchnorm(net, torch.randn(96, 2), batch_size=32)
        >>> net[1].num_batches_tracked
        tensor(3)
    """
    if (
        num_inputs == 1
        and isinstance(data, tuple | list)
        and len(data) > 1
        and all(isinstance(rows, Tensor) for rows in data)
    ):
        alike = sum(rows.dim() > 1 and rows.shape[1:] == data[0].shape[1:] for rows in data)
        if alike > 1:
            raise ValueError(
                f"recalibrate_batchnorm: argument `data` has {alike} tensors like the inputs, rows of shape "
                f"{tuple(data[0].shape[1:])}: if they are batches, give iter(data) or torch.cat(data)"
            )
    return recalibrated(net, input_batches(data, batch_size, num_inputs))


@torch.no_grad()
def recalibrated(net: nn.Module, batches: Iterable[Batch]) -> nn.Module:
    """Replace the running statistics of a net, on its device; `recalibrate_batchnorm` without checks."""
    norms: list[Any] = [module for module in net.modules() if isinstance(module, BATCH_NORMS)]
    if not norms:
        return net
    device = next((each.device for each in net.parameters()), None)
    moments = {norm: _Moments() for norm in norms}
    before = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers()]
    try:
        _take_moments(net, moments, (batch.to(device) for batch in batches))
    except BaseException:
        for buffer, value in before:
            buffer.copy_(value)
        raise
    for norm, found in moments.items():
        if norm.running_mean is not None and found.count:
            norm.running_mean.copy_(found.mean)
            norm.running_var.copy_(found.squares / (found.count - 1))
    return net


def _take_moments(net: nn.Module, moments: Mapping[Any, _Moments], batches: Iterable[Batch]) -> None:
    """Run a net on all inputs, with norms whose moments are taken."""
    seen, dtype = False, next((each.dtype for each in net.parameters()), None)
    with _calibrating(net, moments):
        for batch in _of_two_rows(batches):
            if not seen:
                for norm in moments:
                    norm.reset_running_stats()
            seen = True
            with explain_inputs("recalibrate_batchnorm", batch.inputs, dtype):
                net(*batch.args, **batch.kwargs)
    if not seen:
        raise ValueError("recalibrate_batchnorm: argument `data` has no batches")
    if any(found.count and not bool(found.squares.isfinite().all()) for found in moments.values()):
        raise ValueError("recalibrate_batchnorm: argument `data` must be finite; a norm has seen NaN or inf")


class _Moments:
    """Mean, and sum of squares around it, of each channel of what a norm has seen; a hook that runs before it."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Any = 0.0
        self.squares: Any = 0.0

    def __call__(self, norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        values = inputs[0].detach().transpose(0, 1).flatten(1)
        more = values.shape[1]
        if more < 2:
            raise ValueError("recalibrate_batchnorm: argument `data` must have at least 2 rows; it has 1")
        total, shift = self.count + more, values.mean(1) - self.mean
        self.squares = self.squares + more * (values.var(1, correction=0) + shift.square() * self.count / total)
        self.mean = self.mean + shift * more / total
        self.count = total


def _of_two_rows(found: Iterable[Batch]) -> Iterator[Batch]:
    """Join a batch of a single row, which has no variance, to the next one, or the last one to that before it."""
    whole: list[Batch] = []
    single: list[Batch] = []
    for rows in found:
        joined = _joined([*single, rows])
        if joined.num_rows < 2:
            single = [joined]
            continue
        yield from whole
        whole, single = [joined], []
    if whole or single:
        yield _joined([*whole, *single])


def _joined(batches: Sequence[Batch]) -> Batch:
    """Join inputs of batches, of which those that are no tensors are the same."""
    if len(batches) == 1:
        return batches[0]

    def join(parts: Sequence[Any]) -> Any:
        return torch.cat([*parts]) if isinstance(parts[0], Tensor) else parts[0]

    names = batches[0].kwargs
    args = tuple(join(parts) for parts in zip(*(batch.args for batch in batches), strict=True))
    return Batch(args, {name: join([batch.kwargs[name] for batch in batches]) for name in names})


@contextmanager
def _calibrating(net: nn.Module, hooks: Mapping[Any, _Moments]) -> Iterator[None]:
    """Put norms into training mode, with a hook each, and everything else into evaluation mode."""
    with module_mode([net], training=False), ExitStack() as stack:
        for norm, hook in hooks.items():
            norm.training = True
            stack.enter_context(norm.register_forward_pre_hook(hook))
        yield
