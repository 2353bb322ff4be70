"""How channels pass through operations that only move entries: found out by running them on indices."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise, product
from typing import Any

import torch
from torch import Tensor, nn

from pyro_vnd.nn.tracing.call import Call, rule
from pyro_vnd.nn.tracing.channels import (
    Axes,
    Cut,
    Order,
    Runs,
    Space,
    are_rows,
    extent,
    kept,
    order_of,
    reordered,
    rows,
    scaled,
    split_at,
    unify,
)
from pyro_vnd.nn.tracing.tape import Attribute, Size, Source, Value, numbers_in, within

__all__: list[str] = []

NAMES = """
    chunk expand flatten flip index_select moveaxis movedim narrow permute pixel_shuffle pixel_unshuffle repeat
    repeat_interleave reshape roll select split squeeze swapaxes swapdims t tensor_split tile transpose unbind unflatten
    unsqueeze view channel_shuffle native_channel_shuffle T mT H mH adjoint hsplit vsplit dsplit split_with_sizes
    broadcast_to atleast_2d getitem diagonal ravel
"""
MODULES = (nn.ChannelShuffle, nn.Flatten, nn.PixelShuffle, nn.PixelUnshuffle, nn.Unflatten)


@rule(NAMES, *MODULES, follows_sizes=True, runs_again=True)
def structural(call: Call) -> tuple[Axes, ...]:
    """Follow each axis, and leave it whole if its channels are not in order, or if the operation has fixed sizes."""
    tensor = call.tensors[0]
    picked = _picked(call)
    axes = {axis: runs for axis, runs in call.axes().items() if call.shape()[axis] > 1 and axis not in picked}
    for other in dict.fromkeys(call.tensors):
        if other is not tensor:
            call.hold(call.axes(other), "takes it as an argument")
    if not axes and not picked:
        return _as_wide_as_asked(call)
    way = _Way.of(call, tensor)
    results: list[Axes] = [{} for _ in way.moved]
    for axis, runs in axes.items():
        for number, result in enumerate(results):
            found = _follow(way.indices(axis, number), call.shape()[axis], runs)
            if found is None:
                call.hold([runs], "takes channels apart, or out of order")
            else:
                result.update([found])
    for axis, (place, index) in picked.items():
        results[0].update(_picked_rows(call, axis, place, index))
    moves = _Moves(call, tensor, axes, results, way)
    moves.match_sizes()
    if not moves.bear_an_even_cut() and not moves.bear_with_others():
        moves.split()
    if moves.sources or not moves.bear_cuts():
        call.interpreter.check_later(moves.bear_cuts, moves.tie_or_hold)
    way.forget()
    return tuple(results)


def _picked(call: Call) -> dict[int, tuple[int | None, Value]]:
    """Return the axes that are indexed by what depends on the inputs, where each then is, and the index.

    What the example happens to have there says nothing. An index of several axes, or several indices, have no place.
    """
    if call.name == "index_select":
        dim, index = call.argument("dim", 1) % len(call.shape()), call.argument("index", 2)
        return {dim: (dim, index)} if call.interpreter.is_from_data(index) else {}
    if call.name != "getitem":
        return {}
    key = call.op.args[1] if isinstance(call.op.args[1], tuple) else (call.op.args[1],)
    taken = [each.tensor.dim() if _is_mask(each) else int(each is not None and each is not Ellipsis) for each in key]
    found: dict[int, tuple[int | None, Value]] = {}
    axis = place = 0
    for each, count in zip(key, taken, strict=True):
        if isinstance(each, Value) and call.interpreter.is_from_data(each):
            alone = sum(isinstance(other, Value | int) for other in key) == 1 and len(each.shape) == 1
            found |= {axis + i: (place if alone and not _is_mask(each) else None, each) for i in range(count)}
        skipped = len(call.shape()) - sum(taken) if each is Ellipsis else count
        axis, place = axis + skipped, place + (skipped if not isinstance(each, int) else 0) + (each is None)
    return found


def _is_mask(index: Any) -> bool:
    return isinstance(index, Value) and index.tensor.dtype is torch.bool


def _picked_rows(call: Call, axis: int, place: int | None, index: Value) -> Axes:
    """Return the examples in another order, or in their own again; hold channels that are picked by the inputs."""
    runs = call.axes().get(axis)
    order = order_of(runs) if runs else None
    if runs is None or order is None:
        call.hold([runs] if runs and not are_rows(runs) else [], "picks channels by what the inputs are")
        return {}
    if place is None or order.packed or index.shape != (call.shape()[axis],):
        return {}
    if order.by is None:
        return {place: reordered(call.shape()[axis], Order(call.interpreter.original(index)))}
    return {place: rows(call.shape()[axis])} if call.interpreter.is_inverse(index, order.by) else {}


@rule("pack_padded_sequence")
def pack(call: Call) -> tuple[Axes, ...]:
    """Lay steps of examples after each other, those of examples that are long enough."""
    batch = 0 if call.argument("batch_first", 2) else 1
    axes = call.mixed([1 - batch], "takes positions")
    order = order_of(axes.pop(batch, ()))
    packed = {axis - 1: runs for axis, runs in axes.items()}
    if order is not None and not order.packed:
        packed[0] = reordered(call.out.shape[0], order._replace(packed=True))
    return packed, {}


@rule("pad_packed_sequence")
def pad_packed(call: Call) -> tuple[Axes, ...]:
    """Lay steps of an example beside each other."""
    axes, batch = call.axes(), 0 if call.argument("batch_first", 2) else 1
    order, size = order_of(axes.pop(0, ())), call.out.shape[batch]
    padded = {axis + 1: runs for axis, runs in axes.items()}
    if order is not None and order.packed:
        padded[batch] = rows(size) if order.by is None else reordered(size, order._replace(packed=False))
    return padded, {}


class _Indices:
    """For each entry of a result, which of some channels it is of: what is asked of this.

    Args:
        shape: Shape of the result.
        find: Returns the channels.
    """

    def __init__(self, shape: torch.Size, find: Callable[[], Tensor]) -> None:
        self.shape, self._find = shape, find
        self._known: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def ends(self, modulus: int = 0) -> list[tuple[Tensor, Tensor]]:
        """Return, for each axis, the least and the greatest channel at each of its positions, after a modulus."""
        if modulus not in self._known:
            self._known[modulus] = _ends(self._find() % modulus if modulus else self._find())
        return self._known[modulus]


class _Way:
    """How an operation moves entries; the same for all operations that are alike, of which nets have many.

    Args:
        call: One of them.
        tensor: What it moves.
    """

    def __init__(self, call: Call, tensor: Value) -> None:
        self.call, self.tensor = call, tensor
        self.bears: dict[Any, bool] = {}
        self._indices: dict[tuple[int, int], _Indices] = {}
        self._moved: list[Tensor] = []

    @classmethod
    def of(cls, call: Call, tensor: Value) -> _Way:
        """Return that of an operation; what depends on other tensors, too, has its own."""
        if set(call.tensors) != {tensor}:
            return cls(call, tensor)
        key = call.op.target, tensor.shape, repr(call.arguments(tensor, None))
        known: _Way = call.interpreter.ways.setdefault(key, cls(call, tensor))
        return known

    @property
    def entries(self) -> Tensor:
        """Numbers of the entries before."""
        return torch.arange(self.tensor.shape.numel(), device=self.tensor.device).view(self.tensor.shape)

    @property
    def moved(self) -> list[Tensor]:
        """Numbers of the entries afterwards."""
        if not self._moved:
            self._moved = self.call.again(self.tensor, self.entries)
        return self._moved

    def forget(self) -> None:
        """Keep what was found out, not the entries."""
        self._moved = []

    def indices(self, axis: int, number: int) -> _Indices:
        """Return which of the channels along an axis the entries of a result are of."""
        size, stride = self.tensor.shape[axis], self.tensor.shape[axis + 1 :].numel()
        if (axis, number) not in self._indices:
            shape = self.moved[number].shape
            self._indices[axis, number] = _Indices(shape, lambda: self.moved[number] // stride % size)
        return self._indices[axis, number]


def _follow(indices: _Indices, size: int, runs: Runs) -> tuple[int, Runs] | None:
    """Return the axis along which channels lie after they were moved, and how; None if it is not that simple.

    Args:
        indices: For each entry of the result, which of the channels it is of.
        size: Number of channels.
        runs: The channels.
    """
    ends, count = indices.ends(), len(runs)
    if count > 1 and len({run.size for run in runs}) == 1 and runs[0].size > 1:
        # Equal parts on top of each other, such as query, key and value, are cut together.
        part = runs[0].size
        place = _finest(indices.ends(part), part)
        if place is not None and _has_all_parts(*ends[place], size, part):
            along = scaled(runs[:1], indices.shape[place])
            for other in runs[1:]:
                unify(runs[:1], (other,), "parts of different make-up lie on top of each other")
            return None if along is None else (place, along)
    place = _finest(ends, size)
    if place is None and count == 1 and not runs[0].owner.is_rows:
        for number in (each for each in range(2, 17) if size % each == 0):
            inner = _finest(indices.ends(size // number), size // number)
            if inner is not None and _has_all_parts(*ends[inner], size, size // number):
                split_at(runs[0], [size // number] * number)
    if place is not None:
        along_axis = scaled(runs, indices.shape[place])
        return None if along_axis is None else (place, along_axis)
    return _repeated(ends, size, runs) or _part(ends, runs)


def _ends(indices: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return, for each axis, the least and the greatest index at each of its positions."""
    ends = []
    for axis, length in enumerate(indices.shape):
        rows = indices.movedim(axis, 0).reshape(length, -1) if indices.numel() else indices.new_zeros(length, 1)
        ends.append((rows.amin(1), rows.amax(1)))
    return ends


