"""Effect handlers that scale a mini-batch to its data set and watch the parts of the ELBO."""

from typing import Any

import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_vnd.distributions import NestedLaw, OrderedMask
from pyro_vnd.distributions.nested import find_mask

__all__ = ["ElboMonitor", "ScaleToDataset"]


class ScaleToDataset(Messenger):
    """Scale all sites in the plate of the data by num_data / batch size, and the KL of other latents by a weight.

    A model that is written for whole data, `pyro.plate("data", len(x))`, then has the right mini-batch ELBO. A plate
    that already knows the full size, `pyro.plate("data", num_data, subsample_size=len(x))`, is left alone.

    Args:
        plate: Name of the plate.
        num_data: Rows of the data set.
        batch_size: Rows of the mini-batch.
        kl_weight: Weight of the latents outside the plate that are no masks.
        local_kl_weight: Weight of the latents inside the plate that are no masks.
        length_weight: Weight of the masks, inside the plate and outside, and of the lengths of a `NestedNormal`.
        mark: Whether weights are left to the ELBO, in `infer` of the site as `NestedELBO` wants them,
            instead of multiplying the scale of the site, which every ELBO understands.
    """

    def __init__(
        self,
        plate: str,
        num_data: int,
        batch_size: int,
        kl_weight: float = 1.0,
        local_kl_weight: float = 1.0,
        length_weight: float = 1.0,
        mark: bool = False,
    ) -> None:
        super().__init__()
        self.plate, self.num_data, self.batch_size, self.mark = plate, num_data, batch_size, mark
        self.kl_weight, self.local_kl_weight, self.length_weight = kl_weight, local_kl_weight, length_weight
        self.found = False
        self.plates: dict[str, int] = {}

    def _pyro_sample(self, msg: Any) -> None:
        in_plate = self._scale(msg)
        if msg["is_observed"] or site_is_subsample(msg):
            return
        if isinstance(find_mask(msg["fn"]), OrderedMask):
            weight = self.length_weight
        else:
            weight = self.local_kl_weight if in_plate else self.kl_weight
        if self.mark:
            msg["infer"] |= {"kl_weight": weight, "length_weight": self.length_weight}
        else:
            msg["scale"] = msg["scale"] * weight

    def _scale(self, msg: Any) -> bool:
        """Scale a site in the plate of the data; return whether it is in there."""
        for frame in msg["cond_indep_stack"]:
            self.plates[frame.name] = frame.size
            if frame.name != self.plate:
                continue
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
                msg["scale"] = msg["scale"] * (self.num_data / self.batch_size)
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


class ElboMonitor(Messenger):
    """Record the log-likelihood of the observed sites and the laws of the masks of the guide in one ELBO evaluation.

    With ELBO = log-likelihood - KL, the KL part follows. Nothing is recorded where a site is enumerated, as its
    log-likelihood is then an expectation that the handler does not see. A mask that is not drawn in an evaluation, as
    it is cut to a budget, keeps its law of an earlier one; a code that is cut is recorded with its law before.

    Args:
        score: Whether to score the observed sites, for an ELBO that does not keep the log-likelihood itself.

    Attributes:
        laws: Laws of the masks and codes of the guide, by site.
        plates: Names of the plates of those that a `MaskSchedule` can cut: not wrapped and not enumerated.
    """

    def __init__(self, score: bool = True) -> None:
        super().__init__()
        self.score = score
        self.laws: dict[str, OrderedMask | NestedLaw] = {}
        self.plates: dict[str, set[str]] = {}
        self._reset()

    def _reset(self) -> None:
        self.log_likelihood: Tensor | float = 0.0
        self.enumerated = False
        self.last_site = ""
        self._seen: set[str] = set()

    def __enter__(self) -> "ElboMonitor":
        self._reset()
        return super().__enter__()

    def _pyro_post_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            return
        name = self.last_site = msg["name"]
        self.enumerated |= msg["infer"].get("_enumerate_dim") is not None
        if msg["is_observed"]:
            if self.score and not self.enumerated:
                # All handlers have run: scale and mask are final, as in the trace that the ELBO scores.
                with torch.no_grad():
                    log_prob = msg["fn"].log_prob(msg["value"])
                    self.log_likelihood += scale_and_mask(log_prob, msg["scale"], msg["mask"]).sum()
        elif name not in self._seen:  # the guide runs before the model
            self._seen.add(name)
            law = find_mask(msg["infer"].get("uncut", msg["fn"]))
            if law is not None:
                self.laws[name] = law
                if law is msg["fn"] and msg["infer"].get("_enumerate_dim") is None:
                    self.plates[name] = {frame.name for frame in msg["cond_indep_stack"]}
