"""Which residual blocks of a net follow each other, so that the last of them can be dropped."""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyro_vnd._compat import has_hooks
from pyro_vnd.nn.axis import Rows
from pyro_vnd.nn.tracing import channel_rules, layer_rules, structural_rules
from pyro_vnd.nn.tracing.call import find_rule
from pyro_vnd.nn.tracing.channels import Axes, Runs, are_rows
from pyro_vnd.nn.tracing.interpreter import Interpreter
from pyro_vnd.nn.tracing.tape import ModuleCall, Op, Tape, Value, tensors_in

__all__ = ["MUST_RUN", "Given", "ResidualBlock", "residual_stages"]

MUST_RUN = "cannot be dropped"
SUMS = {"add", "iadd", "radd", "sub", "isub", "subtract", "addcmul"}
SCALES = {"mul", "imul", "rmul", "multiply", "div", "idiv", "truediv", "itruediv", "true_divide", "divide"}
COPIES = {"dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"}
COPIES |= {"Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "AlphaDropout", "FeatureAlphaDropout", "Identity"}
NORMS = (
    layer_rules.batch_norm,
    layer_rules.group_norm,
    layer_rules.instance_norm,
    layer_rules.layer_norm,
    layer_rules.functional_batch_norm,
    layer_rules.functional_layer_norm,
    layer_rules.functional_group_norm,
    layer_rules.prelu,
)
MOVES = (structural_rules.structural, channel_rules.concatenate, channel_rules.stack)


@dataclass(frozen=True)
class Given:
    """An argument of a module, as it was given.

    Attributes:
        name: Name of the parameter of its forward, or that by which it is among others that are given by name.
        position: Its place, None if it can only be given by name.
    """

    name: str
    position: int | None

    def among(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Return the argument."""
        return args[self.position] if self.position is not None and self.position < len(args) else kwargs.get(self.name)


@dataclass(frozen=True)
class ResidualBlock:
    """A module that adds to its input, and can be left away.

    Attributes:
        path: Name of the module.
        stream: The input that it adds to.
        returns: What a net without it has in place of what it returns: arguments, in a tuple or list if it returns one.
        rows: Where the examples lie in the input; None if that is not known.
        changes_input: Whether it changes the input in place.
    """

    path: str
    stream: Given
    returns: Any
    rows: Rows | None
    changes_input: bool

    def skipped(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Return what there is without the module."""
        if isinstance(self.returns, Given):
            return self.returns.among(args, kwargs)
        values = [each.among(args, kwargs) if isinstance(each, Given) else each for each in self.returns]
        return type(self.returns)(values)


@dataclass(frozen=True)
class _Candidate:
    call: ModuleCall
    stream: Value
    out: Value
    block: ResidualBlock
    why: str  # why it must always run, "" if it need not


def residual_stages(
    net: nn.Module, tapes: Sequence[Tape], interpreter: Interpreter
) -> tuple[dict[str, tuple[ResidualBlock, ...]], dict[str, str]]:
    """Find the stages of a net: residual blocks that are siblings, each of which reads what the one before wrote.

    A block is a module, called once, whose output has the shape and the channels of one of its inputs, and is that
    input plus something that layers made of it; activations and norms may come after the sum. Only the first block of
    a stage, which always runs, may do something beside. Of stages within blocks of another stage, the longer one
    counts, and of equally long ones the outer.

    Args:
        net: The net.
        tapes: What it did, in each mode.
        interpreter: What lies along its tensors.

    Returns:
        The blocks by name of the stage, that of the module they are in, with ".depth", and reasons why others cannot be
        dropped, by name.
    """
    used = _last_uses(tapes[0])
    counts = [Counter(call.path for call in tape.calls) for tape in tapes]
    once = [call for call in tapes[0].calls if call.path and all(count[call.path] <= 1 for count in counts)]
    found = [each for call in once for each in _candidates(net, tapes[0], interpreter, used, call)]
    runs = _runs(found)
    chosen: list[list[_Candidate]] = []
    for run in sorted(runs, key=lambda run: (-len(run), run[0].block.path.count("."))):
        if len(run) > 1 and not any(_overlap(one, other) for stage in chosen for one in stage for other in run):
            chosen.append(run)
    chosen.sort(key=lambda run: run[0].call.start)
    places = Counter(_around(run[0]) for run in chosen)
    stages: dict[str, tuple[ResidualBlock, ...]] = {}
    for run in chosen:
        place = _around(run[0]) if places[_around(run[0])] == 1 else run[0].block.path
        stages[f"{place}.depth" if place else "depth"] = tuple(each.block for each in run)
    inside = [each for run in chosen for each in run]
    left = {
        each.block.path: f"{MUST_RUN}: {each.why}"
        for each in found
        if each.why and each not in inside and _follows_any(each, found)
        if not any(_overlap(each, other) for other in inside)
    }
    return stages, left


def _runs(found: Sequence[_Candidate]) -> list[list[_Candidate]]:
    """Return blocks in runs, of which each reads what the one before it wrote; those that must run begin one."""
    runs: list[list[_Candidate]] = []
    for each in found:
        run = next((run for run in runs if _follows(run[-1], each)), None)
        if run is None or each.why:
            runs.append([each])
        else:
            run.append(each)
    return runs


def _follows(one: _Candidate, other: _Candidate) -> bool:
    return one.out is other.stream and _around(one) == _around(other)


def _follows_any(each: _Candidate, found: Sequence[_Candidate]) -> bool:
    return any(_follows(each, other) or _follows(other, each) for other in found)


def _around(each: _Candidate) -> str:
    return each.block.path.rpartition(".")[0]


def _overlap(one: _Candidate, other: _Candidate) -> bool:
    paths = f"{one.block.path}.", f"{other.block.path}."
    return paths[0].startswith(paths[1]) or paths[1].startswith(paths[0])


def _candidates(
    net: nn.Module, tape: Tape, interpreter: Interpreter, used: Mapping[Value, float], call: ModuleCall
) -> Iterator[_Candidate]:
    out = call.out[0] if type(call.out) in (tuple, list) and call.out else call.out
    if not isinstance(out, Value) or not out.tensor.is_floating_point() or len(out.shape) < 2:
        return
    try:
        arguments = _arguments(call)
    except (TypeError, ValueError):  # a forward without a signature
        return
    for stream, given in arguments:
        if not isinstance(stream, Value) or stream.shape != out.shape or stream is out:
            continue
        if not _alike(interpreter, stream, out) or not _adds(interpreter, tape, call, stream, out):
            continue
        returns, why = _returned(call, given, arguments, used)
        why = why or _bound_to_run(net, tape, call, stream, out, used)
        at = [(axis, runs) for axis, runs in interpreter.axes(stream).items() if are_rows(runs)]
        rows = interpreter.lying(at[0]) if len(at) == 1 else None
        if rows is None and interpreter.by_example:
            why = why or 'rows of its input are not the examples; mask_per="batch" can drop it'
        yield _Candidate(call, stream, out, ResidualBlock(call.path, given, returns, rows, stream in call.changed), why)
        return


def _arguments(call: ModuleCall) -> list[tuple[Any, Given]]:
    """Return what the module was called with, and the parameters of its forward that this is given for."""
    parameters = list(inspect.signature(call.module.forward).parameters.values())
    placed = [each for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]
    names = [each.name for each in placed]
    found = [(value, Given(names[at] if at < len(names) else f"{at}", at)) for at, value in enumerate(call.args)]
    return found + [
        (value, Given(name, names.index(name) if name in names else None)) for name, value in call.kwargs.items()
    ]


def _alike(interpreter: Interpreter, one: Value, other: Value) -> bool:
    """Say whether the same channels lie along all axes of two tensors."""

    def layout(axes: Axes, axis: int, size: int) -> list[Any]:
        runs: Runs = axes.get(axis, ())
        if not any(run.owner.is_rows or not run.owner.reason for run in runs):
            return [size]
        owners = ["rows" if run.owner.is_rows else None if run.owner.reason else run.owner.root for run in runs]
        return [*zip(owners, (run.size for run in runs), strict=True)]

    first, second = interpreter.axes(one), interpreter.axes(other)
    return all(layout(first, axis, size) == layout(second, axis, size) for axis, size in enumerate(one.shape))


def _returned(
    call: ModuleCall, stream: Given, arguments: Sequence[tuple[Any, Given]], used: Mapping[Value, float]
) -> tuple[Any, str]:
    """Say what there is in place of what a module returns when it does not run, and why there is nothing, if so."""
    if isinstance(call.out, Value):
        return stream, ""
    entries: list[Any] = [stream]
    for each in call.out[1:]:
        same = [given for value, given in arguments if value is each and each is not None]
        if same and (each not in call.changed if isinstance(each, Value) else not isinstance(each, bool | int | float)):
            entries.append(same[0])
        elif each is None or isinstance(each, bool | int | float | str):
            entries.append(each)
        elif isinstance(each, Value) and used.get(each, -1) < call.stop:
            entries.append(None)
        else:
            return stream, "what it returns beside its first result is used"
    return type(call.out)(entries), ""


def _bound_to_run(
    net: nn.Module, tape: Tape, call: ModuleCall, stream: Value, out: Value, used: Mapping[Value, float]
) -> str:
    """Say why a module must run, though it is residual: others need what it does."""
    if has_hooks(call.module):
        return "it has hooks"
    if call.changed - {stream}:
        return "it changes an argument in place"
    inside = set(call.module.modules())
    own = {id(each) for each in call.module.parameters()}
    if any(id(each) in own for part in net.modules() if part not in inside for each in part.parameters(recurse=False)):
        return "it shares parameters with other parts"
    returned = {value for value in (call.out if type(call.out) in (tuple, list) else ()) if isinstance(value, Value)}
    for op in tape.ops[call.start : call.stop]:
        for value in op.outputs:
            if value is not out and value not in returned and used.get(value, -1) >= call.stop:
                return "something in it is used elsewhere, beside what it returns"
    outside = [*tape.ops[: call.start], *tape.ops[call.stop :]]
    if any(f"{op.path}.".startswith(f"{call.path}.") or any(id(v.tensor) in own for v in op.inputs) for op in outside):
        return "parts of it are used elsewhere"
    return ""


def _last_uses(tape: Tape) -> dict[Value, float]:
    """Return the number of the last operation that reads each tensor, infinity for what the net returns."""
    last: dict[Value, float] = {value: number for number, op in enumerate(tape.ops) for value in op.inputs}
    return last | dict.fromkeys(tape.results, math.inf)


def _adds(interpreter: Interpreter, tape: Tape, call: ModuleCall, stream: Value, out: Value) -> bool:
    """Say whether the output of a module is an input plus something that layers make of it.

    The input is followed on its way past the layers: through copies, scales, sums and moves, and after a sum through
    activations and norms. What is followed are the positions of its entries, which must be in their places at the end.
    """
    count = stream.shape.numel()
    path = _Path({stream: torch.arange(count, dtype=torch.float64).reshape(stream.shape)}, {stream})
    for op in tape.ops[call.start : call.stop]:
        path.follow(interpreter, op)
    at = path.positions.get(out)
    return at is not None and out in path.summed and torch.equal(at.flatten(), torch.arange(count, dtype=at.dtype))


@dataclass
class _Path:
    """The way of a tensor past the layers of a block.

    Attributes:
        positions: Where entries of the tensor are in those that carry it.
        depends: Tensors that depend on it.
        summed: Those of `positions` to which something from layers was added.
        made: Tensors that layers made of it.
        weights: Tensors that are computed from parameters alone.
    """

    positions: dict[Value, Tensor]
    depends: set[Value]

    def __post_init__(self) -> None:
        self.summed: set[Value] = set()
        self.made: set[Value] = set()
        self.weights: set[Value] = set()

    def follow(self, interpreter: Interpreter, op: Op) -> None:
        """Take one operation into account."""
        on = [value for value in dict.fromkeys(op.inputs) if value in self.depends]
        has_weights = any(value.parameter or value in self.weights for value in op.inputs)
        if not on:
            self.weights.update(op.outputs if has_weights else ())
            return
        self.depends.update(op.outputs)
        if all(value in self.positions for value in on) or op.name in SUMS:
            carried = self._carry(interpreter, op, on)
            if carried is not None:
                for value, at in zip(op.outputs, carried, strict=True):
                    self.positions[value] = at
                    if self.summed & {*on} or self.made & {*on}:
                        self.summed.add(value)
                return
        is_layer = isinstance(op.target, nn.Module) and any(True for _ in op.target.parameters())
        if has_weights or is_layer or self.made & {*on}:
            self.made.update(op.outputs)

    def _carry(self, interpreter: Interpreter, op: Op, on: Sequence[Value]) -> list[Tensor] | None:
        """Return where the entries of the tensor are in the results of an operation; None if it does not carry them."""
        carrying = [self.positions[value] for value in on if value in self.positions]
        if not carrying:
            return None
        rule = find_rule(op.target if isinstance(op.target, nn.Module) else op.name.rstrip("_"), op.in_place)
        if rule in MOVES:
            if rule is not structural_rules.structural and len(on) < len(set(op.inputs)):
                return None
            try:
                return tensors_in(interpreter.evaluate(op, {value: self.positions[value] for value in on}))
            except RuntimeError:  # such as a view as another type
                return None
        if not op.outputs or any(at.shape != op.outputs[0].shape for at in carrying):
            return None
        if op.name in SUMS:
            is_first = on[0] in self.positions and op.inputs[0] is on[0]
            fits = all(torch.equal(at, carrying[0]) for at in carrying)
            signed = "sub" in op.name or op.name == "addcmul"
            return [carrying[0]] if fits and (is_first or not signed) else None
        if len(on) > 1:
            return None
        is_copy = rule is channel_rules.cast or op.name in COPIES or op.name in SCALES
        after_sum = rule is channel_rules.elementwise or rule in NORMS
        return [carrying[0]] if is_copy or (after_sum and on[0] in self.summed) else None
