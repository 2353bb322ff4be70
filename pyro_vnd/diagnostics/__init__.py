"""Predictions scored by width, posteriors in ArviZ, figures; the only part that imports ArviZ, xarray or matplotlib."""

from pyro_vnd.diagnostics.metrics.calibration import (
    CalibrationBins,
    calibration_bins,
    classification_metrics,
    fit_temperature,
    scale_temperature,
)
from pyro_vnd.diagnostics.metrics.classification import average_batches, evaluate, net_cost
from pyro_vnd.diagnostics.metrics.generative import generative_metrics, nearest_distances, weights_hash
from pyro_vnd.diagnostics.metrics.ood import ood_metrics, ood_scores
from pyro_vnd.diagnostics.metrics.predictive import AveragedPredictive, average_draws, predictive_metrics
from pyro_vnd.diagnostics.metrics.prefix_scores import PrefixModel
from pyro_vnd.diagnostics.metrics.prefixes import evaluate_prefixes
from pyro_vnd.diagnostics.metrics.widths import evaluate_learned, evaluate_widths, loo_widths, smallest_width
from pyro_vnd.diagnostics.plots.fits import plot_elbo, plot_ranks
from pyro_vnd.diagnostics.plots.images import plot_prefixes, plot_samples, plot_traversals
from pyro_vnd.diagnostics.plots.laws import plot_keep_probs, plot_laws, plot_length_posterior
from pyro_vnd.diagnostics.plots.prefixes import plot_class_lengths, plot_rate_distortion
from pyro_vnd.diagnostics.plots.widths import plot_ood, plot_reliability, plot_widths
from pyro_vnd.diagnostics.posterior._arviz import summary
from pyro_vnd.diagnostics.posterior.khat import khat, khat_by_row, resample
from pyro_vnd.diagnostics.posterior.loo import compare, loo
from pyro_vnd.diagnostics.posterior.sbc import rank_uniformity, sbc
from pyro_vnd.diagnostics.posterior.to_arviz import to_arviz

__all__ = [
    "AveragedPredictive",
    "CalibrationBins",
    "PrefixModel",
    "average_batches",
    "average_draws",
    "calibration_bins",
    "classification_metrics",
    "compare",
    "evaluate",
    "evaluate_learned",
    "evaluate_prefixes",
    "evaluate_widths",
    "fit_temperature",
    "generative_metrics",
    "khat",
    "khat_by_row",
    "loo",
    "loo_widths",
    "nearest_distances",
    "net_cost",
    "ood_metrics",
    "ood_scores",
    "plot_class_lengths",
    "plot_elbo",
    "plot_keep_probs",
    "plot_laws",
    "plot_length_posterior",
    "plot_ood",
    "plot_prefixes",
    "plot_ranks",
    "plot_rate_distortion",
    "plot_reliability",
    "plot_samples",
    "plot_traversals",
    "plot_widths",
    "predictive_metrics",
    "rank_uniformity",
    "resample",
    "sbc",
    "scale_temperature",
    "smallest_width",
    "summary",
    "to_arviz",
    "weights_hash",
]
