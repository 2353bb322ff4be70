"""What is dropped from a code is predicted from what is kept."""

import pytest
import torch
from torch import Tensor, nn

from models.datasets import Dataset
from pyro_vnd.autoencoders import GaussianLikelihood, OrderedVAE, mlp_bodies
from pyro_vnd.autoencoders.codes import Completion
from pyro_vnd.distributions import NestedNormal, OrderedMaskStraightThrough
from pyro_vnd.infer import KLWeights, MaskSchedule, OptimizerSettings, cosine_to_zero, fit, linear

K = 4


def prefix_mask(lengths: Tensor) -> Tensor:
    return (torch.arange(K) < lengths.unsqueeze(-1)).to(torch.get_default_dtype())


def moved() -> Completion:
    """One whose predictions are no longer zero."""
    torch.manual_seed(0)
    complete = Completion(K)
    nn.init.normal_(complete.net[-1].weight)
    nn.init.normal_(complete.net[-1].bias)
    return complete


def test_it_starts_at_zeros_and_never_touches_what_is_kept():
    torch.manual_seed(0)
    mask = prefix_mask(torch.tensor([1, 2, 3, 4]))
    code = mask * torch.randn(5, 4, K)
    torch.testing.assert_close(Completion(K)(code, mask), code, atol=0, rtol=0)
    complete = moved()
    whole = complete(code, mask)
    assert torch.equal(whole[mask.expand(5, -1, -1) > 0], code[mask.expand(5, -1, -1) > 0])
    assert ((whole != 0) | (code != 0)).all()
    for row in range(4):  # a row of a batch has what it has alone
        torch.testing.assert_close(complete(code[0, row], mask[row]), whole[0, row])


@pytest.mark.parametrize("lengths", [[4, 0, 2, 4, 0], [4, 4, 4, 4, 4], [1, 2, 3, 0, 0]])
def test_whole_codes_are_passed_by_without_a_trace(lengths: list[int]):
    """What a law that was cut draws is completed row by row where it lacks something: value and gradients are equal."""
    complete, found = moved(), []
    for fresh in (True, False):
        logits = (3.0 * torch.arange(K)).expand(5, K).clone().requires_grad_()
        loc = torch.linspace(-1, 1, 5 * K).reshape(5, K).requires_grad_()
        law = NestedNormal(loc, torch.ones(K), logits).cut(torch.tensor(lengths))
        torch.manual_seed(1)
        code = law.rsample()
        mask = law.mask_of(code)
        # Whole by chance where it is random, its gradient tells what a shorter one would have.
        assert mask[1].sum() == (lengths[1] or K)
        whole = complete(code, mask if fresh else mask.clone())
        complete.zero_grad()
        (whole * torch.arange(5 * K).reshape(5, K)).sum().backward()
        found.append([whole, loc.grad, logits.grad, *(weight.grad.clone() for weight in complete.parameters())])
    assert len(OrderedMaskStraightThrough.partial_rows(mask)) == sum(length < K for length in lengths)
    for with_rows, without in zip(*found, strict=True):
        torch.testing.assert_close(with_rows, without)


def test_predictions_know_the_length():
    """The same numbers are completed differently where they are a whole prefix of another length."""
    complete, code = moved(), torch.tensor([0.7, 0.0, 0.0, 0.0])
    one, two = (complete(code, prefix_mask(torch.tensor(length))) for length in (1, 2))
    assert two[1] == 0
    assert not torch.isclose(one[2:], two[2:], rtol=0.01).any()


@pytest.mark.parametrize("length", [1, 2, 3])
def test_the_narrowed_net_makes_the_same_codes(length: int):
    complete = moved()
    code = torch.randn(6, length)
    padded = nn.functional.pad(code, (0, K - length))
    narrow = complete.narrow(length)
    torch.testing.assert_close(narrow(code), complete(padded, prefix_mask(torch.tensor(length))))
    assert sum(p.numel() for p in narrow.parameters()) < sum(p.numel() for p in complete.parameters())


