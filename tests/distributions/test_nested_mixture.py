"""NestedAutoregressive with mixtures: density, draws and their gradients, divergence, what it learns and where it ends.

Draws are tested by Kolmogorov-Smirnov; a right law gives a p-value below 1e-3 in one of a thousand tests, and the seed
is fixed.
"""

import math

import pyro
import pytest
import torch
from cases import two_humps
from oracles import z_scores
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from scipy import stats
from torch.distributions import Categorical, MixtureSameFamily, Normal

from pyro_vnd.autoencoders import Conditioner
from pyro_vnd.distributions import NestedAutoregressive, NestedNormal
from pyro_vnd.distributions.kl import kl_parts
from pyro_vnd.distributions.mixtures import NestedMixture
from pyro_vnd.infer import NestedELBO

DRAWS = 100_000
PROBS = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
WHOLE = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)


def law_of(probs=PROBS, **options):
    return NestedAutoregressive(two_humps, probs=probs, **options)


def q_of():
    return NestedNormal(torch.tensor([0.8, -0.5, 0.3]), torch.tensor([0.1, 0.3, 0.2]), torch.tensor([0.1, 0.0, 0.7]))


def coordinate(last):
    """The law of a coordinate given the one before it, from scratch."""
    sides, last = torch.tensor([-1.0, 1.0]), torch.as_tensor(last)[..., None]
    return MixtureSameFamily(
        Categorical(logits=-sides * last),
        Normal(sides + last / 4, (0.4 + last.tanh() ** 2 / 4).expand(*last.shape[:-1], 2)),
    )


@pytest.mark.parametrize("value", [[0.7, 0.0, 0.0], [0.7, -1.2, 0.0], [-3.0, 0.5, 40.0], [0.0] * 3])
def test_density(value):
    length = max([i + 1 for i, x in enumerate(value) if x != 0], default=1)
    expected, last = math.log(PROBS[length - 1]), 0.0
    for x in value[:length]:
        expected += coordinate(last).log_prob(torch.tensor(x)).item()
        last = x
    assert law_of().log_prob(torch.tensor(value)).item() == pytest.approx(expected, rel=1e-6)


def ranks(values):
    """The ranks of kept coordinates in their law given those before them."""
    found = []
    for i in range(3):
        kept = values[values[:, i] != 0]
        found.append(coordinate(kept[:, i - 1] if i else torch.zeros(len(kept))).cdf(kept[:, i]))
    return found


def test_each_coordinate_follows_its_law_given_those_before_it():
    """By their ranks in it; weights that are off by a tenth are found out."""
    torch.manual_seed(0)
    assert min(stats.kstest(u.numpy(), "uniform").pvalue for u in ranks(law_of().sample((DRAWS,)))) > 1e-3

    def others(x):
        loc, scale, logits = two_humps(x)
        return loc, scale, logits + torch.tensor([0.2, 0.0])

    wrong = NestedAutoregressive(others, probs=PROBS).sample((DRAWS,))
    assert max(stats.kstest(u.numpy(), "uniform").pvalue for u in ranks(wrong)) < 1e-6


def test_given_values_the_coordinates_are_independent_and_may_be_drawn():
    torch.manual_seed(0)
    values = law_of(WHOLE).sample((5,))
    given = law_of(WHOLE).given(values)
    assert isinstance(given, NestedMixture)
    assert given.given(values) is given
    draws = given.rsample((DRAWS,))
    assert z_scores(draws, given.loc).abs().max() < 4
    assert z_scores(draws.square(), given.scale.square() + given.loc.square()).abs().max() < 4
    one = given.expand((2, 5))
    torch.testing.assert_close(one.log_prob(values), law_of(WHOLE).log_prob(values).expand(2, 5))
    assert one.rsample((4,)).shape == (4, 2, 5, 3)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_gradients_of_draws(which):
    """Of E tanh(2 n_2) by draws, against quadrature on a grid, in means, deviations and weights; 1e5 draws, to 5 SE."""
    torch.manual_seed(0)
    parts = [torch.tensor([-1.0, 1.0]), torch.tensor([0.4, 0.6]), torch.tensor([0.3, -0.2])]
    theta = parts[which].clone().requires_grad_()

    def conditioner(x):
        last = torch.nn.functional.pad(x[..., :-1], (1, 0)).unsqueeze(-1).tanh()
        loc, scale, logits = (theta if i == which else part for i, part in enumerate(parts))
        return loc + last / 2, scale.expand(*x.shape, 2), logits - torch.tensor([0.0, 1.0]) * last

    two = torch.tensor([0.0, 1.0])
    draws = [NestedAutoregressive(conditioner, probs=two).rsample((1000,))[:, 1] for _ in range(DRAWS // 1000)]
    found = torch.stack([torch.autograd.grad((2 * n).tanh().mean(), theta)[0] for n in draws])
    grid = torch.linspace(-6, 6, 801)
    pairs = torch.cartesian_prod(grid, grid)
    density = NestedAutoregressive(conditioner, probs=two).log_prob(torch.where(pairs == 0, 1e-9, pairs)).exp()
    exact = ((2 * pairs[:, 1]).tanh() * density).sum() * (grid[1] - grid[0]) ** 2
    (expected,) = torch.autograd.grad(exact, theta)
    error = found.std(0) / len(found) ** 0.5
    assert ((found.mean(0) - expected).abs() < 5 * error).all()
    assert (error < 0.02 * expected.abs()).all()  # so that a gradient that misses a part is found out


@pytest.mark.parametrize("length", [None, 1, 3])
def test_divergence_of_draws_is_right_on_average_and_has_less_variance(length):
    """Against the log-ratio of other draws, to three standard errors; that of the mixture's moments is rejected."""
    torch.manual_seed(0)
    q, p = q_of(), law_of()
    if length is not None:
        q, p = q.cut(length), p.cut(length)
    draws, others = q.rsample((DRAWS,)), q.sample((DRAWS,))
    ratio, found = q.log_prob(others) - p.log_prob(others), sum(kl_parts(q, p.given(draws), draws))
    error = ((ratio.var() + found.var()) / DRAWS).sqrt()
    assert (ratio.mean() - found.mean()).abs() < 3 * error
    assert found.var() < 0.6 * ratio.var()
    forgotten = others.clone()  # what was dropped is not known, and counts nothing
    known = sum(kl_parts(q, p.given(forgotten), forgotten))
    assert (ratio.mean() - known.mean()).abs() < 3 * ((ratio.var() + known.var()) / DRAWS).sqrt()
    given = p.given(draws)
    moments = sum(kl_parts(q, NestedNormal._of(given.loc, given.scale, given.mask_law)))
    assert (moments.mean() - found.mean()).abs() > 10 * error


class Rows:
    """Rows y ~ N(sum of z, 1) whose prior or guide is a chain of mixtures."""

    def __init__(self, guide_is_a_chain):
        self.y = torch.tensor([0.3, -1.0, 2.0])
        self.laws = (q_of, law_of) if guide_is_a_chain else (law_of, q_of)

    def model(self):
        with pyro.plate("data", 3):
            z = pyro.sample("z", self.laws[0]())
            pyro.sample("y", pyro.distributions.Normal(z.sum(-1), 1.0), obs=self.y)

    def guide(self):
        with pyro.plate("data", 3):
            pyro.sample("z", self.laws[1]())


@pytest.mark.parametrize("guide_is_a_chain", [False, True])
@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO])
def test_objectives_agree(elbo, guide_is_a_chain):
    """Means over 600 evaluations, to four standard errors of the difference."""
    torch.manual_seed(0)
    rows = Rows(guide_is_a_chain)
    losses = torch.tensor([[o.loss(rows.model, rows.guide) for o in (NestedELBO(), elbo())] for _ in range(600)])
    error = (losses.var(0).sum() / len(losses)).sqrt()
    assert losses.mean(0).diff().abs() < 4 * error


