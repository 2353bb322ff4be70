"""An interpreter that follows channels through what a net did, operation by operation."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pyro_vnd.nn.axis import Rows, Run
from pyro_vnd.nn.tracing.call import FOLLOW_SIZES, PARAMETERS_COME_LATER, Call, Layer, Unfollowed, find_rule
from pyro_vnd.nn.tracing.channels import Axes, Cut, Runs, Space, Split, are_rows, extent, hold, kept, rows, unify
from pyro_vnd.nn.tracing.tape import (
    Attribute,
    Forgotten,
    Op,
    Size,
    Source,
    Tape,
    Value,
    numbers_in,
    resolved,
    tensors_in,
)

__all__ = ["Interpreter"]

CASTS = ("to", "cpu", "cuda", "long", "detach", "contiguous", "clone")


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
        read_elsewhere: Those of them that functions take outside of the forward of the module that has them.
        made: The spaces, in order.
        ways: What is known of operations that are alike, which may be found out by other interpreters, too.
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
        self.read_elsewhere: set[str] = set()
        self.made: list[Space] = []
        self.ways: dict[Any, Any] = {}
        self.unfollowed: dict[str, str] = {}
        self._from_inputs: set[Value] = set()
        self._producers: dict[Value, Op] = {}
        self._checks: list[tuple[Callable[[], bool], Callable[[], None]]] = []

    def run(self, tape: Tape) -> None:
        """Follow all that is on a tape.

        Raises:
            Split: If axes of parameters must be followed in parts; it names those of the whole tape, as far as they are
                seen when nothing is known of what such operations return: nets have as many of them as layers.
        """
        self._from_inputs |= tape.from_inputs()
        parts: dict[tuple[Hashable, int], tuple[int, ...]] = {}
        for op in tape.that_matter():
            try:
                self._follow(op)
            except Split as split:
                parts = split.parts | parts
                self.marks.update((value, {}) for value in op.outputs)
            except Exception:
                if not parts:
                    raise
                break  # it may come of what is not known
        if parts:
            raise Split(parts)
        for value in tape.results:
            hold(self.axes(value), "it reaches the net's output")

    def finish(self) -> None:
        """Leave whole what only parameters have, what nothing reads, and what is read where rows are no examples."""
        readers = (layer for found in (self.layers, self.reads) for layer in found.values())
        read = {run.owner.root for layer in readers if layer.inputs is not layer.outputs for run in layer.inputs}
        for space in self.made:
            if not space.made:
                space.hold("no layer makes it")
            elif not space.reason and space.root not in read:
                space.hold("nothing reads it")
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
        if not value.parameter or not value.is_real:
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
        return weight.parameter or weight.view_of

    def record(
        self, name: str, inputs: Runs, outputs: Runs, at: tuple[int, Runs] | None, where: str, reader: str | None = None
    ) -> None:
        """Record what a layer reads and makes, or a function in the forward of a `reader`, with a parameter."""
        if reader is not None and reader != name.rpartition(".")[0]:
            self.read_elsewhere.add(name)
        known = (self.layers if reader is None else self.reads).setdefault(name, Layer(inputs, outputs, at))
        for before, now in ((known.inputs, inputs), (known.outputs, outputs)):
            if before is not now:
                unify(before, now, f"{where} is used again on other channels")
        if self.by_example and _layout(known.rows) != _layout(at):
            hold([inputs], f'{where} is used again on rows that lie otherwise; mask_per="batch" can cut it')

    def lying(self, at: tuple[int, Runs]) -> Rows:
        """Return where the examples lie that are along an axis."""
        axis, runs = at
        return Rows(axis, len(runs), runs[0].size // self.num_rows)

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
        self._producers.update(dict.fromkeys(op.outputs, op))
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
                raise Unfollowed
            if found not in FOLLOW_SIZES:
                self._hold_numbers(call)
            result = found(call)
            lying = result if isinstance(result, tuple) else (result,)
            if len(lying) != len(op.outputs):  # another use of the name, such as torch.where of a mask alone
                raise Unfollowed
        except Unfollowed:
            if op.outputs and (any(self.axes(value) for value in op.inputs) or _has_weights(op.target)):
                self.unfollowed.setdefault(op.path, call.where)
            call.hold((runs for value in op.inputs for runs in self.axes(value).values()), "cannot be followed")
            self._keep_rows(op)
            return
        self.marks.update(zip(op.outputs, lying, strict=True))

    def _hold_numbers(self, call: Call) -> None:
        """See to it that numbers that are computed with stay what they are: at the end it is known what is cut."""
        sources = numbers_in((call.op.args, call.op.kwargs))
        if not sources:
            return

        def stays() -> bool:
            given = (call.op.args, call.op.kwargs)
            return all(self.plain(given, cut) == self.plain(given) for cut in (Cut(), Cut(deep=True)))

        self.check_later(stays, lambda: call.hold(map(self.counted, sources), "computes with the number of channels"))

    def check_later(self, holds: Callable[[], bool], otherwise: Callable[[], None]) -> None:
        """Ask at the end whether something holds, when it is known what is cut together."""
        self._checks.append((holds, otherwise))

    def is_from_data(self, value: Value) -> bool:
        """Say whether the entries of a tensor depend on the inputs of the net."""
        return value.is_input or value in self._from_inputs

    def original(self, value: Value) -> Value:
        """Return what was cast, or moved to another device, to make a tensor."""
        while (op := self._producers.get(value)) is not None and op.name in CASTS:
            value = op.inputs[0]
        return value

    def is_inverse(self, index: Value, permutation: Any) -> bool:
        """Say whether indices were made to undo a permutation: by sorting it, or by putting numbers where it points."""
        index = self.original(index)
        op = self._producers.get(index)
        if op is None or permutation not in map(self.original, op.inputs):
            return False
        numbers = torch.arange(len(index.tensor), device=index.tensor.device)
        return op.name in ("argsort", "sort", "scatter") and torch.equal(permutation.tensor[index.tensor], numbers)

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
        except Forgotten:
            raise
        except Exception:  # whatever the code of the net does not bear
            return
        for value, one, other in zip(op.outputs, tensors_in(plain), tensors_in(turned), strict=False):
            if value in wanted and one.shape == other.shape and torch.allclose(one, other.flip(0), 1e-3, 1e-4):
                self.marks[value] = {0: rows(self.num_rows)}

    def evaluate(
        self,
        op: Op,
        instead: dict[Value, Tensor],
        cut: Cut | None = None,
        counted: Mapping[Source, Runs] | None = None,
    ) -> Any:
        """Run one operation, with other tensors for some, and numbers as in `plain`."""
        args, kwargs = self.arguments(op, instead, cut, counted)
        return op.target(*args, **kwargs)

    def arguments(
        self, op: Op, instead: Mapping[Value, Any], cut: Cut | None = None, counted: Mapping[Source, Runs] | None = None
    ) -> tuple[Any, Any]:
        """Return the arguments of an operation likewise."""

        def put(thing: Any) -> Any:
            if isinstance(thing, Value):
                if thing in instead:
                    return instead[thing]
                return thing.tensor  # which may not have been kept
            if type(thing) in (tuple, list):
                return type(thing)(map(put, thing))
            if type(thing) is dict:
                return {key: put(each) for key, each in thing.items()}
            return self.plain(thing, cut, counted)

        return put(op.args), put(op.kwargs)

    def plain(self, thing: Any, cut: Cut | None = None, instead: Mapping[Source, Runs] | None = None) -> Any:
        """Return numbers, in containers too, as they are, or as they are when channels are cut.

        Args:
            thing: The numbers.
            cut: What is cut; by default nothing.
            instead: Channels that some numbers may count, other than those they are known to.
        """

        def number(source: Source) -> int:
            runs = (instead or {}).get(source) or self.counted(source)
            plain = source.value.shape[source.axis] if isinstance(source, Size) else source.number
            return int(kept(runs, cut).sum()) if cut is not None and runs else plain

        return resolved(thing, number)


def _around(name: str) -> list[str]:
    """Return the names of the modules around a parameter."""
    path = name.split(".")[:-1]
    return [".".join(path[:length]) for length in range(1, len(path) + 1)]


def _layout(at: tuple[int, Runs] | None) -> tuple[int, list[int]] | None:
    return None if at is None else (at[0], [run.size for run in at[1]])


def _has_weights(target: Any) -> bool:
    return isinstance(target, nn.Module) and any(True for _ in target.parameters())
