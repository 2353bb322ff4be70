"""How well class probabilities are calibrated, and temperature scaling, which mends it."""

from dataclasses import dataclass
from math import exp, log

import torch
from torch import Tensor

from pyro_vnd._inputs import check_labels

__all__ = [
    "LOG_TINY",
    "NUM_BINS",
    "CalibrationBins",
    "calibration_bins",
    "check_rows",
    "fit_temperature",
    "scale_temperature",
]

NUM_BINS = 15
LOG_TINY = log(torch.finfo(torch.float64).tiny)  # -708: where a probability of zero is put


@dataclass(frozen=True)
class CalibrationBins:
    """Rows in bins of the probability of their most probable class.

    Attributes:
        count: Rows in each bin, shape (num_bins,).
        confidence: Their mean probability of the most probable class; 0 in an empty bin.
        accuracy: The share of them whose most probable class is right; 0 in an empty bin.
    """

    count: Tensor
    confidence: Tensor
    accuracy: Tensor

    @property
    def error(self) -> float:
        """The expected calibration error: mean |accuracy - confidence| over rows."""
        return ((self.accuracy - self.confidence).abs() * self.count).sum().item() / int(self.count.sum())


def calibration_bins(
    probs: Tensor, labels: Tensor, num_bins: int = NUM_BINS, *, equal_mass: bool = False
) -> CalibrationBins:
    """Sort rows into bins by the probability of their most probable class.

    Args:
        probs: Class probabilities, averaged over posterior draws beforehand, shape (N, C).
        labels: True classes, shape (N,).
        num_bins: Number of bins.
        equal_mass: Whether bins hold the same number of rows, up to ties, which stay together; else they have the same
            width.

    Returns:
        The bins, in order of confidence.

    Raises:
        ValueError: If shapes do not fit.

    Example:
        >>> import torch
        >>> bins = calibration_bins(torch.tensor([[0.8, 0.2], [0.4, 0.6]]), torch.tensor([0, 0]), num_bins=4)
        >>> bins.count.tolist(), round(bins.error, 3)
        ([0, 0, 1, 1], 0.4)
    """
    labels = check_rows("calibration_bins", "probs", probs, labels)
    confidence, answer = probs.double().max(-1)
    right = (answer == labels).double()
    edges = torch.linspace(0, 1, num_bins + 1, dtype=torch.float64, device=probs.device)
    if equal_mass:
        edges = torch.quantile(confidence, edges)
    # Not torchmetrics: it adds up in float32, 9e-3 off for a million rows, and gives certainty a bin of its own.
    index = torch.bucketize(confidence, edges[1:-1], right=True)
    count = index.bincount(minlength=num_bins)

    def mean(values: Tensor) -> Tensor:
        return index.bincount(values, num_bins) / count.clamp_min(1)

    return CalibrationBins(count, mean(confidence), mean(right))


def check_rows(function: str, argument: str, predictions: Tensor, labels: Tensor) -> Tensor:
    """Return labels as integers; raise a ValueError unless predictions are of shape (N, C), N >= 1, and they fit."""
    if not isinstance(predictions, Tensor) or predictions.dim() != 2 or 0 in predictions.shape:
        got = tuple(predictions.shape) if isinstance(predictions, Tensor) else type(predictions).__name__
        raise ValueError(f"{function}: argument `{argument}` must have shape (N, C), N and C >= 1; got {got}")
    if predictions.shape[1] == 1:
        raise ValueError(
            f"{function}: argument `{argument}` must have a column for each of two or more classes; got shape "
            f"{tuple(predictions.shape)}. Regression is scored with its likelihood, NormalTargets(), one logit with "
            "BernoulliLabels()"
        )
    return check_labels(function, labels, *predictions.shape)


def scale_temperature(log_probs: Tensor, temperature: float) -> Tensor:
    r"""Return $\log p(c)^{1/T} - \log \sum_{c'} p(c')^{1/T}$: probabilities flattened by T > 1, sharpened by T < 1.

    Args:
        log_probs: Log-probabilities, shape (..., C).
        temperature: T.

    Returns:
        Log-probabilities, shape (..., C).

    Raises:
        ValueError: If the temperature is not positive and finite.

    Example:
        >>> import torch
        >>> scale_temperature(torch.tensor([0.2, 0.8]).log(), 0.5).exp()
        tensor([0.0588, 0.9412])
    """
    if not 0 < temperature < torch.inf:
        raise ValueError(f"scale_temperature: `temperature` must be positive and finite; got {temperature}")
    return (log_probs / temperature).log_softmax(-1)


def fit_temperature(log_probs: Tensor, labels: Tensor) -> float:
    r"""Find the temperature that minimises the NLL of averaged predictions on validation data.

    The draws are averaged first and the average is scaled, as that corrects the average, which is what is used, and
    needs no draws. In $1/T$ the NLL is convex, with derivative
    $\frac1N \sum_n E_{p_n^{1/T}} \log p_n - \log p_n(y_n)$, whose root in [1e-3, 1e3] is bracketed in $\log T$. Where
    the derivative has no root, every row being right or the draws carrying nothing, the nearer end is returned.

    Args:
        log_probs: Averaged log-probabilities of validation rows, shape (N, C).
        labels: Their true classes, shape (N,).

    Returns:
        The temperature T, for `scale_temperature`.

    Raises:
        ValueError: If shapes do not fit.

    Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017; Rahaman & Thiery, "Uncertainty
    Quantification and Deep Ensembles", NeurIPS 2021 (average first, then calibrate).

    Example:
        >>> import torch
        >>> log_probs = torch.tensor([0.99, 0.01]).log().expand(4, 2)
        >>> temperature = fit_temperature(log_probs, torch.tensor([0, 0, 0, 1]))
        >>> scale_temperature(log_probs[0], temperature).exp()
        tensor([0.7500, 0.2500])
    """
    labels = check_rows("fit_temperature", "log_probs", log_probs, labels).to(log_probs.device)
    log_probs = log_probs.double().clamp_min(LOG_TINY)
    target = log_probs.gather(-1, labels.unsqueeze(-1)).mean()

    def slope(log_temperature: float) -> float:
        scaled = (log_probs * exp(-log_temperature)).softmax(-1)
        return ((scaled * log_probs).sum(-1).mean() - target).item()

    low, high = log(1e-3), log(1e3)
    for _ in range(60):  # The slope falls in T: bisection cannot miss its root.
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) > 0 else (low, middle)
    return exp((low + high) / 2)
