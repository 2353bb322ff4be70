"""The k-hat of the latents of each row: which rows of the data a guide serves badly."""

from collections.abc import Callable
from typing import Any

import torch
import xarray as xr
from pyro import poutine
from pyro.distributions import Delta
from pyro.distributions.util import scale_and_mask
from pyro.poutine.util import site_is_subsample
from tqdm.auto import tqdm

from pyro_vnd.diagnostics._arviz import psis
from pyro_vnd.diagnostics.draws import keep_rows
from pyro_vnd.diagnostics.khat import KHAT_LABELS
from pyro_vnd.distributions.wrapped import innermost
from pyro_vnd.infer import module_local_params
from pyro_vnd.infer.minibatches import cuda_devices, random_numbers
from pyro_vnd.nn.mode import module_mode

__all__ = ["khat_by_row"]


@torch.no_grad()
def khat_by_row(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    plate: str = "data",
    num_samples: int = 1000,
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
    differs little where rows are many. Scales of sites, as of a mini-batch, do not count.

    Args:
        model: The model.
        guide: Its trained guide; parameters are its own (`module_local_params`).
        *args: Arguments of both, the data among them.
        plate: Name of the plate over the rows of the data.
        num_samples: Draws of all latents.
        progress: Whether to show a progress bar.
        seed: Seed of the draws; None goes on with the caller's random numbers.

    Returns:
        k-hat of each row, shape (rows,), with the dimension of the plate's name; read as that of `khat`.

    Raises:
        ValueError: If `num_samples` is not positive, no site is in the plate, or rows have no ratio of their own: a
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
    if num_samples < 1:
        raise ValueError(f"khat_by_row: argument `num_samples` must be at least 1; got {num_samples}")
    log_ratios: list[torch.Tensor] = []
    rows = poutine.Trace()  # those of the first draw, if the plate subsamples
    with (
        module_local_params(model, guide),
        module_mode([model, guide], training=False),
        random_numbers(seed, cuda_devices([model, guide, *args])),
    ):
        for _ in tqdm(range(num_samples), desc="draws", disable=not progress):
            guide_trace = poutine.trace(poutine.replay(guide, trace=rows)).get_trace(*args)
            replayed = poutine.replay(poutine.replay(model, trace=rows), trace=guide_trace)
            model_trace = poutine.trace(replayed).get_trace(*args)
            if not log_ratios:
                _check_rows(model_trace, guide_trace, plate)
                keep_rows(rows, model_trace, guide_trace)
            log_ratios.append(_row_scores(model_trace, plate) - _row_scores(guide_trace, plate))
    return xr.DataArray(psis(torch.stack(log_ratios, -1).cpu().numpy())[1], dims=plate, name="khat", attrs=KHAT_LABELS)


def _in_plate(trace: Any, plate: str) -> dict[str, Any]:
    """Return the sites in a plate, each with the dimension of the plate, by name."""
    found = {}
    for name, site in trace.nodes.items():
        if site["type"] == "sample" and not site_is_subsample(site):
            for frame in site["cond_indep_stack"]:
                if frame.name == plate and frame.vectorized:
                    found[name] = (site, frame.dim)
    return found


def _row_scores(trace: Any, plate: str) -> torch.Tensor:
    scores: Any = 0.0
    for site, dim in _in_plate(trace, plate).values():
        log_prob = scale_and_mask(site["fn"].log_prob(site["value"]), 1.0, site["mask"])
        scores = scores + log_prob.movedim(dim, 0).reshape(log_prob.shape[dim], -1).sum(1)
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
