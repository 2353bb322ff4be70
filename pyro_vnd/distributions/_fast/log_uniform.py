r"""The divergence of Normals from the log-uniform prior, by a polynomial.

With $m = \mu / \sigma$, $s = m^2 / (m^2 + 16)$, which runs from 0 to 1, and x = 2 s - 1,

$$\mathrm{KL} = \tfrac12 \log(1 + m^2 / 16) + s U(x), \qquad m \, d\mathrm{KL}/dm = s W(x), \qquad
  W = 1 + (1 - x) \frac{d}{dx} [(1 + x) U(x)],$$

where U and W are smooth in x from end to end, so that one polynomial each will do; the 16 makes them so smooth that
powers of x are a stable basis in float32. W was interpolated at Chebyshev points, in many digits, from
$m \, d\mathrm{KL}/dm = \sqrt 2 \, m D(m / \sqrt 2)$; integrated, it gave U, from which W follows: the gradient is that
of the value.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from pyro_vnd.distributions._fast.dispatch import fast_or_plain, plain_gradients
from pyro_vnd.distributions._fast.slopes import finite_

__all__ = ["log_uniform_kl", "plain_log_uniform_kl"]

_SCALE = 16.0
_VALUE = (
    *(3.279402964237089, -2.116232597642542, 1.392454852168973, -0.756084616424445, 0.1828341064779239),
    *(0.1691781437500247, -0.1518746838151122, -0.06082886398559376, 0.09291471827431683, 0.05448968273146713),
    *(-0.04741704647732874, -0.06110535516386197, -0.001293424510457088, 0.0497923598115908, 0.04947265084844847),
    *(-0.01088796970484972, -0.07814569552351155, -0.03827014673472926, 0.07439858279785767, 0.06533824605732791),
    *(-0.0476030487561289, -0.05638593613469858, 0.02008182856168426, 0.02931226965694275, -0.005069335053895643),
    *(-0.008727328011855535, 0.0005814227071179214, 0.00115000370863192),
)


def _slope_polynomial(value: Sequence[float]) -> tuple[float, ...]:
    """Return the coefficients of W from those of U."""
    product = [a + b for a, b in zip((*value, 0.0), (0.0, *value), strict=True)]
    derivative = [i * a for i, a in enumerate(product)][1:]
    slope = [a - b for a, b in zip((*derivative, 0.0), (0.0, *derivative), strict=True)]
    return (1 + slope[0], *slope[1:])


_SLOPE = _slope_polynomial(_VALUE)

# Beyond this ratio of loc and scale the KL is the logarithm of the ratio plus a constant, to the last digit; smaller
# scales are set to this bound, so that no square overflows, and pay the rest as a logarithm.
_LARGEST_RATIO = 1e9


def log_uniform_kl(loc: Tensor, scale: Tensor) -> Tensor:
    """Return the KL of Normals from a `LogUniform`, elementwise; `loc` and `scale` have one shape."""
    return cast(Tensor, fast_or_plain(_LogUniformKL, plain_log_uniform_kl, loc, scale))


def plain_log_uniform_kl(loc: Tensor, scale: Tensor) -> Tensor:
    """Do what `log_uniform_kl` does."""
    bounded, ratio = _bounded_ratio(loc, scale)
    square = ratio * ratio
    share = square / (square + _SCALE)
    value = torch.full_like(share, _VALUE[-1])
    for coefficient in reversed(_VALUE[:-1]):
        value = value * (2 * share - 1) + coefficient
    return value * share + 0.5 * (square / _SCALE).log1p() + (bounded.log() - _positive(scale).log())


class _LogUniformKL(torch.autograd.Function):
    """In place, as memory takes the time: torch keeps two arrays for each of the 27 coefficients."""

    @staticmethod
    def forward(ctx: Any, loc: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(loc, scale)
        bounded, ratio = _bounded_ratio(loc, scale)
        square = ratio.mul_(ratio)
        share = (square + _SCALE).reciprocal_().mul_(square)
        kl = _polynomial(_VALUE, share).mul_(share)
        kl.add_(square.div_(_SCALE).log1p_(), alpha=0.5)
        return kl.add_(bounded.log_().sub_(_positive(scale).log_()))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        loc, scale = ctx.saved_tensors
        if torch.is_grad_enabled():
            return plain_gradients(plain_log_uniform_kl, (loc, scale), ctx.needs_input_grad, grad)
        bounded, ratio = _bounded_ratio(loc, scale)
        weight = ratio / (ratio * ratio + _SCALE)
        slope = grad * weight * _polynomial(_SLOPE, ratio * weight)  # along m
        return finite_(slope / bounded), finite_(-slope * ratio / _positive(scale))


def _bounded_ratio(loc: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    bounded = torch.maximum(_positive(scale), loc.abs() / _LARGEST_RATIO)
    return bounded, loc / bounded


def _positive(scale: Tensor) -> Tensor:
    """Return scales of which those that are zero, exponentials of far below, are the least number there is."""
    kind = torch.finfo(scale.dtype)
    return scale.clamp_min(kind.tiny * kind.eps)


def _polynomial(coefficients: Sequence[float], share: Tensor) -> Tensor:
    """Return a polynomial in 2 share - 1, in place."""
    x = 2 * share - 1
    value = torch.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        value.mul_(x).add_(coefficient)
    return value
