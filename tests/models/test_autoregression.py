"""The autoregression finds the order of a series; with known noise the law of the order has a formula."""

import pytest
import torch
from pyro import poutine
from pyro.distributions import MultivariateNormal
from torch import Tensor

from models.autoregression import Autoregression, lags
from pyro_vnd.infer import AutoNested, fit

K = 10
SERIES = {2: [0.6, -0.4], 3: [0.5, -0.3, 0.35]}


def series(coefficients: list[float], seed: int) -> Tensor:
    """400 values of an autoregression with noise of variance one, after 100 to forget the start."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randn(500, generator=generator, dtype=torch.float64)
    for t in range(len(coefficients), 500):
        y[t] += sum(a * y[t - i] for i, a in enumerate(coefficients, 1))
    return y[100:]


def exact_law(model: Autoregression, y: Tensor) -> Tensor:
    """P(L | y): the values are jointly Normal given the order, and given the lags as if these were constants."""
    past, evidence = lags(y, K), []
    for k in range(1, K + 1):
        covariance = model.coefficient_scale**2 * past[:, :k] @ past[:, :k].T + model.noise**2 * torch.eye(len(past))
        evidence.append(MultivariateNormal(torch.zeros(len(past)), covariance).log_prob(y[K:]))
    return (model.prior.logits + torch.stack(evidence)).softmax(-1)


def learned(model: Autoregression, y: Tensor, **kwargs) -> AutoNested:
    guide = AutoNested(model, **kwargs)
    fit(model, guide, y, progress=False)
    return guide


def total_variation(p: Tensor, q: Tensor) -> float:
    return (0.5 * (p - q).abs().sum()).item()


@pytest.mark.parametrize("order", SERIES)
def test_known_noise(order: int):
    """The order is right, and the law is the exact one: over three seeds of both series the TV is below .0003."""
    model = Autoregression(K, noise=1.0)
    exact = {other: exact_law(model, series(coefficients, seed=0)) for other, coefficients in SERIES.items()}
    law = learned(model, series(SERIES[order], seed=0)).laws["mask"]
    assert law.mode.sum() == exact[order].argmax() + 1 == order
    assert total_variation(law.probs, exact[order]) < 0.01
    # Power: the prior, and the answer to the other series.
    assert total_variation(model.prior.probs, exact[order]) > 0.5
    assert total_variation(law.probs, exact[5 - order]) > 0.5


@pytest.mark.filterwarnings("ignore:k-hat of the guide")
def test_mean_field_has_another_law():
    """Power: coefficients that do not know the order are what the bar above would catch."""
    y, model = series(SERIES[2], seed=0), Autoregression(K, noise=1.0)
    law = learned(model, y, latents="mean_field").laws["mask"]
    assert total_variation(law.probs, exact_law(model, y)) > 0.1


@pytest.mark.parametrize("order", SERIES)
def test_latent_noise(order: int):
    guide = learned(Autoregression(K), series(SERIES[order], seed=1))
    median = guide.median()
    assert guide.laws["mask"].mode.sum() == order
    assert median["noise"] == pytest.approx(1, abs=0.1)
    torch.testing.assert_close(median["coefficients"][:order], torch.tensor(SERIES[order]), atol=0.15, rtol=0)


def test_the_mean_is_made_of_the_kept_lags():
    y = series(SERIES[2], seed=0)[:30]
    values = {"mask": torch.tensor([1.0, 1.0, 0.0]), "coefficients": torch.tensor([0.5, -2.0, 7.0])}
    site = poutine.trace(poutine.condition(Autoregression(3, noise=0.3), values)).get_trace(y).nodes["y"]
    torch.testing.assert_close(site["fn"].mean, 0.5 * y[2:-1] - 2 * y[1:-2])
    assert torch.equal(site["value"], y[3:])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Autoregression(0), "`num_units` must be an integer >= 1; got 0"),
        (lambda: Autoregression(3, keep=1.0), "`p` must be strictly between 0 and 1"),
        (lambda: Autoregression(3, noise=-1.0), "`noise` must be finite and > 0; got -1.0"),
        (lambda: Autoregression(3, coefficient_scale=0.0), "`coefficient_scale` must be finite and > 0; got 0.0"),
        (lambda: Autoregression(3)(torch.zeros(3)), r"series of shape \(T,\) with T > 3; got \(3,\)"),
        (lambda: Autoregression(3)(torch.zeros(9, 1)), r"got \(9, 1\)"),
        (lambda: Autoregression(3)(torch.full((9,), torch.nan)), r"got \(9,\) with NaN or inf"),
    ],
)
def test_bad_input(call, message: str):
    with pytest.raises(ValueError, match=message):
        call()
