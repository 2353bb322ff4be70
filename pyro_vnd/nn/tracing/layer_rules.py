"""How channels pass through layers, which have weights along them: modules, and functions that take a weight."""

from __future__ import annotations

from typing import Any

from torch import nn

from pyro_vnd.nn.axis import Run
from pyro_vnd.nn.tracing.call import Call, rule
from pyro_vnd.nn.tracing.channel_rules import SPATIAL, dimensions, modules
from pyro_vnd.nn.tracing.channels import Axes, Runs, are_rows, scaled, unify, whole
from pyro_vnd.nn.tracing.tape import Attribute, Value, numbers_in

__all__: list[str] = []


@rule(nn.Linear)
def linear(call: Call) -> Axes:
    """Read the last axis, and make a new space there."""
    inputs, outputs = call.runs(-1), call.weight_axis(call.module.weight, 0)
    call.weight_axis(call.module.weight, 1, inputs)
    along(call, call.module.bias, outputs)
    return call.axes() | {len(call.shape()) - 1: call.layer(inputs, outputs, made=True)}


@rule(*modules("Conv ConvTranspose", SPATIAL))
def convolution(call: Call) -> Axes:
    """Read the channel axis, and make a new space there; groups tie the inputs to the outputs instead."""
    layer = call.module
    axis, inputs = before_space(call)
    ends = (1, 0) if layer.transposed else (0, 1)
    if layer.groups == 1:
        outputs = call.weight_axis(layer.weight, ends[0])
        call.weight_axis(layer.weight, ends[1], inputs)
    else:
        outputs = in_groups(call, inputs, layer.groups, layer.out_channels)
        call.weight_axis(layer.weight, 0, inputs if layer.transposed else outputs)
    along(call, layer.bias, outputs)
    return only(call, axis, call.layer(inputs, outputs, made=True))


@rule(nn.Embedding)
def embedding(call: Call) -> Axes:
    """Make channels along a new axis; rows of the table are whole."""
    table = call.module
    if table.max_norm is not None:
        call.fail()
    outputs = call.weight_axis(table.weight, 1)
    for run in outputs:
        run.owner.make()
    name = call.interpreter.names[id(table.weight)].rpartition(".")[0]
    call.interpreter.bind(Attribute(name, "embedding_dim", None, table.embedding_dim), outputs)
    return call.axes() | {len(call.shape()): outputs}


@rule(nn.EmbeddingBag)
def bag(call: Call) -> Axes:
    """Make channels for each bag, a row of the indices."""
    table, indices = call.module, call.tensors[0]
    if table.max_norm is not None or len(indices.shape) != 2:
        call.fail()
    outputs = call.weight_axis(table.weight, 1)
    for run in outputs:
        run.owner.make()
    name = call.interpreter.names[id(table.weight)].rpartition(".")[0]
    call.interpreter.bind(Attribute(name, "embedding_dim", None, table.embedding_dim), outputs)
    return call.mixed([1], "sums over channels") | {1: outputs}


@rule("embedding")
def functional_embedding(call: Call) -> Axes:
    """Make channels along a new axis; rows of the table are whole."""
    indices, table = call.argument("input", 0), call.argument("weight", 1)
    if call.argument("max_norm", 3) is not None:
        call.fail()
    outputs = call.runs(1, table)
    call.hold([call.runs(0, table)], "picks rows of it")
    for run in outputs:
        run.owner.make()
    return call.axes(indices) | {len(indices.shape): outputs}


@rule(nn.SyncBatchNorm, *modules("BatchNorm", SPATIAL))
def batch_norm(call: Call) -> Axes:
    """Keep the channels of the second axis."""
    return only(call, 1, of_norm(call, call.runs(1)))


@rule(nn.GroupNorm)
def group_norm(call: Call) -> Axes:
    """Keep the channels of the second axis; those of several groups are cut by groups."""
    runs = call.runs(1)
    if call.module.num_groups > 1:
        in_groups(call, runs, call.module.num_groups, call.module.num_channels)
    return only(call, 1, of_norm(call, runs))


