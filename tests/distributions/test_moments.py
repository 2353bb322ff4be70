"""Moments, entropy and constructors against sums over every length."""

import math

import numpy as np
import oracles
import pytest
import torch
from cases import HARD_CASES, LENGTH_CASES, MASK_CASES, each
from torch import Tensor

from pyro_vnd.distributions import OrderedMask, OrderedMaskStraightThrough

PARAMETERS = {
    "one unit": {"logits": [0.7]},
    "mixed": {"logits": [0.5, -1.0, 2.0, 0.0, 0.3]},
    "steep": {"logits": [30.0, 0.0, -30.0]},
    "weights": {"probs": [2.0, 1.0, 4.0, 1.0]},
    "zeros": {"probs": [0.0, 0.5, 0.0, 0.3, 0.2, 0.0]},
    "certain": {"probs": [0.0, 0.0, 1.0]},
}
each_law = pytest.mark.parametrize("parameter", PARAMETERS.values(), ids=PARAMETERS)


def tensors(parameter: dict[str, list[float]]) -> tuple[dict[str, Tensor], Tensor]:
    """Arguments of a law, and its normalised probabilities."""
    ((name, values),) = parameter.items()
    value = torch.tensor(values)
    return {name: value}, (value / value.sum() if name == "probs" else value.softmax(-1))


@each(LENGTH_CASES)
@each_law
def test_law_of_the_length(case, parameter):
    arguments, probs = tensors(parameter)
    law = case.with_lengths(**arguments)
    lengths = law if case in MASK_CASES else law.mask_law
    torch.testing.assert_close(lengths.probs, probs)
    torch.testing.assert_close(lengths.logits, probs.log())
    assert torch.equal(law.length_probs, lengths.probs)
    torch.testing.assert_close(law.keep_probs, oracles.mean(probs))
    mean, stddev = oracles.length_moments(probs)
    assert law.mean_length.item() == pytest.approx(mean)
    assert lengths.stddev_length.item() == pytest.approx(stddev, abs=1e-6)


@each(HARD_CASES)
@each_law
def test_moments_of_the_mask(case, parameter):
    arguments, probs = tensors(parameter)
    law = case.with_lengths(**arguments)
    torch.testing.assert_close(law.mean, oracles.mean(probs))
    torch.testing.assert_close(law.covariance_matrix, oracles.covariance(probs))
    torch.testing.assert_close(law.variance, oracles.covariance(probs).diagonal())
    assert law.entropy().item() == pytest.approx(oracles.entropy(probs))
    assert torch.equal(law.mode, oracles.all_masks(len(probs))[probs.argmax()])


@each(HARD_CASES)
@each_law
def test_log_prob_of_every_mask(case, parameter):
    arguments, probs = tensors(parameter)
    law = case.with_lengths(**arguments)
    masks = oracles.all_masks(len(probs))
    if law.has_enumerate_support:
        assert torch.equal(law.enumerate_support(), masks)
    torch.testing.assert_close(law.log_prob(masks), probs.log())  # log 0 = -inf among them


def test_variance_near_one_and_zero_does_not_cancel():
    """S (1 - S) by subtraction would be 0 in float32."""
    law = OrderedMask(logits=torch.tensor([-40.0, 0.0, -40.0], dtype=torch.float32))
    expected = torch.tensor([0.0, math.exp(-40), math.exp(-40)])
    torch.testing.assert_close(law.variance.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("chain", [[], [0.0], [1.0, -2.0, 0.5], [3.0] * 20])
@each(MASK_CASES)
def test_chain_logits(case, chain):
    chain = torch.tensor(chain)
    law = case.cls.from_chain_logits(chain, **(case.options | dict.fromkeys(case.batch, 0.5)))
    assert type(law) is case.cls
    torch.testing.assert_close(law.probs, oracles.chain_probs(chain))
    # Each keep probability is the product of the steps taken.
    torch.testing.assert_close(law.keep_probs[1:], chain.sigmoid().cumprod(-1))


def test_chain_logits_of_a_batch():
    chain = torch.randn(2, 3, 4)
    law = OrderedMask.from_chain_logits(chain)
    assert law.batch_shape == (2, 3)
    assert law.num_units == 5
    torch.testing.assert_close(law.probs[1, 2], oracles.chain_probs(chain[1, 2]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_chain_logits_of_half_precision_are_added_in_float32(dtype):
    chain = torch.full((300,), 6.0, dtype=dtype)  # log beta = -.00248, to 5 % in 8 bits
    law = OrderedMask.from_chain_logits(chain)
    assert law.probs.dtype == torch.float32
    torch.testing.assert_close(law.probs.double(), oracles.chain_probs(chain.double()), rtol=1e-4, atol=0)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("num_units", [1, 2, 7])
def test_geometric(p, num_units):
    law = OrderedMask.geometric(p, num_units)
    torch.testing.assert_close(law.probs, oracles.chain_probs(torch.full((num_units - 1,), p).logit()))
    ratio = law.probs[1:-1] / law.probs[: max(0, num_units - 2)]
    torch.testing.assert_close(ratio, torch.full_like(ratio, p))


def test_a_number_is_not_rounded_before_its_logit_is_taken():
    p, num_units = 0.999999, 10**5
    torch.set_default_dtype(torch.float32)
    law, closer = OrderedMask.geometric(p, num_units), OrderedMask.geometric(1 - 1e-9, 10)
    assert law.probs.dtype == torch.float32
    # The probability that a long mask stops early is all in the digits of 1 - p.
    assert (1 - law.keep_probs[50_000]).item() == pytest.approx(1 - p**50_000, rel=1e-4)
    assert closer.probs[0].item() == pytest.approx(1e-9, rel=1e-3)


def test_numbers_of_numpy():
    law = OrderedMask.geometric(np.float32(0.5), np.int64(3))
    torch.testing.assert_close(law.probs, torch.tensor([0.5, 0.25, 0.25]))
    assert OrderedMask.uniform(np.int32(3)).num_units == 3


def test_geometric_of_a_batch_of_probabilities():
    law = OrderedMaskStraightThrough.geometric(torch.tensor([[0.2, 0.5]]), 3, temperature=0.3, noise="gumbel")
    assert law.batch_shape == (1, 2)
    assert law.noise == "gumbel"
    torch.testing.assert_close(law.keep_probs[0], torch.tensor([[1.0, 0.2, 0.04], [1.0, 0.5, 0.25]]))


def test_uniform():
    law = OrderedMask.uniform(5, dtype=torch.float32)
    assert law.keep_probs.dtype == torch.float32
    torch.testing.assert_close(law.probs, torch.full((5,), 0.2, dtype=torch.float32))
