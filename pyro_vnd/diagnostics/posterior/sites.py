"""What the sites of a trace are: latent, observed or deterministic, how they are shaped, and which rows count."""

from collections.abc import Iterator, Mapping
from typing import Any, Literal, cast

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer.inspect import site_is_deterministic
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import Independent

from pyro_vnd._compat import mask_of_rows
from pyro_vnd.distributions import NestedNormal
from pyro_vnd.distributions.nested import NestedLaw, find_mask, innermost

__all__ = [
    "Kind",
    "dim_names",
    "free_sites",
    "keep_rows",
    "kept_length",
    "length_probs",
    "log_q_terms",
    "num_batch_dims",
    "sites",
    "visible",
]

Kind = Literal["latent", "observed", "deterministic"]
Sites = Mapping[str, Any]  # the nodes of a trace


def sites(nodes: Sites) -> Iterator[tuple[str, Any, Kind]]:
    """Yield what a trace says about latents and data: no factors, and no rows of plates that subsample."""
    for name, site in nodes.items():
        if site["type"] != "sample" or site_is_subsample(site) or isinstance(innermost(site["fn"]), dist.Unit):
            continue
        observed = site["is_observed"] or site["infer"].get("was_observed")
        # What `poutine.reparam` leaves of a site is an observed point: a function of other latents, and no data.
        if site_is_deterministic(site) or (observed and isinstance(innermost(site["fn"]), dist.Delta)):
            yield name, site, "deterministic"
        else:
            yield name, site, "observed" if observed else "latent"


def free_sites(model: Sites, guide: Sites) -> set[str]:
    """Return the latent sites of the model that the guide leaves to it.

    Their law given the rest is the same in guide and model, so they add nothing to log p - log q.
    """
    free = {name: site for name, site, kind in sites(model) if kind == "latent" and name not in guide}
    summed = [name for name, site in free.items() if site["infer"].get("enumerate")]
    if summed:
        raise ValueError(
            f"to_arviz: argument `guide` must draw all sites of the model; {summed} are marked for enumeration and "
            "summed out, so that there are no draws of them. Add them to the guide; or, for the law of a mask and "
            "draws of it, call length_posterior(model, guide, data)"
        )
    drawn = [name for name, site, kind in sites(guide) if kind == "latent"]
    own = [name for name in drawn if not guide[name]["infer"].get("is_auxiliary")]
    if free and (not drawn or any(name not in model for name in own)):
        raise ValueError(f"to_arviz: argument `guide` must draw sites of the model, {list(free)}; it draws {drawn}")
    return set(free)


def num_batch_dims(*traces: Any) -> int:
    """Return how many dimensions the rows of sites have at most, those of plates among them."""
    laws = [
        site["fn"]
        for trace in traces
        for site in trace.nodes.values()
        if site["type"] == "sample" and not site_is_subsample(site)
    ]
    return max((len(law.batch_shape) for law in laws), default=0)


def visible(site: Any) -> Tensor | bool | None:
    """Return which rows of a site count, by `poutine.mask` or the `mask` of its law; None is for all."""
    mask = site["mask"]
    if isinstance(site["fn"], dist.MaskedDistribution):
        own = mask_of_rows(site["fn"])
        mask = own if mask is None else torch.as_tensor(mask) & own
    return cast("Tensor | bool | None", mask)


def log_q_terms(caller: str, guide: Sites, model: Sites, *, scaled: bool = True) -> dict[str, Tensor]:
    """Return the log-density of each site of a guide, by row.

    A term is scaled as its site in the model is, and rows that the model hides have none: they say nothing about data,
    and what the guide makes of them must not count either. A joint law, such as that of `AutoMultivariateNormal`, has
    no rows to leave out.
    """
    terms = {}
    for name, site in guide.items():
        if site["type"] != "sample" or site_is_subsample(site):
            continue
        # An autoguide draws "z" as "z_unconstrained", and "z" is then a point with a Jacobian.
        of_model = model.get(name.removesuffix("_unconstrained"))
        is_point = isinstance(innermost(site["fn"]), dist.Delta) and f"{name}_unconstrained" not in guide
        shown = None if of_model is None or is_point else visible(of_model)
        log_prob = _by_row(caller, name, site, shown)
        scale = (site if of_model is None else of_model)["scale"] if scaled else 1.0
        terms[name] = scale_and_mask(scale_and_mask(log_prob, scale, shown), mask=site["mask"])
    return terms


def _by_row(caller: str, name: str, site: Any, shown: Any) -> Tensor:
    """Return the log-density of a site with a dimension for the rows of a mask."""
    law = site["fn"]
    while True:
        log_prob: Tensor = law.log_prob(site["value"])
        if not isinstance(shown, Tensor) or _fits(shown, log_prob):
            return log_prob
        if not isinstance(law, Independent):
            raise ValueError(
                f"{caller}: argument `guide` must draw the rows of site {name!r} by themselves, as the model hides "
                f"some of them by a mask of shape {tuple(shown.shape)}; its law {type(law).__name__} has batch shape "
                f"{tuple(law.batch_shape)}"
            )
        law = law.base_dist


def _fits(mask: Tensor, log_prob: Tensor) -> bool:
    try:
        return torch.broadcast_shapes(mask.shape, log_prob.shape) == log_prob.shape
    except RuntimeError:
        return False


def keep_rows(rows: poutine.Trace, *traces: Any) -> None:
    """Add to a trace the rows that plates have drawn, but for those it knows, so that later runs can replay them."""
    for trace in traces:
        for name, site in trace.nodes.items() if trace is not None else ():
            if site["type"] == "sample" and site_is_subsample(site) and name not in rows:
                rows.add_node(name, **site)


def dim_names(name: str, site: Any, value: Tensor, event_dim: int) -> list[str]:
    """Name the dimensions of a value by the plates of its site, others by number."""
    names = [f"{name}_dim_{i}" for i in range(value.dim())]
    for frame in site["cond_indep_stack"]:
        # A deterministic site may have its rows among the dimensions of an event, and a value may be broadcast.
        index = value.dim() - event_dim + frame.dim if frame.vectorized else -1
        if index >= 0 and value.shape[index] == frame.size:
            names[index] = frame.name
    return names


def length_probs(site: Any) -> Tensor | None:
    """Return the law of the lengths of a mask, or of a `NestedNormal`, shape batch_shape + (K,); None for others."""
    law = find_mask(site["fn"])
    if law is None or "length_probs" in site:
        return cast("Tensor | None", site.get("length_probs"))
    return (law.mask_law if isinstance(law, NestedLaw) else law).probs


def kept_length(value: Tensor) -> Tensor:
    """Return the length of a mask, or of the value of a `NestedNormal`."""
    return NestedNormal.mask_of(value).sum(-1).long()
