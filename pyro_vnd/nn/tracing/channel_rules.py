"""How channels pass through each operation: the table of rules.

A rule takes three lines: the names of functions and tensor methods, or types of modules; and what lies along the axes
of the result. `@rule("relu", nn.ReLU)` above `def same(call): return call.axes()` would do for one that treats each
channel alone. Rules of layers, which have weights, are in a module of their own.
"""

from __future__ import annotations

import re
from typing import Any, TypeAlias

from torch import nn

from pyro_vnd.nn.tracing.call import Call, rule
from pyro_vnd.nn.tracing.channels import Axes, extent, split_at, unify
from pyro_vnd.nn.tracing.tape import Attribute, Size, Value, numbers_in

__all__ = ["SPATIAL", "contract", "dimensions", "ends", "modules"]

Results: TypeAlias = Axes | tuple[Axes, ...]

SPATIAL = ("1d", "2d", "3d")
ELEMENTWISE = """
    abs acos acosh add addcdiv addcmul asin asinh atan atan2 atanh ceil clamp clamp_max clamp_min clip copysign cos cosh
    deg2rad digamma div divide eq erf erfc erfinv exp exp2 expand_as expm1 fill floor floor_divide floordiv fmax fmin
    fmod frac ge greater gt hypot iadd imul isub itruediv isfinite isinf isnan le lerp less lgamma log log10 log1p log2
    logaddexp logical_and logical_not logical_or logical_xor logit lt masked_fill maximum minimum mod mul multiply
    nan_to_num ne neg negative not_equal positive pos pow reciprocal remainder round rsqrt rsub sgn sign sin sinc sinh
    sqrt square sub subtract tan true_divide truediv trunc where xlogy xor zero and or invert
    radd rsub rmul rdiv rtruediv rpow rmod rfloordiv rand ror ior iand ipow
    complex polar bernoulli empty_like full_like ones_like rand_like randn_like zeros_like
    celu elu gelu hardshrink hardsigmoid hardswish hardtanh leaky_relu logsigmoid mish relu relu6 rrelu selu sigmoid
    silu softplus softshrink softsign tanh tanhshrink threshold
    alpha_dropout dropout dropout1d dropout2d dropout3d feature_alpha_dropout
"""
ELEMENTWISE_MODULES = """
    AlphaDropout CELU Dropout Dropout1d Dropout2d Dropout3d ELU FeatureAlphaDropout GELU Hardshrink Hardsigmoid
    Hardswish Hardtanh Identity LeakyReLU LogSigmoid Mish ReLU ReLU6 RReLU SELU SiLU Sigmoid Softplus Softshrink
    Softsign Tanh Tanhshrink Threshold
"""
CASTS = """
    data real imag angle conj bfloat16 bool clone contiguous cpu cuda detach double float half int long to type type_as
    view_as_real
"""
REDUCTIONS = """
    all amax amin any argmax argmin count_nonzero linalg_vector_norm logsumexp max mean median min nanmean nansum norm
    prod std std_mean sum var var_mean
"""
ALONG = "cummax cummin cumprod cumsum log_softmax logcumsumexp normalize softmax softmin sort topk"
ALONG_MODULES = (nn.LogSoftmax, nn.Softmax, nn.Softmin)
POOLING = "adaptive_avg_pool adaptive_max_pool avg_pool lp_pool max_pool"
POOLING_MODULES = "AdaptiveAvgPool AdaptiveMaxPool AvgPool LPPool MaxPool"
UPSAMPLING = (nn.Upsample, nn.UpsamplingBilinear2d, nn.UpsamplingNearest2d)
PADDING_MODULES = "CircularPad ConstantPad ReflectionPad ReplicationPad ZeroPad"


def modules(names: str, suffixes: tuple[str, ...] = ("",)) -> list[type[nn.Module]]:
    """Return those modules of torch that exist in its installed version."""
    return [getattr(nn, name + end) for name in names.split() for end in suffixes if hasattr(nn, name + end)]


