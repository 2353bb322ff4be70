"""A table of what was drawn."""

from collections.abc import Sequence
from typing import Any

from pyro_vnd.diagnostics.posterior import _arviz
from pyro_vnd.diagnostics.posterior.names import find_name

__all__ = ["summary"]


def summary(data: Any, var_names: Sequence[str] | None = None, *, constant: bool = False) -> Any:
    """Summarise posterior draws: means, deviations and 89 % intervals; with several chains also R-hat.

    Entries that are the same in all draws of all fits, as the first unit of a mask and those that it never keeps, are
    left out; a variable with a single entry is there in any case.

    Draws of a guide are independent, so effective sample sizes would only repeat their number, and R-hat says nothing
    within a fit. Where chains are independent fits R-hat tells whether they agree: near 1 if so, infinite where each
    has settled on a value of its own. It is put to 1 for what is the same in all draws of all fits.

    Args:
        data: What `to_arviz` returned.
        var_names: Variables of the posterior, by their names in the model or in `data`; all by default.
        constant: Whether to show entries that never vary, too.

    Returns:
        A data frame with a row for each number, rounded to three decimals.

    Raises:
        ValueError: If the data have no posterior, or a name is none of its variables.

    Example:
        >>> import pyro, torch
        >>> from pyro_vnd.diagnostics import to_arviz
        >>> from pyro_vnd.distributions import OrderedMask
        >>> def model():
        ...     pyro.sample("mask", OrderedMask(probs=torch.tensor([0.5, 0.5, 0.0])))
        >>> draws = to_arviz(model, model, num_samples=100)
        >>> list(summary(draws).index), list(summary(draws, ["mask"], constant=True).index)
        (['mask[2]', 'mask_length'], ['mask[1]', 'mask[2]', 'mask[3]'])
    """
    variables = _arviz.dataset(data, "posterior")
    asked = [str(name) for name in variables.data_vars] if var_names is None else var_names
    names = [find_name(name, variables) for name in ([asked] if isinstance(asked, str) else asked)]
    unknown = [name for name in names if name not in variables]
    if unknown:
        raise ValueError(f"summary: argument `var_names` names {unknown}; variables: {list(variables.data_vars)}")
    return _arviz.summary(data, names, constant)
