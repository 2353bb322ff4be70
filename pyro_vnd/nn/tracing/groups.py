"""Which layers of a net share channels, so that a prefix of them can be kept and the rest cut."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from pyro_vnd._data import take_rows
from pyro_vnd.nn.axis import Rows, Run
from pyro_vnd.nn.tracing import channel_rules, layer_rules, structural_rules  # noqa: F401  (they fill the table)
from pyro_vnd.nn.tracing.call import Layer, find_rule, first_kept
from pyro_vnd.nn.tracing.channels import Runs, Split
from pyro_vnd.nn.tracing.depth import ResidualBlock, residual_stages
from pyro_vnd.nn.tracing.interpreter import Interpreter
from pyro_vnd.nn.tracing.tape import Attribute, Forgotten, Tape, recorded, tensors_in, with_one_more

__all__ = ["ChannelGroups", "LayerChannels", "Layout", "channel_groups"]

Layout: TypeAlias = tuple[Run[str | None], ...]
Keeps: TypeAlias = Callable[[Any, bool], int | None]  # as for `Tape`
Stages: TypeAlias = tuple[dict[str, tuple[ResidualBlock, ...]], dict[str, str]]  # as of `residual_stages`


@dataclass(frozen=True)
class LayerChannels:
    """What lies, in order, along the channel axis that a layer reads and the one that it makes.

    The owner of a run is the name of its group, or None where channels are left whole.

    Attributes:
        inputs: Channels that it reads.
        outputs: Channels that it makes.
        rows: Where the examples lie in its input.
    """

    inputs: Layout
    outputs: Layout
    rows: Rows | None = None


@dataclass(frozen=True)
class ChannelGroups:
    """The channels of a net that are cut together.

    Attributes:
        units: How many pieces each group can be cut into, by its name, that of the first layer that makes its channels.
        layers: Channels of each layer with parameters or statistics along them, by name, in order of execution.
        whole: Why channels cannot be cut, by the first layer that makes them.
        parameters: What lies along axes of parameters and buffers, by name, of which something can be cut.
        reads: What functions read and make that take a parameter as their weight, by its name, and are no layers.
        read_elsewhere: Those of them that functions outside of the forward of the parameter's own module take.
        attributes: Attributes of modules that are numbers of channels, and which.
        unfollowed: Operations that could not be followed, by the module that they are in.
        untrained: Why the net could not be run in training mode, "" if it could.
        stages: Residual blocks that follow each other, of which the last can be dropped, by the name of their group.
        same_in_training: Whether a single row showed that the net does in training mode what it does in evaluation.
        outputs: The tensors that the net returned in evaluation mode, on the example with its first row once more.
    """

    units: dict[str, int]
    layers: dict[str, LayerChannels]
    whole: dict[str, str]
    parameters: dict[str, dict[int, Layout]] = field(default_factory=dict)
    reads: dict[str, LayerChannels] = field(default_factory=dict)
    read_elsewhere: Collection[str] = ()
    attributes: dict[Attribute, Layout] = field(default_factory=dict)
    unfollowed: dict[str, str] = field(default_factory=dict)
    untrained: str = ""
    stages: dict[str, tuple[ResidualBlock, ...]] = field(default_factory=dict)
    same_in_training: bool = False
    outputs: tuple[Tensor, ...] = field(default=(), compare=False, repr=False)

    @property
    def sizes(self) -> dict[str, int]:
        """Numbers of units of the groups of channels, in order of execution, and after them those of blocks."""
        return self.units | {name: len(blocks) for name, blocks in self.stages.items()}

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the groups, likewise."""
        return tuple(self.sizes)


