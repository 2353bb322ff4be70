"""Figures of learned orders."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from pyro_vnd.distributions import OrderedMask

__all__ = ["plot_keep_probs", "plot_laws", "plot_prefixes", "plot_widths"]


def plot_keep_probs(
    data: Any, var_names: Sequence[str], *, prob: float = 0.9, ax: Axes | None = None, figsize: Any = None
) -> Axes:
    """Plot the share of masks that keep each unit, with its credible band.

    A draw of the posterior holds a mask for each row of the data. Its share of kept masks is one curve; the line is
    the mean of these curves, the keep probability, and the band holds `prob` of them.

    Args:
        data: What `to_arviz` returned.
        var_names: Mask or `NestedNormal` sites; an entry counts as kept if it is not zero.
        prob: Mass of the credible band.
        ax: Axes to draw on.
        figsize: Size of a new figure, in inches.

    Returns:
        The axes.
    """
    ax = ax or plt.subplots(figsize=figsize, layout="constrained")[1]
    for name in var_names:
        kept = (data.posterior[name] != 0).astype(float)
        rows = [dim for dim in kept.dims if dim not in ("chain", "draw", f"{name}_unit")]
        curves = kept.mean(rows).stack(sample=("chain", "draw")).transpose("sample", ...).to_numpy()
        units = np.arange(1, curves.shape[-1] + 1)
        low, high = np.quantile(curves, [(1 - prob) / 2, (1 + prob) / 2], axis=0)
        (line,) = ax.plot(units, curves.mean(0), marker=".", label=name)
        ax.fill_between(units, low, high, alpha=0.25, color=line.get_color(), linewidth=0)
    ax.set(xlabel="unit", ylabel="keep probability", ylim=(0, 1.02))
    ax.legend(title=f"mean and {prob:.0%} band")
    return ax


def plot_laws(
    laws: Mapping[str, OrderedMask],
    priors: Mapping[str, OrderedMask] | None = None,
    *,
    ax: Axes | None = None,
    figsize: Any = None,
) -> Axes:
    """Plot the probability that each part of a layer is kept, one line a law, coloured by depth.

    Args:
        laws: Laws of masks by name, in the order of the net, such as `net.laws` or the `laws` of an `AutoNested`; where
            a law has a batch shape the line is the mean over it.
        priors: Their priors, by the same names: dashed.
        ax: Axes to draw on.
        figsize: Size of a new figure, in inches.

    Returns:
        The axes.
    """
    ax = ax or plt.subplots(figsize=figsize, layout="constrained")[1]
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


def plot_widths(
    widths: ArrayLike, metrics: Mapping[str, ArrayLike], *, axes: Sequence[Axes] | None = None, figsize: Any = None
) -> Sequence[Axes]:
    """Plot metrics against the width that was kept, one panel a metric.

    Args:
        widths: Widths, shape (W,).
        metrics: Values by name, shape (W,); a metric `name_se` gives `name` a band of one standard error.
        axes: Axes to draw on, one a metric.
        figsize: Size of a new figure, in inches.

    Returns:
        The axes.
    """
    names = [name for name in metrics if not name.endswith("_se")]
    x = np.asarray(widths)
    if axes is None:
        _, axes = plt.subplots(1, len(names), figsize=figsize or (3.4 * len(names), 2.8), layout="constrained")
    for ax, name in zip(np.atleast_1d(np.asarray(axes)), names, strict=True):
        y = np.asarray(metrics[name])
        ax.plot(x, y, marker="o")
        if f"{name}_se" in metrics:
            error = np.asarray(metrics[f"{name}_se"])
            ax.fill_between(x, y - error, y + error, alpha=0.25, linewidth=0)
        ax.set(xlabel="width kept", ylabel=name)
    return axes


def plot_prefixes(
    images: ArrayLike, reconstructions: Mapping[int, ArrayLike], *, figsize: Any = None, cmap: str = "gray_r"
) -> Figure:
    """Plot images, one a column, above their reconstructions from codes of growing length.

    Args:
        images: Images with pixels in [0, 1], shape (N, H, W).
        reconstructions: Reconstructions by code length, each of shape (N, H, W).
        figsize: Size of the figure, in inches.
        cmap: Colour map.

    Returns:
        The figure.
    """
    rows = [("data", np.asarray(images))] + [(str(k), np.asarray(r)) for k, r in sorted(reconstructions.items())]
    num_columns = len(rows[0][1])
    figure, axes = plt.subplots(
        len(rows),
        num_columns,
        figsize=figsize or (0.7 * num_columns + 0.6, 0.75 * len(rows)),
        layout="constrained",
        squeeze=False,
    )
    for line, (label, pictures) in zip(axes, rows, strict=True):
        for ax, picture in zip(line, pictures, strict=True):
            ax.imshow(picture, cmap=cmap, vmin=0, vmax=1)
            ax.set(xticks=[], yticks=[])
        line[0].set_ylabel(label, rotation=0, ha="right", va="center")
    return figure