@rule(*modules("InstanceNorm", SPATIAL))
def instance_norm(call: Call) -> Axes:
    """Keep the channels of the axis before the spatial ones."""
    axis = len(call.shape()) - 1 - dimensions(call)
    return only(call, axis, of_norm(call, call.runs(axis)))


@rule(*modules("LayerNorm RMSNorm"))
def layer_norm(call: Call) -> Axes:
    """Keep the last axis, unless it is normalised together with others."""
    num_axes = len(call.module.normalized_shape)
    if num_axes > 1:
        return call.mixed(range(-num_axes, 0), "normalises over several axes")
    return call.axes() | {len(call.shape()) - 1: of_norm(call, call.runs(-1))}


@rule(nn.PReLU)
def prelu(call: Call) -> Axes:
    """Keep all channels; those of the second axis may have slopes of their own."""
    return call.axes() if call.module.num_parameters == 1 else call.axes() | {1: of_norm(call, call.runs(1))}


@rule("linear")
def functional_linear(call: Call) -> Axes:
    """Read the last axis with a weight of any module."""
    x, weight, bias = call.argument("input", 0), call.argument("weight", 1), call.argument("bias", 2)
    axes = call.read(x, -1, weight, 1, 0)
    with_bias(call, axes[len(x.shape) - 1], bias)
    return axes


@rule(*(f"conv{k}" for k in SPATIAL), *(f"conv_transpose{k}" for k in SPATIAL), follows_sizes=True)
def functional_convolution(call: Call) -> Axes:
    """Read the channel axis with a weight of any module."""
    x, weight, bias = call.argument("input", 0), call.argument("weight", 1), call.argument("bias", 2)
    transposed = "transpose" in call.name
    axis = len(x.shape) - 1 - dimensions(call)
    groups = call.argument("groups", 6, 1)
    call.hold([runs for dim, runs in call.axes(weight).items() if dim > 1], "is spatial there")
    if groups == 1:
        axes = call.read(x, axis, weight, int(not transposed), int(transposed))
    else:
        axes = _in_groups_of_weight(call, x, axis, weight, groups, transposed)
    with_bias(call, axes[axis], bias)
    return only(call, axis, axes[axis])


def _in_groups_of_weight(call: Call, x: Value, axis: int, weight: Value, groups: int, transposed: bool) -> Axes:
    """Tie the outputs of a convolution in groups to its inputs, and its number of groups, if that is an attribute."""
    inputs = call.runs(axis, x)
    outputs = in_groups(call, inputs, groups, call.out.shape[axis])
    call.hold([call.axes(weight).get(1, ())], "has channels within its groups")
    unify(call.runs(0, weight), inputs if transposed else outputs, f"{call.where} is used again on other channels")
    units = scaled(inputs, int(groups))
    sources = numbers_in(groups)
    bound = units and all(isinstance(each, Attribute) and call.interpreter.bind(each, units) for each in sources)
    name = call.interpreter.reads_of(weight)
    if not (bound and sources) or not name:
        call.hold([inputs, outputs], "has a fixed number of groups")
    else:
        call.interpreter.record(name, inputs, outputs, call.rows_of(x), call.where, read=True)
    return {axis: outputs}


@rule("batch_norm instance_norm", follows_sizes=True)
def functional_batch_norm(call: Call) -> Axes:
    """Keep the channels of the second axis, which parameters and statistics have too."""
    runs = call.runs(1)
    for tensor in call.tensors[1:]:
        unify(runs, call.runs(0, tensor), f"{call.where} combines channels of different make-up")
    return only(call, 1, runs)


