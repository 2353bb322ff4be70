"""The codebook: nearest vectors, gradients and restarts."""

import torch

from pyro_vnd.autoencoders.quantiser import Quantiser

T, D, V = 4, 3, 10


def test_nearest_is_that_of_brute_force_in_the_kept_numbers():
    quantiser, vectors = Quantiser(V, D), torch.randn(5, T, D)
    mask = (torch.rand(5, 1, D) < 0.6).double().expand(5, T, D)
    found = quantiser.nearest(vectors, mask)
    for n in range(5):
        for t in range(T):
            apart = [(mask[n, t] * (vectors[n, t] - e)).square().sum() for e in quantiser.codebook]
            torch.testing.assert_close(apart[found[n, t]], min(apart))
    assert not torch.equal(found, quantiser.nearest(vectors, torch.ones_like(mask)))


def test_gradients_of_the_quantiser():
    quantiser = Quantiser(V, D, commitment=0.5).eval()
    vectors = torch.randn(2, T, D, requires_grad=True)
    mask = torch.ones(2, T, D)
    mask[:, -1] = 0
    quantised, penalty = quantiser(vectors, mask)
    nearest = quantiser.codebook[quantiser.nearest(vectors, mask)].detach()
    assert torch.equal(quantised, nearest)
    (through,) = torch.autograd.grad(quantised.sum(), vectors, retain_graph=True)
    assert (through == 1).all()
    to_vectors, to_codebook = torch.autograd.grad(penalty.sum(), [vectors, quantiser.codebook])
    torch.testing.assert_close(to_vectors, 0.5 * 2 * mask * (vectors.detach() - nearest))
    assert (to_codebook.sum(0) - (2 * mask * (nearest - vectors.detach())).sum((0, 1))).abs().max() < 1e-12


def test_unused_vectors_restart_at_the_data():
    quantiser = Quantiser(V, D, restart_after=3)
    data = 5 + torch.randn(30, T, D)
    quantiser(data, torch.ones_like(data))
    assert (quantiser.codebook > 0).all()  # the first pass puts all of them there
    with torch.no_grad():
        quantiser.codebook[0] = -100.0
    for _ in range(4):
        quantiser(data, torch.ones_like(data))
    assert (quantiser.codebook > 0).all()
    before = quantiser.codebook.clone()
    quantiser.eval()(data, torch.ones_like(data))
    assert torch.equal(before, quantiser.codebook)
