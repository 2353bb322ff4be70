"""The one place that knows which line of ArviZ is installed: 0.x (InferenceData) or 1.x (xarray DataTree).

What it uses that ArviZ does not promise, and what breaks it:

- `arviz_stats.base.array_stats.psislw`, the fit of a Pareto tail to one row of weights: a rename, or weights in place
  of the logarithms of one over them. `test_khat_is_the_index_of_a_pareto_tail` fails then.
- `arviz_stats.loo(log_weights=, pareto_k=)` takes smoothed weights as they are: another reading of either.
  `test_correction_for_an_approximate_posterior` compares with `loo_approximate_posterior`.
- `elpd`, `se`, `p`, `elpd_i`, `pareto_k`, `good_k`, `warning` of `ELPDData`, and the columns of `compare` and
  `summary`: a rename. The tests of `loo`, of comparisons and of summaries read each of them.
- `InferenceData(**datasets)` makes groups of datasets in 0.x: `test_groups_have_dimensions_coordinates_and_attributes`.
"""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import arviz as az
import arviz_stats
import numpy as np
import pandas as pd  # type: ignore[import-untyped]
import xarray as xr

__all__ = [
    "MIN_DRAWS",
    "compare",
    "dataset",
    "datasets",
    "from_datasets",
    "from_groups",
    "group_dataset",
    "likelihood",
    "loo",
    "psis",
    "read_groups",
    "summary",
    "weights_and_khat",
]

_stats: Any = arviz_stats  # the same functions in both lines, whose types say nothing of them
_IS_LEGACY = az.__version__.startswith("0.")
MIN_DRAWS = 30  # ArviZ fits a tail to a fifth of the draws; of five 1.3 makes nothing
_ROUNDING, _UNDERFLOW = 1e-5, 700.0  # logarithms of weights that differ by less are equal, by more 1 and 0
_SEVERAL = 5  # draws of the largest weight, which then is no chance
_EVEN = 2.0  # no draw counts twice as much as the average: the tail has a shape, but it is none to fear
_COMPARISON = ["rank", "elpd", "se", "p", "elpd_diff", "dse", "weight", "warning"]

Groups = Mapping[str, Mapping[str, tuple[Any, ...]]]


def from_groups(groups: Groups, coords: Mapping[str, Any], attrs: Mapping[str, Any] | None = None) -> Any:
    """Collect named groups of variables, (dims, values) or (dims, values, attrs) each, into ArviZ's container."""
    found = {group: group_dataset(variables, coords, attrs) for group, variables in groups.items()}
    return from_datasets(found, is_tree=not _IS_LEGACY)


def group_dataset(
    variables: Mapping[str, tuple[Any, ...]], coords: Mapping[str, Any], attrs: Mapping[str, Any] | None = None
) -> xr.Dataset:
    """Return a group as a dataset, in which dimensions without coordinates are counted from 0."""
    data = xr.Dataset(variables, attrs=attrs)
    return data.assign_coords({dim: coords.get(str(dim), np.arange(n)) for dim, n in data.sizes.items()})


def read_groups(path: Path, groups: Sequence[str]) -> Any:
    """Return groups of a file of netCDF, whose values are read where they are used."""
    found = {group: xr.open_dataset(path, group=group, engine="h5netcdf") for group in groups}
    return from_datasets(found, is_tree=not _IS_LEGACY)


def from_datasets(found: Mapping[str, xr.Dataset], is_tree: bool) -> Any:
    """Collect a dataset for each group into a tree, ArviZ 1.x's container, or into that of 0.x."""
    return xr.DataTree.from_dict(dict(found)) if is_tree else az.InferenceData(**dict[str, Any](found))


def datasets(data: Any) -> dict[str, xr.Dataset]:
    """Return the groups of a container of either line as datasets."""
    if isinstance(data, xr.DataTree):
        return {name: child.to_dataset() for name, child in data.children.items()}
    return {name: data[name] for name in data.groups()}


def dataset(data: Any, group: str) -> xr.Dataset:
    """Return a group of a container of either line as a dataset."""
    found = datasets(data)
    if group not in found:
        raise ValueError(f"argument `data` must have the group {group!r}; its groups: {list(found)}")
    return found[group]


def summary(data: Any, var_names: list[str] | None = None, constant: bool = False) -> pd.DataFrame:
    """Summarise posterior draws; see `pyro_vnd.diagnostics.summary`."""
    posterior = dataset(data, "posterior")
    posterior = posterior if var_names is None else posterior[var_names]
    has_rhat = posterior.sizes["chain"] > 1 and posterior.sizes["draw"] >= 4
    tree = xr.DataTree.from_dict({"posterior": posterior})
    with np.errstate(divide="ignore", invalid="ignore"):  # R-hat of constants
        kind = "all" if has_rhat else "stats"
        table = pd.DataFrame(_stats.summary(tree, kind=kind, round_to="none"))
    varies = [flag for name in posterior.data_vars for flag in _varies(posterior[name])]
    if not constant and len(varies) == len(table):
        table = table[varies]
    if has_rhat:
        table = table[[name for name in table if not str(name).startswith(("ess_", "mcse_"))]]
        constant = table["r_hat"].isna() & (table["sd"] == 0)
        table = table.assign(r_hat=table["r_hat"].mask(constant, 1.0))
    return table.round(3)


def _varies(draws: xr.DataArray) -> np.ndarray:
    """Say of each entry of a variable whether it differs between draws; the only entry counts as if it did."""
    values = draws.transpose("chain", "draw", ...).to_numpy()
    values = values.reshape(values.shape[0] * values.shape[1], -1)
    return (values != values[0]).any(0) | (values.shape[1] == 1)


