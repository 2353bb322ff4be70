"""What rows turned out to be worth at the lengths that they had in a step: what value heads learn from."""

from collections import Counter
from collections.abc import Callable, Iterable
from copy import copy
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import Delta, Unit
from pyro.distributions.util import scale_and_mask
from pyro.infer import ELBO, Trace_MMD
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from pyro_vnd._compat import recall
from pyro_vnd._data import Data, as_arguments
from pyro_vnd._state import module_mode
from pyro_vnd.distributions import NestedAutoregressive, OrderedMask
from pyro_vnd.distributions.constraints import counted
from pyro_vnd.distributions.kl import kl_of_coordinates
from pyro_vnd.distributions.nested import NestedLaw, innermost
from pyro_vnd.infer._kl import kl_terms
from pyro_vnd.infer.schedules import PriceSchedule
from pyro_vnd.nn.values import ValueHead

__all__ = ["ValueSites", "calibrate_heads", "value_sites"]

NUM_CALIBRATION = 1000  # rows over which mean lengths are taken


class ValueSites(Messenger):
    r"""Let value heads learn from an evaluation of the objective, and draw lengths at random prices.

    A site of the guide in the plate of the data whose `infer` has a "value_head" has a law of lengths by values. In
    the evaluation its law is a constant: the head learns by regression alone. What a row is worth is the likelihood of
    all that is observed of it less the divergence of its latents,

    $$\hat v = \log p(x \mid z_{\le L}) - \mathrm{KL}(q(z_{\le L} \mid x) \| p(z_{\le L})).$$

    An observed site may say in `infer["value_law"]` by which law values are taken: a function without arguments that
    makes it.

    Attributes:
        rounds: What is known of each particle of the last evaluation.

    Args:
        plate: Name of the plate of the data.
        row_scale: By how much rows in it are scaled.
        with_kl: Whether the objective has the divergence of the latents of each row.
        schedule: Where prices come from, or None: then lengths are from the law at price zero.
    """

    def __init__(self, plate: str, row_scale: float, with_kl: bool, schedule: PriceSchedule | None) -> None:
        super().__init__()
        self.plate, self.row_scale, self.with_kl, self.schedule = plate, row_scale, with_kl, schedule
        self.rounds: list[_Round] = []

    def __enter__(self) -> "ValueSites":
        self.rounds = []
        return super().__enter__()

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] or site_is_subsample(msg) or not self._is_by_row(msg):
            return
        law, name, head = msg["fn"], msg["name"], msg["infer"].get("value_head")
        most = 1 if msg["infer"].get("is_auxiliary") else 2  # in the guide, and in the model
        if not self.rounds or self.rounds[-1].sights[name] == most:  # the guide of a new particle
            self.rounds.append(_Round())
        now = self.rounds[-1]
        now.sights[name] += 1
        if not (isinstance(head, ValueHead) and isinstance(law, NestedLaw | OrderedMask)):
            return
        if name not in now.posteriors:
            lengths = law.mask_law if isinstance(law, NestedLaw) else law
            logits = lengths._param
            now.heads[name], now.values[name] = head, logits - head.log_probs
            temperature: float | Tensor = 1.0
            if self.schedule is not None:
                now.prices[name], temperature = self.schedule.draw_prices(tuple(law.batch_shape), now.values[name])
            law = now.posteriors[name] = self._at_price(law, now.prices.get(name), logits.detach(), temperature)
        else:
            if isinstance(law, NestedAutoregressive):
                law = copy(law)
                law.conditioner = _Once(law.conditioner)  # for the values here, and for the objective
            law = now.priors[name] = self._at_price(law, now.prices.get(name))
        msg["fn"] = law

    def _at_price(
        self, law: Any, price: Tensor | None, logits: Tensor | None = None, temperature: float | Tensor = 1.0
    ) -> Any:
        """Return a law of lengths, or of what has lengths, tilted by a price."""
        mask = law.mask_law if isinstance(law, NestedLaw) else law
        if logits is not None:
            mask = mask._with(logits, mask.batch_shape)
        if price is not None:
            mask = mask.tilt(price)
            if logits is not None:
                mask = mask._with(mask._param / temperature, mask.batch_shape)
        if mask is law:
            return law
        if not isinstance(law, NestedLaw):
            return mask
        new = copy(law)
        new.mask_law = mask
        return new

    def _is_by_row(self, msg: Any) -> bool:
        return any(frame.name == self.plate for frame in msg["cond_indep_stack"])

    @torch.no_grad()
    def _pyro_post_sample(self, msg: Any) -> None:
        if site_is_subsample(msg) or not self._is_by_row(msg) or not self.rounds:
            return
        now, name, value = self.rounds[-1], msg["name"], msg["value"]
        if msg["is_observed"]:
            if not (isinstance(msg["fn"], Unit) and msg["fn"].has_rsample):  # a factor of the guide
                make = msg["infer"].get("value_law")
                now.add((msg["fn"] if make is None else make()).log_prob(value), msg, self.row_scale)
                now.visible.append(torch.as_tensor(True if msg["mask"] is None else msg["mask"]).long())
        elif name in now.posteriors and name not in now.lengths:
            mask = NestedLaw.mask_of(value) if isinstance(msg["fn"], NestedLaw) else value
            now.lengths[name] = mask.detach().sum(-1).round().long()
        elif not self.with_kl:
            return
        elif name in now.posteriors:
            if isinstance(msg["fn"], NestedLaw):
                making = recall(value)
                mask, dense = (NestedLaw.mask_of(value), value) if making is None else making
                with torch.enable_grad():  # which the objective wants of it
                    prior = now.priors[name].given(value)
                kl = kl_of_coordinates(now.posteriors[name].given(value), prior, dense)
                now.add(-counted(mask, kl).sum(-1), msg, self.row_scale)
        elif name not in now.others:
            now.others[name] = msg["fn"]
            if msg["infer"].get("is_auxiliary"):
                now.add(-msg["fn"].log_prob(value), msg, self.row_scale)
        else:
            now.add(-_divergence(now.others[name], msg["fn"], value), msg, self.row_scale)

    def loss(self) -> Tensor | None:
        """Return the error of the heads in the last evaluation; None if none has a site."""
        terms = [
            now.heads[name].regression(
                values.expand(now.lengths[name].shape + values.shape[-1:]).flatten(0, -2),
                now.lengths[name].flatten(),
                now.worth(name).flatten(),
                now.seen(name).flatten(),
            )
            for now in self.rounds
            if now.nats
            for name, values in now.values.items()
        ]
        if self.schedule is not None and not terms:
            raise ValueError(
                f"fit: argument `schedule` is a PriceSchedule, but no site in the plate {self.plate!r} has a law of "
                "lengths by values that is drawn from: an autoencoder's has if it is made with "
                "posterior_lengths='priced'; after a fit with a MaskSchedule, `distil_lengths` gives it one"
            )
        self.rounds = []
        return torch.stack(terms).sum() if terms else None