@rule(ELEMENTWISE, *modules(ELEMENTWISE_MODULES))
def elementwise(call: Call) -> Results:
    """Unite the channels of all arguments, broadcast against each other."""
    if call.name == "where" and len(call.op.args) + len(call.op.kwargs) == 1:
        return places(call)
    return call.join(call.tensors)


@rule("nonzero argwhere")
def places(call: Call) -> tuple[Axes, ...]:
    """Know nothing of the places where something is true, of which there are as many as the inputs make."""
    call.hold(call.axes(), "looks for places")
    return ({},) * len(call.op.outputs)


@rule(CASTS)
def cast(call: Call) -> Axes:
    """Keep the channels of the first argument."""
    return call.axes()


@rule("cat concat concatenate")
def concatenate(call: Call) -> Axes:
    """Lay channels after each other along one axis, and unite them along the others."""
    tensors = call.argument("tensors", 0)
    dim = call.argument("axis", 1, call.argument("dim", 1, 0)) % len(call.out.shape)
    result = call.join(tensors, without=[dim - len(call.out.shape)])
    if any(dim in call.axes(tensor) for tensor in tensors):
        result[dim] = tuple(run for tensor in tensors for run in call.runs(dim, tensor))
    return result


@rule("stack")
def stack(call: Call) -> Axes:
    """Unite the channels of all tensors, around a new axis."""
    dim = call.argument("dim", 1, 0) % len(call.out.shape)
    return {axis + (axis >= dim): runs for axis, runs in call.join(call.tensors).items()}


@rule(
    *(name + k + end for name in POOLING.split() for k in SPATIAL for end in ("", "_with_indices")),
    *modules(POOLING_MODULES, SPATIAL),
)
def pool(call: Call) -> Results:
    """Keep the axes before those that are pooled."""
    return each(call, call.mixed(range(-dimensions(call), 0), "pools channels"))


@rule("interpolate upsample", *UPSAMPLING)
def interpolate(call: Call) -> Axes:
    """Keep the axes before the spatial ones."""
    return call.mixed(range(2, len(call.out.shape)), "interpolates between channels")


