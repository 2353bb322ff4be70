"""What lies along the channel axis of a tensor: runs of units, each of one width or left whole."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from pyro_vnd.distributions._fast.arrays import leading_block
from pyro_vnd.distributions._fast.broadcast import broadcast_shapes
from pyro_vnd.nn.width import Width

__all__ = ["Axis", "Channels", "Index", "Rows", "Run", "joint_keep_probs", "kept_channels", "take"]

Owner = TypeVar("Owner")
Index = slice | Tensor | None  # channels along a dimension: leading ones, some, or all


class Run(NamedTuple, Generic[Owner]):
    """Consecutive channels that are cut together, the units of their owner spread evenly over them.

    Attributes:
        owner: Whose units they are: a `Width` in an `Axis`, the name of a group before that; None if they stay whole.
        size: Number of channels.
    """

    owner: Owner
    size: int


class Rows(NamedTuple):
    """Where the examples of a batch lie in a tensor: along an axis, each of them several times in a row, and all so.

    Attributes:
        axis: The axis.
        repeats: How often all of them come, one after the other, as time steps before examples do that are flattened.
        each: How often each comes in a row, as tokens after examples do. One of the two numbers, which is 1 or else
            this one, follows from the length of the axis.
    """

    axis: int = 0
    repeats: int = 1
    each: int = 1

    def spread(self, mask: Tensor, x: Tensor, channel_dim: int) -> Tensor:
        """Give a mask with a row for each example the shape in which it can be multiplied with a tensor.

        Args:
            mask: Shape (N, channels).
            x: The tensor.
            channel_dim: Where its channels are.

        Raises:
            ValueError: If the tensor has no such rows.
        """
        length = x.shape[self.axis]
        repeats = length // len(mask) if self.each == 1 and self.repeats > 1 else self.repeats
        each = length // (repeats * len(mask)) if repeats else 0
        if repeats * each * len(mask) != length:
            raise ValueError(
                f"a layer reads {length} rows where there are masks for {len(mask)} examples: nest with an example "
                'that has the same layout, or with mask_per="batch"'
            )
        mask = mask if each == 1 else mask.repeat_interleave(each, 0)
        mask = mask if repeats == 1 else mask.repeat(repeats, 1)
        shape = [1] * x.dim()
        shape[self.axis], shape[channel_dim] = mask.shape
        return (mask if self.axis < channel_dim % x.dim() else mask.T).reshape(shape)


Channels = Width | tuple[Run[Width | None], ...] | None


class Axis:
    """The channels of a tensor, in order.

    Args:
        size: Number of channels.
        runs: A width whose units share them evenly, runs in order, or None if all are left whole.

    Attributes:
        widths: The widths along the axis.

    Raises:
        ValueError: If the runs do not add up to the channels, or units do not share them evenly.
    """

    def __init__(self, size: int, runs: Channels = None) -> None:
        self.size = size
        self.runs: tuple[Run[Width | None], ...] = runs if isinstance(runs, tuple) else (Run(runs, size),)
        for width, length in self.runs:
            if width is not None and length % width.num_units:
                raise ValueError(f"width {width.name!r} of {width.num_units} units cannot share {length} channels")
        if sum(length for _, length in self.runs) != size:
            raise ValueError(f"the layer has {size} channels, but runs of {[length for _, length in self.runs]}")
        self.widths = [run.owner for run in self.runs if run.owner is not None]

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
        owned = [torch.full((run.size,), run.owner is width) for run in self.runs]
        return take(torch.cat(owned), {0: self.index()})

    def _join(self, what: str) -> Tensor | None:
        values_of = [None if run.owner is None else getattr(run.owner, what) for run in self.runs]
        known = [values for values in values_of if values is not None]
        if not known:
            return None
        # One width may be fixed for the batch where another one has a row for each example.
        rows, joined = broadcast_shapes(*(values.shape[:-1] for values in known)), []
        for values, (width, length) in zip(values_of, self.runs, strict=True):
            if values is None:
                values = known[0].new_ones(length)
            elif width is not None and length != width.num_units:
                values = values.unsqueeze(-1).expand(*values.shape, length // width.num_units).flatten(-2)
            joined.append(values.expand(*rows, length))
        return take(joined[0] if len(joined) == 1 else torch.cat(joined, -1), {-1: self.index()})

    def index(self, kept: Mapping[str, int] | None = None) -> Index:
        """Return which channels are computed: a slice, indices, or None for all.

        Args:
            kept: Number of kept units by name of width; that of this forward pass by default.
        """
        if kept is None:
            if not self.is_sliced:
                return None
            kept = {width.name: width.kept for width in self.widths if width.kept is not None}
        lengths = [
            length if width is None or width.name not in kept else kept[width.name] * (length // width.num_units)
            for width, length in self.runs
        ]
        if lengths == [length for _, length in self.runs]:
            return None
        if len(self.runs) == 1:
            return slice(0, lengths[0])
        indices, start = [], 0
        for length, (_, whole) in zip(lengths, self.runs, strict=True):
            indices.append(torch.arange(start, start + length))
            start += whole
        return torch.cat(indices)


def joint_keep_probs(axes: Mapping[int, Axis], num_dims: int) -> Tensor | None:
    r"""Return the probability that an entry of an array is kept, broadcastable to the array; None if all count in full.

    $$P = \prod_w \min_d P(z_w \text{ keeps the entry's unit along axis } d).$$

    Units of one width are kept together, $P(z_i = z_j = 1) = S_{\max(i,j)}$; those of several widths independently.

    Args:
        axes: The channels along axes of the array.
        num_dims: Number of its axes.
    """
    gate: Tensor | None = None
    for width in dict.fromkeys(width for axis in axes.values() for width in axis.widths):
        joint: Tensor | None = None
        for dim, axis in axes.items():
            probs = axis.keep_probs()
            if probs is None or width not in axis.widths:
                continue
            if len(axis.runs) > 1:
                probs = torch.where(axis.owned_by(width).to(probs.device), probs, 1.0)
            own = probs.reshape(-1, *[1] * (num_dims - 1 - dim))
            joint = own if joint is None else torch.minimum(joint, own)
        gate = joint if gate is None or joint is None else gate * joint
    return gate


def kept_channels(index: Index, size: int) -> int:
    """Return how many of `size` channels an index keeps."""
    if index is None:
        return size
    return index.stop if isinstance(index, slice) else len(index)


def take(x: Tensor, indices: Mapping[int, Index]) -> Tensor:
    """Return the given channels of a tensor along several dimensions."""
    lengths = {dim: index.stop for dim, index in indices.items() if isinstance(index, slice)}
    if lengths:
        x = leading_block(x, lengths)
    for dim, index in indices.items():
        if isinstance(index, Tensor):
            x = x.index_select(dim, index.to(x.device))
    return x
