"""Slopes that are finite where the true one, 1 / x say, is beyond all numbers: below the smallest normal one."""

from typing import Any, cast

import torch
from torch import Tensor

from pyro_vnd.distributions._fast.dispatch import fast_or_plain

__all__ = ["finite_", "finite_slope", "log_of_probs", "plain_finite_slope"]


def finite_(x: Tensor) -> Tensor:
    """Replace infinities, in place, by numbers so far below the largest that sums of them are finite, too.

    Example:
        >>> finite_(torch.tensor([-torch.inf, 1.0])).isfinite().tolist()
        [True, True]
    """
    bound = torch.finfo(x.dtype).max / 1024
    return x.nan_to_num_(torch.nan, bound, -bound)


def finite_slope(x: Tensor) -> Tensor:
    """Return the same numbers, whose gradient is finite; not in `torch.func`."""
    return cast(Tensor, fast_or_plain(_FiniteSlope, plain_finite_slope, x))


def plain_finite_slope(x: Tensor) -> Tensor:
    """Return the same numbers."""
    return x


class _FiniteSlope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return finite_(grad.clone())


def log_of_probs(probs: Tensor) -> Tensor:
    """Return log p, with log 0 = -inf, and a finite gradient: at zero it is zero rather than 0 * inf.

    Example:
        >>> p = torch.tensor([0.0, 1e-45, 1.0], requires_grad=True)
        >>> log_of_probs(p)[1:].sum().backward()
        >>> p.grad.isfinite().tolist()
        [True, True, True]
    """
    impossible = probs == 0
    return finite_slope(probs).masked_fill(impossible, 1).log().masked_fill(impossible, -torch.inf)