@rule("pad", *modules(PADDING_MODULES, SPATIAL))
def pad(call: Call) -> Axes:
    """Keep the axes that are not padded."""
    widths = call.argument("padding", 1, call.argument("pad", 1))
    return call.mixed((-1 - i // 2 for i, width in enumerate(widths) if width), "pads channels")


@rule(REDUCTIONS)
def reduction(call: Call) -> Results:
    """Keep the axes that are not reduced."""
    position = 2 if "norm" in call.name else 1
    dims = call.argument("axis", position, call.argument("dim", position))
    if isinstance(dims, Value):  # max(x, y)
        return elementwise(call)
    ndim = len(call.shape())
    if dims is None or isinstance(dims, bool) or dims == ():
        dims = range(ndim)
    reduced = {dim % ndim for dim in ([dims] if isinstance(dims, int) else dims)}
    axes = call.mixed(reduced, "reduces over channels")
    if len(call.out.shape) < ndim:
        axes = {axis - sum(dim < axis for dim in reduced): runs for axis, runs in axes.items()}
    return each(call, axes)


@rule(ALONG, *ALONG_MODULES)
def along(call: Call) -> Results:
    """Keep the axes but the one along which values depend on each other."""
    dims = call.argument("dim", 2 if call.name in ("normalize", "topk") else 1)
    if dims is None and "soft" in call.name.lower():  # as torch's softmax without an axis
        dims = 0 if len(call.shape()) in (0, 1, 3) else 1
    default = 1 if call.name == "normalize" else -1
    return each(call, call.mixed([default if dims is None else dims], "mixes channels"))


@rule("glu", nn.GLU)
def gated(call: Call) -> Axes:
    """Cut both halves of an axis together."""
    dim = call.argument("dim", 1, -1) % len(call.shape())
    runs, size = call.axes().get(dim), call.shape()[dim]
    axes = {axis: each for axis, each in call.axes().items() if axis != dim}
    if runs is None:
        return axes
    if len(runs) == 1:
        split_at(runs[0], (size // 2, size // 2))
    if len(runs) % 2 or extent(runs[: len(runs) // 2]) != size // 2:
        return call.mixed([dim], "takes channels apart")
    first, second = runs[: len(runs) // 2], runs[len(runs) // 2 :]
    unify(first, second, f"{call.where} combines channels of different make-up")
    return axes | {dim: first}


@rule("view_as_complex")
def pairs(call: Call) -> Axes:
    """Keep the axes but the last, along which real and imaginary parts lie."""
    return call.mixed([-1], "makes complex numbers of them")


@rule("diff")
def differences(call: Call) -> Axes:
    """Keep the axes but the one along which neighbours are subtracted."""
    return call.mixed([call.argument("dim", 2, -1)], "subtracts neighbours")


@rule("tril triu")
def triangle(call: Call) -> Axes:
    """Keep all axes but those of the matrices."""
    return call.mixed([-1, -2], "takes positions")


@rule("gather take_along_dim")
def gather(call: Call) -> Axes:
    """Unite channels but along the axis that is indexed."""
    dim = call.argument("dim", 1)
    return call.join(call.tensors, without=[_held(call, dim, call.tensors)])


@rule("index_add index_copy index_fill")
def index_add(call: Call) -> Axes:
    """Unite channels but along the axis that is indexed."""
    dim, tensors = call.argument("dim", 1), [call.tensors[0], *call.tensors[2:]]
    return call.join(tensors, without=[_held(call, dim, tensors)])


@rule("scatter scatter_add scatter_reduce")
def scatter(call: Call) -> Axes:
    """Unite channels but along the axis that is indexed."""
    dim = call.argument("dim", 1)
    return call.join(call.tensors, without=[_held(call, dim, call.tensors)])


@rule("cosine_similarity pairwise_distance", nn.CosineSimilarity, nn.PairwiseDistance)
def similarity(call: Call) -> Axes:
    """Unite channels but along the axis that is summed over."""
    if "pair" in call.name.lower():
        dim, keep = -1, call.argument("keepdim", 4, False)
    else:
        dim, keep = call.argument("dim", 2, 1), False
    ndim = max(len(call.shape(tensor)) for tensor in call.tensors)
    axes = call.join(call.tensors, without=[_held(call, dim, call.tensors)])
    return axes if keep else {axis - (axis > dim % ndim): runs for axis, runs in axes.items()}


@rule("cdist")
def distances(call: Call) -> Axes:
    """Keep the rows of both matrices, and hold the channels that are summed over."""
    left, right = call.tensors[:2]
    contract(call, (left, -1), (right, -1))
    return call.join([left, right], without=[-1, -2]) | ends(call, (left, -2), (right, -2))


def _held(call: Call, dim: int, tensors: list[Value]) -> int:
    """Hold what lies along an axis of tensors; return the axis, counted from behind."""
    ndim = max(len(call.shape(tensor)) for tensor in tensors)
    for tensor in tensors:
        call.mixed([dim], "picks channels", tensor)
    return dim % ndim - ndim


@rule(*(f"max_unpool{k}" for k in SPATIAL), *modules("MaxUnpool", SPATIAL))
def unpool(call: Call) -> Axes:
    """Keep the axes before those that are spread out."""
    axes = call.join(call.tensors[:2])
    first = len(call.shape()) - dimensions(call)
    call.hold([runs for axis, runs in axes.items() if axis >= first], "spreads channels out")
    return {axis: runs for axis, runs in axes.items() if axis < first}


@rule("zeros ones empty full rand randn new_zeros new_ones new_empty new_full", follows_sizes=True)
def factory(call: Call) -> Axes:
    """Know the axes of a new tensor by the numbers that it is made with."""
    skip = 1 if call.name.startswith("new") else 0
    given = call.op.kwargs.get("size", call.op.args[skip:])
    sizes = given[0] if isinstance(given, tuple | list) and given and isinstance(given[0], tuple | list) else given
    axes: Axes = {}
    for axis, size in enumerate(sizes if isinstance(sizes, tuple | list) else (sizes,)):
        sources = numbers_in(size)
        for source in sources:
            known = call.interpreter.axes(source.value).get(source.axis, ()) if isinstance(source, Size) else ()
            if known and axis < len(call.out.shape) and extent(known) == call.out.shape[axis] == size:
                axes[axis] = known
            elif isinstance(source, Attribute) and size == source.number and size > 1:
                axes[axis] = call.attribute(source)
            elif known:
                call.hold([known], "computes with the number of channels")
    return axes


@rule("matmul bmm mm imatmul")
def matmul(call: Call) -> Axes:
    """Keep rows of the first matrix, columns of the second and the axes of a batch, such as heads."""
    left, right = call.argument("input", 0), call.argument("mat2", 1, call.argument("other", 1))
    if min(len(call.shape(left)), len(call.shape(right))) < 2:
        call.fail()
    if len(call.shape(right)) == 2 and call.interpreter.reads_of(right):
        return call.read(left, -1, right, 0, 1)
    contract(call, (left, -1), (right, -2))
    return call.join([left, right], without=[-1, -2]) | ends(call, (left, -2), (right, -1))


@rule("addmm baddbmm")
def add_matmul(call: Call) -> Axes:
    """Multiply matrices, and unite the result with what is added."""
    added, left, right = call.tensors[:3]
    if call.name == "addmm" and call.interpreter.reads_of(right):
        product = call.read(left, -1, right, 0, 1)
    else:
        contract(call, (left, -1), (right, -2))
        product = call.join([left, right], without=[-1, -2]) | ends(call, (left, -2), (right, -1))
    for axis, runs in call.axes(added).items():
        place = axis + len(call.out.shape) - len(added.shape)
        with_it = product.setdefault(place, runs)
        if with_it is not runs and added.shape[axis] > 1:
            unify(with_it, runs, f"{call.where} combines channels of different make-up")
    return product


@rule("scaled_dot_product_attention")
def attention(call: Call) -> Axes:
    """Keep the axes of a batch, such as heads, the queries, and the channels of the values."""
    query, key, value = (call.argument(name, i) for i, name in enumerate(["query", "key", "value"]))
    mask = call.argument("attn_mask", 3)
    contract(call, (query, -1), (key, -1), (key, -2), (value, -2), *([(mask, -1)] if mask is not None else []))
    batch = [query, key, value, *([mask] if mask is not None else [])]
    return call.join(batch, without=[-1, -2]) | ends(call, (query, -2), (value, -1))


@rule("einsum")
def einsum(call: Call) -> Axes:
    """Unite the channels of each letter, and hold those that are summed over."""
    equation, inputs = call.op.args[0], call.op.args[1:]
    if not isinstance(equation, str) or not re.fullmatch(r"[A-Za-z, ]+->[A-Za-z ]*", equation):
        call.fail()
    terms, _, output = equation.replace(" ", "").partition("->")
    places: dict[str, list[tuple[Value, int]]] = {}
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


def contract(call: Call, *places: tuple[Value, int]) -> None:
    """Hold channels over which products are summed: a cut is exact only where a layer reads them."""
    for tensor, axis in places:
        call.hold({0: call.axes(tensor).get(axis % len(call.shape(tensor)), ())}, "sums over channels")


def each(call: Call, axes: Axes) -> Results:
    """Give the same axes to each of the results."""
    return tuple(dict(axes) for _ in call.op.outputs)


def ends(call: Call, rows: tuple[Value, int], columns: tuple[Value, int]) -> Axes:
    """Return the last two axes of a product of matrices."""
    lying = {len(call.out.shape) - 2: call.overlay([rows]), len(call.out.shape) - 1: call.overlay([columns])}
    return {axis: runs for axis, runs in lying.items() if runs}
