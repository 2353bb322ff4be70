"""The law of NestedNormal: its lengths, its kept coordinates, its exact zeros, and its density.

Lengths are tested by chi-square, coordinates by Kolmogorov-Smirnov; a right law gives a p-value below 1e-3 in one of
a thousand tests, and the seed is fixed.
"""

import math

import oracles
import pytest
import torch
from scipy import stats
from torch.distributions import kl_divergence

from pyro_vnd.distributions import NestedNormal

DRAWS = 100_000
LOC = [1.0, -0.5, 0.0, 20.0]
SCALE = [0.3, 2.0, 1.0, 0.01]
PROBS = [0.2, 0.3, 0.4, 0.1]

each_noise = pytest.mark.parametrize("noise", ["logistic", "gumbel"])


def law_of(noise="logistic", loc=LOC, scale=SCALE, probs=PROBS, **options):
    loc, scale, logits = torch.tensor(loc), torch.tensor(scale), torch.tensor(probs).log()
    return NestedNormal(loc, scale, logits, noise=noise, **options)


def lengths_and_values(law):
    values = law.rsample((DRAWS,)).detach()
    return (values != 0).sum(-1), values


def coordinate_pvalues(law, loc, scale):
    lengths, values = lengths_and_values(law)
    kept = [values[lengths >= i, i - 1] for i in range(1, 5)]
    return [stats.kstest(x.numpy(), stats.norm(m, s).cdf).pvalue for x, m, s in zip(kept, loc, scale, strict=True)]


@each_noise
@pytest.mark.parametrize("temperature", [0.05, 0.5])
def test_lengths(noise, temperature):
    lengths, _ = lengths_and_values(law_of(noise, temperature=temperature))
    masks = oracles.all_masks(4)[lengths - 1]
    assert oracles.law_pvalue(masks, torch.tensor(PROBS)) > 1e-3
    shifted = torch.tensor(PROBS) + torch.tensor([0.02, -0.02, 0.0, 0.0])
    assert oracles.law_pvalue(masks, shifted) < 1e-6


@each_noise
def test_coordinates_past_the_length_are_exactly_zero(noise):
    lengths, values = lengths_and_values(law_of(noise))
    beyond = torch.arange(1, 5) > lengths.unsqueeze(-1)
    assert (values[beyond] == 0).all()
    assert (values[~beyond] != 0).all()
    assert beyond.any()


@each_noise
def test_kept_coordinates_are_normal(noise):
    assert min(coordinate_pvalues(law_of(noise), LOC, SCALE)) > 1e-3


WRONG = [{"scale": [1.05 * s for s in SCALE]}, {"loc": [m + 0.05 * s for m, s in zip(LOC, SCALE, strict=True)]}]


@pytest.mark.parametrize("wrong", WRONG)
def test_a_location_or_scale_off_by_a_twentieth_is_rejected(wrong):
    assert min(coordinate_pvalues(law_of(**wrong), LOC, SCALE)) < 1e-6


def test_kept_coordinates_do_not_depend_on_the_length_or_on_each_other():
    lengths, values = lengths_and_values(law_of())
    full = values[lengths == 4]
    # Correlations are 0 with standard error 1 / sqrt(n).
    assert torch.corrcoef(full.T).triu(1).abs().max() * len(full) ** 0.5 < 4
    first = torch.corrcoef(torch.stack([values[:, 0], lengths.double()]))[0, 1]
    assert first.abs() * DRAWS**0.5 < 4


VALUES = {
    "full": [1.2, 0.3, -1.0, 20.01],
    "one": [0.7, 0.0, 0.0, 0.0],
    "two": [0.7, -3.0, 0.0, 0.0],
    "a zero within": [0.9, 0.0, 0.4, 0.0],
    "first zero": [0.0, 1.0, 0.0, 0.0],
    "all zero": [0.0, 0.0, 0.0, 0.0],
    "negative zero": [0.7, -0.0, -0.0, 0.0],
}


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_density_by_hand(value):
    value = torch.tensor(value)
    expected = oracles.nested_normal_log_prob(value, *map(torch.tensor, (LOC, SCALE, PROBS)))
    assert law_of().log_prob(value).item() == pytest.approx(expected, rel=1e-12)


