"""The ordered Wasserstein autoencoder: its objective against a slow oracle, what it drives, and plain WAE as a case."""

import math
from itertools import pairwise

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.contrib.gp.kernels import RBF, RationalQuadratic
from pyro.infer import SVI
from pyro.nn import PyroModule
from torch import nn
from torch.distributions import kl_divergence

from pyro_vnd.autoencoders import OrderedWAE, full_length, mlp_bodies
from pyro_vnd.autoencoders.wae import AggregateMMD, InverseMultiquadratic, squared_mmd
from pyro_vnd.distributions import NestedNormal, OrderedMask, OrderedMaskStraightThrough
from pyro_vnd.infer import LengthCollapseWarning, MaskSchedule, fit, module_local_params

K, N = 4, 30
collapses = pytest.mark.filterwarnings(f"ignore::{LengthCollapseWarning.__module__}.LengthCollapseWarning")


def small(**kwargs):
    torch.manual_seed(0)
    return OrderedWAE((1, 8, 8), K, bodies=mlp_bodies((1, 8, 8), (32,)), **kwargs).double()


@pytest.fixture
def x(images):
    return images[:N]


def slow_mmd(x, y, k):
    n = len(x)
    pairs = [(i, j) for i in range(n) for j in range(n) if i != j]
    return sum(k(x[i], x[j]) + k(y[i], y[j]) - 2 * k(x[i], y[j]) for i, j in pairs) / (n * (n - 1))


def slow_kernel(a, b):
    return sum(2 * s / (2 * s + (a - b).square().sum()) for s in (1, 2, 4)) / 3


# Kernel and discrepancy.


def test_kernel_is_that_of_pyro_at_one_scale():
    x, y = torch.randn(5, 6), torch.randn(3, 6)
    ours = InverseMultiquadratic(6, scales=[6])
    theirs = RationalQuadratic(6, lengthscale=torch.tensor(math.sqrt(6)))
    torch.testing.assert_close(ours(x, y), theirs(x, y).detach())
    torch.testing.assert_close(ours(x).diagonal(), ours(x, diag=True))
    assert InverseMultiquadratic(6).scales == (1, 2, 4, 6)


def test_discrepancy_is_that_of_a_double_loop():
    x, y = torch.randn(7, K), torch.randn(7, K) + 0.5
    torch.testing.assert_close(squared_mmd(x, y, InverseMultiquadratic(K)), slow_mmd(x, y, slow_kernel))


def test_discrepancy_of_pairs_with_one_length_is_unbiased():
    # Code and draw of the prior share a length, as under a MaskSchedule; 2,000 batches of 10 pairs.
    def mean_and_error(shift):
        lengths = torch.randint(1, K + 1, (2000, 10))
        law = NestedNormal(torch.zeros(K), torch.ones(K), torch.zeros(K)).expand((2000, 10)).cut(lengths)
        x, y = law.sample(), law.sample()
        values = torch.stack([squared_mmd(a + shift * (a != 0), b, kernel) for a, b in zip(x, y, strict=True)])
        return values.mean(), values.std() / 2000**0.5

    kernel = InverseMultiquadratic(K)
    mean, error = mean_and_error(0.0)
    assert abs(mean / error) < 3.5
    mean, error = mean_and_error(0.2)
    assert mean / error > 5


# The objective.


PARTICLES = [{}, {"num_particles": 3}, {"num_particles": 3, "vectorize_particles": True, "max_plate_nesting": 1}]


@pytest.mark.parametrize("particles", PARTICLES)
def test_objective_is_likelihood_less_discrepancy_and_kl_of_lengths(particles, x):
    wae = small()
    with torch.no_grad():
        wae.encoder.heads.weight[2 * K :].normal_(0.0, 10.0)
    losses = [wae.objective(300.0, 20.0, **particles).loss(wae, wae.guide, x) for _ in range(50)]
    q, prior, kernel = wae.encode(x), wae.prior(), InverseMultiquadratic(K)
    parts = []
    for _ in range(200):
        code = q.sample()
        likelihood = wae.likelihood_given(code, NestedNormal.mask_of(code)).log_prob(x).sum()
        parts.append(torch.stack([-likelihood, 300 * N * squared_mmd(code, prior.sample((N,)), kernel)]).detach())
    lengths = 20 * kl_divergence(q.mask_law, prior.mask_law).sum().item()
    losses, parts = torch.tensor(losses), torch.stack(parts)
    error = (losses.var() / 50 + parts.sum(-1).var() / 200).sqrt()
    expected = parts.mean(0).sum() + lengths
    assert abs(losses.mean() - expected) < 3.5 * error
    for wrong in (lengths / 2, parts[:, 1].mean() / 2):  # a weight off by a half is seen
        assert abs(losses.mean() - expected + wrong) > 3.5 * error