def _is_grown(low: Tensor, high: Tensor, size: int, times: int) -> bool:
    """Say whether indices below `size` grow in even blocks, so often one after the other."""
    length = low.shape[0]
    if length % times:
        return False
    t, each = torch.arange(length, device=low.device) % (length // times), length // times
    return torch.equal(low, t * size // each) and torch.equal(high, ((t + 1) * size - 1) // each)


def _has_all_parts(low: Tensor, high: Tensor, size: int, part: int) -> bool:
    """Say whether at each place along an axis the same channel of all equal parts is found."""
    each = max(1, low.shape[0] // part)
    if low.shape[0] % each:
        return False
    return bool((high.view(-1, each).amax(1) - low.view(-1, each).amin(1) >= size - part).all())


def _finest(ends: list[tuple[Tensor, Tensor]], size: int) -> int | None:
    """Return the axis, the finest if there are several, along which indices below `size` grow in even blocks."""
    found = None
    for axis, (low, high) in enumerate(ends):
        length = low.shape[0]
        if length > 1 and (found is None or length > ends[found][0].shape[0]) and _is_grown(low, high, size, 1):
            found = axis
    return found


def _repeated(ends: list[tuple[Tensor, Tensor]], size: int, runs: Runs) -> tuple[int, Runs] | None:
    """Find an axis along which all channels come several times."""
    for axis, (low, high) in enumerate(ends):
        starts = int((low == 0).logical_and(low.roll(1) != 0).sum()) if low.shape[0] > 1 else 0
        if starts > 1 and low[0] == 0 and _is_grown(low, high, size, starts):
            each = scaled(runs, low.shape[0] // starts)
            return None if each is None else (axis, each * starts)
    return None


def _part(ends: list[tuple[Tensor, Tensor]], runs: Runs) -> tuple[int, Runs] | None:
    """Find an axis along which some neighbouring channels lie, those of whole runs; or ask for runs to be split."""
    for axis, (low, high) in enumerate(ends):
        length = low.shape[0]
        steps = torch.arange(length, device=low.device) + low[:1]
        if not length or not torch.equal(low, high) or not torch.equal(low, steps):
            continue
        start, stop = int(low[0]), int(low[-1]) + 1
        borders = [0]
        for run in runs:
            borders.append(borders[-1] + run.size)
        if start in borders and stop in borders:
            return axis, runs[borders.index(start) : borders.index(stop)]
        for run, (first, last) in zip(runs, pairwise(borders), strict=True):
            inner = sorted({first, last, *(place for place in (start, stop) if first < place < last)})
            if len(inner) > 2 and not run.owner.reason:
                split_at(run, [b - a for a, b in pairwise(inner)])
        return None
    return None


def _after(x: Tensor, axes: Axes, cut: Cut) -> Tensor:
    """Return what is left of a tensor."""
    for axis, runs in axes.items():
        x = x.index_select(axis, kept(runs, cut).nonzero()[:, 0].to(x.device))
    return x


def _lost(axes: Axes, cut: Cut) -> list[tuple[int, list[tuple[int, int]]]]:
    """Say how many channels each run along the axes has, and how many are cut."""
    return [(axis, [(run.size, cut.of(run)) for run in runs]) for axis, runs in axes.items()]


class _Moves:
    """An operation that moves entries, and where the channels were found afterwards.

    Args:
        call: The operation.
        tensor: What it moves.
        axes: Channels along the axes of this.
        results: Channels along the axes of its results.
        way: How it moves it.
    """

    def __init__(self, call: Call, tensor: Value, axes: Axes, results: list[Axes], way: _Way) -> None:
        self.call, self.tensor, self.axes, self.results, self.way = call, tensor, axes, results, way
        self.sources = sorted(numbers_in((call.op.args, call.op.kwargs)), key=_order)

    def bear_an_even_cut(self, counted: Mapping[Source, Runs] | None = None) -> bool:
        """Tell whether the operation gives what is left of its result if all channels are cut alike, by little."""
        return self._bear(Cut(), counted)

    def bear_cuts(self) -> bool:
        """Tell the same of each space that is cut by itself and, if numbers are computed with, of cuts by much.

        Half of a size, say, may be right for parts that are cut alike, and for no others.
        """
        spaces = self._spaces()
        cuts = [Cut(), *(map(Cut, spaces) if len(spaces) > 1 else ()), *([Cut(deep=True)] if self.sources else [])]
        return all(map(self._bear, cuts))

    def tie_or_hold(self) -> None:
        """Let all channels along an axis be cut together, if only even cuts are borne; else leave them whole."""
        if self.bear_an_even_cut():
            for runs in self.axes.values():
                for run in runs[1:]:
                    if not (run.owner.reason or runs[0].owner.reason):
                        run.owner.unite(runs[0].owner)
        if not self.bear_cuts():
            self._hold()

    def _spaces(self) -> list[Space]:
        numbers = map(self.call.interpreter.counted, self.sources)
        lying = [*numbers, *(runs for each in (self.axes, *self.results) for runs in each.values())]
        return list(dict.fromkeys(run.owner.root for runs in lying for run in runs if not run.owner.reason))

    def _bear(self, cut: Cut, counted: Mapping[Source, Runs] | None = None) -> bool:
        lost = [_lost(each, cut) for each in (self.axes, *self.results)]
        asked = repr((self.call.arguments(self.tensor, None, cut, counted), lost))
        if asked not in self.way.bears:
            self.way.bears[asked] = self._bears(cut, counted)
        return self.way.bears[asked]

    def _bears(self, cut: Cut, counted: Mapping[Source, Runs] | None) -> bool:
        try:
            outs = self.call.again(self.tensor, _after(self.way.entries, self.axes, cut), cut, counted)
        except (IndexError, RuntimeError, ValueError, TypeError, ZeroDivisionError):
            return False
        expected = [_after(out, result, cut) for out, result in zip(self.way.moved, self.results, strict=True)]
        return len(outs) == len(expected) and all(map(torch.equal, outs, expected))

    def match_sizes(self) -> None:
        """Unite channels whose number is a size here with those that get this size."""
        given = [each for each in _numbers(self.call) if len(each.sources) == 1]
        for number in given:
            (source,) = number.sources
            runs = self.call.interpreter.counted(source)
            if not runs or extent(runs) != number or isinstance(source, Attribute) or self._own(runs):
                continue
            for each in (each for result in self.results for each in result.values() if extent(each) == extent(runs)):
                unify(each, runs, f"{self.call.where} makes the number of one that of the other")
                break

    def bear_with_others(self) -> bool:
        """Tell the same when numbers that are free count the channels; let them follow these, if it is so.

        These are attributes of modules, and numbers of channels of other tensors, which are then cut together.
        """
        interpreter = self.call.interpreter
        lying = [runs for each in (*self.results, self.axes) for runs in each.values()]
        lying += [(run,) for runs in self.axes.values() for run in runs if len(runs) > 1]
        lying = [runs for runs in lying if not all(run.owner.reason for run in runs)]
        free: list[Source] = []
        for each in self.sources:
            runs = interpreter.counted(each)
            if not runs if isinstance(each, Attribute) else runs and not self._own(runs):
                free.append(each)
        choices = [[None, *(runs for runs in lying if extent(runs) == _plain_number(each))] for each in free[:4]]
        tries = sorted(product(*choices), key=lambda runs: sum(each is not None for each in runs))
        for choice in [_in_turn(free, lying), *tries[1:65]]:
            counted = {each: runs for each, runs in zip(free, choice, strict=False) if runs is not None}
            if self.bear_an_even_cut(counted):
                for source, runs in counted.items():
                    if isinstance(source, Attribute):
                        interpreter.bind(source, runs)
                    else:
                        unify(interpreter.counted(source), runs, f"{self.call.where} makes both as many")
                return True
        return False

    def split(self) -> None:
        """Ask for channels to be followed in parts where a fixed number of them lie along an axis of their own."""
        for result in self.results:
            for axis, runs in result.items():
                for before in self.axes.values():
                    parts = self.call.op.outputs[0].shape[axis] if axis < len(self.call.out.shape) else 1
                    if (
                        len(before) == len(runs) == 1
                        and before[0].owner.root is runs[0].owner.root
                        and (1 < parts < before[0].size and not runs[0].owner.is_rows)
                    ):
                        split_at(before[0], [before[0].size // parts] * parts)

    def _hold(self) -> None:
        why = "has fixed sizes (write -1, or read the size from its own argument)"
        self.call.hold(self.axes, why)
        self.call.hold(map(self.call.interpreter.counted, self.sources), why)

    def _own(self, runs: Runs) -> bool:
        own = {run.owner.root for each in (self.axes, *self.results) for runs in each.values() for run in runs}
        return {run.owner.root for run in runs} <= own or all(run.owner.reason for run in runs)


def _in_turn(free: list[Source], lying: list[Runs]) -> list[Runs | None]:
    """Give each number the next of the channels that it may count, as the sizes of parts are written in their order."""
    left, found = list(lying), list[Runs | None]()
    for source in free:
        place = next((at for at, runs in enumerate(left) if extent(runs) == _plain_number(source)), None)
        found.append(None if place is None else left.pop(place))
    return found


def _plain_number(source: Source) -> int:
    return source.value.shape[source.axis] if isinstance(source, Size) else source.number


def _order(source: Source) -> tuple[str, str, int]:
    if isinstance(source, Attribute):
        return source.module, source.name, source.index or 0
    return "", "", source.axis


def _numbers(call: Call) -> list[Any]:
    return [each for each in within((call.op.args, call.op.kwargs)) if hasattr(each, "sources")]


def _as_wide_as_asked(call: Call) -> tuple[Axes, ...]:
    """Know the axes of what had no channels by the numbers that it is expanded to."""
    axes: Axes = {}
    if call.name == "expand":
        for number in _numbers(call):
            for source in number.sources:
                runs, places = call.interpreter.counted(source), call.out.shape
                at = [axis for axis, size in enumerate(places) if size == number == extent(runs)]
                if len(at) == 1:
                    axes[at[0]] = runs
    known = {id(runs) for runs in axes.values()}
    for source in numbers_in((call.op.args, call.op.kwargs)):
        runs = call.interpreter.counted(source)
        if runs and id(runs) not in known:
            call.hold([runs], "takes it as an argument")
    return (axes, *({} for _ in call.op.outputs[1:]))


@rule("reshape_as view_as")
def as_another(call: Call) -> Axes:
    """Follow each axis to where it lies in the shape of another tensor, and unite it with what lies there."""
    tensor, other = call.argument("self", 0), call.argument("other", 1)
    entries = torch.arange(tensor.shape.numel()).view(other.shape)
    lying, there = {}, call.axes(other)
    for axis, runs in call.axes(tensor).items():
        size, stride = tensor.shape[axis], tensor.shape[axis + 1 :].numel()
        channels = entries // stride % size
        found = _follow(_Indices(other.shape, channels.clone), size, runs)
        if found is None:
            call.hold([runs], "takes channels apart, or out of order")
        else:
            lying[found[0]] = found[1]
    for axis in lying.keys() | there.keys():
        if axis in lying and axis in there:
            unify(lying[axis], there[axis], f"{call.where} combines channels of different make-up")
        else:
            call.hold([(lying | there)[axis]], "has a fixed size")
    return lying


@rule("unfold", nn.Unfold, follows_sizes=True, runs_again=True)
def unfold(call: Call) -> Axes | tuple[Axes, ...]:
    """Lay the pixels around a place after each channel; the method of that name is a move as others are."""
    if len(call.tensors[0].shape) != 4 or (len(call.op.args) + len(call.op.kwargs) == 4 and call.op.name != "Unfold"):
        return structural(call)
    axes = call.mixed([-1, -2], "takes positions")
    if 1 in axes:
        along = scaled(axes[1], call.out.shape[1])
        axes |= {1: along} if along else {}
    return axes


@rule("setitem", follows_sizes=True)
def put(call: Call) -> tuple[Axes, ...]:
    """Unite what is put into a part of a tensor with what lies along the axes of that part."""
    tensor, index, value = call.op.args
    if not isinstance(value, Value):
        return ()  # a number
    if set(call.tensors) - {tensor, value}:
        call.fail()
    entries = torch.arange(tensor.shape.numel(), device=tensor.device).view(tensor.shape)
    part, lying = entries[call.interpreter.plain(index)], {}
    for axis, runs in call.axes(tensor).items():
        channels = part // entries.stride(axis) % tensor.shape[axis]
        found = _follow(_Indices(part.shape, partial(torch.clone, channels)), tensor.shape[axis], runs)
        if found is not None:
            lying[found[0]] = found[1]
        elif not are_rows(runs):
            call.fail()
    offset = part.dim() - len(value.shape)
    for axis, runs in call.axes(value).items():
        with_it = lying.get(axis + offset)
        if with_it is None or value.shape[axis] == 1:
            call.hold([runs], "puts it where nothing can be cut")
        elif not are_rows(runs):
            unify(with_it, runs, f"{call.where} combines channels of different make-up")
    for axis, runs in lying.items():
        if axis - offset not in call.axes(value):
            call.hold([runs], "puts there what cannot be cut")
    return ()
