"""Normals: their divergence, and what a net needs of the law of its weights, in few passes over memory."""

import math
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from pyro_vnd.distributions._fast.dispatch import fast_or_plain, plain_gradients
from pyro_vnd.distributions._fast.slopes import finite_

__all__ = [
    "draw_and_kl",
    "normal_kl",
    "plain_draw_and_kl",
    "plain_normal_kl",
    "plain_variance_and_kl",
    "variance_and_kl",
]

Numbers: TypeAlias = tuple[float, float]  # location and scale of one Normal


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
        ratio, distance = q_scale / p_scale, (q_loc - p_loc).div_(p_scale)
        ctx.save_for_backward(q_loc, q_scale, p_loc, p_scale, ratio, distance)
        return _sum_of_squares(ratio, distance).sub_(1).mul_(0.5).sub_(ratio.log())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, ratio, distance = ctx.saved_tensors
        needed = ctx.needs_input_grad
        if torch.is_grad_enabled():  # this gradient is to be differentiated itself
            return plain_gradients(plain_normal_kl, inputs, needed, grad)
        scaled, q_scale, p_scale = finite_(grad / inputs[3]), None, None
        q_loc = scaled * distance  # dKL/dmu_q = t / sigma_p
        if needed[1]:  # r / sigma_p - 1 / sigma_q
            q_scale = finite_((scaled * ratio).sub_(finite_(grad / inputs[1])))
        if needed[3]:  # (1 - r^2 - t^2) / sigma_p
            p_scale = finite_((1 - _sum_of_squares(ratio, distance)).mul_(scaled))
        return q_loc, q_scale, -q_loc if needed[2] else None, p_scale


def _sum_of_squares(x: Tensor, y: Tensor) -> Tensor:
    return torch.addcmul(x * x, y, y)


def variance_and_kl(loc: Tensor, log_scale: Tensor, prior: Numbers) -> tuple[Tensor, Tensor, Tensor]:
    r"""Return what local reparameterisation needs of an array of Normals, and their divergence from one Normal.

    $$\mathrm{KL} = \sum_e \frac{\sigma_e^2 + (\mu_e - m)^2}{2 s^2} - \rho_e + \log s - \tfrac12,
      \qquad \sigma_e = e^{\rho_e}.$$

    Args:
        loc: Means.
        log_scale: Logarithms ρ of the standard deviations, of the same shape.
        prior: m and s.

    Returns:
        Means, of which each use of the divergence adds to the gradient, variances, and the divergence, shape ().
    """
    found = fast_or_plain(_VarianceAndKL, plain_variance_and_kl, loc, log_scale, prior)
    return cast(tuple[Tensor, Tensor, Tensor], found)


def plain_variance_and_kl(loc: Tensor, log_scale: Tensor, prior: Numbers) -> tuple[Tensor, Tensor, Tensor]:
    """Do what `variance_and_kl` does."""
    variance = (2 * log_scale).exp()
    centred = _centred(loc, prior)
    return loc.view_as(loc), variance, _kl(torch.addcmul(variance, centred, centred), log_scale, prior)


def draw_and_kl(loc: Tensor, log_scale: Tensor, noise: Tensor, prior: Numbers) -> tuple[Tensor, Tensor]:
    r"""Return a draw $\mu + e^\rho \epsilon$ of an array of Normals, and their divergence from one Normal.

    Args:
        loc: Means.
        log_scale: Logarithms ρ of the standard deviations, of the same shape.
        noise: ε, of that shape, too; it has no gradient.
        prior: Its location and scale.
    """
    return cast(tuple[Tensor, Tensor], fast_or_plain(_DrawAndKL, plain_draw_and_kl, loc, log_scale, noise, prior))


def plain_draw_and_kl(loc: Tensor, log_scale: Tensor, noise: Tensor, prior: Numbers) -> tuple[Tensor, Tensor]:
    """Do what `draw_and_kl` does."""
    scale, centred = log_scale.exp(), _centred(loc, prior)
    return loc + scale * noise, _kl(torch.addcmul(scale.square(), centred, centred), log_scale, prior)


