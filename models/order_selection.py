"""The order of a regression, that is, how many of its terms the data ask for: its exact law, to compare others with."""

import math

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC, NUTS
from torch import Tensor

from pyro_vnd.diagnostics import length_posterior
from pyro_vnd.distributions import NestedNormal, OrderedMask

__all__ = ["OrderedRegression", "legendre", "order_by_nuts", "orthonormalise"]


def legendre(x: Tensor, num_terms: int) -> Tensor:
    """Return the first Legendre polynomials of points in [-1, 1], orthonormal under the uniform law, shape (N, K)."""
    terms = [torch.ones_like(x), x]
    for j in range(1, num_terms - 1):
        terms.append(((2 * j + 1) * x * terms[j] - j * terms[j - 1]) / (j + 1))
    return torch.stack([(2 * j + 1) ** 0.5 * term for j, term in enumerate(terms[:num_terms])], -1)


def orthonormalise(features: Tensor) -> Tensor:
    """Make features, shape (N, K), orthonormal on the data, each by those before it; every order spans what it did.

    Raises:
        ValueError: If there are fewer rows than features.
    """
    if features.dim() != 2 or len(features) < features.shape[1]:
        raise ValueError(
            f"orthonormalise: argument `features` must have shape (N, K) with N >= K; got {tuple(features.shape)}"
        )
    q, r = torch.linalg.qr(features)
    return q * r.diagonal().sign() * len(features) ** 0.5


