"""Figures that say whether a fit is any good: has its ELBO settled, and is its posterior calibrated."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
import xarray as xr
from matplotlib.axes import Axes

from pyro_vnd._sizes import is_one_of
from pyro_vnd.diagnostics.plots.axes import log_scale, one_axes
from pyro_vnd.diagnostics.posterior.sbc import check_ranks, default_num_bins
from pyro_vnd.infer import FitResult, Plateau

__all__ = ["plot_elbo", "plot_ranks"]

_NUM_REPLICATES = 4000  # sets of uniform ranks, from which the band is calibrated


def plot_elbo(
    results: FitResult | Sequence[FitResult] | Mapping[str, FitResult],
    *,
    rule: Plateau | None = None,
    parts: bool = True,
    ax: Axes | None = None,
    figsize: Any = None,
) -> Axes:
    """Plot the ELBO of fits by epoch, and its parts: the log-likelihood, dashed, and the KL, the band between them.

    A dot marks where a stopping rule held. The axis of epochs is logarithmic, as most happens in the first ones, and
    the range of the other one is that of the last nine tenths of the epochs.

    Args:
        results: What `fit` returned, once, several times, or by name.
        rule: A rule to try on fits that were not stopped.
        parts: Whether to show the parts; they are left out where sites are enumerated, and nobody knows them.
        ax: Axes to draw on.
        figsize: Size of a new figure, in inches.

    Returns:
        The axes.
    """
    if isinstance(results, FitResult):
        fits = {"": results}
    else:
        named = results.items() if isinstance(results, Mapping) else enumerate(results)
        fits = {str(name): result for name, result in named}
    ax, title = one_axes(ax, figsize), None
    shown: list[float] = []
    for number, (name, result) in enumerate(fits.items()):
        color, epochs = f"C{number}", np.arange(1, len(result.elbo) + 1)
        late = slice(len(epochs) // 10, None)
        shown += result.elbo[late]
        ax.plot(epochs, result.elbo, color=color, label=name or "ELBO")
        if parts and not np.isnan(result.kl).any():
            shown += result.log_likelihood[late]
            ax.plot(epochs, result.log_likelihood, "--", color=color, linewidth=1)
            ax.fill_between(epochs, result.elbo, result.log_likelihood, color=color, alpha=0.2, linewidth=0)
            title = "dashed: log-likelihood, band: KL"
        held = len(result.elbo) if result.converged else rule and rule.first(result.elbo)
        if held:
            label = f"at rest after {held} epochs"
            ax.plot(held, result.elbo[held - 1], "o", color=color, label=label if not name else f"{name}: {label}")
    low, high = min(shown), max(shown)
    margin = 0.05 * (high - low) + 1e-3
    ax.set(xlabel="epoch", ylabel="nats per row", ylim=(low - margin, high + margin))
    log_scale(ax)
    ax.legend(fontsize="small", title=title, title_fontsize="small")
    return ax


def plot_ranks(
    ranks: xr.Dataset,
    var_names: Sequence[str] | None = None,
    *,
    kind: Literal["ecdf", "hist"] = "ecdf",
    prob: float = 0.95,
    ax: Axes | None = None,
    figsize: Any = None,
) -> Axes:
    r"""Plot the ranks of simulation-based calibration with a band that holds uniform ones.

    "ecdf" plots $F(r) - (r + 1) / (L + 1)$, the distribution function of the ranks less that of uniform ones: one line
    a number, which stays inside the band at all ranks with probability `prob`. The guide is too narrow where a line is
    above in the left half and below in the right one, and too wide the other way round; it is biased where the line
    stays on one side, upwards if above. "hist" plots their histogram; its band holds each bin with that probability.

    Args:
        ranks: What `sbc` returned.
        var_names: Variables; all by default.
        kind: "ecdf" or "hist".
        prob: Probability of the band.
        ax: Axes to draw on.
        figsize: Size of a new figure, in inches.

    Returns:
        The axes.

    Raises:
        ValueError: If `kind`, `prob` or a variable is unknown.

    References:
        Säilynoja, Bürkner and Vehtari, "Graphical test for discrete uniformity and its applications in goodness-of-fit
        evaluation and multiple sample comparison", 2022, https://arxiv.org/abs/2103.10522.
    """
    num_ranks, num_simulations = check_ranks("plot_ranks", ranks)
    names = [str(name) for name in ranks.data_vars] if var_names is None else list(var_names)
    unknown = [name for name in names if name not in ranks]
    if unknown:
        raise ValueError(f"plot_ranks: argument `var_names` must be among {list(ranks.data_vars)}; got {unknown}")
    if not is_one_of(kind, ("ecdf", "hist")):
        raise ValueError(f"plot_ranks: argument `kind` must be 'ecdf' or 'hist'; got {kind!r}")
    if not 0 < prob < 1:
        raise ValueError(f"plot_ranks: argument `prob` must be in (0, 1); got {prob}")
    num_bins = num_ranks if kind == "ecdf" else default_num_bins(ranks)
    ends = (np.flatnonzero(np.diff(np.arange(num_ranks) * num_bins // num_ranks, append=num_bins)) + 1) / num_ranks
    shares = np.diff(ends, prepend=0)
    ax = one_axes(ax, figsize)
    if kind == "ecdf":
        x = ends[:-1]
        low, high = _simultaneous_band(x, num_simulations, prob)
        ax.fill_between(
            x, low / num_simulations - x, high / num_simulations - x, color="0.85", label=f"{prob:.0%} band"
        )
        ax.axhline(0, color="0.5", linewidth=1)
    else:
        low, high = _binomial_interval(shares, num_simulations, 1 - prob)
        ax.stairs(high, np.append(0, ends), baseline=low, fill=True, color="0.85", label=f"{prob:.0%} of each bin")
        ax.stairs(num_simulations * shares, np.append(0, ends), baseline=None, color="0.5", linewidth=1)
    for number, name in enumerate(names):
        values = ranks[name].transpose("simulation", ...).to_numpy().reshape(num_simulations, -1)
        for column, bins in enumerate((values * num_bins // num_ranks).T):
            counts = np.bincount(bins, minlength=num_bins)
            style: dict[str, Any] = {"color": f"C{number}", "label": None if column else name, "linewidth": 1}
            if kind == "ecdf":
                ax.step(x, counts.cumsum()[:-1] / num_simulations - x, where="post", **style)
            else:
                ax.stairs(counts, np.append(0, ends), **style)
    ylabel = "distribution function - uniform" if kind == "ecdf" else "simulations"
    ax.set(xlabel="rank of the truth among posterior draws (share)", ylabel=ylabel, xlim=(0, 1))
    ax.legend(fontsize="small")
    return ax


def _binomial_cdf(probs: np.ndarray, total: int) -> np.ndarray:
    """Return P(X <= n) for X ~ Binomial(total, p) and n = 0..total, shape (len(probs), total + 1)."""
    n = torch.arange(total + 1, dtype=torch.float64)
    log_choose = torch.lgamma(n.new_tensor(total + 1)) - torch.lgamma(n + 1) - torch.lgamma(total - n + 1)
    p = torch.as_tensor(probs, dtype=torch.float64)[:, None]
    cdf: np.ndarray = (log_choose + n * p.log() + (total - n) * torch.log1p(-p)).exp().cumsum(-1).numpy()
    return cdf


def _binomial_interval(probs: np.ndarray, total: int, level: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the smallest n with P(X <= n) >= level / 2, and the smallest with P(X <= n) >= 1 - level / 2."""
    cdf = _binomial_cdf(probs, total)
    return (cdf < level / 2).sum(-1), (cdf < 1 - level / 2).sum(-1)


def _simultaneous_band(ends: np.ndarray, total: int, prob: float) -> tuple[np.ndarray, np.ndarray]:
    """Return limits of the counts below each end, which hold them all at once with a probability.

    Each count is binomial, and all limits are at the same level; the level is found from sets of uniform ranks.
    """
    shares = np.diff(ends, prepend=0, append=1)
    counts = np.random.default_rng(0).multinomial(total, shares, _NUM_REPLICATES).cumsum(-1)[:, :-1]
    cdf = _binomial_cdf(ends, total)
    below, point = np.take_along_axis(cdf, counts.T, 1), np.arange(len(ends))[:, None]
    above = 1 - np.where(counts.T > 0, cdf[point, counts.T - 1], 0)
    level = np.quantile(2 * np.minimum(below, above).min(0), 1 - prob)
    return _binomial_interval(ends, total, level)
