"""Labels of tokens and of pixels scored, whose probabilities are too many to be kept."""

import math
from collections.abc import Mapping
from typing import Any

import torch
import xarray as xr
from torch import Tensor

from pyro_vnd.diagnostics.metrics.calibration import LOG_TINY, NUM_BINS, scale_temperature
from pyro_vnd.diagnostics.metrics.ood import SCORES, ood_scores, score_limits
from pyro_vnd.diagnostics.metrics.predictive import AveragedPredictive, average_draws
from pyro_vnd.diagnostics.metrics.scorer import Columns, Scorer, named_variable, ratio_and_error
from pyro_vnd.nn import TokenLabels

__all__ = ["PixelScorer", "TokenScorer"]


class TokenScorer(Scorer):
    """A class for each token: metrics are means over all tokens that count, scores of a row are means over its own."""

    scores = SCORES
    calibrates = True
    likelihood: TokenLabels

    def _averaged(self, outputs: Tensor, labels: Any) -> tuple[AveragedPredictive, Tensor]:
        """Average the draws of all tokens of all rows; say which of them count, shape (N, tokens)."""
        logits = self.likelihood.by_entry(outputs, 2)
        seen = torch.ones(len(logits[0]), logits[0, 0, ..., 0].numel(), dtype=torch.bool)
        if isinstance(labels, Tensor) and labels.shape == logits.shape[1:-1]:
            seen = self.likelihood.seen(labels).cpu().flatten(1)
        return average_draws(logits=logits.flatten(1, -2)), seen

    def validation(self, outputs: Tensor, y: Tensor) -> Columns:
        """Keep the averaged log-probabilities and the labels of the tokens that count."""
        predictive, seen = self._averaged(outputs, y)
        return {"log_probs": predictive.log_probs[seen.flatten()], "label": y.cpu().flatten(1)[seen]}

    def calibrate(self, validation: Columns) -> None:
        """Find the temperature."""
        if not len(validation["label"]):
            raise ValueError("evaluate: `calibrate` has no labels that count: all are to be ignored")
        super().calibrate(validation)

    def columns(self, outputs: Tensor, y: Tensor | None, hidden: Any = None) -> Columns:
        """Keep sums over the tokens of each row."""
        predictive, seen = self._averaged(outputs, y if y is not None else hidden)
        num_rows, num_classes = len(seen), predictive.log_probs.shape[-1]
        log_probs = predictive.log_probs.unflatten(0, (num_rows, -1))

        def total(values: Tensor) -> Tensor:
            return torch.where(seen, values.double().view_as(seen), 0.0).sum(1)

        columns = {name: total(values) for name, values in ood_scores(predictive).items()}
        columns |= {"count": seen.double().sum(1), "num_classes": torch.full((num_rows,), num_classes)}
        if y is None:
            return columns
        y = torch.where(seen, y.cpu().flatten(1), 0)
        answer = log_probs.argmax(-1)
        columns |= {"accuracy": total(answer == y)} | _losses(log_probs, y, seen, "")
        if self.temperature is not None:
            columns |= _losses(scale_temperature(log_probs, self.temperature), y, seen, "_calibrated")
        return columns | self.of_answers(answer, y, seen, num_classes)

    def of_answers(self, answer: Tensor, y: Tensor, seen: Tensor, num_classes: int) -> dict[str, Tensor]:
        """Return columns that only some labels have, of most probable classes and labels, shape (N, entries)."""
        return {}

    def variables(self, columns: Columns) -> dict[str, xr.Variable]:
        """Return the metrics, and bins of the confidence."""
        found: dict[str, xr.Variable] = {}
        if not bool(columns["count"].any()):
            raise ValueError("evaluate: `data` has no labels that count: all are to be ignored")
        for name in ("accuracy", "nll", "brier", "entropy", "mutual_information"):
            found |= ratio_and_error(name, columns[name], columns["count"])
        count, confidence, accuracy = (columns[f"bin_{name}"].sum(0) for name in ("count", "confidence", "accuracy"))
        found["ece"] = named_variable("ece", (), _error(count, confidence, accuracy))
        bins = {"count": count.long(), "confidence": confidence / count.clamp_min(1)}
        bins |= {"accuracy": accuracy / count.clamp_min(1)}
        found |= {f"bin_{name}": named_variable(f"bin_{name}", ("bin",), values) for name, values in bins.items()}
        return found | self.of_task(columns, found)

    def calibrated(self, columns: Columns) -> dict[str, xr.Variable]:
        """Return the temperature, and metrics at it."""
        assert self.temperature is not None
        bins = (columns[f"bin_{name}_calibrated"].sum(0) for name in ("count", "confidence", "accuracy"))
        found = {"temperature": self.temperature, "ece_calibrated": _error(*bins)}
        for name in ("nll_calibrated", "brier_calibrated"):
            found[name] = (columns[name].sum() / columns["count"].sum()).item()
        return {name: named_variable(name, (), value) for name, value in found.items()}

    def of_task(self, columns: Columns, found: Mapping[str, xr.Variable]) -> dict[str, xr.Variable]:
        r"""Return the perplexity, $e^{\mathrm{nll}}$."""
        perplexity = math.exp(float(found["nll"].values.item()))
        return {
            "perplexity": named_variable("perplexity", (), perplexity),
            "perplexity_se": named_variable("perplexity_se", (), perplexity * found["nll_se"].values.item()),
        }

    def row_scores(self, columns: Columns) -> dict[str, Tensor]:
        """Return means over the tokens that count, of rows that have any."""
        rows = columns["count"] > 0
        return {name: columns[name][rows] / columns["count"][rows] for name in self.scores}

    def limits(self, columns: Columns) -> Mapping[str, float]:
        """Return the largest value of each score."""
        return score_limits(int(columns["num_classes"][0]))

    def attrs(self, columns: Columns) -> dict[str, int]:
        """Say how many rows, labels that count, classes and bins there are."""
        counted = {"num_labels": int(columns["count"].sum()), "num_classes": int(columns["num_classes"][0])}
        return super().attrs(columns) | counted | {"num_bins": NUM_BINS}