def test_sharp_edges_are_learned_and_draws_stay_within():
    """Of two uniform coordinates, the second of the sign of the first: one Normal each overshoots."""
    torch.manual_seed(0)

    def draw(count):
        first = 6 * torch.rand(count, 1) - 3
        return torch.cat([first, first.sign() * 2 * torch.rand(count, 1)], -1)

    outside, scores = {}, {}
    for num_components in (1, 10):
        conditioner = Conditioner(2, num_components=num_components)
        law = NestedAutoregressive(conditioner, probs=torch.tensor([0.0, 1.0]))
        optimizer = torch.optim.Adam(conditioner.parameters(), lr=5e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 500)
        for _ in range(500):
            optimizer.zero_grad()
            (-law.log_prob(draw(512)).mean()).backward()
            optimizer.step()
            schedule.step()
        z = law.sample((20_000,))
        outside[num_components] = ((z[:, 0].abs() > 3.3) | (z[:, 1] * z[:, 0].sign() < -0.3)).double().mean()
        scores[num_components] = law.log_prob(draw(20_000)).mean()
    assert outside[1] > 0.05
    assert outside[10] < 0.02
    assert -math.log(12) - 0.2 < scores[10] < -math.log(12)
    assert scores[1] < scores[10] - 0.2


def test_draws_of_a_long_chain_are_bounded():
    """Of 32 coordinates whose conditioner is far from its start: none of 10,000 draws is far off, and none is NaN."""
    torch.manual_seed(0)
    conditioner = Conditioner(32, num_components=5).float()
    with torch.no_grad():
        for parameter in conditioner.parameters():
            parameter.add_(torch.randn_like(parameter))
    draws = NestedAutoregressive(conditioner, probs=torch.ones(32).float()).sample((10_000,))
    assert draws.dtype == torch.float32
    bound = conditioner.net[-1].weight.abs().mul(conditioner.net[-1].mask.abs()).sum(-1).max() + 20
    assert draws.abs().max() < bound + 6 * math.exp(2)


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_far_off_values_have_finite_densities_and_gradients_in_float32(scale):
    conditioner = Conditioner(4, num_components=3).float()
    law = NestedAutoregressive(conditioner, logits=torch.zeros(4).float())
    values = scale * torch.tensor([[100.0, -100.0, 50.0, 1.0], [0.0, 0.0, 0.0, -1.0]]).float()
    scores = law.log_prob(values)
    scores.sum().backward()
    assert scores.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in conditioner.parameters())


def test_bad_conditioners():
    def wrong(x):
        loc, scale, logits = two_humps(x)
        return loc[:, :2], scale, logits

    def no_deviation(x):
        loc, scale, logits = two_humps(x)
        return loc, 0 * scale, logits

    for conditioner, message in ((wrong, "logits of mixtures"), (no_deviation, "finite deviations > 0")):
        law = NestedAutoregressive(conditioner, torch.zeros(3))
        for call in (lambda law=law: law.log_prob(torch.ones(2, 3)), lambda law=law: law.rsample((2,))):
            with pytest.raises(ValueError, match="NestedAutoregressive: argument `conditioner` .*" + message):
                call()
