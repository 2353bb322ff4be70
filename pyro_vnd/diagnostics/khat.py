"""Is the guide close enough to the posterior? The k-hat of its importance ratios, and draws corrected by them."""

from typing import Any

import numpy as np
import xarray as xr

from pyro_vnd.diagnostics._arviz import dataset, psis

__all__ = ["KHAT_LABELS", "khat", "resample"]

KHAT_LABELS = {"long_name": "Pareto k-hat of the importance ratios", "units": "1"}


def khat(data: Any) -> xr.DataArray:
    r"""Measure how far a guide is from the posterior, by the tail of its importance ratios.

    $$r = \frac{p(x, z)}{q(z)}, \quad z \sim q,$$

    have 1 / k finite moments, and k-hat estimates k from the largest of them. Below .5 the guide is good; up to .7 it
    is good enough for `resample` to correct it; above it misses mass of the posterior, and its draws are about
    something else. k-hat is about all latents at once, and grows with their number: a mean-field guide of a large net
    has a large k-hat, though its predictions may be good. Where the model has rows with latents of their own,
    `khat_by_row` says which of them are bad.

    There is no k-hat of a single site: its ratio $p(z_i \mid x) / q(z_i)$ is of marginal densities, and that of the
    posterior is what nobody knows. The ratio above is a product over sites only where they are independent in the
    posterior.

    Args:
        data: What `to_arviz` returned; from 1,000 draws k-hat has an error of about .1.

    Returns:
        k-hat of each chain, a fit, shape (chain,); NaN for less than 25 draws, -inf where the largest ratios are equal,
        as they are bounded then. A guide that is the posterior has equal ratios.

    Raises:
        ValueError: If the data have no `log_p` and `log_q`, or one of them is NaN.

    References:
        Yao, Vehtari, Simpson and Gelman, "Yes, but did it work? Evaluating variational inference", 2018,
        https://arxiv.org/abs/1802.02538; Vehtari et al., "Pareto smoothed importance sampling", 2024,
        https://arxiv.org/abs/1507.02646.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_vnd.diagnostics import to_arviz
        >>> def model():
        ...     pyro.sample("z", dist.Normal(0.0, 1.0))
        >>> def off():
        ...     pyro.sample("z", dist.Normal(2.0, 0.5))
        >>> [bool(khat(to_arviz(model, guide, num_samples=1000)) < 0.7) for guide in (model, off)]
        [True, False]
    """
    return xr.DataArray(psis(_log_ratios("khat", data))[1], dims="chain", name="khat", attrs=KHAT_LABELS)


def resample(data: Any, num_samples: int | None = None, *, threshold: float = 0.7, seed: int = 0) -> Any:
    r"""Turn draws of the guide into draws of the posterior, by importance resampling.

    A draw is taken with a probability in proportion to its Pareto-smoothed ratio $p(x, z) / q(z)$; the sample is
    systematic, so that a draw with weight w is there $\lfloor S w \rfloor$ or $\lceil S w \rceil$ times. The better the
    guide, the more draws are different.

    Args:
        data: What `to_arviz` returned, the more draws the better.
        num_samples: S, draws of each chain; by default as many as there are.
        threshold: Largest k-hat at which the ratios are trusted.
        seed: Seed of the resampling.

    Returns:
        The same container with draws of the posterior, and all that belongs to them, in random order. Of
        `sample_stats` it has `log_p` only, as the draws are no longer those of the guide.

    Raises:
        ValueError: If k-hat of a chain is above the threshold, `num_samples` is not positive, or `log_p` and `log_q`
            are missing or NaN.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_vnd.diagnostics import to_arviz
        >>> def model():
        ...     pyro.sample("z", dist.Normal(0.0, 1.0))
        >>> def shifted():
        ...     pyro.sample("z", dist.Normal(0.3, 1.1))
        >>> data = to_arviz(model, shifted, num_samples=4000)
        >>> [round(d.posterior["z"].mean().item(), 1) for d in (data, resample(data))]
        [0.3, 0.0]
    """
    log_ratios = _log_ratios("resample", data)
    num_samples = log_ratios.shape[-1] if num_samples is None else num_samples
    if num_samples < 1:
        raise ValueError(f"resample: argument `num_samples` must be at least 1; got {num_samples}")
    log_weights, khats = psis(log_ratios)
    if not (khats <= threshold).all():
        raise ValueError(
            f"resample: k-hat must be at most {threshold} in each chain; got {', '.join(f'{k:.2f}' for k in khats)}. "
            "The guide misses mass of the posterior, which weights cannot bring back, and more draws seldom do: fit "
            "for longer, or give the guide more freedom, as by base=AutoMultivariateNormal of AutoNested, or use MCMC. "
            "NaN is for less than 25 draws."
        )
    random = np.random.default_rng(seed)
    index = np.stack([_systematic(np.exp(chain), num_samples, random) for chain in log_weights])
    picked = {
        "chain": xr.DataArray(np.arange(len(index)), dims="chain"),
        "draw": xr.DataArray(index, dims=["chain", "draw"]),
    }
    groups = {}
    for name in data.children if isinstance(data, xr.DataTree) else data.groups():
        groups[name] = dataset(data, name)
        if "draw" in groups[name].dims and not name.startswith("prior"):
            kept = groups[name][["log_p"]] if name == "sample_stats" else groups[name]
            groups[name] = kept.isel(picked).assign_coords(draw=np.arange(num_samples))
    return xr.DataTree.from_dict(groups) if isinstance(data, xr.DataTree) else type(data)(**groups)


def _systematic(weights: np.ndarray, num_samples: int, random: np.random.Generator) -> np.ndarray:
    bounds = np.cumsum(weights)
    places = (np.arange(num_samples) + random.random()) / num_samples
    index = np.searchsorted(bounds[:-1] / bounds[-1], places, side="right")
    return random.permutation(index)


def _log_ratios(caller: str, data: Any) -> np.ndarray:
    stats = dataset(data, "sample_stats")
    missing = {"log_p", "log_q"} - set(stats.data_vars)
    if missing:
        raise ValueError(
            f"{caller}: group 'sample_stats' of `data` must have log_p and log_q; it lacks {sorted(missing)}"
        )
    log_ratios: np.ndarray = (stats["log_p"] - stats["log_q"]).transpose("chain", "draw").to_numpy()
    if np.isnan(log_ratios).any():
        raise ValueError(f"{caller}: log_p - log_q of `data` must be numbers; {np.isnan(log_ratios).sum()} are NaN")
    return log_ratios
