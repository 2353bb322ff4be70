"""Figures of what `evaluate_lengths` measured."""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from numpy.typing import ArrayLike
from torch import Tensor

from pyro_vnd._sizes import check_count
from pyro_vnd.diagnostics.plots.axes import one_axes
from pyro_vnd.diagnostics.plots.images import pictures_of
from pyro_vnd.diagnostics.plots.prefixes import over_seeds

__all__ = ["plot_lengths", "plot_sorted_by_length"]

_NAMES = {
    "fixed": "one length for all",
    "model": "lengths from the encoder",
    "decoded": "from {num_decoded} decodes",
    "exact": "exact",
}
_STYLES = {
    "fixed": {"color": "0.5", "linestyle": "--"},
    "model": {"color": "C0"},
    "decoded": {"color": "C1"},
    "exact": {"color": "C2", "linestyle": ":"},
}


def plot_lengths(
    dataset: xr.Dataset,
    images: ArrayLike | Tensor | None = None,
    *,
    mean_length: float | None = None,
    figsize: Any = None,
) -> np.ndarray:
    """Plot what choosing the length of each code is worth: images by their length, error, rate and distortion.

    Args:
        dataset: What `evaluate_lengths` returned; fits joined along `seed`, whose mean is shown with bars of one
            standard error.
        images: The images that it is about, to show some from the shortest code to the longest.
        mean_length: At which they are sorted, one of the dataset's; the middle one by default.
        figsize: Size of the figure, in inches.

    Returns:
        The axes: images if there are any, error by mean length, and distortion by rate if the dataset has it.

    Raises:
        ValueError: If the dataset is no such thing, or images are not as many.
    """
    _check("plot_lengths", dataset, "mse", "length")
    panels = ["error", "rate"] if "rate" in dataset else ["error"]
    mosaic: Any = [panels] if images is None else [["images"] * len(panels), panels]
    heights = [1] if images is None else [0.55, 1]
    _, axes = plt.subplot_mosaic(
        mosaic, figsize=figsize or (4.6 * len(panels), 3.4 * sum(heights)), height_ratios=heights, layout="constrained"
    )
    if images is not None:
        plot_sorted_by_length(dataset, images, mean_length=mean_length, ax=axes["images"])
    for law in dataset["law"].values:
        data = dataset.sel(law=law).sortby("mean_length")
        name = _NAMES.get(law, str(law)).format(**dataset.attrs | {"num_decoded": dataset.attrs.get("num_decoded", "")})
        style: dict[str, Any] = {"marker": ".", "capsize": 2, "label": name, **_STYLES.get(law, {})}
        mse, error = over_seeds(data["mse"])
        axes["error"].errorbar(data["mean_length"].values, mse, error, **style)
        if "rate" in dataset:
            (rate, rate_error), (distortion, error) = (over_seeds(data[key]) for key in ("rate", "distortion"))
            axes["rate"].errorbar(rate, distortion, error, rate_error, **style)
    axes["error"].set(xlabel="mean length (latents)", ylabel="squared error of a pixel", ylim=(0, None))
    axes["error"].legend()
    if "rate" in dataset:
        axes["rate"].set(xlabel="rate, the length paid (nats)", ylabel="distortion (nats)")
    return np.array(list(axes.values()), dtype=object)


def plot_sorted_by_length(
    dataset: xr.Dataset,
    images: ArrayLike | Tensor,
    *,
    law: str = "model",
    mean_length: float | None = None,
    num_images: int = 20,
    ax: Axes | None = None,
    figsize: Any = None,
    cmap: str = "gray_r",
) -> Axes:
    """Show images from the one with the shortest code to that with the longest, at equal steps of rank.

    Args:
        dataset: What `evaluate_lengths` returned; the first seed is shown.
        images: The images that it is about, as in `plot_prefixes`.
        law: Whose lengths.
        mean_length: One of the dataset's; the middle one by default.
        num_images: How many are shown, with their lengths.
        ax: Axes to draw on.
        figsize: Size of a new figure, in inches.
        cmap: Colour map of gray images.

    Returns:
        The axes.

    Raises:
        ValueError: If there is not a length for each image, or no such law or mean length.
    """
    _check("plot_sorted_by_length", dataset, "length")
    check_count("plot_sorted_by_length", num_images=num_images)
    means = dataset["mean_length"].values
    mean_length = float(means[len(means) // 2] if mean_length is None else mean_length)
    if mean_length not in means or law not in dataset["law"].values:
        raise ValueError(
            f"plot_sorted_by_length: arguments `law` and `mean_length` must be of {dataset['law'].values.tolist()} and "
            f"{means.tolist()}; got {law!r} and {mean_length:g}"
        )
    lengths = dataset["length"].isel(seed=0).sel(law=law, mean_length=mean_length).values
    if len(images) != len(lengths):  # type: ignore[arg-type]
        raise ValueError(
            f"plot_sorted_by_length: argument `images` must be the {len(lengths)} that were evaluated; got "
            f"{len(images)}"  # type: ignore[arg-type]
        )
    order = np.argsort(lengths, kind="stable")
    shown = order[np.linspace(0, len(order) - 1, min(num_images, len(order))).round().astype(int)]
    pictures = pictures_of("plot_sorted_by_length: `images`", images)[shown]
    num_columns = -(-len(shown) // 2) if len(shown) > 10 else len(shown)
    ax = one_axes(ax, figsize)
    height, width = pictures.shape[1:3]
    gap = max(height // 3, 4)
    num_rows = -(-len(shown) // num_columns)
    canvas = np.ones((num_rows * (height + gap), num_columns * (width + 2), *pictures.shape[3:]))
    if pictures.ndim == 3 and cmap.endswith("_r"):
        canvas[:] = 0
    for place, (picture, index) in enumerate(zip(pictures, shown, strict=True)):
        row, column = divmod(place, num_columns)
        top, left = row * (height + gap) + gap, column * (width + 2)
        canvas[top : top + height, left : left + width] = picture
        ax.text(left + width / 2, top - 1, f"{lengths[index]:.1f}", ha="center", va="bottom", fontsize="small")
    ax.imshow(canvas, cmap=cmap, vmin=0, vmax=1, interpolation="nearest")
    ax.set_axis_off()
    ax.set_title(f"from the shortest code to the longest, at mean length {mean_length:g}", fontsize="medium")
    return ax


def _check(function: str, dataset: xr.Dataset, *names: str) -> None:
    if not set(names) <= set(dataset.data_vars):
        raise ValueError(
            f"{function}: argument `dataset` must be what evaluate_lengths returned; it has "
            f"{sorted(map(str, dataset.data_vars))}"
        )
