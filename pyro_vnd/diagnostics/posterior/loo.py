"""Leave-one-out predictive densities, and models ranked by them."""

import math
from collections.abc import Mapping
from typing import Any

from pyro_vnd.diagnostics.posterior import _arviz
from pyro_vnd.diagnostics.posterior.khat import THRESHOLD, guide_khat
from pyro_vnd.diagnostics.posterior.names import find_name

__all__ = ["compare", "loo"]

_CURE = (
    'Fit for longer, or give the guide more freedom, as by `AutoNested(latents="conditional")`, or use '
    "draws of MCMC with `variational=False`; where rows have latents of their own, hold rows out. `force=True` "
    "goes on all the same"
)


def loo(data: Any, *, var_name: str | None = None, variational: bool = True, force: bool = False) -> Any:
    r"""Estimate how well each row is predicted from all others, by Pareto-smoothed importance sampling.

    $$\mathrm{elpd} = \sum_n \log p(y_n \mid y_{-n})
      \approx \sum_n \log \frac{\sum_s w_{ns} \, p(y_n \mid z_s)}{\sum_s w_{ns}}, \qquad
      w_{ns} = \frac{1}{p(y_n \mid z_s)} \frac{p(y, z_s)}{q(z_s)}, \qquad z_s \sim q.$$

    The second factor corrects draws of a guide for not being draws of the posterior; it takes many draws, and a guide
    close to the posterior, as its k-hat tells. A row with a latent of its own is predicted at draws of that latent that
    have seen it, so that its k-hat is large: there, hold rows out instead.

    Args:
        data: What `to_arviz` returned; chains are taken together.
        var_name: The observed site, if there are several, by its own name or as in `data`.
        variational: Whether to correct for the guide; False takes the draws for those of the posterior, as those of
            MCMC are.
        force: Whether to go on where the result cannot be trusted.

    Returns:
        ArviZ's `ELPDData`, the same in both of its lines. `elpd`, its standard error `se` over rows, and the effective
        number of parameters `p`, in nats; `elpd_i` by row and `pareto_k`, k-hat by row, which should be below
        `good_k`; `warning` tells if one is not. Rows that the model masks are left out.

    Raises:
        ValueError: If `data` lacks a group or variable, or has several observed sites and none is named; and, without
            `force`, if k-hat is above 0.7 for the guide, which then is not to be corrected, or for all rows.

    Warns:
        UserWarning: If a k-hat is too large for the estimate to be trusted.

    Source: Vehtari et al., "Practical Bayesian model evaluation using leave-one-out cross-validation and WAIC", 2017;
    Magnusson et al., "Bayesian leave-one-out cross-validation for large data", ICML 2019 (the correction).

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> from pyro_vnd.diagnostics import to_arviz
        >>> def model(y):
        ...     mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("y", dist.Normal(mean, 1.0), obs=y)
        >>> def posterior(y):
        ...     pyro.sample("mean", dist.Normal(y.sum() / (len(y) + 1), (len(y) + 1) ** -0.5))
        >>> y = torch.linspace(-1.0, 1.0, 9)
        >>> result = loo(to_arviz(model, posterior, y, num_samples=500, num_prior=0, predictive=False))
        >>> round(float(result.elpd)), result.elpd_i.dims
        (-11, ('data',))
    """
    found, trouble = _loo("loo", data, var_name, variational, force)
    if trouble and not force:
        raise ValueError(f"loo: argument `data` cannot tell: {trouble}. {_CURE}")
    return found


def compare(
    datasets: Mapping[Any, Any], *, var_name: str | None = None, variational: bool = True, force: bool = False
) -> Any:
    """Rank models of the same data by their leave-one-out predictive density.

    Args:
        datasets: What `to_arviz` returned for each model, or `loo` made of it, by name or by width.
        var_name: As in `loo`.
        variational: As in `loo`.
        force: Whether to rank models where some result cannot be trusted.

    Returns:
        A data frame with a row a model, best first: `rank` from 0; `elpd`, `se` and `p` as in `loo`; `elpd_diff`, the
        difference to the best one, at most 0, and its standard error `dse`; `weight` in the stacked predictive; and
        `warning`, whether k-hat says not to trust the row.

    Raises:
        ValueError: If there are less than two models, or as `loo`: a ranking by what cannot be trusted is none.

    Source: Yao et al., "Using stacking to average Bayesian predictive distributions", 2018.
    """
    if len(datasets) < 2:
        raise ValueError(f"compare: argument `datasets` must have at least two models; got {list(datasets)}")
    found = {
        name: (data, _trouble(data)) if hasattr(data, "elpd_i") else _loo("compare", data, var_name, variational, force)
        for name, data in datasets.items()
    }
    troubles = [f"{name!r}: {trouble}" for name, (_, trouble) in found.items() if trouble]
    if troubles and not force:
        raise ValueError(
            f"compare: argument `datasets` has models that cannot be ranked: {'; '.join(troubles)}. {_CURE}"
        )
    elpds = {str(name): elpd for name, (elpd, _) in found.items()}
    # ArviZ turns names into strings; widths stay the numbers that they are.
    return _arviz.compare(elpds).rename(index={str(name): name for name in datasets})


def _loo(caller: str, data: Any, var_name: str | None, variational: bool, force: bool) -> tuple[Any, str]:
    """Return the estimate, and why it is not to be trusted, if so; without `force` then no estimate."""
    if var_name is not None:
        var_name = find_name(var_name, _arviz.dataset(data, "log_likelihood"))
    _arviz.likelihood(data, var_name)  # or there is nothing to ask the guide about
    of_guide = guide_khat(caller, data).max().item() if variational else -math.inf
    trouble = f"its guide has a k-hat of {of_guide:.2f}, above {THRESHOLD}, and is too far from the posterior"
    if of_guide <= THRESHOLD:
        trouble = ""
    elif not force:
        return None, trouble
    elpd = _arviz.loo(data, var_name, variational)
    elpd.trouble = trouble  # `compare` may get the estimate alone
    return elpd, _trouble(elpd)


def _trouble(elpd: Any) -> str:
    smallest = float(elpd.pareto_k.min())
    of_rows = f"the k-hats of all rows are above {THRESHOLD}, from {smallest:.2f} up" if smallest > THRESHOLD else ""
    return getattr(elpd, "trouble", "") or of_rows
