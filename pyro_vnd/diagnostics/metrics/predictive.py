"""The predictive of a classifier: draws of the posterior averaged, and how much they disagree."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import log

import torch
from torch import Tensor

from pyro_vnd.diagnostics.metrics.calibration import check_rows, score_log_probs, standard_error

__all__ = ["AveragedPredictive", "average_draws", "predictive_metrics"]


@dataclass(frozen=True)
class AveragedPredictive:
    r"""What is kept of S draws of the class probabilities of N rows: float64, on the CPU.

    Attributes:
        log_probs: $\log \bar p_n(c) = \log \frac1S \sum_s p_{sn}(c)$, shape (N, C).
        expected_entropy: $\frac1S \sum_s H[p_{sn}]$ in nats, shape (N,).
        num_samples: S.
    """

    log_probs: Tensor
    expected_entropy: Tensor
    num_samples: int

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

    @classmethod
    def cat(cls, parts: Sequence["AveragedPredictive"]) -> "AveragedPredictive":
        """Join the rows of several batches."""
        log_probs = torch.cat([part.log_probs for part in parts])
        return cls(log_probs, torch.cat([part.expected_entropy for part in parts]), parts[0].num_samples)


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
        raise ValueError("average_draws: give exactly one of `logits` and `probs`")
    name, draws = ("logits", logits) if logits is not None else ("probs", probs)
    assert draws is not None
    if draws.dim() != 3 or draws.shape[0] == 0 or draws.shape[2] == 0:
        raise ValueError(f"average_draws: `{name}` must have shape (S, N, C), S and C >= 1; got {tuple(draws.shape)}")
    # On the CPU, as not every accelerator has float64; what moves are S x C numbers a row.
    draws = draws.detach().to("cpu", torch.float64)
    log_probs = (draws if probs is None else draws.log()).log_softmax(-1)
    if bool(log_probs.isnan().any()):
        bad = int(log_probs.isnan().any(-1).sum())
        raise ValueError(f"average_draws: `{name}` must hold a distribution in each row; {bad} rows of draws have none")
    expected_entropy = torch.special.entr(log_probs.exp()).sum(-1).mean(0)
    return AveragedPredictive(log_probs.logsumexp(0) - log(len(log_probs)), expected_entropy, len(log_probs))


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
    labels = labels.cpu()
    check_rows("predictive_metrics", "predictive", predictive.log_probs, labels)
    metrics = score_log_probs(predictive.log_probs, labels)
    for name in ("entropy", "mutual_information"):
        values = getattr(predictive, name)
        metrics[name] = values.mean().item()
        metrics[f"{name}_se"] = standard_error(values)
    return metrics
