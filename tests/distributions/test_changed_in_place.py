"""A law whose parameters are changed in place, as by the step of an optimiser, is of one mind: that of the new ones."""

import pytest
import torch
from torch.distributions import kl_divergence

from pyro_vnd.distributions import NestedNormal, OrderedMask, OrderedMaskStraightThrough
from pyro_vnd.distributions.weights import LogScaleNormal

STEP = torch.tensor([3.0, 0.0, -1.0], dtype=torch.float64)


def facts(law):
    """All that is known of a law, and draws of a seed."""
    torch.manual_seed(0)
    draws = law.sample((5,))
    masks = law.mask_law if isinstance(law, NestedNormal) else law
    known = [masks.probs, masks.logits, masks.keep_probs, masks.mean_length, masks.entropy()]
    known += [kl_divergence(masks, OrderedMask.uniform(3)), law.log_prob(draws), draws]
    return [fact.detach().clone() for fact in known]


LAWS = {
    "mask by logits": lambda x: OrderedMask(logits=x),
    "mask by probs": lambda x: OrderedMask(probs=x),
    "straight-through": lambda x: OrderedMaskStraightThrough(0.5, logits=x),
    "expanded": lambda x: OrderedMask(logits=x).expand((2,)),
    "nested": lambda x: NestedNormal(torch.zeros(3), torch.ones(3), x),
}


@pytest.mark.parametrize("make", LAWS.values(), ids=LAWS)
@pytest.mark.parametrize("needs_gradient", [False, True])
def test_draws_and_scores_are_of_the_new_values(make, needs_gradient):
    logits = torch.ones(3).requires_grad_(needs_gradient)
    law = make(logits)
    before = facts(law)
    with torch.no_grad():
        logits += STEP.abs()
    after, expected = facts(law), facts(make(logits.detach().clone()))
    for one, other in zip(after, expected, strict=True):
        torch.testing.assert_close(one, other)
    assert not torch.equal(before[0], after[0])  # power


def test_a_cut_law_follows_its_base():
    logits = torch.zeros(2, 3)
    law = OrderedMask(logits=logits).cut(torch.tensor([0, 2]))
    torch.testing.assert_close(law.probs[0], torch.full((3,), 1 / 3))
    logits += STEP
    torch.testing.assert_close(law.probs[0], STEP.softmax(-1))


def test_the_gradient_is_that_of_the_new_values():
    logits = torch.zeros(3, requires_grad=True)
    law = OrderedMask(logits=logits)
    law.mean_length.backward()
    with torch.no_grad():
        logits += STEP
    logits.grad = None
    law.mean_length.backward()
    fresh = logits.detach().clone().requires_grad_()
    OrderedMask(logits=fresh).mean_length.backward()
    torch.testing.assert_close(logits.grad, fresh.grad)


def test_weights_too():
    loc, log_scale = torch.zeros(3), torch.zeros(3)
    law = LogScaleNormal(loc, log_scale)
    assert torch.equal(law.scale, torch.ones(3))
    log_scale += 1
    loc += 2
    torch.testing.assert_close(law.scale, torch.ones(3).exp())
    torch.testing.assert_close(law.variance, (2 * torch.ones(3)).exp())
    assert law.mean.tolist() == [2.0, 2.0, 2.0]


def test_what_is_derived_is_computed_once():
    """Else each step would normalise again and again."""
    law = OrderedMask(logits=torch.zeros(3))
    assert law._log_probs is law._log_probs
    with torch.inference_mode():
        law = OrderedMask(logits=torch.zeros(3))
        assert law._log_probs is law._log_probs
