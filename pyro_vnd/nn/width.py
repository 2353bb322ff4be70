"""A learnable width: the ordered mask that all layers of a channel group share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

from pyro_vnd._sizes import is_integer, is_one_of
from pyro_vnd.distributions import OrderedMask, OrderedMaskStraightThrough
from pyro_vnd.distributions.modes import most_probable, say_modes
from pyro_vnd.distributions.straight_through import Noise

__all__ = ["Rounding", "Width", "check_int", "kept_blocks", "nearest"]

Rounding = Literal["nearest", "down", "up"]
Numbers = TypeVar("Numbers", float, Tensor)

_TOLERANCE = 1e-4  # of a block, for fractions that come from float32
_HALF = 0.5 + _TOLERANCE  # halves are rounded up, also those that fall just below


class Width(nn.Module):
    r"""Learned law of how many of a group's units are kept, in blocks.

    The units are split into B blocks, as evenly as can be, and a mask keeps the first of them. With f blocks frozen,
    the mask has K = B - max(f, 1) + 1 entries: the first stands for the frozen blocks, or for the first block, one of
    which is always kept. Prior and posterior are ordered masks over these entries; `nest` makes one width for each
    group of channels, and all layers that read or write the group share it.

    Args:
        name: Name of the group; its Pyro site is `name.mask`.
        num_units: Number of units.
        num_blocks: Number of blocks B, at most `num_units`; each unit is a block by default. Sizes differ by one if
            it does not divide the units.
        frozen: Number of leading blocks that are always kept.
        prior: Law over the entries of the mask; uniform by default.
        init: Law at which the posterior starts; the prior by default.
        temperature: Temperature of the straight-through mask.
        noise: Noise of the straight-through mask, "logistic" or "gumbel".

    Raises:
        ValueError: If the numbers or laws do not fit together.

    Example:
        >>> width = Width("hidden", num_units=10, num_blocks=4)
        >>> width.sizes
        (3, 3, 2, 2)
        >>> [width.kept_units(fraction) for fraction in (0.25, 0.5, 1.0)]
        [3, 6, 10]
        >>> width.kept_blocks(0.3)
        Traceback (most recent call last):
            ...
        ValueError: width 0.3 is no number of blocks that group 'hidden' can keep: near it are 0.25 (1 of 4 blocks) ...
        >>> width.kept_blocks(0.3, rounding="nearest")
        1
        >>> width.law.keep_probs
        tensor([1.0000, 0.7500, 0.5000, 0.2500])
    """

    prior_logits: Tensor
    entries: Tensor
    mask: Tensor | None
    keep_probs: Tensor | None
    kept: int | None

    def __init__(
        self,
        name: str,
        num_units: int,
        num_blocks: int | None = None,
        *,
        frozen: int = 0,
        prior: OrderedMask | None = None,
        init: OrderedMask | None = None,
        temperature: float = 0.2,
        noise: Noise = "logistic",
    ) -> None:
        super().__init__()
        num_units = check_int(name, "num_units", num_units, 1)
        num_blocks = check_int(name, "num_blocks", num_units if num_blocks is None else num_blocks, 1, num_units)
        frozen = check_int(name, "frozen", frozen, 0, num_blocks)
        if not is_one_of(noise, get_args(Noise)):
            raise ValueError(f"Width {name!r}: argument `noise` must be 'logistic' or 'gumbel'; got {noise!r}")
        if not (0 < temperature < math.inf):
            raise ValueError(f"Width {name!r}: argument `temperature` must be finite and > 0; got {temperature}")
        self.name, self.num_units, self.num_blocks, self.frozen = name, num_units, num_blocks, frozen
        self.temperature, self.noise = temperature, noise
        small, larger = divmod(num_units, num_blocks)
        self.sizes = (small + 1,) * larger + (small,) * (num_blocks - larger)
        self.register_buffer("prior_logits", self._logits("prior", prior))
        self.logits = nn.Parameter(self.prior_logits.clone() if init is None else self._logits("init", init))
        # Entry of the mask that each unit obeys.
        entries = torch.repeat_interleave(torch.arange(num_blocks), torch.tensor(self.sizes))
        self.register_buffer("entries", (entries - (self.always_kept - 1)).clamp_min(0), persistent=False)
        self.release()

    def _logits(self, argument: str, law: OrderedMask | None) -> Tensor:
        size = self.num_blocks - self.always_kept + 1
        if law is None:
            return torch.zeros(size)
        if not isinstance(law, OrderedMask) or law.logits.shape != (size,):
            got = tuple(law.logits.shape) if isinstance(law, OrderedMask) else type(law).__name__
            raise ValueError(
                f"Width {self.name!r}: argument `{argument}` must be an OrderedMask over {size} entries "
                f"({self.num_blocks} blocks, of which the first {self.always_kept} are always kept); got {got}"
            )
        # The probability of a length that is ruled out underflows to zero, and stays there.
        return law.logits.detach().clone().clamp_min(-1e3)

    @property
    def always_kept(self) -> int:
        """Number of blocks that every mask keeps, at least one."""
        return max(self.frozen, 1)

    @property
    def prior(self) -> OrderedMask:
        """Prior law of the mask."""
        return OrderedMask(logits=self.prior_logits, validate_args=False)

    @property
    def posterior(self) -> OrderedMaskStraightThrough:
        """Learned law of the mask, with gradients to its parameters."""
        return OrderedMaskStraightThrough(self.temperature, logits=self.logits, noise=self.noise, validate_args=False)

    @property
    def law(self) -> OrderedMask:
        """Learned law of the mask, without gradient."""
        return OrderedMask(logits=self.logits.detach())

    def kept_blocks(self, width: float | int, rounding: Rounding | None = None) -> int:
        """Return how many blocks a width keeps.

        Args:
            width: A fraction in (0, 1] as a float, or a number of blocks as an int: 1.0 is the whole group, 1 is one
                block. Fractions may be off by what float32 rounds.
            rounding: What becomes of a fraction that is no whole number of blocks, or below those always kept: the
                "nearest" number (halves go up), the next "down" or "up", and at least those always kept. By default
                it is an error.

        Returns:
            A number of blocks.

        Raises:
            ValueError: If the width is invalid, or a fraction is no whole number of blocks and may not be rounded.
        """
        return kept_blocks([(self, width)], rounding)[0]

    def kept_units(self, width: float | int, rounding: Rounding | None = None) -> int:
        """Return how many units a width keeps; arguments and errors as in `kept_blocks`."""
        return sum(self.sizes[: self.kept_blocks(width, rounding)])

    def _rounded(self, width: Any, rounding: Rounding | None) -> int | None:
        """Return how many blocks a width keeps, or None if the group cannot keep so many, or it must not be rounded."""
        low, high = self.always_kept, self.num_blocks
        if is_integer(width):
            return int(width) if low <= width <= high else None
        if isinstance(width, Real) and not isinstance(width, bool) and 0 < float(width) <= 1:
            down, up = self._around(float(width))
            if rounding is None:
                return down if low <= down == up else None
            found = {"down": down, "up": up, "nearest": int(nearest(float(width), high))}
            return min(high, max(low, found[rounding]))
        raise ValueError(self._misfit(width))

    def _misfit(self, width: Any) -> str:
        """Say why a width is none of the group's."""
        if isinstance(width, Real) and not isinstance(width, Integral) and 0 < float(width) <= 1:
            return (
                f"width {float(width)!r} is no number of blocks that group {self.name!r} can keep: near it are "
                f"{self._neighbours(float(width))}"
            )
        return (
            f"width {width!r} is invalid for group {self.name!r}: give a fraction in (0.0, 1.0] (a float) or a number "
            f"of blocks from {self.always_kept} to {self.num_blocks} (an int)"
        )

    def _around(self, fraction: float) -> tuple[int, int]:
        """Return the numbers of blocks below and above a fraction, the same if it is one of them."""
        blocks = fraction * self.num_blocks
        tolerance = max(_TOLERANCE, self.num_blocks * torch.finfo(torch.float32).eps)
        return math.floor(blocks + tolerance), math.ceil(blocks - tolerance)

    def _neighbours(self, fraction: float) -> str:
        """Name the valid fractions on both sides of one that is not."""
        valid = sorted({max(self.always_kept, blocks) for blocks in self._around(fraction)})
        total = self.num_blocks
        return " and ".join(f"{blocks / total:.7g} ({blocks} of {total} blocks)" for blocks in valid)

    def prefix(self, fractions: Tensor) -> Tensor:
        """Return the masks of given fractions, shape fractions.shape + (K,), each rounded to the nearest block."""
        blocks = nearest(fractions.unsqueeze(-1), self.num_blocks).clamp(self.always_kept, self.num_blocks)
        positions = torch.arange(self.always_kept, self.num_blocks + 1, device=fractions.device)
        return (positions <= blocks).to(self.logits.dtype)

    def spread(self, mask: Tensor) -> Tensor:
        """Give each unit the entry of its block, shape (..., K) to (..., num_units)."""
        if mask.shape[-1] == self.num_units:
            return mask
        if self.num_units % mask.shape[-1] == 0 and self.always_kept == 1:
            # A view and a sum in the backward pass, where indexing would scatter.
            return mask.unsqueeze(-1).expand(*mask.shape, self.num_units // mask.shape[-1]).flatten(-2)
        return mask[..., self.entries]

    # What one forward pass of a net looks like is kept here, for the layers to read.

    def hold(self, mask: Tensor | None = None, keep_probs: Tensor | None = None, kept_units: int | None = None) -> None:
        """Keep the mask of a forward pass, or the number of units that it computes."""
        mask = None if mask is None else self.spread(mask)
        keep_probs = None if keep_probs is None else self.spread(keep_probs)
        vars(self).update(mask=mask, keep_probs=keep_probs, kept=kept_units)  # a module's own way is slow

    def release(self) -> None:
        """Forget the forward pass: all units are kept."""
        vars(self).update(mask=None, keep_probs=None, kept=None)

    def describe_law(self) -> tuple[float, list[int]]:
        """Return the mean and the modes of the number of blocks kept, with frozen ones; NaN is no error here."""
        probs = self.logits.detach().cpu().double().softmax(-1)
        blocks = torch.arange(self.always_kept, self.num_blocks + 1)
        modes = [length + self.always_kept - 1 for length in most_probable(probs)]
        return (probs * blocks).sum().item(), modes

    def extra_repr(self) -> str:
        """Describe the width in the representation of a net."""
        frozen = f", frozen={self.frozen}" if self.frozen else ""
        mean, modes = self.describe_law()
        blocks = f"{self.num_units} units in {self.num_blocks} blocks{frozen}"
        return f"{self.name}, {blocks}, mean blocks kept {mean:.4g}, {say_modes(modes)}"


def nearest(fractions: Numbers, num_blocks: int) -> Numbers:
    """Return the whole numbers of blocks nearest to fractions of them; halves go up, also those that fall just below.

    Args:
        fractions: A number or a tensor, >= 0.
        num_blocks: The blocks of which they are fractions.

    Example:
        >>> nearest(torch.tensor([0.1, 0.5, 0.75]), num_blocks=3)
        tensor([0., 2., 2.])
    """
    return (fractions * num_blocks + _HALF) // 1


def kept_blocks(wanted: Sequence[tuple[Width, float | int]], rounding: Rounding | None) -> list[int]:
    """Return how many blocks each of several groups keeps; arguments and errors as in `Width.kept_blocks`."""
    if not is_one_of(rounding, (None, *get_args(Rounding))):
        raise ValueError(f"Width: argument `rounding` must be 'nearest', 'down' or 'up', or None; got {rounding!r}")
    kept = [(width, value, width._rounded(value, rounding)) for width, value in wanted]
    misfits = [(width._misfit(value), is_integer(value)) for width, value, blocks in kept if blocks is None]
    advice = "" if all(whole for _, whole in misfits) else "; rounding='nearest', 'down' or 'up' rounds it"
    if len(misfits) == 1:
        raise ValueError(f"{misfits[0][0]}{advice}")
    if misfits:
        usual = f"{advice}, the usual choice where they differ" if advice else ""
        lines = "".join(f"\n- {misfit}" for misfit, _ in misfits)
        raise ValueError(f"the width does not fit all groups{usual}:{lines}")
    return [blocks for _, _, blocks in kept if blocks is not None]


def check_int(name: str, argument: str, value: Any, low: int, high: int | None = None) -> int:
    """Return an integer, of Python or NumPy, as one of Python; raise a ValueError if it is none of those allowed."""
    if not is_integer(value) or value < low or (high is not None and value > high):
        expected = f"at least {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"Width {name!r}: argument `{argument}` must be an integer {expected}; got {value!r}")
    return int(value)
