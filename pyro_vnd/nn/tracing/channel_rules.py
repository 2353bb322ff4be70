"""How channels pass through each operation: the table of rules.

A rule takes three lines: the names of functions and tensor methods, or types of modules; and what lies along the axes
of the result. `@rule("relu", nn.ReLU)` above `def same(call): return call.axes()` would do for one that treats each
channel alone.
"""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn
from torch.fx import Node

from pyro_vnd.nn.axis import Run
from pyro_vnd.nn.tracing.channels import Axes, Mark, Runs, scaled, whole
from pyro_vnd.nn.tracing.interpreter import Call, rule

__all__: list[str] = []

SPATIAL = ("1d", "2d", "3d")
ELEMENTWISE = """
    abs acos acosh add addcdiv addcmul asin asinh atan atan2 atanh ceil clamp clamp_max clamp_min clip copysign cos cosh
    deg2rad digamma div divide eq erf erfc erfinv exp exp2 expand_as expm1 fill floor floor_divide floordiv fmax fmin
    fmod frac ge greater gt hypot iadd imul isub itruediv isfinite isinf isnan le lerp less lgamma log log10 log1p log2
    logaddexp logical_and logical_not logical_or logical_xor logit lt masked_fill maximum minimum mod mul multiply
    nan_to_num ne neg negative not_equal positive pos pow reciprocal remainder round rsqrt rsub sgn sign sin sinc sinh
    sqrt square sub subtract tan true_divide truediv trunc where xlogy xor and or invert
    empty_like full_like ones_like rand_like randn_like zeros_like
    celu elu gelu hardshrink hardsigmoid hardswish hardtanh leaky_relu logsigmoid mish relu relu6 rrelu selu sigmoid
    silu softplus softshrink softsign tanh tanhshrink threshold
    alpha_dropout dropout dropout1d dropout2d dropout3d feature_alpha_dropout
"""
ELEMENTWISE_MODULES = """
    AlphaDropout CELU Dropout Dropout1d Dropout2d Dropout3d ELU FeatureAlphaDropout GELU Hardshrink Hardsigmoid
    Hardswish Hardtanh Identity LeakyReLU LogSigmoid Mish ReLU ReLU6 RReLU SELU SiLU Sigmoid Softplus Softshrink
    Softsign Tanh Tanhshrink Threshold
"""
CASTS = "bfloat16 bool clone contiguous cpu cuda detach double float half int long to type type_as"
REDUCTIONS = """
    all amax amin any argmax argmin count_nonzero linalg_vector_norm logsumexp max mean median min nanmean nansum norm
    prod std std_mean sum var var_mean
"""
ALONG = "cummax cummin cumprod cumsum glu log_softmax logcumsumexp normalize softmax softmin sort topk"
ALONG_MODULES = (nn.GLU, nn.LogSoftmax, nn.Softmax, nn.Softmin)
POOLING = "adaptive_avg_pool adaptive_max_pool avg_pool lp_pool max_pool"
POOLING_MODULES = "AdaptiveAvgPool AdaptiveMaxPool AvgPool LPPool MaxPool"
UPSAMPLING = (nn.Upsample, nn.UpsamplingBilinear2d, nn.UpsamplingNearest2d)
PADDING_MODULES = "CircularPad ConstantPad ReflectionPad ReplicationPad ZeroPad"


def modules(names: str, suffixes: tuple[str, ...] = ("",)) -> list[type[nn.Module]]:
    """Return those modules of torch that exist in its installed version."""
    return [getattr(nn, name + end) for name in names.split() for end in suffixes if hasattr(nn, name + end)]


@rule(nn.Linear)
def linear(call: Call) -> Mark:
    """Read the last axis, and make a new space there."""
    outputs = call.layer(call.runs(-1), call.new_space(call.module.out_features))
    return call.axes() | {len(call.shape()) - 1: outputs}


@rule(*modules("Conv ConvTranspose", SPATIAL))
def convolution(call: Call) -> Mark:
    """Read the channel axis, and make a new space there; groups tie the inputs to the outputs instead."""
    layer = call.module
    axis = len(call.shape()) - 1 - len(layer.kernel_size)
    inputs = call.runs(axis)
    if layer.groups == 1:
        outputs = call.new_space(layer.out_channels)
    else:
        outputs = in_groups(call, inputs, layer.groups, layer.out_channels)
    return only(call, axis, call.layer(inputs, outputs))


