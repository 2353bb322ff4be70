"""Figures of autoencoders with an ordered code."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import matplotlib.pyplot as plt
import numpy as np
import torch
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from pyro_vnd.diagnostics.prefix_scores import PrefixModel
from pyro_vnd.nn.mode import module_mode

__all__ = ["plot_class_lengths", "plot_rate_distortion", "plot_samples", "plot_traversals"]

_DEFAULT_UNITS = 8


class _Decodes(PrefixModel, Protocol):
    def decode(self, z: Tensor, /) -> Tensor:
        """Return images of codes, shape (N, K)."""


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
    ax = ax or plt.subplots(figsize=figsize, layout="constrained")[1]
    for number, (method, data) in enumerate(methods.items()):
        if "rate" not in data or "distortion" not in data:
            raise ValueError(
                f"plot_rate_distortion: `datasets` must have rate and distortion; {method!r} has "
                f"{sorted(map(str, data.data_vars))}"
            )
        data = data.sortby("prefix")
        style: dict[str, Any] = {"color": f"C{number}", "elinewidth": 0.8}
        (rate, rate_error), (distortion, error) = (_over_seeds(data[name]) for name in ("rate", "distortion"))
        ax.errorbar(rate, distortion, error, rate_error, marker="o", markersize=4, label=method or None, **style)
        for place, (length, x, y) in enumerate(zip(data["prefix"].values, rate, distortion, strict=True)):
            # Long codes may lie close together: every other label is on the other side of the line.
            sides: dict[str, Any] = {"ha": "right", "va": "top"} if place % 2 else {"ha": "left", "va": "bottom"}
            offset = (-4, -4) if place % 2 else (4, 4)
            ax.annotate(str(length), (x, y), offset, textcoords="offset points", color=f"C{number}", **sides)
        if "rate_learned" in data:
            (x, x_error), (y, y_error) = (_over_seeds(data[f"{name}_learned"]) for name in ("rate", "distortion"))
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
    ax = ax or plt.subplots(figsize=figsize, layout="constrained")[1]
    colors = plt.get_cmap("viridis")(np.linspace(0, 0.95, len(names)))
    order = keep_probs.mean("seed").sum("unit").argsort().values
    for color, number in zip(colors, order, strict=True):
        mean = keep_probs.isel({"class": number}).mean("seed")
        ax.plot(keep_probs["unit"], mean, marker=".", color=color, label=f"{names[number]}: {mean.sum().item():.1f}")
    ax.set(xlabel="latent", ylabel="keep probability", ylim=(0, 1.02))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend(title="mean length", fontsize="small")
    return ax


def plot_traversals(
    model: _Decodes,
    x: Tensor,
    units: Sequence[int] | None = None,
    *,
    span: float = 2.5,
    num_steps: int = 9,
    ax: Axes | None = None,
    figsize: Any = None,
    cmap: str = "gray_r",
) -> Axes:
    """Plot what becomes of an image when one number of its code changes, one row a latent in the learned order.

    Args:
        model: Has `decode(z)` beside what `PrefixModel` names.
        x: An image, without batch dimension.
        units: Latents from 1 to K; the first eight by default.
        span: Values go from minus to plus this; the prior's deviation is one.
        num_steps: Values of a latent.
        ax: Axes to draw on.
        figsize: Size of a new figure, in inches.
        cmap: Colour map of gray images.

    Returns:
        The axes.

    Raises:
        ValueError: If a latent is not in 1..K, `span` or `num_steps` is too small, a latent has several numbers, or
            images cannot be shown.
    """
    units = list(range(1, min(_DEFAULT_UNITS, model.num_latents) + 1)) if units is None else list(units)
    if not units or not all(unit in range(1, model.num_latents + 1) for unit in units):
        raise ValueError(f"plot_traversals: `units` must be integers from 1 to {model.num_latents}; got {units}")
    if not 0 < span < math.inf or num_steps < 2:
        raise ValueError(
            f"plot_traversals: `span` must be finite and > 0 and `num_steps` at least 2; got {span} and {num_steps}"
        )
    with torch.no_grad(), module_mode([model], training=False):
        code = model.embed(x[None], model.num_latents)
        if code.shape != (1, model.num_latents):
            raise ValueError(
                f"plot_traversals: `model.embed` must return codes of shape (1, {model.num_latents}), one number a "
                f"latent; got {tuple(code.shape)}"
            )
        values = torch.linspace(-span, span, num_steps).to(code)
        codes = code.repeat(len(units), num_steps, 1)
        for row, unit in zip(codes, units, strict=True):
            row[:, unit - 1] = values
        images = _pictures("plot_traversals", model.decode(codes.flatten(0, 1)))
    ax = _mosaic(images, len(units), [str(unit) for unit in units], ax, figsize, cmap)
    ax.set(xlabel="its value", ylabel="latent")
    width = images.shape[2]
    ax.set_xticks([(width + 1) * step + (width - 1) / 2 for step in range(num_steps)], [f"{v:.1f}" for v in values])
    return ax


def plot_samples(
    model: PrefixModel,
    lengths: Sequence[int | None],
    num_samples: int = 10,
    *,
    seed: int = 0,
    ax: Axes | None = None,
    figsize: Any = None,
    cmap: str = "gray_r",
) -> Axes:
    """Plot samples from the prior, one row a length.

    Each row has the same random numbers: in a column the latents of a short code are the first ones of a long code.
    The caller's random state is left as it was.

    Args:
        model: The model, in the terms of `PrefixModel`.
        lengths: Lengths of the code; None draws them from their prior.
        num_samples: Samples in a row.
        seed: Seed of the samples.
        ax: Axes to draw on.
        figsize: Size of a new figure, in inches.
        cmap: Colour map of gray images.

    Returns:
        The axes.

    Raises:
        ValueError: If there are no lengths or samples, or images cannot be shown.
    """
    if not len(lengths) or num_samples < 1:
        raise ValueError(
            f"plot_samples: `lengths` must not be empty and `num_samples` at least 1; got {list(lengths)} and "
            f"{num_samples}"
        )
    rows = []
    with torch.random.fork_rng(), torch.no_grad(), module_mode([model], training=False):
        for length in lengths:
            torch.manual_seed(seed)
            rows.append(_pictures("plot_samples", model.sample(num_samples, length)))
    labels = ["prior" if length is None else str(length) for length in lengths]
    ax = _mosaic(np.concatenate(rows), len(rows), labels, ax, figsize, cmap)
    ax.set_ylabel("code length")
    return ax


def _over_seeds(values: xr.DataArray) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean over seeds and its standard error, zero for one seed."""
    mean, number = values.mean("seed").to_numpy(), values.sizes["seed"]
    return mean, values.std("seed", ddof=1).to_numpy() / number**0.5 if number > 1 else np.zeros_like(mean)


