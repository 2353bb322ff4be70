"""The predictive of a classifier: draws of the posterior averaged, how much they disagree, and how good they are."""

from dataclasses import dataclass
from math import log

import torch
from torch import Tensor

from pyro_vnd.diagnostics.metrics.calibration import LOG_TINY, calibration_bins, check_rows

__all__ = ["AveragedPredictive", "average_draws", "classification_metrics", "predictive_metrics", "score_log_probs"]


@dataclass(frozen=True)
class AveragedPredictive:
    r"""What is kept of S draws of the class probabilities of N rows: float64, on the CPU.

    Attributes:
        log_probs: $\log \bar p_n(c) = \log \frac1S \sum_s p_{sn}(c)$, shape (N, C).
        expected_entropy: $\frac1S \sum_s H[p_{sn}]$ in nats, shape (N,).
    """

    log_probs: Tensor
    expected_entropy: Tensor

    @property
    def probs(self) -> Tensor:
        """The averaged probabilities, shape (N, C)."""
        return self.log_probs.exp()

    @property
    def entropy(self) -> Tensor:
        """Entropy of the averaged probabilities, total uncertainty in nats, shape (N,)."""
        return torch.special.entr(self.probs).sum(-1)

    @property
    def mutual_information(self) -> Tensor:
        """Total minus expected entropy: what the draws disagree about, in nats, shape (N,); never negative."""
        return (self.entropy - self.expected_entropy).clamp_min(0)

    @property
    def doubt(self) -> Tensor:
        """One minus the largest averaged probability, as the sum of the others, which does not cancel, shape (N,)."""
        return self.probs.scatter(-1, self.log_probs.argmax(-1, keepdim=True), 0.0).sum(-1)


@torch.no_grad()
def average_draws(*, logits: Tensor | None = None, probs: Tensor | None = None) -> AveragedPredictive:
    r"""Average class probabilities over posterior draws.

    Everything happens in log space and in float64, so that logits of $\pm 100$ in float32 keep their likelihoods and
    identical draws have no mutual information.

    Args:
        logits: Logits or log-probabilities of each draw, shape (S, N, C); exactly one of `logits` and `probs`.
        probs: Probabilities of each draw, shape (S, N, C); zeros are fine.

    Returns:
        The averaged predictive.

    Raises:
        ValueError: If the shape does not fit, or a row of a draw has no distribution: NaN, or nothing but zeros.

    Example:
        >>> import torch
        >>> opposed = average_draws(probs=torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]))
        >>> opposed.probs.tolist(), round(opposed.mutual_information.item(), 4)
        ([[0.5, 0.5]], 0.6931)
    """
    if (logits is None) == (probs is None):
        raise ValueError("evaluate: give exactly one of `logits` and `probs`")
    name, draws = ("logits", logits) if logits is not None else ("probs", probs)
    assert draws is not None
    if draws.dim() != 3 or draws.shape[0] == 0 or draws.shape[2] == 0:
        raise ValueError(f"evaluate: `{name}` must have shape (S, N, C), S and C >= 1; got {tuple(draws.shape)}")
    # On the CPU, as not every accelerator has float64; what moves are S x C numbers a row.
    draws = draws.detach().to("cpu", torch.float64)
    log_probs = (draws if probs is None else draws.log()).log_softmax(-1)
    if bool(log_probs.isnan().any()):
        bad = int(log_probs.isnan().any(-1).sum())
        raise ValueError(f"evaluate: `{name}` must hold a distribution in each row; {bad} rows of draws have none")
    expected_entropy = torch.special.entr(log_probs.exp()).sum(-1).mean(0)
    return AveragedPredictive(log_probs.logsumexp(0) - log(len(log_probs)), expected_entropy)


