"""The divergence of Normals, each of its gradients in a few passes over memory."""

from typing import Any, cast

import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from pyro_vnd.distributions._fast.eager import apply_eagerly

__all__ = ["normal_kl"]

_Four = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def normal_kl(q_loc: Tensor, q_scale: Tensor, p_loc: Tensor, p_scale: Tensor) -> Tensor:
    r"""Return the divergence of Normals q from Normals p, entry by entry.

    $$\mathrm{KL} = \tfrac12 (r^2 + t^2 - 1) - \log r, \qquad
      r = \sigma_q / \sigma_p, \quad t = (\mu_q - \mu_p) / \sigma_p.$$

    What `kl_divergence` says, too, whose graph of a dozen nodes is most of what it costs for the codes of a batch.

    Args:
        q_loc: Means of q.
        q_scale: Standard deviations of q.
        p_loc: Means of p.
        p_scale: Standard deviations of p; all four have one shape.

    Returns:
        Nats, of that shape.
    """
    return apply_eagerly(_NormalKL, _plain_kl, q_loc, q_scale, p_loc, p_scale)


def _plain_kl(q_loc: Tensor, q_scale: Tensor, p_loc: Tensor, p_scale: Tensor) -> Tensor:
    return kl_divergence(Normal(q_loc, q_scale, validate_args=False), Normal(p_loc, p_scale, validate_args=False))


class _NormalKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_loc: Tensor, q_scale: Tensor, p_loc: Tensor, p_scale: Tensor) -> Tensor:
        precision = p_scale.reciprocal()
        ratio, distance = q_scale * precision, (q_loc - p_loc).mul_(precision)
        ctx.save_for_backward(q_loc, q_scale, p_loc, p_scale, precision, ratio, distance)
        return _square(ratio, distance).sub_(1).mul_(0.5).sub_(ratio.log())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> _Four:
        *inputs, precision, ratio, distance = ctx.saved_tensors
        needed = ctx.needs_input_grad
        if torch.is_grad_enabled():  # this gradient is to be differentiated itself
            return _differentiable(inputs, needed, grad)
        scaled = grad * precision
        q_loc = scaled * distance  # dKL/dmu_q = t / sigma_p
        q_scale = (ratio - ratio.reciprocal()).mul_(scaled) if needed[1] else None  # (r - 1 / r) / sigma_p
        p_scale = (1 - _square(ratio, distance)).mul_(scaled) if needed[3] else None  # (1 - r^2 - t^2) / sigma_p
        return q_loc, q_scale, -q_loc if needed[2] else None, p_scale


def _square(ratio: Tensor, distance: Tensor) -> Tensor:
    return torch.addcmul(ratio * ratio, distance, distance)


def _differentiable(inputs: list[Tensor], needed: tuple[bool, ...], grad: Tensor) -> _Four:
    wanted = [x for x, need in zip(inputs, needed, strict=True) if need]
    found = iter(torch.autograd.grad(_plain_kl(*inputs), wanted, grad, create_graph=True))
    return cast(_Four, tuple(next(found) if need else None for need in needed))
