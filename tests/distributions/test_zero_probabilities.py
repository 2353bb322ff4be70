"""Lengths of probability zero: -inf where they are scored, no NaN in any gradient elsewhere."""

import oracles
import pytest
import torch
from cases import LENGTH_CASES, each

from pyro_vnd.distributions import OrderedMask, RelaxedOrderedMask

LAWS = [case for case in LENGTH_CASES if case.moments and case.reparameterised]
ZEROS = [[0.0, 0.5, 0.5], [0.4, 0.0, 0.0, 0.6], [0.7, 0.3, 0.0], [0.0, 1.0, 0.0], [1.0, 0.0]]
FUNCTIONS = {
    "log_prob": lambda law: law.log_prob(law.sample((20,))).sum(),
    "entropy": lambda law: law.entropy(),
    "keep_probs": lambda law: (law.keep_probs**2).sum(),
    "variance": lambda law: law.variance.sum(),
    "rsample": lambda law: (law.rsample((50,)) * torch.randn(50, law.num_units)).sum(),
}


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
@each(LAWS)
@pytest.mark.parametrize("probs", ZEROS)
def test_gradients_are_finite(probs, case, function):
    probs = torch.tensor(probs, requires_grad=True)
    function(case.with_lengths(probs=probs)).backward()
    assert torch.isfinite(probs.grad).all()


def test_impossible_mask_has_no_gradient_but_its_neighbours_do():
    def gradient(masks):
        probs = torch.tensor([0.25, 0.0, 0.75], requires_grad=True)
        log_prob = OrderedMask(probs=probs).log_prob(oracles.all_masks(3)[masks])
        log_prob.sum().backward()
        return log_prob.tolist(), probs.grad

    assert gradient([1])[0] == [-torch.inf]
    assert torch.equal(gradient([1])[1], torch.zeros(3))
    torch.testing.assert_close(gradient([0, 1])[1], gradient([0])[1])
    # d log(p_1 / sum p) by each weight.
    torch.testing.assert_close(gradient([0])[1], torch.tensor([3.0, -1.0, -1.0]))


@pytest.mark.parametrize("probs", ZEROS)
def test_relaxed_gradients_are_finite(probs):
    probs = torch.tensor(probs, requires_grad=True)
    law = RelaxedOrderedMask(0.5, probs=probs)
    value = law.rsample((20,))
    (law.log_prob(value).sum() + (value * torch.randn(len(probs))).sum()).backward()
    assert torch.isfinite(probs.grad).all()
    assert probs.grad.abs().sum() > 0
