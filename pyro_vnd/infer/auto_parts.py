"""Parts of an automatic guide: one site each, an ordered mask, hard or soft, or ordered numbers that may be cut."""

from collections.abc import Collection
from typing import Any

import pyro
import torch
from pyro.distributions import constraints
from pyro.infer.autoguide import AutoGuide
from pyro.nn.module import PyroParam
from pyro.ops.tensor_utils import periodic_repeat
from torch import Tensor
from torch.distributions import Normal, transform_to

from pyro_vnd.distributions import NestedNormal, OrderedMask, OrderedMaskStraightThrough, RelaxedOrderedMask
from pyro_vnd.distributions.nested import NestedLaw, innermost
from pyro_vnd.distributions.straight_through import Noise
from pyro_vnd.infer._model_sites import in_plates, run_model
from pyro_vnd.infer.result import LengthSummary

__all__ = [
    "AutoLengths",
    "AutoMask",
    "AutoNestedNormal",
    "AutoRelaxedMask",
    "mask_quantiles",
    "nested_quantiles",
    "part_for",
]

_CONSTRAINTS: dict[str, Any] = {
    "logits": constraints.real,
    "loc": constraints.real,
    "scale": constraints.softplus_positive,
}


class AutoLengths(AutoGuide):
    """Base of the parts: a law with learned lengths for the one site of a model, which starts at the law of the model.

    Rows of a plate that subsamples start at the law that they have in the first call that has them.

    Args:
        model: A model with the one site.
        site_name: Its name.
        noise: Noise of a straight-through mask.
        temperature: Temperature of a straight-through mask.
        shared_plates: Names of plates whose rows share their law of lengths.
        indexed: Names of plates to which the model gives their rows.
    """

    seen: Tensor | None  # rows that have started, where rows differ
    logits: Any

    def __init__(
        self,
        model: Any,
        site_name: str,
        noise: Noise,
        temperature: float,
        shared_plates: Collection[str] = (),
        indexed: Collection[str] = (),
    ) -> None:
        super().__init__(model)
        self.site_name, self.noise = site_name, noise
        self.temperature: Any = temperature
        self.shared_plates, self._indexed = shared_plates, indexed

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        super()._setup_prototype(*args, **kwargs)
        prototype: Any = self.prototype_trace
        site = prototype.nodes[self.site_name]
        self._event_dim, self._frames = site["fn"].event_dim, site["cond_indep_stack"]
        self._enumerate = site["infer"].get("enumerate")
        by_row = [f for f in self._frames if f.name in self._indexed or f.full_size not in (None, f.size)]
        starts = self._starts(site["fn"])
        # A law that is the same for all rows of this call is taken to be the same for all others.
        pairs = [(start, f) for name, start in starts.items() for f in by_row if not self._is_shared(name, f)]
        differ = any(start.stride(f.dim - self._event_dim) != 0 for start, f in pairs)
        for name, start in starts.items():
            start = self._start(name, start)
            for frame in by_row:
                dim = frame.dim - self._event_dim
                if frame.full_size is not None and not self._is_shared(name, frame):
                    start = periodic_repeat(start, frame.full_size, dim)
            setattr(self, name, PyroParam(start.contiguous(), _CONSTRAINTS[name], self._event_dim))
        batch = list(site["fn"].batch_shape)
        for frame in by_row:
            batch[frame.dim] = frame.full_size or frame.size
        seen = torch.zeros(batch, dtype=torch.bool, device=starts["logits"].device)
        self.register_buffer("seen", seen if differ else None)

    def _starts(self, fn: Any) -> dict[str, Tensor]:
        """Return what the parameters are in a law of the model, without gradient, by name."""
        return {"logits": innermost(fn).logits.detach()}

    def _is_shared(self, name: str, frame: Any) -> bool:
        return name == "logits" and frame.name in self.shared_plates

    def _start(self, name: str, start: Tensor) -> Tensor:
        """Return where a parameter starts: shared logits at the law with the least divergence from those of the rows.

        A length that the prior rules out would have an infinite KL: its probability underflows to zero and stays.
        """
        for frame in self._frames:
            if self._is_shared(name, frame):
                start = start.mean(frame.dim - self._event_dim, keepdim=True)
        return start.clamp_min(-1e3) if name == "logits" else start

    def _start_rows(self, plates: Any, args: Any, kwargs: Any) -> None:
        """Start those rows of this call that no call has had before."""
        seen: Any = self.seen
        rows = {frame.name: plates[frame.name].indices.to(seen.device) for frame in self._frames}
        if (old := seen[self._entries("seen", rows)]).all():
            return
        starts = self._starts(run_model(self.model, args, kwargs, rows).sites[self.site_name]["fn"])
        for name, start in starts.items():
            table: Any = getattr(self, f"{name}_unconstrained").data  # autograd is not to see: these rows are new to it
            new, entries, kept = (
                transform_to(_CONSTRAINTS[name]).inv(self._start(name, start)),
                self._entries(name, rows),
                old,
            )
            for frame in self._frames:
                kept = kept.any(frame.dim, keepdim=True) if self._is_shared(name, frame) else kept
            table[entries] = torch.where(kept[(..., *[None] * self._event_dim)], table[entries], new)
        seen[self._entries("seen", rows)] = True

    def _entries(self, name: str, rows: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """Return the index of rows in a parameter of all of them."""
        seen: Any = self.seen
        entries = [torch.arange(size, device=seen.device) for size in seen.shape]
        for frame in self._frames:
            entries[frame.dim] = rows[frame.name][:1] * 0 if self._is_shared(name, frame) else rows[frame.name]
        return torch.meshgrid(*entries, indexing="ij")

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draw the site."""
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        plates = self._create_plates(*args, **kwargs)
        if self.seen is not None:
            self._start_rows(plates, args, kwargs)
        with in_plates(plates, self._frames):
            fn = self._law().to_event(self._event_dim - 1)
            value = pyro.sample(self.site_name, fn, infer={"enumerate": self._enumerate})
        return {self.site_name: value}

    def _law(self) -> Any:
        raise NotImplementedError

    def law(self) -> OrderedMask:
        """Return the learned law of lengths, without gradient.

        Raises:
            ValueError: If it is not known for all rows of a plate, as no call had them.
        """
        if self.seen is not None and not self.seen.all():
            raise ValueError(
                f"AutoNested: the laws at site {self.site_name!r} start at the prior of each row, and no call of the "
                f"guide has had {int((~self.seen).sum())} of {self.seen.numel()} rows: call it on all data first"
            )
        return self._hard()

    def _hard(self) -> OrderedMask:
        return OrderedMask(logits=self.logits.detach())

    def summary(self) -> LengthSummary:
        """Summarise the learned law over the rows that calls have had."""
        return LengthSummary.of(self._hard(), visible=self.seen)

    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Return the median of each entry: of a mask, the mask of the median length."""
        (median,) = self.quantiles([0.5])[self.site_name]
        return {self.site_name: median}

    def quantiles(self, quantiles: list[float], *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Return quantiles of each entry, stacked in a new first dimension: of a mask, those of the length."""
        return {self.site_name: mask_quantiles(self.law(), quantiles)}


class AutoMask(AutoLengths):
    """Straight-through or enumerated mask with learned logits."""

    def _law(self) -> OrderedMask:
        if self._enumerate:
            return OrderedMask(logits=self.logits)
        return OrderedMaskStraightThrough(self.temperature, logits=self.logits, noise=self.noise)


class AutoRelaxedMask(AutoLengths):
    """Soft mask with learned logits, at the temperature that it has in the model."""

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        super()._setup_prototype(*args, **kwargs)
        prototype: Any = self.prototype_trace
        self.temperature = innermost(prototype.nodes[self.site_name]["fn"]).temperature.detach()

    def _law(self) -> RelaxedOrderedMask:
        return RelaxedOrderedMask(self.temperature, logits=self.logits)


class AutoNestedNormal(AutoLengths):
    """`NestedNormal` with learned means, deviations and logits, for any law of ordered numbers that may be cut.

    It starts at the law of the model, given zeros where coordinates depend on those before them.
    """

    loc: Any
    scale: Any

    def _starts(self, fn: Any) -> dict[str, Tensor]:
        prior = innermost(fn)
        normal = prior.given(torch.zeros_like(prior.mask_law.logits[(0,) * len(prior.batch_shape)]))
        return {"loc": normal.loc.detach(), "scale": normal.scale.detach(), "logits": prior.mask_law.logits.detach()}

    def _law(self) -> NestedNormal:
        return NestedNormal(self.loc, self.scale, self.logits, temperature=self.temperature, noise=self.noise)

    @torch.no_grad()
    def quantiles(self, quantiles: list[float], *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Return quantiles of each coordinate, which has an atom at zero, stacked in a new first dimension."""
        law = self.law()
        return {self.site_name: nested_quantiles(NestedNormal(self.loc, self.scale, law.logits), quantiles)}


def mask_quantiles(law: OrderedMask, quantiles: list[float]) -> Tensor:
    """Return the masks of quantiles of the length, stacked in a new first dimension."""
    keep_probs = law.keep_probs.detach()
    # The q-quantile of L is the smallest k with P(L <= k) >= q: unit i is kept where P(L >= i) > 1 - q.
    masks = torch.stack([(keep_probs > 1 - q).to(keep_probs.dtype) for q in quantiles])
    masks[..., 0] = 1
    return masks


def nested_quantiles(law: NestedNormal, quantiles: list[float]) -> Tensor:
    """Return quantiles of each coordinate, which has an atom at zero, stacked in a new first dimension."""
    normal = Normal(law.loc, law.scale)
    keep_probs = law.mask_law.keep_probs.expand(normal.loc.shape)
    below = keep_probs * normal.cdf(torch.zeros_like(normal.loc))
    values = []
    for q in quantiles:
        low, high = q / keep_probs, 1 - (1 - q) / keep_probs
        found = normal.icdf(torch.where(q < below, low, high).clamp(0, 1))
        values.append(torch.where((q >= below) & (q <= below + 1 - keep_probs), 0.0, found))
    return torch.stack(values)


def part_for(fn: Any) -> type[AutoLengths] | None:
    """Return the part for a law of the model, or None if it is about no lengths."""
    kinds = {OrderedMask: AutoMask, RelaxedOrderedMask: AutoRelaxedMask, NestedLaw: AutoNestedNormal}
    return next((part for kind, part in kinds.items() if isinstance(innermost(fn), kind)), None)
