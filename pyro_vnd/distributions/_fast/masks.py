"""Hard ordered masks from one uniform number each, with a straight-through gradient."""

import math
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from pyro_vnd._compat import only_plain_code
from pyro_vnd.distributions._fast.dispatch import fast_or_plain
from pyro_vnd.distributions.constraints import tail_sum

__all__ = ["hard_mask", "logistic_mask", "plain_hard_mask", "plain_logistic_mask"]


def hard_mask(keep_probs: Tensor, uniform: Tensor) -> Tensor:
    """Return z_i = 1[u S_1 < S_i], where S_1 is one up to rounding; no gradient is recorded.

    Scaled so, the first unit is always kept and no length of probability zero is drawn.
    """
    if only_plain_code():
        return plain_hard_mask(keep_probs, uniform)
    mask = torch.empty(0, dtype=keep_probs.dtype, device=keep_probs.device)
    return torch.gt(keep_probs, uniform * keep_probs[..., :1], out=mask)  # zeros and ones without a bool between


def plain_hard_mask(keep_probs: Tensor, uniform: Tensor) -> Tensor:
    """Do what `hard_mask` does."""
    return (keep_probs > uniform * keep_probs[..., :1]).to(keep_probs.dtype)


def logistic_mask(param: Tensor, uniform: Tensor, temperature: Tensor | float, is_logits: bool) -> Tensor:
    r"""Draw $z_i = 1[u < S_i]$, and differentiate $\sigma((\log S_i - \log F_i - \mathrm{logit}\, u) / \tau)$.

    S_i is the probability of the lengths from i on, F_i that of the lengths below i. The noise logit u is logistic,
    and the soft mask crosses one half where the hard one jumps, so the hard law is exact at every temperature.

    Args:
        param: Logits of the lengths, or their probabilities, shape (..., K).
        uniform: One uniform number a mask, in [0, 1), shape (..., 1).
        temperature: Temperature of the soft mask, broadcastable to `uniform`.
        is_logits: Which of the two `param` is.

    Returns:
        Hard masks of shape broadcast(param, uniform), differentiable once in `param` and the temperature.
    """
    return cast(Tensor, fast_or_plain(_LogisticMask, plain_logistic_mask, param, uniform, temperature, is_logits))


def plain_logistic_mask(param: Tensor, uniform: Tensor, temperature: Tensor | float, is_logits: bool) -> Tensor:
    """Do what `logistic_mask` does; differentiable any number of times."""
    probs = param.softmax(-1) if is_logits else param
    keep_probs = tail_sum(probs)
    floor, limit, eps = _bounds(param.dtype)
    above, below = keep_probs[..., 1:].clamp_min(floor), probs.cumsum(-1)[..., :-1].clamp_min(floor)
    scaled = ((above.log() - below.log() - torch.logit(uniform, eps=eps)) / temperature).clamp(-limit, limit)
    soft = pad(scaled.sigmoid(), (1, 0), value=1.0)
    return plain_hard_mask(keep_probs, uniform) + (soft - soft.detach())  # in this order: hard values stay exact


def _bounds(dtype: torch.dtype) -> tuple[float, float, float]:
    """Return the least probability of a side, the largest logit of a soft mask, and the least uniform number."""
    tiny = torch.finfo(dtype).tiny
    # The first is far below the smallest step of u, and far enough above the smallest float that K / floor is finite.
    # Beyond the second, 80 in float32, the gradient is nil and would be a slow subnormal number.
    return tiny**0.7, -0.92 * math.log(tiny), tiny


class _LogisticMask(torch.autograd.Function):
    r"""The soft mask is never formed in the forward pass.

    With $w_i$ the gradient with respect to the keep logit of unit i,

    $$\partial \mathrm{logit} S_i / \partial p_j = 1[j \ge i] / S_i - 1[j < i] / F_i, \qquad
      g_j = \sum_{i \le j} w_i / S_i - \sum_{i > j} w_i / F_i,$$

    two cumulative sums, and $p_j g_j$ with respect to logits, because keep logits do not depend on the scale of p.
    S and F are sums of positive terms, each from its own end, so that nothing cancels. The first unit is always kept
    and has no gradient: the arrays below hold the units 2..K.
    """

    @staticmethod
    def forward(ctx: Any, param: Tensor, uniform: Tensor, temperature: Tensor | float, is_logits: bool) -> Tensor:
        probs = param.softmax(-1) if is_logits else param
        keep_probs = tail_sum(probs)
        ctx.is_logits = is_logits
        if isinstance(temperature, Tensor):
            ctx.save_for_backward(probs, keep_probs, uniform, temperature)
        else:
            ctx.save_for_backward(probs, keep_probs, uniform)
            ctx.temperature = temperature
        return hard_mask(keep_probs, uniform)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
        # The guard against second derivatives is slow, and only needed where a graph is asked for.
        return (_gradients_once if torch.is_grad_enabled() else _gradients)(ctx, grad)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
    """Return the gradients with respect to `param` and the temperature; in place where it can, for speed."""
    probs, keep_probs, uniform, *rest = ctx.saved_tensors
    temperature = rest[0] if rest else ctx.temperature
    floor, limit, eps = _bounds(probs.dtype)
    above = keep_probs[..., 1:].clamp_min(floor)
    below = probs.cumsum(-1)[..., :-1].clamp_min_(floor)
    scaled = (((above / below).log_() - torch.logit(uniform, eps=eps)) / temperature).clamp(-limit, limit)
    needs_temperature = ctx.needs_input_grad[2]
    soft = scaled.sigmoid() if needs_temperature else scaled.sigmoid_()
    weight = torch.ops.aten.sigmoid_backward.default(grad[..., 1:], soft).div_(temperature)

    param_grad = temperature_grad = None
    if needs_temperature:
        temperature_grad = (weight * -scaled).sum_to_size(temperature.shape)
    del scaled, soft
    if ctx.needs_input_grad[0]:
        if weight.shape != above.shape:  # one law for many masks
            weight = weight.sum_to_size(above.shape)
        param_grad = torch.constant_pad_nd((weight / above).cumsum(-1), (1, 0))
        del above
        param_grad[..., :-1].sub_(tail_sum(weight.div_(below)))
        if ctx.is_logits:
            param_grad.mul_(probs)
    return param_grad, None, temperature_grad, None


_gradients_once = once_differentiable(_gradients)
