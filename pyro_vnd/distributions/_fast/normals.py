"""Normals: their divergence, and the sums over large arrays that it consists of, in few passes over memory."""

from typing import Any, cast

import torch
from torch import Tensor

from pyro_vnd.distributions._fast.dispatch import fast_or_plain, plain_gradients

__all__ = [
    "normal_kl",
    "plain_normal_kl",
    "plain_squared_distance",
    "plain_variance_and_sums",
    "squared_distance",
    "variance_and_sums",
]


def normal_kl(q_loc: Tensor, q_scale: Tensor, p_loc: Tensor, p_scale: Tensor) -> Tensor:
    r"""Return the divergence of Normals q from Normals p, entry by entry.

    $$\mathrm{KL} = \tfrac12 (r^2 + t^2 - 1) - \log r, \qquad
      r = \sigma_q / \sigma_p, \quad t = (\mu_q - \mu_p) / \sigma_p.$$

    The graph of `kl_divergence` has a dozen nodes, most of what it costs for the codes of a batch.

    Args:
        q_loc: Means of q.
        q_scale: Standard deviations of q.
        p_loc: Means of p.
        p_scale: Standard deviations of p; all four have one shape.

    Returns:
        Nats, of that shape.
    """
    return cast(Tensor, fast_or_plain(_NormalKL, plain_normal_kl, q_loc, q_scale, p_loc, p_scale))


def plain_normal_kl(q_loc: Tensor, q_scale: Tensor, p_loc: Tensor, p_scale: Tensor) -> Tensor:
    """Do what `normal_kl` does."""
    ratio, distance = q_scale / p_scale, (q_loc - p_loc) / p_scale
    return 0.5 * (ratio.square() + distance.square() - 1) - ratio.log()


class _NormalKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_loc: Tensor, q_scale: Tensor, p_loc: Tensor, p_scale: Tensor) -> Tensor:
        precision = p_scale.reciprocal()
        ratio, distance = q_scale * precision, (q_loc - p_loc).mul_(precision)
        ctx.save_for_backward(q_loc, q_scale, p_loc, p_scale, precision, ratio, distance)
        return _sum_of_squares(ratio, distance).sub_(1).mul_(0.5).sub_(ratio.log())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, precision, ratio, distance = ctx.saved_tensors
        needed = ctx.needs_input_grad
        if torch.is_grad_enabled():  # this gradient is to be differentiated itself
            return plain_gradients(plain_normal_kl, inputs, needed, grad)
        scaled = grad * precision
        q_loc = scaled * distance  # dKL/dmu_q = t / sigma_p
        q_scale = (ratio - ratio.reciprocal()).mul_(scaled) if needed[1] else None  # (r - 1 / r) / sigma_p
        p_scale = (
            (1 - _sum_of_squares(ratio, distance)).mul_(scaled) if needed[3] else None
        )  # (1 - r^2 - t^2) / sigma_p
        return q_loc, q_scale, -q_loc if needed[2] else None, p_scale


def _sum_of_squares(x: Tensor, y: Tensor) -> Tensor:
    return torch.addcmul(x * x, y, y)


def variance_and_sums(log_scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""Return $e^{2\rho}$ and the sums $\sum e^{2\rho}$ and $\sum \rho$ over an array."""
    return cast(tuple[Tensor, Tensor, Tensor], fast_or_plain(_VarianceAndSums, plain_variance_and_sums, log_scale))


def plain_variance_and_sums(log_scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Do what `variance_and_sums` does."""
    variance = (2 * log_scale).exp()
    return variance, variance.sum(), log_scale.sum()


class _VarianceAndSums(torch.autograd.Function):
    r"""$v_e = e^{2\rho_e}$, $\sum v$ and $\sum \rho$: $d\rho_e = 2 v_e (dv_e + d\sum v) + d\sum\rho$, in one array."""

    @staticmethod
    def forward(ctx: Any, log_scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        variance = (2 * log_scale).exp_()
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(variance)
        return variance, variance.sum(), log_scale.sum()

    @staticmethod
    def backward(ctx: Any, each: Tensor | None, variances: Tensor | None, logs: Tensor | None) -> Tensor | None:
        (variance,) = ctx.saved_tensors
        grad = None
        # In place on arrays made here only; those that come in may belong to others.
        if each is not None and variances is not None:
            grad = (each + variances).mul_(variance).mul_(2)
        elif each is not None or variances is not None:
            grad = (variance * (variances if each is None else each)).mul_(2)
        if logs is None:
            return grad
        return logs.expand(variance.shape) if grad is None else grad.add_(logs)


def squared_distance(x: Tensor, m: Tensor) -> Tensor:
    r"""Return $\sum (x - m)^2$ over an array, for a single m."""
    return cast(Tensor, fast_or_plain(_SquaredDistance, plain_squared_distance, x, m))


def plain_squared_distance(x: Tensor, m: Tensor) -> Tensor:
    """Do what `squared_distance` does."""
    return (x - m).square().sum()


class _SquaredDistance(torch.autograd.Function):
    """With one array in the backward pass, where torch's operations take three."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, m: Tensor) -> Tensor:
        ctx.save_for_backward(x, m)
        return (x - m).pow_(2).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        x, m = ctx.saved_tensors
        grad_x = (x - m).mul_(2 * grad)
        return grad_x, -grad_x.sum().reshape(m.shape) if ctx.needs_input_grad[1] else None
