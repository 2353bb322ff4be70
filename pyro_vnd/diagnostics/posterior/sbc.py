"""Simulation-based calibration: does an inference find again what a model drew, with the doubt that it claims?"""

from collections.abc import Callable, Mapping, Sequence, Set
from functools import partial
from typing import Any

import numpy as np
import torch
import xarray as xr
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from tqdm.auto import tqdm

from pyro_vnd._data import Data, as_arguments, check_call, check_whole, shapes
from pyro_vnd._inputs import takes
from pyro_vnd._sizes import check_count, check_seed, is_integer, without_values
from pyro_vnd._state import cuda_devices, module_mode, random_numbers
from pyro_vnd.diagnostics.posterior.names import plain
from pyro_vnd.diagnostics.posterior.sites import dim_names, kept_length
from pyro_vnd.distributions import OrderedMask
from pyro_vnd.distributions.nested import find_mask
from pyro_vnd.infer import module_local_params

__all__ = ["rank_uniformity", "sbc"]

Guide = Callable[..., Any]


@torch.no_grad()
def sbc(
    model: Callable[..., Any],
    infer: Callable[[dict[str, Tensor]], Guide | Mapping[str, Tensor]],
    data: Data = (),
    *,
    observed: str | Sequence[str],
    num_simulations: int = 200,
    num_posterior: int = 99,
    log_likelihood: bool = True,
    seed: int = 0,
    progress: bool = True,
) -> xr.Dataset:
    r"""Rank what the model drew among draws of the posterior, over many simulated data sets.

    A simulation draws latents $z^*$ and data $y^*$ from the model, infers the posterior from the data, and counts how
    many of L independent draws are below the truth,

    $$r = \#\{l : z_l < z^*\}, \quad z_1, \ldots, z_L \sim q(z \mid y^*),$$

    for each number in a latent site; ties are broken at random. If q is the posterior, r is uniform on 0..L. Ranks in
    the middle are of a guide that is too wide, those at both ends of one that is too narrow, and those at one end of
    one that is biased; see `rank_uniformity` and `plot_ranks`. Of masks the kept lengths are ranked.

    A guide that has learned nothing, the prior, passes for each site. It fails for the log-likelihood of the data,
    which is ranked like a site.

    Args:
        model: The model, which draws its observed sites where they are not given: `def model(x, y=None)`.
        infer: Takes the simulated values of the observed sites by name and returns a guide that was fitted to them,
            with parameters of its own (`module_local_params`) and the arguments of the model, observed sites by name;
            or draws by site, shape (num_posterior, ...), such as thinned ones of an `MCMC`.
        data: Arguments of the model that are not simulated, such as covariates: a tensor, a tuple of them in order, or
            a mapping by name, of which entries named as observed sites are left out.
        observed: Sites that are simulated.
        num_simulations: Simulated data sets, a fit each.
        num_posterior: L; L + 1 with many divisors makes even bins.
        log_likelihood: Whether to rank the log-likelihood, too: L + 1 more calls of the model a simulation, for which
            all latents must be drawn. Otherwise sites that are not, such as those summed out, have no ranks.
        seed: Seed of the simulations, whatever seeds `infer` sets.
        progress: Whether to show a progress bar.

    Returns:
        Ranks by site, `name_length` for a mask, and `log_likelihood`, shape (simulation, ...), where plates name their
        dimensions. A `NestedNormal` has both ranks. The attribute `num_posterior` is L.

    Raises:
        ValueError: If a number is not positive, `observed` names a site that the model does not draw, `infer` does
            not give L draws of latents, of all of them for the log-likelihood, or something that is ranked is NaN.

    References:
        Talts, Betancourt, Simpson, Vehtari and Gelman, "Validating Bayesian inference algorithms with simulation-based
        calibration", 2018, https://arxiv.org/abs/1804.06788; Modrák et al., "Simulation-based calibration checking for
        Bayesian computation: the choice of test quantities shapes sensitivity", 2023,
        https://arxiv.org/abs/2211.02383, for the likelihood.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(y=None):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     return pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> def infer(data):  # no need to fit a guide where the posterior is known
        ...     return lambda y: pyro.sample("mu", dist.Normal(y / 2, 0.5**0.5))
        >>> ranks = sbc(model, infer, observed="y", num_posterior=9, progress=False)
        >>> dict(ranks.sizes)
        {'simulation': 200}
        >>> bool((rank_uniformity(ranks).to_array() > 0.01).all())
        True
    """
    check_count("sbc", num_simulations=num_simulations, num_posterior=num_posterior)
    check_seed("sbc", seed)
    check_whole("sbc", data, "as each simulation is of all of them")
    observed = _site_names(observed)
    args, kwargs = as_arguments(data)
    kwargs = {name: value for name, value in kwargs.items() if name not in observed}
    if not callable(model) or isinstance(model, type):
        raise ValueError(f"sbc: argument `model` must be a model, a function or a module; got {_kind(model)}")
    check_call("sbc", model, kwargs or args)
    if not callable(infer) or not takes(infer, {}):
        raise ValueError(
            f"sbc: argument `infer` must be a function of the simulated values by site; got {_kind(infer)}"
        )
    simulations = []
    # Two seeds a simulation: an `infer` that seeds torch itself would draw the same posterior sample in all of them.
    seeds = np.random.SeedSequence(int(seed) % 2**64).generate_state(2 * num_simulations).reshape(-1, 2).tolist()
    with (
        random_numbers(seed, cuda_devices([model, *args, *kwargs.values()])),
        module_local_params(model),
        module_mode([model], training=False),
    ):
        for before, after in tqdm(seeds, desc="simulations", disable=not progress):
            torch.manual_seed(before)
            drawn: Any = poutine.trace(model).get_trace(*args, **kwargs).iter_stochastic_nodes()
            sites: dict[str, Any] = {name: site for name, site in drawn if not site_is_subsample(site)}
            unknown = [name for name in observed if name not in sites]
            if unknown:
                raise ValueError(
                    f"sbc: argument `observed` must be of what the model draws, {list(sites)}; got {unknown}"
                )
            simulated = {name: sites.pop(name)["value"] for name in observed}
            with torch.enable_grad():
                guide = infer(dict(simulated))
            torch.manual_seed(after)
            truth = {name: site["value"] for name, site in sites.items()}
            draws = _draw(guide, args, {**kwargs, **simulated}, num_posterior, truth)
            if broken := [name for name in draws if bool(truth[name].isnan().any())]:
                raise ValueError(f"sbc: argument `model` must draw numbers, which have ranks; of {broken} some are NaN")
            ranks = {}
            for name, values in draws.items():
                for variable, (dims, quantity) in _quantities(name, sites[name]).items():
                    rank = _ranks(quantity(truth[name]), quantity(values))
                    ranks[plain(variable)] = xr.DataArray(rank.cpu().numpy(), dims=[plain(dim) for dim in dims])
            if log_likelihood:
                if len(draws) < len(sites):
                    raise ValueError(
                        f"sbc: argument `log_likelihood` must be False where not all latents are drawn: "
                        f"{sorted(sites.keys() - draws.keys())} are not"
                    )
                points = [{name: values[i] for name, values in draws.items()} for i in range(num_posterior)]
                points.insert(0, truth)
                scores = torch.stack([_score(partial(model, *args, **kwargs), point, simulated) for point in points])
                if bool(scores.isnan().any()):
                    raise ValueError(
                        "sbc: argument `model` must give data a likelihood at the truth and at draws; of some it is NaN"
                    )
                ranks["log_likelihood"] = xr.DataArray(_ranks(scores[0], scores[1:]).item())
            simulations.append(xr.Dataset(ranks))
    return xr.concat(simulations, "simulation").assign_attrs(num_posterior=num_posterior)


