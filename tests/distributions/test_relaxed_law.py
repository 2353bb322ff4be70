"""The law of RelaxedOrderedMask: its marginals, its density, and that the two belong together.

Marginals are compared with masks that numpy drew, by the Kolmogorov-Smirnov test of two samples; the density by
quadrature, which is nearly exact for smooth functions that vanish at the ends.
"""

import math

import oracles
import pytest
import torch
from pyro.distributions import RelaxedOneHotCategorical
from scipy import stats
from torch.distributions.relaxed_categorical import ExpRelaxedCategorical

from pyro_vnd.distributions import OrderedMask, RelaxedOrderedMask

DRAWS = 200_000
PROBS = [0.2, 0.5, 0.3]


def marginal_pvalues(temperature, oracle_temperature, probs=PROBS):
    probs = torch.tensor(probs)
    ours = RelaxedOrderedMask(temperature, probs=probs).sample((DRAWS,)).numpy()
    theirs = oracles.relaxed_masks(probs, oracle_temperature, DRAWS, seed=1)
    # Units 2..K, and a difference, whose law depends on how units go together.
    pairs = [(ours[:, i], theirs[:, i]) for i in range(1, len(probs))]
    pairs.append((ours[:, 1] - ours[:, -1], theirs[:, 1] - theirs[:, -1]))
    return [stats.ks_2samp(x, y, method="asymp").pvalue for x, y in pairs]


@pytest.mark.parametrize("temperature", [0.2, 0.66, 2.0])
def test_marginals(temperature):
    assert min(marginal_pvalues(temperature, temperature)) > 1e-3


@pytest.mark.parametrize("temperature", [0.2, 0.66, 2.0])
def test_marginals_at_a_temperature_off_by_a_twentieth_are_rejected(temperature):
    assert min(marginal_pvalues(1.05 * temperature, temperature)) < 1e-6


def test_marginals_of_other_probabilities_are_rejected():
    ours = RelaxedOrderedMask(0.5, probs=torch.tensor([0.2, 0.48, 0.32])).sample((DRAWS,)).numpy()
    theirs = oracles.relaxed_masks(torch.tensor(PROBS), 0.5, DRAWS, seed=1)
    assert stats.ks_2samp(ours[:, 2], theirs[:, 2]).pvalue < 1e-6


@pytest.mark.parametrize("temperature", [0.05, 1.0])
def test_largest_jump_is_the_exact_length(temperature):
    """The most probable unit of the relaxed one-hot follows `probs` at every temperature."""
    law = RelaxedOrderedMask(temperature, probs=torch.tensor(PROBS))
    z = law.sample((DRAWS,))
    jumps = z - torch.nn.functional.pad(z[:, 1:], (0, 1))
    masks = oracles.all_masks(3)[jumps.argmax(-1)]
    assert oracles.law_pvalue(masks, torch.tensor(PROBS)) > 1e-3


def quadrature(num_units):
    """Soft masks on a grid, and the volume that each stands for; y = softmax(t, 0) has Jacobian prod y."""
    step = 0.1 if num_units == 2 else 0.25
    axis = torch.arange(-36, 36 + step, step)
    grid = torch.cartesian_prod(*[axis] * (num_units - 1)).reshape(-1, num_units - 1)
    one_hot = torch.nn.functional.pad(grid, (0, 1)).softmax(-1)
    return one_hot.flip(-1).cumsum(-1).flip(-1), one_hot.prod(-1) * step ** (num_units - 1)


CASES = [(0.6, [0.3, 0.7]), (1.5, [0.3, 0.7]), (0.6, PROBS), (1.0, PROBS)]


@pytest.mark.parametrize(("temperature", "probs"), CASES)
def test_density_integrates_to_one(temperature, probs):
    masks, volume = quadrature(len(probs))
    density = RelaxedOrderedMask(temperature, probs=torch.tensor(probs), validate_args=False).log_prob(masks).exp()
    assert (density * volume).sum().item() == pytest.approx(1, abs=1e-6)


def z_scores(temperature, density_temperature, probs):
    """Monte Carlo means of some functions of the draws against their integrals under the density."""
    probs = torch.tensor(probs)
    masks, volume = quadrature(len(probs))
    weight = volume * RelaxedOrderedMask(density_temperature, probs=probs, validate_args=False).log_prob(masks).exp()
    draws = RelaxedOrderedMask(temperature, probs=probs).sample((DRAWS,))
    functions = [lambda z: z[:, 1], lambda z: z[:, -1] ** 2, lambda z: z[:, 1] * (1 - z[:, 1])]
    scores = [(f(draws).mean() - (weight * f(masks)).sum()) / (f(draws).std() / DRAWS**0.5) for f in functions]
    return torch.stack(scores).abs()


@pytest.mark.parametrize(("temperature", "probs"), CASES)
def test_density_is_that_of_the_draws(temperature, probs):
    assert z_scores(temperature, temperature, probs).max() < 4


@pytest.mark.parametrize(("temperature", "probs"), CASES)
def test_density_at_a_temperature_off_by_a_twentieth_is_rejected(temperature, probs):
    assert z_scores(temperature, 1.05 * temperature, probs).max() > 6


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("num_units", [1, 2, 5, 20])
def test_density_is_that_of_the_relaxed_one_hot(temperature, num_units):
    """The change of variables has no volume of its own."""
    logits = torch.randn(3, num_units)
    y = torch.randn(4, 3, num_units).softmax(-1)
    z = y.flip(-1).cumsum(-1).flip(-1)
    expected = RelaxedOneHotCategorical(torch.tensor(temperature), logits=logits).log_prob(y)
    torch.testing.assert_close(RelaxedOrderedMask(temperature, logits=logits).log_prob(z), expected)


def test_a_draw_remembers_what_its_mask_cannot_hold():
    """At a low temperature float32 masks round to zeros and ones; the density is that of the draw all the same."""
    logits = torch.randn(6, dtype=torch.float32)
    law = RelaxedOrderedMask(0.05, logits=logits)
    value = law.rsample((1000,))
    mine = law.log_prob(value).double()
    assert (law.log_prob(value.clone()) - mine).abs().mean() > 1
    # The mean log-density does not depend on the draws, nor on their precision.
    scores = (logits.double() + torch.distributions.Gumbel(0.0, 1.0).sample((1000, 6))) / 0.05
    theirs = ExpRelaxedCategorical(torch.tensor(0.05), logits=logits.double()).log_prob(scores.log_softmax(-1))
    theirs = theirs - scores.log_softmax(-1).sum(-1)
    z_score = (mine.mean() - theirs.mean()) / ((mine.var() + theirs.var()) / 1000).sqrt()
    assert z_score.abs() < 4


def test_cold_masks_are_hard_masks():
    probs = torch.tensor(PROBS)
    cold = RelaxedOrderedMask(0.01, probs=probs)
    masks = cold.sample((DRAWS,)).round()
    assert oracles.law_pvalue(masks, probs) > 1e-3
    assert torch.equal(cold.keep_probs, OrderedMask(probs=probs).keep_probs)


def test_probability_zero_has_a_density():
    law = RelaxedOrderedMask(0.5, probs=torch.tensor([0.5, 0.0, 0.5]))
    value = law.rsample((100,))
    assert torch.isfinite(law.log_prob(value)).all()
    assert (value[:, 1] - value[:, 2]).max() < 1e-100  # the second unit is as good as never the last
    assert math.isfinite(law.log_prob(torch.tensor([1.0, 0.5, 0.5])).item())
