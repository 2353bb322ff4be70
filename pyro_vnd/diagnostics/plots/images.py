"""Pictures of what codes of growing length say."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from matplotlib.axes import Axes
from numpy.typing import ArrayLike
from torch import Tensor

from pyro_vnd._state import module_mode
from pyro_vnd.diagnostics.metrics.prefix_model import PrefixModel
from pyro_vnd.diagnostics.plots.axes import one_axes

__all__ = ["pictures_of", "plot_prefixes", "plot_samples", "plot_traversals"]

_DEFAULT_UNITS = 8


class _Decodes(PrefixModel, Protocol):
    def decode(self, z: Tensor, /) -> Tensor:
        """Return images of codes, shape (N, K)."""


def plot_prefixes(
    images: ArrayLike | Tensor,
    reconstructions: Mapping[int, ArrayLike | Tensor],
    *,
    ax: Axes | None = None,
    figsize: Any = None,
    cmap: str = "gray_r",
) -> Axes:
    """Plot images, one a column, above their reconstructions from codes of growing length.

    Args:
        images: Images with pixels in [0, 1], shape (N, H, W), (N, 1, H, W), (N, 3, H, W), (N, H, W, 3) or squares that
            are flattened.
        reconstructions: Reconstructions by code length, each of the same shape.
        ax: Axes to draw on.
        figsize: Size of a new figure, in inches.
        cmap: Colour map of gray images.

    Returns:
        The axes.

    Raises:
        ValueError: If reconstructions have another shape than the images, or these cannot be shown.
    """
    shape = tuple(np.shape(images))
    for length, row in reconstructions.items():
        if (got := tuple(np.shape(row))) != shape:
            raise ValueError(
                f"plot_prefixes: `reconstructions` must have the shape of `images`, {shape}; got {got} for length "
                f"{length}"
            )
    lengths = sorted(reconstructions)
    rows = [images, *(reconstructions[length] for length in lengths)]
    pictures = np.concatenate([pictures_of("plot_prefixes: `images`", row) for row in rows])
    ax = _mosaic(pictures, len(rows), ["data", *map(str, lengths)], ax, figsize, cmap)
    ax.set(xlabel="image", ylabel="code length")
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
        model: As of `evaluate_prefixes`, with `decode(z)`, which returns images of codes.
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
        images = pictures_of("plot_traversals: images of `model`", model.decode(codes.flatten(0, 1)))
    ax = _mosaic(images, len(units), [str(unit) for unit in units], ax, figsize, cmap)
    ax.set(xlabel="value of the latent", ylabel="latent")
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
        model: As of `evaluate_prefixes`; what is needed is `sample(num_samples, length)`.
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
            rows.append(pictures_of("plot_samples: images of `model`", model.sample(num_samples, length)))
    labels = ["prior" if length is None else str(length) for length in lengths]
    ax = _mosaic(np.concatenate(rows), len(rows), labels, ax, figsize, cmap)
    ax.set(xlabel="sample", ylabel="code length")
    return ax


def pictures_of(what: str, images: ArrayLike | Tensor) -> np.ndarray:
    """Return images as (N, H, W) or (N, H, W, 3), square if they were flattened."""
    pixels = images.detach().cpu().double().numpy() if isinstance(images, Tensor) else np.asarray(images)
    if pixels.ndim == 2 and math.isqrt(pixels.shape[1]) ** 2 == pixels.shape[1]:
        side = math.isqrt(pixels.shape[1])
        return pixels.reshape(-1, side, side)
    if pixels.ndim == 3:
        return pixels
    if pixels.ndim == 4 and pixels.shape[1] in (1, 3):
        return pixels[:, 0] if pixels.shape[1] == 1 else pixels.transpose(0, 2, 3, 1).clip(0, 1)
    if pixels.ndim == 4 and pixels.shape[3] == 3:
        return pixels.clip(0, 1)
    raise ValueError(
        f"{what} must have shape (N, H, W), (N, 1, H, W), (N, 3, H, W), (N, H, W, 3) or be squares that are flattened; "
        f"got {pixels.shape}"
    )


def _mosaic(images: np.ndarray, num_rows: int, labels: Sequence[str], ax: Axes | None, figsize: Any, cmap: str) -> Axes:
    """Draw images row by row as one picture, a pixel apart."""
    number, height, width, *depth = images.shape
    num_columns = number // num_rows
    ax = one_axes(ax, figsize or (0.6 * num_columns + 0.8, 0.6 * num_rows + 0.5))
    padding = ((0, 0), (0, 1), (0, 1), *[(0, 0)] * len(depth))
    padded = np.pad(images, padding, constant_values=1.0 if depth else np.nan)
    tiles = padded.reshape(num_rows, num_columns, height + 1, width + 1, *depth).swapaxes(1, 2)
    ax.imshow(tiles.reshape(num_rows * (height + 1), num_columns * (width + 1), *depth), cmap=cmap, vmin=0, vmax=1)
    ax.set_xticks([])
    ax.set_yticks([(height + 1) * row + (height - 1) / 2 for row in range(num_rows)], labels)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    return ax
