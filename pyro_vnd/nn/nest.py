"""Conversion of ordinary torch nets into nested Bayesian ones."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, TypeGuard

import torch
from torch import Tensor, nn

from pyro_vnd._inputs import explain_inputs
from pyro_vnd._state import module_mode
from pyro_vnd.distributions import OrderedMask
from pyro_vnd.distributions.straight_through import Noise
from pyro_vnd.nn.axis import Run
from pyro_vnd.nn.layers import AFFINE, NestedLayer, Prior
from pyro_vnd.nn.net import NestedNet
from pyro_vnd.nn.norms import NestedNorm
from pyro_vnd.nn.submodules import replace_modules
from pyro_vnd.nn.tracing import channel_groups, unpack_attention
from pyro_vnd.nn.width import Width, check_int

__all__ = ["nest"]

WidthLaw = OrderedMask | float | Mapping[str, OrderedMask | float] | None


def nest(
    net: nn.Module,
    example_input: Tensor | tuple[Tensor, ...],
    *,
    num_blocks: int | Mapping[str, int] | None = None,
    frozen: int | Mapping[str, int] = 0,
    mask_per: Literal["example", "batch"] = "example",
    gated: bool | None = None,
    prior: Prior | Mapping[str, Prior] | Literal["normal"] | None = "normal",
    init_scale: float = 0.1,
    width_prior: WidthLaw = None,
    width_init: WidthLaw = None,
    temperature: float = 0.2,
    noise: Noise = "logistic",
    exclude: Collection[str] = (),
    prefix: str = "",
) -> NestedNet:
    r"""Turn an ordinary net into a nested Bayesian one, whose every hidden layer can be cut to a prefix of its units.

    The net is traced to find which layers share channels (residual sums, concatenation, flattening, depthwise and
    grouped convolutions, norms, attention heads). Each such group gets one `Width`, a learned ordered mask over blocks
    of its units that acts after norm and activation; inputs and outputs of the net stay whole. Linear and convolutional
    layers get independent Normal weights. The net given is not changed; its weights are the starting means, so that
    a pretrained net goes on from where it is.

    Args:
        net: A net that torch.fx can trace: no control flow that depends on data.
        example_input: An input, or a tuple of them, for shapes; one or two examples suffice.
        num_blocks: Number of blocks of a group, at most its number of units; or numbers by group. By default each unit
            is a block.
        frozen: Leading blocks that are always kept; or numbers by group.
        mask_per: One mask for each "example" or for each "batch"; see `NestedNet`.
        gated: Whether the KL of a weight counts as far as its units are kept; see `NestedNet`.
        prior: Prior of the weights, as in `NestedLayer`, or priors by name of layer with "" for all others; None for
            point estimates: only the masks are random.
        init_scale: Starting deviation of the posterior of weights, as a share of the prior's.
        width_prior: Prior of the lengths in blocks: an `OrderedMask`, or the rate of a geometric one, or either by
            group; uniform by default.
        width_init: Law at which the posterior of the lengths starts, likewise; the prior by default.
        temperature: Temperature of the straight-through masks.
        noise: Noise of the straight-through masks.
        exclude: Names of modules to leave alone: they stay as they are, and what goes in and out of them stays whole.
        prefix: Prefix of the names of all Pyro sites.

    Returns:
        The nested net. Groups have the names of the first layer that writes them.

    Raises:
        ValueError: If a part of the net cannot be followed; the message names it, and how to leave it alone.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> plain = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 3))
        >>> net = nest(plain, torch.zeros(1, 8), num_blocks=16)
        >>> net.widths["0"]
        Width(0, 64 units in 16 blocks, mean blocks kept 8.5, modes 1-16)
    """
    _check_not_compiled(net)
    excluded = tuple(exclude)
    nested = unpack_attention(copy.deepcopy(net), excluded)
    examples = example_input if isinstance(example_input, tuple) else (example_input,)
    with explain_inputs("nest", examples, next((parameter.dtype for parameter in net.parameters()), None)):
        groups = channel_groups(nested, example_input, exclude=excluded)
    for argument, by_group in (
        ("num_blocks", num_blocks),
        ("frozen", frozen),
        ("width_prior", width_prior),
        ("width_init", width_init),
    ):
        _check_names(argument, by_group, groups.names)
    if _by_layer(prior):
        layers = [name for name in groups.layers if type(nested.get_submodule(name)) in AFFINE]
        if unknown := sorted(set(prior) - {"", *layers}):
            raise ValueError(f"nest: argument `prior` names {unknown}; layers of the net: {layers}")
    widths: dict[str | None, Width | None] = {None: None}
    for name, units in groups.units.items():
        blocks = _of(num_blocks, name, None)
        blocks = units if blocks is None else min(check_int(name, "num_blocks", blocks, 1), units)
        always = check_int(name, "frozen", _of(frozen, name, 0), 0, blocks)
        entries = blocks - max(always, 1) + 1
        widths[name] = Width(
            name,
            units,
            blocks,
            frozen=always,
            prior=_law(_of(width_prior, name, None), entries),
            init=_law(_of(width_init, name, None), entries),
            temperature=temperature,
            noise=noise,
        )
    replacements: dict[nn.Module, nn.Module] = {}
    for name, channels in groups.layers.items():
        layer: Any = nested.get_submodule(name)
        inputs, outputs = (
            tuple(Run(widths[run.owner], run.size) for run in runs) for runs in (channels.inputs, channels.outputs)
        )
        if type(layer) in AFFINE:
            replacements[layer] = NestedLayer(
                layer, inputs=inputs, outputs=outputs, prior=_prior_of(prior, name), init_scale=init_scale
            )
        elif any(run.owner is not None for run in outputs):
            replacements[layer] = NestedNorm(layer, outputs)
    result = NestedNet(replace_modules(nested, replacements), mask_per=mask_per, gated=gated, prefix=prefix)
    result.whole = groups.whole
    result.input_shapes = tuple(tuple(x.shape) for x in examples if isinstance(x, Tensor))
    result.positions = _check_sliced(result, example_input)
    return result


def _check_not_compiled(net: nn.Module) -> None:
    for name, part in net.named_modules():
        if type(part).__name__ == "OptimizedModule":  # torch has no public name for it
            which = f"its part {name!r}" if name else "it"
            raise ValueError(
                f"nest: argument `net` must be the net itself; {which} is what torch.compile made of one. "
                "Nest first, and compile afterwards"
            )


def _of(by_group: Any, name: str, default: Any) -> Any:
    return by_group.get(name, default) if isinstance(by_group, Mapping) else by_group


def _check_names(argument: str, by_group: Any, names: tuple[str, ...]) -> None:
    unknown = sorted(set(by_group) - set(names)) if isinstance(by_group, Mapping) else []
    if unknown:
        raise ValueError(f"nest: argument `{argument}` names {unknown}; groups of the net: {list(names)}")


def _law(law: OrderedMask | float | None, entries: int) -> OrderedMask | None:
    return OrderedMask.geometric(law, entries) if isinstance(law, float) else law


def _prior_of(prior: Any, layer: str) -> Any:
    return prior.get(layer, prior.get("", "normal")) if _by_layer(prior) else prior


def _by_layer(prior: Any) -> TypeGuard[Mapping[str, Any]]:
    return isinstance(prior, Mapping) and not (prior and set(prior) <= {"weight", "bias"})


def _check_sliced(net: NestedNet, example_input: Tensor | tuple[Tensor, ...]) -> dict[str, int]:
    """Compare a pass that is cut by masks with one that computes the kept part only; count positions of the layers."""
    inputs = example_input if isinstance(example_input, tuple) else (example_input,)
    half = {name: max(each.always_kept, each.num_blocks // 2) for name, each in net.widths.items()}
    outputs = []
    with module_mode([net], training=False), torch.no_grad(), _counted(net) as positions:
        for sliced in (False, True):
            with net.cut(half, sliced=sliced), net._drawn("posterior", len(inputs[0]), weights=False):
                try:
                    outputs.append(net.net(*inputs))
                except RuntimeError as error:
                    raise ValueError(
                        f"nest: the net does not run with fewer channels: {error}. Does its forward name a number of "
                        "channels, as in view(-1, 512)? Write torch.flatten(x, 1), or reshape with -1 there"
                    ) from error
    dense, sliced_outputs = ([x] if isinstance(x, Tensor) else list(x) for x in outputs)
    for one, other in zip(dense, sliced_outputs, strict=True):
        if isinstance(one, Tensor) and not torch.allclose(
            one, other, rtol=1e-3, atol=1e-3 * (1 + one.abs().max().item())
        ):
            raise ValueError(
                "nest: a cut net and the same net masked differ; a part of it mixes channels in a way that was not "
                f"recognised. Leave parts alone with `exclude` to find it: {list(dict(net.net.named_children()))}"
            )
    return {name: count // (2 * len(inputs[0])) for name, count in positions.items()}


@contextmanager
def _counted(net: NestedNet) -> Iterator[dict[str, int]]:
    """Count the positions, rows of a linear layer or pixels of a convolution, to which layers are applied."""
    positions = dict.fromkeys(net.layers, 0)

    def count(name: str) -> Callable[..., None]:
        def hook(layer: NestedLayer, inputs: tuple[Tensor], output: Tensor) -> None:
            x = inputs[0] if layer.transposed else output
            positions[name] += x.numel() // x.shape[layer.channel_dim]

        return hook

    handles = [layer.register_forward_hook(count(name)) for name, layer in net.layers.items()]
    try:
        yield positions
    finally:
        for handle in handles:
            handle.remove()
