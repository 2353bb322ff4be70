"""The scale-free, improper log-uniform prior of variational dropout, and its exact divergence from a Normal."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Self

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import Normal, constraints, register_kl
from torch.types import _size

from pyro_vnd.distributions.shapes import check_expandable

__all__ = ["LogUniform"]

_EULER_GAMMA = 0.57721566490153286
_CONSTANT = 0.5 * (1 + _EULER_GAMMA + math.log(4 * math.pi))


class LogUniform(TorchDistribution):
    r"""Improper prior $p(w) \propto 1 / |w|$ on the real line: uniform over the sign and the logarithm of w.

    $$\log p(w) = -\log |w| - c, \qquad c = \tfrac12 (1 + \gamma + \log 4 \pi),$$
    $$\mathrm{KL}(N(\mu, \sigma^2) \,\|\, p) = E_q[\log q(w) - \log p(w)]
      = E \log |m + \epsilon| - E \log |\epsilon|, \qquad m = \mu / \sigma, \quad \epsilon \sim N(0, 1),$$
    $$\partial \mathrm{KL} / \partial m = \sqrt 2 \, D(m / \sqrt 2), \quad D \text{ the Dawson function}.$$

    The KL is exact and registered, so `TraceMeanField_ELBO` uses it. It only depends on $\alpha = \sigma^2 / \mu^2$: it
    is 0 at m = 0, $m^2 / 2$ near it, grows with |m|, and tends to $\log |m| + (\gamma + \log 2) / 2$. Its relative
    error is 1e-11 in float64, that of its gradient 2e-10.

    An improper prior has no normalising constant, so c is a convention: here the one for which the smallest KL is
    zero. Weights that are always in the model do not notice. Where a width is *learned*, each unit pays for its
    weights, any other c would shift that price by the same amount for each weight, and the learned width would be as
    arbitrary as c: use a proper prior there. Nor is there a posterior to come close to in general: 1 / |w| has infinite
    mass around zero, and a likelihood that is positive at w = 0 leaves it there.

    - Sampling raises, as there is no law to sample from. Give guides a starting point of their own, such as
      `init_to_value` for an autoguide.
    - `log_prob` is infinite at w = 0; there, the value at the smallest normal float is returned, with gradient zero.

    Shapes: batch_shape as given, event_shape ().

    Args:
        batch_shape: Batch shape; further dimensions come from `expand` or a plate.
        validate_args: Whether values are checked.

    Raises:
        ValueError: If `batch_shape` is not a sequence of sizes >= 0.
        NotImplementedError: If a sample is drawn.

    Source: Kingma et al., "Variational dropout and the local reparameterization trick", arXiv 1506.02557; Molchanov
    et al., "Variational dropout sparsifies deep neural networks", arXiv 1701.05369, whose sigmoid approximates this KL
    to .009 nats; Hron et al., "Variational Bayesian dropout: pitfalls and fixes", arXiv 1807.01969, on improperness.

    Example:
        >>> import torch
        >>> from torch.distributions import Normal, kl_divergence
        >>> prior = LogUniform().expand([3])
        >>> kl_divergence(Normal(torch.tensor([0.0, 0.1, 100.0]), 0.1), prior)
        tensor([0.0000, 0.4267, 7.5429])
        >>> prior.log_prob(torch.tensor([0.1, 1.0, -1.0]))
        tensor([ 0.2485, -2.0541, -2.0541])
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    support = constraints.real

    def __init__(self, batch_shape: Sequence[int] = (), *, validate_args: bool | None = None) -> None:
        try:
            shape = torch.Size(batch_shape)
        except TypeError:
            shape = None
        if shape is None or any(size < 0 for size in shape):
            raise ValueError(
                f"LogUniform: argument `batch_shape` must be a sequence of sizes >= 0; got {batch_shape!r}"
            )
        super().__init__(shape, validate_args=validate_args)

    def expand(self, batch_shape: _size, _instance: Self | None = None) -> Self:
        """Return the same prior with a larger batch shape."""
        batch_shape = torch.Size(batch_shape)
        check_expandable(self, batch_shape)
        new = self._get_checked_instance(LogUniform, _instance)
        TorchDistribution.__init__(new, batch_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def rsample(self, sample_shape: _size = torch.Size()) -> Tensor:
        """Raise: an improper prior has no samples. So does `sample`, which comes here too."""
        raise NotImplementedError(
            "LogUniform: an improper prior cannot be sampled. Score values of a guide with it, start autoguides with "
            "`init_loc_fn=init_to_value(values=...)`, and use a proper prior for prior predictive draws"
        )

    def log_prob(self, value: Tensor) -> Tensor:
        """Return -log |w| - c, finite at zero, shape broadcast(value.shape, batch_shape)."""
        if self._validate_args:
            self._validate_sample(value)
        log_prob = -value.abs().clamp_min(torch.finfo(value.dtype).tiny).log() - _CONSTANT
        return log_prob.expand(torch.broadcast_shapes(value.shape, self.batch_shape))

    def __repr__(self) -> str:
        return f"LogUniform({tuple(self.batch_shape)})"


@register_kl(Normal, LogUniform)
def _kl_normal_log_uniform(q: Normal, p: LogUniform) -> Tensor:
    """Return E log|m + eps| - E log|eps|, m = loc / scale; half precision is computed in float32."""
    dtype = torch.promote_types(q.loc.dtype, torch.float32)
    kl = _NormalDivergence.apply(q.loc.to(dtype), q.scale.to(dtype))
    return kl.expand(torch.broadcast_shapes(q.batch_shape, p.batch_shape))


# With s = m^2 / (m^2 + 16), which runs from 0 to 1, and x = 2 s - 1,
#     KL = log(1 + m^2 / 16) / 2 + s U(x)   and   m dKL/dm = s W(x),   W = 1 + (1 - x) d/dx[(1 + x) U(x)],
# where U and W are smooth in x from end to end, so that one polynomial each will do; the 16 makes them so smooth that
# powers of x are a stable basis in float32. W was interpolated at Chebyshev points, in many digits, from
# m dKL/dm = sqrt(2) m D(m / sqrt(2)); integrated, it gave U, from which W follows: the gradient is that of the value.
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


class _NormalDivergence(torch.autograd.Function):
    """KL of Normals from a `LogUniform`, elementwise; `loc` and `scale` have one shape."""

    generate_vmap_rule = True

    @staticmethod
    def forward(loc: Tensor, scale: Tensor) -> Tensor:
        bounded, ratio = _bounded_ratio(loc, scale)
        square = ratio.mul_(ratio)
        share = (square + _SCALE).reciprocal_().mul_(square)
        kl = _polynomial(_VALUE, share).mul_(share)
        kl.add_(square.div_(_SCALE).log1p_(), alpha=0.5)
        return kl.add_(bounded.div_(scale).log_())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        loc, scale = ctx.saved_tensors
        bounded, ratio = _bounded_ratio(loc, scale)
        weight = ratio / (ratio * ratio + _SCALE)
        slope = grad * weight * _polynomial(_SLOPE, ratio * weight)  # along m
        return slope / bounded, -slope * ratio / scale


def _bounded_ratio(loc: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    bounded = torch.maximum(scale, loc.abs().div_(_LARGEST_RATIO))
    return bounded, loc / bounded


def _polynomial(coefficients: Sequence[float], share: Tensor) -> Tensor:
    """Return a polynomial in 2 share - 1; in place, as memory takes the time, unless it is to be differentiated."""
    x = 2 * share - 1
    value = torch.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        value = value * x + coefficient if torch.is_grad_enabled() else value.mul_(x).add_(coefficient)
    return value
