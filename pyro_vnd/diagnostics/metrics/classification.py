"""Predictions of a classifier scored on test data and on data from elsewhere, as an xarray Dataset."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

from pyro_vnd._data import Rows, batches
from pyro_vnd._inputs import explain_inputs
from pyro_vnd._state import module_mode
from pyro_vnd.diagnostics.metrics.calibration import (
    NUM_BINS,
    calibration_bins,
    check_rows,
    fit_temperature,
    scale_temperature,
)
from pyro_vnd.diagnostics.metrics.ood import SCORES, ood_metrics, ood_scores, score_limits
from pyro_vnd.diagnostics.metrics.predictive import (
    AveragedPredictive,
    average_draws,
    predictive_metrics,
    score_log_probs,
)
from pyro_vnd.diagnostics.metrics.variables import variable

__all__ = ["Predict", "average_batches", "evaluate", "net_cost"]

Predict = Callable[[Tensor], Tensor]

_NUM_SCORE_BINS = 50
_CALIBRATED = ("nll", "brier", "ece", "adaptive_ece")
_LABELS = {
    "accuracy": ("accuracy", "1"),
    "nll": ("negative log-likelihood", "nats"),
    "brier": ("Brier score", "1"),
    "ece": ("expected calibration error", "1"),
    "adaptive_ece": ("adaptive calibration error", "1"),
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
_variable = partial(variable, _LABELS, _ENDINGS)


def evaluate(
    predict: Predict,
    data: Rows,
    *,
    ood: Mapping[str, Rows] | None = None,
    calibrate: Rows | None = None,
    seed: int = 0,
    batch_size: int = 256,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> xr.Dataset:
    """Score the predictions of a classifier: right, calibrated, and doubtful about foreign data.

    Probabilities are averaged over draws before anything is computed from them. Batches are reduced one by one, so that
    memory holds the S x batch x C logits of a single batch and the C averaged probabilities of each row. Before each
    batch torch's random state is set to `seed`: the weights that `predict` draws are the same for all batches, sets and
    widths. The caller's random state is left as it was.

    Args:
        predict: Returns the logits of a batch of inputs, shape (S, N, C), or (N, C) for a single draw. An `nn.Module`
            is run in evaluation mode and then put back.
        data: Test data, inputs x and labels y: a pair (x, y), a mapping of the two, or an iterable of batches
            (x, y, ...) such as a `DataLoader`. In a mapping they are called "x" and "y", or are in this order.
        ood: Test data from outside the domain, by name: as `data`, or inputs alone; only these are used.
        calibrate: Validation data, as `data`: finds the temperature of the averaged probabilities that minimises
            their NLL, and adds `temperature` and, with it, `nll_calibrated`, `brier_calibrated`, `ece_calibrated` and
            `adaptive_ece_calibrated`.
        seed: Seed of the draws, and the coordinate of the result: give each fit its own.
        batch_size: Rows of a batch, where data are tensors.
        device: Where batches go before `predict`. By default the device of a module, and nowhere else.
        progress: Whether to show a progress bar.

    Returns:
        A Dataset in which all variables have the dimension `seed`, so that `xr.concat(datasets, "seed")` joins fits:
        the metrics of `classification_metrics`; `entropy` and `mutual_information`, means over rows in nats, and their
        standard errors `entropy_se` and `mutual_information_se`; `bin_count`, `bin_confidence` and `bin_accuracy`
        (seed, bin) for `plot_reliability`; with `ood` also `auroc`, `aupr` and `fpr95` (seed, ood, score) of
        `ood_metrics`, `prevalence` (seed, ood), and histograms `score_count` (seed, source, score, score_bin) for
        `plot_ood`, whose bins divide 0 to `score_limit` (seed, score). Attributes: num_samples, num_rows, num_classes,
        num_bins.

    Raises:
        ValueError: If there are no rows or no labels, or if outputs or labels do not fit or have NaN.

    Example:
        >>> import torch
        >>> net = torch.nn.Linear(2, 3)
        >>> x, y = torch.randn(50, 2), torch.arange(50) % 3
        >>> result = evaluate(net, (x, y), ood={"far": 10 + torch.randn(20, 2)}, progress=False)
        >>> result["auroc"].dims, result.sizes["ood"], result["mutual_information"].item()
        (('seed', 'ood', 'score'), 1, 0.0)
    """
    if "test" in (ood or {}):
        raise ValueError("evaluate: `ood` has a set named 'test', which is the name of the test data; rename it")
    sets = {"test": data} | ({} if calibrate is None else {"validation": calibrate})
    sets |= {f"foreign {name}": data for name, data in (ood or {}).items()}
    rows: dict[str, tuple[AveragedPredictive, Tensor | None]] = {}
    with tqdm(sets.items(), desc="evaluate", unit="set", disable=not progress, leave=False) as bar:
        for name, data in bar:
            bar.set_postfix_str(name)
            options: dict[str, Any] = {"seed": seed, "batch_size": batch_size, "device": device}
            try:
                rows[name] = average_batches(predict, data, labelled=not name.startswith("foreign "), **options)
            except (ValueError, RuntimeError) as error:
                error.add_note(f"evaluate: in the {name} data")
                raise

    predictive, labels = _labelled("data", *rows["test"])
    metrics = predictive_metrics(predictive, labels)
    if calibrate is not None:
        metrics |= _calibrated(predictive, labels, *_labelled("calibrate", *rows["validation"]))
    variables = {name: _variable(name, (), value) for name, value in metrics.items()}
    variables |= _reliability(predictive, labels)
    coords: dict[str, Any] = {"seed": [seed], "bin": np.arange(NUM_BINS)}
    if ood:
        variables |= _foreign(predictive, [rows[f"foreign {name}"][0] for name in ood])
        centres = (np.arange(_NUM_SCORE_BINS) + 0.5) / _NUM_SCORE_BINS
        coords |= {"ood": list(ood), "score": list(SCORES), "source": ["test", *ood], "score_bin": centres}
    num_rows, num_classes = predictive.log_probs.shape
    attrs = {"num_samples": predictive.num_samples, "num_rows": num_rows, "num_classes": num_classes}
    return xr.Dataset(variables, coords, attrs | {"num_bins": NUM_BINS})


@torch.no_grad()
def average_batches(
    predict: Predict,
    data: Rows,
    *,
    labelled: bool = True,
    seed: int = 0,
    batch_size: int = 256,
    device: torch.device | str | None = None,
) -> tuple[AveragedPredictive, Tensor | None]:
    """Average the predictive draws of all rows of a data set, batch by batch.

    Args:
        predict: As for `evaluate`.
        data: As for `evaluate`, with labels or without.
        labelled: Whether labels, if there are any, are looked at and returned.
        seed: Torch's random state before each batch.
        batch_size: Rows of a batch, where data are tensors.
        device: Where batches go before `predict`. By default the device of a module, and nowhere else.

    Returns:
        The averaged predictive of N rows, and their labels, shape (N,), or None where there are none.

    Raises:
        ValueError: If there are no rows, or if inputs, outputs or labels do not fit or have NaN.

    Example:
        >>> import torch
        >>> predictive, labels = average_batches(torch.nn.Linear(2, 3), torch.randn(9, 2), batch_size=4)
        >>> predictive.probs.shape, labels
        (torch.Size([9, 3]), None)
    """
    parts, labels = [], []
    own = next(predict.parameters(), None) if isinstance(predict, nn.Module) else None
    device = own.device if device is None and own is not None else device
    with torch.random.fork_rng(), module_mode([predict], training=False):
        for batch in batches(data, batch_size):
            torch.manual_seed(seed)
            x = batch[0] if device is None else batch[0].to(device)
            dtype, shapes = None if own is None else own.dtype, getattr(predict, "input_shapes", ())
            with explain_inputs("evaluate", (x,), dtype, shapes):
                logits = predict(x)
            try:
                parts.append(average_draws(logits=logits.unsqueeze(0) if logits.dim() == 2 else logits))
            except ValueError as error:
                if bad := int((~torch.isfinite(x)).flatten(1).any(1).sum()):
                    raise ValueError(
                        f"evaluate: inputs must be finite; {bad} of {len(x)} rows have NaN or inf"
                    ) from error
                raise
            if len(parts[-1].log_probs) != len(x):
                raise ValueError(
                    f"evaluate: `predict` must return logits of shape (S, N, C); got {tuple(logits.shape)} for "
                    f"{len(x)} rows"
                )
            if labelled and len(batch) > 1:
                labels.append(check_rows("evaluate", "logits", parts[-1].log_probs, batch[1]).cpu())
    if not parts:
        raise ValueError("evaluate: `data` has no rows")
    return AveragedPredictive.cat(parts), torch.cat(labels) if labels else None


def net_cost(net: nn.Module, x: Tensor) -> dict[str, int]:
    """Count the parameters of a net and its multiply-adds for one row.

    Args:
        net: A plain module, such as `narrow` makes.
        x: A batch of inputs; any number of rows.

    Returns:
        multiply_adds, half the floating-point operations of matrix products and convolutions, and parameters.

    Example:
        >>> import torch
        >>> net_cost(torch.nn.Linear(2, 3), torch.zeros(1, 2))
        {'multiply_adds': 6, 'parameters': 9}
    """
    with torch.no_grad(), module_mode([net], training=False), FlopCounterMode(display=False) as counter:
        net(x)
    parameters = sum(parameter.numel() for parameter in net.parameters())
    return {"multiply_adds": counter.get_total_flops() // (2 * len(x)), "parameters": parameters}


def _labelled(
    argument: str, predictive: AveragedPredictive, labels: Tensor | None
) -> tuple[AveragedPredictive, Tensor]:
    if labels is None:
        raise ValueError(f"evaluate: `{argument}` must give labels: a pair of tensors (x, y), or batches (x, y)")
    return predictive, labels


def _calibrated(
    predictive: AveragedPredictive, labels: Tensor, validation: AveragedPredictive, validation_labels: Tensor
) -> dict[str, float]:
    temperature = fit_temperature(validation.log_probs, validation_labels)
    metrics = score_log_probs(scale_temperature(predictive.log_probs, temperature), labels)
    return {"temperature": temperature} | {f"{name}_calibrated": metrics[name] for name in _CALIBRATED}


def _reliability(predictive: AveragedPredictive, labels: Tensor) -> dict[str, xr.Variable]:
    bins = calibration_bins(predictive.probs, labels)
    parts = {"count": bins.count, "confidence": bins.confidence, "accuracy": bins.accuracy}
    return {f"bin_{name}": _variable(f"bin_{name}", ("bin",), values) for name, values in parts.items()}


def _foreign(inside: AveragedPredictive, outside: Sequence[AveragedPredictive]) -> dict[str, xr.Variable]:
    """Compare scores by set and kind: metrics of detection, and histograms of the scores."""
    home, foreign = ood_scores(inside), [ood_scores(rows) for rows in outside]
    metrics = [[ood_metrics(home[score], scores[score]) for score in SCORES] for scores in foreign]
    variables = {
        name: _variable(name, ("ood", "score"), [[cell[name] for cell in row] for row in metrics])
        for name in ("auroc", "aupr", "fpr95")
    }
    limits = score_limits(inside.log_probs.shape[-1])
    counts = [
        [scores[score].histc(_NUM_SCORE_BINS, 0, limits[score]).numpy() for score in SCORES]
        for scores in (home, *foreign)
    ]
    return variables | {
        "prevalence": _variable("prevalence", ("ood",), [row[0]["prevalence"] for row in metrics]),
        "score_count": _variable("score_count", ("source", "score", "score_bin"), counts),
        "score_limit": _variable("score_limit", ("score",), [limits[score] for score in SCORES]),
    }
