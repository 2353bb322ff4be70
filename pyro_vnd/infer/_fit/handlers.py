"""Effect handlers of a fit: one scales a mini-batch to its data set, one records likelihood and laws of lengths."""

import math
from itertools import zip_longest
from typing import Any

import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_vnd.distributions import OrderedMask, RelaxedOrderedMask
from pyro_vnd.distributions.nested import find_mask, innermost
from pyro_vnd.infer._fit.settings import KLWeights
from pyro_vnd.infer._model_sites import is_mask, visible_entries
from pyro_vnd.infer.result import LearnedLaw

__all__ = ["EvaluationRecord", "ScaleToDataset"]


class ScaleToDataset(Messenger):
    """Scale all sites in the plate of the data by num_data / batch size, and the KL of other latents by a weight.

    A model that is written for whole data, `pyro.plate("data", len(x))`, then has the right mini-batch ELBO. A plate
    that already knows the full size, `pyro.plate("data", num_data, subsample_size=len(x))`, is left alone.

    Weights that a site has itself, `infer={"kl_weight": w}` and `"length_weight"`, are multiplied by those given here.

    Args:
        plate: Name of the plate.
        num_data: Rows of the data set.
        batch_size: Rows of the mini-batch.
        weights: Weights of KLs.
        mark: Whether weights are left to the ELBO, in `infer` of the site as `NestedELBO` wants them,
            instead of multiplying the scale of the site, which every ELBO understands.
    """

    def __init__(self, plate: str, num_data: int, batch_size: int, weights: KLWeights, *, mark: bool = False) -> None:
        super().__init__()
        self.plate, self.num_data, self.batch_size, self.mark = plate, num_data, batch_size, mark
        self.weights: Any = weights  # numbers
        self.found = False
        self.plates: dict[str, int] = {}

    @property
    def row_scale(self) -> float:
        """By how much rows are scaled."""
        return self.num_data / self.batch_size

    def _pyro_sample(self, msg: Any) -> None:
        in_plate = self._scale(msg)
        if msg["is_observed"] or site_is_subsample(msg):
            return
        infer = msg["infer"]
        weight = _weight(msg, "kl_weight", 1.0)
        length_weight = _weight(msg, "length_weight", weight) * self.weights.lengths
        weight = weight * (self.weights.local if in_plate else self.weights.latents)
        if self.mark:
            # A new dict: a model that is replayed has that of the guide's site, whose weights are what is read.
            msg["infer"] = infer | {"kl_weight": weight, "length_weight": length_weight}
        else:
            msg["scale"] = msg["scale"] * (length_weight if is_mask(msg["fn"]) else weight)

    def _scale(self, msg: Any) -> bool:
        """Scale a site in the plate of the data; return whether it is in there."""
        for frame in msg["cond_indep_stack"]:
            self.plates[frame.name] = frame.size
            if frame.name != self.plate:
                continue
            if frame.size < 0:  # Pyro's number for a plate that was not told
                raise ValueError(f"fit: plate {self.plate!r} has no size: write pyro.plate({self.plate!r}, len(x))")
            if frame.size != self.batch_size:
                raise ValueError(
                    f"fit: plate {self.plate!r} at site {msg['name']!r} has size {frame.size}, but the batch has "
                    f"{self.batch_size} rows"
                )
            if frame.full_size not in (frame.size, None, self.num_data):
                raise ValueError(
                    f"fit: plate {self.plate!r} is for {frame.full_size} rows, but the data have {self.num_data}"
                )
            self.found = True
            if frame.full_size in (frame.size, None):
                msg["scale"] = msg["scale"] * self.row_scale
            return True
        return False

    def check(self) -> None:
        """Raise where a mini-batch met no plate to scale.

        Raises:
            ValueError: If no site was in the plate although the batch is smaller than the data.
        """
        if not self.found and self.batch_size != self.num_data:
            raise ValueError(
                f"fit: no site of the model is in a plate named {self.plate!r}, so mini-batches cannot be scaled to "
                f"the data set; name it with `plate=` (plates of the model: {self.plates}), or use the whole data"
            )


def _weight(msg: Any, key: str, default: float) -> float:
    """Return a weight that a site has itself."""
    if key not in msg["infer"]:
        return default
    weight: Any = msg["infer"][key]
    if not isinstance(weight, int | float) or not 0 <= weight < math.inf:
        name = msg["name"].removesuffix("_unconstrained")  # as the model knows it
        raise ValueError(f"fit: `infer[{key!r}]` of site {name!r} must be a finite number >= 0; got {weight!r}")
    return float(weight)


