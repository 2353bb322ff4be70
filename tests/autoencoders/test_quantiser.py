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
    nearest = quantiser.codebook[quantiser.nearest(vectors, mask)]
    assert torch.equal(quantised, nearest)
    torch.testing.assert_close(penalty, 0.5 * (mask * (vectors - nearest).square()).sum((-2, -1)))
    (through,) = torch.autograd.grad(quantised.sum(), vectors, retain_graph=True)
    assert (through == 1).all()
    (found,) = torch.autograd.grad(penalty.sum(), vectors)
    torch.testing.assert_close(found, 0.5 * 2 * mask * (vectors.detach() - nearest))
    assert not list(quantiser.parameters())


def test_the_codebook_follows_running_means_of_the_numbers_that_are_kept():
    """Against sums over the passes that are weighted one by one; a codebook with other weights is rejected."""
    torch.manual_seed(0)
    quantiser = Quantiser(V, D, decay=0.7, restart_after=100)
    starts = torch.randn(20, T, D)
    quantiser(starts, torch.ones_like(starts))
    with torch.no_grad():
        quantiser.weight.zero_()
    passes = []
    for _ in range(5):
        vectors, mask = torch.randn(20, T, D), (torch.rand(20, 1, D) < 0.7).double().expand(20, T, D)
        passes.append((vectors, mask, quantiser.nearest(vectors, mask)))
        before = quantiser.codebook.clone()
        quantised, _ = quantiser(vectors, mask)
        assert torch.equal(quantised, before[passes[-1][2]])  # it moves after the pass

    def means(decay):
        weights = decay ** torch.arange(4.0, -1.0, -1.0)
        sums, counts = torch.zeros(2, V, D)
        for weight, (vectors, mask, index) in zip(weights, passes, strict=True):
            for v in range(V):
                chosen = (index == v).unsqueeze(-1) * mask
                sums[v] += weight * (chosen * vectors).sum((0, 1))
                counts[v] += weight * chosen.sum((0, 1))
        return sums / counts

    expected = means(0.7)
    used = expected.isfinite()
    assert used.sum() > 0.8 * V * D
    torch.testing.assert_close(quantiser.codebook[used], expected[used])
    assert (quantiser.codebook[used] - means(0.9)[used]).abs().max() > 0.01


def test_numbers_that_are_never_kept_stay_finite_in_float32():
    quantiser = Quantiser(V, D).float()
    vectors, mask = torch.randn(30, T, D).float(), torch.tensor([1.0, 1.0, 0.0]).float().expand(30, T, D)
    quantiser(vectors, torch.ones_like(vectors))
    start = quantiser.codebook[:, 2].clone()
    for _ in range(2000):  # .9 ** 2000 is zero in float32
        quantiser(vectors, mask)
        assert quantiser.codebook.isfinite().all()
    assert quantiser.weight[:, 2].max() < 1e-40
    assert set(quantiser.codebook[:, 2].tolist()) <= set(start.tolist()) | set(vectors[..., 2].flatten().tolist())


def test_the_codebook_keeps_up_with_vectors_that_all_move():
    """By three spreads in 100 passes, as an encoder's do while it learns fast; a slower codebook falls behind."""
    torch.manual_seed(0)
    vectors = torch.randn(100, T, D)
    penalties = {}
    for decay in (0.9, 0.999):
        quantiser = Quantiser(V, D, decay=decay, restart_after=1000)
        with torch.no_grad():
            quantiser.idle.fill_(1000)
        penalties[decay] = [quantiser(vectors + 0.03 * i, torch.ones_like(vectors))[1].mean() for i in range(100)]
    assert max(penalties[0.9]) < 1.2 * penalties[0.9][0]
    assert penalties[0.999][-1] > 1.5 * penalties[0.9][-1]


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
