"""Figures of what `evaluate`, `evaluate_widths` and `evaluate_cascade` measured."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes

from pyro_vnd.diagnostics.plots.axes import log_scale, row_of_axes

__all__ = ["plot_ood", "plot_reliability", "plot_widths"]


def plot_widths(
    datasets: Mapping[str, xr.Dataset] | xr.Dataset,
    metrics: Sequence[str] = ("accuracy", "nll", "ece"),
    *,
    x: str = "width",
    ax: Sequence[Axes] | Axes | None = None,
    figsize: Any = None,
) -> np.ndarray:
    """Plot metrics against the width, or the cost, one panel a metric and one line a method.

    Lines are means over seeds with a band of one standard error over seeds; from a single seed the band is the standard
    error over rows, for metrics that have it. A method without widths is a dashed level line; cascades have costs in
    their place.

    Args:
        datasets: What `evaluate_widths`, `evaluate_cascade` or `evaluate` returned, by name of the method; fits joined
            along `seed`.
        metrics: Names of variables; for those of foreign data select set and score first,
            `dataset.sel(ood="svhn", score="entropy")`.
        x: What is on the horizontal axis: "width", "multiply_adds" or "parameters"; with cascades "multiply_adds".
        ax: Axes to draw on, one a metric.
        figsize: Size of a new figure, in inches.

    Returns:
        The axes, shape (number of metrics,).

    Raises:
        ValueError: If a dataset lacks a metric, or `x` besides its width, or a metric has other dimensions, or `ax` is
            not as many axes as there are metrics.
    """
    methods = {"": datasets} if isinstance(datasets, xr.Dataset) else dict(datasets)
    axes = row_of_axes("plot_widths", ax, len(metrics), figsize or (3.4 * len(metrics), 3))
    for panel, metric in zip(axes, metrics, strict=True):
        for number, (method, data) in enumerate(methods.items()):
            _check_metric(method, data, metric, x)
            mean, error = _over_seeds(data, metric)
            style: dict[str, Any] = {"color": f"C{number}", "label": method}
            band: dict[str, Any] = {"color": f"C{number}", "alpha": 0.2, "linewidth": 0}
            if _sizes(mean):
                position = data[x].mean("seed") if "seed" in data[x].dims else data[x]
                panel.plot(position, mean, marker=".", **style)
                panel.fill_between(position, mean - error, mean + error, **band)
            else:
                panel.axhline(mean.item(), linestyle="--", linewidth=1, **style)
                panel.axhspan((mean - error).item(), (mean + error).item(), **band)
        first = next(iter(methods.values()))
        by_width = next((data for data in methods.values() if _sizes(data)), first)
        panel.set(xlabel=_label(by_width, x) if x in by_width.variables else x, ylabel=_label(first, metric))
        if x != "width":
            log_scale(panel)
    if list(methods) != [""]:
        axes[0].legend()
    return axes


def plot_reliability(
    dataset: xr.Dataset, *, ax: Sequence[Axes] | Axes | None = None, figsize: Any = None
) -> np.ndarray:
    """Plot accuracy against confidence, one panel a width, and the share of rows in each bin; seeds are pooled.

    Args:
        dataset: What `evaluate_widths` or `evaluate` returned.
        ax: Axes to draw on, one a width.
        figsize: Size of a new figure, in inches.

    Returns:
        The axes, shape (number of widths,).

    Raises:
        ValueError: If `ax` is not as many axes as there are widths.
    """
    panels = list(_panels(dataset))
    axes = row_of_axes("plot_reliability", ax, len(panels), figsize or (2.6 * len(panels) + 0.5, 2.8), share=True)
    edges = np.linspace(0, 1, dataset.sizes["bin"] + 1)
    width = edges[1]
    for panel, (title, data) in zip(axes, panels, strict=True):
        count = data["bin_count"].sum("seed")
        confidence, accuracy = (
            ((data[name] * data["bin_count"]).sum("seed") / count.where(count > 0)).to_numpy()
            for name in ("bin_confidence", "bin_accuracy")
        )
        panel.plot([0, 1], [0, 1], color="0.6", linewidth=1)
        panel.bar(edges[:-1], np.nan_to_num(accuracy), width, align="edge", alpha=0.35)
        panel.plot(confidence, accuracy, ".", color="C0", label="accuracy")
        middles = (edges[:-1] + edges[1:]) / 2
        panel.bar(middles, count / count.sum(), 0.4 * width, color="0.5", label="share of rows")
        panel.set(title=f"{title}ECE {data['ece'].mean().item():.3f}", xlabel="confidence", xlim=(0, 1), ylim=(0, 1.02))
    axes[0].set_ylabel("accuracy, share of rows")
    axes[0].legend(fontsize="small", loc="upper left")
    return axes


def plot_ood(
    dataset: xr.Dataset,
    score: str = "entropy",
    *,
    ax: Sequence[Axes] | Axes | None = None,
    figsize: Any = None,
) -> np.ndarray:
    """Plot histograms of a score on test data and on foreign data, one panel a width; seeds are pooled.

    Args:
        dataset: What `evaluate_widths` or `evaluate` returned with `ood`.
        score: "doubt", "entropy" or "mutual_information".
        ax: Axes to draw on, one a width.
        figsize: Size of a new figure, in inches.

    Returns:
        The axes, shape (number of widths,).

    Raises:
        ValueError: If the dataset has no such score, or `ax` is not as many axes as there are widths.
    """
    known = dataset["score"].values.tolist() if "score_count" in dataset else []
    if score not in known:
        raise ValueError(f"plot_ood: `score` must be one of {known}, which the dataset has; got {score!r}")
    chosen = dataset.sel(score=score)
    panels = list(_panels(chosen))
    axes = row_of_axes("plot_ood", ax, len(panels), figsize or (2.6 * len(panels) + 0.5, 2.8), share=True)
    edges = np.linspace(0, float(chosen["score_limit"].mean()), dataset.sizes["score_bin"] + 1)
    for panel, (title, data) in zip(axes, panels, strict=True):
        counts = data["score_count"].sum("seed")
        shares = counts / counts.sum("score_bin")
        for number, source in enumerate(shares["source"].values):
            label = str(source)
            if number:
                label += f", AUROC {data['auroc'].sel(ood=source).mean().item():.3f}"
            values = shares.sel(source=source).to_numpy()
            panel.stairs(values, edges, fill=True, alpha=0.3, color=f"C{number}")
            panel.stairs(values, edges, color=f"C{number}", label=label)
        name = score.replace("_", " ")
        panel.set(title=title.removesuffix(", "), xlabel=f"{name}{_UNITS.get(score, '')}", yscale="log")
        panel.legend(fontsize="small")
    axes[0].set(ylabel="share of rows")
    axes[0].set_ylim(top=10 * axes[0].get_ylim()[1])  # room for the legends
    return axes


_SIZES = {"width": "width", "mean_cost": "mean cost"}  # one or the other is a dimension
_UNITS = {"entropy": " (nats)", "mutual_information": " (nats)"}


def _panels(dataset: xr.Dataset) -> Iterator[tuple[str, xr.Dataset]]:
    """Yield the part of each width, with the beginning of its title."""
    sizes = _sizes(dataset)
    if not sizes:
        yield "", dataset
    for name in sizes:
        for size in dataset[name].values:
            yield f"{_SIZES[name]} {size:.3g}, ", dataset.sel({name: size})


def _sizes(data: xr.Dataset | xr.DataArray) -> list[str]:
    """Return the dimension along which a method was scored at several sizes, if it was."""
    return [name for name in _SIZES if name in data.dims]


def _over_seeds(data: xr.Dataset, metric: str) -> tuple[xr.DataArray, xr.DataArray]:
    """Return the mean over seeds and its standard error, from a single seed that over rows, or else zero."""
    values = data[metric]
    mean, num_seeds = values.mean("seed"), values.sizes["seed"]
    if num_seeds > 1:
        return mean, values.std("seed", ddof=1) / num_seeds**0.5
    over_rows = data.get(f"{metric}_se")
    return mean, xr.zeros_like(mean) if over_rows is None else over_rows.mean("seed")


def _check_metric(method: str, data: xr.Dataset, metric: str, x: str) -> None:
    if metric not in data:
        raise ValueError(
            f"plot_widths: dataset {method!r} has no metric {metric!r}; it has {sorted(map(str, data.data_vars))}"
        )
    extra = sorted(str(dim) for dim in data[metric].dims if dim not in ("seed", *_SIZES))
    if extra:
        raise ValueError(
            f"plot_widths: metric {metric!r} has the dimensions {extra} too; select from them first, as in "
            f"dataset.sel(ood=..., score=...)"
        )
    if _sizes(data[metric]) and x not in data.variables:
        known = [name for name in (*_SIZES, "multiply_adds", "parameters") if name in data.variables]
        raise ValueError(f"plot_widths: dataset {method!r} has no `x` {x!r}; it has {', '.join(known)}")


def _label(data: xr.Dataset, name: str) -> str:
    attrs = data[name].attrs
    label, units = attrs.get("long_name", name), attrs.get("units", "1")
    return label if units == "1" else f"{label} ({units})"