@rule("layer_norm rms_norm", follows_sizes=True)
def functional_layer_norm(call: Call) -> Axes:
    """Keep the last axis; the length that is normalised over must be an attribute of a module, or the tensor's own."""
    shape = call.argument("normalized_shape", 1)
    if len(shape) > 1:
        return call.mixed(range(-len(shape), 0), "normalises over several axes")
    runs = call.runs(-1)
    for tensor in call.tensors[1:]:
        unify(runs, call.runs(0, tensor), f"{call.where} combines channels of different make-up")
    sources = numbers_in(shape)
    if not sources or not all(_counts(call, source, runs) for source in sources):
        call.hold([runs], "has a fixed size")
    _record_statistics(call, runs)
    return call.axes() | {len(call.shape()) - 1: runs}


@rule("group_norm", follows_sizes=True)
def functional_group_norm(call: Call) -> Axes:
    """Keep the channels of the second axis; those of several groups are cut by groups."""
    runs, groups = call.runs(1), call.argument("num_groups", 1)
    for tensor in call.tensors[1:]:
        unify(runs, call.runs(0, tensor), f"{call.where} combines channels of different make-up")
    if groups > 1:
        in_groups(call, runs, groups, call.shape()[1])
        units, sources = scaled(runs, int(groups)), numbers_in(groups)
        if not units or not sources or not all(_counts(call, source, units) for source in sources):
            call.hold([runs], "has a fixed number of groups")
    else:
        _record_statistics(call, runs)
    return only(call, 1, runs)


def _record_statistics(call: Call, runs: Runs) -> None:
    """Note that statistics are taken over channels, with a weight by which the function is known when it is called."""
    weight = next(iter(call.tensors[1:]), None)
    name = "" if weight is None else call.interpreter.reads_of(weight)
    if name:
        call.interpreter.record(name, runs, runs, call.rows_of(call.tensors[0]), call.where, read=True)
    else:
        call.hold([runs], "normalises over channels, without a weight")


def _counts(call: Call, source: Any, runs: Runs) -> bool:
    """Say whether a number counts channels, when these are cut, too."""
    if isinstance(source, Attribute):
        return call.interpreter.bind(source, runs)
    known = call.interpreter.axes(source.value).get(source.axis)
    if known is not None:
        unify(known, runs, f"{call.where} combines channels of different make-up")
    return known is not None


def along(call: Call, parameter: Any, runs: Runs) -> None:
    """Let a parameter of this module have the same channels."""
    if parameter is not None and parameter.dim() == 1:
        call.weight_axis(parameter, 0, runs)


def with_bias(call: Call, runs: Runs, bias: Any) -> None:
    """Unite the channels with those of a bias that a function was given."""
    if bias is not None:
        unify(runs, call.runs(0, bias), f"{call.where} combines channels of different make-up")


def of_norm(call: Call, runs: Runs) -> Runs:
    """Record a norm, whose parameters and statistics have the same channels."""
    for name in ("weight", "bias", "running_mean", "running_var"):
        along(call, getattr(call.module, name, None), runs)
    return call.layer(runs, runs)


def before_space(call: Call) -> tuple[int, Runs]:
    """Return the axis before the spatial ones, and what lies along it."""
    axis = len(call.shape()) - 1 - len(call.module.kernel_size)
    return axis, call.runs(axis)


def only(call: Call, axis: int, runs: Runs) -> Axes:
    """Return the channel axis and the examples; other axes are mixed by a layer, or in its statistics."""
    before = call.axes()
    examples = {at: each for at, each in before.items() if at < axis and are_rows(each)}
    call.mixed(set(range(len(call.shape()))) - {axis, *examples}, "mixes channels")
    return examples | {axis: runs}


def in_groups(call: Call, runs: Runs, groups: int, size: int) -> Runs:
    """Let channels be cut by groups of the layer; return `size` channels that are cut with them."""
    units = scaled(runs, int(groups))
    if units is None:
        call.hold([runs], "has groups in which channels of several layers meet")
        return whole(size, f"{call.where} has groups in which channels of several layers meet")
    return tuple(Run(space, count * size // int(groups)) for space, count in units)