def _kl(squares: Tensor, log_scale: Tensor, prior: Numbers) -> Tensor:
    """Return the divergence, given second moments about the prior's location, of which nothing is left."""
    s = prior[1]
    total = squares.sub_(log_scale, alpha=2 * s**2).sum()
    return total * (0.5 / s**2) + log_scale.numel() * (math.log(s) - 0.5)


def _centred(x: Tensor, prior: Numbers) -> Tensor:
    m = prior[0]
    return x - m if m else x


class _VarianceAndKL(torch.autograd.Function):
    """One array each for the gradients of means and of logarithms, where torch's operations take four and six."""

    @staticmethod
    def forward(ctx: Any, loc: Tensor, log_scale: Tensor, prior: Numbers) -> tuple[Tensor, Tensor, Tensor]:
        variance, centred = (2 * log_scale).exp_(), _centred(loc, prior)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(loc, log_scale, variance)
        ctx.prior = prior
        return loc, variance, _kl(torch.addcmul(variance, centred, centred), log_scale, prior)

    @staticmethod
    def backward(ctx: Any, mean: Tensor | None, each: Tensor | None, kl: Tensor | None) -> tuple[Tensor | None, ...]:
        loc, log_scale, variance = ctx.saved_tensors
        if torch.is_grad_enabled():
            return (*_plain(ctx, plain_variance_and_kl, (loc, log_scale), (), (mean, each, kl), loc), None)
        if kl is None:
            return mean, None if each is None else (each * variance).mul_(2), None
        slope, centred = kl / ctx.prior[1] ** 2, _centred(loc, ctx.prior)
        by_loc = slope * centred if mean is None else torch.addcmul(mean, centred, slope)
        if each is None:
            return by_loc, torch.addcmul(-kl, variance, slope), None
        by_variance = torch.add(slope, each, alpha=2)
        return by_loc, torch.addcmul(-kl, by_variance, variance, out=by_variance), None


class _DrawAndKL(torch.autograd.Function):
    """As above, for weights that are drawn."""

    @staticmethod
    def forward(ctx: Any, loc: Tensor, log_scale: Tensor, noise: Tensor, prior: Numbers) -> tuple[Tensor, Tensor]:
        scale, centred = log_scale.exp(), _centred(loc, prior)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(loc, log_scale, noise, scale)
        ctx.prior = prior
        kl = _kl(scale.square().addcmul_(centred, centred), log_scale, prior)
        return torch.addcmul(loc, scale, noise), kl

    @staticmethod
    def backward(ctx: Any, draw: Tensor | None, kl: Tensor | None) -> tuple[Tensor | None, ...]:
        loc, log_scale, noise, scale = ctx.saved_tensors
        if torch.is_grad_enabled():
            return (*_plain(ctx, plain_draw_and_kl, (loc, log_scale), (noise,), (draw, kl), loc), None, None)
        if kl is None:
            return draw, None if draw is None else (draw * noise).mul_(scale), None, None
        slope, centred = kl / ctx.prior[1] ** 2, _centred(loc, ctx.prior)
        by_scale = slope * scale
        if draw is not None:
            by_scale.addcmul_(draw, noise)
        by_loc = slope * centred if draw is None else torch.addcmul(draw, centred, slope)
        return by_loc, torch.addcmul(-kl, by_scale, scale, out=by_scale), None, None


def _plain(ctx: Any, plain: Any, inputs: Any, noise: Any, grads: Any, like: Tensor) -> tuple[Tensor | None, ...]:
    """Return gradients that can be differentiated themselves."""
    *arrays, kl = (grad for grad in grads)
    whole = [torch.zeros_like(like) if grad is None else grad for grad in arrays]
    whole.append(like.new_zeros(()) if kl is None else kl)
    needed = ctx.needs_input_grad[: len(inputs)]
    return plain_gradients(lambda *x: plain(*x, *noise, ctx.prior), inputs, needed, *whole)
