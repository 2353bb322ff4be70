"""The law of NestedAutoregressive: each coordinate given those before it, its prefixes, and its divergence.

Lengths are tested by chi-square, coordinates by Kolmogorov-Smirnov; a right law gives a p-value below 1e-3 in one of
a thousand tests, and the seed is fixed.
"""

import math

import oracles
import pyro
import pytest
import torch
from cases import half_of_the_last
from pyro.infer import Predictive, Trace_ELBO, TraceMeanField_ELBO
from scipy import stats
from torch.distributions import kl_divergence

from pyro_vnd.autoencoders import Conditioner
from pyro_vnd.distributions import NestedAutoregressive, NestedNormal
from pyro_vnd.infer import NestedELBO

DRAWS = 100_000
PROBS = torch.tensor([0.2, 0.3, 0.4, 0.1], dtype=torch.float64)
LOC = torch.tensor([0.5, -0.5, 0.3, 1.0], dtype=torch.float64)
SCALE = torch.tensor([0.3, 0.8, 0.5, 0.6], dtype=torch.float64)
Q_PROBS = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)


def law_of(probs=PROBS, **options):
    return NestedAutoregressive(half_of_the_last, probs=probs, **options)


def q_of(logits=None):
    return NestedNormal(LOC, SCALE, Q_PROBS.log() if logits is None else logits)


def by_hand(value, probs=PROBS):
    """Log-density of one value, from the formula."""
    length = max([i + 1 for i, x in enumerate(value) if x != 0], default=1)
    result, last = math.log(probs[length - 1]), 0.0
    for x in value[:length]:
        scale = 0.5 + math.tanh(last) ** 2 / 4
        result += -0.5 * ((x - last / 2) / scale) ** 2 - math.log(scale) - 0.5 * math.log(2 * math.pi)
        last = x
    return result


@pytest.mark.parametrize(
    "value", [[0.7, 0.0, 0.0, 0.0], [0.7, -1.2, 0.0, 0.0], [0.0, 0.0, 2.0, 0.0], [1.0, 0.5, -0.5, 0.1], [0.0] * 4]
)
def test_density(value):
    assert law_of().log_prob(torch.tensor(value)).item() == pytest.approx(by_hand(value), abs=1e-5)


def test_lengths_and_zeros():
    torch.manual_seed(0)
    values = law_of().sample((DRAWS,))
    masks = (values != 0).to(values.dtype)
    assert (masks.diff(dim=-1) <= 0).all()
    assert oracles.law_pvalue(masks, PROBS) > 1e-3
    assert oracles.law_pvalue(masks, PROBS + torch.tensor([0.02, -0.02, 0.0, 0.0])) < 1e-6


@pytest.mark.parametrize("slope", [0.5, 0.2])
def test_each_coordinate_follows_its_law_given_those_before_it(slope):
    """By their ranks in it; another slope is found out."""
    torch.manual_seed(0)
    values = law_of().sample((DRAWS,))
    pvalues = []
    for i in range(4):
        kept = values[values[:, i] != 0]
        last = kept[:, i - 1] if i else torch.zeros(len(kept))
        ranks = (kept[:, i] - slope * last) / (0.5 + last.tanh() ** 2 / 4)
        # The first has none before it; the last is kept in a tenth of the draws.
        pvalues.append(stats.kstest(ranks.numpy(), stats.norm.cdf).pvalue)
    assert min(pvalues) > 1e-3 if slope == 0.5 else max(pvalues[1:3]) < 1e-3


def test_what_is_kept_has_the_same_law_whatever_is_dropped():
    """The density of two coordinates is that of three, the third integrated out: on a grid of 4001 points."""
    law, grid = law_of(), torch.linspace(-10, 10, 4001)
    kept = torch.tensor([0.7, -1.2]).expand(4001, 2)
    grid = torch.where(grid == 0, 1e-6, grid)
    three = torch.cat([kept, grid.unsqueeze(-1), torch.zeros(4001, 1)], -1)
    two = law.cut(2).log_prob(torch.tensor([0.7, -1.2, 0.0, 0.0])).exp()
    torch.testing.assert_close(torch.trapezoid(law.cut(3).log_prob(three).exp(), grid), two, rtol=1e-4, atol=0)


def test_a_conditioner_that_looks_at_nothing_leaves_a_nested_normal():
    law = NestedAutoregressive(lambda x: (LOC, SCALE), probs=Q_PROBS)
    plain = q_of()
    torch.manual_seed(0)
    values = law.rsample((50,))
    torch.manual_seed(0)
    torch.testing.assert_close(plain.rsample((50,)), values)
    torch.testing.assert_close(law.log_prob(values), plain.log_prob(values))


