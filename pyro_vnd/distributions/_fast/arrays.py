"""Operations of nested layers on large arrays, with one array in the backward pass each."""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from pyro_vnd.distributions._fast.dispatch import fast_or_plain

__all__ = ["leading_block", "noisy", "plain_leading_block", "plain_noisy"]


def noisy(mean: Tensor, variance: Tensor, noise: Tensor) -> Tensor:
    r"""Return $y = m + \sqrt{v} \, \epsilon$, with $dy = dm + \epsilon / (2 \sqrt{v}) \, dv$; noise has no gradient."""
    return cast(Tensor, fast_or_plain(_Noisy, plain_noisy, mean, variance, noise))


def plain_noisy(mean: Tensor, variance: Tensor, noise: Tensor) -> Tensor:
    """Do what `noisy` does, but for the slope where a variance is zero."""
    return torch.addcmul(mean, variance.clamp_min(_least_variance(variance)).sqrt(), noise)


def _least_variance(variance: Tensor) -> float:
    """Inputs of a row may all be zero; the root has no slope there."""
    return float(torch.finfo(variance.dtype).tiny ** 0.5)


class _Noisy(torch.autograd.Function):
    """Of mean, variance and noise, the variance alone is kept, for a second derivative."""

    @staticmethod
    def forward(ctx: Any, mean: Tensor, variance: Tensor, noise: Tensor) -> Tensor:
        deviation = variance.clamp_min(_least_variance(variance)).sqrt_()
        outputs = torch.addcmul(mean, deviation, noise)
        ctx.save_for_backward(variance, torch.div(noise, deviation, out=deviation).mul_(0.5))
        return outputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        variance, slope = ctx.saved_tensors
        if torch.is_grad_enabled():  # the slope falls with the root of the variance
            kept = variance.clamp_min(_least_variance(variance))
            slope = slope * (kept.detach() / kept).sqrt()
        return grad, grad * slope, None


def leading_block(x: Tensor, lengths: Mapping[int, int]) -> Tensor:
    """Return the leading block of an array.

    Args:
        x: The array.
        lengths: Entries that are kept, by dimension.
    """
    if not x.requires_grad:  # the other way is for the sake of the backward pass
        return plain_leading_block(x, lengths)
    return cast(Tensor, fast_or_plain(_LeadingBlock, plain_leading_block, x, lengths))


def plain_leading_block(x: Tensor, lengths: Mapping[int, int]) -> Tensor:
    """Do what `leading_block` does."""
    for dim, length in lengths.items():
        x = x.narrow(dim, 0, length)
    return x


class _LeadingBlock(torch.autograd.Function):
    """Slices have an array each in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, lengths: Mapping[int, int]) -> Tensor:
        ctx.shape, ctx.lengths = x.shape, lengths
        return plain_leading_block(x, lengths)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        whole = part = grad.new_empty(ctx.shape)
        for dim, length in ctx.lengths.items():
            part.narrow(dim, length, part.shape[dim] - length).zero_()
            part = part.narrow(dim, 0, length)
        part.copy_(grad)
        return whole, None
