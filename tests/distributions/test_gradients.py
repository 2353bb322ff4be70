"""Exact gradients against finite differences, in float64."""

import pytest
import torch
from cases import HARD_CASES, each
from torch.autograd import gradcheck
from torch.distributions import kl_divergence

from pyro_vnd.distributions import NestedNormal, OrderedMask, OrderedMaskStraightThrough, RelaxedOrderedMask

MASKS = torch.ones(4, 4).tril()


def fixed_noise(function, seed=1):
    """The function of a draw, with the same random numbers at each call."""

    def run(*args):
        torch.manual_seed(seed)
        return function(*args)

    return run


FUNCTIONS = {
    "log_prob": lambda law: law.log_prob(MASKS.double()[:, None]),
    "entropy": lambda law: law.entropy(),
    "keep_probs": lambda law: law.keep_probs,
    "variance": lambda law: law.variance,
    "covariance": lambda law: law.covariance_matrix,
    "mean_length": lambda law: law.mean_length,
    "stddev_length": lambda law: law.stddev_length,
    "kl from it": lambda law: kl_divergence(law, OrderedMask.geometric(0.6, 4)),
    "kl to it": lambda law: kl_divergence(OrderedMask.geometric(0.6, 4), law),
}


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
@each(HARD_CASES)
@pytest.mark.parametrize("parameter", ["logits", "probs"])
def test_functions_of_the_law(case, parameter, function):
    value = (torch.rand(2, 4) + 0.2).requires_grad_()
    assert gradcheck(lambda x: function(case.with_lengths(**{parameter: x})), value)


@pytest.mark.parametrize("parameter", ["logits", "probs"])
def test_relaxed_draws(parameter):
    value, temperature = (torch.rand(3, 4) + 0.2).requires_grad_(), (torch.rand(3) + 0.3).requires_grad_()
    draw = fixed_noise(lambda x, t: RelaxedOrderedMask(t, **{parameter: x}).rsample((2,)))
    assert gradcheck(draw, (value, temperature))


@pytest.mark.parametrize("parameter", ["logits", "probs"])
def test_relaxed_density(parameter):
    """With respect to the law, the temperature and the value; the value's last K - 1 entries are free."""
    value, temperature = (torch.rand(3, 4) + 0.2).requires_grad_(), (torch.rand(3) + 0.3).requires_grad_()
    tail = torch.tensor([[0.8, 0.5, 0.1], [0.9, 0.2, 0.05], [0.6, 0.55, 0.3]], requires_grad=True)

    def density(x, t, z):
        return RelaxedOrderedMask(t, **{parameter: x}).log_prob(torch.cat([torch.ones(3, 1), z], -1))

    assert gradcheck(density, (value, temperature, tail))


def test_relaxed_density_along_its_own_draws():
    """What a draw remembers carries the same gradient as the draw: the pathwise derivative of log q(z)."""
    temperature = torch.tensor(0.5, requires_grad=True)
    logits = torch.randn(3, 4, requires_grad=True)

    def density(x, t, copy):
        law = RelaxedOrderedMask(t, logits=x)
        value = law.rsample((5,))
        return law.log_prob(value.clone() if copy else value)

    assert gradcheck(fixed_noise(lambda x, t: density(x, t, False)), (logits, temperature))
    gradients = [
        torch.autograd.grad(fixed_noise(density)(logits, temperature, copy).sum(), (logits, temperature))
        for copy in (False, True)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-8)


def test_nested_normal_density_and_divergence():
    arguments = [torch.randn(2, 4), torch.rand(2, 4) + 0.5, torch.randn(2, 4)]
    arguments = [x.requires_grad_() for x in arguments]
    value = NestedNormal(*arguments).sample((3,))
    prior = NestedNormal(torch.zeros(4), torch.ones(4), torch.zeros(4))
    assert gradcheck(lambda *args: NestedNormal(*args).log_prob(value), arguments)
    assert gradcheck(lambda *args: kl_divergence(NestedNormal(*args), prior), arguments)
    assert gradcheck(lambda *args: NestedNormal(*args).entropy(), arguments)
    assert gradcheck(lambda *args: NestedNormal(*args).variance, arguments)


@pytest.mark.parametrize("noise", ["logistic", "gumbel"])
def test_nested_normal_draws_in_loc_and_scale(noise):
    """The mask does not depend on loc and scale, so this part is exact, zeros included."""
    loc, scale, logits = torch.randn(2, 4), torch.rand(2, 4) + 0.5, torch.zeros(2, 4)
    draw = fixed_noise(lambda m, s: NestedNormal(m, s, logits, noise=noise).rsample((3,)))
    assert gradcheck(draw, (loc.requires_grad_(), scale.requires_grad_()))


@pytest.mark.parametrize("temperature", [0.3, 2.0])
def test_gumbel_masks_have_the_gradient_of_relaxed_ones(temperature):
    """Same noise, hard forwards; the relaxed mask is checked against finite differences above."""
    weight = torch.randn(5, 3, 4)

    def gradient(law_of):
        logits, t = torch.arange(12.0).reshape(3, 4).sin().requires_grad_(), torch.tensor(temperature).requires_grad_()
        value = fixed_noise(lambda: law_of(t, logits).rsample((5,)))()
        return torch.autograd.grad((value * weight).sum(), (logits, t))

    hard = gradient(lambda t, x: OrderedMaskStraightThrough(t, logits=x, noise="gumbel"))
    soft = gradient(lambda t, x: RelaxedOrderedMask(t, logits=x))
    torch.testing.assert_close(hard, soft)


def test_log_prob_passes_a_gradient_to_the_mask():
    """log P is linear in the mask, so its gradient there is a difference of log-probabilities."""
    law = OrderedMask(logits=torch.randn(4))
    mask = torch.tensor([1.0, 1.0, 0.0, 0.0], requires_grad=True)
    (gradient,) = torch.autograd.grad(law.log_prob(mask), mask)
    expected = law.logits.clone()
    expected[1:] -= law.logits[:-1]
    torch.testing.assert_close(gradient, expected)
