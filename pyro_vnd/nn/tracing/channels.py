"""The algebra of channels: spaces of atoms that are united and coarsened while a net is followed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from pyro_vnd.nn.axis import Run

__all__ = ["Axes", "Mark", "Runs", "SizeOf", "Space", "hold", "kept", "leaves", "scaled", "unify", "whole"]


class Space:
    """The channels of one layer as atoms, the smallest pieces that can be cut; united spaces are cut together.

    Runs of a space have sizes of their own, and its atoms are spread evenly over each. So a space that is coarsened
    later, to fewer atoms, leaves every run valid.

    Args:
        order: The space that came first gives its name to those united with it.
        name: Module that makes the channels.
        atoms: Number of atoms.
        reason: Why the channels cannot be cut, or "" if they can.
    """

    def __init__(self, order: float, name: str, atoms: int, reason: str = "") -> None:
        self._order, self._name, self._atoms, self._reason = order, name, atoms, reason
        self._parent: Space | None = None

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

    def unite(self, other: Space) -> None:
        """Let two spaces be cut together."""
        first, second = sorted((self.root, other.root), key=lambda space: space._order)
        if first is not second:
            first._reason = first._reason or second._reason
            first._atoms = math.gcd(first._atoms, second._atoms)
            second._parent = first

    def coarsen(self, num_units: int) -> None:
        """Keep only those cuts that are also cuts of `num_units` even pieces."""
        self.root._atoms = math.gcd(self.atoms, num_units)

    def hold(self, reason: str) -> None:
        """Leave the space whole."""
        self.root._reason = self.root._reason or reason


Runs: TypeAlias = tuple[Run[Space], ...]
Axes: TypeAlias = dict[int, Runs]  # runs along those axes of a tensor that may be cut


@dataclass(frozen=True)
class SizeOf:
    """A number computed from the number of channels in `runs`; `narrowed()` computes it with one atom cut."""

    runs: Runs
    narrowed: Callable[[], Any]


# What is known of a value: runs by axis of a tensor, a number of channels, the same for each item, or nothing to cut.
Mark: TypeAlias = "Axes | SizeOf | tuple[Mark, ...] | None"


def whole(size: int, reason: str) -> Runs:
    """Return channels that cannot be cut."""
    return (Run(Space(math.inf, "", 1, reason), size),)


def leaves(mark: Mark) -> Iterator[Axes | SizeOf]:
    """Yield what a mark consists of."""
    if isinstance(mark, tuple):
        for item in mark:
            yield from leaves(item)
    elif mark:
        yield mark


def hold(mark: Mark, reason: str) -> None:
    """Leave whole all that is marked."""
    for leaf in leaves(mark):
        for runs in [leaf.runs] if isinstance(leaf, SizeOf) else leaf.values():
            for run in runs:
                run.owner.hold(reason)


def unify(first: Runs, second: Runs, reason: str) -> None:
    """Unite runs that lie on top of each other, or leave all whole for `reason` if their sizes differ."""
    if [run.size for run in first] == [run.size for run in second]:
        for one, other in zip(first, second, strict=True):
            one.owner.unite(other.owner)
    else:
        for run in first + second:
            run.owner.hold(reason)


def scaled(runs: Runs, size: int) -> Runs | None:
    """Spread the same atoms over `size` channels, coarsened if they are too many; None if runs would meet in one."""
    before = sum(run.size for run in runs)
    if any(run.size * size % before for run in runs):
        return None
    result = tuple(Run(run.owner, run.size * size // before) for run in runs)
    for run in result:
        run.owner.coarsen(run.size)
    return result


def kept(runs: Runs) -> Tensor:
    """Return which channels remain when each space that can be cut loses its last atom."""
    masks = []
    for space, size in runs:
        masks.append(torch.arange(size) < (size if space.reason else size - size // space.atoms))
    return torch.cat(masks)
