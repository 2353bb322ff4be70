"""What a kind of prediction is scored by: columns of numbers by row, made batch by batch, and metrics of their sums."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
import xarray as xr
from torch import Tensor

from pyro_vnd.diagnostics.metrics.calibration import fit_temperature
from pyro_vnd.diagnostics.metrics.variables import variable
from pyro_vnd.nn import NetLikelihood

__all__ = ["Columns", "Scorer", "mean_and_error", "named_variable", "ratio_and_error"]

Columns = Mapping[str, Tensor]  # by name, with a row for each example: float64, on the CPU

_LABELS = {
    "accuracy": ("accuracy", "1"),
    "nll": ("negative log-likelihood", "nats"),
    "perplexity": ("perplexity", "1"),
    "brier": ("Brier score", "1"),
    "ece": ("expected calibration error", "1"),
    "adaptive_ece": ("adaptive calibration error", "1"),
    "miou": ("mean intersection over union", "1"),
    "iou": ("intersection over union", "1"),
    "mae": ("mean absolute error of the median", "levels"),
    "rmse": ("root mean squared error", "of y"),
    "crps": ("continuous ranked probability score", "of y"),
    "deviance": ("mean Poisson deviance", "nats"),
    "coverage": ("coverage of central intervals", "1"),
    "entropy": ("predictive entropy", "nats"),
    "mutual_information": ("mutual information", "nats"),
    "temperature": ("temperature", "1"),
    "bin_count": ("rows in the bin", "1"),
    "bin_confidence": ("confidence", "1"),
    "bin_accuracy": ("accuracy", "1"),
    "auroc": ("AUROC", "1"),
    "aupr": ("AUPR", "1"),
    "fpr95": ("FPR at 95 % TPR", "1"),
    "prevalence": ("share of foreign rows", "1"),
    "score_count": ("rows", "1"),
    "score_limit": ("largest value of the score", "see score"),
}
_ENDINGS = {"_calibrated": "calibrated", "_se": "standard error over rows"}
named_variable = partial(variable, _LABELS, _ENDINGS)


class Scorer:
    r"""How predictions under a likelihood are scored.

    Draws are averaged entry by entry, $p(y) = \frac1S \sum_s p_s(y)$, before anything is computed from them, and what
    is kept of a batch are columns with a row for each example.

    Args:
        likelihood: The likelihood.
    """

    scores: ClassVar[tuple[str, ...]]  # of how foreign a row looks, which are columns or follow from them
    calibrates: ClassVar[bool] = False  # whether probabilities can have a temperature

    def __init__(self, likelihood: NetLikelihood) -> None:
        self.likelihood = likelihood
        self.temperature: float | None = None

    def with_draws(self, outputs: Tensor, is_plain: bool) -> Tensor:
        """Return outputs of S draws, shape (S, N, ...).

        Args:
            outputs: What was predicted.
            is_plain: Whether a module predicted it that knows of no draws.
        """
        return outputs.unsqueeze(0) if is_plain else outputs

    def targets(self, caller: str, outputs: Tensor, y: Any) -> Tensor:
        """Return what is observed, on the CPU; raise a ValueError if outputs (S, N, ...) or y do not fit."""
        self.likelihood.check_outputs(caller, outputs[0], outputs.shape[1])
        return self.likelihood.targets(caller, y, outputs[0])

    def columns(self, outputs: Tensor, y: Tensor | None, hidden: Any = None) -> Columns:
        """Reduce a batch.

        Args:
            outputs: Of S draws of the net, shape (S, N, ...).
            y: What `targets` made of what is observed; without it, the columns are those of foreign rows.
            hidden: Of foreign rows, what came with them: only what it says of entries that do not count is used.

        Raises:
            ValueError: If outputs are not finite.
        """
        raise NotImplementedError

    def variables(self, columns: Columns) -> dict[str, xr.Variable]:
        """Return metrics of all rows together."""
        raise NotImplementedError

    def validation(self, outputs: Tensor, y: Tensor) -> Columns:
        """Reduce a batch of validation data to what `fit_temperature` takes; arguments as in `columns`."""
        raise NotImplementedError

    def calibrate(self, validation: Columns) -> None:
        """Find the temperature of the averaged probabilities on validation data, before anything is reduced."""
        self.temperature = fit_temperature(validation["log_probs"], validation["label"])

    def calibrated(self, columns: Columns) -> dict[str, xr.Variable]:
        """Return the temperature, and metrics at it."""
        raise NotImplementedError

    def row_scores(self, columns: Columns) -> dict[str, Tensor]:
        """Return how foreign each row looks, by name of the score, larger meaning more so."""
        return {name: columns[name] for name in self.scores}

    def limits(self, columns: Columns) -> Mapping[str, float]:
        """Return the largest value of each score that has one; the smallest is zero."""
        return {}

    def attrs(self, columns: Columns) -> dict[str, int]:
        """Say what was counted."""
        return {"num_rows": len(next(iter(columns.values())))}

    def finite(self, outputs: Tensor) -> Tensor:
        """Return outputs in float64 on the CPU, as not every accelerator has float64."""
        if not bool(outputs.isfinite().all()):
            raise ValueError("evaluate: outputs of the net must be finite; got NaN or inf")
        return outputs.detach().to("cpu", torch.float64)


def mean_and_error(name: str, values: Tensor) -> dict[str, xr.Variable]:
    """Return the mean of values, shape (N,), and its standard error over rows."""
    error = (values.var(correction=0) / len(values)).sqrt().item()
    return {name: named_variable(name, (), values.mean().item()), f"{name}_se": named_variable(f"{name}_se", (), error)}


def ratio_and_error(name: str, sums: Tensor, counts: Tensor) -> dict[str, xr.Variable]:
    """Return the mean over all entries of all rows, and its standard error over rows, which differ in entries.

    Args:
        name: Name of the metric.
        sums: Sum over the entries of each row, shape (N,).
        counts: Entries of each row, shape (N,).
    """
    ratio = sums.sum() / counts.sum()
    error = ((sums - ratio * counts).square().sum().sqrt() / counts.sum()).item()
    return {name: named_variable(name, (), ratio.item()), f"{name}_se": named_variable(f"{name}_se", (), error)}


def join(parts: Sequence[Columns]) -> Columns:
    """Join the rows of several batches."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