@rule(nn.SyncBatchNorm, *modules("BatchNorm", SPATIAL))
def batch_norm(call: Call) -> Mark:
    """Keep the channels of the second axis."""
    runs = call.runs(1)
    return only(call, 1, call.layer(runs, runs))


@rule(nn.GroupNorm)
def group_norm(call: Call) -> Mark:
    """Keep the channels of the second axis; those of several groups are cut by groups."""
    runs = call.runs(1)
    if call.module.num_groups > 1:
        in_groups(call, runs, call.module.num_groups, call.module.num_channels)
    return only(call, 1, call.layer(runs, runs))


@rule(*modules("InstanceNorm", SPATIAL))
def instance_norm(call: Call) -> Mark:
    """Keep the channels of the axis before the spatial ones."""
    axis = len(call.shape()) - 1 - dimensions(call)
    runs = call.runs(axis)
    return only(call, axis, call.layer(runs, runs))


@rule(*modules("LayerNorm RMSNorm"))
def layer_norm(call: Call) -> Mark:
    """Keep the last axis, unless it is normalised together with others."""
    num_axes = len(call.module.normalized_shape)
    axes = call.mixed(range(-num_axes, 0), "normalises over several axes") if num_axes > 1 else call.axes()
    runs = call.runs(-num_axes)
    return axes | {len(call.shape()) - num_axes: call.layer(runs, runs)}


@rule(nn.PReLU)
def prelu(call: Call) -> Mark:
    """Keep all channels; those of the second axis may have slopes of their own."""
    if call.module.num_parameters == 1:
        return call.axes()
    runs = call.runs(1)
    return call.axes() | {1: call.layer(runs, runs)}


@rule(ELEMENTWISE, *modules(ELEMENTWISE_MODULES))
def elementwise(call: Call) -> Mark:
    """Unite the channels of all arguments, broadcast against each other."""
    return call.join(call.tensors)


@rule(CASTS)
def cast(call: Call) -> Mark:
    """Keep the channels of the first argument."""
    return call.axes()


@rule("cat concat concatenate")
def concatenate(call: Call) -> Mark:
    """Lay channels after each other along one axis, and unite them along the others."""
    tensors = call.argument("tensors", 0)
    dim = call.argument("axis", 1, call.argument("dim", 1, 0)) % call.out.dim()
    result = call.join(tensors, without=[dim - call.out.dim()])
    if any(dim in call.axes(tensor) for tensor in tensors):
        result[dim] = tuple(run for tensor in tensors for run in call.runs(dim, tensor))
    return result


@rule("stack")
def stack(call: Call) -> Mark:
    """Unite the channels of all tensors, around a new axis."""
    dim = call.argument("dim", 1, 0) % call.out.dim()
    return {axis + (axis >= dim): runs for axis, runs in call.join(call.tensors).items()}


@rule(*(name + k for name in POOLING.split() for k in SPATIAL), *modules(POOLING_MODULES, SPATIAL))
def pool(call: Call) -> Mark:
    """Keep the axes before those that are pooled."""
    return call.each(call.mixed(range(-dimensions(call), 0), "pools channels"))


@rule("interpolate upsample", *UPSAMPLING)
def interpolate(call: Call) -> Mark:
    """Keep the axes before the spatial ones."""
    return call.mixed(range(2, call.out.dim()), "interpolates between channels")


