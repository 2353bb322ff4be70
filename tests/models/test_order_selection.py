"""Ways to the posterior over the order of a polynomial regression agree; distance is total variation (TV)."""

from collections.abc import Callable
from typing import NamedTuple

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from models.order_selection import OrderedRegression, legendre, order_by_nuts, orthonormalise
from pyro_vnd.distributions import OrderedMask
from pyro_vnd.infer import AutoNested, fit

K, N, NOISE = 8, 40, 1.0


class Data(NamedTuple):
    coefficients: list[float]
    seed: int
    prior: OrderedMask
    weight_scale: float = 0.3

    @property
    def model(self) -> OrderedRegression:
        return OrderedRegression(self.prior, NOISE, self.weight_scale)

    def draw(self, orthonormal: bool = True) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        features = legendre(2 * torch.rand(N, generator=generator) - 1, K)
        features = orthonormalise(features) if orthonormal else features
        mean = features[:, : len(self.coefficients)] @ torch.tensor(self.coefficients)
        return features, mean + NOISE * torch.randn(N, generator=generator)


UNIFORM = OrderedMask.uniform(K, dtype=torch.float64)
# Orders 5 and 3 are planted. The posteriors, from order 3 on: .00 .02 .22 .44 .21 .11, and .64 .19 .12 .04 .01 .01.
DATA = {
    "order-5-uniform": Data([0.8, -0.7, 0.7, -0.6, 0.5], 2, UNIFORM),
    "order-3-geometric": Data([0.8, -0.8, 0.8], 1, OrderedMask.geometric(torch.tensor(0.6, dtype=torch.float64), K)),
}

# A wide prior of the weights, and some ten nats between orders up to the fifth; from there on .47 .45 .07 .01.
SHARP = Data([1.0, -0.9, 0.8, 0.7, -0.7], 2, UNIFORM, weight_scale=1.0)


@pytest.fixture(params=DATA.values(), ids=DATA)
def data(request) -> Data:
    return request.param


def total_variation(q: OrderedMask, p: OrderedMask) -> float:
    return 0.5 * (q.probs - p.probs).abs().sum().item()


def test_bases_are_orthonormal_and_span_the_same():
    points = torch.linspace(-1, 1, 100_001)
    torch.testing.assert_close(
        legendre(points, 5).T @ legendre(points, 5) / len(points), torch.eye(5), atol=3e-4, rtol=0
    )
    features, same = DATA["order-5-uniform"].draw(orthonormal=False)[0], DATA["order-5-uniform"].draw()[0]
    torch.testing.assert_close(same.T @ same / N, torch.eye(K))
    for order in range(1, K + 1):
        assert torch.linalg.matrix_rank(torch.cat([features[:, :order], same[:, :order]], 1)) == order


@pytest.mark.parametrize("orthonormal", [True, False])
def test_evidence_is_that_of_the_data_in_each_order(data: Data, orthonormal: bool):
    """The oracle integrates weights out of the covariance of the data, one order at a time."""
    features, y = data.draw(orthonormal)
    evidence = data.model.log_evidence(features, y)
    for order in range(1, K + 1):
        kept = features[:, :order]
        covariance = NOISE**2 * torch.eye(N) + data.weight_scale**2 * kept @ kept.T
        torch.testing.assert_close(evidence[order - 1], dist.MultivariateNormal(torch.zeros(N), covariance).log_prob(y))


def test_posteriors_are_spread_and_wrong_ones_far(data: Data):
    """The power of the bars below: what ignores data, order, occupied volume or prior is beyond all of them."""
    features, y = data.draw()
    truth = data.model.order_posterior(features, y)
    assert (truth.probs > 0.1).sum() >= 3
    assert truth.mode.sum() in (len(data.coefficients), len(data.coefficients) + 1)
    evidence = data.model.log_evidence(features, y)
    precision = features.T @ features / NOISE**2 + torch.eye(K) / data.weight_scale**2
    half_log_determinants = torch.linalg.cholesky(data.weight_scale**2 * precision).diagonal().log().cumsum(-1)
    logits = data.prior.logits + evidence
    for wrong in (data.prior.logits, logits.flip(-1), logits + half_log_determinants):
        assert total_variation(OrderedMask(logits=wrong), truth) > 0.25


