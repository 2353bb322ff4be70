"""Labels scored whose probabilities are few enough to be kept: classes, yes or no, ordered levels."""

from collections.abc import Mapping
from typing import Any

import torch
import xarray as xr
from torch import Tensor

from pyro_vnd.diagnostics.metrics.calibration import (
    NUM_BINS,
    calibration_bins,
    check_rows,
    scale_temperature,
)
from pyro_vnd.diagnostics.metrics.ood import SCORES, ood_scores, score_limits
from pyro_vnd.diagnostics.metrics.predictive import (
    AveragedPredictive,
    average_draws,
    predictive_metrics,
    score_log_probs,
)
from pyro_vnd.diagnostics.metrics.scorer import Columns, Scorer, mean_and_error, named_variable

__all__ = ["BitScorer", "ClassScorer", "LevelScorer"]

_CALIBRATED = ("nll", "brier", "ece", "adaptive_ece")


class ClassScorer(Scorer):
    """Classes: right, calibrated, doubtful.

    A row may have several entries, each with a label of its own: metrics are over all of them, scores of a row are
    means over its entries.
    """

    scores = SCORES
    calibrates = True

    def with_draws(self, outputs: Tensor, is_plain: bool) -> Tensor:
        """Return logits (S, N, C); of a single draw they are (N, C), whoever predicted them."""
        return outputs.unsqueeze(0) if outputs.dim() == 2 else outputs

    def targets(self, caller: str, outputs: Tensor, y: Any) -> Tensor:
        """Return labels as integers."""
        return check_rows(caller, "logits", outputs[0], y).cpu()

    def by_class(self, outputs: Tensor) -> Tensor:
        """Return log-probabilities, up to a constant, of each class of each entry, shape (S, N, ..., C)."""
        return outputs

    def columns(self, outputs: Tensor, y: Tensor | None, hidden: Any = None) -> Columns:
        """Keep the averaged log-probabilities of all entries."""
        draws = self.by_class(outputs)
        num_rows = outputs.shape[1]
        predictive = average_draws(logits=draws if draws.dim() <= 3 else draws.flatten(1, -2))
        columns = {
            "log_probs": predictive.log_probs.unflatten(0, (num_rows, -1)),
            "expected_entropy": predictive.expected_entropy.unflatten(0, (num_rows, -1)),
        }
        return columns if y is None else columns | {"label": y.cpu().long().reshape(num_rows, -1)}

    def variables(self, columns: Columns) -> dict[str, xr.Variable]:
        """Return what `predictive_metrics` returns, and bins of the confidence."""
        predictive, labels = _entries(columns), columns["label"].flatten()
        bins = calibration_bins(predictive.probs, labels)
        parts = {"bin_count": bins.count, "bin_confidence": bins.confidence, "bin_accuracy": bins.accuracy}
        metrics = predictive_metrics(predictive, labels)
        return {name: named_variable(name, (), value) for name, value in metrics.items()} | {
            name: named_variable(name, ("bin",), values) for name, values in parts.items()
        }

    def validation(self, outputs: Tensor, y: Tensor) -> Columns:
        """Keep the averaged log-probabilities and the labels of all entries."""
        columns = self.columns(outputs, y)
        return {"log_probs": columns["log_probs"].flatten(0, -2), "label": columns["label"].flatten()}

    def calibrated(self, columns: Columns) -> dict[str, xr.Variable]:
        """Return the temperature, and metrics at it."""
        assert self.temperature is not None
        scaled = scale_temperature(_entries(columns).log_probs, self.temperature)
        metrics = score_log_probs(scaled, columns["label"].flatten())
        found = {"temperature": self.temperature} | {f"{name}_calibrated": metrics[name] for name in _CALIBRATED}
        return {name: named_variable(name, (), value) for name, value in found.items()}

    def row_scores(self, columns: Columns) -> dict[str, Tensor]:
        """Return the mean of each score over the entries of a row."""
        num_rows = len(columns["log_probs"])
        scores = ood_scores(_entries(columns))
        return {name: values.unflatten(0, (num_rows, -1)).mean(-1) for name, values in scores.items()}

    def limits(self, columns: Columns) -> Mapping[str, float]:
        """Return the largest value of each score."""
        return score_limits(columns["log_probs"].shape[-1])

    def attrs(self, columns: Columns) -> dict[str, int]:
        """Say how many rows, classes and bins there are."""
        num_classes = columns["log_probs"].shape[-1]
        return super().attrs(columns) | {"num_classes": num_classes, "num_bins": NUM_BINS}


class BitScorer(ClassScorer):
    """Labels 0 or 1, one or several a row: two classes each."""

    with_draws = Scorer.with_draws
    targets = Scorer.targets

    def by_class(self, outputs: Tensor) -> Tensor:
        """Return log-probabilities of 0 and 1, up to a constant."""
        logits: Any = self.likelihood.entries(outputs, 2)
        return torch.stack([torch.zeros_like(logits.logits), logits.logits], -1)


class LevelScorer(ClassScorer):
    """Ordered levels: as classes, and how far the median is off."""

    with_draws = Scorer.with_draws
    targets = Scorer.targets

    def by_class(self, outputs: Tensor) -> Tensor:
        """Return log-probabilities of the levels."""
        levels: Any = self.likelihood.entries(outputs.double(), 2)
        return levels.logits

    def variables(self, columns: Columns) -> dict[str, xr.Variable]:
        """Add the mean absolute error of the median of the averaged probabilities, which has the least."""
        median = (columns["log_probs"].exp().cumsum(-1) < 0.5).sum(-1)
        errors = (median - columns["label"]).abs().double().mean(-1)
        return super().variables(columns) | mean_and_error("mae", errors)


def _entries(columns: Columns) -> AveragedPredictive:
    """Return the predictive of all entries of all rows."""
    return AveragedPredictive(columns["log_probs"].flatten(0, -2), columns["expected_entropy"].flatten())
