"""An interpreter that follows channels through what a net did, with a table of rules, one a kind of operation."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn, TypeAlias

import torch
from torch import Tensor, nn

from pyro_vnd.nn.axis import Run
from pyro_vnd.nn.tracing.channels import Axes, Runs, Space, are_rows, extent, hold, kept, rows, unify, whole
from pyro_vnd.nn.tracing.tape import Attribute, Op, Size, Source, Tape, Value, numbers_in, resolved, tensors_in

__all__ = ["Call", "Interpreter", "Layer", "find_rule", "rule"]

Rule: TypeAlias = "Callable[[Call], Axes | tuple[Axes, ...]]"
RULES: dict[str | Callable[..., Any], Rule] = {}
FOLLOW_SIZES: set[Rule] = set()
Named: TypeAlias = Callable[[Rule], Rule]
PARAMETERS_COME_LATER = 1e9  # groups have the name of a layer, if there is one


def rule(*operations: str | Callable[..., Any], follows_sizes: bool = False) -> Named:
    """Register how channels pass through operations: types of modules, or names of torch's functions.

    A name stands for a tensor method and an operator too, and for the same with an underscore at the end.

    A rule gets the `Call` and returns what lies along the axes of its result, or of each of its results. A number of
    channels among the arguments holds these channels whole, unless the rule looks after it itself (`follows_sizes`).
    """

    def register(function: Rule) -> Rule:
        for operation in operations:
            RULES.update(dict.fromkeys(operation.split() if isinstance(operation, str) else [operation], function))
        if follows_sizes:
            FOLLOW_SIZES.add(function)
        return function

    return register


def find_rule(operation: Any, in_place: bool = False) -> Rule | None:
    """Return the rule of a module, or of a function by its name; None if it is unknown."""
    if isinstance(operation, nn.Module):
        kind = type(operation)
        # A subclass with another forward may do anything, and so may what computes its weights.
        same = (base for base in kind.__mro__ if base in RULES and getattr(base, "forward", None) is kind.forward)
        weight = getattr(operation, "weight", None)
        is_own = weight is None or any(weight is each for each in operation.parameters(recurse=False))
        return RULES.get(next(same, nn.Module)) if is_own and not hasattr(operation, "parametrizations") else None
    found = RULES.get(operation)
    # In place, the entries of a tensor may change, but not its shape, which is read after the call.
    return None if in_place and found in FOLLOW_SIZES and operation != "setitem" else found


class _Unfollowed(Exception):
    """An operation that its rule cannot follow."""


class Layer(NamedTuple):
    """What a layer was seen to read and make.

    Attributes:
        inputs: Channels that it reads.
        outputs: Channels that it makes.
        rows: Axis of its input along which the examples lie, and their runs; None if they do not.
    """

    inputs: Runs
    outputs: Runs
    rows: tuple[int, Runs] | None


@dataclass(frozen=True)
class Call:
    """One operation of the net on the example input."""

    op: Op
    interpreter: Interpreter

    @property
    def module(self) -> Any:
        """The module that is called, if it is one."""
        return self.op.target if isinstance(self.op.target, nn.Module) else None

    @property
    def name(self) -> str:
        """Name of the function, or of the type of module."""
        return self.op.name

    @property
    def out(self) -> Value:
        """The first of its results."""
        return self.op.outputs[0]

    @property
    def tensors(self) -> list[Value]:
        """The arguments that are tensors, those in lists too."""
        return self.op.inputs

    def argument(self, name: str, position: int, default: Any = None) -> Any:
        """Return an argument, or for a module its attribute of that name."""
        if self.module is not None:
            return getattr(self.module, name, default)
        if name in self.op.kwargs:
            return self.op.kwargs[name]
        return self.op.args[position] if position < len(self.op.args) else default

    def shape(self, tensor: Value | None = None) -> torch.Size:
        """Return the shape of a tensor, the first by default."""
        return (tensor or self.tensors[0]).shape

    def axes(self, tensor: Value | None = None) -> Axes:
        """Return a copy of what lies along the axes of a tensor, the first by default."""
        return dict(self.interpreter.axes(tensor or self.tensors[0]))

    def mixed(self, axes: Iterable[int], why: str = "mixes channels", tensor: Value | None = None) -> Axes:
        """Hold whole what lies along axes of a tensor, where channels meet; return the other axes."""
        before, ndim = self.axes(tensor), len(self.shape(tensor))
        mixing = {axis % ndim for axis in axes}
        self.hold([before[axis] for axis in mixing & before.keys()], why)
        return {axis: runs for axis, runs in before.items() if axis not in mixing}

    def hold(self, axes: Axes | Iterable[Runs], why: str) -> None:
        """Leave channels whole, because of what this operation does."""
        hold(axes, f"{self.where} {why}")

    @property
    def where(self) -> str:
        """The operation, for messages."""
        return f"`{self.name}` in " + (f"`{self.op.path}`" if self.op.path else "the forward of the net")

    def weight_axis(self, weight: Tensor, dim: int, runs: Runs | None = None) -> Runs:
        """Return what lies along an axis of a parameter; the same as `runs`, if they are given.

        An axis of which nothing is known yet becomes new channels, made by this module, or these runs.
        """
        name = self.interpreter.names[id(weight)]
        known = self.interpreter.parameters.get((name, dim))
        if known is None:
            known = self.interpreter.new_axis(name, dim, weight.shape[dim], self.op.path) if runs is None else runs
            self.interpreter.parameters[name, dim] = known
        elif runs is not None:
            unify(known, runs, f"{self.where} is used again on other channels")
        return known

    def attribute(self, attribute: Attribute) -> Runs:
        """Return channels whose number is an attribute of a module: new ones, if it does not count others."""
        known = self.interpreter.attributes.get(attribute)
        if known is None:
            space = Space(PARAMETERS_COME_LATER, attribute.name, attribute.number)
            known = self.interpreter.attributes[attribute] = (Run(space, attribute.number),)
        return known

    def read(self, x: Value, axis: int, weight: Value, inputs_at: int, outputs_at: int, made: bool = True) -> Axes:
        """Let a function read an axis of a tensor with a weight, whose other axis takes its place in the result."""
        inputs, outputs = self.runs(axis, x), self.runs(outputs_at, weight)
        name = self.interpreter.reads_of(weight)
        unify(self.runs(inputs_at, weight), inputs, f"{self.where} is used again on other channels")
        if name:
            self.interpreter.record(name, inputs, outputs, self.rows_of(x), self.where, read=True)
        else:
            self.hold([inputs], "reads channels with weights that are computed")
        for run in outputs if made else ():
            run.owner.make()
        others = {at: runs for at, runs in self.axes(x).items() if at != axis % len(x.shape)}
        return others | {axis % len(x.shape): outputs}

    def fail(self) -> NoReturn:
        """Say that this operation cannot be followed."""
        raise _Unfollowed

    def layer(self, inputs: Runs, outputs: Runs, made: bool = False) -> Runs:
        """Record the channels of this module; return its outputs."""
        self.interpreter.record(self.op.path, inputs, outputs, self.rows_of(self.tensors[0]), self.where)
        for run in outputs if made else ():
            run.owner.make()
        return outputs

    def rows_of(self, tensor: Value) -> tuple[int, Runs] | None:
        """Return along which axis of a tensor the examples lie, and how."""
        found = [(axis, runs) for axis, runs in self.axes(tensor).items() if are_rows(runs)]
        return found[0] if len(found) == 1 else None

    def runs(self, axis: int, tensor: Value | None = None) -> Runs:
        """Return what lies along an axis of a tensor, the first by default."""
        shape = self.shape(tensor)
        known = self.axes(tensor).get(axis % len(shape))
        return known or whole(shape[axis], f"{self.where} takes it together with what cannot be cut")

    def overlay(self, places: Iterable[tuple[Value, int]]) -> Runs | None:
        """Unite what lies on top of each other along axes of tensors; a single channel is broadcast over the others."""
        lying = [(tensor, axis) for tensor, axis in places if self.shape(tensor)[axis] != 1]
        if not any(axis % len(self.shape(tensor)) in self.axes(tensor) for tensor, axis in lying):
            return None
        all_runs = [self.runs(axis, tensor) for tensor, axis in lying]
        first = next((runs for runs in all_runs if are_rows(runs)), all_runs[0])
        for each in all_runs:
            if each is not first:
                unify(first, each, f"{self.where} combines channels of different make-up")
        return first

    def join(self, tensors: Sequence[Value], without: Collection[int] = ()) -> Axes:
        """Unite the channels of tensors that are broadcast against each other, but for some axes (negative)."""
        ndim = max(len(self.shape(tensor)) for tensor in tensors)
        lying = {
            axis: self.overlay((tensor, axis) for tensor in tensors if len(self.shape(tensor)) >= -axis)
            for axis in set(range(-ndim, 0)) - set(without)
        }
        return {ndim + axis: each for axis, each in lying.items() if each}

    def again(
        self, tensor: Value, value: Tensor, narrow: bool = False, counted: Mapping[Source, Runs] | None = None
    ) -> list[Tensor]:
        """Run the operation with another tensor, and with numbers of narrowed channels if asked; list the results."""
        out = self.interpreter.evaluate(self.op, {tensor: value}, narrow, counted)
        return [out] if isinstance(out, Tensor) else list(out)


class Interpreter:
    """Follows the channels through what a net did on an example input.

    Args:
        net: The net.
        num_rows: Number of examples.
        excluded: Ids of the modules to leave alone.
        by_example: Whether masks have a row for each example, which must be found where a layer reads them.
        splits: Sizes of the parts of axes of parameters that are followed apart, by name and axis.

    Attributes:
        layers: Input and output channels of the layers met, by name.
        parameters: What lies along the axes of parameters and buffers, by name and axis.
        attributes: What lies along axes whose lengths are attributes of modules.
        reads: Names of parameters that functions take as weights, rather than modules.
        made: The spaces, in order.
        unfollowed: Operations without a rule, each as the name of its module and what it is.
    """

    def __init__(
        self,
        net: nn.Module,
        num_rows: int,
        excluded: set[int],
        by_example: bool,
        splits: dict[Any, tuple[int, ...]],
    ) -> None:
        self.net, self.num_rows, self.excluded, self.by_example, self.splits = (
            net,
            num_rows,
            excluded,
            by_example,
            splits,
        )
        self.names = {id(each): name for name, each in [*net.named_parameters(), *net.named_buffers()]}
        self.marks: dict[Value, Axes] = {}
        self.layers: dict[str, Layer] = {}
        self.parameters: dict[tuple[str, int], Runs] = {}
        self.attributes: dict[Attribute, Runs] = {}
        self.reads: dict[str, Layer] = {}
        self.made: list[Space] = []
        self.unfollowed: dict[str, str] = {}
        self._checks: list[tuple[Callable[[], bool], Callable[[], None]]] = []

    def run(self, tape: Tape) -> None:
        """Follow all that is on a tape."""
        for op in tape.that_matter():
            self._follow(op)
        for value in tape.results:
            hold(self.axes(value), "it reaches the net's output")

    def finish(self) -> None:
        """Leave whole what only parameters have, and what is read where the rows are not the examples."""
        for space in self.made:
            if not space.made:
                space.hold("no layer makes it")
        if self.by_example:
            self._hold_lost_rows()
        failed: list[bool] = []
        while (now := [not holds() for holds, _ in self._checks]) != failed:  # what is held may change other numbers
            for fails, (_, otherwise) in zip(now, self._checks, strict=True):
                if fails:
                    otherwise()
            failed = now

    def _hold_lost_rows(self) -> None:
        for found in (self.layers, self.reads):
            for name, layer in found.items():
                if layer.rows is None:
                    reason = f'rows of the input of `{name}` are not the examples; mask_per="batch" can cut it'
                    hold([layer.inputs], reason)

    def axes(self, value: Value) -> Axes:
        """Return what lies along the axes of a tensor."""
        if value not in self.marks:
            self.marks[value] = self._axes_of_new(value)
        return self.marks[value]

    def _axes_of_new(self, value: Value) -> Axes:
        if value.is_input:
            return {0: rows(self.num_rows)} if value.shape[:1] == (self.num_rows,) else {}
        if not value.parameter or not value.tensor.is_floating_point():
            return {}
        if any(id(self.net.get_submodule(path)) in self.excluded for path in _around(value.parameter)):
            return {}
        axes: Axes = {}
        for dim, size in enumerate(value.shape):
            if size > 1:
                key = value.parameter, dim
                if key not in self.parameters:
                    owner, _, own = value.parameter.rpartition(".")
                    self.parameters[key] = self.new_axis(
                        value.parameter, dim, size, "", owner if "weight" in own else ""
                    )
                axes[dim] = self.parameters[key]
        return axes

    def new_axis(self, name: str, dim: int, size: int, layer: str, shown: str = "") -> Runs:
        """Return new channels: an axis of a parameter, in as many parts as it was found to have."""
        runs = []
        parts = self.splits.get((name, dim), (size,))
        for number, part in enumerate(parts):
            order = len(self.made) + (0 if layer else PARAMETERS_COME_LATER)
            of = layer or shown or name
            space = Space(order, of if not number else f"{of}[{number}]", part, origin=((name, dim), number))
            self.made.append(space)
            runs.append(Run(space, part))
        return tuple(runs)

    def reads_of(self, weight: Value) -> str:
        """Return the name of the parameter that a weight is, or is a view of; "" if it is computed."""
        base = weight.tensor if weight.parameter else weight.tensor._base
        return self.names.get(id(base), "")

    def record(
        self, name: str, inputs: Runs, outputs: Runs, at: tuple[int, Runs] | None, where: str, read: bool = False
    ) -> None:
        """Record what a layer, or a function that takes a parameter as its weight, reads and makes."""
        known = (self.reads if read else self.layers).setdefault(name, Layer(inputs, outputs, at))
        for before, now in ((known.inputs, inputs), (known.outputs, outputs)):
            if before is not now:
                unify(before, now, f"{where} is used again on other channels")
        if self.by_example and _layout(known.rows) != _layout(at):
            hold([inputs], f'{where} is used again on rows that lie otherwise; mask_per="batch" can cut it')

    def can_bind(self, attribute: Attribute, runs: Runs) -> bool:
        """Say whether an attribute may be the number of some channels."""
        return extent(runs) == attribute.number

    def bind(self, attribute: Attribute, runs: Runs) -> bool:
        """Let an attribute of a module follow channels; say whether it can."""
        if not self.can_bind(attribute, runs):
            return False
        known = self.attributes.setdefault(attribute, runs)
        if known is not runs:
            unify(known, runs, f"attribute `{attribute.name}` of `{attribute.module}` counts both")
        return True

    def _follow(self, op: Op) -> None:
        for value in op.inputs:
            self.axes(value)
        call = Call(op, self)
        if not op.outputs and op.name != "setitem":
            call.hold((runs for value in op.inputs for runs in self.axes(value).values()), "reads values")
            return
        if id(op.target) in self.excluded:
            call.hold((runs for value in op.inputs for runs in self.axes(value).values()), "is excluded")
            self._keep_rows(op)
            return
        found = find_rule(op.target if isinstance(op.target, nn.Module) else op.name.rstrip("_"), op.in_place)
        try:
            if found is None:
                raise _Unfollowed
            if found not in FOLLOW_SIZES:
                self._hold_numbers(call)
            result = found(call)
        except _Unfollowed:
            if op.outputs and (any(self.axes(value) for value in op.inputs) or _has_weights(op.target)):
                self.unfollowed.setdefault(op.path, call.where)
            call.hold((runs for value in op.inputs for runs in self.axes(value).values()), "cannot be followed")
            self._keep_rows(op)
            return
        for value, axes in zip(op.outputs, result if isinstance(result, tuple) else (result,), strict=True):
            self.marks[value] = axes

    def _hold_numbers(self, call: Call) -> None:
        """See to it that numbers that are computed with stay what they are: at the end it is known what is cut."""
        sources = numbers_in((call.op.args, call.op.kwargs))
        if not sources:
            return

        def stays() -> bool:
            return all(self.plain(each, narrow=True) == self.plain(each) for each in (call.op.args, call.op.kwargs))

        self.check_later(stays, lambda: call.hold(map(self.counted, sources), "computes with the number of channels"))

    def check_later(self, holds: Callable[[], bool], otherwise: Callable[[], None]) -> None:
        """Ask at the end whether something holds, when it is known what is cut together."""
        self._checks.append((holds, otherwise))

    def counted(self, source: Source) -> Runs:
        """Return the channels that a number counts, if it is known to count some."""
        if isinstance(source, Size):
            return self.axes(source.value).get(source.axis, ())
        return self.attributes.get(source, ())

    def _keep_rows(self, op: Op) -> None:
        """Find out whether an unknown operation keeps the examples apart: its results turn around with them."""
        with_rows = [value for value in dict.fromkeys(op.inputs) if any(map(are_rows, self.axes(value).values()))]
        at_front = all(0 in self.axes(value) and are_rows(self.axes(value)[0]) for value in with_rows)
        if not with_rows or not at_front or op.in_place:
            return
        wanted = [value for value in op.outputs if value.shape[:1] == (self.num_rows,)]
        if not wanted or any(value.shape[:1] != (self.num_rows,) for value in with_rows):
            return
        try:
            states = torch.get_rng_state()
            plain = self.evaluate(op, {})
            torch.set_rng_state(states)
            turned = self.evaluate(op, {value: value.tensor.flip(0) for value in with_rows})
        except Exception:  # whatever the code of the net does not bear
            return
        for value, one, other in zip(op.outputs, tensors_in(plain), tensors_in(turned), strict=False):
            if value in wanted and one.shape == other.shape and torch.allclose(one, other.flip(0), 1e-3, 1e-4):
                self.marks[value] = {0: rows(self.num_rows)}

    def evaluate(
        self,
        op: Op,
        instead: dict[Value, Tensor],
        narrow: bool = False,
        counted: Mapping[Source, Runs] | None = None,
    ) -> Any:
        """Run one operation, with other tensors for some, and numbers as in `plain`."""

        def put(thing: Any) -> Any:
            if isinstance(thing, Value):
                return instead.get(thing, thing.tensor)
            if type(thing) in (tuple, list):
                return type(thing)(map(put, thing))
            if type(thing) is dict:
                return {key: put(each) for key, each in thing.items()}
            return self.plain(thing, narrow, counted)

        return op.target(*put(op.args), **put(op.kwargs))

    def plain(self, thing: Any, narrow: bool = False, instead: Mapping[Source, Runs] | None = None) -> Any:
        """Return numbers, in containers too, as they are, or as they are when channels are cut.

        Args:
            thing: The numbers.
            narrow: Whether channels are cut.
            instead: Channels that some numbers may count, other than those they are known to.
        """

        def number(source: Source) -> int:
            runs = (instead or {}).get(source) or self.counted(source)
            plain = source.value.shape[source.axis] if isinstance(source, Size) else source.number
            return int(kept(runs).sum()) if narrow and runs else plain

        return resolved(thing, number)


def _around(name: str) -> list[str]:
    """Return the names of the modules around a parameter."""
    path = name.split(".")[:-1]
    return [".".join(path[:length]) for length in range(1, len(path) + 1)]


def _layout(at: tuple[int, Runs] | None) -> tuple[int, list[int]] | None:
    return None if at is None else (at[0], [run.size for run in at[1]])


def _has_weights(target: Any) -> bool:
    return isinstance(target, nn.Module) and any(True for _ in target.parameters())
