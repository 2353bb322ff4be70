"""The order of a regression, that is, how many of its terms the data ask for: one mask, inferred in four ways."""

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, TraceEnum_ELBO, config_enumerate
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_vnd.distributions import NestedNormal, OrderedMask
from pyro_vnd.infer import AutoNested, NestedELBO, cosine_to_zero, fit

__all__ = [
    "OrderedRegression",
    "legendre",
    "order_by_enumeration",
    "order_by_nuts",
    "order_by_straight_through",
    "order_given_weights",
    "orthonormalise",
]


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

    The object is the Pyro model, with sites "mask" and "w" and the plate "data". Weights past the order keep their
    prior, so that they need no care in any sampler.

    Args:
        prior: Law of the order, `OrderedMask.uniform(K)` or `OrderedMask.geometric(p, K)`, say.
        noise: σ, known.
        weight_scale: s.

    Raises:
        ValueError: If `noise` or `weight_scale` is not positive.

    Example:
        >>> x = torch.linspace(-1, 1, 50)
        >>> features, y = orthonormalise(legendre(x, 6)), 1 + 2 * x - x**2
        >>> model = OrderedRegression(OrderedMask.uniform(6), noise=0.1)
        >>> int(model.order_posterior(features, y).mode.sum())
        3
    """

    def __init__(self, prior: OrderedMask, noise: float, weight_scale: float = 1.0) -> None:
        for name, value in (("noise", noise), ("weight_scale", weight_scale)):
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
        with pyro.plate("data", len(y), dim=-1):
            # No matrix product: enumeration and particles put dimensions to the left of the plate.
            pyro.sample("y", dist.Normal((features * weights).sum(-1), self.noise), obs=y)

    def log_evidence(self, features: Tensor, y: Tensor) -> Tensor:
        r"""Return log p(y | L = k) of every order, shape (K,), with the weights integrated out, in float64.

        With $A = \Phi^\top \Phi / \sigma^2 + I / s^2 = R R^\top$, R lower triangular, and
        $u = R^{-1} \Phi^\top y / \sigma^2$,

        $$\log p(y \mid k) = \log N(y; 0, \sigma^2) + \sum_{j \le k} \tfrac12 u_j^2 - \log R_{jj} - \log s,$$

        since A and R of the first k terms are the leading blocks of those of all.

        Raises:
            ValueError: If the shapes do not fit.
        """
        if features.shape != (len(y), self.prior.num_units) or y.dim() != 1:
            raise ValueError(
                f"OrderedRegression: arguments `features` and `y` must have shapes (N, {self.prior.num_units}) and "
                f"(N,); got {tuple(features.shape)} and {tuple(y.shape)}"
            )
        features, y, scales = features.double(), y.double(), self.scales.double()
        root = torch.linalg.cholesky(features.T @ features / self.noise**2 + scales.square().reciprocal().diag())
        projected = (features.T @ y / self.noise**2).unsqueeze(-1)
        u = torch.linalg.solve_triangular(root, projected, upper=False).squeeze(-1)
        gains = u.square() / 2 - root.diagonal().log() - scales.log()
        return dist.Normal(0.0, self.noise).log_prob(y).sum() + gains.cumsum(-1)

    def order_posterior(self, features: Tensor, y: Tensor) -> OrderedMask:
        """Return the exact law of the order given the data."""
        return OrderedMask(probs=(self.prior.logits + self.log_evidence(features, y)).softmax(-1))


def order_given_weights(model: Callable[..., Any], weights: Tensor, features: Tensor, y: Tensor) -> OrderedMask:
    """Return p(L | w, y) for draws of the weights, shape (S, K), a law of batch shape (S,).

    Pyro's own enumeration scores all masks at once, in a dimension to the left of draws and data.
    """

    def all_draws(features: Tensor, y: Tensor) -> None:
        with pyro.plate("draws", len(weights), dim=-2):
            poutine.condition(model, {"w": weights.unsqueeze(-2)})(features, y)

    trace = poutine.trace(poutine.enum(config_enumerate(all_draws), first_available_dim=-3)).get_trace(features, y)
    trace.compute_log_prob()
    log_joint = trace.nodes["mask"]["log_prob"] + trace.nodes["y"]["log_prob"].sum(-1, keepdim=True)
    return OrderedMask(probs=log_joint.squeeze(-1).movedim(0, -1).softmax(-1))


def order_by_nuts(
    model: OrderedRegression, features: Tensor, y: Tensor, *, num_samples: int = 1000, warmup_steps: int = 300
) -> OrderedMask:
    """Infer the order by NUTS over the weights, with the mask summed out, and the mean of p(L | w, y) over its draws.

    NUTS enumerates the mask by itself. The mean of exact conditionals has less variance than drawn orders would. A
    weight has a spike, of width σ / sqrt(N) for orthonormal features, on a slab of width s: the narrower the spike by
    comparison, the smaller the steps and the slower the chain.
    """
    kernel = NUTS(model, max_plate_nesting=1)
    mcmc = MCMC(kernel, num_samples=num_samples, warmup_steps=warmup_steps, disable_progbar=True)
    mcmc.run(features, y)
    return OrderedMask(probs=order_given_weights(model, mcmc.get_samples()["w"], features, y).probs.mean(0))


class _Parameters(PyroModule):
    """Parameters of the guides: a free law of the order, which starts at the prior, and a Normal for each weight."""

    def __init__(self, model: OrderedRegression) -> None:
        super().__init__()
        self.prior_scales = model.scales
        self.logits = nn.Parameter(model.prior.logits.clamp_min(-1e3))
        self.loc = nn.Parameter(torch.zeros_like(model.scales))
        # Narrow: wide draws of weights not learned yet would rule out the long orders, which come back slowly.
        self.log_scale = nn.Parameter((0.1 * model.scales).log())

    @property
    def order(self) -> OrderedMask:
        return OrderedMask(logits=self.logits)

    @property
    def scale(self) -> Tensor:
        return self.log_scale.exp()


class _EnumeratedGuide(_Parameters):
    """Enumerates the mask; weights past the order have their prior, or, if not `conditional`, ignore the mask."""

    def __init__(self, model: OrderedRegression, conditional: bool) -> None:
        super().__init__(model)
        self.conditional = conditional

    def forward(self, features: Tensor, y: Tensor) -> None:
        mask = pyro.sample("mask", self.order, infer={"enumerate": "parallel"})
        weights = dist.Normal(self.loc, self.scale)
        if self.conditional:
            weights = dist.Normal(mask * self.loc, torch.where(mask == 1, self.scale, self.prior_scales))
        pyro.sample("w", weights.to_event(1))


class _NestedGuide(_Parameters):
    """Draws mask and weights from one site, with the straight-through gradient for the mask."""

    def __init__(self, model: OrderedRegression, temperature: float) -> None:
        super().__init__(model)
        self.temperature = temperature

    def forward(self, features: Tensor, y: Tensor) -> None:
        pyro.sample("w", NestedNormal(self.loc, self.scale, self.logits, temperature=self.temperature))


def order_by_enumeration(
    model: OrderedRegression,
    features: Tensor,
    y: Tensor,
    *,
    conditional: bool = True,
    num_steps: int = 1000,
    num_particles: int = 8,
) -> OrderedMask:
    """Infer the order by SVI, with every order of the guide enumerated: no noise and no bias from the mask.

    For features that are orthonormal on the data, the weights are independent given the order and each has the same
    posterior in all orders that keep it. The guide then contains the exact posterior; for others, orthonormalise.

    Args:
        model: The regression.
        features: Shape (N, K).
        y: Shape (N,).
        conditional: Whether weights past the order follow their prior. If not, weights and mask are independent: mean
            field, whose law of the order is not the posterior even at the optimum.
        num_steps: Steps of the optimiser.
        num_particles: Draws of the weights a step.
    """
    guide = _EnumeratedGuide(model, conditional)
    elbo = TraceEnum_ELBO(num_particles=num_particles, vectorize_particles=True, max_plate_nesting=1)
    _train(model, guide, features, y, elbo, num_steps)
    return OrderedMask(logits=guide.order.logits.detach())


def order_by_straight_through(
    model: OrderedRegression,
    features: Tensor,
    y: Tensor,
    *,
    conditional: bool = True,
    temperature: float = 0.1,
    num_steps: int = 1000,
    num_particles: int = 64,
) -> OrderedMask:
    r"""Infer the order by SVI, with drawn masks and the straight-through gradient: the way that scales to large models.

    In place of differences of the ELBO between neighbouring orders the gradient has slopes in the entries of the mask,
    on both sides of the step. For a log-likelihood that is quadratic in the mask, as this one, the mean of both slopes
    is the difference, so that the gradient is right as the temperature goes to zero. At a temperature above zero it
    mixes in the slopes of steps further off, which differ where the evidence is sharp; a lower one has more noise.

    Args:
        model: The regression.
        features: Shape (N, K).
        y: Shape (N,).
        conditional: Whether weights past the order follow their prior. If not, the guide is `AutoNested`, the mean
            field of mask and weights.
        temperature: Temperature of the soft mask in the backward pass.
        num_steps: Steps of the optimiser.
        num_particles: Draws a step.
    """
    elbo = NestedELBO(num_particles=num_particles, vectorize_particles=True, max_plate_nesting=1)
    if conditional:
        guide = _NestedGuide(model, temperature)
        _train(model.nested, guide, features, y, elbo, num_steps)
        return OrderedMask(logits=guide.order.logits.detach())
    mean_field = AutoNested(model, temperature=temperature)
    _train(model, mean_field, features, y, elbo, num_steps)
    return mean_field.laws["mask"]


def _train(model: Callable[..., Any], guide: PyroModule, features: Tensor, y: Tensor, elbo: Any, steps: int) -> None:
    schedule = cosine_to_zero()
    fit(model, guide, [features, y], num_epochs=steps, lr=0.1, lr_schedule=schedule, elbo=elbo, progress=False)