def test_it_learns_what_is_a_function_of_the_rest_and_nothing_else():
    """Of a square it finds 98 % of the variance, of noise none, on 2,000 draws that it has not seen."""
    torch.manual_seed(0)
    z = torch.randn(6000, 3)
    z[:, 1] = (z[:, 0] ** 2 - 1) / 2**0.5
    complete, mask = Completion(3, hidden=32), torch.tensor([1.0, 0.0, 0.0])
    optimizer = torch.optim.Adam(complete.parameters(), lr=0.005)
    for step in range(600):
        rows = z[:4000][step * 256 % 3744 :][:256]
        optimizer.zero_grad()
        (complete(mask * rows, mask) - rows).square().mean().backward()
        optimizer.step()
    test = z[4000:]
    explained = 1 - (complete(mask * test, mask) - test).square().mean(0) / test.var(0)
    assert explained[0] == 1
    assert explained[1] > 0.98
    assert explained[2].abs() < 0.1


@pytest.fixture(scope="module")
def trained(digits: Dataset) -> tuple[OrderedVAE, OrderedVAE, Tensor]:
    """Two VAEs of real digits with the same shares, the first of which completes its codes."""
    vaes = []
    for tail in ("completion", "zeros"):
        torch.manual_seed(0)
        likelihood = GaussianLikelihood(8, noise="by_length")
        vae = OrderedVAE(
            (1, 8, 8), 8, bodies=mlp_bodies((1, 8, 8), hidden=(128, 64)), likelihood=likelihood, tail=tail
        ).float()
        arguments = {
            "lr": 0.004,
            "optimizer": OptimizerSettings(lr_schedule=cosine_to_zero()),
            "weights": KLWeights(local=linear(0, 1)),
            "progress": False,
        }
        images = digits.train.images.float()
        fit(vae, vae.guide, images, num_epochs=40, batch_size=64, schedule=MaskSchedule(0.1, 0.6, 0.3), **arguments)
        vaes.append(vae)
    return vaes[0], vaes[1], digits.validation.images.float()


def test_short_codes_of_digits_gain(trained: tuple[OrderedVAE, OrderedVAE, Tensor]):
    complete, zeros, x = trained
    for length in (2, 3):
        errors = [(vae.reconstruct(x, length) - x).square().mean().item() for vae in (complete, zeros)]
        assert errors[0] < 0.95 * errors[1]


def test_lengths_learn_through_it(trained: tuple[OrderedVAE, OrderedVAE, Tensor]):
    """The straight-through gradient of the logits of the lengths, against the sum over the lengths.

    With uniform lengths, 100 images, 2,000 draws of the code and 300 for each length; a gradient that takes lengths
    for others is rejected.
    """
    vae, _, x = trained
    x, head = x[:100], vae.encoder.heads
    with torch.no_grad():
        head.weight[-8:], head.bias[-8:] = 0, 0
        scores = torch.stack([vae.elbo(x, length, 300).log_likelihood for length in range(1, 9)], -1)

    def gradient(bound: Tensor) -> Tensor:
        return torch.autograd.grad(bound, head.bias)[0][-8:]

    expected = gradient((vae.encode(x).length_probs * scores).sum())
    found = sum(gradient(vae.elbo(x, num_samples=500).log_likelihood.sum()) for _ in range(4)) / 4

    def cosine(one: Tensor, other: Tensor) -> float:
        return (one @ other / one.norm() / other.norm()).item()

    assert cosine(found, expected) > 0.98
    assert cosine(found, expected.roll(4)) < 0.9
    assert 0.6 < found.norm() / expected.norm() < 1.4  # straight through, at a temperature: not without bias


def test_tails_are_checked():
    with pytest.raises(ValueError, match=r"OrderedVAE: argument `tail` must be one of .*; got 'ones'"):
        OrderedVAE((5,), K, tail="ones")
