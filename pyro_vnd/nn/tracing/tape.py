"""What a net does on an example, operation by operation, as it is run.

The net runs once on real tensors while each function of torch that it calls is written down, with the tensors it takes
and returns. Control flow simply happens, as the example has it; modules may be called by keyword, and any of their
attributes may be read. What a net computes from sizes of tensors, or from whole numbers that its modules have as
attributes, remembers where it is from: so it can be said later what these numbers would be if there were fewer
channels. (Symbolic values, such as those of torch.fx, fail where Python asks for a number, a length or a truth; graphs
of `torch.export` are slow to make, and have numbers in place of the sizes that they were computed from.)
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pyro_vnd._compat import plain_checkpoints

__all__ = [
    "Attribute",
    "ModuleCall",
    "Op",
    "Size",
    "Source",
    "Tape",
    "Value",
    "numbers_in",
    "recorded",
    "resolved",
    "tensors_in",
    "with_one_more",
    "within",
]


@dataclass(eq=False)
class Value:
    """A tensor at one moment of the run.

    Attributes:
        tensor: The tensor.
        shape: Its shape at that moment.
        parameter: Name of the parameter or buffer of the net that it is, "" if it is none.
        is_input: Whether it is an argument of the net.
    """

    tensor: Tensor
    parameter: str = ""
    is_input: bool = False
    shape: torch.Size = field(init=False)

    def __post_init__(self) -> None:
        self.shape = torch.Size(int(size) for size in torch.Tensor.size(self.tensor))


@dataclass(frozen=True)
class Size:
    """A number that is the length of an axis."""

    value: Value
    axis: int


@dataclass(frozen=True)
class Attribute:
    """A number that is an attribute of a module of the net, or within one that is a tuple."""

    module: str
    name: str
    index: int | None
    number: int


Source: TypeAlias = Size | Attribute


class _Computed:
    """What is known of a number: its sources, and how it follows from them."""

    sources: frozenset[Source]
    compute: Callable[[Callable[[Source], int]], Any]


class _Int(int, _Computed):
    pass


class _Float(float, _Computed):
    pass


def _computed(value: Any, sources: frozenset[Source], compute: Callable[..., Any]) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    number = _Int(value) if isinstance(value, int) else _Float(value)
    number.sources, number.compute = sources, compute
    return number


def _from(source: Source, value: int) -> Any:
    return _computed(value, frozenset([source]), lambda at: at(source))


def _plain(number: Any) -> Any:
    return int(number) if isinstance(number, int) else float(number)


def _apply(function: Callable[..., Any], *arguments: Any) -> Any:
    if not all(isinstance(each, int | float) for each in arguments):
        return NotImplemented
    sources: frozenset[Source] = frozenset().union(*(getattr(each, "sources", ()) for each in arguments))
    value = function(*map(_plain, arguments))
    return _computed(value, sources, lambda at: function(*(resolved(each, at) for each in arguments)))


def _operators(kind: type) -> None:
    for name in ("add", "sub", "mul", "floordiv", "truediv", "mod", "pow"):
        function = getattr(operator, name)
        setattr(kind, f"__{name}__", lambda self, other, f=function: _apply(f, self, other))
        setattr(kind, f"__r{name}__", lambda self, other, f=function: _apply(f, other, self))
    setattr(kind, "__neg__", lambda self: _apply(operator.neg, self))  # noqa: B010


_operators(_Int)
_operators(_Float)


def resolved(thing: Any, at: Callable[[Source], int]) -> Any:
    """Return numbers as they are when their sources have other values."""
    if isinstance(thing, _Computed):
        return thing.compute(at)
    if isinstance(thing, slice):
        return slice(*(resolved(each, at) for each in (thing.start, thing.stop, thing.step)))
    if type(thing) in (tuple, list, torch.Size):
        return type(thing)(resolved(each, at) for each in thing)
    return {key: resolved(each, at) for key, each in thing.items()} if type(thing) is dict else thing


def within(thing: Any) -> Iterator[Any]:
    """Yield what containers, data classes among them, consist of."""
    if isinstance(thing, Mapping):
        inner: Any = thing.values()
    elif isinstance(thing, tuple | list | set | frozenset):
        inner = thing
    elif isinstance(thing, slice):
        inner = (thing.start, thing.stop, thing.step)
    elif is_dataclass(thing) and not isinstance(thing, type | Value):
        inner = (getattr(thing, each.name) for each in fields(thing))
    else:
        yield thing
        return
    for each in inner:
        yield from within(each)


def tensors_in(thing: Any) -> list[Tensor]:
    """Return the tensors in what a net takes or returns: in tuples, mappings, data classes, however deep."""
    return [each for each in within(thing) if isinstance(each, Tensor)]


def with_one_more(inputs: tuple[Any, ...], rows: int) -> tuple[Any, ...]:
    """Repeat the last example in each argument of a net that has a row for each example."""
    return tuple(torch.cat([x, x[-1:]]) if isinstance(x, Tensor) and x.shape[:1] == (rows,) else x for x in inputs)


def numbers_in(thing: Any) -> frozenset[Source]:
    """Return the sources of the numbers in arguments."""
    return frozenset().union(*(each.sources for each in within(thing) if isinstance(each, _Computed)))


@dataclass(eq=False)
class Op:
    """One call of a function of torch, or of a module that is an operation by itself.

    Attributes:
        target: The function, or the module.
        name: Name of the function, without the underscores of special methods, or of the module's class.
        path: Name of the module that is called, or in whose forward the function is.
        args: Arguments, with a `Value` for each tensor.
        kwargs: Arguments by name, likewise.
        inputs: The tensors among them.
        outputs: The tensors that it returns.
        in_place: Whether it changes its first argument.
    """

    target: Any
    name: str
    path: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: list[Value]
    outputs: list[Value]
    in_place: bool


@dataclass(eq=False)
class ModuleCall:
    """One call of a module that is no operation by itself, but has some in it.

    Attributes:
        path: Name of the module.
        module: The module.
        args: Arguments, with a `Value` for each tensor.
        kwargs: Arguments by name, likewise.
        start: Number of operations before it.
        out: What it returned, likewise; None until it has.
        stop: Number of operations when it had returned.
        changed: The arguments that were other tensors in memory when it had returned, changed in place.
    """

    path: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    start: int
    out: Any = None
    stop: int = -1
    changed: frozenset[Value] = frozenset()


class Tape(TorchFunctionMode):
    """Writes down what a net does; `recorded` makes one.

    Args:
        net: The net.
        is_operation: Says of a module whether it is one operation, rather than those in it.

    Attributes:
        ops: The operations, in order.
        calls: Calls of modules with operations in them, in the order in which they began.
        results: What the net returned.
        stack: Names of the modules that are being run.
    """

    def __init__(self, net: nn.Module, is_operation: Callable[[nn.Module], bool]) -> None:
        super().__init__()
        self.net, self.is_operation = net, is_operation
        self.ops: list[Op] = []
        self.calls: list[ModuleCall] = []
        self._open: list[tuple[ModuleCall, dict[Value, int]]] = []
        self.results: list[Value] = []
        self.stack: list[str] = [""]
        self._depth = 0  # how many modules that are operations are being run
        self._values: dict[int, Value] = {}
        tensors = [*net.named_parameters(), *net.named_buffers()]
        self._names = {id(tensor): name for name, tensor in tensors}
        self._taken: dict[nn.Module, list[tuple[Any, Any]]] = {}

    def run(self, inputs: tuple[Any, ...]) -> None:
        """Run the net."""
        for tensor in tensors_in(inputs):
            self._values[id(tensor)] = Value(tensor, is_input=True)
        with ExitStack() as stack:
            for name, module in self.net.named_modules():
                # Hooks that a module has run between the outer and the inner ones of these.
                hooks = [
                    module.register_forward_pre_hook(lambda *_, name=name: self.stack.append(name), prepend=True),
                    module.register_forward_pre_hook(self._take, with_kwargs=True),
                    module.register_forward_hook(self._leaving(name), with_kwargs=True, prepend=True),
                    module.register_forward_hook(lambda *_: self._leave()),
                ]
                for hook in hooks:
                    stack.enter_context(hook)
            stack.enter_context(_sourced_attributes(self.net))
            with plain_checkpoints(), self:
                returned = self.net(*inputs)
        self.results = [self._value(tensor) for tensor in tensors_in(returned)]

    def that_matter(self) -> list[Op]:
        """Return the operations on which results, or what Python was told, depend."""
        needed, ops = set(self.results), []
        for op in reversed(self.ops):
            if op.in_place or not op.outputs or not needed.isdisjoint(op.outputs):
                sizes = (each for each in numbers_in((op.args, op.kwargs)) if isinstance(each, Size))
                needed.update(op.inputs, (each.value for each in sizes))
                ops.append(op)
        return ops[::-1]

    def _take(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self.is_operation(module):
            self._depth += 1  # before anything is asked of tensors
            if self._depth == 1:
                self._taken.setdefault(module, []).append((self._noted(args), self._noted(kwargs)))
        elif not self._depth:
            call = ModuleCall(self.stack[-1], module, self._noted(args), self._noted(kwargs), len(self.ops))
            self.calls.append(call)
            self._open.append((call, {self._value(each): _version(each) for each in tensors_in((args, kwargs))}))

    def _leave(self) -> None:
        self.stack.pop()

    def _leaving(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            if self.is_operation(module):
                if self._depth == 1:
                    self._record(module, type(module).__name__, name, *self._taken[module].pop(), out)
                self._depth -= 1
            elif not self._depth:
                call, versions = self._open.pop()
                call.out, call.stop = self._noted(out), len(self.ops)
                call.changed = frozenset(each for each, before in versions.items() if _version(each.tensor) != before)

        return hook

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function, and write it down."""
        if self._depth:
            return func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", str(func))
        if name == "__get__":
            name = func.__self__.__name__
            if name == "shape":
                return self._sizes(args[0])
        in_place = name.endswith("_") and not name.endswith("__")
        noted = self._noted(args), self._noted(kwargs or {})
        out = func(*args, **(kwargs or {}))
        if name == "size":
            sizes = self._sizes(args[0])
            return sizes if isinstance(out, tuple) else sizes[(*args[1:], *(kwargs or {}).values())[0]]
        if name == "numel":
            count: Any = 1
            for size in self._sizes(args[0]):
                count = count * size
            return count
        in_place |= name in ("__setitem__", "__delitem__") or (name.startswith("__i") and name != "__invert__")
        if name not in _QUESTIONS:
            self._record(func, name.strip("_") or name, self.stack[-1], *noted, out, in_place)
        return out

    def _sizes(self, tensor: Tensor) -> Any:
        value = self._value(tensor)
        return torch.Size(_from(Size(value, axis), size) for axis, size in enumerate(value.shape))

    def _record(
        self, target: Any, name: str, path: str, args: Any, kwargs: Any, out: Any, in_place: bool = False
    ) -> None:
        inputs = [each for each in within((args, kwargs)) if isinstance(each, Value)]
        outputs = []
        for tensor in tensors_in(out):
            value = self._values[id(tensor)] = Value(tensor, self._names.get(id(tensor), ""))
            outputs.append(value)
        if inputs or outputs:
            self.ops.append(Op(target, name, path, args, kwargs, inputs, outputs, in_place))

    def _value(self, tensor: Tensor) -> Value:
        """Return what the tape knows of a tensor; it keeps all of them, so that no other has the same id."""
        if id(tensor) not in self._values:
            self._values[id(tensor)] = Value(tensor, self._names.get(id(tensor), ""))
        return self._values[id(tensor)]

    def _noted(self, thing: Any) -> Any:
        """Exchange tensors in arguments for values."""
        if isinstance(thing, Tensor):
            return self._value(thing)
        if isinstance(thing, tuple | list) and not isinstance(thing, torch.Size):
            return tuple(map(self._noted, thing)) if isinstance(thing, tuple) else [self._noted(each) for each in thing]
        if isinstance(thing, Mapping):
            return {key: self._noted(each) for key, each in thing.items()}
        return thing