@collapses
def test_with_full_width_it_is_a_plain_wae(x):
    wae = small(prior_lengths=full_length(K), posterior_lengths="prior")
    guide, kernel = wae.guide, InverseMultiquadratic(K)
    torch.manual_seed(1)
    with module_local_params(wae, guide):
        loss = AggregateMMD(kernel, 50.0).differentiable_loss(wae, guide, x)
    loss.backward()
    ours = {name: p.grad.clone() for name, p in wae.named_parameters()}
    wae.zero_grad()
    torch.manual_seed(1)
    mean, raw = wae.encoder.heads(wae.encoder.body(x)).chunk(2, -1)
    torch.rand(N, 1)  # the mask's
    z = mean + (nn.functional.softplus(raw) + 1e-4) * torch.randn(N, K)
    outputs = wae.decoder.body(wae.decoder.entry(z))
    likelihood = torch.distributions.Normal(outputs, wae.likelihood.log_scale.exp()).log_prob(x).sum()
    torch.rand(N, 1)
    plain = -likelihood + 50.0 * N * squared_mmd(z, torch.randn(N, K), kernel)
    torch.testing.assert_close(loss, plain, rtol=1e-12, atol=0)
    plain.backward()
    for name, p in wae.named_parameters():
        torch.testing.assert_close(ours[name], p.grad, rtol=1e-9, atol=1e-11)


class Shifted(PyroModule):
    """Codes that do not depend on the data, whose law is off the prior."""

    def __init__(self):
        super().__init__()
        self.loc, self.raw = nn.Parameter(torch.full((2,), 1.5)), nn.Parameter(torch.full((2,), -2.0))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("code", dist.Normal(self.loc, self.raw.exp()).to_event(1))


def standard_codes(x):
    with pyro.plate("data", len(x)):
        pyro.sample("code", dist.Normal(torch.zeros(2), torch.ones(2)).to_event(1))
        pyro.sample("x", dist.Normal(torch.zeros(()), torch.ones(())), obs=x)


@pytest.mark.parametrize("kernel", [InverseMultiquadratic(2), RBF(2, lengthscale=torch.tensor(2.0))])
def test_its_gradient_moves_the_aggregate_posterior_to_the_prior(kernel):
    x = torch.randn(300)
    arguments = {"num_epochs": 100, "batch_size": 100, "lr": 0.05, "progress": False}
    moved, left = Shifted(), Shifted()
    fit(standard_codes, moved, x, elbo=AggregateMMD(kernel, 10.0), **arguments)
    fit(standard_codes, left, x, elbo=AggregateMMD(kernel, 0.0), **arguments)
    assert moved.loc.abs().max() < 0.25
    assert (moved.raw.exp() - 1).abs().max() < 0.25
    assert (left.loc == 1.5).all()


@pytest.mark.parametrize("batch_size", [10, N])
def test_balance_of_likelihood_and_discrepancy_is_by_row(batch_size):
    x = torch.randn(N)
    guide = Shifted()
    arguments = {"num_epochs": 40, "lr": 1e-30, "optimizer": torch.optim.SGD, "progress": False}
    kl = {}
    for scale in (0.0, 5.0):
        result = fit(standard_codes, guide, x, batch_size=batch_size, elbo=AggregateMMD(_rbf(), scale), **arguments)
        kl[scale] = torch.tensor(result.kl)
        likelihood = dist.Normal(0.0, 1.0).log_prob(x).mean().item()
        assert torch.tensor(result.log_likelihood).mean().item() == pytest.approx(likelihood)
    assert kl[0.0].abs().max() < 1e-9
    codes, draws = 1.5 + math.exp(-2) * torch.randn(1500, 2), torch.randn(1500, 2)
    expected = 5 * squared_mmd(codes, draws, _rbf()).item()
    error = kl[5.0].std().item() / 40**0.5
    assert abs(kl[5.0].mean().item() - expected) < 4 * error + 0.02 * expected
    assert abs(kl[5.0].mean().item() - 1.2 * expected) > 4 * error + 0.02 * expected


def _rbf():
    return RBF(2, lengthscale=torch.tensor(2.0))


def test_cut_codes_meet_prior_draws_of_their_lengths(x):
    seen = []

    class Spy(InverseMultiquadratic):
        def forward(self, x, y=None, diag=False):
            if y is not None:
                seen.append(((x != 0).sum(-1), (y != 0).sum(-1)))
            return super().forward(x, y, diag)

    wae = small()
    masks = MaskSchedule(0.0, 0.8, 0.2)
    fit(wae, wae.guide, x, num_epochs=3, batch_size=15, elbo=AggregateMMD(Spy(K)), schedule=masks, progress=False)
    free, *cut = seen  # the first call, before the first step, is free
    assert not torch.equal(*free)
    assert len(cut) == 6
    assert all(torch.equal(*lengths) for lengths in cut)
    assert len(cut[0][0].unique()) > 1


