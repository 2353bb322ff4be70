"""Figures of what `evaluate_prefixes` measured."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from pyro_vnd.diagnostics.plots.axes import one_axes

__all__ = ["over_seeds", "plot_class_lengths", "plot_rate_distortion"]


def plot_rate_distortion(
    datasets: Mapping[str, xr.Dataset] | xr.Dataset, *, ax: Axes | None = None, figsize: Any = None
) -> Axes:
    """Plot distortion against rate, one line a method with a point a length, which is written beside it.

    Points are means over seeds, with bars of one standard error over seeds where there are several. A star is where
    the lengths are those of the learned posterior. Points of equal ELBO lie on lines that fall by 45 degrees.

    Args:
        datasets: What `evaluate_prefixes` returned, by name of the method; fits joined along `seed`.
        ax: Axes to draw on.
        figsize: Size of a new figure, in inches.

    Returns:
        The axes.

    Raises:
        ValueError: If a dataset lacks rate and distortion.
    """
    methods = {"": datasets} if isinstance(datasets, xr.Dataset) else dict(datasets)
    ax = one_axes(ax, figsize)
    for number, (method, data) in enumerate(methods.items()):
        if "rate" not in data or "distortion" not in data:
            raise ValueError(
                f"plot_rate_distortion: `datasets` must have rate and distortion; {method!r} has "
                f"{sorted(map(str, data.data_vars))}"
            )
        data = data.sortby("prefix")
        style: dict[str, Any] = {"color": f"C{number}", "elinewidth": 0.8}
        (rate, rate_error), (distortion, error) = (over_seeds(data[name]) for name in ("rate", "distortion"))
        ax.errorbar(rate, distortion, error, rate_error, marker="o", markersize=4, label=method or None, **style)
        for place, (length, x, y) in enumerate(zip(data["prefix"].values, rate, distortion, strict=True)):
            # Long codes may lie close together: every other label is on the other side of the line.
            sides: dict[str, Any] = {"ha": "right", "va": "top"} if place % 2 else {"ha": "left", "va": "bottom"}
            offset = (-4, -4) if place % 2 else (4, 4)
            ax.annotate(str(length), (x, y), offset, textcoords="offset points", color=f"C{number}", **sides)
        if "rate_learned" in data:
            (x, x_error), (y, y_error) = (over_seeds(data[f"{name}_learned"]) for name in ("rate", "distortion"))
            ax.errorbar(x, y, y_error, x_error, marker="*", markersize=11, markerfacecolor="none", **style)
    if any("rate_learned" in data for data in methods.values()):
        ax.plot([], [], "*", markersize=11, color="0.4", markerfacecolor="none", label="learned lengths")
    ax.set(xlabel="rate (nats)", ylabel="distortion (nats)")
    if ax.get_legend_handles_labels()[1]:
        ax.legend()
    return ax


def plot_class_lengths(
    dataset: xr.Dataset,
    class_names: Sequence[str] | None = None,
    *,
    ax: Axes | None = None,
    figsize: Any = None,
) -> Axes:
    """Plot the probability that the learned law keeps each latent, one line a class.

    Lines are means over images and seeds. The legend goes from the class with the shortest codes to that with the
    longest, each with its mean length.

    Args:
        dataset: What `evaluate_prefixes` returned for labelled images.
        class_names: Names of the classes, in the order of the labels.
        ax: Axes to draw on.
        figsize: Size of a new figure, in inches.

    Returns:
        The axes.

    Raises:
        ValueError: If the dataset has no `keep_probs`, or there is not a name for each class.
    """
    if "keep_probs" not in dataset:
        raise ValueError(
            f"plot_class_lengths: `dataset` must have keep_probs, of a model with a law of lengths and labelled "
            f"images; it has {sorted(map(str, dataset.data_vars))}"
        )
    keep_probs = dataset["keep_probs"]
    names = [str(label) for label in keep_probs["class"].values] if class_names is None else list(class_names)
    if len(names) != keep_probs.sizes["class"]:
        raise ValueError(
            f"plot_class_lengths: `class_names` must be {keep_probs.sizes['class']} names; got {len(names)}"
        )
    ax = one_axes(ax, figsize)
    colors = plt.get_cmap("viridis")(np.linspace(0, 0.95, len(names)))
    order = keep_probs.mean("seed").sum("unit").argsort().values
    for color, number in zip(colors, order, strict=True):
        mean = keep_probs.isel({"class": number}).mean("seed")
        ax.plot(keep_probs["unit"], mean, marker=".", color=color, label=f"{names[number]}: {mean.sum().item():.1f}")
    ax.set(xlabel="latent", ylabel="keep probability", ylim=(0, 1.02))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend(title="mean length", fontsize="small")
    return ax


def over_seeds(values: xr.DataArray) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean over seeds and its standard error, zero for one seed."""
    mean, number = values.mean("seed").to_numpy(), values.sizes["seed"]
    return mean, values.std("seed", ddof=1).to_numpy() / number**0.5 if number > 1 else np.zeros_like(mean)
