"""Laws whose length is given: their lengths, what else they keep, and bad lengths."""

import re

import pyro.distributions as dist
import pytest
import torch
from torch.distributions import kl_divergence

from pyro_vnd.distributions import NestedNormal, OrderedMask, OrderedMaskStraightThrough

K = 4
LAWS = {
    "exact": OrderedMask,
    "straight-through": lambda **lengths: OrderedMaskStraightThrough(0.7, noise="gumbel", **lengths),
    "normal": lambda **lengths: NestedNormal(torch.ones(K), torch.ones(K), temperature=0.7, noise="gumbel", **lengths),
}
each = pytest.mark.parametrize("make", LAWS.values(), ids=LAWS)


@each
@pytest.mark.parametrize("given", ["logits", "probs"])
def test_lengths_are_those_given_and_zero_leaves_them_random(make, given):
    weights = torch.rand(5, K) + 0.1
    law = make(**{given: weights})
    lengths = torch.tensor([1, 2, 0, 4, 0])
    cut = law.cut(lengths)
    assert type(cut) is type(law)
    assert (cut.batch_shape, cut.event_shape) == (law.batch_shape, law.event_shape)
    assert cut.mean_length[[0, 1, 3]].tolist() == [1, 2, 4]
    torch.testing.assert_close(cut.length_probs[[2, 4]], law.length_probs[[2, 4]])
    kept = (cut.sample((200,)) != 0).sum(-1)
    assert (kept[:, [0, 1, 3]] == lengths[[0, 1, 3]]).all()
    assert kept[:, 2].unique().tolist() == [1, 2, 3, 4]


@each
def test_gradients_reach_the_lengths_that_are_random_and_no_others(make):
    logits = torch.zeros(2, K, requires_grad=True)
    cut = make(logits=logits).cut(torch.tensor([2, 0]))
    (cut.mean_length.sum() + cut.log_prob(torch.ones(2, K) * torch.tensor([1.0, 1, 0, 0])).sum()).backward()
    assert (logits.grad[0] == 0).all()
    assert (logits.grad[1] != 0).any()


@each
def test_a_single_law_is_cut_like_a_batch_of_it(make):
    law = make(logits=torch.arange(4.0))
    torch.testing.assert_close(law.cut(3).length_probs, torch.tensor([0.0, 0, 1, 0]))
    torch.testing.assert_close(law.cut(0).length_probs, law.length_probs)
    wide = law.expand((2, 3)).cut(torch.tensor([1, 2, 0]))
    assert wide.batch_shape == (2, 3)
    assert wide.mean_length[:, :2].tolist() == [[1, 2], [1, 2]]


@each
def test_divergence_of_two_laws_cut_alike_is_that_of_the_rest(make):
    q, p = make(logits=torch.randn(3, K)), make(logits=torch.zeros(3, K))
    lengths = torch.tensor([1, 4, 0])
    kl, uncut = kl_divergence(q.cut(lengths), p.cut(lengths)), kl_divergence(q, p)
    torch.testing.assert_close(kl, torch.stack([torch.zeros(()), torch.zeros(()), uncut[2]]))
    assert kl_divergence(q.cut(1), p.cut(2)).isinf().all()


@each
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


def test_temperature_and_noise_stay():
    for law in (LAWS["straight-through"](logits=torch.zeros(K)), LAWS["normal"](logits=torch.zeros(K)).lengths):
        assert (law.cut(2).temperature, law.cut(2).noise) == (0.7, "gumbel")
    law = NestedNormal(torch.arange(4.0), torch.ones(K), torch.zeros(K)).cut(3)
    torch.testing.assert_close(law.mean, torch.tensor([0.0, 1, 2, 0]))
    assert kl_divergence(law, NestedNormal(torch.zeros(K), torch.ones(K), torch.zeros(K)).cut(3)).item() == 2.5
    assert isinstance(law.normal, dist.Normal | torch.distributions.Normal)


@each
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
