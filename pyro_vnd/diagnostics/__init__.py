"""Predictions scored by width, posteriors in ArviZ, figures; the only part that imports ArviZ, xarray or matplotlib."""

from pyro_vnd.diagnostics._arviz import summary
from pyro_vnd.diagnostics.calibration import CalibrationBins, calibration_bins, classification_metrics
from pyro_vnd.diagnostics.evaluate import average_batches, evaluate, net_cost
from pyro_vnd.diagnostics.evaluate_prefixes import evaluate_prefixes
from pyro_vnd.diagnostics.evaluate_widths import evaluate_learned, evaluate_widths
from pyro_vnd.diagnostics.generative import generative_metrics, nearest_distances, weights_hash
from pyro_vnd.diagnostics.ood import ood_metrics, ood_scores
from pyro_vnd.diagnostics.plots import plot_keep_probs, plot_laws, plot_prefixes, plot_widths
from pyro_vnd.diagnostics.plots_metrics import plot_metrics, plot_ood, plot_reliability
from pyro_vnd.diagnostics.plots_prefixes import (
    plot_class_lengths,
    plot_rate_distortion,
    plot_samples,
    plot_traversals,
)
from pyro_vnd.diagnostics.predictive import AveragedPredictive, average_draws, predictive_metrics
from pyro_vnd.diagnostics.prefix_scores import PrefixModel
from pyro_vnd.diagnostics.temperature import fit_temperature, scale_temperature
from pyro_vnd.diagnostics.to_arviz import to_arviz

__all__ = [
    "AveragedPredictive",
    "CalibrationBins",
    "PrefixModel",
    "average_batches",
    "average_draws",
    "calibration_bins",
    "classification_metrics",
    "evaluate",
    "evaluate_learned",
    "evaluate_prefixes",
    "evaluate_widths",
    "fit_temperature",
    "generative_metrics",
    "nearest_distances",
    "net_cost",
    "ood_metrics",
    "ood_scores",
    "plot_class_lengths",
    "plot_keep_probs",
    "plot_laws",
    "plot_metrics",
    "plot_ood",
    "plot_prefixes",
    "plot_rate_distortion",
    "plot_reliability",
    "plot_samples",
    "plot_traversals",
    "plot_widths",
    "predictive_metrics",
    "scale_temperature",
    "summary",
    "to_arviz",
    "weights_hash",
]
