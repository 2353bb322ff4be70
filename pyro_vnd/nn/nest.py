"""Conversion of ordinary torch nets into nested Bayesian ones."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Collection, Mapping
from numbers import Real
from typing import Any, Literal, TypeGuard

import torch
from torch import Tensor, nn

from pyro_vnd._data import Batch, take_rows
from pyro_vnd._inputs import check_numbers, explain_inputs
from pyro_vnd.distributions import OrderedMask
from pyro_vnd.distributions.straight_through import Noise
from pyro_vnd.nn.checking import Misfit, check_and_count
from pyro_vnd.nn.layers import Prior
from pyro_vnd.nn.net import NestedNet
from pyro_vnd.nn.parts import Parts
from pyro_vnd.nn.preparing import prepared
from pyro_vnd.nn.random_parameters import ZeroMeanNormal
from pyro_vnd.nn.table import share_that_narrows
from pyro_vnd.nn.tracing import MUST_RUN, ChannelGroups, channel_groups
from pyro_vnd.nn.width import Width, check_int

__all__ = ["nest"]

WidthLaw = OrderedMask | float | Mapping[str, OrderedMask | float] | None


def nest(
    net: nn.Module,
    example_input: Tensor | tuple[Tensor, ...] | Mapping[str, Tensor],
    *,
    num_blocks: int | Mapping[str, int] | None = None,
    frozen: int | Mapping[str, int] = 0,
    mask_per: Literal["example", "batch"] = "example",
    gated: bool | None = None,
    prior: Prior | float | Literal["normal"] | Mapping[str, Any] | None = "normal",
    init_scale: float = 0.1,
    width_prior: WidthLaw = None,
    width_init: WidthLaw = None,
    temperature: float = 0.2,
    noise: Noise = "logistic",
    exclude: Collection[str] = (),
    strict: bool = False,
    depth: bool = False,
    prefix: str = "",
) -> NestedNet:
    r"""Turn an ordinary net into a nested Bayesian one, whose every hidden layer can be cut to a prefix of its units.

    The net is run on the example, as it is written, to find which layers share channels (residual sums, concatenation,
    flattening, depthwise and grouped convolutions, norms, embeddings, attention heads). Each such group gets one
    `Width`, a learned ordered mask over blocks of its units that acts after norm and activation; inputs and outputs of
    the net stay whole. Linear and convolutional layers get independent Normal weights; other parameters along channels,
    such as embeddings and scales of layers, are cut with them, as point estimates if `prior` does not name them. The
    net given is not changed; its weights are the starting means, so that a pretrained net goes on from where it is.

    Args:
        net: Any net. What it does may depend on shapes; where it depends on data, the example decides.
        example_input: An input, or a tuple of them, or a mapping for a net that takes them by name, for shapes; one or
            two examples suffice.
        num_blocks: Number of blocks of a group, at most its number of units; or numbers by group. By default each unit
            is a block.
        frozen: Leading blocks that are always kept; or numbers by group.
        mask_per: One mask for each "example" or for each "batch"; see `NestedNet`.
        gated: Whether the KL of a weight counts as far as its units are kept; see `NestedNet`.
        prior: Prior of the weights, as in `NestedLayer`, or a number s for N(0, s^2), or None for point estimates: only
            the masks are random. Or any of these by name of layer, with "" for all others. Other parameters, such as a
            class token, the scale of a layer or the table of an embedding, get a law where they are named, or their
            module is; "normal" is then N(0, 1).
        init_scale: Starting deviation of the posterior of weights, as a share of the prior's.
        width_prior: Prior of the lengths in blocks: an `OrderedMask`, or the rate of a geometric one, or either by
            group; uniform by default.
        width_init: Law at which the posterior of the lengths starts, likewise; the prior by default.
        temperature: Temperature of the straight-through masks.
        noise: Noise of the straight-through masks.
        exclude: Names of modules to leave alone: they stay as they are, and what goes in and out of them stays whole.
        strict: Whether an operation that cannot be followed is an error; by default what meets it stays whole, and one
            warning says which these are.
        depth: Whether the net can lose whole blocks as well. Residual blocks in a row, each a submodule that adds to
            its input and keeps its shape, are then the units of a group of their own, `"blocks.depth"` for those in
            `blocks`: a mask drops the last of them, never the first, and a dropped block hands on its input. A width
            for all groups cuts them, too.
        prefix: Prefix of the names of all Pyro sites.

    Returns:
        The nested net. Groups have the names of the first layer that writes them.

    Raises:
        ValueError: If nothing can be cut, or an argument does not fit; with `strict`, if a part cannot be followed.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> plain = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 3))
        >>> net = nest(plain, torch.zeros(1, 8), num_blocks=16)
        >>> net.widths["0"]
        Width(0, 64 units in 16 blocks, mean blocks kept 8.5, modes 1-16)
    """
    _check_arguments(net, exclude, gated, {"strict": strict, "depth": depth})
    examples = _in_order(net, example_input)
    check_numbers("nest", "example_input", examples)
    alone, left, stages_left = tuple(exclude), dict[str, str](), set[str]()
    while True:
        nested = prepared(net, alone)
        with explain_inputs("nest", examples, next((parameter.dtype for parameter in net.parameters()), None)):
            groups = channel_groups(
                nested,
                examples,
                exclude=alone,
                by_example=mask_per == "example",
                depth=depth,
                whole_stages=stages_left,
            )
        if depth and not groups.stages and not left:
            raise ValueError(
                "nest: argument `depth` needs residual blocks, at least two submodules in a row that add to their "
                f"input, keep its shape, and can be dropped; the net has none{_reasons(groups.whole)}"
            )
        if strict and (unfollowed := groups.unfollowed | left):
            lines = "".join(f"\n- {what}" for what in unfollowed.values())
            names = [name for name in unfollowed if name]
            advice = f"exclude={names} leaves these parts alone, and " if names else ""
            raise ValueError(
                f"nest: {len(unfollowed)} parts of the net cannot be followed; {advice}strict=False leaves whole what "
                f"meets them:{lines}"
            )
        widths = _widths(groups, num_blocks, frozen, width_prior, width_init, temperature=temperature, noise=noise)
        parts = Parts(nested, groups, widths, mask_per == "example")
        priors, of_raw = _by_name(prior, parts)
        plain = parts.nested(priors, init_scale)
        found: Any = {
            "own_channels": parts.own_channels(),
            "reads": parts.reads(),
            "random_parameters": parts.random_parameters(of_raw, init_scale),
            "blocks": parts.blocks(),
        }
        result = NestedNet(plain, mask_per=mask_per, gated=gated, prefix=prefix, **found)
        result.whole = groups.whole
        result.num_inputs = 0 if isinstance(example_input, Mapping) else len(examples)
        result.input_names = tuple(example_input) if isinstance(example_input, Mapping) else ()
        result.example = tuple(
            x.detach().clone() if isinstance(x, Tensor) else x  # so that no more of the example is kept and saved
            for x in take_rows(examples, Batch(examples, {}).num_rows, slice(1))
        )
        result.input_shapes = tuple(tuple(x.shape) for x in examples if isinstance(x, Tensor))
        try:
            result.positions = check_and_count(
                result, examples, not groups.untrained, groups.outputs, groups.same_in_training
            )
        except Misfit as misfit:
            if not misfit.path or misfit.path in alone:
                raise
            left[misfit.path] = misfit.why
            if misfit.path in groups.stages:
                stages_left.add(misfit.path)
            else:
                alone = (*alone, misfit.path)
            continue
        _warn(result, groups, left)
        return result


def _check_arguments(net: Any, exclude: Any, gated: Any, switches: Mapping[str, Any]) -> None:
    if isinstance(net, NestedNet | torch.jit.ScriptModule) or not isinstance(net, nn.Module):
        got = f"the class {net.__name__}, not an instance of it" if isinstance(net, type) else type(net).__name__
        raise ValueError(f"nest: argument `net` must be an ordinary module of torch; got {got}")
    if isinstance(exclude, str) or not isinstance(exclude, Collection):
        raise ValueError(f"nest: argument `exclude` must be a list of names of modules; got {exclude!r}")
    for name, value in ({**switches} if gated is None else {**switches, "gated": gated}).items():
        if not isinstance(value, bool):
            raise ValueError(f"nest: argument `{name}` must be True or False; got {value!r}")


def _in_order(net: nn.Module, example_input: Any) -> tuple[Any, ...]:
    """Return the arguments of a net in their order, with defaults for those before the last one given."""
    if not isinstance(example_input, Mapping):
        return example_input if isinstance(example_input, tuple) else (example_input,)
    signature = inspect.signature(net.forward)
    try:
        bound = signature.bind(**example_input)
    except TypeError as error:
        raise ValueError(f"nest: argument `example_input` does not fit {type(net).__name__}: {error}") from error
    bound.apply_defaults()
    names = list(signature.parameters)
    last = max((names.index(name) for name in example_input if name in names), default=-1)
    by_order = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    if strange := [
        name for name in example_input if name not in names or signature.parameters[name].kind not in by_order
    ]:
        raise ValueError(
            f"nest: argument `example_input` names {strange}, which {type(net).__name__} takes by name only; give it a "
            "forward that takes them in order, too"
        )
    return bound.args[: last + 1]


def _widths(
    groups: ChannelGroups, num_blocks: Any, frozen: Any, prior: Any, init: Any, **options: Any
) -> dict[str | None, Width | None]:
    """Return the width of each group, and none for what stays whole."""
    arguments = {"num_blocks": num_blocks, "frozen": frozen, "width_prior": prior, "width_init": init}
    for argument, by_group in arguments.items():
        _check_names(argument, by_group, groups.names)
    widths: dict[str | None, Width | None] = {None: None}
    for name, units in groups.sizes.items():
        blocks = _of(num_blocks, name, None)
        blocks = units if blocks is None else min(check_int(name, "num_blocks", blocks, 1), units)
        always = check_int(name, "frozen", _of(frozen, name, 0), 0, blocks)
        entries = blocks - max(always, 1) + 1
        laws: Any = {"prior": _law(_of(prior, name, None), entries), "init": _law(_of(init, name, None), entries)}
        widths[name] = Width(name, units, blocks, frozen=always, **laws, **options)
    return widths


def _reasons(whole: Mapping[str, str]) -> str:
    lines = "".join(f"\n- `{name}` {why}" for name, why in whole.items() if why.startswith(MUST_RUN))
    return f":{lines}" if lines else ""


def _warn(net: NestedNet, groups: ChannelGroups, left: Mapping[str, str]) -> None:
    """Say in one warning what was left whole because it could not be followed, and what can still be narrowed."""
    lines = [*groups.unfollowed.values(), *(f"`{name}`: {why}" for name, why in left.items())]
    if groups.untrained:
        lines.append(f"training mode, in which the net does not run on the example ({groups.untrained})")
    if lines:
        warnings.warn(
            "nest: some of the net could not be followed, and what meets it stays whole; "
            f"{share_that_narrows(net):.0%} of the parameters can be narrowed. Print the net for what stays whole; "
            "`strict=True` makes this an error; these are:" + "".join(f"\n- {line}" for line in lines),
            stacklevel=3,
        )


def _of(by_group: Any, name: str, default: Any) -> Any:
    return by_group.get(name, default) if isinstance(by_group, Mapping) else by_group


def _check_names(argument: str, by_group: Any, names: tuple[str, ...]) -> None:
    unknown = sorted(set(by_group) - set(names)) if isinstance(by_group, Mapping) else []
    if unknown:
        raise ValueError(f"nest: argument `{argument}` names {unknown}; groups of the net: {list(names)}")


def _law(law: OrderedMask | float | None, entries: int) -> OrderedMask | None:
    return OrderedMask.geometric(law, entries) if isinstance(law, float) else law


def _by_name(prior: Any, parts: Parts) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the priors of layers, and those of other parameters or of modules that have these."""
    if not _by_layer(prior):
        return dict.fromkeys(parts.affine, _number_as_law(prior)), {}
    raw = {*parts.raw, *(name.rpartition(".")[0] for name in parts.raw)} - {""}
    if unknown := sorted(set(prior) - {"", *parts.affine, *raw}):
        raise ValueError(
            f"nest: argument `prior` names {unknown}; layers of the net: {parts.affine}; other parameters: "
            f"{list(parts.raw)}"
        )
    laws = {name: _number_as_law(law) for name, law in prior.items()}
    of_raw = {name: ZeroMeanNormal() if law == "normal" else law for name, law in laws.items() if name in raw}
    return {name: laws.get(name, laws.get("", "normal")) for name in parts.affine}, of_raw


def _number_as_law(prior: Any) -> Any:
    if not isinstance(prior, Real):
        return prior
    if isinstance(prior, bool) or not 0 < float(prior) < math.inf:
        raise ValueError(f"nest: argument `prior` must have a finite scale > 0 where it is a number; got {prior!r}")
    return ZeroMeanNormal(float(prior))


def _by_layer(prior: Any) -> TypeGuard[Mapping[str, Any]]:
    return isinstance(prior, Mapping) and not (prior and set(prior) <= {"weight", "bias"})
