"""A Normal with a logarithmic scale, against torch's Normal."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from torch.distributions import Normal, kl_divergence

from pyro_vnd.distributions.weights import LogScaleNormal, fixed_normal

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


PRIORS = [(0.0, 1.0), (0.3, 0.7)]


def of_prior(parameters, numbers):
    loc, log_scale = parameters
    prior = fixed_normal(*numbers, loc)
    plain = kl_divergence(Normal(loc, log_scale.exp()), Normal(*numbers)).sum()
    return LogScaleNormal(loc, log_scale, prior=prior), plain


# What is computed beside the divergence, and by whose backward pass the gradient of both goes.
BESIDE = {
    "nothing": lambda law, weights: 0.0,
    "draw": lambda law, weights: (weights * law.rsample()).sum(),
    "mean": lambda law, weights: (weights * law.mean_and_variance[0]).sum(),
    "variance": lambda law, weights: (weights * law.mean_and_variance[1]).sum(),
    "mean and variance": lambda law, weights: (law.mean_and_variance[0] * law.mean_and_variance[1] * weights).sum(),
}


@pytest.mark.parametrize("counts_kl", [True, False])
@pytest.mark.parametrize("numbers", PRIORS)
@pytest.mark.parametrize("beside", BESIDE.values(), ids=BESIDE)
def test_values_and_gradients_of_what_is_computed_beside_the_divergence(beside, numbers, counts_kl, parameters):
    """They are those of a law without a prior, whose divergence is torch's."""
    weights = torch.randn(SHAPE)
    law, plain = of_prior(parameters, numbers)
    totals = []
    for q, kl in ((law, lambda: law.kl_from_prior), (LogScaleNormal(*parameters), lambda: plain)):
        torch.manual_seed(1)
        totals.append(beside(q, weights) + (kl() ** 2 if counts_kl else 0.0 * parameters[0].sum()))
    torch.testing.assert_close(totals[0], totals[1])
    found, expected = (
        torch.autograd.grad(total, parameters, allow_unused=True, materialize_grads=True) for total in totals
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("beside", list(BESIDE.values())[1:], ids=list(BESIDE)[1:])
def test_gradients_can_be_differentiated(beside, parameters):
    weights = torch.randn(SHAPE)

    def value(loc, log_scale):
        torch.manual_seed(1)
        law = LogScaleNormal(loc, log_scale, prior=fixed_normal(0.3, 0.7, loc))
        return beside(law, weights) * law.kl_from_prior

    assert torch.autograd.gradcheck(value, parameters)
    assert torch.autograd.gradgradcheck(value, parameters)


def test_a_draw_without_gradient_leaves_the_divergence_its_own(parameters):
    law, plain = of_prior(parameters, (0.3, 0.7))
    law.sample()
    found, expected = (torch.autograd.grad(kl, parameters) for kl in (law.kl_from_prior, plain))
    torch.testing.assert_close(found, expected)


def test_each_law_has_a_mean_of_its_own(parameters):
    """By which a handler knows to whom a mean belongs."""
    means = [
        LogScaleNormal(*parameters, prior=prior).mean_and_variance[0]
        for prior in (None, None, of_prior(parameters, (0, 1))[0].prior)
    ]
    assert len({id(mean) for mean in (*means, parameters[0])}) == 4


def test_one_law_of_numbers_for_each_type():
    one = fixed_normal(0.0, 0.5, torch.zeros(1, dtype=torch.float32))
    assert fixed_normal(0.0, 0.5, torch.ones(3, dtype=torch.float32)) is one
    assert one.scale.dtype == torch.float32
    assert fixed_normal(0.0, 0.5, torch.zeros(1, dtype=torch.float64)).scale.dtype == torch.float64
    assert one.expand((3,)).numbers is None


def test_a_law_of_numbers_first_made_in_inference_mode_trains(parameters):
    with torch.inference_mode():
        prior = fixed_normal(0.0, 0.123, parameters[0])
    kl_divergence(Normal(parameters[0], parameters[1].exp()), prior).sum().backward()
    assert parameters[0].grad.abs().min() > 0


def test_under_vmap(parameters):
    rows = torch.randn(5, *SHAPE)

    def total(log_scale):
        prior = fixed_normal(0.3, 0.7, log_scale)
        law = LogScaleNormal(parameters[0], log_scale, prior=prior, validate_args=False)
        return law.variance.square().sum() * law.kl_from_prior

    torch.testing.assert_close(torch.func.vmap(total)(rows), torch.stack([total(row) for row in rows]))
    slopes = torch.func.vmap(torch.func.grad(total))(rows)
    torch.testing.assert_close(slopes, torch.stack([torch.func.grad(total)(row) for row in rows]))


@pytest.mark.parametrize("log_scale", [-100.0, -20.0, 0.0, 40.0])
def test_extremes_are_finite_in_float32(log_scale):
    parameter = torch.full((4,), log_scale, dtype=torch.float32, requires_grad=True)
    loc = torch.zeros(4, dtype=torch.float32)
    law = LogScaleNormal(loc, parameter, prior=fixed_normal(0.0, 1.0, loc))
    kl = law.kl_from_prior
    kl.backward()
    variance = torch.exp(2 * torch.tensor(log_scale).double())
    torch.testing.assert_close(kl, (2 * variance - 4 * log_scale - 2).float())
    torch.testing.assert_close(parameter.grad, (variance - 1).float().expand(4))
