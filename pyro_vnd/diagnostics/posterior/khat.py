"""Whether draws of a guide can be taken for draws of the posterior, for a whole fit and by row."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
import xarray as xr
from pyro import poutine
from pyro.distributions import Delta
from pyro.distributions.util import scale_and_mask
from pyro.poutine.util import site_is_subsample
from tqdm.auto import tqdm

from pyro_vnd._data import Data, as_arguments, batches_of, check_call, is_tensors, named_parts
from pyro_vnd._sizes import is_integer
from pyro_vnd._state import cuda_devices, module_mode, random_numbers
from pyro_vnd.diagnostics.posterior._arviz import MIN_DRAWS, dataset, datasets, from_datasets, psis
from pyro_vnd.diagnostics.posterior.names import plain
from pyro_vnd.diagnostics.posterior.sites import keep_rows, log_q_terms
from pyro_vnd.distributions.nested import innermost
from pyro_vnd.infer import module_local_params

__all__ = ["KHAT_LABELS", "THRESHOLD", "guide_khat", "khat", "khat_by_row", "resample"]

THRESHOLD = 0.7  # of k-hat, up to which weights can be trusted
KHAT_LABELS = {"long_name": "Pareto k-hat of the importance ratios", "units": "1"}


def khat(data: Any) -> xr.DataArray:
    r"""Measure how far a guide is from the posterior, by the tail of its importance ratios.

    $$r = \frac{p(x, z)}{q(z)}, \quad z \sim q,$$

    have 1 / k finite moments, and k-hat estimates k from the largest of them. Below .5 the guide is good; up to .7 it
    is good enough for `resample` to correct it; above it misses mass of the posterior, and its draws are about
    something else. Where the model has rows with latents of their own, `khat_by_row` says which of them are bad.

    k-hat is about all latents at once, and grows with their number. For a net it judges the joint law of thousands of
    weights, and around 6 is usual: weights are then not corrected by `resample`, nor rows left out by `loo`, but
    predictions may be good. Judge those by scores of held-out rows, as `evaluate_widths` does.

    There is no k-hat of a single site: its ratio $p(z_i \mid x) / q(z_i)$ is of marginal densities, and that of the
    posterior is what nobody knows. The ratio above is a product over sites only where they are independent in the
    posterior.

    Args:
        data: What `to_arviz` returned; from 1,000 draws k-hat has an error of about .1.

    Returns:
        k-hat of each chain, a fit, shape (chain,); -inf where the largest ratios are equal, as they are bounded then. A
        guide that is the posterior has equal ratios.

    Raises:
        ValueError: If a chain has less than 30 draws, or the data have no `log_p` and `log_q`, or one of them is NaN.

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
    return guide_khat("khat", data)


def guide_khat(caller: str, data: Any) -> xr.DataArray:
    """Return k-hat of each chain; errors are those of the caller."""
    return xr.DataArray(psis(_log_ratios(caller, data))[1], dims="chain", name="khat", attrs=KHAT_LABELS)


def resample(data: Any, num_samples: int | None = None, *, threshold: float = THRESHOLD, seed: int = 0) -> Any:
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
        ValueError: If k-hat of a chain is above the threshold, a chain has less than 30 draws, `num_samples` is not
            positive, or `log_p` and `log_q` are missing or NaN.

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
            "for longer, or let other latents know the lengths, AutoNested(model, latents='conditional'), or use MCMC."
        )
    random = np.random.default_rng(seed)
    index = np.stack([_systematic(np.exp(chain), num_samples, random) for chain in log_weights])
    picked = {
        "chain": xr.DataArray(np.arange(len(index)), dims="chain"),
        "draw": xr.DataArray(index, dims=["chain", "draw"]),
    }
    groups = datasets(data)
    for name, group in groups.items():
        if "draw" in group.dims and not name.startswith("prior"):
            kept = group[["log_p"]] if name == "sample_stats" else group
            groups[name] = kept.isel(picked).assign_coords(draw=np.arange(num_samples))
    return from_datasets(groups, is_tree=isinstance(data, xr.DataTree))


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
    if log_ratios.shape[-1] < MIN_DRAWS:
        raise ValueError(
            f"{caller}: argument `data` must have at least {MIN_DRAWS} draws a chain, of which k-hat can be told; got "
            f"{log_ratios.shape[-1]}. Call to_arviz with more `num_samples`"
        )
    return log_ratios


