"""The law of hard masks is the one asked for, whatever the noise and the temperature.

p-values are of Pearson's chi-square test on the histogram of lengths. A right law gives one below 1e-3 in one of a
thousand tests; the seed is fixed.
"""

import oracles
import pytest
import torch
from cases import LENGTH_CASES

from pyro_vnd.distributions import NestedAutoregressive, OrderedMaskStraightThrough, RelaxedOrderedMask
from pyro_vnd.distributions._fast.masks import hard_mask

DRAWS = 100_000

LOGITS = {
    "one unit": [0.3],
    "even": [0.0] * 4,
    "shifted": [1000.0, 1000.5, 999.0],
    "falling": [2.0, 1.0, 0.0, -1.0, -2.0],
    "rare ends": [-6.0, 0.0, 0.0, 0.0, -6.0],
    "wide": [0.1 * (i % 7) for i in range(64)],
    "peaked first": [100.0, -100.0, -100.0],
    "peaked middle": [-100.0, 100.0, -100.0],
    "peaked last": [-100.0, -100.0, 100.0],
    "two peaks": [100.0, -100.0, 100.5],
}
PROBS = {
    "zero first": [0.0, 0.2, 0.3, 0.5],
    "zeros in the middle": [0.4, 0.0, 0.0, 0.6],
    "zero last": [0.5, 0.3, 0.2, 0.0],
    "certain": [0.0, 1.0, 0.0, 0.0],
    "weights": [3.0, 1.0, 4.0, 1.0],
}


def samplers():
    """Functions from the parameter of the lengths to a function that draws masks: each class, noise and temperature.

    The relaxed law has tests of its own, and so have coordinates that are drawn one after the other.
    """

    def drawing(case, how, **temperature):
        if case.hard:
            return lambda **law: getattr(case.with_lengths(**law, **temperature), how)
        return lambda **law: lambda n: (getattr(case.with_lengths(**law, **temperature), how)(n) != 0) * 1.0

    for case in LENGTH_CASES:
        if case.cls not in (RelaxedOrderedMask, NestedAutoregressive):
            yield f"{case.name}, without gradient", drawing(case, "sample")
            if case.reparameterised:
                for t in (0.01, 0.2, 5.0) if case.hard else (0.2,):
                    yield f"{case.name} {t}", drawing(case, "rsample", temperature=t)


SAMPLERS = dict(samplers())
each_sampler = pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)


@each_sampler
@pytest.mark.parametrize("logits", LOGITS.values(), ids=LOGITS)
def test_lengths_follow_logits(sampler, logits):
    logits = torch.tensor(logits)
    masks = sampler(logits=logits)((DRAWS,))
    assert oracles.law_pvalue(masks, logits.softmax(-1)) > 1e-3


@each_sampler
@pytest.mark.parametrize("probs", PROBS.values(), ids=PROBS)
def test_lengths_follow_probs(sampler, probs):
    probs = torch.tensor(probs)
    masks = sampler(probs=probs)((DRAWS,))
    assert oracles.law_pvalue(masks, probs / probs.sum()) > 1e-3


@each_sampler
def test_lengths_in_a_batch_follow_their_own_row(sampler):
    logits = torch.randn(2, 3, 5)
    masks = sampler(logits=logits)((20_000,))
    pvalues = [oracles.law_pvalue(masks[:, i, j], logits[i, j].softmax(-1)) for i in range(2) for j in range(3)]
    assert min(pvalues) > 1e-3
    # Rows are drawn independently: the correlation of two lengths is 0, with standard error 1 / sqrt(n).
    lengths = masks.sum(-1).reshape(20_000, 6)
    correlation = torch.corrcoef(lengths.T).triu(1)
    assert correlation.abs().max() * 20_000**0.5 < 4


@each_sampler
def test_successive_draws_are_independent(sampler):
    lengths = sampler(logits=torch.zeros(4))((DRAWS,)).sum(-1)
    correlation = torch.corrcoef(torch.stack([lengths[1:], lengths[:-1]]))[0, 1]
    assert correlation.abs() * DRAWS**0.5 < 4


@pytest.mark.parametrize("logits", [LOGITS["falling"], LOGITS["peaked middle"], LOGITS["two peaks"]])
def test_probabilities_taken_for_logits_are_rejected(logits):
    """The error of the published code, at the power of the tests above."""
    probs = torch.tensor(logits).softmax(-1)
    assert oracles.law_pvalue(oracles.probs_as_logits(probs, 0.2, DRAWS), probs) < 1e-6


@each_sampler
def test_a_shift_of_two_hundredths_is_rejected(sampler):
    probs = torch.tensor([0.1, 0.2, 0.3, 0.4])
    shifted = probs + torch.tensor([0.02, -0.02, 0.0, 0.0])
    masks = sampler(probs=shifted)((20_000,))
    assert oracles.law_pvalue(masks, probs) < 1e-6


def test_an_impossible_length_is_rejected():
    masks = oracles.all_masks(3)
    assert oracles.law_pvalue(masks, torch.tensor([0.5, 0.5, 0.0])) == 0
    assert oracles.law_pvalue(masks[1:2].expand(100, 3), torch.tensor([1.0, 1e-87, 0.0])) < 1e-6


@pytest.mark.parametrize("name", ["ordered-logits, without gradient", "logistic-logits 0.2", "gumbel-logits 0.2"])
@pytest.mark.parametrize("probs", PROBS.values(), ids=PROBS)
def test_lengths_of_probability_zero_are_never_drawn(name, probs):
    probs = torch.tensor(probs, dtype=torch.float32)
    masks = SAMPLERS[name](probs=probs)((1_000_000,))
    lengths = oracles.length_of(masks)
    assert (probs[lengths - 1] > 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_units", [2, 3, 10, 1000])
def test_extreme_uniforms_keep_to_the_possible_lengths(dtype, num_units):
    """The smallest and largest numbers that torch.rand returns, which a million draws may miss."""
    step = 2.0 ** -(24 if dtype == torch.float32 else 53)
    uniform = torch.tensor([0.0, step, 2 * step, 1 - 2 * step, 1 - step], dtype=dtype)[:, None, None]
    weights = torch.rand(500, num_units, dtype=dtype)
    possible = torch.rand(500, num_units) < 0.5
    possible[torch.arange(500), torch.randint(num_units, (500,))] = True
    probs = weights * possible
    keep_probs = (probs / probs.sum(-1, keepdim=True)).flip(-1).cumsum(-1).flip(-1)
    lengths = oracles.length_of(hard_mask(keep_probs, uniform))
    assert lengths.min() >= 1
    assert possible.expand(5, 500, num_units).gather(-1, lengths.unsqueeze(-1) - 1).all()


def test_float32_lengths_of_many_units():
    """A thousand units: sums of float32 probabilities do not bend the law."""
    logits = torch.linspace(0, 3, 1000, dtype=torch.float32)
    masks = OrderedMaskStraightThrough(0.2, logits=logits).rsample((50_000,))
    assert oracles.law_pvalue(masks, logits.double().softmax(-1)) > 1e-3
