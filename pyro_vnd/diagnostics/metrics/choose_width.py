"""The narrowest width that predicts about as well as the best."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr
from torch import Tensor

from pyro_vnd.diagnostics.posterior.loo import loo

__all__ = ["smallest_width"]


def smallest_width(
    scores: Mapping[float, Any],
    *,
    within: float = 1.0,
    var_name: str | None = None,
    variational: bool = True,
    force: bool = False,
) -> float:
    r"""Return the narrowest width that predicts about as well as the best one.

    With $e_{kn}$ the log predictive density of row n at width k and b the best width, it is the least k with

    $$\sum_n (e_{bn} - e_{kn}) \le c \sqrt{N \, \mathrm{Var}_n (e_{bn} - e_{kn})}.$$

    Differences are taken row by row, so that what is hard for all widths does not count as an error.

    Args:
        scores: By width, or length, or order: what `loo_widths`, `loo` or `to_arviz` returned, or the log predictive
            densities of held-out rows, shape (N,), in nats: of the same rows in the same order.
        within: Standard errors c of the difference that a narrower one may be worse by.
        var_name: As in `loo`, for what `to_arviz` returned.
        variational: As in `loo`, for what `to_arviz` returned.
        force: As in `loo`, for what `to_arviz` returned.

    Returns:
        The key of the width.

    Raises:
        ValueError: If there are no scores, rows differ, a density is not finite, or `within` is negative.

    Source: the one-standard-error rule of Breiman et al., "Classification and Regression Trees", 1984, with paired
    differences as in Vehtari et al., "Practical Bayesian model evaluation using leave-one-out cross-validation", 2017.

    Example:
        >>> import torch
        >>> hard, spread = torch.randn(1000), torch.linspace(-1, 1, 1000)
        >>> smallest_width({1: hard - 0.5, 2: hard - 0.1, 4: hard})
        4
        >>> smallest_width({1: hard - 0.5, 2: hard + spread, 4: hard})  # here the better, there the worse
        2
    """
    if isinstance(scores, xr.Dataset):
        raise ValueError(
            "smallest_width: argument `scores` must have densities row by row, by width, as `loo_widths(net, data, "
            "widths)` returns them; got a Dataset: what `evaluate_widths` returns has means over rows"
        )
    if not scores:
        raise ValueError("smallest_width: argument `scores` must have at least one width; it is empty")
    if not within >= 0:
        raise ValueError(f"smallest_width: argument `within` must be >= 0; got {within}")
    by_width = {
        width: _densities(width, found, var_name, variational, force) for width, found in sorted(scores.items())
    }
    sizes = {width: len(densities) for width, densities in by_width.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"smallest_width: argument `scores` must be of the same rows; got numbers of rows {sizes}")
    best = max(by_width.values(), key=np.sum)
    # The best width is there, if no smaller one is.
    return next(width for width, densities in by_width.items() if _is_within(best - densities, within))


def _is_within(loss: np.ndarray, within: float) -> bool:
    """Say whether a sum over rows is at most so many standard errors."""
    error = (len(loss) ** 0.5) * loss.std(ddof=min(1, len(loss) - 1))
    return bool(loss.sum() <= within * error)


def _densities(width: float, found: Any, var_name: str | None, variational: bool, force: bool) -> np.ndarray:
    if isinstance(found, Tensor):
        values = found.detach().cpu().double().numpy()
    elif hasattr(found, "elpd_i"):
        values = found.elpd_i.to_numpy().ravel()
    elif hasattr(found, "groups"):  # both of ArviZ's containers have it
        values = loo(found, var_name=var_name, variational=variational, force=force).elpd_i.to_numpy().ravel()
    else:
        values = np.asarray(found, dtype=float)
    if values.ndim != 1 or not values.size or not np.isfinite(values).all():
        raise ValueError(
            f"smallest_width: `scores[{width!r}]` must be finite densities of at least one row, shape (N,); got shape "
            f"{values.shape}{'' if np.isfinite(values).all() else ' with NaN or inf'}"
        )
    return values
