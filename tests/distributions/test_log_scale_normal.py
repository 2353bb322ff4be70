"""A Normal with a logarithmic scale, against torch's Normal."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from torch.distributions import Normal, kl_divergence

from pyro_vnd.distributions.weights import LogScaleNormal

SHAPE = (3, 4)


@pytest.fixture
def parameters():
    torch.manual_seed(0)
    return torch.randn(SHAPE, requires_grad=True), torch.randn(SHAPE, requires_grad=True)


@pytest.fixture
def pair(parameters):
    loc, log_scale = parameters
    return LogScaleNormal(loc, log_scale), Normal(loc, log_scale.exp())


def test_it_is_a_normal(pair):
    ours, theirs = pair
    x, prior = torch.randn(5, *SHAPE), Normal(0.3, 0.7)
    assert isinstance(ours, Normal)
    for name in ("mean", "mode", "stddev", "scale", "variance"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name))
    for of in (lambda q: q.log_prob(x), lambda q: q.cdf(x), lambda q: q.icdf(x.sigmoid()), lambda q: q.entropy()):
        torch.testing.assert_close(of(ours), of(theirs))
    torch.testing.assert_close(kl_divergence(ours, prior), kl_divergence(theirs, prior))
    torch.testing.assert_close(kl_divergence(prior, ours), kl_divergence(prior, theirs))


def test_draws_have_the_law(pair):
    ours, theirs = pair
    draws = (ours.rsample((2000,)) - theirs.loc) / theirs.scale
    assert draws.requires_grad
    assert stats.kstest(draws.detach().flatten().numpy(), "norm").pvalue > 1e-3
    assert stats.kstest(1.05 * draws.detach().flatten().numpy(), "norm").pvalue < 1e-4  # 5 % off is noticed


def test_expand_and_broadcasting():
    law = LogScaleNormal(torch.zeros(4), torch.tensor(-1.0), validate_args=True)
    wide = law.expand((3, 4))
    assert type(wide) is LogScaleNormal
    assert wide.batch_shape == (3, 4)
    assert wide.log_prob(torch.ones(3, 4)).shape == (3, 4)
    torch.testing.assert_close(wide.variance, torch.full((3, 4), -2.0).exp())
    with pytest.raises(ValueError, match="within the support"):
        wide.log_prob(torch.full((3, 4), torch.nan))
    with pytest.raises(ValueError, match=r"must broadcast; got shapes \(4,\) and \(3,\)"):
        LogScaleNormal(torch.zeros(4), torch.zeros(3))
    with pytest.raises(ValueError, match="log_scale"):
        LogScaleNormal(torch.zeros(4), torch.tensor(torch.nan), validate_args=True)


def test_as_a_site_of_a_model():
    def model():
        with pyro.plate("rows", 3):
            return pyro.sample("x", LogScaleNormal(torch.zeros(3, 4), torch.tensor(-1.0)).to_event(1))

    trace = pyro.poutine.trace(model).get_trace()
    expected = dist.Normal(torch.zeros(3, 4), torch.tensor(-1.0).exp()).log_prob(trace.nodes["x"]["value"]).sum()
    torch.testing.assert_close(trace.log_prob_sum(), expected)


# The variance and the sums have a backward pass of their own, whichever of them is used.
PARTS = {
    "variance": lambda parts, w: (w * parts[0]).sum(),
    "sum of variances": lambda parts, w: parts[1].square(),
    "sum of logarithms": lambda parts, w: parts[2].square(),
    "variance and sum": lambda parts, w: (w * parts[0]).sum() * parts[1],
    "variance and logarithms": lambda parts, w: (w * parts[0]).sum() * parts[2],
    "sums": lambda parts, w: parts[1] * parts[2],
    "all": lambda parts, w: (w * parts[0]).sum() * parts[1] * parts[2],
}


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_gradients_of_variance_and_sums(part, parameters):
    weights = torch.randn(SHAPE)

    def value(log_scale):
        return part(LogScaleNormal(parameters[0], log_scale).variance_and_sums, weights)

    log_scale = parameters[1]
    by_torch = part(((2 * log_scale).exp(), (2 * log_scale).exp().sum(), log_scale.sum()), weights)
    torch.testing.assert_close(value(log_scale), by_torch)
    assert torch.autograd.gradcheck(value, (log_scale,))
    assert torch.autograd.gradgradcheck(value, (log_scale,))


def test_under_vmap(parameters):
    rows = torch.randn(5, *SHAPE)

    def total(log_scale):
        variance, variances, logs = LogScaleNormal(parameters[0], log_scale, validate_args=False).variance_and_sums
        return (variance.square().sum() + variances) * logs

    torch.testing.assert_close(torch.func.vmap(total)(rows), torch.stack([total(row) for row in rows]))
    slopes = torch.func.vmap(torch.func.grad(total))(rows)
    torch.testing.assert_close(slopes, torch.stack([torch.func.grad(total)(row) for row in rows]))


@pytest.mark.parametrize("log_scale", [-100.0, -20.0, 0.0, 40.0])
def test_extremes_are_finite_in_float32(log_scale):
    parameter = torch.full((4,), log_scale, dtype=torch.float32, requires_grad=True)
    variance, variances, logs = LogScaleNormal(torch.zeros(4), parameter).variance_and_sums
    (variance.sum() + variances - logs).backward()
    assert torch.isfinite(variance).all()
    assert logs.item() == pytest.approx(4 * log_scale)
    expected = 4 * torch.exp(2 * torch.tensor(log_scale).double()).float() - 1
    torch.testing.assert_close(parameter.grad, expected.expand(4))
