r"""Mixtures of a few Normals: their moments and the log-density of a value, in few passes over their parameters.

With weights w, $z_m = (x - \mu_m) / \sigma_m$, $d_m = \mu_m - \mu$ and shares $r_m$ of components in the density,

$$\mu = \sum_m w_m \mu_m, \qquad v = \sum_m w_m (\sigma_m^2 + d_m^2), \qquad
  \ell = \log \sum_m \frac{w_m}{\sqrt{2 \pi} \sigma_m} e^{-z_m^2 / 2},$$

| | $d \mu$ | $d v$ | $d \ell$ |
|---|---|---|---|
| $\mu_m$ | $w_m$ | $2 w_m d_m$ | $r_m z_m / \sigma_m$ |
| $\sigma_m$ | 0 | $2 w_m \sigma_m$ | $r_m (z_m^2 - 1) / \sigma_m$ |
| $\log w_m$, not normalised | $w_m d_m$ | $w_m (\sigma_m^2 + d_m^2 - v)$ | $r_m - w_m$ |
| x | 0 | 0 | $-\sum_m r_m z_m / \sigma_m$ |

Softmax and logsumexp of torch take ten times as long over a few entries that are no multiple of eight.
"""

import math
from typing import Any, cast

import torch
from torch import Tensor

from pyro_vnd.distributions._fast.dispatch import fast_or_plain, plain_gradients

__all__ = ["mixture_terms", "plain_mixture_terms"]

_LOG_ROOT = 0.5 * math.log(2 * math.pi)
Terms = tuple[Tensor, Tensor, Tensor]


def mixture_terms(value: Tensor, loc: Tensor, scale: Tensor, logits: Tensor) -> Terms:
    """Return means, variances and the log-density of values.

    Args:
        value: Values, shape (...).
        loc: Means of the components, shape (..., M).
        scale: Their standard deviations, of the same shape.
        logits: Logarithms of their weights, not normalised, of the same shape.

    Returns:
        Three tensors of shape (...).
    """
    if value.shape != loc.shape[:-1] or not loc.shape == scale.shape == logits.shape:
        return plain_mixture_terms(value, loc, scale, logits)
    return cast(Terms, fast_or_plain(_MixtureTerms, plain_mixture_terms, value, loc, scale, logits))


def plain_mixture_terms(value: Tensor, loc: Tensor, scale: Tensor, logits: Tensor) -> Terms:
    """Do what `mixture_terms` does."""
    log_weights = logits - logits.logsumexp(-1, keepdim=True)
    weights = log_weights.exp()
    mean = (weights * loc).sum(-1)
    variance = (weights * ((loc - mean.unsqueeze(-1)).square() + scale.square())).sum(-1)
    distance = (value.unsqueeze(-1) - loc) / scale
    return mean, variance, (log_weights - scale.log() - 0.5 * distance.square()).logsumexp(-1) - _LOG_ROOT


class _MixtureTerms(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, loc: Tensor, scale: Tensor, logits: Tensor) -> Terms:
        weights, log_total = _shares(logits)
        mean = (weights * loc).sum(-1)
        square = _second_moments(loc, scale, mean)
        variance = square.mul_(weights).sum(-1)
        distance = (value.unsqueeze(-1) - loc).div_(scale)
        scores = torch.addcmul(logits - log_total, distance, distance, value=-0.5).sub_(scale.log())
        shares, log_density = _shares(scores)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(value, loc, scale, logits, weights, mean, variance, distance, shares)
        return mean, variance, log_density.squeeze(-1).sub_(_LOG_ROOT)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        *inputs, weights, mean, variance, distance, shares = ctx.saved_tensors
        value, loc, scale, _ = inputs
        given = [torch.zeros_like(value) if grad is None else grad for grad in grads]
        if torch.is_grad_enabled():
            return plain_gradients(plain_mixture_terms, inputs, ctx.needs_input_grad, *given)
        by_mean, by_variance, by_density = (grad.unsqueeze(-1) for grad in given)
        counted = by_density * shares
        slope = counted * distance
        slope.div_(scale)
        by_scale = torch.addcmul(-counted / scale, slope, distance).addcmul_(weights * scale, by_variance, value=2)
        centred = loc - mean.unsqueeze(-1)
        weighted = torch.addcmul(by_mean, centred, by_variance, value=2).mul_(weights)
        by_logits = _second_moments(loc, scale, mean).sub_(variance.unsqueeze(-1)).mul_(by_variance)
        by_logits.addcmul_(centred, by_mean).sub_(by_density).mul_(weights).add_(counted)
        return -slope.sum(-1), weighted.add_(slope), by_scale, by_logits


def _second_moments(loc: Tensor, scale: Tensor, mean: Tensor) -> Tensor:
    """Return the second moments of components about the mean of all."""
    centred = loc - mean.unsqueeze(-1)
    return (scale * scale).addcmul_(centred, centred)


def _shares(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return softmax and logsumexp over the last dimension, which the second keeps."""
    most = logits.amax(-1, keepdim=True)
    shares = (logits - most).exp_()
    total = shares.sum(-1, keepdim=True)
    return shares.div_(total), total.log_().add_(most)