@torch.no_grad()
def khat_by_row(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    data: Data,
    *,
    plate: str = "data",
    num_samples: int = 1000,
    batch_size: int | None = None,
    progress: bool = False,
    seed: int | None = 0,
) -> xr.DataArray:
    r"""Measure how far a guide is from the posterior of the latents of each row of the data.

    $$r_n = \frac{p(x_n, z_n \mid w)}{q(z_n \mid w)}, \quad w, z \sim q,$$

    where $z_n$ are the latents of row n, in the plate, and w all other latents. It is defined where

    - given w, rows are independent in the model: no site outside the plate depends on one inside. Then
      $p(z_n \mid x, w) \propto p(x_n, z_n \mid w)$;
    - rows of the guide are independent given w: the guide draws them in the same plate, and no layer, such as a
      BatchNorm in training mode, mixes them. Modules are put into evaluation mode.

    If all latents are in the plate, and so in an autoencoder, these are the ratios of row n, exactly.
    Otherwise w is from q in the place of its posterior given all rows but n, from which its posterior given all of them
    differs little where rows are many. Scales of sites, as of a mini-batch, do not count, nor do latents that the model
    hides by a mask.

    Args:
        model: The model.
        guide: Its trained guide; parameters are its own (`module_local_params`).
        data: Arguments of both, the same as of `fit`: a tensor, a tuple of them in order, or a mapping by name; or a
            `Dataset`, or batches, each of which has draws of its own.
        plate: Name of the plate over the rows of the data.
        num_samples: Draws of all latents, at least 30; memory holds as many numbers for each row of a batch.
        batch_size: Rows of a batch; by default tensors are taken whole, and data sets in batches of 256.
        progress: Whether to show a progress bar.
        seed: Seed of the draws; None goes on with the caller's random numbers.

    Returns:
        k-hat of each row, shape (rows,), with the dimension of the plate's name; read as that of `khat`.

    Raises:
        ValueError: If there are less than 30 draws, no site is in the plate, or rows have no ratio of their own: a
            latent is drawn outside the plate by the guide, as by `AutoMultivariateNormal`, or is a point, or is not
            drawn.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):  # the posterior is Normal(x / 2, sqrt(1 / 2)): the last row is off
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(torch.tensor([0.4, 1.2, -3.0]), 0.5**0.5))
        >>> (khat_by_row(model, guide, torch.tensor([1.0, 2.0, 3.0])) < 0.7).values
        array([ True,  True, False])
    """
    if not is_integer(num_samples) or num_samples < MIN_DRAWS:
        raise ValueError(f"khat_by_row: argument `num_samples` must be at least {MIN_DRAWS}; got {num_samples}")
    tensors = [*named_parts(data).values()] if is_tensors(data) else []
    every: Iterable[Data] = [data] if tensors and batch_size is None else batches_of(data, batch_size or 256)
    khats = []
    with (
        module_local_params(model, guide),
        module_mode([model, guide], training=False),
        random_numbers(seed, cuda_devices([model, guide, *tensors])),
    ):
        for batch in every:
            draws = tqdm(range(num_samples), desc="draws", disable=not progress)
            khats.append(psis(_log_ratios_by_row(model, guide, batch, plate, draws))[1])
    if not khats:
        raise ValueError("khat_by_row: argument `data` has no rows")
    return xr.DataArray(np.concatenate(khats), dims=plain(plate), name="khat", attrs=KHAT_LABELS)


def _log_ratios_by_row(model: Any, guide: Any, data: Data, plate: str, draws: Iterable[int]) -> np.ndarray:
    """Return log p - log q of each row of data in each draw, shape (rows, draws)."""
    for program in (model, guide):
        check_call("khat_by_row", program, data)
    args, kwargs = as_arguments(data)
    log_ratios: list[torch.Tensor] = []
    rows = poutine.Trace()  # those of the first draw, if the plate subsamples
    for _ in draws:
        guide_trace = poutine.trace(poutine.replay(guide, trace=rows)).get_trace(*args, **kwargs)
        replayed = poutine.replay(poutine.replay(model, trace=rows), trace=guide_trace)
        model_trace = poutine.trace(replayed).get_trace(*args, **kwargs)
        if not log_ratios:
            _check_rows(model_trace, guide_trace, plate)
            keep_rows(rows, model_trace, guide_trace)
        of_model = {name: _log_prob(site) for name, (site, _) in _in_plate(model_trace, plate).items()}
        of_guide = log_q_terms("khat_by_row", guide_trace.nodes, model_trace.nodes, scaled=False)
        log_ratios.append(_by_row(of_model, model_trace, plate) - _by_row(of_guide, guide_trace, plate))
    found: np.ndarray = torch.stack(log_ratios, -1).cpu().numpy()
    return found


def _in_plate(trace: Any, plate: str) -> dict[str, Any]:
    """Return the sites in a plate, each with the dimension of the plate, by name."""
    found = {}
    for name, site in trace.nodes.items():
        if site["type"] == "sample" and not site_is_subsample(site):
            for frame in site["cond_indep_stack"]:
                if frame.name == plate and frame.vectorized:
                    found[name] = (site, frame.dim)
    return found


def _log_prob(site: Any) -> torch.Tensor:
    log_prob: torch.Tensor = scale_and_mask(site["fn"].log_prob(site["value"]), 1.0, site["mask"])
    return log_prob


def _by_row(terms: dict[str, torch.Tensor], trace: Any, plate: str) -> torch.Tensor:
    """Sum up terms for each row of a plate."""
    scores: Any = 0.0
    for name, (_, dim) in _in_plate(trace, plate).items():
        scores = scores + terms[name].movedim(dim, 0).reshape(terms[name].shape[dim], -1).sum(1)
    return scores


def _check_rows(model_trace: Any, guide_trace: Any, plate: str) -> None:
    of_model, of_guide = _in_plate(model_trace, plate), _in_plate(guide_trace, plate)
    if not of_model:
        frames = (frame for site in model_trace.nodes.values() for frame in site.get("cond_indep_stack", ()))
        plates = sorted({frame.name for frame in frames})
        raise ValueError(f"khat_by_row: no site of the model is in a vectorised plate {plate!r}; its plates: {plates}")
    drawn = [name for name, site in model_trace.iter_stochastic_nodes() if not site_is_subsample(site)]
    missing = [name for name in drawn if name not in guide_trace.nodes]
    if missing:
        raise ValueError(f"khat_by_row: the guide must draw all latents; it does not draw {missing}")
    latents = [name for name, (site, _) in of_model.items() if not site["is_observed"]]
    points = [name for name in latents if isinstance(innermost(guide_trace.nodes[name]["fn"]), Delta)]
    auxiliary = [name for name in of_guide if name not in model_trace.nodes]
    if not set(latents) <= of_guide.keys() or len(auxiliary) < len(points):
        raise ValueError(
            f"khat_by_row: the guide must draw the latents {latents} in the plate {plate!r}, row by row; here "
            "they come from sites outside, or are points, so that rows have no ratios of their own, only `khat` of all"
        )