def test_fresh_samples_know_what_was_dropped():
    torch.manual_seed(0)
    law = law_of(torch.tensor([1.0, 0.0, 0.0, 0.0]))
    value = law.rsample((20,))
    assert (value[:, 1:] == 0).all()
    assert (law.given(value).loc[:, 2:] != 0).all()
    assert (law.given(value.clone()).loc[:, 2:] == 0).all()
    torch.testing.assert_close(law.log_prob(value), law.log_prob(value.clone()))


def log_ratio(q, p):
    draws = q.sample((DRAWS,))
    return q.log_prob(draws) - p.log_prob(draws)


def conditional(q, p):
    return kl_divergence(q, p.given(q.rsample((DRAWS,)))).detach()


@pytest.mark.parametrize("length", [None, 1, 3, 4])
def test_divergence_given_the_draws_is_right_on_average_and_has_less_variance(length):
    """Against the log-ratio of 1e5 draws of q, to three standard errors of the difference."""
    torch.manual_seed(0)
    q, p = q_of(), law_of()
    if length is not None:
        q, p = q.cut(length), p.cut(length)
    monte_carlo, given = log_ratio(q, p), conditional(q, p)
    error = ((monte_carlo.var() + given.var()) / DRAWS).sqrt()
    assert (monte_carlo.mean() - given.mean()).abs() < 3 * error
    assert given.var() < 0.5 * monte_carlo.var()


def test_divergence_needs_what_was_dropped():
    """Of values whose dropped coordinates were forgotten it is off, by ten standard errors at least."""
    torch.manual_seed(0)
    q, p = q_of(), law_of()
    draws = q.sample((DRAWS,))
    difference = kl_divergence(q, p.given(draws)) - kl_divergence(q, p.given(draws.clone()))
    assert difference.mean().abs() > 10 * difference.std() / DRAWS**0.5


def test_neither_divergence_is_registered():
    for q, p in ((q_of(), law_of()), (law_of(), q_of())):
        with pytest.raises(NotImplementedError):
            kl_divergence(q, p)


def test_gradient_of_the_lengths_sums_over_them():
    """That of the divergence given the draws, against the sum over lengths of 1e5 draws each, to 2 %."""
    torch.manual_seed(0)
    logits = Q_PROBS.log().requires_grad_()
    p = law_of()
    q = q_of(logits)
    (found,) = torch.autograd.grad(kl_divergence(q, p.given(q.rsample((DRAWS,)))).mean(), logits)
    costs = torch.stack([conditional(q_of().cut(k), p.cut(k)).mean() for k in range(1, 5)])
    probs = logits.softmax(-1)
    exact = (probs * (costs + probs.log() - PROBS.log())).sum()
    (expected,) = torch.autograd.grad(exact, logits)
    torch.testing.assert_close(found, expected, rtol=0.02, atol=1e-3)


class Chain:
    """Rows y ~ N(sum of z, 1) with a chain as their prior."""

    def __init__(self, guide_is_a_chain=False):
        self.y = torch.tensor([0.3, -1.0, 2.0])
        self.guide_is_a_chain = guide_is_a_chain

    def prior(self):
        return q_of() if self.guide_is_a_chain else law_of()

    def model(self):
        with pyro.plate("data", 3):
            z = pyro.sample("z", self.prior())
            pyro.sample("y", pyro.distributions.Normal(z.sum(-1), 1.0), obs=self.y)

    def guide(self):
        with pyro.plate("data", 3):
            pyro.sample("z", law_of() if self.guide_is_a_chain else q_of())


@pytest.mark.parametrize("guide_is_a_chain", [False, True])
@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO])
def test_objectives_agree(elbo, guide_is_a_chain):
    """Means over 600 evaluations, to four standard errors of the difference."""
    torch.manual_seed(0)
    chain = Chain(guide_is_a_chain)
    ours, theirs = NestedELBO(), elbo()
    losses = torch.tensor([[o.loss(chain.model, chain.guide) for o in (ours, theirs)] for _ in range(600)])
    error = (losses.var(0).sum() / len(losses)).sqrt()
    assert losses.mean(0).diff().abs() < 4 * error
    assert losses[:, 0].var() < losses[:, 1].var()
    assert set(ours.kl) == set(ours.kl_lengths) == {"z"}
    lengths = kl_divergence(*((q_of().mask_law, law_of().mask_law)[:: -1 if guide_is_a_chain else 1]))
    assert ours.kl_lengths["z"].item() == pytest.approx(3 * lengths.item(), rel=1e-5)