def weights_and_khat(scores: Mapping[str, tuple[Any, ...]]) -> dict[str, tuple[list[str], np.ndarray, dict[str, Any]]]:
    """Return the variables that the scores of draws are smoothed to."""
    log_weights, khat = psis(scores["elbo"][1])
    return {"weight": (["chain", "draw"], np.exp(log_weights), {}), "khat": (["chain"], khat, {})}


def psis(log_weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Smooth importance weights by a Pareto tail; return their logarithms, normalised, and k-hat.

    Where there is no tail to fit, weights are left as they are: k-hat is NaN for less than `MIN_DRAWS` of them, -inf
    where several are the largest, as weights are bounded then, at most 0 where no weight is twice the average, and inf
    where a few of them leave nothing for others or one is not a number.

    Args:
        log_weights: Shape (..., num_draws).

    Returns:
        Arrays of shape (..., num_draws) and (...).
    """
    return np.vectorize(_psis, signature="(s)->(s),()")(np.asarray(log_weights, dtype=float))


def _psis(log_weights: np.ndarray) -> tuple[np.ndarray, float]:
    num_draws, largest = len(log_weights), log_weights.max()
    if not np.isfinite(largest):
        return np.full(num_draws, np.nan), np.inf
    log_weights = log_weights - largest
    num_tail = num_draws // 5 if num_draws <= 225 else int(3 * num_draws**0.5)
    ordered = np.sort(log_weights)
    tail, cutoff = ordered[-num_tail:], ordered[-num_tail - 1] if num_draws > num_tail else -np.inf
    if num_draws >= MIN_DRAWS and tail[int(num_tail / 4 + 0.5) - 1] - cutoff > _ROUNDING and -tail[0] < _UNDERFLOW:
        # This takes the logarithms of 1 / weight, being made for likelihoods.
        smoothed, khat = _stats.base.array_stats.psislw(-log_weights)
        is_even = np.exp(log_weights).mean() > 1 / _EVEN
        return smoothed, min(float(khat), 0.0) if is_even else float(khat)
    is_bounded = (ordered > -_ROUNDING).sum() >= _SEVERAL
    khat = np.nan if num_draws < MIN_DRAWS else -np.inf if is_bounded else np.inf
    return log_weights - np.logaddexp.reduce(log_weights), khat


def likelihood(data: Any, var_name: str | None = None) -> xr.DataArray:
    """Return the log-likelihoods of the rows of an observed site, or of the only one."""
    found = dataset(data, "log_likelihood")
    if var_name is None and len(found) != 1:
        raise ValueError(f"argument `var_name` must name one of the observed sites {list(found)}")
    if var_name is not None and var_name not in found:
        raise ValueError(f"argument `var_name` must be one of the observed sites {list(found)}; got {var_name!r}")
    return found[next(iter(found)) if var_name is None else var_name]


def loo(data: Any, var_name: str | None = None, variational: bool = False) -> Any:
    """Estimate the expected log predictive density of each row from the others; see `pyro_vnd.diagnostics.loo`."""
    terms = likelihood(data, var_name)
    rows = [dim for dim in terms.dims if dim not in ("chain", "draw")]
    if terms.isnull().all(["chain", "draw"]).any():
        terms = terms.stack(observation=rows).dropna("observation", how="all").reset_index("observation")
    log_weights = -terms
    if variational:
        stats = dataset(data, "sample_stats")
        if not {"log_p", "log_q"} <= set(stats):
            raise ValueError("argument `variational` needs `log_p` and `log_q` in the group 'sample_stats' of `data`")
        log_weights = log_weights + stats["log_p"] - stats["log_q"]
    # What arviz_stats.loo and loo_approximate_posterior do, but for rows whose weights have no tail, where they raise.
    by_row = log_weights.stack(sample=("chain", "draw"))
    smoothed, khat = psis(by_row.to_numpy())
    found = _stats.loo(
        xr.DataTree.from_dict({"log_likelihood": terms.to_dataset(name=terms.name)}),
        pointwise=True,
        reff=1.0,  # draws of a guide are independent
        log_weights=by_row.copy(data=smoothed).unstack("sample"),
        pareto_k=by_row.isel(sample=0, drop=True).copy(data=khat),
    )
    if variational:  # the density of rows that were seen is to be that of the posterior, too, and not of the guide
        ratios = (stats["log_p"] - stats["log_q"]).stack(sample=("chain", "draw"))
        weighted = terms.stack(sample=("chain", "draw")) + ratios.copy(data=psis(ratios.to_numpy())[0])
        seen = np.logaddexp.reduce(weighted.transpose(..., "sample").to_numpy(), axis=-1).sum()
        found.p = seen - found.elpd
    return found


def compare(elpds: Mapping[str, Any]) -> pd.DataFrame:
    """Rank the results of `loo` by name."""
    options = {} if _IS_LEGACY else {"round_to": "none"}
    with warnings.catch_warnings():
        # arviz-stats 0.8 sorts in place, which pandas 3 deprecates.
        warnings.filterwarnings("ignore", "The inplace keyword", DeprecationWarning)
        table = pd.DataFrame(_stats.compare(dict(elpds), **options))
    # Lines differ in the sign of differences and in how they flag estimates that cannot be trusted.
    flags = [bool(elpds[str(name)].warning) for name in table.index]
    return table.assign(elpd_diff=table["elpd"] - table["elpd"].iloc[0], warning=flags)[_COMPARISON]
