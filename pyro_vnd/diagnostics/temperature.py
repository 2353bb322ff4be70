"""Temperature scaling of averaged predictions."""

from math import exp, log

import torch
from torch import Tensor

from pyro_vnd.diagnostics.calibration import LOG_TINY, check_rows

__all__ = ["fit_temperature", "scale_temperature"]


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
    labels = labels.to(log_probs.device)
    check_rows("fit_temperature", "log_probs", log_probs, labels)
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