def _pictures(name: str, images: Tensor) -> np.ndarray:
    """Return images as (N, H, W) or (N, H, W, 3), square if they were flattened."""
    pixels = images.detach().cpu().double().numpy()
    if pixels.ndim == 2 and math.isqrt(pixels.shape[1]) ** 2 == pixels.shape[1]:
        side = math.isqrt(pixels.shape[1])
        return pixels.reshape(-1, side, side)
    if pixels.ndim == 3:
        return pixels
    if pixels.ndim == 4 and pixels.shape[1] in (1, 3):
        return pixels[:, 0] if pixels.shape[1] == 1 else pixels.transpose(0, 2, 3, 1).clip(0, 1)
    raise ValueError(
        f"{name}: `model` must give images of shape (N, H, W), (N, 1, H, W), (N, 3, H, W) or squares that are "
        f"flattened; got {pixels.shape}"
    )


def _mosaic(images: np.ndarray, num_rows: int, labels: Sequence[str], ax: Axes | None, figsize: Any, cmap: str) -> Axes:
    """Draw images row by row as one picture, a pixel apart."""
    number, height, width, *depth = images.shape
    num_columns = number // num_rows
    if ax is None:
        _, ax = plt.subplots(figsize=figsize or (0.6 * num_columns + 0.8, 0.6 * num_rows + 0.5), layout="constrained")
    padding = ((0, 0), (0, 1), (0, 1), *[(0, 0)] * len(depth))
    padded = np.pad(images, padding, constant_values=1.0 if depth else np.nan)
    tiles = padded.reshape(num_rows, num_columns, height + 1, width + 1, *depth).swapaxes(1, 2)
    ax.imshow(tiles.reshape(num_rows * (height + 1), num_columns * (width + 1), *depth), cmap=cmap, vmin=0, vmax=1)
    ax.set_xticks([])
    ax.set_yticks([(height + 1) * row + (height - 1) / 2 for row in range(num_rows)], labels)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    return ax
