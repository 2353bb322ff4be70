"""Draws of guides, models and their predictions, collected by group and site."""

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_vnd.diagnostics.posterior.names import plain
from pyro_vnd.diagnostics.posterior.runs import Draw
from pyro_vnd.diagnostics.posterior.sites import Kind, dim_names, kept_length, length_probs, sites, visible
from pyro_vnd.distributions.nested import find_mask

__all__ = ["Draws"]


class Draws:
    """Values of sites, one a draw, and the names of their dimensions.

    Names are those of the model, made `plain` for xarray.

    Args:
        dims: Names of the last dimensions, by site.
        only: The sites to collect; None is for all.

    Attributes:
        values: The draws of all chains in one list, by group and variable.
        dims: Names of the dimensions of a draw, by group and variable.
        coords: Coordinates, by dimension: the units of masks, from 1.
        laws: The law of the lengths of a mask in each draw, by group and site; None where rows have different ones.
    """

    def __init__(self, dims: Mapping[str, Sequence[str]], only: Collection[str] | None = None) -> None:
        self.values: dict[str, dict[str, list[np.ndarray]]] = defaultdict(lambda: defaultdict(list))
        self.dims: dict[str, dict[str, list[str]]] = defaultdict(dict)
        self.coords: dict[str, Any] = {}
        self.laws: dict[str, dict[str, list[np.ndarray | None]]] = defaultdict(lambda: defaultdict(list))
        self._given = {plain(name): list(names) for name, names in dims.items()}
        self._only = None if only is None else {plain(name): name for name in only}
        self._owners: dict[tuple[str, str], str] = {}  # of variables and dimensions, by plain name

    def add_posterior(self, draw: Draw) -> None:
        """Add a draw of the guide and its scores, the log-likelihood of the data, and predictions."""
        if not self.values:
            self._check_only(draw.model)
        self._note_laws("posterior", draw.guide)
        for name, value in {"log_p": draw.log_p, "log_q": draw.log_q, "elbo": draw.log_p - draw.log_q}.items():
            self.add("sample_stats", name, value, [])
        for name, site, kind in self._wanted(draw.model):
            if kind == "observed":
                self._add_observed(name, site)
            elif name not in draw.free:
                self._add_site("posterior", name, site)
        for name, site, kind in self._wanted(draw.predicted):
            if name in draw.free or kind == "observed":
                self._add_site("posterior_predictive", name, site)

    def add_prior(self, nodes: Mapping[str, Any], predictive: bool) -> None:
        """Add a draw of the model: latents, and data if they are to be predicted; after draws of the posterior."""
        latent = self.values["posterior"]
        self._note_laws("prior", nodes)
        for name, site, _ in self._wanted(nodes):
            if plain(name) in latent or predictive:
                self._add_site("prior" if plain(name) in latent else "prior_predictive", name, site)

    def add(self, group: str, name: str, value: Any, dims: Sequence[str], owner: str | None = None) -> None:
        """Add a value of a variable, the next draw if there is one before.

        Args:
            group: Group of ArviZ.
            name: Name of the variable.
            value: A tensor, array or number.
            dims: Names of its dimensions.
            owner: What the variable is about, a site, if that has another name.
        """
        array = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
        variable = self._claim("variable", name, owner or name)
        drawn = self.values[group][variable]
        if drawn and array.shape != drawn[0].shape:
            raise ValueError(
                f"to_arviz: draws of {name!r} must have one shape in all draws and fits; got {drawn[0].shape} and "
                f"{array.shape}"
            )
        drawn.append(array)
        self.dims[group][variable] = [self._claim("dimension", dim, dim) for dim in dims]

    def groups(self, num_fits: int) -> dict[str, dict[str, tuple[list[str], np.ndarray, dict[str, Any]]]]:
        """Return dimensions, values and attributes of variables by group, draws of the fits apart as chains."""
        known = {name for variables in self.values.values() for name in variables}
        unknown = sorted(set(self._given) - known)
        if unknown:
            raise ValueError(f"to_arviz: argument `dims` names {unknown}; variables: {sorted(known)}")
        return {
            group: {name: self._variable(group, name, num_fits) for name in variables}
            for group, variables in self.values.items()
            if variables
        }

    def rename(self, name: str, names: list[str], skip: int = 0) -> list[str]:
        """Give the last dimensions of a variable the names that the caller has for them, without the last `skip`."""
        given = self._given.get(plain(name), [])
        given = given[: max(len(given) - skip, 0)]
        if len(given) > len(names):
            raise ValueError(
                f"to_arviz: argument `dims` names {len(given)} dimensions {given} of {name!r}; it has {len(names)}"
            )
        return names[: len(names) - len(given)] + given

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

    def _add_site(self, group: str, name: str, site: Any) -> None:
        """Add the value of a site, and the length of a mask."""
        value, event_dim = site["value"], site["fn"].event_dim
        if find_mask(site["fn"]) is None:
            self.add(group, name, value, self._dim_names(name, site, value, event_dim))
            return
        names = self._dim_names(name, site, value, event_dim, unit=f"{name}_unit")
        self.add(group, name, value, names)
        self.add(group, f"{name}_length", kept_length(value), names[:-1], owner=name)
        self.coords[plain(names[-1])] = np.arange(1, value.shape[-1] + 1)

    def _note_laws(self, group: str, nodes: Mapping[str, Any]) -> None:
        for name, site, _ in sites(nodes):
            probs = length_probs(site)
            if probs is not None:
                rows = probs.detach().cpu().double().reshape(-1, probs.shape[-1])
                self.laws[group][plain(name)].append(rows[0].numpy() if bool((rows == rows[0]).all()) else None)

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
        if plain(name) not in self.values["observed_data"]:
            self.add("observed_data", name, value, self._dim_names(name, site, value, event_dim))
        log_prob, mask = site["unscaled_log_prob"], visible(site)
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

    def _claim(self, kind: str, name: str, owner: str) -> str:
        """Return the plain name of a variable or dimension, which belongs to one owner."""
        before = self._owners.setdefault((kind, plain(name)), owner)
        if before != owner:
            raise ValueError(
                f"to_arviz: {before!r} and {owner!r} would both make the {kind} {plain(name)!r}; rename one of them"
            )
        return plain(name)

    def _wanted(self, nodes: Mapping[str, Any]) -> Iterator[tuple[str, Any, Kind]]:
        return (found for found in sites(nodes) if self._only is None or plain(found[0]) in self._only)

    def _check_only(self, nodes: Mapping[str, Any]) -> None:
        known = [name for name, _, _ in sites(nodes)]
        found = {plain(name) for name in known}
        unknown = [name for key, name in (self._only or {}).items() if key not in found]
        if unknown:
            raise ValueError(f"to_arviz: argument `sites` names {unknown}; sites of the model: {known}")