def channel_groups(
    net: nn.Module,
    example_input: Tensor | tuple[Any, ...],
    *,
    exclude: Collection[str] = (),
    by_example: bool = False,
    depth: bool = False,
    whole_stages: Collection[str] = (),
) -> ChannelGroups:
    r"""Find which layers of a net share channels.

    Each linear or convolutional layer makes a space of channels. Spaces whose channels are added, multiplied or tied
    by a grouped convolution are one group. For each group g and each number of units $k \le$ `units[g]`, the net of
    which all layers lose the channels past the first k units computes what the whole net does if these channels are
    zero wherever a linear or convolutional layer reads them. Only norms over the channels themselves (LayerNorm,
    RMSNorm, GroupNorm of one group) differ: their statistics are then over the channels that are left.

    Inputs and outputs of the net are left whole, and so is what meets them, a softmax, sum or maximum over channels,
    fixed sizes as in `x.view(-1, 400)`, or an operation that is not known.

    The net is run on the example and one more row, in evaluation mode and in training mode; it is left as it was.

    Args:
        net: Any module.
        example_input: Its input, or the tuple of its arguments; arguments left out keep their defaults.
        exclude: Names of submodules to leave alone, and all in them; what they read and make is left whole.
        by_example: Whether masks will have a row for each example: layers for which it is not known where the examples
            lie then read whole channels.
        depth: Whether residual blocks are looked for that can be dropped.
        whole_stages: Names of groups of such blocks that are to be left alone.

    Returns:
        The groups in order of execution, and the channels of each layer.

    Raises:
        ValueError: If the net cannot be run, a name in `exclude` does not exist, or nothing can be cut.

    Example:
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(54, 4))
        >>> groups = channel_groups(net, torch.zeros(1, 1, 5, 5))
        >>> groups.units
        {'0': 6}
        >>> groups.layers["3"].inputs
        (Run(owner='0', size=54),)
    """
    inputs = example_input if isinstance(example_input, tuple) else (example_input,)
    if not any(isinstance(value, Tensor) for value in inputs):
        raise ValueError(
            f"nest: argument `example_input` must be a tensor or a tuple with one; got {type(example_input).__name__}"
        )
    first = next(value for value in inputs if isinstance(value, Tensor))
    if first.numel() == 0:
        raise ValueError(f"nest: argument `example_input` must have at least one example; got {tuple(first.shape)}")
    if first.dim() == 0 or (first.dim() == 1 and first.is_floating_point()):
        raise ValueError(
            "nest: argument `example_input` must have examples along its first dimension, (N, ...); got shape "
            f"{tuple(first.shape)}: give `x[None]` for a single example"
        )
    if lazy := [name for name, parameter in net.named_parameters() if is_lazy(parameter)]:
        raise ValueError(f"nest: run the net once before; `{lazy[0]}` has no shape yet")
    excluded = _find_excluded(net, exclude)
    try:
        inspect.signature(net.forward).bind(*inputs)
    except TypeError as error:
        raise ValueError(
            f"nest: `example_input` does not fit the arguments of {type(net).__name__}: {error}"
        ) from error

    def follow(keeps: Keeps) -> tuple[_Run, Interpreter, Stages]:
        run = _run(net, inputs, len(first), excluded, keeps)
        interpreter = _followed(net, run.rows, run.tapes, excluded, by_example)
        return run, interpreter, residual_stages(net, run.tapes, interpreter) if depth else ({}, {})

    with _undisturbed(net, inputs):
        try:
            run, interpreter, (stages, bound) = follow(first_kept)
        except Forgotten:  # a rule could not follow an operation, which is then run again as unknown ones are
            run, interpreter, (stages, bound) = follow(lambda *_: 0)
    spaces = [space for space in dict.fromkeys(space.root for space in interpreter.made) if space.made]
    whole: dict[str, str] = {}
    for space in spaces:
        if space.reason and space.reason != whole.get(space.name.partition("[")[0]):  # once for all parts of an axis
            whole[space.name] = space.reason
    cut = [space for space in spaces if not space.reason]
    whole |= bound
    stages = {_free_name(name, {space.name for space in cut}): blocks for name, blocks in stages.items()}
    if not cut and not stages:
        reasons = "".join(f"\n- `{name}`: {reason}" for name, reason in whole.items()) or " it has no layers to cut"
        raise ValueError(f"nest: no channels of the net can be cut:{reasons}")
    parameters: dict[str, dict[int, Layout]] = {}
    for (name, dim), runs in interpreter.parameters.items():
        if any(not run.owner.reason for run in runs):
            parameters.setdefault(name, {})[dim] = _layout(runs)
    return ChannelGroups(
        {space.name: space.atoms for space in cut},
        {name: _channels(layer, interpreter) for name, layer in interpreter.layers.items()},
        whole,
        parameters,
        {name: _channels(layer, interpreter) for name, layer in interpreter.reads.items()},
        interpreter.read_elsewhere,
        {
            each: _layout(runs)
            for each, runs in interpreter.attributes.items()
            if any(not run.owner.reason for run in runs)
        },
        interpreter.unfollowed,
        run.untrained,
        {name: blocks for name, blocks in stages.items() if name not in whole_stages},
        run.same_in_training,
        tuple(run.tapes[0].returned),
    )


@dataclass
class _Run:
    """What the net did: on how many rows, in evaluation mode and, where that is something else, in training mode."""

    rows: int
    tapes: list[Tape]
    untrained: str = ""
    same_in_training: bool = False