def classification_metrics(probs: Tensor, labels: Tensor) -> dict[str, float]:
    r"""Score predictive probabilities over a whole test set.

    Accuracy is the share of right answers; NLL is $-\frac1N \sum_n \log p_n(y_n)$ in nats; the Brier score is
    $\frac1N \sum_n \sum_c (p_n(c) - 1[y_n = c])^2$, in [0, 2]; ECE is the expected calibration error of the most
    probable class in 15 bins of equal width, adaptive ECE in 15 bins of equal mass, both pooled over all N rows.
    Standard errors are over rows. A probability below the smallest normal number of its dtype counts as that number.

    Args:
        probs: Class probabilities, averaged over posterior draws beforehand, shape (N, C).
        labels: True classes, shape (N,).

    Returns:
        accuracy, accuracy_se, nll, nll_se, brier, brier_se, ece and adaptive_ece.

    Raises:
        ValueError: If shapes do not fit, or if an entry is no probability or no class.

    Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017 (ECE); Mukhoti et al., "Calibrating Deep
    Neural Networks using Focal Loss", NeurIPS 2020 (adaptive ECE).

    Example:
        >>> import torch
        >>> metrics = classification_metrics(torch.tensor([[0.8, 0.2], [0.4, 0.6]]), torch.tensor([0, 1]))
        >>> {name: round(metrics[name], 3) for name in ("accuracy", "nll", "brier", "ece")}
        {'accuracy': 1.0, 'nll': 0.367, 'brier': 0.2, 'ece': 0.3}
    """
    labels = check_rows("classification_metrics", "probs", probs, labels)
    # A sum of draws can round to 1.0000001; NaN fails the comparison too.
    if not bool(((probs >= 0) & (probs <= 1 + 1e-4)).all()):
        raise ValueError(
            f"classification_metrics: `probs` must be in [0, 1]; got {probs.min().item()} to {probs.max().item()}"
        )
    return score_log_probs(probs.clamp_min(torch.finfo(probs.dtype).tiny).double().log(), labels)


def score_log_probs(log_probs: Tensor, labels: Tensor) -> dict[str, float]:
    """Score log-probabilities, float64 of shape (N, C), as `classification_metrics` describes."""
    probs, rows = log_probs.exp(), labels.unsqueeze(-1)
    losses = -log_probs.gather(-1, rows).squeeze(-1).clamp_min(LOG_TINY)
    errors = (probs - torch.zeros_like(log_probs).scatter(-1, rows, 1.0)).square().sum(-1)
    accuracy = (probs.argmax(-1) == labels).double().mean().item()
    return {
        "accuracy": accuracy,
        "accuracy_se": (accuracy * (1 - accuracy) / len(labels)) ** 0.5,
        "nll": losses.mean().item(),
        "nll_se": _standard_error(losses),
        "brier": errors.mean().item(),
        "brier_se": _standard_error(errors),
        "ece": calibration_bins(probs, labels).error,
        "adaptive_ece": calibration_bins(probs, labels, equal_mass=True).error,
    }


def predictive_metrics(predictive: AveragedPredictive, labels: Tensor) -> dict[str, float]:
    """Score averaged predictions over a whole test set.

    Args:
        predictive: What `average_draws` returned, N rows of C classes.
        labels: True classes, shape (N,).

    Returns:
        What `classification_metrics` returns, and the means over rows of `entropy` and `mutual_information` in nats,
        with standard errors `entropy_se` and `mutual_information_se`.

    Raises:
        ValueError: If shapes do not fit, or if a label is no class.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[[100.0, -100.0], [0.0, 0.0]]])
        >>> metrics = predictive_metrics(average_draws(logits=logits), torch.tensor([1, 0]))
        >>> round(metrics["nll"], 3), round(metrics["entropy"], 3)
        (100.347, 0.347)
    """
    labels = check_rows("evaluate", "predictive", predictive.log_probs, labels).cpu()
    metrics = score_log_probs(predictive.log_probs, labels)
    for name in ("entropy", "mutual_information"):
        values = getattr(predictive, name)
        metrics[name] = values.mean().item()
        metrics[f"{name}_se"] = _standard_error(values)
    return metrics


def _standard_error(values: Tensor) -> float:
    """Return the standard error of the mean of values, shape (N,)."""
    return (values.var(correction=0) / len(values)).sqrt().item()