def rank_uniformity(ranks: xr.Dataset, num_bins: int | None = None) -> xr.Dataset:
    r"""Test whether ranks are uniform, by Pearson's statistic of their histogram.

    $$\sum_b (n_b - N f_b)^2 / (N f_b),$$

    with the share $f_b$ of the L + 1 ranks in bin b, follows a chi-square law. Of m numbers that are tested at once the
    smallest p-value is to be compared with 1 / m of the level.

    Args:
        ranks: What `sbc` returned.
        num_bins: Bins of the histogram; by default at most one for ten simulations.

    Returns:
        p-values, by variable, without the dimension of the simulations.

    Raises:
        ValueError: If there are no such ranks, or `num_bins` is not from 2 to L + 1.
    """
    num_ranks, num_simulations = check_ranks("rank_uniformity", ranks)
    num_bins = default_num_bins(ranks) if num_bins is None else num_bins
    if not is_integer(num_bins) or not 2 <= num_bins <= num_ranks:
        raise ValueError(f"rank_uniformity: argument `num_bins` must be from 2 to {num_ranks}; got {num_bins!r}")
    expected = np.bincount(np.arange(num_ranks) * num_bins // num_ranks) * num_simulations / num_ranks

    def p_values(bins: np.ndarray) -> np.ndarray:
        counts = (bins[..., None] == np.arange(num_bins)).sum(-2)
        statistic = torch.as_tensor((np.square(counts - expected) / expected).sum(-1))
        half = torch.as_tensor((num_bins - 1) / 2, dtype=torch.float64)
        p: np.ndarray = torch.special.gammaincc(half, statistic / 2).numpy()
        return p

    return xr.apply_ufunc(p_values, ranks * num_bins // num_ranks, input_core_dims=[["simulation"]])


def check_ranks(function: str, ranks: Any) -> tuple[int, int]:
    """Return how many ranks and simulations there are, of what `sbc` returned; raise a ValueError if it is not that."""
    is_set = isinstance(ranks, xr.Dataset) and "num_posterior" in ranks.attrs and ranks.sizes.get("simulation", 0) > 0
    if not is_set:
        raise ValueError(
            f"{function}: argument `ranks` must be what sbc returned, an xarray.Dataset; got {_kind(ranks)}"
        )
    return ranks.attrs["num_posterior"] + 1, ranks.sizes["simulation"]


def default_num_bins(ranks: xr.Dataset) -> int:
    """Return the bins of a histogram of ranks that hold ten simulations each on average: from 2 to L + 1."""
    return min(ranks.attrs["num_posterior"] + 1, max(ranks.sizes["simulation"] // 10, 2))


def _kind(thing: Any) -> str:
    return f"the class {thing.__name__}" if isinstance(thing, type) else type(thing).__name__


def _site_names(observed: Any) -> list[str]:
    names = [observed] if isinstance(observed, str) else observed
    if not isinstance(names, Sequence | Set | Mapping) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"sbc: argument `observed` must be the name of a site, or a list of names; got {observed!r}")
    return list(names)


def _draw(
    guide: Any, args: Any, kwargs: dict[str, Any], num_draws: int, truth: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return draws of the latents that `infer` has draws of, shape (num_draws, ...) each."""
    if isinstance(guide, Mapping):
        draws = {name: guide[name] for name in truth if name in guide}
    elif not callable(guide) or isinstance(guide, type) or not takes(guide, *args, **kwargs):
        raise ValueError(
            "sbc: argument `infer` must return draws by site, or a guide that is called with the arguments of the "
            f"model, observed sites by name; got {_kind(guide)}"
        )
    else:
        with module_local_params(guide), module_mode([guide], training=False):
            traces = [poutine.trace(guide).get_trace(*args, **kwargs) for _ in range(num_draws)]
        found = [name for name in truth if name in traces[0]]
        draws = {name: torch.stack([trace.nodes[name]["value"] for trace in traces]) for name in found}
    expected = {name: (num_draws, *value.shape) for name, value in truth.items()}
    try:
        draws = {name: torch.as_tensor(values) for name, values in draws.items()}
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise ValueError(f"sbc: argument `infer` must give tensors of draws by site; got {shapes(draws)}") from None
    came = {name: without_values(values) or tuple(values.shape) for name, values in draws.items()}
    if not draws or any(came[name] != expected[name] for name in draws):
        raise ValueError(
            f"sbc: argument `infer` must give {num_draws} draws of sites among {list(truth)}; got {came}, not all of "
            f"{expected}"
        )
    if broken := [name for name, values in draws.items() if values.is_complex() or bool(values.isnan().any())]:
        raise ValueError(f"sbc: argument `infer` must give real numbers, which have ranks; of {broken} some are none")
    return draws


def _quantities(name: str, site: Any) -> dict[str, tuple[list[str], Callable[[Tensor], Tensor]]]:
    """Return what is ranked of a site: dimensions, and a function of its value."""
    dims = dim_names(name, site, site["value"], site["fn"].event_dim)
    mask = find_mask(site["fn"])
    whole = {} if isinstance(mask, OrderedMask) else {name: (dims, lambda value: value)}
    return whole if mask is None else {**whole, f"{name}_length": (dims[:-1], kept_length)}


def _ranks(truth: Tensor, draws: Tensor) -> Tensor:
    """Rank the truth among draws; where some equal it, all places among them are equally likely."""
    ties = (draws == truth).sum(0)
    return (draws < truth).sum(0) + (torch.rand(ties.shape, dtype=torch.float64) * (ties.cpu() + 1)).long().to(
        ties.device
    )


def _score(model: Any, latents: dict[str, Tensor], data: dict[str, Tensor]) -> Tensor:
    """Return the log-likelihood of data given latents."""
    trace: Any = poutine.trace(poutine.condition(model, {**latents, **data})).get_trace()
    trace.compute_log_prob(lambda name, _: name in data)
    total: Any = sum(trace.nodes[name]["log_prob_sum"] for name in data)
    return total
