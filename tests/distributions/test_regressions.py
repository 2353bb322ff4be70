"""Corners that once were wrong, one function each."""

import copy

import pytest
import torch
from torch import nn
from torch.func import vmap

from pyro_vnd.distributions import (
    NestedNormal,
    OrderedMask,
    OrderedMaskStraightThrough,
    RelaxedOrderedMask,
    ordered_mask,
)


def test_vmap_over_the_temperature_alone():
    def draw(t):
        return OrderedMaskStraightThrough(t, logits=torch.zeros(4), validate_args=False).rsample()

    masks = vmap(draw, randomness="same")(torch.rand(5) + 0.1)
    assert masks.shape == (5, 4)


def test_vmap_of_gumbel_with_different_noise():
    def draw(x):
        return OrderedMaskStraightThrough(0.2, logits=x, noise="gumbel", validate_args=False).rsample()

    assert vmap(draw, randomness="different")(torch.zeros(5, 4)).shape == (5, 4)


@pytest.mark.parametrize("shape", [(), (2,), (4,)])
def test_expand_to_a_shape_that_does_not_fit(shape):
    with pytest.raises((RuntimeError, ValueError)):
        OrderedMask(logits=torch.zeros(3, 4)).expand(shape)


def test_temperature_gradient_of_gumbel_with_a_zero_probability():
    t = torch.tensor(0.5, requires_grad=True)
    law = OrderedMaskStraightThrough(t, probs=torch.tensor([0.0, 0.5, 0.5]), noise="gumbel")
    (law.rsample((10,)) * torch.randn(10, 3)).sum().backward()
    assert torch.isfinite(t.grad)


@pytest.mark.parametrize(
    "law",
    [
        lambda: NestedNormal(torch.zeros(4), torch.ones(4), torch.zeros(4)),
        lambda: RelaxedOrderedMask(0.5, logits=torch.zeros(4)),
    ],
)
def test_a_draw_changed_in_place_is_scored_as_it_is(law):
    law = law()
    value = law.sample((20,))
    value[:, 2:] = 0
    torch.testing.assert_close(law.log_prob(value), law.log_prob(value.clone()))


def test_relaxed_masks_of_many_units_are_in_the_support():
    value = RelaxedOrderedMask(0.5, logits=torch.zeros(100_000, dtype=torch.float32)).sample((20,))
    assert ordered_mask.check(value).all()


def test_relaxed_density_of_spread_logits_in_float32():
    value = torch.tensor([1.0, 0.3])
    densities = [
        RelaxedOrderedMask(0.5, logits=torch.tensor([0.0, 200.0], dtype=t)).log_prob(value.to(t)).double()
        for t in (torch.float32, torch.float64)
    ]
    torch.testing.assert_close(*densities, rtol=1e-4, atol=1e-4)  # -86.9 and -199.6


@pytest.mark.parametrize("a", [torch.tensor([0.0, float("nan")]), torch.zeros(3, dtype=torch.int64)])
def test_chain_logits_are_named(a):
    with pytest.raises(ValueError, match="chain_logits"):
        OrderedMask.from_chain_logits(a)


def test_deepcopy_of_a_nested_normal_with_parameters():  # torch's Normal can be copied
    copy.deepcopy(NestedNormal(nn.Parameter(torch.zeros(3)), nn.Parameter(torch.ones(3)), torch.zeros(3)))


def test_stddev_length_of_one_unit_has_a_finite_gradient():
    logits = torch.zeros(1, requires_grad=True)
    OrderedMask(logits=logits).stddev_length.backward()
    assert torch.isfinite(logits.grad).all()


def test_boolean_masks():  # pass validation, then "Subtraction ... with two bool tensors"
    OrderedMask(logits=torch.zeros(3)).log_prob(torch.tensor([True, False, False]))


def test_large_weights():  # their float32 sum overflows: probs are all zero, log_prob all -inf, silently
    assert OrderedMask(probs=torch.full((4,), 1e38, dtype=torch.float32)).probs.sum() > 0.99
