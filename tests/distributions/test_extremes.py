"""float32 at its ends: logits of +-100, a hundred thousand units, temperatures from .001 to 10."""

import pytest
import torch
from cases import LENGTH_CASES, each
from torch.distributions import kl_divergence

from pyro_vnd.distributions import NestedAutoregressive, OrderedMask

PATTERNS = {
    "all high": lambda k: torch.full((k,), 100.0),
    "all low": lambda k: torch.full((k,), -100.0),
    "first high": lambda k: torch.cat([torch.tensor([100.0]), torch.full((k - 1,), -100.0)]),
    "last high": lambda k: torch.cat([torch.full((k - 1,), -100.0), torch.tensor([100.0])]),
    "middle high": lambda k: torch.where(torch.arange(k) == k // 2, 100.0, -100.0),
    "alternating": lambda k: 200.0 * (torch.arange(k) % 2) - 100,
    "rising": lambda k: torch.linspace(-100, 100, k),
    "falling": lambda k: torch.linspace(100, -100, k),
    "signs": lambda k: 200.0 * torch.randint(2, (k,)) - 100,
}
# A conditioner is not called for each of a hundred thousand coordinates here.
DRAWS = [case for case in LENGTH_CASES if case.reparameterised and case.cls is not NestedAutoregressive]
each_pattern = pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
each_size = pytest.mark.parametrize("num_units", [1, 2, 7, 100_000])


def logits_of(pattern, num_units):
    return pattern(num_units).to(torch.float32).requires_grad_()


@each_pattern
@each_size
@pytest.mark.parametrize("temperature", [1e-3, 0.2, 10.0])
@each(DRAWS)
def test_draws_and_gradients_are_finite(case, temperature, num_units, pattern):
    logits = logits_of(pattern, num_units)
    temperature = torch.tensor(temperature, dtype=torch.float32, requires_grad=True)
    law = case.with_lengths(logits=logits, temperature=temperature, dtype=torch.float32)
    value = law.rsample((3,))
    if case.hard:
        assert torch.equal(value, (value > 0.5).float())  # exactly zeros and ones
    assert law.support.check(value).all()
    log_prob = law.log_prob(value)
    assert torch.isfinite(log_prob).all()
    ((value * torch.randn(num_units).float()).sum() + log_prob.sum()).backward()
    assert torch.isfinite(logits.grad).all()
    assert torch.isfinite(temperature.grad)


@each_pattern
@each_size
def test_functions_of_the_law_are_finite(num_units, pattern):
    logits = logits_of(pattern, num_units)
    law, prior = OrderedMask(logits=logits), OrderedMask.geometric(torch.tensor(0.9).float(), num_units)
    results = [law.keep_probs, law.variance, law.entropy(), kl_divergence(law, prior), kl_divergence(prior, law)]
    assert all(torch.isfinite(x).all() for x in results)
    assert ((law.keep_probs >= 0) & (law.keep_probs <= 1)).all()
    sum(x.sum() for x in results[:4]).backward()
    assert torch.isfinite(logits.grad).all()


@each_pattern
def test_values_against_float64(pattern):
    logits = pattern(1000)
    single, double = (OrderedMask(logits=logits.to(dtype)) for dtype in (torch.float32, torch.float64))
    for name in ("keep_probs", "variance", "mean_length", "logits"):
        torch.testing.assert_close(getattr(single, name).double(), getattr(double, name), rtol=1e-4, atol=1e-30)
    torch.testing.assert_close(single.entropy().double(), double.entropy(), rtol=1e-4, atol=1e-6)


def test_keep_probs_near_one_and_zero_have_a_gradient():
    """1 - S is 1e-26 here: a difference would round to zero, and the way back would be lost."""
    logits = torch.tensor([-30.0, 30.0, -30.0], dtype=torch.float32, requires_grad=True)
    OrderedMask(logits=logits).variance[1:].sum().log().backward()
    # S_2 (1 - S_2) = p_1 and S_3 = p_3, nearly: d log(p_1 + p_3) is (1/2, -1, 1/2).
    torch.testing.assert_close(logits.grad, torch.tensor([0.5, -1.0, 0.5], dtype=torch.float32))
