"""Bayesian principal component analysis whose rank is learned."""

import math

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_vnd.distributions import OrderedMask

__all__ = ["FactorModel"]


class FactorModel:
    r"""Probabilistic principal component analysis with at most K components, of which the first L count.

    $$z \sim \mathrm{OrderedMask.geometric}(\rho), \quad V_{dk} \sim N(0, s^2), \quad \log \sigma \sim N(0, 1), \quad
      x_n \sim N(0, V \mathrm{diag}(z) V^\top + \sigma^2 I).$$

    This is $x_n = V \mathrm{diag}(z) u_n + \epsilon_n$ with the factors $u_n \sim N(0, I)$ integrated out, so the rank
    is judged by the likelihood of V alone, and there is nothing to learn for each row.

    A dropped component enters as $z^2$, which has no slope at zero: a straight-through gradient would not tell what it
    is worth. `AutoNested` compares whole models instead: each rank has loadings of its own, and is fitted beside the
    others, by `fit` as it is. Now and then a component stays where it is of no use, so of several seeds keep the one
    with the best ELBO. Rotated, the kept loadings explain the data as well, which no Normal law has: k-hat may be above
    0.7 where the rank is the right one.

    Args:
        max_rank: K.
        keep: Prior probability to keep the next component, ρ.
        loading_scale: s, in the units of the data, which are to be centred.

    Raises:
        ValueError: If `loading_scale` is not positive.

    Example:
        >>> from pyro_vnd.infer import AutoNested, fit
        >>> x = torch.randn(60, 2) @ torch.randn(2, 8) + 0.3 * torch.randn(60, 8)
        >>> model = FactorModel(3)
        >>> guide = AutoNested(model)
        >>> result = fit(model, guide, x, num_epochs=150, progress=False)
        >>> int(guide.laws["mask"].mode.sum())
        2
    """

    def __init__(self, max_rank: int, *, keep: float = 0.7, loading_scale: float = 1.0) -> None:
        if not 0 < loading_scale < math.inf:
            raise ValueError(f"FactorModel: argument `loading_scale` must be finite and > 0; got {loading_scale}")
        self.prior = OrderedMask.geometric(keep, max_rank)
        self.keep, self.loading_scale = keep, loading_scale

    def __call__(self, x: Tensor) -> None:
        """Run the model on centred data, shape (N, D)."""
        if x.dim() != 2 or not x.numel() or not torch.isfinite(x).all():
            what = "" if torch.isfinite(x).all() else " with NaN or inf"
            raise ValueError(f"FactorModel: argument `x` must be finite, of shape (N, D); got {tuple(x.shape)}{what}")
        k, d = self.prior.num_units, x.shape[1]
        mask = pyro.sample("mask", OrderedMask.geometric(x.new_tensor(self.keep), k))
        loadings = pyro.sample("loadings", dist.Normal(x.new_zeros(d, k), self.loading_scale).to_event(2))
        noise = pyro.sample("noise", dist.LogNormal(x.new_zeros(()), 1.0))
        kept = loadings * mask.unsqueeze(-2)
        law = dist.LowRankMultivariateNormal(x.new_zeros(d), kept, noise.square().expand(d))
        with pyro.plate("data", len(x)):
            pyro.sample("x", law, obs=x)
