"""Variables of the datasets that evaluations return."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr

__all__ = ["variable"]


def variable(
    labels: Mapping[str, tuple[str, str]], endings: Mapping[str, str], name: str, dims: tuple[str, ...], values: Any
) -> xr.Variable:
    """Make a variable of one seed, with its label and unit.

    Args:
        labels: Label and unit, by name without ending.
        endings: What the ending of a name adds to the label.
        name: Name of the variable.
        dims: Its dimensions after that of the seed.
        values: Its values, without that dimension.

    Returns:
        The variable, with the dimensions `seed` and `dims`.
    """
    ending = next((ending for ending in endings if name.endswith(ending)), "")
    label, units = labels[name.removesuffix(ending)]
    long_name = f"{label}, {endings[ending]}" if ending else label
    return xr.Variable(("seed", *dims), np.asarray(values)[None], {"long_name": long_name, "units": units})
