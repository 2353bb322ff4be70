"""Four ways to the posterior over the order of a polynomial regression agree; distance is total variation (TV)."""

from typing import NamedTuple

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from models.order_selection import (
    OrderedRegression,
    legendre,
    order_by_enumeration,
    order_by_nuts,
    order_by_straight_through,
    order_given_weights,
    orthonormalise,
)
from pyro_vnd.distributions import OrderedMask

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


def test_order_given_weights_is_bayes_rule(data: Data):
    features, y = data.draw()
    weights = data.weight_scale * torch.randn(5, K, generator=torch.Generator().manual_seed(0))
    law = order_given_weights(data.model, weights, features, y)
    assert law.batch_shape == (5,)
    for row, w in zip(law.probs, weights, strict=True):
        means = torch.stack([features[:, :order] @ w[:order] for order in range(1, K + 1)])
        expected = data.prior.logits + dist.Normal(means, NOISE).log_prob(y).sum(-1)
        torch.testing.assert_close(row, expected.softmax(-1))


@pytest.mark.parametrize(
    "name", [pytest.param("order-5-uniform", marks=pytest.mark.slow), "order-3-geometric"]
)  # one chain shows what it can; the other prior is another twelve seconds
def test_nuts(name: str):
    pyro.set_rng_seed(0)
    data = DATA[name]
    features, y = data.draw()
    law = order_by_nuts(data.model, features, y)
    assert total_variation(law, data.model.order_posterior(features, y)) <= 0.02  # .005 to .012 over three seeds


def test_enumeration(data: Data):
    features, y = data.draw()
    truth = data.model.order_posterior(features, y)
    law = order_by_enumeration(data.model, features, y, num_steps=300)
    assert total_variation(law, truth) <= 0.02  # .011, .010


def test_straight_through(data: Data):
    features, y = data.draw()
    truth = data.model.order_posterior(features, y)
    law = order_by_straight_through(data.model, features, y, num_steps=300)
    assert total_variation(law, truth) <= 0.15  # .024, .026


def test_mean_field_and_not_the_gradient_is_what_fails_on_sharp_evidence():
    """Each pair of guides has one family: by its columns the bias of mean field, by its rows that of the gradient."""
    features, y = SHARP.draw()
    truth = SHARP.model.order_posterior(features, y)
    distances = [
        [total_variation(method(SHARP.model, features, y, conditional=c, num_steps=300), truth) for c in (True, False)]
        for method in (order_by_enumeration, order_by_straight_through)
    ]
    (enumerated, mean_field), (straight_through, autoguide) = distances
    assert enumerated <= 0.02  # .007
    assert straight_through <= 0.15  # .009
    assert mean_field > 0.25  # .33
    assert autoguide > 0.15  # .31


def test_a_high_temperature_biases_straight_through():
    data = DATA["order-5-uniform"]
    features, y = data.draw()
    law = order_by_straight_through(data.model, features, y, temperature=1.0, num_steps=300)
    assert total_variation(law, data.model.order_posterior(features, y)) > 0.15  # .18; .01 to .02 at .1


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
