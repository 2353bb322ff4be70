"""The posterior of masks that are summed out: exact, given draws of everything else."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
import xarray as xr
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, config_enumerate
from torch import Tensor
from tqdm.auto import tqdm

from pyro_vnd._data import Data, as_arguments, check_call, check_whole
from pyro_vnd._state import cuda_devices, module_mode, random_numbers
from pyro_vnd.diagnostics.posterior.names import plain
from pyro_vnd.diagnostics.posterior.sites import dim_names, keep_rows, kept_length, num_batch_dims, sites
from pyro_vnd.distributions import OrderedMask
from pyro_vnd.distributions.nested import find_mask
from pyro_vnd.infer import module_local_params

__all__ = ["length_posterior"]


@torch.no_grad()
def length_posterior(
    model: Callable[..., Any],
    guide: Any,
    data: Data = (),
    *,
    site: str | None = None,
    num_samples: int | None = None,
    seed: int | None = 0,
    progress: bool = False,
) -> xr.Dataset:
    r"""Return the law of the length of a mask that is summed out, given the data.

    $$p(L \mid x) = E_{w \mid x} [p(L \mid x, w)], \qquad p(L = k \mid x, w) \propto p(x, w, L = k).$$

    A mask that the model enumerates and the guide does not draw, as in a fit by `TraceEnum_ELBO` or by NUTS, has no
    draws. Given a draw of all other latents w, from the guide or from MCMC, its law is exact: the log-joint is taken
    at every length. Discrete sites of any kind that are not drawn are enumerated, together; masks in plates have a law
    for each row.

    Args:
        model: The model, which must broadcast over enumerated masks, as `TraceEnum_ELBO` wants it.
        guide: Its trained guide, whose parameters are its own (`module_local_params`); or an `MCMC` that was run, or
            its draws by site, shape (num_draws, ...).
        data: Arguments of the model, and of the guide, the same as of `fit`.
        site: The mask; it may be left out if only one is summed out.
        num_samples: Draws of the other latents: by default 500 of a guide, and all there are of MCMC, which are thinned
            evenly to fewer.
        seed: Seed of the draws; None goes on with the caller's random numbers. Calls for several masks with one seed
            draw them jointly: draws of one number belong together.
        progress: Whether to show a progress bar.

    Returns:
        `probs`, the law of the length, shape (rows..., length); `probs_by_draw`, the law given each draw of the other
        latents, shape (draw, rows..., length); and draws of the posterior, `lengths` of shape (draw, rows...) and
        `masks` of shape (draw, rows..., unit). Coordinates of lengths and units are counted from 1, plates name rows.

    Raises:
        ValueError: If no mask is summed out, several are and none is named, other latents are not drawn, or there are
            too few draws.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro.infer.autoguide import AutoNormal
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 0.1))
        ...     mask = pyro.sample("mask", OrderedMask.uniform(3), infer={"enumerate": "parallel"})
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("y", dist.Normal(mu + mask.sum(-1), 1.0), obs=y)
        >>> guide = AutoNormal(poutine.block(model, hide=["mask"]), init_scale=0.1)
        >>> posterior = length_posterior(model, guide, torch.full((8,), 2.0), num_samples=100)
        >>> bool((posterior["probs"].sel(length=2) > 0.9).item())
        True
        >>> dict(posterior["lengths"].sizes)
        {'draw': 100}
    """
    check_whole("length_posterior", data, "as the law of a length needs all that it explains")
    args, kwargs = as_arguments(data)
    programs = [part for part in (model, guide) if callable(part)]
    for program in programs:
        check_call("length_posterior", program, data)
    rows = poutine.Trace()
    with (
        module_local_params(*programs),
        module_mode(programs, training=False),
        random_numbers(seed, cuda_devices([*programs, *args, *kwargs.values()])),
    ):
        draws, num_draws = _latents(guide, args, kwargs, num_samples, rows)
        program = partial(config_enumerate(poutine.replay(model, trace=rows)), *args, **kwargs)
        masks: dict[str, Any] = {}
        name, found = "", []
        for latents in tqdm(draws, total=num_draws, desc="draws", disable=not progress):
            if not masks:
                trace: Any = poutine.trace(partial(model, *args, **kwargs)).get_trace()
                keep_rows(rows, trace)
                masks, name = _summed_out(trace, latents, site)
                elbo = TraceEnum_ELBO(max_plate_nesting=num_batch_dims(trace))
            found.append(_conditional(elbo, program, masks, latents)[name])
    probs, drawn = (torch.stack(parts).cpu() for parts in zip(*found, strict=True))
    names = [plain(dim) for dim in dim_names(name, masks[name], masks[name]["value"], 1)[:-1]]
    units = np.arange(1, drawn.shape[-1] + 1)
    return xr.Dataset(
        {
            "probs": ([*names, "length"], probs.mean(0).numpy()),
            "probs_by_draw": (["draw", *names, "length"], probs.numpy()),
            "lengths": (["draw", *names], kept_length(drawn).numpy()),
            "masks": (["draw", *names, "unit"], drawn.numpy()),
        },
        coords={"draw": np.arange(num_draws), "length": units, "unit": units},
        attrs={"site": name},
    )


def _latents(
    guide: Any, args: Any, kwargs: Any, num_samples: int | None, rows: poutine.Trace
) -> tuple[Iterator[dict[str, Tensor]], int]:
    """Return draws of latents by name, and how many there are."""
    if num_samples is not None and num_samples < 1:
        raise ValueError(f"length_posterior: argument `num_samples` must be at least 1; got {num_samples}")
    samples = guide.get_samples() if hasattr(guide, "get_samples") else guide
    if isinstance(samples, Mapping):
        drawn = {name: torch.as_tensor(values) for name, values in samples.items()}
        sizes = {len(values) for values in drawn.values()}
        if len(sizes) != 1 or min(sizes) < (num_samples or 1):
            raise ValueError(
                f"length_posterior: argument `guide` must have as many draws of each site, {num_samples or 1} or more; "
                f"got { {name: len(values) for name, values in drawn.items()} }"
            )
        index = np.linspace(0, min(sizes) - 1, num_samples or min(sizes)).round().astype(int)
        return ({name: values[i] for name, values in drawn.items()} for i in index.tolist()), len(index)
    if not callable(guide):
        raise ValueError(
            f"length_posterior: argument `guide` must be a guide, an MCMC, or draws by site; got {type(guide).__name__}"
        )

    def draw() -> dict[str, Tensor]:
        trace: Any = poutine.trace(poutine.replay(guide, trace=rows)).get_trace(*args, **kwargs)
        keep_rows(rows, trace)
        return {name: found["value"] for name, found, _ in sites(trace.nodes)}

    num_draws = 500 if num_samples is None else num_samples
    return (draw() for _ in range(num_draws)), num_draws


def _summed_out(trace: Any, latents: Mapping[str, Tensor], site: str | None) -> tuple[dict[str, Any], str]:
    """Return the masks without draws, those outside of plates first, and the one that is asked for."""
    missing = {name: found for name, found, kind in sites(trace.nodes) if kind == "latent" and name not in latents}
    free = [name for name, found in missing.items() if not found["fn"].has_enumerate_support]
    if free:
        raise ValueError(
            f"length_posterior: argument `guide` must draw all latents that are not summed out; it lacks {free}"
        )
    masks = {name: found for name, found in missing.items() if isinstance(find_mask(found["fn"]), OrderedMask)}
    if not masks:
        raise ValueError(
            "length_posterior: argument `guide` must leave a mask to be summed out; the model has no other. For masks "
            "that a guide draws, see its laws or to_arviz"
        )
    by_plain = {plain(name): name for name in masks}
    if site is None and len(masks) > 1:
        raise ValueError(f"length_posterior: argument `site` must name one of the masks {list(masks)}")
    name = next(iter(masks)) if site is None else by_plain.get(plain(site))
    if name is None:
        raise ValueError(f"length_posterior: argument `site` must be one of the masks {list(masks)}; got {site!r}")
    # Rows are independent given what is outside of their plate, so that masks can be drawn one after the other.
    return dict(sorted(masks.items(), key=lambda item: len(item[1]["cond_indep_stack"]))), name


def _conditional(
    elbo: TraceEnum_ELBO, program: Callable[[], Any], masks: Mapping[str, Any], latents: Mapping[str, Tensor]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the law of the length of each mask given other latents, and a joint draw of the masks."""
    known, drawn = dict(latents), {}
    probs: dict[str, Tensor] = {}
    for name in masks:
        laws = elbo.compute_marginals(poutine.condition(program, known), lambda: None)
        shapes = {name: masks[name]["value"].shape for name in masks if name in laws}
        by_name = {name: laws[name].probs.reshape(shape) for name, shape in shapes.items()}
        probs = probs or by_name
        drawn[name] = known[name] = OrderedMask(probs=by_name[name]).sample()
    return {name: (probs[name], drawn[name]) for name in masks}