def test_prior_predictive_draws():
    torch.manual_seed(0)
    draws = Predictive(Chain().model, num_samples=2000)()["z"]
    assert draws.shape == (2000, 3, 4)
    assert oracles.law_pvalue((draws != 0).double().reshape(-1, 4), PROBS) > 1e-3


def test_scores_are_differentiable_in_the_conditioner():
    torch.manual_seed(0)
    conditioner = Conditioner(4)
    law = NestedAutoregressive(conditioner, torch.zeros(4))
    values = law_of().sample((100,))
    (-law.log_prob(values).sum()).backward()
    assert all(torch.isfinite(p.grad).all() for p in conditioner.parameters())
    assert conditioner.net[-1].bias.grad.abs().min() > 0


def test_draws_are_differentiable_in_the_conditioner():
    slope = torch.tensor(0.5, requires_grad=True)

    def conditioner(x):
        return slope * torch.nn.functional.pad(x[..., :-1], (1, 0)) + 1, torch.ones_like(x)

    # E n_3 = 1 + s (1 + s), whose slope is 1 + 2 s.
    torch.manual_seed(0)
    draws = NestedAutoregressive(conditioner, probs=torch.tensor([0.0, 0.0, 1.0])).rsample((DRAWS,))
    draws[:, 2].mean().backward()
    assert slope.grad.item() == pytest.approx(2.0, abs=0.02)


def test_it_learns_what_the_coordinates_have_in_common():
    """Of x_2 = sin(2 x_1) + noise, scored on new draws: .06 nats short of the truth at most; independent ones, .5."""
    torch.manual_seed(0)

    def draw(count):
        first = torch.randn(count, 1)
        second = (2 * first).sin() + 0.3 * torch.randn(count, 1)
        return torch.cat([first, second, torch.randn(count, 1)], -1)

    whole = torch.tensor([0.0, 0.0, 1.0])
    conditioner = Conditioner(3)
    law = NestedAutoregressive(conditioner, probs=whole)
    optimizer = torch.optim.Adam(conditioner.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1500)
    for _ in range(1500):
        optimizer.zero_grad()
        (-law.log_prob(draw(512)).mean()).backward()
        optimizer.step()
        schedule.step()
    new = draw(20_000)
    nothing = torch.zeros(20_000)
    means = torch.stack([nothing, (2 * new[:, 0]).sin(), nothing], -1)
    truth = torch.distributions.Normal(means, torch.tensor([1.0, 0.3, 1.0])).log_prob(new).sum(-1).mean()
    independent = NestedNormal(new.mean(0), new.std(0), probs=whole).log_prob(new).mean()
    assert law.log_prob(new).mean() > truth - 0.06
    assert independent < truth - 0.5


BAD_CONDITIONERS = {
    "one tensor": (
        lambda x: x,
        r"must return means and deviations that broadcast to \(2, 4\), or .*; got \[\(2, 4\)\]",
    ),
    "wrong shape": (lambda x: (x[..., :3], x), r"broadcast to \(2, 4\), or .*; got \[\(2, 3\), \(2, 4\)\]"),
    "three": (lambda x: (x, x, x), r"broadcast to \(2, 4\), or means, deviations and logits of mixtures.*; got "),
    "four": (lambda x: (x, x, x, x), r"got \[\(2, 4\), \(2, 4\), \(2, 4\), \(2, 4\)\]"),
    "numbers": (lambda x: (0.0, 1.0), r"got \['float', 'float'\]"),
    "no deviation": (lambda x: (x, torch.zeros_like(x)), "finite means and finite deviations > 0; got "),
    "nan": (lambda x: (x * math.nan, torch.ones_like(x)), "finite means and finite deviations > 0; got "),
}


@pytest.mark.parametrize("case", BAD_CONDITIONERS)
def test_bad_conditioners(case):
    conditioner, message = BAD_CONDITIONERS[case]
    law = NestedAutoregressive(conditioner, torch.zeros(4))
    for call in (lambda: law.log_prob(torch.ones(2, 4)), lambda: law.rsample((2,))):
        with pytest.raises(ValueError, match="NestedAutoregressive: argument `conditioner` .*" + message):
            call()


def test_bad_arguments():
    with pytest.raises(ValueError, match="`conditioner` must be callable with values; got Tensor"):
        NestedAutoregressive(torch.zeros(4), torch.zeros(4))
    with pytest.raises(ValueError, match=r"`value` must be samples of shape \(..., 4\).*got \(2, 3\)"):
        law_of().given(torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"broadcast with the batch shape \(3,\); got \(2, 4\)"):
        law_of().expand((3,)).given(torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"`value` must be a tensor of finite numbers of shape \(..., 4\)"):
        law_of().log_prob(torch.tensor([0.0, math.nan, 0.0, 0.0]))