@each_noise
def test_density_of_fresh_draws_by_hand(noise):
    """What a draw remembers gives the same density as the draw itself, also under another law."""
    law = law_of(noise, probs=[0.25] * 4, scale=[1.0] * 4)
    values = law.rsample((200,))
    for scored, scale, probs in ((law, [1.0] * 4, [0.25] * 4), (law_of(noise), SCALE, PROBS)):
        oracle = [oracles.nested_normal_log_prob(x, *map(torch.tensor, (LOC, scale, probs))) for x in values.detach()]
        torch.testing.assert_close(scored.log_prob(values).detach(), torch.tensor(oracle), rtol=1e-9, atol=1e-9)


def test_lengths_of_probability_zero():
    law = NestedNormal(torch.zeros(3), torch.ones(3), probs=torch.tensor([0.5, 0.0, 0.5]))
    log_prob = law.log_prob(torch.tensor([[1.0, 0.0, 0.0], [1.0, 2.0, 0.0], [1.0, 2.0, 3.0]]))
    assert torch.isfinite(log_prob).tolist() == [True, False, True]
    assert log_prob[1] == -torch.inf


@each_noise
def test_moments_against_enumeration(noise):
    law = law_of(noise)
    masks, probs = oracles.all_masks(4), torch.tensor(PROBS)
    mean = (probs[:, None] * masks * law.loc).sum(0)
    square = (probs[:, None] * masks * (law.loc**2 + law.scale**2)).sum(0)
    torch.testing.assert_close(law.mean, mean)
    torch.testing.assert_close(law.variance, square - mean**2)
    normal_entropy = (0.5 * torch.log(2 * torch.pi * torch.e * law.scale**2) * oracles.mean(probs)).sum()
    torch.testing.assert_close(law.entropy(), oracles.entropy(probs) + normal_entropy)


def test_entropy_is_the_mean_log_density():
    law = law_of()
    log_prob = law.log_prob(law.sample((DRAWS,)))
    z_score = (log_prob.mean() + law.entropy()) / (log_prob.std() / DRAWS**0.5)
    assert z_score.abs() < 4


def test_the_mask_of_a_value_is_that_of_its_sample():
    law = law_of(probs=[0.2, 0.3, 0.4, 0.1])
    value = law.rsample((DRAWS,))
    mask = NestedNormal.mask_of(value)
    assert torch.equal(mask.detach(), NestedNormal.mask_of(value.detach().clone()))
    assert torch.equal(mask.detach(), torch.arange(4).lt((value != 0).sum(-1, keepdim=True)).to(value))
    kept_but_zero = torch.tensor([[0.0, 0.0, 1.5, 0.0], [0.0, 0.0, 0.0, 0.0]])
    assert NestedNormal.mask_of(kept_but_zero).tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]


def test_lengths_learn_from_the_mask_of_a_fresh_sample_only():
    logits = torch.zeros(4, requires_grad=True)
    value = NestedNormal(torch.zeros(4), torch.ones(4), logits).rsample((1000,))
    NestedNormal.mask_of(value).sum(-1).mean().backward()
    assert (logits.grad.diff() > 0).all()  # longer lengths keep more
    assert not NestedNormal.mask_of(value.clone()).requires_grad


def test_what_is_never_kept_may_be_infinitely_far():
    """Its score and divergence overflow, and count nothing."""
    loc = torch.tensor([1.0, 1e200], requires_grad=True)
    probs = torch.tensor([1.0, 0.0])
    q, p = (NestedNormal(x, torch.ones(2), probs=probs) for x in (loc, torch.zeros(2)))
    kl, score = kl_divergence(q, p), q.log_prob(torch.zeros(2))
    assert kl.item() == 0.5
    assert score.item() == pytest.approx(-0.5 - 0.5 * math.log(2 * math.pi))
    (gradient,) = torch.autograd.grad(kl + score, loc)
    assert gradient.tolist() == [0.0, 0.0]
