"""Which latents of a model have a law for each length, and where their values have their rows."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import pyro.distributions as dist
import torch
from pyro.distributions.util import sum_rightmost
from torch import Tensor
from torch.distributions import biject_to, constraints

from pyro_vnd.distributions import OrderedMask
from pyro_vnd.distributions.nested import NestedLaw, find_mask, innermost

__all__ = ["Block", "Latent", "Lengths", "Plan", "plan"]

MAX_COMBINATIONS = 256  # of lengths, each of which has a law of the other latents and is evaluated in each step
MAX_CHOLESKY = 2**20  # entries in all Cholesky factors of a block
MAX_TABLE = 2**17  # entries in all locations of a block
MAX_OBSERVED = 2**24  # observed numbers in one evaluation of all lengths


@dataclass
class Latent:
    """One latent that is no mask, and where its unconstrained value is among the coordinates of its block.

    Coordinates of one row are all entries of the event and of the plates that are no plates of rows.
    """

    name: str
    fn: Any
    frames: Sequence[Any]
    rows: frozenset[str]
    start: int = 0

    def __post_init__(self) -> None:
        self.nested = isinstance(find_mask(self.fn), NestedLaw)
        self.transform = biject_to(constraints.real_vector if self.nested else self.fn.support)
        self.batch: tuple[int, ...] = (*self.fn.batch_shape,)
        event = self.transform.inverse_shape(self.fn.batch_shape + self.fn.event_shape)[len(self.batch) :]
        self.event = event
        mine = {len(self.batch) + frame.dim for frame in self.frames if frame.name in self.rows}
        self.inner = [i for i in range(len(self.batch)) if i not in mine]
        self.size = math.prod([self.batch[i] for i in self.inner]) * math.prod(self.event)

    @property
    def stop(self) -> int:
        """Where its coordinates end."""
        return self.start + self.size

    def constrain(self, unconstrained: Tensor) -> tuple[Tensor, Tensor]:
        """Return the value, and the log-density that the transform adds to it, shape (..., *batch)."""
        value = self.transform(unconstrained)
        log_det = self.transform.log_abs_det_jacobian(unconstrained, value)
        return value, -sum_rightmost(log_det, log_det.dim() - value.dim() + self.fn.event_dim)

    def place(self, x: Tensor) -> Tensor:
        """Turn coordinates, shape (..., *rows, size), into a value, shape (..., *batch, *event).

        The last dimensions of the first part are those of the batch, with one where a plate is among the coordinates.
        """
        depth = len(self.batch)
        outer = [1] * (depth - x.dim() + 1) + list(x.shape[:-1])
        lead = len(outer) - depth
        inner = [self.batch[i] for i in self.inner]
        x = x.reshape([*outer, *inner, *self.event])
        order = list(range(lead))
        sizes = outer.copy()
        for i in range(depth):
            order.append(lead + i)
            if i in self.inner:
                order.append(len(outer) + self.inner.index(i))
                sizes[lead + i] = self.batch[i]
        order += range(len(outer) + len(inner), x.dim())
        return x.permute(order).reshape([*sizes, *self.event])

    def collect(self, x: Tensor) -> Tensor:
        """Turn a value, shape (..., *batch, *event), into coordinates, shape (..., *rows or 1, size)."""
        lead, depth = x.dim() - len(self.batch) - len(self.event), len(self.batch)
        outer = list(x.shape[: lead + depth])
        for i in self.inner:
            outer[lead + i] = 1
        inner = [lead + i for i in self.inner]
        rest = [i for i in range(lead + depth) if i not in inner]
        return x.permute([*rest, *inner, *range(lead + depth, x.dim())]).reshape(*outer, self.size)

    def weigh(self, weight: Tensor) -> Tensor:
        """Turn a weight of each element, shape (..., *batch), into one of each coordinate, as `collect` has them."""
        ones = (1,) * len(self.event)
        return self.collect(weight.reshape([*weight.shape, *ones]).expand([*weight.shape, *self.event]))


@dataclass
class Lengths:
    """One random length: of an `OrderedMask`, or of a `NestedNormal` and its kin."""

    name: str
    num_units: int
    prior: Any
    frames: Sequence[Any]
    nested: bool


@dataclass
class Block:
    """Latents whose rows are in the same plates and have one joint Normal law, given the lengths."""

    rows: tuple[Any, ...]
    latents: list[Latent] = field(default_factory=list)
    by_row_length: bool = False

    @property
    def size(self) -> int:
        """Coordinates of a row."""
        return sum(latent.size for latent in self.latents)

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the plates of rows where they are in a batch, and one elsewhere."""
        depth = max((-frame.dim for frame in self.rows), default=0)
        sizes = [1] * depth
        for frame in self.rows:
            sizes[frame.dim] = frame.size
        return tuple(sizes)


