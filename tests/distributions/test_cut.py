"""Laws whose length is given: their lengths, what else they keep, and bad lengths."""

import pickle
import re
from copy import deepcopy

import pyro.distributions as dist
import pytest
import torch
from cases import LENGTH_CASES, each
from oracles import law_pvalue
from torch.distributions import kl_divergence

from pyro_vnd.distributions import NestedNormal, OrderedMask, OrderedMaskStraightThrough
from pyro_vnd.distributions.masks import CutMask

K = 4
CUT_CASES = [case for case in LENGTH_CASES if hasattr(case.cls, "cut")]


@pytest.fixture
def make(case):
    """Laws by their lengths; what else they have stays the same."""
    return case.by_lengths(K)


@each(CUT_CASES)
@pytest.mark.parametrize("given", ["logits", "probs"])
def test_lengths_are_those_given_and_zero_leaves_them_random(make, given):
    weights = torch.rand(5, K) + 0.1
    law = make(**{given: weights})
    lengths = torch.tensor([1, 2, 0, 4, 0])
    cut = law.cut(lengths)
    if isinstance(law, OrderedMask):
        assert type(cut) is CutMask
        assert cut.base is law
        assert cut.has_rsample is law.has_rsample
    else:
        assert type(cut) is type(law)
        assert cut.mask_law.base is law.mask_law
    assert (cut.batch_shape, cut.event_shape) == (law.batch_shape, law.event_shape)
    assert cut.mean_length[[0, 1, 3]].tolist() == [1, 2, 4]
    torch.testing.assert_close(cut.length_probs[[2, 4]], law.length_probs[[2, 4]])
    kept = (cut.sample((200,)) != 0).sum(-1)
    assert (kept[:, [0, 1, 3]] == lengths[[0, 1, 3]]).all()
    assert kept[:, 2].unique().tolist() == [1, 2, 3, 4]


@each(CUT_CASES)
def test_gradients_reach_the_lengths_that_are_random_and_no_others(make):
    logits = torch.zeros(2, K, requires_grad=True)
    cut = make(logits=logits).cut(torch.tensor([2, 0]))
    (cut.mean_length.sum() + cut.log_prob(torch.ones(2, K) * torch.tensor([1.0, 1, 0, 0])).sum()).backward()
    assert (logits.grad[0] == 0).all()
    assert (logits.grad[1] != 0).any()


@each(CUT_CASES)
def test_a_single_law_is_cut_like_a_batch_of_it(make):
    law = make(logits=torch.arange(4.0))
    torch.testing.assert_close(law.cut(3).length_probs, torch.tensor([0.0, 0, 1, 0]))
    torch.testing.assert_close(law.cut(0).length_probs, law.length_probs)
    wide = law.expand((2, 3)).cut(torch.tensor([1, 2, 0]))
    assert wide.batch_shape == (2, 3)
    assert wide.mean_length[:, :2].tolist() == [[1, 2], [1, 2]]


@each(CUT_CASES, divergence=True)
def test_divergence_of_two_laws_cut_alike_is_that_of_the_rest(make):
    q, p = make(logits=torch.randn(3, K)), make(logits=torch.zeros(3, K))
    lengths = torch.tensor([1, 4, 0])
    kl, uncut = kl_divergence(q.cut(lengths), p.cut(lengths)), kl_divergence(q, p)
    torch.testing.assert_close(kl, torch.stack([torch.zeros(()), torch.zeros(()), uncut[2]]))
    assert kl_divergence(q.cut(1), p.cut(2)).isinf().all()


@each(CUT_CASES, divergence=True)
@pytest.mark.parametrize("given", ["logits", "probs"])
def test_cut_by_the_same_tensor_the_divergence_is_what_it_is_by_a_copy(make, given):
    """Value and gradient, also where the prior has no mass on a length that is not drawn."""
    weights, fixed = torch.rand(3, K) + 0.1, torch.tensor([0.0, 0.2, 0.3, 0.5])
    for prior, lengths in ((fixed + 0.1, torch.tensor([1, 4, 0])), (fixed, torch.tensor([1, 4, 2]))):
        found = []
        for other in (lengths, lengths.clone()):
            leaf = weights.clone().requires_grad_()
            kl = kl_divergence(make(**{given: leaf}).cut(lengths), make(probs=prior).expand((3,)).cut(other))
            kl.sum().backward()
            found.append((kl, leaf.grad))
        torch.testing.assert_close(*found)
        assert torch.isfinite(found[0][1]).all()


@each(CUT_CASES, takes_noise=True)
def test_temperature_and_noise_stay(case):
    cut = case.with_lengths(logits=torch.zeros(K), temperature=0.7, noise="gumbel").cut(2)
    law = getattr(cut, "mask_law", cut)
    assert (law.temperature, law.noise) == (0.7, "gumbel")


def test_what_is_kept_stays():
    law = NestedNormal(torch.arange(4.0), torch.ones(K), torch.zeros(K)).cut(3)
    torch.testing.assert_close(law.mean, torch.tensor([0.0, 1, 2, 0]))
    assert kl_divergence(law, NestedNormal(torch.zeros(K), torch.ones(K), torch.zeros(K)).cut(3)).item() == 2.5
    assert isinstance(law.normal, dist.Normal | torch.distributions.Normal)


