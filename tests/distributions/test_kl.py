"""Kullback-Leibler divergences, against sums over every length and against Monte Carlo."""

import warnings

import oracles
import pyro
import pytest
import torch
from cases import HARD_CASES, each
from pyro.infer import TraceMeanField_ELBO
from torch.distributions import kl_divergence

from pyro_vnd.distributions import NestedNormal, OrderedMask, RelaxedOrderedMask
from pyro_vnd.infer import NestedELBO


@each(HARD_CASES)
@pytest.mark.parametrize("prior", HARD_CASES, ids=lambda case: case.name)
@pytest.mark.parametrize(("q_shape", "p_shape"), [((), ()), ((3,), ()), ((), (3,)), ((2, 1), (3,)), ((0,), ())])
def test_kl_of_masks(case, prior, q_shape, p_shape):
    q = case.with_lengths(logits=torch.randn(*q_shape, 4))
    p = prior.with_lengths(probs=torch.rand(*p_shape, 4) + 0.1)
    kl = kl_divergence(q, p)
    shape = torch.broadcast_shapes(q_shape, p_shape)
    assert kl.shape == shape
    rows = zip(q.probs.expand(*shape, 4).reshape(-1, 4), p.probs.expand(*shape, 4).reshape(-1, 4), strict=True)
    torch.testing.assert_close(kl.reshape(-1), torch.tensor([oracles.kl(*row) for row in rows]))


ZEROS = {
    "q has a zero": ([0.5, 0.0, 0.5], [0.2, 0.3, 0.5], "finite"),
    "both have it": ([0.5, 0.0, 0.5], [0.2, 0.0, 0.8], "finite"),
    "q has one more": ([1.0, 0.0, 0.0], [0.2, 0.0, 0.8], "finite"),
    "p has a zero": ([0.2, 0.3, 0.5], [0.5, 0.0, 0.5], "infinite"),
    "apart": ([1.0, 0.0, 0.0], [0.0, 0.5, 0.5], "infinite"),
}


@pytest.mark.parametrize(("q", "p", "kind"), ZEROS.values(), ids=ZEROS)
@each(HARD_CASES)
def test_kl_with_zero_probabilities(case, q, p, kind):
    q, p = (torch.tensor(x, requires_grad=True) for x in (q, p))
    kl = kl_divergence(case.with_lengths(probs=q), OrderedMask(probs=p))
    assert kl.item() == pytest.approx(oracles.kl(q, p))
    assert torch.isfinite(kl) == (kind == "finite")
    if kind == "finite":
        kl.backward()
        assert torch.isfinite(q.grad).all()
        assert torch.isfinite(p.grad).all()
        assert p.grad.abs().sum() > 0


@pytest.mark.parametrize("q_noise", ["logistic", "gumbel"])
def test_kl_of_nested_normals(q_noise):
    def arguments():
        return torch.randn(3, 4), torch.rand(3, 4) + 0.5, torch.rand(3, 4) + 0.1

    (q_loc, q_scale, q_probs), (p_loc, p_scale, p_probs) = arguments(), arguments()
    q = NestedNormal(q_loc, q_scale, q_probs.log(), noise=q_noise)
    p = NestedNormal(p_loc, p_scale, probs=p_probs)
    kl = kl_divergence(q, p)
    q_rows = zip(q_loc, q_scale, q.length_probs, strict=True)
    p_rows = zip(p_loc, p_scale, p.length_probs, strict=True)
    expected = [oracles.nested_normal_kl(a, b) for a, b in zip(q_rows, p_rows, strict=True)]
    torch.testing.assert_close(kl, torch.tensor(expected))
    # And the mean log-ratio of 20,000 draws.
    value = q.sample((20_000,))
    log_ratio = q.log_prob(value) - p.log_prob(value)
    z_score = (log_ratio.mean(0) - kl) / (log_ratio.std(0) / 20_000**0.5)
    assert z_score.abs().max() < 4
    z_score = (log_ratio.mean(0) - kl_divergence(p, q)) / (log_ratio.std(0) / 20_000**0.5)
    assert z_score.abs().max() > 6  # so many draws tell the two directions apart


@each(divergence=True, over_lengths=True)
def test_kl_names_different_numbers_of_units(case):
    with pytest.raises(ValueError, match="numbers of units: 4 and 5"):
        kl_divergence(case.build((), 4), case.build((), 5))


@each(HARD_CASES)
def test_relaxed_and_hard_masks_have_no_divergence(case):
    """A density against a pmf is not a number of nats, and scores of draws would not make it one."""
    relaxed, hard = RelaxedOrderedMask(0.5, logits=torch.zeros(4)), case.build()
    for pair in ((relaxed, hard), (hard, relaxed), (relaxed, hard.cut(2)), (relaxed.to_event(0), hard.to_event(0))):
        with pytest.raises(ValueError, match="a density of soft masks and probabilities of hard ones do not mix"):
            kl_divergence(*pair)


def test_relaxed_masks_say_how_to_estimate_their_divergence():
    relaxed = RelaxedOrderedMask(0.5, logits=torch.zeros(4))
    with pytest.raises(NotImplementedError, match=r"no closed form; estimate it by the mean of q.log_prob\(z\) - p"):
        kl_divergence(relaxed, relaxed)


@pytest.mark.parametrize("objective", [NestedELBO, TraceMeanField_ELBO])
def test_objectives_score_draws_of_relaxed_masks(objective):
    """The mean of 2,000 evaluations, against that of the log-ratio of 20,000 draws."""
    q, p = (RelaxedOrderedMask(0.5, logits=torch.tensor(x)) for x in ([0.0, 1.0, -1.0], [0.5, 0.0, 0.0]))
    value = q.rsample((20_000,))
    log_ratio = q.log_prob(value) - p.log_prob(value)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss = objective(num_particles=2_000, vectorize_particles=True, max_plate_nesting=0).loss(
            lambda: pyro.sample("z", p), lambda: pyro.sample("z", q)
        )
    deviation = log_ratio.std() * (1 / 20_000 + 1 / 2_000) ** 0.5
    assert abs(loss - log_ratio.mean()) / deviation < 4