class EvaluationRecord(Messenger):
    """Record the log-likelihood of the observed sites and the laws of lengths in one ELBO evaluation.

    With ELBO = log-likelihood - KL, the KL part follows. Nothing is recorded where a site is enumerated, as its
    log-likelihood is then an expectation that the handler does not see. A mask that is not drawn in an evaluation, as
    it is cut to a budget, keeps its law of an earlier one; a code that is cut is recorded with its law before.

    Args:
        score: Whether to score the observed sites, for an ELBO that does not keep the log-likelihood itself.

    Attributes:
        laws: Laws of the masks and codes, learned and prior, by site of the guide.
        visible: What the model does not hide of each of them, for the batch shape of the law; None for all.
        by_values: Those whose laws are by values, of which a head learns by regression.
        plates: Names of the plates of those that a `MaskSchedule` can cut: not wrapped and not enumerated.
        last_site: The last site so far, of guide or model.
        misfits: Shapes of value and law of each observed site so far whose log-probability has more dimensions than it
            has plates, as where (N, 1) meets (N,).
    """

    def __init__(self, score: bool = True) -> None:
        super().__init__()
        self.score = score
        self.laws: dict[str, LearnedLaw] = {}
        self.visible: dict[str, Tensor | bool | None] = {}
        self.by_values: set[str] = set()
        self.plates: dict[str, set[str]] = {}
        self._reset()

    def _reset(self) -> None:
        self.log_likelihood: Tensor | float = 0.0
        self.enumerated = False
        self.last_site = ""
        self.misfits: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
        self._sights: dict[str, int] = {}

    def __enter__(self) -> "EvaluationRecord":
        self._reset()
        return super().__enter__()

    def _pyro_post_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            return
        name = self.last_site = msg["name"]
        self.enumerated |= msg["infer"].get("_enumerate_dim") is not None
        if msg["is_observed"]:
            if not _fits_its_plates(msg):
                self.misfits[name] = tuple(getattr(msg["value"], "shape", ())), tuple(msg["fn"].shape())
            if self.score and not self.enumerated:
                # All handlers have run: scale and mask are final, as in the trace that the ELBO scores.
                with torch.no_grad():
                    log_prob = msg["fn"].log_prob(msg["value"])
                    self.log_likelihood += scale_and_mask(log_prob, msg["scale"], msg["mask"]).sum()
            return
        if msg["infer"].get("at_every_length"):  # there is no one law of it in a vectorised evaluation
            return
        sights = self._sights[name] = self._sights.get(name, 0) + 1  # the first in the guide, the second in the model
        law = _lengths(msg["infer"].get("uncut", msg["fn"]))
        if law is None or sights > 2:
            return
        if sights == 1:
            self.laws[name] = LearnedLaw(law)
            if "value_head" in msg["infer"]:
                self.by_values.add(name)
            if law is msg["fn"] and msg["infer"].get("_enumerate_dim") is None:
                self.plates[name] = {frame.name for frame in msg["cond_indep_stack"]}
        elif name in self.laws and not msg["infer"].get("is_auxiliary"):
            self.laws[name] = self.laws[name]._replace(prior=law)
            self.visible[name] = visible_entries(msg)


def _lengths(fn: Any) -> Any:
    """Return what a law says about lengths; of a soft mask, the law of the hard one that it tends to."""
    law = innermost(fn)
    return OrderedMask(logits=law.logits) if isinstance(law, RelaxedOrderedMask) else find_mask(fn)


def _fits_its_plates(msg: Any) -> bool:
    """Say whether each dimension of the log-probability of a site is that of a plate."""
    value, law = getattr(msg["value"], "shape", ()), msg["fn"].shape()
    if value == law and len(msg["fn"].batch_shape) <= len(msg["cond_indep_stack"]):
        return True
    event_dim, dims = msg["fn"].event_dim, {frame.dim for frame in msg["cond_indep_stack"]}
    sizes = [max(pair) for pair in zip_longest(reversed(value), reversed(law), fillvalue=1)][event_dim:]
    return all(size == 1 or -i in dims for i, size in enumerate(sizes, 1))