@each(CUT_CASES)
@pytest.mark.parametrize("length", [-1, K + 1, 1.5, True, torch.tensor([1, 9])])
def test_bad_lengths(make, length):
    law = make(logits=torch.zeros(2, K), validate_args=True)
    expected = (
        f"{type(law).__name__}.cut: argument `length` must be integers from 1 to 4, or 0 for a random length; got "
    )
    with pytest.raises(ValueError, match=re.escape(expected)):
        law.cut(length)


def test_lengths_that_do_not_fit_the_batch():
    with pytest.raises(ValueError, match="cannot be expanded"):
        OrderedMask.uniform(K).cut(torch.tensor([1, 2]))


@pytest.mark.parametrize("noise", ["logistic", "gumbel"])
@pytest.mark.parametrize("temperature", [0.5, torch.tensor([[0.3], [0.9]])], ids=["one temperature", "several"])
@pytest.mark.parametrize("sample_shape", [(), (7,)])
def test_random_masks_of_a_batch_are_those_of_the_law_before(noise, temperature, sample_shape):
    """With the same random numbers: values and gradients, and none of either where the length is given."""
    lengths, weights = torch.tensor([0, 3, 0]), torch.randn(*sample_shape, 2, 3, K)
    found = []
    for cut in (False, True):
        logits = torch.linspace(-1, 1, 2 * 3 * K).reshape(2, 3, K).requires_grad_()
        law = OrderedMaskStraightThrough(temperature, logits=logits, noise=noise)
        law = law.cut(lengths) if cut else law
        torch.manual_seed(0)
        mask = law.rsample(sample_shape)
        (mask * weights).sum().backward()
        found.append((mask, law.keep_probs, logits.grad))
    for before, after in zip(*found, strict=True):
        torch.testing.assert_close(after[..., [0, 2], :], before[..., [0, 2], :])
    mask, keep_probs, gradient = found[1]
    assert (mask[..., 1, :] == torch.tensor([1.0, 1, 1, 0])).all()
    assert (keep_probs[:, 1] == torch.tensor([1.0, 1, 1, 0])).all()
    assert (gradient[:, 1] == 0).all()
    assert (gradient[:, [0, 2]] != 0).any(-1).all()


@each(CUT_CASES)
def test_a_law_can_be_cut_copied_and_cut_again(make, case):
    law = make(logits=torch.zeros(3, K)).cut(torch.tensor([0, 0, 2]))
    for copy in (deepcopy(law), pickle.loads(pickle.dumps(law)), law.expand((2, 3))):
        torch.testing.assert_close(copy.keep_probs, law.keep_probs.expand((*copy.batch_shape, K)))
    again = law.cut(torch.tensor([0, 4, 0]))
    torch.testing.assert_close(again.length_probs[[0, 2]], law.length_probs[[0, 2]])
    torch.testing.assert_close(again.mean_length, torch.tensor([2.5, 4, 2]))
    empty = make(logits=torch.zeros(0, K)).cut(torch.zeros(0, dtype=torch.long))
    for none_random in (empty, law.cut(torch.tensor([1, 2, 3]))):
        assert none_random.sample((5,)).shape == (5, *none_random.batch_shape, K)
        assert none_random.sample((0,)).shape == (0, *none_random.batch_shape, K)
        if case.divergence:
            assert kl_divergence(none_random, none_random).tolist() == [0.0] * len(none_random.keep_probs)


@pytest.mark.parametrize("noise", ["logistic", "gumbel"])
def test_lengths_that_are_random_have_the_law_of_their_row(noise):
    """By chi-square with 20,000 masks each; the power test takes one row for another."""
    probs = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.25, 0.25, 0.25, 0.25], [0.3, 0.4, 0.2, 0.1]])
    law = OrderedMaskStraightThrough(0.5, probs=probs, noise=noise).cut(torch.tensor([0, 2, 0]))
    torch.manual_seed(0)
    masks = torch.cat([law.rsample((10_000,)), torch.stack([law.rsample() for _ in range(10_000)])])
    for row, other in ((0, 2), (2, 0)):
        assert law_pvalue(masks[:, row], probs[row]) > 1e-3
        assert law_pvalue(masks[:, row], probs[other]) < 1e-9


def test_rows_that_may_lack_a_unit():
    law = OrderedMaskStraightThrough(0.2, logits=torch.full((5, K), 9.0) * torch.arange(K))
    mask = law.cut(torch.tensor([4, 0, 3, 4, 0])).rsample()
    assert mask[1].sum() == K  # whole by chance: its gradient counts
    assert OrderedMaskStraightThrough.partial_rows(mask).tolist() == [1, 2, 4]
    for other in (law.rsample(), mask.clone(), law.cut(4).rsample((2,)), torch.ones(5, K)):
        assert OrderedMaskStraightThrough.partial_rows(other) is None


def test_shapes_of_a_cut_law_cannot_be_inferred():
    with pytest.raises(NotImplementedError, match="CutMask has a distribution as argument, whose shapes cannot be"):
        CutMask.infer_shapes(logits=(3, K))


def test_what_a_class_derives_has_its_documentation():
    assert CutMask.random.__doc__ == "The laws that are random still, batch shape (R,)."
