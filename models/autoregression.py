"""An autoregression whose order is learned."""

import math

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_vnd.distributions import OrderedMask

__all__ = ["Autoregression", "lags"]


class Autoregression:
    r"""Autoregression AR(L) of an order up to K, given the first K values.

    $$z \sim \mathrm{OrderedMask.geometric}(\rho), \qquad a_i \sim N(0, s^2), \qquad
      y_t \sim N\Big(\sum_i z_i a_i y_{t-i}, \sigma^2\Big), \quad t = K+1..T.$$

    All orders are judged by the same T - K values. `AutoNested(model)` and `fit` find the law of the order, with
    coefficients, and a noise, that know the order; with known noise it is that of a formula, to a thousandth.

    Args:
        max_order: K.
        keep: Prior probability to keep the next lag, ρ.
        noise: σ if it is known; None makes it a latent "noise", LogNormal(0, 1).
        coefficient_scale: s.

    Raises:
        ValueError: If `noise` or `coefficient_scale` is not positive.

    Example:
        >>> from pyro_vnd.infer import AutoNested, fit
        >>> y = torch.randn(300)
        >>> for t in range(2, 300):
        ...     y[t] += 0.9 * y[t - 1] - 0.8 * y[t - 2]
        >>> model = Autoregression(4, noise=1.0)
        >>> guide = AutoNested(model)
        >>> result = fit(model, guide, y, num_epochs=100, progress=False)
        >>> int(guide.laws["mask"].mode.sum())
        2
    """

    def __init__(
        self, max_order: int, *, keep: float = 0.5, noise: float | None = None, coefficient_scale: float = 0.5
    ) -> None:
        for name, value in (("noise", 1.0 if noise is None else noise), ("coefficient_scale", coefficient_scale)):
            if not 0 < value < math.inf:
                raise ValueError(f"Autoregression: argument `{name}` must be finite and > 0; got {value}")
        self.prior = OrderedMask.geometric(keep, max_order)
        self.keep, self.noise, self.coefficient_scale = keep, noise, coefficient_scale

    def __call__(self, y: Tensor) -> None:
        """Run the model on a series, shape (T,)."""
        k = self.prior.num_units
        past = lags(y, k)
        mask = pyro.sample("mask", OrderedMask.geometric(y.new_tensor(self.keep), k))
        coefficients = pyro.sample("coefficients", dist.Normal(y.new_zeros(k), self.coefficient_scale).to_event(1))
        noise = pyro.sample("noise", dist.LogNormal(y.new_zeros(()), 1.0)) if self.noise is None else self.noise
        with pyro.plate("time", len(past)):
            # No matrix product: enumeration puts the masks to the left of the plate.
            pyro.sample("y", dist.Normal((past * (mask * coefficients)).sum(-1), noise), obs=y[k:])


def lags(y: Tensor, max_order: int) -> Tensor:
    """Return the K values before each value of a series but the first K, the latest first.

    Args:
        y: The series, shape (T,).
        max_order: K.

    Returns:
        Shape (T - K, K).

    Raises:
        ValueError: If `y` is no finite series of more than K values.

    Example:
        >>> lags(torch.arange(5.0), 2)
        tensor([[1., 0.],
                [2., 1.],
                [3., 2.]])
    """
    if y.dim() != 1 or len(y) <= max_order or not torch.isfinite(y).all():
        what = "" if torch.isfinite(y).all() else " with NaN or inf"
        raise ValueError(
            f"lags: argument `y` must be a finite series of shape (T,) with T > {max_order}; got {tuple(y.shape)}{what}"
        )
    return y.unfold(0, max_order, 1)[:-1].flip(-1)
