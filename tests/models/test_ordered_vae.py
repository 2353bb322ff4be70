"""The ordered VAE: its prefixes, its law of lengths, and that training on real digits orders the code."""

import math
from itertools import pairwise

import pytest
import torch

from models.datasets import load
from models.ordered_vae import OrderedVAE
from pyro_vnd.infer import fit

K = 6


@pytest.fixture
def vae():
    return OrderedVAE(64, num_latents=K, num_hidden=32)


def test_a_prefix_ignores_the_tail(vae):
    x = torch.rand(3, 64)
    short = vae.reconstruct(x, 2)
    with torch.no_grad():
        vae.decoder[0].weight[:, 2:] = 100.0
    torch.testing.assert_close(vae.reconstruct(x, 2), short)
    assert not torch.allclose(vae.reconstruct(x, 3), short)


def test_the_fixed_share_keeps_every_length_possible(vae):
    with torch.no_grad():
        vae.encoder.net[-1].bias[2 * K] = 1000.0  # the learned part is all on length 1
    probs = vae.encoder(torch.rand(3, 64)).length_probs
    torch.testing.assert_close(probs[:, 1:], torch.full((3, K - 1), 0.5 / K))
    torch.testing.assert_close(probs[:, 0], torch.full((3,), 0.5 + 0.5 / K))


def test_learns_an_ordered_code_of_real_digits():
    images = load("digits", flatten=True).train.images.double()
    torch.manual_seed(0)
    vae = OrderedVAE(64, num_latents=K, num_hidden=64)
    result = fit(vae, vae.make_guide(), images, num_epochs=60, batch_size=128, lr=0.003, progress=False)
    assert result.elbo[-1] > result.elbo[0] + 20
    errors = [(vae.reconstruct(images, k) - images).square().mean().item() for k in range(1, K + 1)]
    assert errors[0] < images.var(0).mean()  # better than the mean image already
    assert all(longer < 1.01 * shorter for shorter, longer in pairwise(errors))
    assert errors[-1] < 0.6 * errors[0]
    assert math.isfinite(result.kl[-1])
    assert result.kl[-1] > 1


@pytest.mark.parametrize("length", [0, K + 1])
def test_lengths_are_checked(length, vae):
    with pytest.raises(ValueError, match=f"`length` must be from 1 to {K}; got {length}"):
        vae.reconstruct(torch.rand(1, 64), length)
