"""What lies along the channel axis of a tensor: runs of units, each of one width or left whole."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_vnd.nn.width import Width

__all__ = ["Axis", "Run", "take", "take_block"]


class Run(NamedTuple):
    """Consecutive channels that belong to one width, each unit `size // num_units` of them; or to none.

    Attributes:
        width: The width whose units they are, or None if they cannot be cut.
        size: Number of channels.
    """

    width: Width | None
    size: int


class Axis:
    """The channels of a tensor, in order.

    Args:
        size: Number of channels.
        runs: A width whose units share them evenly, runs in order, or None if all are left whole.

    Raises:
        ValueError: If the runs do not add up to the channels, or units do not share them evenly.
    """

    def __init__(self, size: int, runs: Width | tuple[Run, ...] | None = None) -> None:
        self.size = size
        self.runs = runs if isinstance(runs, tuple) else (Run(runs, size),)
        for width, length in self.runs:
            if width is not None and length % width.num_units:
                raise ValueError(f"width {width.name!r} of {width.num_units} units cannot share {length} channels")
        if sum(length for _, length in self.runs) != size:
            raise ValueError(f"the layer has {size} channels, but runs of {[length for _, length in self.runs]}")

    @property
    def widths(self) -> list[Width]:
        """The widths along the axis."""
        return [run.width for run in self.runs if run.width is not None]

    @property
    def is_whole(self) -> bool:
        """Whether nothing along the axis can be cut."""
        return not self.widths

    @property
    def is_sliced(self) -> bool:
        """Whether this forward pass computes only part of the channels."""
        return any(width.kept is not None for width in self.widths)

    def mask(self) -> Tensor | None:
        """Return the mask of the channels computed in this forward pass, or None if all of them are kept."""
        return self._join("mask")

    def keep_probs(self) -> Tensor | None:
        """Return the keep probabilities of the channels that are computed, or None if all count in full."""
        return self._join("keep_probs")

    def owned_by(self, width: Width) -> Tensor:
        """Return which of the channels that are computed belong to a width, boolean."""
        pieces = [torch.full((run.size,), run.width is width) for run in self.runs]
        return take(torch.cat(pieces), self.index(), 0)

    def _join(self, what: str) -> Tensor | None:
        parts: list[tuple[Tensor | None, Run]] = [
            (None if run.width is None else getattr(run.width, what), run) for run in self.runs
        ]
        known = [values for values, _ in parts if values is not None]
        if not known:
            return None
        # One width may be fixed for the batch where another one has a row for each example.
        rows, joined = torch.broadcast_shapes(*(values.shape[:-1] for values in known)), []
        for values, (width, length) in parts:
            if values is None:
                values = known[0].new_ones(length)
            elif width is not None and length != width.num_units:
                values = values.unsqueeze(-1).expand(*values.shape, length // width.num_units).flatten(-2)
            joined.append(values.expand(*rows, length))
        return take(joined[0] if len(joined) == 1 else torch.cat(joined, -1), self.index(), -1)

    def index(self, kept: dict[str, int] | None = None) -> slice | Tensor | None:
        """Return which channels are computed: a slice, indices, or None for all.

        Args:
            kept: Number of kept units by name of width; that of this forward pass by default.
        """
        if kept is None:
            kept = {width.name: width.kept for width in self.widths if width.kept is not None}
        lengths = [
            length if width is None or width.name not in kept else kept[width.name] * (length // width.num_units)
            for width, length in self.runs
        ]
        if lengths == [length for _, length in self.runs]:
            return None
        if len(self.runs) == 1:
            return slice(0, lengths[0])
        pieces, start = [], 0
        for length, (_, whole) in zip(lengths, self.runs, strict=True):
            pieces.append(torch.arange(start, start + length))
            start += whole
        return torch.cat(pieces)


def take(x: Tensor, index: slice | Tensor | None, dim: int) -> Tensor:
    """Return the given channels of a tensor along one dimension."""
    return take_block(x, {dim: index})


def take_block(x: Tensor, indices: dict[int, slice | Tensor | None]) -> Tensor:
    """Return the given channels of a tensor along several dimensions."""
    lengths = {dim: index.stop for dim, index in indices.items() if isinstance(index, slice)}
    if lengths:
        x = _Leading.apply(x, lengths)
    for dim, index in indices.items():
        if isinstance(index, Tensor):
            x = x.index_select(dim, index.to(x.device))
    return x


class _Leading(torch.autograd.Function):
    """The leading block of an array: slicing, with one array in the backward pass rather than one a slice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, lengths: dict[int, int]) -> Tensor:
        ctx.shape, ctx.lengths = x.shape, lengths
        return _leading(x, lengths)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        whole = part = grad.new_empty(ctx.shape)
        for dim, length in ctx.lengths.items():
            part.narrow(dim, length, part.shape[dim] - length).zero_()
            part = part.narrow(dim, 0, length)
        part.copy_(grad)
        return whole, None


def _leading(x: Tensor, lengths: dict[int, int]) -> Tensor:
    for dim, length in lengths.items():
        x = x.narrow(dim, 0, length)
    return x
