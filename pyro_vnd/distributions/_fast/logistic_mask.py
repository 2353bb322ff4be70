"""Hard ordered masks from one uniform number each, with a straight-through gradient."""

import math
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyro_vnd.distributions._fast.eager import apply_eagerly
from pyro_vnd.distributions.constraints import tail_sum

__all__ = ["LogisticMask", "hard_mask", "logistic_mask"]


def hard_mask(keep_probs: Tensor, uniform: Tensor) -> Tensor:
    """Return z_i = 1[u S_1 < S_i], where S_1 is one up to rounding.

    Scaled so, the first unit is always kept and no length of probability zero is drawn.
    """
    mask = torch.empty(0, dtype=keep_probs.dtype, device=keep_probs.device)
    return torch.gt(keep_probs, uniform * keep_probs[..., :1], out=mask)  # zeros and ones without a bool between


class LogisticMask(torch.autograd.Function):
    r"""Draw $z_i = 1[u < S_i]$, and differentiate $\sigma((\log S_i - \log F_i - \mathrm{logit}\, u) / \tau)$.

    S_i is the probability of the lengths from i on, F_i that of the lengths below i. The noise logit u is logistic,
    and the soft mask crosses one half where the hard one jumps, so the hard law is exact at every temperature. The
    soft mask is never formed in the forward pass. With $w_i$ the gradient with respect to the keep logit of unit i,

    $$\partial \mathrm{logit} S_i / \partial p_j = 1[j \ge i] / S_i - 1[j < i] / F_i, \qquad
      g_j = \sum_{i \le j} w_i / S_i - \sum_{i > j} w_i / F_i,$$

    two cumulative sums, and $p_j g_j$ with respect to logits, because keep logits do not depend on the scale of p.
    S and F are sums of positive terms, each from its own end, so that nothing cancels. The first unit is always kept
    and has no gradient: the arrays below hold the units 2..K.

    Differentiable once: a second derivative raises.
    """

    @staticmethod
    def forward(
        param: Tensor, uniform: Tensor, temperature: Tensor | float, is_logits: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return hard masks of shape broadcast(param, uniform), and for the backward pass S, and p where it is new.

        Args:
            param: Logits of the lengths, or their probabilities, shape (..., K).
            uniform: One uniform number a mask, in [0, 1), shape (..., 1).
            temperature: Temperature of the soft mask, broadcastable to `uniform`.
            is_logits: Which of the two `param` is.
        """
        probs = param.softmax(-1) if is_logits else param
        keep_probs = tail_sum(probs)
        return hard_mask(keep_probs, uniform), keep_probs, probs if is_logits else None

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | float, bool], output: tuple[Tensor, Tensor, Tensor | None]
    ) -> None:
        """Keep what the backward pass needs."""
        ctx.mark_non_differentiable(*(x for x in output[1:] if x is not None))
        ctx.set_materialize_grads(False)
        _save(ctx, inputs, output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, None, Tensor | None, None]:
        """Return the gradients with respect to `param` and the temperature."""
        return _gradients(ctx, grad)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], *inputs: Tensor | float
    ) -> tuple[tuple[Tensor, Tensor, Tensor | None], tuple[int | None, ...]]:
        """Put every mapped dimension first: all operations act on the last one and broadcast over the others."""
        mapped = list(zip(inputs, in_dims, strict=True))
        rank = max(x.dim() - (dim is not None) for x, dim in mapped if isinstance(x, Tensor))

        def align(x: Tensor | float, dim: int | None) -> Tensor | float:
            if dim is None or not isinstance(x, Tensor):
                return x
            x = x.movedim(dim, 0)
            return x.reshape(x.shape[:1] + (1,) * (rank + 1 - x.dim()) + x.shape[1:])

        output = LogisticMask.apply(*(align(x, dim) for x, dim in mapped))
        law_dim = None if in_dims[0] is None else 0
        mask_dim = law_dim if in_dims[1] is None else 0
        return output, (mask_dim, law_dim, None if output[2] is None else law_dim)


class _EagerLogisticMask(torch.autograd.Function):
    """`LogisticMask` without the interface of `torch.func`, which takes a quarter of the time of a single mask."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        output = LogisticMask.forward(*inputs)
        _save(ctx, inputs, output)
        return output[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
        # The guard against second derivatives is slow, too, and only needed where a graph is asked for.
        return (_gradients_once if torch.is_grad_enabled() else _gradients)(ctx, grad)


def logistic_mask(param: Tensor, uniform: Tensor, temperature: Tensor | float, is_logits: bool) -> Tensor:
    """Draw hard masks with the gradient of soft ones; arguments are those of `LogisticMask.forward`."""
    return apply_eagerly(_EagerLogisticMask, _transformable_mask, param, uniform, temperature, is_logits)


def _transformable_mask(*inputs: Tensor | float) -> Tensor:
    return cast(Tensor, LogisticMask.apply(*inputs)[0])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor | None]) -> None:
    param, uniform, temperature, ctx.is_logits = inputs
    _, keep_probs, probs = output
    saved = (param if probs is None else probs, keep_probs, uniform)
    if isinstance(temperature, Tensor):
        ctx.save_for_backward(*saved, temperature)
    else:
        ctx.save_for_backward(*saved)
        ctx.temperature = temperature


def _gradients(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None, Tensor | None, None]:
    """Return the gradients with respect to `param` and the temperature; in place where it can, for speed."""
    if grad is None:
        return None, None, None, None
    probs, keep_probs, uniform, *rest = ctx.saved_tensors
    temperature = rest[0] if rest else ctx.temperature
    tiny = torch.finfo(probs.dtype).tiny
    # Far below the smallest step of u, and far enough above the smallest float that K / floor is finite.
    floor = tiny**0.7
    above = keep_probs[..., 1:].clamp_min(floor)
    below = probs.cumsum(-1)[..., :-1].clamp_min_(floor)
    # Beyond this limit, 80 in float32, the gradient is nil and would be a slow subnormal number.
    limit = -0.92 * math.log(tiny)
    scaled = (((above / below).log_() - torch.logit(uniform, eps=tiny)) / temperature).clamp(-limit, limit)
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