def test_unknown_noise_is_integrated_out(data: Data):
    """The oracle is another quadrature, in the noise itself; the law is another one than under the planted noise."""
    features, y = data.draw(orthonormal=False)
    unknown = OrderedRegression(data.prior, weight_scale=data.weight_scale)
    noises = torch.linspace(0.3, 4, 500)
    given = torch.stack(
        [OrderedRegression(data.prior, s.item(), data.weight_scale).log_evidence(features, y) for s in noises]
    )
    log_prior = dist.HalfNormal(1.0).log_prob(noises).unsqueeze(-1)
    expected = (log_prior + given).logsumexp(0) + (noises[1] - noises[0]).log()
    torch.testing.assert_close(unknown.log_evidence(features, y), expected, rtol=1e-6, atol=1e-6)
    known = data.model.order_posterior(features, y)
    assert total_variation(unknown.order_posterior(features, y), known) > 0.02


@pytest.mark.parametrize(
    ("name", "num_samples", "bar"),
    [
        ("order-3-geometric", 250, 0.04),
        pytest.param("order-5-uniform", 1000, 0.02, marks=pytest.mark.slow),  # .005 to .012 over three seeds
    ],
)
def test_nuts(name: str, num_samples: int, bar: float):
    data = DATA[name]
    features, y = data.draw()
    law = order_by_nuts(data.model, features, y, num_samples=num_samples, warmup_steps=num_samples // 3)
    assert total_variation(law, data.model.order_posterior(features, y)) <= bar


def learned(model: Callable, features: Tensor, y: Tensor, **kwargs) -> OrderedMask:
    """The law that a guide has after a fit with the defaults; a `NestedNormal` has it at its site of weights."""
    guide = AutoNested(model, **kwargs)
    fit(model, guide, (features, y), progress=False)
    (law,) = guide.laws.values()
    return law


@pytest.mark.parametrize("orthonormal", [True, False])
def test_the_default_guide(data: Data, orthonormal: bool):
    features, y = data.draw(orthonormal)
    truth = data.model.order_posterior(features, y)
    assert total_variation(learned(data.model, features, y), truth) <= 0.01  # at most .0005
    assert total_variation(learned(data.model, features, y, latents="mean_field"), truth) > 0.2  # .23 to .48


def test_the_default_guide_of_mask_and_weights_in_one_site(data: Data):
    features, y = data.draw(orthonormal=False)
    truth = data.model.order_posterior(features, y)
    assert total_variation(learned(data.model.nested, features, y), truth) <= 0.01  # .0002


@pytest.mark.parametrize("noise", [NOISE, None])
def test_sharp_evidence_with_known_and_unknown_noise(noise: float | None):
    features, y = SHARP.draw(orthonormal=False)
    model = OrderedRegression(SHARP.prior, noise, SHARP.weight_scale)
    truth = model.order_posterior(features, y)
    assert total_variation(learned(model, features, y), truth) <= 0.02
    assert total_variation(learned(model, features, y, latents="mean_field"), truth) > 0.25


@pytest.mark.parametrize(("name", "value"), [("noise", 0.0), ("weight_scale", float("nan"))])
def test_scales_are_checked(name: str, value: float):
    with pytest.raises(ValueError, match=f"argument `{name}` must be finite and > 0; got {value}"):
        OrderedRegression(OrderedMask.uniform(3), **{"noise": 1.0, name: value})


def test_orthonormalise_wants_enough_rows():
    with pytest.raises(ValueError, match=r"`features` must have shape \(N, K\) with N >= K; got \(3, 4\)"):
        orthonormalise(torch.ones(3, 4))


@pytest.mark.parametrize(("features", "y"), [((5, 4), (5,)), ((5, 3), (4,)), ((5, 3), (5, 1))])
def test_shapes_are_checked(features: tuple[int, ...], y: tuple[int, ...]):
    model = OrderedRegression(OrderedMask.uniform(3), noise=1.0)
    with pytest.raises(ValueError, match=r"must have shapes \(N, 3\) and \(N,\); got"):
        model.order_posterior(torch.ones(features), torch.ones(y))
