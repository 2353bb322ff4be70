"""Axes to draw on, and their ticks."""

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

__all__ = ["log_scale", "one_axes", "row_of_axes"]


def one_axes(ax: Axes | None, figsize: Any) -> Axes:
    """Return the given axes, or those of a new figure."""
    return plt.subplots(figsize=figsize, layout="constrained")[1] if ax is None else ax


def row_of_axes(
    name: str, ax: Sequence[Axes] | Axes | None, number: int, figsize: Any, *, share: bool = False
) -> np.ndarray:
    """Return the given axes, or those of a new figure, one row of them.

    Args:
        name: The function that is called, for its error.
        ax: The axes that its caller gave.
        number: How many there must be.
        figsize: Size of a new figure, in inches.
        share: Whether the axes of a new figure have the same limits.

    Returns:
        The axes, shape (number,).

    Raises:
        ValueError: If `ax` are not as many.
    """
    if ax is None:
        options: dict[str, Any] = {"sharex": share, "sharey": share, "squeeze": False, "layout": "constrained"}
        return plt.subplots(1, number, figsize=figsize, **options)[1][0]
    axes = np.atleast_1d(np.asarray(ax, dtype=object)).ravel()
    if len(axes) != number:
        raise ValueError(f"{name}: `ax` must be {number} axes, one a panel; got {len(axes)}")
    return axes


def log_scale(ax: Axes) -> None:
    """Make the horizontal axis logarithmic, with plain numbers at 1, 2 and 5 of each decade: 500, 1k, 2k."""
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    ax.xaxis.set_minor_formatter(NullFormatter())
