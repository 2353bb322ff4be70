"""What a model has at its latents in one call, for guides and objectives: rows of plates, hidden rows, scales."""

import math
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.distributions import Delta, Independent, MaskedDistribution
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import biject_to

from pyro_vnd._compat import mask_of_rows
from pyro_vnd._state import cuda_devices
from pyro_vnd.distributions import OrderedMask, RelaxedOrderedMask
from pyro_vnd.distributions.nested import innermost

__all__ = [
    "AsInModel",
    "ModelRun",
    "in_plates",
    "is_mask",
    "is_plain",
    "masked_like",
    "owner_of",
    "run_model",
    "split_mask",
    "visible_entries",
    "weight_in_model",
]

Mask = Tensor | bool | None


class ModelRun(NamedTuple):
    """Sites of one call of a model.

    Attributes:
        sites: Latents by name, as in a trace.
        rows: Rows of the plates to which the model gives them, `pyro.plate(..., subsample=rows)`, by name.
    """

    sites: dict[str, Any]
    rows: dict[str, Tensor]


class _Rows(Messenger):
    """Hand rows to plates that would draw them, and remember those that the model gives."""

    def __init__(self, rows: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.rows, self.given = rows, {}  # type: ignore[var-annotated]

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            if msg["value"] is not None:
                self.given[msg["name"]] = torch.as_tensor(msg["value"])
            elif msg["name"] in self.rows:
                msg["value"] = self.rows[msg["name"]]


@torch.no_grad()
def run_model(model: Any, args: Any, kwargs: Any, rows: Mapping[str, Tensor] | None = None) -> ModelRun:
    """Run a model, unseen by the handlers around it, and give the random numbers back that it takes.

    Args:
        model: The model.
        args: Its arguments.
        kwargs: The same, by name.
        rows: Rows of plates that would draw them.

    Returns:
        Its latents, drawn from the prior, and the rows that it gives to plates.
    """
    devices = cuda_devices([model, *args, *kwargs.values()])
    with torch.random.fork_rng(devices), poutine.block(), _Rows(rows or {}) as messenger:
        trace = poutine.trace(model).get_trace(*args, **kwargs)
    sites = {name: site for name, site in trace.iter_stochastic_nodes() if not site_is_subsample(site)}
    return ModelRun(sites, messenger.given)


class AsInModel(Messenger):
    """Give each site of a guide the mask and the scale that its latent has in the model, beside those of plates.

    Args:
        sites: Latents of the model in this call.
    """

    def __init__(self, sites: Mapping[str, Any]) -> None:
        super().__init__()
        self.sites = sites

    def _pyro_sample(self, msg: Any) -> None:
        site = owner_of(msg["name"], self.sites)
        if site is not None:
            msg["fn"] = masked_like(msg["fn"], site["fn"])
            msg["mask"] = _both(msg["mask"], site["mask"])
            msg["scale"] = msg["scale"] * _own_scale(site)


def is_plain(site: Any) -> bool:
    """Say whether a latent of a model has neither a mask nor a scale but those of plates."""
    scale = _own_scale(site)
    return visible_entries(site) is None and not isinstance(scale, Tensor) and math.isclose(scale, 1.0)


def is_mask(fn: Any) -> bool:
    """Say whether a law is about a mask, hard or soft, and nothing else."""
    return isinstance(innermost(fn), OrderedMask | RelaxedOrderedMask)


def owner_of(name: str, sites: Mapping[str, Any]) -> Any | None:
    """Return the latent that a site of a guide is for: `AutoNormal` draws "w" as "w_unconstrained", too."""
    return sites.get(name) or sites.get(name.removesuffix("_unconstrained"))


def _own_scale(site: Any) -> Any:
    scale = site["scale"]
    for frame in site["cond_indep_stack"]:
        if frame.full_size not in (None, frame.size):
            scale = scale / (frame.full_size / frame.size)
    return scale


def in_plates(plates: Mapping[str, Any], frames: Iterable[Any]) -> ExitStack:
    """Return a context in all plates of some frames."""
    with ExitStack() as stack:
        for frame in frames:
            stack.enter_context(plates[frame.name])
        return stack.pop_all()


def weight_in_model(site: Any, one: Tensor) -> Tensor:
    """Return how much each element of the batch of a latent counts: its masks, and its scale but for that of plates."""
    _, mask = split_mask(site)
    return scale_and_mask(one, _own_scale(site), mask)


def masked_like(q: Any, p: Any) -> Any:
    """Return the law q without masks of its own, made by `law.mask(...)`, and with those of p, also inside an event.

    The log-density of a point is that of the transform to the support of p, entry by entry, as autoguides have it.
    """
    if not hasattr(p, "base_dist") and not hasattr(q, "base_dist"):  # as most are
        return q
    if isinstance(q, MaskedDistribution):
        return masked_like(q.base_dist, p)
    if isinstance(p, MaskedDistribution):
        return masked_like(q, p.base_dist).mask(mask_of_rows(p))
    if isinstance(p, Independent) and _has_mask(p):
        ndims = p.reinterpreted_batch_ndims
        if isinstance(q, Delta) and q.event_dim >= ndims:
            q = _by_entry(q, p.base_dist.support, ndims)
        if isinstance(q, Independent) and q.reinterpreted_batch_ndims == ndims:
            return masked_like(q.base_dist, p.base_dist).to_event(ndims)
    return q


def _has_mask(fn: Any) -> bool:
    return isinstance(fn, MaskedDistribution) or (hasattr(fn, "base_dist") and _has_mask(fn.base_dist))


def _by_entry(q: Delta, support: Any, ndims: int) -> Any:
    log_density: Any = 0.0
    if q.log_density.any():
        transform = biject_to(support)
        log_density = -transform.log_abs_det_jacobian(transform.inv(q.v), q.v)
    return Delta(q.v, log_density, event_dim=q.event_dim - ndims).to_event(ndims)


def split_mask(site: Any) -> tuple[Any, Mask]:
    """Return the law of a site without masks of whole events, and these together with the mask of the site."""
    fn, mask = site["fn"], site["mask"]
    while hasattr(fn, "base_dist") and isinstance(fn, MaskedDistribution):
        fn, mask = fn.base_dist, _both(mask, mask_of_rows(fn))
    return fn, mask


def visible_entries(site: Any) -> Mask:
    """Return what a site does not hide, for the batch shape of its innermost law; None if it has no mask at all."""
    fn, mask = split_mask(site)
    while hasattr(fn, "base_dist"):
        if isinstance(fn, Independent) and isinstance(mask, Tensor):
            mask = mask[(..., *[None] * fn.reinterpreted_batch_ndims)]
        fn, mask = split_mask({"fn": fn.base_dist, "mask": mask})
    return mask


def _both(a: Mask, b: Mask) -> Mask:
    if a is None or b is None:
        return b if a is None else a
    return a & b