def _run(
    net: nn.Module,
    inputs: tuple[Any, ...],
    count: int,
    excluded: set[int],
    keeps: Keeps,
) -> _Run:
    """Run the net with a row more than the example has, in both modes.

    With two rows at least it can be seen where they go, and a net that has the number of rows written down fails.
    """
    operations = {each: id(each) in excluded or find_rule(each) is not None for each in net.modules()}
    kept = {each: 0 if id(each) in excluded else keeps(each, False) for each, alone in operations.items() if alone}

    def keep(operation: Any, in_place: bool) -> int | None:
        return kept[operation] if operation in kept else keeps(operation, in_place)

    def record(inputs: tuple[Any, ...]) -> Tape:
        return recorded(net, inputs, operations.__getitem__, keep)

    try:
        tapes = [record(with_one_more(inputs, count))]
    except Exception as error:
        record(_copied(inputs))  # which says what is wrong with the example itself
        raise ValueError(
            f"nest: the net runs on {count} examples, but not on {count + 1}: {error}. Does its forward have the "
            "number of examples written down? Write x.shape[0], or -1 there"
        ) from error
    run = _Run(count + 1, tapes)
    for module in net.modules():
        module.training = True  # in a net that is put back as it was
    try:
        # Most nets do the same in both modes, which a single row shows, if no norm over examples wants more.
        with suppress(Exception):
            run.same_in_training = _names(record(_copied(take_rows(inputs, count, slice(1))))) == _names(tapes[0])
        if not run.same_in_training:
            trained = record(with_one_more(inputs, count))
            tapes.extend([trained] if _names(trained) != _names(tapes[0]) else [])
    except Exception as error:  # whatever the net asks for in training: labels, say
        run.untrained = f"{type(error).__name__}: {error}"
    finally:
        for module in net.modules():
            module.training = False
    return run


def _names(tape: Tape) -> list[tuple[str, str]]:
    return [(op.name, op.path) for op in tape.ops]


def _copied(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(each.clone() if isinstance(each, Tensor) else each for each in inputs)


def _followed(net: nn.Module, rows: int, tapes: Sequence[Tape], excluded: set[int], by_example: bool) -> Interpreter:
    """Follow the channels, again for each axis of a parameter that turns out to have several parts."""
    splits: dict[Any, tuple[int, ...]] = {}
    ways: dict[Any, Any] = {}
    while True:
        interpreter = Interpreter(net, rows, excluded, by_example, splits)
        interpreter.ways = ways
        try:
            for tape in tapes:
                interpreter.run(tape)
        except Split as split:
            for (key, number), sizes in sorted(split.parts.items(), key=lambda item: -item[0][1]):
                before = splits.get(key) or (sum(sizes),)
                splits[key] = (*before[:number], *sizes, *before[number + 1 :])
            continue
        interpreter.finish()
        return interpreter


def _free_name(name: str, taken: Collection[str]) -> str:
    return _free_name(f"{name}.depth", taken) if name in taken else name


def _channels(layer: Layer, interpreter: Interpreter) -> LayerChannels:
    rows = None if layer.rows is None else interpreter.lying(layer.rows)
    return LayerChannels(_layout(layer.inputs), _layout(layer.outputs), rows)


def _layout(runs: Runs) -> Layout:
    return tuple(Run(None if space.reason else space.name, size) for space, size in runs)


def _find_excluded(net: nn.Module, names: Collection[str]) -> set[int]:
    """Return the ids of the modules to leave alone."""
    if isinstance(names, str):
        raise ValueError(f"nest: argument `exclude` must be a list of names; got the string {names!r}")
    modules = {name: module for name, module in net.named_modules(remove_duplicate=False) if name}
    for name in names:
        if name not in modules:
            close = difflib.get_close_matches(name, modules, cutoff=0.4) or list(modules)[:5]
            raise ValueError(f"nest: argument `exclude`: the net has no module {name!r}; close are {close}")
    return {id(module) for name in names for module in modules[name].modules()}


@contextmanager
def _undisturbed(net: nn.Module, inputs: Sequence[Any]) -> Iterator[None]:
    """Evaluate the net without a trace: training flags, attributes and random numbers are as before."""
    before = {module: dict(vars(module)) for module in net.modules()}
    tensors = [*net.parameters(), *net.buffers(), *tensors_in(inputs)]
    buffers = [(buffer, buffer.detach().clone()) for buffer in net.buffers()]  # statistics change in training mode
    devices = {tensor.device.index for tensor in tensors if tensor.is_cuda}
    try:
        for module in before:
            module.training = False
        with torch.no_grad(), torch.random.fork_rng(devices):
            yield
    finally:
        for module, attributes in before.items():
            vars(module).clear()
            vars(module).update(attributes)
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
