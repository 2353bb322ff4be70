"""The log-probabilities of a model at given values of its latents."""

from collections.abc import Callable
from typing import Any

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_vnd.distributions.nested import NestedLaw, find_mask
from pyro_vnd.infer._conditional.every_length import Values
from pyro_vnd.infer._model_sites import split_mask

__all__ = ["Program"]


class _Given(Messenger):
    """Give latents their values."""

    def __init__(self, values: Values) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.values and not msg["is_observed"]:
            msg["value"], msg["done"] = self.values[msg["name"]], True
            msg["infer"] = msg["infer"] | {"at_every_length": True}


class Program:
    """A model as a function of its latents.

    Args:
        model: The model.
        args: Its arguments.
        kwargs: The same, by name.
        rows: Plates of the lengths by row.

    Attributes:
        in_rows: Sites in all of these plates, whose log-probabilities are by row.
        observed: Sites that are observed.
    """

    def __init__(self, model: Callable[..., Any], args: Any, kwargs: Any, rows: tuple[Any, ...]) -> None:
        self.model, self.args, self.kwargs = model, args, kwargs
        self.rows = {frame.name: frame.dim for frame in rows}
        self.in_rows: set[str] = set()
        self.observed: set[str] = set()
        self._infer: dict[str, Any] = {}

    def __call__(self, values: Values) -> Values:
        """Return what the model says of its sites, each entry by "kind:site".

        - "log_prob", scaled and masked, and without that of a length;
        - "length", that of a length, neither scaled nor masked;
        - "scale", how often a length counts, by scale and mask;
        - "weight" the same for other latents, shape batch, if it is not one.
        """
        trace: Any = poutine.trace(_Given(values)(self.model)).get_trace(*self.args, **self.kwargs)
        out: Values = {}
        for name, site in trace.nodes.items():
            if site["type"] != "sample" or site_is_subsample(site):
                continue
            if not site["is_observed"] and name not in values:  # its law is the same in model and guide
                if site["infer"].get("enumerate"):
                    raise ValueError(
                        f"NestedELBO: site {name!r} of the model is marked for enumeration, and the guide has none of "
                        "it: only TraceEnum_ELBO sums it out"
                    )
                continue
            self._infer[name] = site["infer"]
            if self.rows and self.rows.keys() <= {frame.name for frame in site["cond_indep_stack"]}:
                self.in_rows.add(name)
            fn, value = site["fn"], site["value"]
            log_prob, law = fn.log_prob(value), find_mask(fn)
            if site["is_observed"]:
                self.observed.add(name)
            elif law is not None:
                length = law.mask_law.log_prob(law.mask_of(value)) if isinstance(law, NestedLaw) else log_prob
                out[f"length:{name}"] = self.reduce(name, length.expand(log_prob.shape))
                out[f"scale:{name}"] = self.reduce(name, _weight(site, log_prob), mean=True)
                log_prob = log_prob - length
            if not site["is_observed"] and not _counts_once(site):
                out[f"weight:{name}"] = _weight(site, log_prob)
            out[f"log_prob:{name}"] = self.reduce(name, scale_and_mask(log_prob, site["scale"], site["mask"]))
        return out

    def reduce(self, name: str, x: Tensor, *, lead: int = 0, mean: bool = False) -> Tensor:
        """Sum what a site has, by element of its batch, over all but the rows, and but the first dimensions."""
        keep = [x.dim() + dim for dim in self.rows.values()] if name in self.in_rows else []
        others = [i for i in range(lead, x.dim()) if i not in keep]
        if not others:
            return x
        return x.mean(others) if mean else x.sum(others)

    def kl_weight(self, name: str) -> float:
        """Return the weight of the KL of a latent that is no mask."""
        return float(self._infer[name].get("kl_weight", 1.0))

    def length_weight(self, names: list[str]) -> float:
        """Return the weight of the KL of lengths, one for all of them as their law is joint."""
        infer = [self._infer[name] for name in names]
        weights = {float(each.get("length_weight", each.get("kl_weight", 1.0))) for each in infer}
        if len(weights) > 1:
            raise ValueError(
                f"AutoNested: sites {names} have a joint law, so that they must have one `length_weight`; "
                f"got {sorted(weights)}. Make them equal, or use latents='mean_field'"
            )
        return weights.pop()


def _counts_once(site: Any) -> bool:
    scale = site["scale"]
    return split_mask(site)[1] is None and not isinstance(scale, Tensor) and scale == 1


def _weight(site: Any, like: Tensor) -> Tensor:
    return scale_and_mask(torch.ones_like(like), site["scale"], split_mask(site)[1])
