"""An interpreter that follows channels through a traced net, with a table of rules, one a kind of operation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import chain
from typing import Any, NoReturn, TypeAlias

import torch
from torch import Tensor, fx, nn

from pyro_vnd.nn.axis import Run
from pyro_vnd.nn.tracing.channels import Axes, Mark, Runs, SizeOf, Space, hold, leaves, unify, whole

__all__ = ["Call", "Interpreter", "find_rule", "rule"]

Rule: TypeAlias = "Callable[[Call], Mark]"
RULES: dict[str | Callable[..., Any], Rule] = {}
FOLLOW_SIZES: set[Rule] = set()
NAMED = ("torch", "_operator", "builtins", "math")  # where functions have the names of the table
Named: TypeAlias = Callable[[Rule], Rule]


def rule(*operations: str | Callable[..., Any], follows_sizes: bool = False) -> Named:
    """Register how channels pass through operations: types of modules, functions, or names of torch's functions.

    A name stands for a tensor method too, and for the same with an underscore at the end.

    A rule gets the `Call` and returns the mark of its result. A number of channels among the arguments holds these
    channels whole, unless the rule looks after it itself (`follows_sizes`).
    """

    def register(function: Rule) -> Rule:
        for operation in operations:
            RULES.update(dict.fromkeys(operation.split() if isinstance(operation, str) else [operation], function))
        if follows_sizes:
            FOLLOW_SIZES.add(function)
        return function

    return register


def find_rule(operation: Any) -> Rule | None:
    """Return the rule of a module, of a function of torch or Python, or of a method by its name; None if unknown."""
    if isinstance(operation, nn.Module):
        kind = type(operation)
        # A subclass with another forward, or weights that are computed, may do anything.
        same = (base for base in kind.__mro__ if base in RULES and getattr(base, "forward", None) is kind.forward)
        return None if hasattr(operation, "parametrizations") else RULES.get(next(same, nn.Module))
    if operation in RULES:
        return RULES[operation]
    if not isinstance(operation, str):
        if (getattr(operation, "__module__", None) or "torch").partition(".")[0] not in NAMED:
            return None
        operation = getattr(operation, "__name__", str(operation))
    found = RULES.get(operation) or RULES.get(operation.removesuffix("_"))
    # In place, the entries of a tensor may change, but not its shape, which is read after the call.
    return None if operation not in RULES and found in FOLLOW_SIZES else found


@dataclass(frozen=True)
class Call:
    """One operation of the net on the example input."""

    node: fx.Node
    out: Any
    interpreter: Interpreter

    @property
    def module(self) -> Any:
        """The module that is called, if it is one."""
        return self.interpreter.net.get_submodule(str(self.node.target)) if self.node.op == "call_module" else None

    @property
    def name(self) -> str:
        """Name of the function, method or type of module."""
        return self.interpreter.operation_name(self.node)

    def value(self, argument: Any) -> Any:
        """Return what an argument was on the example input."""
        return fx.node.map_arg(argument, lambda node: self.interpreter.values[node])

    def mark(self, argument: Any) -> Mark:
        """Return what is known of an argument."""
        if isinstance(argument, fx.Node):
            return self.interpreter.marks[argument]
        return tuple(map(self.mark, argument)) if isinstance(argument, list | tuple) else None

    def argument(self, name: str, position: int, default: Any = None) -> Any:
        """Return an argument, or for a module its attribute of that name."""
        if self.module is not None:
            return getattr(self.module, name, default)
        arguments = {str(i): given for i, given in enumerate(self.node.args)} | self.node.kwargs
        return arguments.get(name, arguments.get(str(position), default))

    @property
    def tensors(self) -> list[fx.Node]:
        """The arguments that are tensors, those in lists too."""
        return [node for node in self.node.all_input_nodes if isinstance(self.interpreter.values[node], Tensor)]

    def shape(self, tensor: fx.Node | None = None) -> torch.Size:
        """Return the shape of a tensor, the first by default."""
        return self.interpreter.values[tensor or self.tensors[0]].shape

    def axes(self, tensor: fx.Node | None = None) -> Axes:
        """Return a copy of what lies along the axes of a tensor, the first by default."""
        mark = self.interpreter.marks[tensor or self.tensors[0]]
        return dict(mark) if isinstance(mark, dict) else {}

    def mixed(self, axes: Iterable[int], why: str = "mixes channels") -> Axes:
        """Hold whole what lies along axes of the first tensor, where channels meet; return the other axes."""
        before, ndim = self.axes(), len(self.shape())
        mixing = {axis % ndim for axis in axes}
        self.hold({axis: before[axis] for axis in mixing & before.keys()}, why)
        return {axis: runs for axis, runs in before.items() if axis not in mixing}

    def hold(self, mark: Mark, why: str) -> None:
        """Leave channels whole, because of what this operation does."""
        hold(mark, f"{self.where} {why}")

    @property
    def where(self) -> str:
        """The operation, for messages."""
        path = self.interpreter.path(self.node)
        return f"`{self.name}` (node `{self.node.name}`" + (f" in `{path}`)" if path else ")")

    def new_space(self, size: int) -> Runs:
        """Return new channels, made by this module."""
        space = Space(len(self.interpreter.made), str(self.node.target), size)
        self.interpreter.made.append(space)
        return (Run(space, size),)

    def layer(self, inputs: Runs, outputs: Runs) -> Runs:
        """Record the channels of this module; return its outputs."""
        before = self.interpreter.layers.setdefault(str(self.node.target), (inputs, outputs))
        for known, now in zip(before, (inputs, outputs), strict=True):
            unify(known, now, f"{self.where} is used again on other channels")
        return outputs

    def runs(self, axis: int, tensor: fx.Node | None = None) -> Runs:
        """Return what lies along an axis of a tensor, the first by default."""
        shape = self.shape(tensor)
        known = self.axes(tensor).get(axis % len(shape))
        return known or whole(shape[axis], f"{self.where} takes it together with what cannot be cut")

    def overlay(self, places: Iterable[tuple[fx.Node, int]]) -> Runs | None:
        """Unite what lies on top of each other along axes of tensors; a single channel is broadcast over the others."""
        lying = [(tensor, axis) for tensor, axis in places if self.shape(tensor)[axis] != 1]
        if not any(axis % len(self.shape(tensor)) in self.axes(tensor) for tensor, axis in lying):
            return None
        first, *others = (self.runs(axis, tensor) for tensor, axis in lying)
        for runs in others:
            unify(first, runs, f"{self.where} combines channels of different make-up")
        return first

    def join(self, tensors: Sequence[fx.Node], without: Collection[int] = ()) -> Axes:
        """Unite the channels of tensors that are broadcast against each other, but for some axes (negative)."""
        ndim = max(len(self.shape(tensor)) for tensor in tensors)
        lying = {
            axis: self.overlay((tensor, axis) for tensor in tensors if len(self.shape(tensor)) >= -axis)
            for axis in set(range(-ndim, 0)) - set(without)
        }
        return {ndim + axis: runs for axis, runs in lying.items() if runs}

    def each(self, axes: Axes) -> Mark:
        """Give the same axes to the result, or to each of its tensors."""
        return axes if isinstance(self.out, Tensor) else tuple(dict(axes) for _ in self.out)

    def again(self, tensor: fx.Node, value: Tensor, narrow: bool = False) -> list[Tensor]:
        """Run the operation with another tensor, and with numbers of narrowed channels if asked; list the results."""

        def substitute(node: fx.Node) -> Any:
            if node is tensor:
                return value
            known = self.interpreter.values[node]
            return _narrowed(self.interpreter.marks[node], known) if narrow else known

        out = self.interpreter.evaluate(self.node, substitute)
        return [out] if isinstance(out, Tensor) else list(out)

    def fail(self) -> NoReturn:
        """Raise the error that says what cannot be followed, and what to do."""
        path = self.interpreter.path(self.node)
        advice = f'`exclude=["{path}"]` leaves that part alone' if path else "put it into a submodule, to exclude that"
        raise ValueError(f"nest: cannot follow channels through {self.where}; {advice}")


def _narrowed(mark: Mark, value: Any) -> Any:
    if isinstance(mark, tuple):
        return tuple(map(_narrowed, mark, value))
    return mark.narrowed() if isinstance(mark, SizeOf) else value


class Interpreter:
    """Runs a graph on an example input, and follows the channels.

    Args:
        net: The net.
        graph: Its trace.
        inputs: The example input.
        excluded: Ids of the modules to leave alone.

    Attributes:
        layers: Input and output channels of the layers met, by name.
        made: The spaces they made.
    """

    def __init__(self, net: nn.Module, graph: fx.Graph, inputs: Sequence[Any], excluded: set[int]) -> None:
        self.net, self.graph, self.inputs, self.excluded = net, graph, iter(inputs), excluded
        self.values: dict[fx.Node, Any] = {}
        self.marks: dict[fx.Node, Mark] = {}
        self.layers: dict[str, tuple[Runs, Runs]] = {}
        self.made: list[Space] = []

    def run(self) -> None:
        """Follow the whole graph."""
        for node in self.graph.nodes:
            if node.op == "output":
                for argument in node.all_input_nodes:
                    hold(self.marks[argument], "it reaches the net's output")
            else:
                self.marks[node] = self._follow(node)
        self._hold_shared_tensors()

    def _follow(self, node: fx.Node) -> Mark:
        marks = tuple(self.marks[argument] for argument in node.all_input_nodes)
        known = list(leaves(marks))
        sizes = [mark for mark in known if isinstance(mark, SizeOf)]
        operation = self.net.get_submodule(str(node.target)) if node.op == "call_module" else node.target
        excluded = id(operation) in self.excluded
        is_call = node.op.startswith("call") and not excluded
        found = find_rule(operation) if is_call else None
        if is_call and not found:
            weights = isinstance(operation, nn.Module) and any(True for _ in operation.parameters())
            if weights or len(sizes) < len(known):
                Call(node, None, self).fail()
        self.values[node] = self.evaluate(node, self.values.__getitem__)
        call = Call(node, self.values[node], self)
        if excluded:
            call.hold(marks, "is excluded")
            return None
        if found and found in FOLLOW_SIZES:
            return found(call)
        if sizes and isinstance(call.out, int | float) and not any(isinstance(mark, dict | tuple) for mark in marks):
            return self._number(node, sizes)
        call.hold(tuple(sizes), "computes with the number of channels")
        if found and call.tensors:
            return found(call)
        call.hold(marks, "takes the tensors of a tuple")
        return None

    def _number(self, node: fx.Node, sizes: Sequence[SizeOf]) -> Mark:
        def narrowed() -> Any:
            return self.evaluate(node, lambda argument: _narrowed(self.marks[argument], self.values[argument]))

        return SizeOf(tuple(run for size in sizes for run in size.runs), narrowed)

    def evaluate(self, node: fx.Node, substitute: Callable[[fx.Node], Any]) -> Any:
        """Run one node, with values for its arguments."""
        args, kwargs = fx.node.map_arg(node.args, substitute), fx.node.map_arg(node.kwargs, substitute)
        target: Any = node.target
        if node.op == "placeholder":
            return next(self.inputs)
        if node.op == "get_attr":
            return reduce(getattr, target.split("."), self.net)
        if node.op == "call_method":
            return getattr(args[0], target)(*args[1:], **kwargs)
        return (self.net.get_submodule(target) if node.op == "call_module" else target)(*args, **kwargs)

    def operation_name(self, node: fx.Node) -> str:
        """Return the name of a function, method or type of module."""
        if node.op == "call_module":
            return type(self.net.get_submodule(str(node.target))).__name__
        return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))

    def path(self, node: fx.Node) -> str:
        """Return the name of the nearest module around a node, or of the module that it calls."""
        if node.op == "call_module":
            return str(node.target)
        stack = list(node.meta.get("nn_module_stack", {}).values())
        return stack[-1][0] if stack else ""

    def _hold_shared_tensors(self) -> None:
        """Leave layers whole whose weights are also those of another module, or are read by the net itself."""
        uses = Counter(id(self.values[node]) for node in self.graph.nodes if node.op == "get_attr")
        owned = {name: [id(tensor) for tensor in _own_tensors(module)] for name, module in self.net.named_modules()}
        uses.update(chain.from_iterable(owned.values()))
        for name, (inputs, outputs) in self.layers.items():
            if any(uses[tensor] > 1 for tensor in owned[name]):
                hold({0: inputs, 1: outputs}, f"`{name}` shares its weights")


def _own_tensors(module: nn.Module) -> Iterator[Tensor]:
    """Yield the parameters and buffers of a module without its parts, twice what it has under two names."""
    for _, tensor in chain(
        module.named_parameters(recurse=False, remove_duplicate=False),
        module.named_buffers(recurse=False, remove_duplicate=False),
    ):
        yield tensor