class PixelScorer(TokenScorer):
    """A class for each pixel: as tokens, with the overlap of regions in place of the perplexity."""

    def of_answers(self, answer: Tensor, y: Tensor, seen: Tensor, num_classes: int) -> dict[str, Tensor]:
        """Count the pixels of each class in both, and in either, by row."""
        cells = torch.arange(len(y)).unsqueeze(1) * num_classes

        def count(classes: Tensor, where: Tensor) -> Tensor:
            return (cells + classes)[where].bincount(minlength=len(y) * num_classes).unflatten(0, (len(y), -1)).double()

        both = count(y, seen & (answer == y))
        return {"both": both, "either": count(y, seen) + count(answer, seen) - both}

    def of_task(self, columns: Columns, found: Mapping[str, xr.Variable]) -> dict[str, xr.Variable]:
        """Return the intersection over union of each class, NaN of those that are nowhere, and the mean of the rest."""
        both, either = columns["both"].sum(0), columns["either"].sum(0)
        overlap = both / either
        return {
            "iou": named_variable("iou", ("class",), overlap),
            "miou": named_variable("miou", (), overlap.nanmean().item()),
        }


def _losses(log_probs: Tensor, y: Tensor, seen: Tensor, ending: str) -> dict[str, Tensor]:
    """Return sums over the tokens of each row, of log-probabilities (N, tokens, C), and bins of the confidence."""
    num_rows = len(y)
    confidence, answer = log_probs.exp().max(-1)
    right = log_probs.gather(-1, y.unsqueeze(-1)).squeeze(-1)
    squares = log_probs.exp().square().sum(-1) - 2 * right.exp() + 1
    losses = {"nll": -right.clamp_min(LOG_TINY), "brier": squares}
    sums = {name: torch.where(seen, values.double(), 0.0).sum(1) for name, values in losses.items()}
    # As `calibration_bins`, by row.
    edges = torch.linspace(0, 1, NUM_BINS + 1, dtype=torch.float64)[1:-1]
    cells = torch.arange(num_rows).unsqueeze(1) * NUM_BINS + torch.bucketize(confidence, edges, right=True)
    for name, values in (("count", seen), ("confidence", confidence), ("accuracy", answer == y)):
        of_cells = cells[seen].bincount(values[seen].double(), num_rows * NUM_BINS)
        sums[f"bin_{name}"] = of_cells.unflatten(0, (num_rows, NUM_BINS))
    return {f"{name}{ending}": values for name, values in sums.items()}


def _error(count: Tensor, confidence: Tensor, accuracy: Tensor) -> float:
    """Return the expected calibration error of the sums in bins."""
    return ((accuracy - confidence).abs().sum() / count.sum()).item()
