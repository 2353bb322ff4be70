"""`torch.func` over draws of the straight-through class.

Argument validation is off: vmap allows no branches on values.
"""

import oracles
import pytest
import torch
from torch.func import functional_call, grad, jacrev, vmap

from pyro_vnd.distributions import OrderedMask, OrderedMaskStraightThrough


def draw(logits, temperature=0.2, sample_shape=(), **options):
    law = OrderedMaskStraightThrough(temperature, logits=logits, validate_args=False, **options)
    return law.rsample(sample_shape)


def test_different_noise_for_each_row_follows_the_law():
    logits = torch.tensor([0.5, -1.0, 1.0, 0.0])
    masks = vmap(draw, randomness="different")(logits.expand(20_000, 4))
    assert oracles.law_pvalue(masks, logits.softmax(-1)) > 1e-3
    shifted = logits.softmax(-1) + torch.tensor([0.02, -0.02, 0.0, 0.0])
    assert oracles.law_pvalue(masks, shifted) < 1e-6


@pytest.mark.parametrize("noise", ["logistic", "gumbel"])
def test_same_noise_for_each_row(noise):
    masks = vmap(lambda x: draw(x, noise=noise), randomness="same")(torch.zeros(50, 16))
    assert len(masks.unique(dim=0)) == 1


def test_vmap_over_nothing_but_randomness():
    logits = torch.tensor([0.5, -1.0, 1.0, 0.0])
    law = OrderedMaskStraightThrough(0.2, logits=logits, validate_args=False)
    masks = vmap(lambda _: law.rsample(), randomness="different")(torch.arange(20_000))
    assert oracles.law_pvalue(masks, logits.softmax(-1)) > 1e-3
    # The law still works outside.
    assert oracles.law_pvalue(law.rsample((20_000,)), logits.softmax(-1)) > 1e-3


@pytest.mark.parametrize("sample_shape", [(), (3,)])
@pytest.mark.parametrize("parameter", ["logits", "probs"])
def test_gradients_under_vmap(sample_shape, parameter):
    """With a tensor temperature; a row of equal weights has the gradient of a plain batch with the same noise."""
    weight = torch.arange(4.0)

    def objective(value, temperature):
        law = OrderedMaskStraightThrough(temperature, validate_args=False, **{parameter: value})
        return (law.rsample(sample_shape) * weight).sum()

    values, temperature = torch.rand(5, 4) + 0.1, torch.rand(5) + 0.2
    torch.manual_seed(1)
    actual = vmap(grad(objective, argnums=(0, 1)), randomness="same")(values, temperature)
    for row in range(5):
        torch.manual_seed(1)
        leaves = values[row].clone().requires_grad_(), temperature[row].clone().requires_grad_()
        expected = torch.autograd.grad(objective(*leaves), leaves)
        torch.testing.assert_close(tuple(x[row] for x in actual), expected)
        assert all((x != 0).any() for x in expected)


def test_jacobian():
    """Row i is the gradient of mask entry i; the first unit is always kept."""
    logits = torch.randn(4)
    torch.manual_seed(1)
    jacobian = jacrev(draw)(logits)
    assert torch.equal(jacobian[0], torch.zeros(4))
    for i in range(1, 4):
        torch.manual_seed(1)
        leaf = logits.clone().requires_grad_()
        torch.testing.assert_close(jacobian[i], torch.autograd.grad(draw(leaf)[i], leaf)[0])


def test_stacked_networks():
    """Masks within functional calls over stacked weights, as an ensemble is evaluated."""
    net = torch.nn.Linear(6, 2)
    stacked = {name: torch.randn(9, *x.shape) for name, x in net.named_parameters()}
    x, logits = torch.randn(3, 6), torch.zeros(9, 6)

    def output(weights, row):
        return functional_call(net, weights, (x * draw(row, sample_shape=(3,)),))

    assert vmap(output, randomness="different")(stacked, logits).shape == (9, 3, 2)


def test_log_prob_under_vmap():
    logits, masks = torch.randn(5, 4), OrderedMask.uniform(4).sample((5,))
    actual = vmap(lambda row, z: OrderedMask(logits=row, validate_args=False).log_prob(z))(logits, masks)
    torch.testing.assert_close(actual, OrderedMask(logits=logits).log_prob(masks))
