"""Accuracy and calibration of class probabilities."""

import torch
from torch import Tensor
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_calibration_error

__all__ = ["classification_metrics"]


def classification_metrics(probs: Tensor, labels: Tensor) -> dict[str, float]:
    r"""Score predictive probabilities over a whole test set.

    Accuracy is the share of right answers; NLL is $-\frac1N \sum_n \log p_n(y_n)$ in nats; ECE is the expected
    calibration error of the most probable class in 15 equal bins, pooled over all N rows. Standard errors are over
    rows.

    Args:
        probs: Class probabilities, averaged over posterior draws beforehand, shape (N, C).
        labels: True classes, shape (N,).

    Returns:
        accuracy, accuracy_se, nll, nll_se and ece.

    Raises:
        ValueError: If shapes do not fit.

    Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017 (ECE).

    Example:
        >>> import torch
        >>> metrics = classification_metrics(torch.tensor([[0.8, 0.2], [0.4, 0.6]]), torch.tensor([0, 1]))
        >>> {name: round(metrics[name], 3) for name in ("accuracy", "nll", "ece")}
        {'accuracy': 1.0, 'nll': 0.367, 'ece': 0.3}
    """
    if probs.dim() != 2 or labels.shape != probs.shape[:1] or len(labels) == 0:
        raise ValueError(
            f"classification_metrics: `probs` must have shape (N, C) and `labels` (N,), N >= 1; got "
            f"{tuple(probs.shape)} and {tuple(labels.shape)}"
        )
    num_rows, num_classes = probs.shape
    tiny = torch.finfo(probs.dtype).tiny
    losses = -probs.gather(-1, labels.unsqueeze(-1)).squeeze(-1).clamp_min(tiny).log()
    accuracy = multiclass_accuracy(probs, labels, num_classes, average="micro").item()
    return {
        "accuracy": accuracy,
        "accuracy_se": (accuracy * (1 - accuracy) / num_rows) ** 0.5,
        "nll": losses.mean().item(),
        "nll_se": (losses.var(correction=0) / num_rows).sqrt().item(),
        "ece": multiclass_calibration_error(probs, labels, num_classes, n_bins=15, norm="l1").item(),
    }
