"""A mixture of Gaussians whose number of components is learned."""

import math

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import init_to_value
from torch import Tensor

from pyro_vnd.distributions import OrderedMask
from pyro_vnd.infer import AutoNested

__all__ = ["GaussianMixture", "farthest_points"]


class GaussianMixture:
    r"""Mixture of at most K Gaussians, of which the first L count.

    $$L \sim \mathrm{Uniform}\{1..K\}, \quad w \sim \mathrm{Dirichlet}(\alpha), \quad \mu_k \sim N(0, s^2 I), \quad
      \log \sigma_k \sim N(\log s_0, 0.3^2 I), \quad
      x_n \sim \sum_{k \le L} \frac{w_k}{\sum_{j \le L} w_j} N(\mu_k, \mathrm{diag}\, \sigma_k^2).$$

    A dropped component has weight zero, so that no slope tells what it would be worth. `AutoNested` compares whole
    mixtures instead: each length has components of its own, and is fitted beside the others.

    A mixture has many local optima. Start at scattered points, as `guide_from` does, not anywhere, and of several
    starts keep the one with the best ELBO.

    Args:
        num_components: K.
        spread: s, the distance of the components from the origin: centre the data.
        scale: $s_0$, the size of a component. It tells one wide component from two narrow ones.
        concentration: α. Larger ones want components of equal weight.

    Raises:
        ValueError: If an argument is not positive.

    Example:
        >>> from pyro_vnd.infer import fit
        >>> x = torch.randn(100, 2) + torch.tensor([[-4.0, 0.0], [4.0, 0.0]]).repeat(50, 1)
        >>> model = GaussianMixture(4)
        >>> guide = model.guide_from(x)
        >>> result = fit(model, guide, x, num_epochs=150, progress=False)
        >>> int(guide.laws["mask"].mode.sum())
        2
    """

    def __init__(
        self, num_components: int = 8, *, spread: float = 5.0, scale: float = 1.0, concentration: float = 1.0
    ) -> None:
        for name, value in (("spread", spread), ("scale", scale), ("concentration", concentration)):
            if not 0 < value < math.inf:
                raise ValueError(f"GaussianMixture: argument `{name}` must be finite and > 0; got {value}")
        self.prior = OrderedMask.uniform(num_components)
        self.spread, self.scale, self.concentration = spread, scale, concentration

    def __call__(self, x: Tensor) -> None:
        """Run the model on points, shape (N, D)."""
        _check_points(x)
        k, shape = self.prior.num_units, (self.prior.num_units, x.shape[1])
        mask = pyro.sample("mask", OrderedMask.uniform(k, dtype=x.dtype, device=x.device))
        weights = pyro.sample("weights", dist.Dirichlet(x.new_full((k,), self.concentration)))
        means = pyro.sample("means", dist.Normal(x.new_zeros(shape), self.spread).to_event(2))
        scales = pyro.sample("scales", dist.LogNormal(x.new_full(shape, math.log(self.scale)), 0.3).to_event(2))
        # The floor is for weights that underflow: the gradient of log 0 is NaN even where it is not chosen.
        log_weights = torch.where(mask > 0, weights.clamp_min(torch.finfo(x.dtype).tiny).log(), -torch.inf)
        components = dist.Normal(means, scales).to_event(1).expand(log_weights.shape)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.MixtureSameFamily(dist.Categorical(logits=log_weights), components), obs=x)

    def guide_from(self, x: Tensor, start: int = 0) -> AutoNested:
        """Return a guide whose means start at scattered points of the data, shape (N, D), the first at row `start`."""
        k = self.prior.num_units
        means = farthest_points(x, k, start)
        values = {"means": means, "scales": torch.full_like(means, self.scale), "weights": x.new_full((k,), 1 / k)}
        return AutoNested(self, init_loc_fn=init_to_value(values=values))


def farthest_points(x: Tensor, count: int, start: int = 0) -> Tensor:
    """Return rows of points, shape (N, D): row `start`, then each time the one farthest from those before it."""
    _check_points(x)
    if not 0 <= start < len(x):
        raise ValueError(f"argument `start` must be from 0 to {len(x) - 1}, a row of `x`; got {start}")
    rows = [start]
    for _ in range(count - 1):
        rows.append(int(torch.cdist(x, x[rows]).amin(-1).argmax()))
    return x[rows]


def _check_points(x: Tensor) -> None:
    if x.dim() != 2 or not len(x) or not torch.isfinite(x).all():
        what = "" if torch.isfinite(x).all() else " with NaN or inf"
        raise ValueError(f"argument `x` must be finite points of shape (N, D); got {tuple(x.shape)}{what}")
