"""Figures of learned laws of masks."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from pyro_vnd.diagnostics.plots.axes import one_axes
from pyro_vnd.diagnostics.posterior.names import find_name
from pyro_vnd.distributions import OrderedMask

__all__ = ["plot_keep_probs", "plot_laws", "plot_length_posterior"]


def plot_keep_probs(
    data: Any, var_names: Sequence[str], *, prob: float = 0.9, ax: Axes | None = None, figsize: Any = None
) -> Axes:
    """Plot the keep probability of each unit, with a credible band where there is a mask for each row of the data.

    A draw of the posterior then holds as many masks as rows. Its share of masks that keep a unit is one curve; the line
    is the mean of these curves, the keep probability, and the band holds `prob` of them. A single mask for all data has
    no such shares: there the line is all there is, that of the learned law, or, where draws have different laws, the
    share of draws that keep a unit. With several fits it is their mean, and a thin line is each.

    Args:
        data: What `to_arviz` returned.
        var_names: Mask or `NestedNormal` sites; an entry counts as kept if it is not zero.
        prob: Mass of the credible band.
        ax: Axes to draw on.
        figsize: Size of a new figure, in inches.

    Returns:
        The axes.
    """
    ax = one_axes(ax, figsize)
    for name in (find_name(name, data.posterior) for name in var_names):
        kept = (data.posterior[name] != 0).astype(float)  # units are the last dimension, whatever its name
        rows = [dim for dim in kept.dims[:-1] if dim not in ("chain", "draw")]
        units = np.arange(1, kept.shape[-1] + 1)
        if rows:
            curves = kept.mean(rows).stack(sample=("chain", "draw")).transpose("sample", ...).to_numpy()
            low, high = np.quantile(curves, [(1 - prob) / 2, (1 + prob) / 2], axis=0)
            (line,) = ax.plot(units, curves.mean(0), marker=".", label=name)
            ax.fill_between(units, low, high, alpha=0.25, color=line.get_color(), linewidth=0)
            continue
        fits = _length_probs(data.posterior[f"{name}_length"], len(units), exact=True)[:, ::-1].cumsum(1)[:, ::-1]
        (line,) = ax.plot(units, fits.mean(0), marker=".", label=name)
        if len(fits) > 1:
            ax.plot(units, fits.T, color=line.get_color(), linewidth=0.6, alpha=0.6)
    ax.set(xlabel="unit", ylabel="keep probability", ylim=(0, 1.02))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend(title=f"mean and {prob:.0%} band" if ax.collections else None)
    return ax


def plot_length_posterior(
    data: Any, var_names: Sequence[str] = (), *, prob: float = 0.9, ax: Axes | None = None, figsize: Any = None
) -> Axes:
    """Plot the posterior over the kept lengths: bars for all fits together, a cross for each, steps for the prior.

    Bars are shares of draws. The prior is the law itself, or shares of draws where that is not the same for all draws
    and rows. Where there is a mask for each row of the data, the probabilities are means over the rows.

    Args:
        data: What `to_arviz` returned, whose prior is shown if it has one, or `length_posterior`.
        var_names: Mask or `NestedNormal` sites; `length_posterior` is about a single one.
        prob: Mass of the shortest central interval of lengths that the legend names.
        ax: Axes to draw on.
        figsize: Size of a new figure, in inches.

    Returns:
        The axes.

    Raises:
        ValueError: If a name is no mask site of the data.
    """
    laws = _laws_of_lengths(data, var_names)
    ax = one_axes(ax, figsize)
    for number, (name, (chains, prior)) in enumerate(laws.items()):
        num_units, color = chains.shape[-1], f"C{number}"
        lengths = np.arange(1, num_units + 1)
        pooled = chains.mean(0)
        low, high = (1 + np.searchsorted(pooled.cumsum(), level) for level in ((1 - prob) / 2, (1 + prob) / 2))
        label = f"{name}: mean {lengths @ pooled:.1f}, {prob:.0%} in {low}-{min(high, num_units)}"
        # Bars of several sites stand side by side.
        width = 0.8 / len(laws)
        at = lengths + width * (number - (len(laws) - 1) / 2)
        ax.bar(at, pooled, width, color=color, alpha=0.5, label=label)
        if len(chains) > 1:
            ax.plot(np.tile(at, (len(chains), 1)).T, chains.T, "x", color=color, markersize=4)
        if prior is not None:
            edges = np.arange(num_units + 1) + 0.5
            ax.stairs(prior, edges, baseline=None, color=color, linestyle="--", label=f"{name}: prior")
    ax.margins(y=0.04 + 0.08 * len(ax.get_legend_handles_labels()[1]))  # room for the legend
    ax.set(xlabel="length", ylabel="probability")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend(fontsize="small", loc="upper left")
    return ax


def _laws_of_lengths(data: Any, var_names: Sequence[str]) -> dict[str, tuple[np.ndarray, np.ndarray | None]]:
    """Return the law of each mask, a row a chain, and that of its prior if there is one, by name."""
    if "probs" in data:  # of `length_posterior`
        probs = data["probs"]
        return {data.attrs["site"]: (probs.mean([dim for dim in probs.dims if dim != "length"]).to_numpy()[None], None)}
    names = [find_name(name, data.posterior) for name in var_names]
    known = [str(name).removesuffix("_length") for name in data.posterior.data_vars if str(name).endswith("_length")]
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise ValueError(f"plot_length_posterior: `var_names` must be mask sites, {known}; got {unknown}")
    laws = {}
    for name in names:
        num_units, variable = data.posterior[name].shape[-1], f"{name}_length"
        has_prior = "prior" in data and variable in data.prior
        prior = _length_probs(data.prior[variable], num_units, exact=True).mean(0) if has_prior else None
        laws[name] = _length_probs(data.posterior[variable], num_units), prior
    return laws


def _length_probs(lengths: Any, num_units: int, exact: bool = False) -> np.ndarray:
    """Return the share of each length, a row a chain; or its probability, if that is asked for and known."""
    law = np.ravel(lengths.attrs.get("law", []))
    if exact and law.size == lengths.sizes["chain"] * num_units:
        return law.reshape(-1, num_units)
    values = lengths.to_numpy().astype(int).reshape(lengths.sizes["chain"], -1)
    return np.stack([np.bincount(chain, minlength=num_units + 1)[1:] for chain in values]) / values.shape[1]


def plot_laws(
    laws: Mapping[str, OrderedMask],
    priors: Mapping[str, OrderedMask] | None = None,
    *,
    ax: Axes | None = None,
    figsize: Any = None,
) -> Axes:
    """Plot the probability that each block of a layer is kept, one line a law, coloured by depth.

    Args:
        laws: Laws of masks by name, in the order of the net, such as `net.laws` or the `laws` of an `AutoNested`; where
            a law has a batch shape the line is the mean over it.
        priors: Their priors, by the same names: dashed.
        ax: Axes to draw on.
        figsize: Size of a new figure, in inches.

    Returns:
        The axes.
    """
    ax = one_axes(ax, figsize)
    colors = plt.get_cmap("viridis")(np.linspace(0, 0.9, len(laws)))
    for color, (name, law) in zip(colors, laws.items(), strict=True):
        share = np.arange(1, law.num_units + 1) / law.num_units
        for style, source in (("-", law), ("--", (priors or {}).get(name))):
            if source is not None:
                keep = source.keep_probs.detach().cpu().reshape(-1, law.num_units).mean(0)
                ax.plot(share, keep, style, color=color, marker="." if style == "-" else None, linewidth=1)
        ax.plot([], [], color=color, label=name)
    ax.set(xlabel="position in the layer (share of its units)", ylabel="keep probability", xlim=(0, 1), ylim=(0, 1.02))
    ax.legend(fontsize="small", title="dashed: prior" if priors else None)
    return ax