class _Once:
    """A function of a tensor that is evaluated once for the same one."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        self.function = function
        self.seen: tuple[Tensor, Any] | None = None

    def __call__(self, x: Tensor) -> Any:
        if self.seen is None or self.seen[0] is not x:
            self.seen = x, self.function(x)
        return self.seen[1]


class _Round:
    """What is known of one particle."""

    def __init__(self) -> None:
        self.sights: Counter[str] = Counter()
        self.heads: dict[str, ValueHead] = {}
        self.values: dict[str, Tensor] = {}
        self.prices: dict[str, Tensor] = {}
        self.posteriors: dict[str, Any] = {}
        self.priors: dict[str, Any] = {}
        self.lengths: dict[str, Tensor] = {}
        self.others: dict[str, Any] = {}
        self.nats: list[Tensor] = []
        self.visible: list[Tensor] = []

    def add(self, nats: Tensor, msg: Any, row_scale: float) -> None:
        """Add what a site says of each row."""
        self.nats.append(scale_and_mask(nats, msg["scale"] / row_scale, msg["mask"]))

    def worth(self, name: str) -> Tensor:
        """Return what rows turned out to be worth at the lengths of a site, with all that is in further plates."""
        return _sum_to(self.nats, self.lengths[name])

    def seen(self, name: str) -> Tensor:
        """Return of which rows the model does not hide all that is observed."""
        return _sum_to(self.visible, self.lengths[name]) > 0


def _sum_to(terms: Iterable[Tensor], like: Tensor) -> Tensor:
    """Return the sum of terms, each summed over what a batch shape does not have and repeated over what it has."""
    total: Any = sum(
        term.to(like.device).expand(torch.broadcast_shapes(term.shape, like.shape)).sum_to_size(like.shape)
        for term in terms
    )
    return total


def _divergence(q: Any, p: Any, value: Tensor) -> Tensor:
    if not isinstance(innermost(q), Delta):
        try:
            terms: Any = sum(kl_terms(q, p, value).values())
            return terms
        except NotImplementedError:
            pass
    return q.log_prob(value) - p.log_prob(value)


@torch.no_grad()
def calibrate_heads(model: Any, guide: Any, batches: Iterable[Data], plate: str) -> None:
    """Tell value heads which price leads to which mean length; those that learned nothing in the fit forget it.

    Over rows from all over the data of which the model does not hide all that is observed, as in the regression.

    Args:
        model: The model.
        guide: The guide.
        batches: Rows of the data.
        plate: Name of the plate of the data.
    """
    known = _heads([model, guide])
    if not known:
        return
    found: dict[ValueHead, list[Tensor]] = {}
    with module_mode([model, guide], training=False), poutine.block():
        for batch in batches:
            args, kwargs = as_arguments(batch)
            with ValueSites(plate, 1.0, False, None) as values:
                trace = poutine.trace(guide).get_trace(*args, **kwargs)
                poutine.replay(model, trace=trace)(*args, **kwargs)
            for now in values.rounds:
                for name, curves in now.values.items():
                    seen = curves.flatten(0, -2)
                    found.setdefault(now.heads[name], []).append(
                        seen[now.seen(name).flatten()] if now.visible else seen
                    )
    trained = {head: torch.cat(curves) for head, curves in found.items() if sum(map(len, curves))}
    for head, curves in trained.items():
        few = torch.linspace(0, len(curves) - 1, min(len(curves), NUM_CALIBRATION)).round().long()
        head.calibrate(curves[few.to(curves.device)])
    for head in known - trained.keys():
        head.forget()


def _heads(roots: Iterable[Any]) -> set[ValueHead]:
    """Return all value heads of models and guides."""
    modules = (part for root in roots if isinstance(root, nn.Module) for part in root.modules())
    return {part for part in modules if isinstance(part, ValueHead)}


def value_sites(objects: Iterable[Any], elbo: ELBO, schedule: Any, plate: str) -> ValueSites | None:
    """Return the handler that lets value heads learn, or None where there are none.

    Args:
        objects: Model and guide, whose parts are searched for heads.
        elbo: The objective.
        schedule: That of the fit.
        plate: Name of the plate of the data.

    Raises:
        ValueError: If the schedule has prices, and no law of lengths is by values.
    """
    prices = schedule if isinstance(schedule, PriceSchedule) else None
    if not _heads(objects):
        if prices is not None:
            raise ValueError(
                "fit: argument `schedule` is a PriceSchedule, for laws of lengths by values, of which the guide has "
                "none: an autoencoder's has with posterior_lengths='priced', an AutoNested with `amortise`"
            )
        return None
    return ValueSites(plate, 1.0, not isinstance(elbo, Trace_MMD), prices)