@dataclass
class Plan:
    """What a conditional guide of a model consists of.

    Attributes:
        shared: Lengths outside all plates.
        by_row: Lengths in the plates of rows.
        blocks: The other latents.
        separate: Whether the lengths outside plates have laws of their own, and tables that are added, as their
            combinations are too many. There is then an evaluation for each length of each, the others drawn.
    """

    shared: list[Lengths]
    by_row: list[Lengths]
    blocks: list[Block]
    separate: bool = False

    @property
    def lengths(self) -> list[Lengths]:
        """All of them."""
        return self.shared + self.by_row

    @property
    def groups(self) -> list[list[Lengths]]:
        """Those outside plates by their laws: one for all, or one for each."""
        return [[each] for each in self.shared] if self.separate else [self.shared]

    @cached_property
    def like(self) -> Tensor:
        """A tensor with the dtype and device of the laws."""
        return cast(Tensor, self.lengths[0].prior.length_probs.detach())

    @property
    def num_shared(self) -> int:
        """Combinations of the lengths outside plates, or, if they are separate, all their lengths."""
        return sum(math.prod(each.num_units for each in group) for group in self.groups)

    @property
    def num_by_row(self) -> int:
        """Combinations of the lengths of one row."""
        return math.prod(each.num_units for each in self.by_row)

    @cached_property
    def grid(self) -> Tensor:
        """All combinations of lengths, from 0, the last one changing first, shape (combinations, lengths)."""
        grids = torch.meshgrid(*(torch.arange(each.num_units) for each in self.lengths), indexing="ij")
        return torch.stack([grid.reshape(-1) for grid in grids], -1).to(self.like.device)

    def masks(self, grid: Tensor) -> dict[str, Tensor]:
        """Return the mask of each length in some combinations, shape (combinations, num_units)."""
        found = {}
        for i, each in enumerate(self.lengths):
            units = torch.arange(each.num_units, device=grid.device)
            found[each.name] = (units <= grid[:, i : i + 1]).to(self.like)
        return found

    @property
    def row_frames(self) -> tuple[Any, ...]:
        """Plates of the lengths by row."""
        return tuple(self.by_row[0].frames) if self.by_row else ()


def plan(trace: Any, latents: Mapping[str, Any], num_draws: int) -> Plan | str:
    """Say what a conditional guide consists of, or why there is none.

    Args:
        trace: A trace of the model with its observed sites.
        latents: The latent sites for the guide, by name.
        num_draws: Draws in an evaluation.
    """
    observed = [trace.nodes[name] for name in trace.observation_nodes]
    row_plates = {frame.name for site in observed for frame in site["cond_indep_stack"]}
    for name, site in latents.items():
        for frame in site["cond_indep_stack"]:
            if frame.full_size not in (None, frame.size):
                return f"plate {frame.name!r} of site {name!r} subsamples"
    shared: list[Lengths] = []
    by_row: list[Lengths] = []
    others: list[tuple[str, Any]] = []
    for name, site in latents.items():
        law, frames = find_mask(site["fn"]), site["cond_indep_stack"]
        if law is not None:
            if site["fn"].event_dim != 1:
                return f"site {name!r} has several masks, of shape {tuple(site['fn'].batch_shape + law.batch_shape)}"
            if {frame.name for frame in frames} - row_plates:
                return f"site {name!r} has several masks, in a plate without data"
            if not frames and math.prod(site["fn"].batch_shape) > 1:
                return f"site {name!r} has several masks outside plates"
            each = Lengths(name, law.num_units, law, frames, isinstance(law, NestedLaw))
            (by_row if frames else shared).append(each)
        if not isinstance(law, OrderedMask):
            if not isinstance(innermost(site["fn"]), NestedLaw) and not _is_continuous(site["fn"]):
                return f"site {name!r} is discrete, or has no coordinates on the real line"
            others.append((name, site))
    if not shared and not by_row:
        return "there is no mask"
    if len({frozenset(frame.name for frame in each.frames) for each in by_row}) > 1:
        return "masks are in several plates"
    # Latents of one block may be correlated: rows are apart only where a length is theirs, or latents are too many.
    size = sum(math.prod(site["fn"].batch_shape + site["fn"].event_shape) for _, site in others)
    if not by_row and math.prod(each.num_units for each in shared) * size**2 <= MAX_CHOLESKY:
        row_plates = set()
    blocks: dict[tuple[str, ...], Block] = {}
    in_rows = {frame.name for each in by_row for frame in each.frames}
    for name, site in others:
        rows = tuple(frame for frame in site["cond_indep_stack"] if frame.name in row_plates)
        names = tuple(sorted(frame.name for frame in rows))
        block = blocks.setdefault(names, Block(rows, by_row_length=bool(in_rows) and in_rows <= set(names)))
        block.latents.append(Latent(name, site["fn"], site["cond_indep_stack"], frozenset(names), start=block.size))
    result = Plan(shared, by_row, list(blocks.values()))
    number = result.num_shared * result.num_by_row
    if number > MAX_COMBINATIONS and not by_row and sum(each.num_units for each in shared) <= MAX_COMBINATIONS:
        result.separate = True
        number = result.num_shared
    if number > MAX_COMBINATIONS:
        return f"{number:.3g} combinations of lengths are more than {MAX_COMBINATIONS}"
    numbers = number * num_draws * sum(torch.as_tensor(site["value"]).numel() for site in observed)
    if numbers > MAX_OBSERVED:
        return f"{numbers:.2g} observed numbers in a step, over all lengths, are more than {MAX_OBSERVED:.2g}"
    return result


def _is_continuous(fn: Any) -> bool:
    try:
        biject_to(fn.support)
    except NotImplementedError:
        return False
    return not fn.support.is_discrete and not isinstance(innermost(fn), dist.Delta)
