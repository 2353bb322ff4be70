"""Posterior draws of a fitted guide for ArviZ."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from pyro import poutine
from tqdm.auto import tqdm

from pyro_vnd.diagnostics._arviz import from_groups
from pyro_vnd.distributions.wrapped import find_mask
from pyro_vnd.infer import module_local_params

__all__ = ["to_arviz"]


@torch.no_grad()
def to_arviz(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    num_samples: int = 500,
    progress: bool = False,
) -> Any:
    """Draw from a guide and score the draws under guide and model.

    Each latent site becomes a variable of the group `posterior`, with one chain. A mask site is there twice, as
    `name` with dimension `name_unit`, and as its kept length `name_length`; likewise a `NestedNormal` site. Plates
    give their names to dimensions. The group `sample_stats` has `log_p`, the log-joint under the model, and `log_q`,
    the log-density under the guide, in nats.

    Args:
        model: The model.
        guide: Its trained guide; parameters are its own (`module_local_params`).
        *args: Arguments of both, the data among them.
        num_samples: Number of draws.
        progress: Whether to show a progress bar.

    Returns:
        `arviz.InferenceData` with ArviZ 0.x, `xarray.DataTree` with ArviZ 1.x.

    Raises:
        ValueError: If `num_samples` is not positive.

    Example:
        >>> import pyro, torch
        >>> from pyro_vnd.distributions import OrderedMask
        >>> from pyro_vnd.infer import AutoNested
        >>> def model():
        ...     return pyro.sample("mask", OrderedMask.uniform(3))
        >>> data = to_arviz(model, AutoNested(model), num_samples=10)
        >>> dict(data.posterior.sizes)
        {'chain': 1, 'draw': 10, 'mask_unit': 3}
        >>> sorted(data.posterior.data_vars)
        ['mask', 'mask_length']
    """
    if num_samples < 1:
        raise ValueError(f"to_arviz: argument `num_samples` must be at least 1; got {num_samples}")
    draws: dict[str, list[np.ndarray]] = {}
    stats: dict[str, list[float]] = {"log_p": [], "log_q": []}
    dims: dict[str, list[str]] = {}
    coords: dict[str, np.ndarray] = {}
    with module_local_params(model, guide):
        for _ in tqdm(range(num_samples), desc="draws", disable=not progress):
            guide_trace = poutine.trace(guide).get_trace(*args)
            model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args)
            stats["log_q"].append(float(guide_trace.log_prob_sum()))
            stats["log_p"].append(float(model_trace.log_prob_sum()))
            for name, site in guide_trace.iter_stochastic_nodes():
                if name not in model_trace.nodes:  # auxiliary sites of autoguides
                    continue
                value: Any = site["value"]
                dims[name], unit_dim = _dim_names(name, site)
                draws.setdefault(name, []).append(value.cpu().numpy())
                if unit_dim is not None:
                    coords[unit_dim] = np.arange(1, value.shape[-1] + 1)
                    length = _kept_length(value)
                    dims[f"{name}_length"] = dims[name][:-1]
                    draws.setdefault(f"{name}_length", []).append(length.cpu().numpy())
    groups = {
        "posterior": {name: np.stack(values)[None] for name, values in draws.items()},
        "sample_stats": {name: np.array(values)[None] for name, values in stats.items()},
    }
    return from_groups(groups, coords, dims)


def _dim_names(name: str, site: Any) -> tuple[list[str], str | None]:
    """Name the dimensions of a site's value: plates by name, the units of a mask by the site's."""
    fn, rank = site["fn"], site["value"].dim()
    names = [f"{name}_dim_{i}" for i in range(rank)]
    for frame in site["cond_indep_stack"]:
        if frame.vectorized:
            names[rank - fn.event_dim + frame.dim] = frame.name
    if find_mask(fn) is None:
        return names, None
    names[-1] = f"{name}_unit"
    return names, names[-1]


def _kept_length(value: torch.Tensor) -> torch.Tensor:
    """Return the position of the last non-zero entry; the first unit is always kept."""
    positions = torch.arange(1, value.shape[-1] + 1, device=value.device)
    return torch.where(value != 0, positions, 1).amax(-1)