class OrderedRegression:
    r"""Linear regression on ordered features, of which the first L count.

    $$L \sim p, \qquad w_j \sim N(0, s^2), \qquad y_n \sim N\Big(\sum_{j \le L} w_j \phi_j(x_n), \sigma^2\Big).$$

    The object is the Pyro model, with sites "mask" and "w", "noise" where σ is not known, and the plate "data". The law
    of the order is known exactly, `order_posterior`. `AutoNested(model)` and `fit` find it, since the weights of that
    guide know the order; those of mean field, `latents="mean_field"`, do not, and its law is another one.

    Args:
        prior: Law of the order, `OrderedMask.uniform(K)` or `OrderedMask.geometric(p, K)`, say.
        noise: σ if it is known; None makes it a latent "noise", HalfNormal(1).
        weight_scale: s.

    Raises:
        ValueError: If `noise` or `weight_scale` is not positive.

    Example:
        >>> from pyro_vnd.infer import AutoNested, fit
        >>> x = torch.linspace(-1, 1, 50)
        >>> features, y = legendre(x, 6), 1 + 2 * x - x**2 + 0.5 * torch.randn(50)
        >>> model = OrderedRegression(OrderedMask.uniform(6), noise=0.5)
        >>> exact = model.order_posterior(features, y)
        >>> int(exact.mode.sum())
        3
        >>> guide = AutoNested(model)
        >>> result = fit(model, guide, (features, y), progress=False)
        >>> bool((guide.laws["mask"].probs - exact.probs).abs().sum() / 2 < 0.02)
        True
    """

    def __init__(self, prior: OrderedMask, noise: float | None = None, weight_scale: float = 1.0) -> None:
        for name, value in (("noise", 1.0 if noise is None else noise), ("weight_scale", weight_scale)):
            if not 0 < value < math.inf:
                raise ValueError(f"OrderedRegression: argument `{name}` must be finite and > 0; got {value}")
        self.prior, self.noise = prior, noise
        self.scales = torch.full_like(prior.probs, weight_scale)

    def __call__(self, features: Tensor, y: Tensor) -> None:
        """Run the model on features, shape (N, K), and targets, shape (N,)."""
        mask = pyro.sample("mask", self.prior)
        w = pyro.sample("w", dist.Normal(0.0, self.scales).to_event(1))
        self._observe(features, mask * w, y)

    def nested(self, features: Tensor, y: Tensor) -> None:
        """Run the same model with mask and weights in one site "w", whose weights past the order are zero."""
        law = NestedNormal(torch.zeros_like(self.scales), self.scales, probs=self.prior.probs)
        self._observe(features, pyro.sample("w", law), y)

    def _observe(self, features: Tensor, weights: Tensor, y: Tensor) -> None:
        noise = pyro.sample("noise", dist.HalfNormal(torch.ones_like(y[0]))) if self.noise is None else self.noise
        with pyro.plate("data", len(y), dim=-1):
            # No matrix product: enumeration and particles put dimensions to the left of the plate.
            pyro.sample("y", dist.Normal((features * weights).sum(-1), noise), obs=y)

    def log_evidence(self, features: Tensor, y: Tensor) -> Tensor:
        r"""Return log p(y | L = k) of every order, shape (K,), with all but the order integrated out, in float64.

        With $A = \Phi^\top \Phi / \sigma^2 + I / s^2 = R R^\top$, R lower triangular, and
        $u = R^{-1} \Phi^\top y / \sigma^2$,

        $$\log p(y \mid k, \sigma) = \log N(y; 0, \sigma^2) + \sum_{j \le k} \tfrac12 u_j^2 - \log R_{jj} - \log s,$$

        since A and R of the first k terms are the leading blocks of those of all. A latent σ is integrated out by the
        trapezoidal rule on log σ from -7 to 3, whose steps of .005 suffice for some 10,000 rows.

        Raises:
            ValueError: If the shapes do not fit.
        """
        if features.shape != (len(y), self.prior.num_units) or y.dim() != 1:
            raise ValueError(
                f"OrderedRegression: arguments `features` and `y` must have shapes (N, {self.prior.num_units}) and "
                f"(N,); got {tuple(features.shape)} and {tuple(y.shape)}"
            )
        features, y = features.double(), y.double()
        if self.noise is not None:
            return self._evidence_given(y.new_tensor([self.noise]), features, y)[0]
        noise = torch.linspace(-7, 3, 2001, dtype=torch.float64, device=y.device).exp()
        log_prior = dist.HalfNormal(torch.ones_like(y[0])).log_prob(noise) + (0.005 * noise).log()
        return (log_prior.unsqueeze(-1) + self._evidence_given(noise, features, y)).logsumexp(0)

    def _evidence_given(self, noise: Tensor, features: Tensor, y: Tensor) -> Tensor:
        """Return log p(y | L = k, σ) for each of several σ, shape (len(noise), K)."""
        scales, variance = self.scales.double(), noise.square().unsqueeze(-1)
        root = torch.linalg.cholesky(features.T @ features / variance.unsqueeze(-1) + torch.diag(scales**-2))
        u = torch.linalg.solve_triangular(root, (features.T @ y / variance).unsqueeze(-1), upper=False).squeeze(-1)
        gains = u.square() / 2 - root.diagonal(dim1=-2, dim2=-1).log() - scales.log()
        return dist.Normal(0.0, noise.unsqueeze(-1)).log_prob(y).sum(-1, keepdim=True) + gains.cumsum(-1)

    def order_posterior(self, features: Tensor, y: Tensor) -> OrderedMask:
        """Return the exact law of the order given the data."""
        return OrderedMask(probs=(self.prior.logits + self.log_evidence(features, y)).softmax(-1))


def order_by_nuts(
    model: OrderedRegression, features: Tensor, y: Tensor, *, num_samples: int = 1000, warmup_steps: int = 300
) -> OrderedMask:
    """Infer the order by NUTS over the weights, with the mask summed out, and the mean of p(L | w, y) over its draws.

    NUTS enumerates the mask by itself, and `length_posterior` gives the law of what was summed out: the mean of exact
    conditionals has less variance than drawn orders would. A weight has a spike, of width σ / sqrt(N) for orthonormal
    features, on a slab of width s: the narrower the spike by comparison, the smaller the steps and the slower the
    chain.
    """
    kernel = NUTS(model, max_plate_nesting=1)
    mcmc = MCMC(kernel, num_samples=num_samples, warmup_steps=warmup_steps, disable_progbar=True)
    mcmc.run(features, y)
    probs = length_posterior(model, mcmc, (features, y))["probs"].values
    return OrderedMask(probs=torch.as_tensor(probs))
