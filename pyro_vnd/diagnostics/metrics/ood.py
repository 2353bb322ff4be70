"""Detection of inputs from outside the domain of the training data."""

from collections.abc import Mapping
from math import log

import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc, binary_average_precision, binary_roc

from pyro_vnd.diagnostics.metrics.predictive import AveragedPredictive

__all__ = ["SCORES", "ood_metrics", "ood_scores", "score_limits"]

SCORES = ("doubt", "entropy", "mutual_information")


def ood_scores(predictive: AveragedPredictive) -> dict[str, Tensor]:
    """Score how foreign each row looks, larger meaning more so.

    Args:
        predictive: What `average_draws` returned for N rows.

    Returns:
        `doubt`, one minus the largest probability; `entropy` of the averaged probabilities and `mutual_information` of
        class and draw, in nats; each of shape (N,).

    Example:
        >>> import torch
        >>> from pyro_vnd.diagnostics.metrics.predictive import average_draws
        >>> scores = ood_scores(average_draws(probs=torch.tensor([[[0.75, 0.25], [0.5, 0.5]]])))
        >>> {name: [round(value, 2) for value in values.tolist()] for name, values in scores.items()}
        {'doubt': [0.25, 0.5], 'entropy': [0.56, 0.69], 'mutual_information': [0.0, 0.0]}
    """
    return {name: getattr(predictive, name) for name in SCORES}


def score_limits(num_classes: int) -> Mapping[str, float]:
    """Return the largest value that each of `ood_scores` can have with C classes; the smallest is zero."""
    return {"doubt": 1 - 1 / num_classes, "entropy": log(num_classes), "mutual_information": log(num_classes)}


def ood_metrics(inside: Tensor, outside: Tensor) -> dict[str, float]:
    """Score how well a score tells rows from outside the domain, the positives, from rows inside it.

    AUROC is the probability that a row from outside has the larger score, half of it for ties. AUPR is the average
    precision, which is the prevalence for a useless score: never compare it between sets of different prevalence.
    FPR95 is the share of rows inside that are taken for foreign at the largest threshold that finds 95 % of those
    outside, without interpolation. All three depend on the order of the scores only.

    Args:
        inside: Scores of N rows from the domain's test part, shape (N,).
        outside: Scores of M rows from elsewhere, shape (M,).

    Returns:
        auroc, aupr, fpr95 and the prevalence M / (N + M).

    Raises:
        ValueError: If a shape does not fit or a score is NaN.

    Example:
        >>> import torch
        >>> metrics = ood_metrics(torch.tensor([0.1, 0.2, 0.4]), torch.tensor([0.3, 0.5]))
        >>> {name: round(value, 3) for name, value in metrics.items()}
        {'auroc': 0.833, 'aupr': 0.833, 'fpr95': 0.333, 'prevalence': 0.4}
    """
    for name, scores in (("inside", inside), ("outside", outside)):
        if scores.dim() != 1 or len(scores) == 0 or bool(scores.isnan().any()):
            nans = int(scores.isnan().sum())
            raise ValueError(
                f"ood_metrics: `{name}` must have shape (N,), N >= 1, without NaN; got {tuple(scores.shape)}, "
                f"{nans} of them NaN"
            )
    # torchmetrics would put scores beyond [0, 1] through a sigmoid, which merges all large ones. Ranks, equal for equal
    # scores, keep the order and the ties, and lie in [0, 1].
    _, ranks = torch.cat([inside, outside]).cpu().double().unique(return_inverse=True)
    scaled = ranks.double() / max(1, int(ranks.max()))
    foreign = torch.cat([torch.zeros(len(inside)), torch.ones(len(outside))]).long()
    false_positives, true_positives, _ = binary_roc(scaled, foreign)
    return {
        "auroc": binary_auroc(scaled, foreign).item(),
        "aupr": binary_average_precision(scaled, foreign).item(),
        "fpr95": false_positives[true_positives >= 0.95][0].item(),
        "prevalence": len(outside) / len(foreign),
    }
