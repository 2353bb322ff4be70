"""The one place that knows which line of ArviZ is installed: 0.x (InferenceData) or 1.x (xarray DataTree)."""

from collections.abc import Mapping
from typing import Any

import arviz as az
import numpy as np

__all__ = ["from_groups", "summary"]

_IS_LEGACY = az.__version__.startswith("0.")

Groups = Mapping[str, Mapping[str, np.ndarray]]


def from_groups(groups: Groups, coords: Mapping[str, Any], dims: Mapping[str, list[str]]) -> Any:
    """Collect named groups of draws, arrays of shape (chain, draw, ...), into ArviZ's container."""
    from_dict: Any = az.from_dict
    if _IS_LEGACY:
        return from_dict(**groups, coords=coords, dims=dims)
    return from_dict(groups, coords=coords, dims=dims)


def summary(data: Any, var_names: list[str] | None = None) -> Any:
    """Summarise posterior draws as a data frame: means, deviations and intervals.

    Convergence statistics are left out: draws of one variational fit are independent by construction, so that R-hat
    and effective sample sizes would be undefined or flattering.
    """
    return az.summary(data, var_names=var_names, kind="stats")