def test_masks_of_their_own_pay_their_exact_kl(x):
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("mask", OrderedMask.uniform(K))

    law = OrderedMaskStraightThrough(0.2, logits=torch.arange(4.0))

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("mask", law)

    loss = AggregateMMD(InverseMultiquadratic(K), length_weight=3.0).loss(model, guide, x)
    assert loss == pytest.approx(3 * N * kl_divergence(law, OrderedMask.uniform(K)).item())


def test_svi_trains_it_without_parameters_of_the_kernel(x):
    pyro.clear_param_store()
    wae = small()
    objective = AggregateMMD(RBF(K, lengthscale=torch.tensor(2.0)), 10.0)
    svi = SVI(wae, wae.guide, pyro.optim.Adam({"lr": 0.003}), objective)
    losses = [svi.step(x) for _ in range(60)]
    assert sum(losses[-5:]) < sum(losses[:5]) - 5 * 10 * N
    assert not any("lengthscale" in name for name in pyro.get_param_store())
    pyro.clear_param_store()


# Training.


def test_orders_codes_of_real_digits_that_follow_the_prior(images):
    fitted = {}
    for mmd_scale in (0.0, 100.0):
        torch.manual_seed(0)
        wae = OrderedWAE((1, 8, 8), 6, bodies=mlp_bodies((1, 8, 8), (64,)))
        arguments = {"num_epochs": 20, "batch_size": 64, "lr": 0.005, "schedule": MaskSchedule(), "progress": False}
        result = fit(wae, wae.guide, images, elbo=wae.objective(mmd_scale), **arguments)
        fitted[mmd_scale] = wae
        assert result.elbo[-1] > result.elbo[0] + 20
    errors = [(fitted[100.0].reconstruct(images, k) - images).square().mean().item() for k in range(1, 7)]
    assert errors[0] < images.var(0).mean()
    assert all(longer < shorter for shorter, longer in pairwise(errors))
    assert errors[-1] < 0.6 * errors[0]
    # Means over draws: those of one have a spread of a third.
    draws = torch.tensor([[fitted[scale].mmd(images, length=3) for scale in (0.0, 100.0)] for _ in range(20)])
    free, held = draws.mean(0)
    assert held < 0.5 * free


def test_prefix_sample_and_narrow_nets(x):
    wae = small(tail="mask")
    encoder, decoder = wae.narrow(2)
    torch.testing.assert_close(encoder(x), wae.embed(x, 2)[:, :2])
    torch.testing.assert_close(decoder(encoder(x)), wae.reconstruct(x, 2))
    assert wae.sample(3, 2).shape == (3, 1, 8, 8)


# Bad input.


@pytest.mark.parametrize("weights", [{"mmd_scale": -1.0}, {"mmd_scale": math.nan}, {"length_weight": math.inf}])
def test_weights_are_checked(weights):
    with pytest.raises(ValueError, match=f"`{next(iter(weights))}` must be finite and >= 0"):
        small().objective(**weights)


def test_kernels_are_checked():
    with pytest.raises(ValueError, match="`num_latents` must be an integer >= 1; got 0"):
        InverseMultiquadratic(0)
    with pytest.raises(ValueError, match="`scales` must be finite and > 0"):
        InverseMultiquadratic(2, scales=[0.0])
    with pytest.raises(ValueError, match="`kernel` is over 3 numbers; codes have 4"):
        squared_mmd(torch.randn(5, 4), torch.randn(5, 4), InverseMultiquadratic(3))
    with pytest.raises(ValueError, match="two or more pairs of codes"):
        squared_mmd(torch.randn(1, 4), torch.randn(1, 4), InverseMultiquadratic(4))


def test_latents_outside_the_plate_and_discrete_ones_are_refused(x):
    def outside(x):
        pyro.sample("w", dist.Normal(0.0, 1.0))

    def discrete(x):
        with pyro.plate("data", len(x)):
            pyro.sample("w", dist.Bernoulli(torch.tensor(0.5)))

    objective = AggregateMMD(InverseMultiquadratic(1))
    with pytest.raises(ValueError, match="site 'w' is not in the plate 'data'"):
        objective.loss(outside, outside, x)
    with pytest.raises(ValueError, match="site 'w' must be reparameterised"):
        objective.loss(discrete, discrete, x)
