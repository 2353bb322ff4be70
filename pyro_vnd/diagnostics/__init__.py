"""Posteriors in ArviZ, calibration and figures; the only part that imports ArviZ or matplotlib."""

from pyro_vnd.diagnostics._arviz import summary
from pyro_vnd.diagnostics.calibration import classification_metrics
from pyro_vnd.diagnostics.plots import plot_keep_probs, plot_prefixes, plot_widths
from pyro_vnd.diagnostics.to_arviz import to_arviz

__all__ = ["classification_metrics", "plot_keep_probs", "plot_prefixes", "plot_widths", "summary", "to_arviz"]
