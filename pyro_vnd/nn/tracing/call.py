"""One operation of a net as a rule sees it, and the table of rules, one a kind of operation."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, TypeAlias

import torch
from torch import Tensor, nn

from pyro_vnd.nn.axis import Run
from pyro_vnd.nn.tracing.channels import Axes, Cut, Runs, Space, are_rows, hold, unify, whole
from pyro_vnd.nn.tracing.tape import Attribute, Op, Source, Value

if TYPE_CHECKING:
    from pyro_vnd.nn.tracing.interpreter import Interpreter

__all__ = ["FOLLOW_SIZES", "PARAMETERS_COME_LATER", "Call", "Layer", "Unfollowed", "find_rule", "first_kept", "rule"]

Rule: TypeAlias = "Callable[[Call], Axes | tuple[Axes, ...]]"
RULES: dict[str | Callable[..., Any], Rule] = {}
FOLLOW_SIZES: set[Rule] = set()
RUN_AGAIN: set[Rule] = set()
Named: TypeAlias = Callable[[Rule], Rule]
PARAMETERS_COME_LATER = 1e9  # groups have the name of a layer, if there is one


def rule(*operations: str | Callable[..., Any], follows_sizes: bool = False, runs_again: bool = False) -> Named:
    """Register how channels pass through operations: types of modules, or names of torch's functions.

    A name stands for a tensor method and an operator too, and for the same with an underscore at the end.

    A rule gets the `Call` and returns what lies along the axes of its result, or of each of its results. A number of
    channels among the arguments holds these channels whole, unless the rule looks after it itself (`follows_sizes`).
    One that runs the operation on something else than the first tensor says so (`runs_again`): the others are kept.
    """

    def register(function: Rule) -> Rule:
        for operation in operations:
            RULES.update(dict.fromkeys(operation.split() if isinstance(operation, str) else [operation], function))
        if follows_sizes:
            FOLLOW_SIZES.add(function)
        if runs_again:
            RUN_AGAIN.add(function)
        return function

    return register


def find_rule(operation: Any, in_place: bool = False) -> Rule | None:
    """Return the rule of a module, or of a function by its name; None if it is unknown."""
    if isinstance(operation, nn.Module):
        kind = type(operation)
        # A subclass with another forward may do anything, and so may what computes its weights.
        same = (base for base in kind.__mro__ if base in RULES and getattr(base, "forward", None) is kind.forward)
        given = [each for each in (getattr(operation, key, None) for key in ("weight", "bias")) if each is not None]
        own = set(map(id, operation.parameters(recurse=False)))
        is_own = all(not isinstance(each, Tensor) or id(each) in own for each in given)
        return RULES.get(next(same, nn.Module)) if is_own and not hasattr(operation, "parametrizations") else None
    found = RULES.get(operation)
    # In place, the entries of a tensor may change, but not its shape, which is read after the call.
    return None if in_place and found in FOLLOW_SIZES and operation != "setitem" else found


def first_kept(operation: Any, in_place: bool) -> int | None:
    """Return from which position on the tensors of an operation are kept, None if none are; arguments are a rule's."""
    found = find_rule(operation, in_place)
    return 0 if found is None else 1 if found in RUN_AGAIN else None


class Unfollowed(Exception):
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
            self.interpreter.record(name, inputs, outputs, self.rows_of(x), self.where, self.op.path)
        else:
            self.hold([inputs], "reads channels with weights that are computed")
        for run in outputs if made else ():
            run.owner.make()
        others = {at: runs for at, runs in self.axes(x).items() if at != axis % len(x.shape)}
        return others | {axis % len(x.shape): outputs}

    def fail(self) -> NoReturn:
        """Say that this operation cannot be followed."""
        raise Unfollowed

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

    def arguments(
        self, tensor: Value, value: Any, cut: Cut | None = None, counted: Mapping[Source, Runs] | None = None
    ) -> tuple[Any, Any]:
        """Return the arguments with something else for a tensor, and with numbers of channels that are cut if asked."""
        return self.interpreter.arguments(self.op, {tensor: value}, cut, counted)

    def again(
        self, tensor: Value, value: Tensor, cut: Cut | None = None, counted: Mapping[Source, Runs] | None = None
    ) -> list[Tensor]:
        """Run the operation with another tensor, and with numbers of cut channels if asked; list the results."""
        out = self.interpreter.evaluate(self.op, {tensor: value}, cut, counted)
        return [out] if isinstance(out, Tensor) else list(out)
