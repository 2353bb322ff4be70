"""Draws of guides, models and their predictions, collected by group and site."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.inspect import site_is_deterministic
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_vnd._compat import mask_of_rows
from pyro_vnd.distributions import NestedNormal
from pyro_vnd.distributions.nested import NestedLaw, find_mask, innermost

__all__ = ["Draws", "dim_names", "keep_rows", "kept_length"]

Kind = Literal["latent", "observed", "deterministic"]
Program = Callable[[], Any]  # a model or a guide with its arguments


class Draws:
    """Values of sites, one a draw, and the names of their dimensions.

    Plates that subsample keep the rows of the first draw, so that all draws are about the same data.

    Args:
        dims: Names of the last dimensions, by site.

    Attributes:
        values: The draws of all chains in one list, by group and variable.
        dims: Names of the dimensions of a draw, by group and variable.
        coords: Coordinates, by dimension: the units of masks, from 1.
        laws: The law of the lengths of a mask in each draw, by group and site; None where rows have different ones.
    """

    def __init__(self, dims: Mapping[str, Sequence[str]]) -> None:
        self.values: dict[str, dict[str, list[np.ndarray]]] = defaultdict(lambda: defaultdict(list))
        self.dims: dict[str, dict[str, list[str]]] = defaultdict(dict)
        self.coords: dict[str, Any] = {}
        self.laws: dict[str, dict[str, list[np.ndarray | None]]] = defaultdict(lambda: defaultdict(list))
        self._given = dims
        self._rows = poutine.Trace()

    def add_posterior(self, model: Program, guide: Program, predictive: bool) -> None:
        """Draw from the guide, score the draw, and draw from the model what the guide does not, and the data anew."""
        guide_trace: Any = poutine.trace(poutine.replay(guide, trace=self._rows)).get_trace()
        model_trace: Any = self._trace(model, guide_trace)
        self._note_laws("posterior", guide_trace)
        free = _free_sites(model_trace, guide_trace)
        model_trace.compute_log_prob(lambda name, _: name not in free)
        log_p = float(sum(site.get("log_prob_sum", 0) for site in model_trace.nodes.values()))
        log_q = float(guide_trace.log_prob_sum())
        for name, value in {"log_p": log_p, "log_q": log_q, "elbo": log_p - log_q}.items():
            self.add("sample_stats", name, value, [])
        has_data = False
        for name, site, kind in _sites(model_trace):
            if kind == "observed":
                self._add_observed(name, site)
                has_data = True
            elif name not in free:
                self._add_site("posterior", name, site)
        if predictive and has_data:
            try:
                model_trace = self._trace(poutine.uncondition(model), guide_trace)
            except NotImplementedError as error:
                raise ValueError(
                    f"to_arviz: argument `predictive` must be False: an observed site has no draws ({error})"
                ) from error
        for name, site, kind in _sites(model_trace) if predictive else ():
            if name in free or kind == "observed":
                self._add_site("posterior_predictive", name, site)

    def add_prior(self, model: Program, predictive: bool) -> None:
        """Draw latents, and the data if they are to be predicted, from the model; after draws of the posterior."""
        latent = self.values["posterior"]
        trace = self._trace(poutine.uncondition(model))
        self._note_laws("prior", trace)
        for name, site, _ in _sites(trace):
            if name in latent or predictive:
                self._add_site("prior" if name in latent else "prior_predictive", name, site)

    def add(self, group: str, name: str, value: Any, dims: list[str]) -> None:
        """Add a value, the next draw if there is one before."""
        array = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
        drawn = self.values[group][name]
        if drawn and array.shape != drawn[0].shape:
            raise ValueError(
                f"to_arviz: draws of {name!r} must have one shape in all draws and fits; got {drawn[0].shape} and "
                f"{array.shape}"
            )
        drawn.append(array)
        self.dims[group][name] = dims

    def groups(self, num_fits: int) -> dict[str, dict[str, tuple[list[str], np.ndarray, dict[str, Any]]]]:
        """Return dimensions, values and attributes of variables by group, draws of the fits apart as chains."""
        known = {name for variables in self.values.values() for name in variables}
        unknown = sorted(set(self._given) - known)
        if unknown:
            raise ValueError(f"to_arviz: argument `dims` names {unknown}; variables: {sorted(known)}")
        return {
            group: {name: self._variable(group, name, num_fits) for name in variables}
            for group, variables in self.values.items()
        }

    def _variable(self, group: str, name: str, num_fits: int) -> tuple[list[str], np.ndarray, dict[str, Any]]:
        drawn, dims = self.values[group][name], self.dims[group][name]
        attrs: dict[str, Any] = {"units": "nats"} if group in ("log_likelihood", "sample_stats") else {}
        attrs |= self._law(group, name, num_fits)
        if group in ("observed_data", "constant_data"):
            return dims, drawn[0], attrs
        num_draws = max(len(other) for other in self.values[group].values())
        if len(drawn) != num_draws:
            raise ValueError(
                f"to_arviz: site {name!r} must be in all draws and fits; it is in {len(drawn)} of {num_draws}"
            )
        return ["chain", "draw", *dims], np.stack(drawn).reshape(num_fits, -1, *drawn[0].shape), attrs

    def _trace(self, model: Program, guide_trace: Any = None) -> Any:
        replayed = poutine.replay(model, trace=self._rows)
        if guide_trace is not None:
            replayed = poutine.replay(replayed, trace=guide_trace)
        trace: Any = poutine.trace(replayed).get_trace()
        keep_rows(self._rows, trace, guide_trace)
        return trace

    def _add_site(self, group: str, name: str, site: Any) -> None:
        """Add the value of a site, and the length of a mask."""
        value, event_dim = site["value"], site["fn"].event_dim
        if find_mask(site["fn"]) is None:
            self.add(group, name, value, self._dim_names(name, site, value, event_dim))
            return
        names = self._dim_names(name, site, value, event_dim, unit=f"{name}_unit")
        self.add(group, name, value, names)
        self.add(group, f"{name}_length", kept_length(value), names[:-1])
        self.coords[names[-1]] = np.arange(1, value.shape[-1] + 1)

    def _note_laws(self, group: str, trace: Any) -> None:
        for name, site, _ in _sites(trace):
            law = find_mask(site["fn"])
            if law is not None:
                probs = (law.mask_law if isinstance(law, NestedLaw) else law).probs.detach().cpu().double()
                rows = probs.reshape(-1, probs.shape[-1])
                self.laws[group][name].append(rows[0].numpy() if bool((rows == rows[0]).all()) else None)

    def _law(self, group: str, variable: str, num_fits: int) -> dict[str, Any]:
        """Return the attribute "law" of the lengths of a mask, if all draws of a fit, and all rows, have the same."""
        noted = self.laws[group].get(variable.removesuffix("_length"), [])
        known = [law for law in noted if law is not None]
        if not variable.endswith("_length") or not known or len(known) < len(noted):
            return {}
        laws = np.stack(known).reshape(num_fits, -1, len(known[0]))
        return {"law": laws[:, 0].ravel()} if (laws == laws[:, :1]).all() else {}

    def _add_observed(self, name: str, site: Any) -> None:
        value, event_dim = torch.as_tensor(site["value"]), site["fn"].event_dim
        if name not in self.values["observed_data"]:
            self.add("observed_data", name, value, self._dim_names(name, site, value, event_dim))
        log_prob, mask = site["unscaled_log_prob"], site["mask"]
        if isinstance(site["fn"], dist.MaskedDistribution):
            own = mask_of_rows(site["fn"])
            mask = own if mask is None else torch.as_tensor(mask) & own
        if mask is not None:
            log_prob = torch.where(torch.as_tensor(mask, device=log_prob.device), log_prob, torch.nan)
        names = self._dim_names(name, site, log_prob, 0, skip=event_dim)
        self.add("log_likelihood", name, log_prob, names)

    def _dim_names(
        self, name: str, site: Any, value: Tensor, event_dim: int, *, skip: int = 0, unit: str | None = None
    ) -> list[str]:
        """Name the dimensions of a value: plates by name, the last ones as the caller does, but for `skip` of those."""
        names = dim_names(name, site, value, event_dim)
        if unit is not None:
            names[-1] = unit
        return self.rename(name, names, skip)

    def rename(self, name: str, names: list[str], skip: int = 0) -> list[str]:
        """Give the last dimensions of a variable the names that the caller has for them, without the last `skip`."""
        given = list(self._given.get(name, ()))
        given = given[: max(len(given) - skip, 0)]
        if len(given) > len(names):
            raise ValueError(
                f"to_arviz: argument `dims` names {len(given)} dimensions {given} of {name!r}; it has {len(names)}"
            )
        return names[: len(names) - len(given)] + given


def _sites(trace: Any) -> Iterator[tuple[str, Any, Kind]]:
    """Yield what a trace says about latents and data: no factors, and no rows of plates that subsample."""
    for name, site in trace.nodes.items():
        if site["type"] != "sample" or site_is_subsample(site) or isinstance(innermost(site["fn"]), dist.Unit):
            continue
        if site_is_deterministic(site):
            yield name, site, "deterministic"
        else:
            observed = site["is_observed"] or site["infer"].get("was_observed")
            yield name, site, "observed" if observed else "latent"


def _free_sites(model_trace: Any, guide_trace: Any) -> set[str]:
    """Return the latent sites of the model that the guide leaves to it.

    Their law given the rest is the same in guide and model, so they add nothing to log p - log q.
    """
    free = {name: site for name, site, kind in _sites(model_trace) if kind == "latent" and name not in guide_trace}
    summed = [name for name, site in free.items() if site["infer"].get("enumerate")]
    if summed:
        raise ValueError(
            f"to_arviz: argument `guide` must draw all sites of the model; {summed} are marked for enumeration and "
            "summed out, so that there are no draws of them. Add them to the guide, or get their law from "
            "TraceEnum_ELBO().compute_marginals(model, guide, *args) and draw from that in a guide"
        )
    drawn = [name for name, site, kind in _sites(guide_trace) if kind == "latent"]
    own = [name for name in drawn if not guide_trace.nodes[name]["infer"].get("is_auxiliary")]
    if free and (not drawn or any(name not in model_trace for name in own)):
        raise ValueError(f"to_arviz: argument `guide` must draw sites of the model, {list(free)}; it draws {drawn}")
    return set(free)


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


def kept_length(value: Tensor) -> Tensor:
    """Return the length of a mask, or of the value of a `NestedNormal`."""
    return NestedNormal.mask_of(value).sum(-1).long()