@rule("pad", *modules(PADDING_MODULES, SPATIAL))
def pad(call: Call) -> Mark:
    """Keep the axes that are not padded."""
    widths = call.value(call.argument("padding", 1, call.argument("pad", 1)))
    return call.mixed((-1 - i // 2 for i, width in enumerate(widths) if width), "pads channels")


@rule(REDUCTIONS)
def reduction(call: Call) -> Mark:
    """Keep the axes that are not reduced."""
    position = 2 if "norm" in call.name else 1
    dims = call.argument("axis", position, call.argument("dim", position))
    if isinstance(dims, Node):  # max(x, y)
        return elementwise(call)
    ndim = len(call.shape())
    if dims is None or isinstance(dims, bool) or dims == ():
        dims = range(ndim)
    reduced = {dim % ndim for dim in ([dims] if isinstance(dims, int) else dims)}
    axes = call.mixed(reduced, "reduces over channels")
    out = call.out if isinstance(call.out, Tensor) else call.out[0]
    if out.dim() < ndim:
        axes = {axis - sum(dim < axis for dim in reduced): runs for axis, runs in axes.items()}
    return call.each(axes)


@rule(ALONG, *ALONG_MODULES)
def along(call: Call) -> Mark:
    """Keep the axes but the one along which values depend on each other."""
    dims = call.argument("dim", 2 if call.name in ("normalize", "topk") else 1)
    default = 1 if call.name == "normalize" else -1
    return call.each(call.mixed([default if dims is None else dims], "mixes channels"))


@rule("matmul bmm mm")
def matmul(call: Call) -> Mark:
    """Keep rows of the first matrix, columns of the second and the axes of a batch, such as heads."""
    left, right = call.argument("input", 0), call.argument("mat2", 1, call.argument("other", 1))
    if min(len(call.shape(left)), len(call.shape(right))) < 2:
        call.fail()
    contract(call, (left, -1), (right, -2))
    return call.join([left, right], without=[-1, -2]) | ends(call, (left, -2), (right, -1))


@rule("scaled_dot_product_attention")
def attention(call: Call) -> Mark:
    """Keep the axes of a batch, such as heads, the queries, and the channels of the values."""
    query, key, value = (call.argument(name, i) for i, name in enumerate(["query", "key", "value"]))
    mask = call.argument("attn_mask", 3)
    contract(call, (query, -1), (key, -1), (key, -2), (value, -2), *([(mask, -1)] if mask is not None else []))
    batch = [query, key, value, *([mask] if mask is not None else [])]
    return call.join(batch, without=[-1, -2]) | ends(call, (query, -2), (value, -1))


@rule("einsum")
def einsum(call: Call) -> Mark:
    """Unite the channels of each letter, and hold those that are summed over."""
    equation, inputs = call.node.args[0], call.node.args[1:]
    if not isinstance(equation, str) or not re.fullmatch(r"[A-Za-z, ]+->[A-Za-z ]*", equation):
        call.fail()
    terms, _, output = equation.replace(" ", "").partition("->")
    places: dict[str, list[tuple[Node, int]]] = {}
    tensors: Any = inputs[0] if isinstance(inputs[0], list | tuple) else inputs
    for letters, tensor in zip(terms.split(","), tensors, strict=True):
        for axis, letter in enumerate(letters):
            places.setdefault(letter, []).append((tensor, axis))
    for letter in set(places) - set(output):
        contract(call, *places[letter])
    lying = {axis: call.overlay(places[letter]) for axis, letter in enumerate(output)}
    return {axis: runs for axis, runs in lying.items() if runs}


def dimensions(call: Call) -> int:
    """Return the number of spatial axes, which is in the name."""
    return int(re.findall(r"[123]d", call.name)[0][0])


def only(call: Call, axis: int, runs: Runs) -> Axes:
    """Return what lies along the channel axis; the others are mixed by a layer, or in its statistics."""
    call.mixed(set(range(len(call.shape()))) - {axis}, "mixes channels")
    return {axis: runs}


def in_groups(call: Call, runs: Runs, groups: int, size: int) -> Runs:
    """Let channels be cut by groups of the layer; return `size` channels that are cut with them."""
    units = scaled(runs, groups)
    if units is None:
        call.hold({0: runs}, "has groups in which channels of several layers meet")
        return whole(size, f"{call.where} has groups in which channels of several layers meet")
    return tuple(Run(space, count * size // groups) for space, count in units)


def contract(call: Call, *places: tuple[Node, int]) -> None:
    """Hold channels over which products are summed: a cut is exact only where a layer reads them."""
    for tensor, axis in places:
        call.hold({0: call.axes(tensor).get(axis % len(call.shape(tensor)), ())}, "sums over channels")


def ends(call: Call, rows: tuple[Node, int], columns: tuple[Node, int]) -> Axes:
    """Return the last two axes of a product of matrices."""
    lying = {call.out.dim() - 2: call.overlay([rows]), call.out.dim() - 1: call.overlay([columns])}
    return {axis: runs for axis, runs in lying.items() if runs}
