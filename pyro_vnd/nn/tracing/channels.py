"""The algebra of channels: spaces of atoms that are united, split and coarsened while a net is followed."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from pyro_vnd.nn.axis import Run

__all__ = [
    "Axes",
    "Cut",
    "Order",
    "Runs",
    "Space",
    "Split",
    "are_rows",
    "extent",
    "hold",
    "kept",
    "order_of",
    "reordered",
    "rows",
    "scaled",
    "split_at",
    "unify",
    "whole",
]

ROWS = "they are the examples"
REORDERED = "they are the examples in another order"


class Order(NamedTuple):
    """How examples lie along an axis, otherwise than one after the other as they came.

    Attributes:
        by: What they were indexed with; None if their order is the same.
        packed: Whether they lie as in `torch.nn.utils.rnn.PackedSequence`: step by step, those that are long enough.
    """

    by: Hashable
    packed: bool = False


class Space:
    """The channels of one layer as atoms, the smallest pieces that can be cut; united spaces are cut together.

    Runs of a space have sizes of their own, and its atoms are spread evenly over each. So a space that is coarsened
    later, to fewer atoms, leaves every run valid.

    Args:
        order: The space that came first gives its name to those united with it.
        name: Module or parameter that makes the channels.
        atoms: Number of atoms.
        reason: Why the channels cannot be cut, or "" if they can.
        origin: What the channels are an axis of, or a part of one, if they could be split into parts.
        examples: How the examples lie, if these are no channels but examples in another order.
    """

    def __init__(
        self,
        order: float,
        name: str,
        atoms: int,
        reason: str = "",
        origin: tuple[Hashable, int] | None = None,
        examples: Order | None = None,
    ) -> None:
        self._order, self._name, self._atoms, self._reason = order, name, atoms, reason
        self._parent: Space | None = None
        self._origins = [] if origin is None else [(*origin, atoms)]
        self._made = False
        self.examples = examples

    @property
    def root(self) -> Space:
        """The first of the spaces united with this one; it knows about all of them."""
        space = self
        while space._parent is not None:
            space = space._parent
        return space

    @property
    def name(self) -> str:
        """Module that made the first of the united spaces."""
        return self.root._name

    @property
    def atoms(self) -> int:
        """Number of pieces that can be cut, of all united spaces."""
        return self.root._atoms

    @property
    def reason(self) -> str:
        """Why nothing can be cut, or "" if something can."""
        return self.root._reason or ("" if self.atoms > 1 else "no cut fits all the layers that share it")

    @property
    def made(self) -> bool:
        """Whether a layer makes such channels, rather than parameters having them."""
        return self.root._made

    @property
    def is_rows(self) -> bool:
        """Whether these are no channels but the examples of a batch."""
        return self.root._reason == ROWS

    @property
    def is_examples(self) -> bool:
        """Whether these are the examples, in whatever order."""
        return self.is_rows or self.examples is not None

    @property
    def origins(self) -> list[tuple[Hashable, int, int]]:
        """Of all united spaces, the axes that they are parts of: key, number of the part and size."""
        return self.root._origins

    def unite(self, other: Space) -> None:
        """Let two spaces be cut together."""
        first, second = sorted((self.root, other.root), key=lambda space: space._order)
        if first is not second:
            first._reason = first._reason or second._reason
            first._atoms = math.gcd(first._atoms, second._atoms)
            first._made |= second._made
            first._origins += second._origins
            second._parent = first

    def coarsen(self, num_units: int) -> None:
        """Keep only those cuts that are also cuts of `num_units` even pieces."""
        self.root._atoms = math.gcd(self.atoms, num_units)

    def hold(self, reason: str) -> None:
        """Leave the space whole."""
        self.root._reason = self.root._reason or reason

    def make(self) -> None:
        """Note that a layer makes such channels."""
        self.root._made = True


Runs: TypeAlias = tuple[Run[Space], ...]
Axes: TypeAlias = dict[int, Runs]  # runs along those axes of a tensor that are known


class Split(Exception):
    """Asks for axes of parameters to be followed in parts, which turned out to be different things.

    Args:
        parts: Sizes of the parts, by key of the axis and number of the part that is split further.
    """

    def __init__(self, parts: dict[tuple[Hashable, int], tuple[int, ...]]) -> None:
        super().__init__()
        self.parts = parts


def rows(size: int) -> Runs:
    """Return the examples of a batch."""
    return (Run(Space(-1, "", 1, ROWS), size),)


def reordered(size: int, order: Order) -> Runs:
    """Return the examples of a batch in another order."""
    return (Run(Space(-1, "", 1, REORDERED, examples=order), size),)


def order_of(runs: Runs) -> Order | None:
    """Return how examples lie along an axis; None if these are no examples, or each comes several times."""
    if len(runs) != 1:
        return None
    return Order(None) if runs[0].owner.is_rows else runs[0].owner.examples


def whole(size: int, reason: str) -> Runs:
    """Return channels that cannot be cut."""
    return (Run(Space(math.inf, "", 1, reason), size),)


def extent(runs: Runs) -> int:
    """Return the length of an axis."""
    return sum(run.size for run in runs)


def are_rows(runs: Runs) -> bool:
    """Say whether examples lie along an axis, rather than channels."""
    return all(run.owner.is_rows for run in runs)


def hold(axes: Axes | Iterable[Runs], reason: str) -> None:
    """Leave whole all that lies along axes."""
    for runs in axes.values() if isinstance(axes, dict) else axes:
        for run in runs:
            run.owner.hold(reason)


def unify(first: Runs, second: Runs, reason: str) -> None:
    """Unite runs that lie on top of each other, or leave all whole for `reason` if their sizes cannot be matched."""
    others = [runs for runs in (first, second) if not all(run.owner.is_examples for run in runs)]
    if len(others) < 2:
        hold(others, reason)
        return
    one, other = ([run.size for run in runs] for runs in (first, second))
    if one == other:
        for run, with_it in zip(first, second, strict=True):
            run.owner.unite(with_it.owner)
        return
    if sum(one) == sum(other) and not any(run.owner.reason for run in first + second):
        for fewer, more in ((first, other), (second, one)):
            if len(fewer) == 1 and len(more) > 1:
                split_at(fewer[0], tuple(more))
    hold([first, second], reason)


def split_at(run: Run[Space], sizes: Sequence[int]) -> None:
    """Ask for a run to be followed in parts, if it consists of axes that can be split so; else return.

    What is whole already stays so: it may have met what nobody knows yet, which then would decide on its parts.
    """
    if run.owner.reason:
        return
    parts: dict[tuple[Hashable, int], tuple[int, ...]] = {}
    for key, number, size in run.owner.origins:
        if any(part * size % run.size for part in sizes):
            return
        parts[key, number] = tuple(part * size // run.size for part in sizes)
    if parts:
        raise Split(parts)


def scaled(runs: Runs, size: int) -> Runs | None:
    """Spread the same atoms over `size` channels, coarsened if they are too many; None if runs would meet in one."""
    before = extent(runs)
    if any(run.size * size % before for run in runs):
        return None
    result = tuple(Run(run.owner, run.size * size // before) for run in runs)
    for run in result:
        run.owner.coarsen(run.size)
    return result


class Cut(NamedTuple):
    """What spaces that can be cut lose.

    Attributes:
        only: The one that loses something; by default all do.
        deep: Whether it loses all its atoms but one, rather than the last.
    """

    only: Space | None = None
    deep: bool = False

    def of(self, run: Run[Space]) -> int:
        """Return how many channels of a run are cut."""
        space, size = run
        if space.reason or (self.only is not None and space.root is not self.only.root):
            return 0
        return size // space.atoms * (space.atoms - 1 if self.deep else 1)


def kept(runs: Runs, cut: Cut) -> Tensor:
    """Return which channels remain after a cut."""
    return torch.cat([torch.arange(run.size) < run.size - cut.of(run) for run in runs])