def _version(tensor: Tensor) -> int:
    """Return how often a tensor was changed in place; tensors of inference mode do not count it."""
    return 0 if tensor.is_inference() else tensor._version


_QUESTIONS = {
    *("dtype", "device", "ndim", "dim", "requires_grad", "is_cuda", "is_leaf", "grad", "grad_fn", "layout", "__len__"),
    *(
        "is_floating_point",
        "is_complex",
        "is_contiguous",
        "stride",
        "element_size",
        "itemsize",
        "get_device",
        "__hash__",
    ),
    *("is_sparse", "is_quantized", "is_meta", "is_mps", "is_xpu", "is_nested", "requires_grad_", "names", "__repr__"),
    *("storage_offset", "data_ptr", "untyped_storage", "_version", "_base", "_backward_hooks", "retain_grad", "name"),
    *("is_inference", "is_same_size", "is_set_to", "output_nr", "nbytes", "ndimension", "nelement", "__format__"),
    *("register_hook", "has_names", "is_neg", "is_conj", "_set_grad_enabled", "_assert", "set_grad_enabled"),
}


@contextmanager
def _sourced_attributes(net: nn.Module) -> Iterator[None]:
    """Let whole numbers that modules have as attributes remember that they are these."""
    before: list[tuple[nn.Module, str, Any]] = []
    try:
        for path, module in net.named_modules():
            for name, value in list(vars(module).items()):
                if type(value) is int:
                    new: Any = _from(Attribute(path, name, None, value), value)
                elif type(value) in (tuple, torch.Size) and value and all(type(each) is int for each in value):
                    new = type(value)(_from(Attribute(path, name, i, each), each) for i, each in enumerate(value))
                else:
                    continue
                before.append((module, name, value))
                vars(module)[name] = new
        yield
    finally:
        for module, name, value in before:
            vars(module)[name] = value


def recorded(net: nn.Module, inputs: tuple[Any, ...], excluded: Collection[int], find_rule: Callable[..., Any]) -> Tape:
    """Run a net, and return what it did.

    Args:
        net: The net.
        inputs: Its arguments.
        excluded: Ids of modules that are one operation each, whatever is in them.
        find_rule: Returns the rule of a module, or None; those with a rule are one operation, too.

    Raises:
        ValueError: If the net cannot be run; the message names the module in which it failed.
    """
    known = {module: id(module) in excluded or find_rule(module) is not None for module in net.modules()}
    tape = Tape(net, known.__getitem__)
    try:
        tape.run(inputs)
    except Exception as error:
        path = tape.stack[-1]
        where = f"`{path}` ({type(net.get_submodule(path)).__name__})" if path else type(net).__name__
        error.add_note(f"nest: the net could not be run on the example input; it failed in {where}")
        raise
    return tape
