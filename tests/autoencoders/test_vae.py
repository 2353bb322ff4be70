"""The bound of an ordered VAE and its gradient, against sums over the lengths and against an ordinary VAE."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from numpy.polynomial.hermite_e import hermegauss
from oracles import z_scores
from pyro.infer import ELBO, SVI, RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from pyro.optim import Adam
from shaken import shaken
from torch import Tensor, nn
from torch.distributions import kl_divergence

from pyro_vnd.autoencoders import GaussianLikelihood, OrderedVAE, full_length, mlp_bodies
from pyro_vnd.distributions import OrderedMask, OrderedMaskStraightThrough
from pyro_vnd.infer import NestedELBO, fit

K, N, D = 3, 4, 5
PRIOR = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)


def make_vae(seed: int = 0, **kwargs: Any) -> OrderedVAE:
    """A small one, all of whose parameters have moved from where they start."""
    torch.manual_seed(seed)
    likelihood = GaussianLikelihood(K, noise="by_length", scale=0.7)
    kwargs = {
        "bodies": mlp_bodies((D,), hidden=(6,)),
        "likelihood": likelihood,
        "prior_lengths": OrderedMask(probs=PRIOR),
    } | kwargs
    vae = OrderedVAE((D,), K, **kwargs)
    return shaken(vae, 0.3)


@pytest.fixture
def x() -> Tensor:
    return torch.rand(N, D, generator=torch.Generator().manual_seed(1))


def enumerated_elbo(vae: OrderedVAE, x: Tensor, prior: Tensor = PRIOR) -> Tensor:
    """Sum over the lengths, integrate over the kept latents by 24-point Gauss-Hermite, term by term; shape (N,)."""
    points, weights = (torch.from_numpy(values) for values in hermegauss(24))
    weights = weights / weights.sum()
    q = vae.encode(x)
    total = torch.zeros(N)
    for k in (1, 2, 3):
        grid = torch.cartesian_prod(*[points] * k).reshape(-1, 1, k)
        volume = torch.cartesian_prod(*[weights] * k).reshape(-1, k).prod(-1)
        z = torch.zeros(len(grid), N, K)
        z[..., :k] = q.loc[:, :k] + q.scale[:, :k] * grid
        mask = (torch.arange(K) < k).double().expand_as(z)
        likelihood = volume @ vae.likelihood_given(z, mask).log_prob(x)
        latents = kl_divergence(dist.Normal(q.loc, q.scale), dist.Normal(0.0, 1.0))[:, :k].sum(-1)
        lengths = q.length_probs[:, k - 1].log() - prior[k - 1].log()
        total = total + q.length_probs[:, k - 1] * (likelihood - latents - lengths)
    return total


# Values.


@pytest.mark.parametrize("posterior", ["prior", "global", "amortised"])
@pytest.mark.parametrize("tail", ["zeros", "filler", "mask"])
@torch.no_grad()
def test_the_bound_is_a_sum_over_lengths(tail: str, posterior: str, x: Tensor):
    """The mean of 20,000 draws, by z-score for each image; another prior of the lengths is rejected."""
    vae = make_vae(tail=tail, posterior_lengths=posterior)
    draws = torch.stack([vae.elbo(rows.expand(20_000, D)).elbo for rows in x], -1)
    assert z_scores(draws, enumerated_elbo(vae, x)).abs().max() < 4
    assert z_scores(draws, enumerated_elbo(vae, x, torch.tensor([0.5, 0.2, 0.3]))).abs().max() > 4


@torch.no_grad()
def test_divergences_are_those_of_draws(x: Tensor):
    """Of 50,000 draws for each image, by z-score; the terms without gates, or without the lengths, are rejected."""
    vae = make_vae()
    terms, q, p = vae.elbo(x), vae.encode(x), vae.prior()
    z = q.sample((50_000,))
    draws = q.log_prob(z) - p.log_prob(z)
    assert z_scores(draws, terms.kl_latents + terms.kl_lengths).abs().max() < 4
    ungated = kl_divergence(q.normal, dist.Normal(0.0, 1.0)).sum(-1) + terms.kl_lengths
    for wrong in (ungated, terms.kl_latents):
        assert z_scores(draws, wrong).abs().max() > 4
    by_length = torch.stack([vae.elbo(x, k).kl_latents for k in (1, 2, 3)], -1)
    torch.testing.assert_close((q.length_probs * by_length).sum(-1), terms.kl_latents)
    assert torch.equal(vae.elbo(x, 2).kl_lengths, torch.zeros(N))


def test_a_fit_has_the_terms_of_the_bound(x: Tensor):
    """One step of `fit` on the same draws; its parts are the mean terms of the images."""
    vae = make_vae()
    torch.manual_seed(5)
    terms = vae.elbo(x)
    elbo = NestedELBO()
    torch.manual_seed(5)
    loss = elbo.differentiable_loss(vae, vae.guide, x)
    torch.testing.assert_close(loss, -terms.elbo.sum())
    torch.testing.assert_close(elbo.log_likelihood, terms.log_likelihood.sum().detach())
    torch.testing.assert_close(elbo.kl_lengths["code"], terms.kl_lengths.sum().detach())
    result = fit(vae, vae.guide, x, num_epochs=1, lr=1e-9, progress=False)
    assert result.kl_latents[0] == pytest.approx(terms.kl_latents.mean().item(), rel=1e-6)
    assert result.kl_lengths[0] == pytest.approx(terms.kl_lengths.mean().item(), rel=1e-6)


def test_bits_per_dim_and_chunks(x: Tensor):
    """Chunks change which numbers are drawn together and not which numbers, here where nothing is random but z."""
    vae = make_vae(posterior_lengths="prior", prior_lengths=full_length(K))
    with torch.no_grad():
        vae.decoder.entry.weight.zero_()  # the likelihood ignores z,
        vae.encoder.heads.weight.zero_()  # and q is p: each weight is the likelihood
        vae.encoder.heads.bias[:K] = 0
        vae.encoder.heads.bias[K:] = torch.tensor(1 - 1e-4).expm1().log()
    nats = vae.log_likelihood(x, 7, chunk_size=N * 2)
    expected = vae.likelihood_given(torch.zeros(K), torch.ones(K)).log_prob(x)
    torch.testing.assert_close(nats, expected)
    bits = vae.log_likelihood(x, 1, unit="bits_per_dim")
    torch.testing.assert_close(bits * D * torch.tensor(2.0).log(), -expected)


def test_numbers_and_units_are_checked(x: Tensor):
    vae = make_vae()
    with pytest.raises(ValueError, match="`num_samples` must be an integer >= 1; got 0"):
        vae.log_likelihood(x, 0)
    with pytest.raises(ValueError, match="`chunk_size` must be an integer >= 1; got 0"):
        vae.log_likelihood(x, 1, chunk_size=0)
    with pytest.raises(ValueError, match="`num_samples` must be an integer >= 1; got 0"):
        vae.elbo(x, num_samples=0)
    with pytest.raises(ValueError, match="`unit` must be 'nats' or 'bits_per_dim'; got 'bits'"):
        vae.log_likelihood(x, unit="bits")


# Gradients.


@pytest.mark.parametrize("tail", ["zeros", "mask"])
def test_enumeration_gives_the_bound_and_its_gradient(tail: str, x: Tensor):
    """TraceEnum_ELBO, 40 times 200 draws, against quadrature: z-scores of loss and gradient; 5 % more is rejected."""
    vae = make_vae(tail=tail, enumerate_lengths=True)
    guide, elbo = vae.guide, TraceEnum_ELBO(max_plate_nesting=1)
    losses = [elbo.differentiable_loss(vae, guide, x.repeat(200, 1)) / 200 for _ in range(40)]
    found = torch.stack([torch.cat([loss.detach().reshape(1), length_gradient(vae, loss)]) for loss in losses])
    exact = -enumerated_elbo(vae, x).sum()
    expected = torch.cat([exact.detach().reshape(1), length_gradient(vae, exact)])
    assert z_scores(found, expected).abs().max() < 4
    assert z_scores(found, 1.05 * expected).abs().max() > 4


def length_gradient(vae: OrderedVAE, loss: Tensor) -> Tensor:
    """The gradient with respect to the biases of the logits of q(L | x)."""
    return torch.autograd.grad(loss, vae.encoder.heads.bias)[0][-K:]


def straight_through_gradient(vae: OrderedVAE, x: Tensor, num_draws: int) -> Tensor:
    terms = vae.elbo(x, num_samples=num_draws)
    return length_gradient(vae, -terms.elbo.sum())


def agreement(found: Tensor, expected: Tensor) -> tuple[float, float]:
    """Cosine, and norm of the difference relative to the norm."""
    return (found @ expected / found.norm() / expected.norm()).item(), (
        (found - expected).norm() / expected.norm()
    ).item()


def test_the_straight_through_gradient_points_the_right_way(x: Tensor, monkeypatch: pytest.MonkeyPatch):
    """Cosine and relative bias in five models, 20,000 draws each; lengths that pass no gradient are rejected.

    Then only the exact divergences drive them, and what the likelihood says is lost.
    """
    found, cut = [], []
    for seed in range(5):
        vae = make_vae(seed)
        expected = length_gradient(vae, -enumerated_elbo(vae, x).sum())
        found.append(agreement(straight_through_gradient(vae, x, 20_000), expected))
        with monkeypatch.context() as patch:
            draw = OrderedMaskStraightThrough.rsample
            patch.setattr(OrderedMaskStraightThrough, "rsample", lambda *a: draw(*a).detach())  # noqa: B023
            cut.append(agreement(straight_through_gradient(vae, x, 20_000), expected))
    assert min(cosine for cosine, _ in found) > 0.9
    assert max(error for _, error in found) < 0.5
    assert min(cosine for cosine, _ in cut) < 0.9
    assert max(error for _, error in cut) > 0.5


def loss_and_gradients(elbo: ELBO, model: Any, guide: Any, module: nn.Module, x: Tensor) -> list[Tensor]:
    module.zero_grad()
    loss = elbo.loss_and_grads(model, guide, x)
    return [torch.as_tensor(loss), *(parameter.grad.clone() for parameter in module.parameters())]


# An ordinary VAE.


class PlainVAE(nn.Module):
    """An ordinary VAE in plain Pyro, with the weights of an ordered one."""

    def __init__(self, vae: OrderedVAE) -> None:
        super().__init__()
        self.body, self.heads = vae.encoder.body, vae.encoder.heads
        self.decoder = nn.Sequential(vae.decoder.entry, vae.decoder.body)
        self.log_scale = vae.likelihood.log_scale

    def model(self, x: Tensor) -> None:
        pyro.module("plain", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(K), torch.ones(K)).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), self.log_scale[-1].exp()).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("plain", self)
        loc, raw_scale = self.heads(self.body(x)).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, nn.functional.softplus(raw_scale) + 1e-4).to_event(1))


@pytest.mark.parametrize("elbo", [NestedELBO, TraceMeanField_ELBO, Trace_ELBO, lambda: RenyiELBO(num_particles=3)])
@pytest.mark.parametrize("noise", ["shared", "by_length"])
def test_at_full_width_it_is_the_ordinary_vae(noise: str, elbo: Callable[[], Any], x: Tensor):
    """Loss and all gradients with the same noise; with another law of lengths they differ."""
    laws = {"prior_lengths": full_length(K), "posterior_lengths": "prior", "likelihood": GaussianLikelihood(K, noise)}
    vae, other = make_vae(**laws), make_vae(**laws | {"prior_lengths": OrderedMask(probs=torch.tensor([0, 0.2, 0.8]))})
    plain = PlainVAE(vae)
    results = []
    for model, guide, module in (
        (vae, vae.guide, vae),
        (plain.model, plain.guide, vae),
        (other, other.guide, other),
    ):
        noise_of = torch.Generator().manual_seed(3)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "randn", lambda *s, **_: torch.empty(*s).normal_(generator=noise_of))  # noqa: B023
            patch.setattr(
                "torch.distributions.normal._standard_normal",
                lambda shape, dtype, device: torch.empty(shape).normal_(generator=noise_of),  # noqa: B023
            )
            results.append(loss_and_gradients(elbo(), model, guide, module, x))
    for ordered, ordinary in zip(*results[:2], strict=True):
        torch.testing.assert_close(ordered, ordinary)
    assert not torch.isclose(results[0][0], results[2][0])


# Pyro's own training.

OBJECTIVES = {
    "importance weighted": lambda: RenyiELBO(alpha=0, num_particles=2, vectorize_particles=True),
    "mean field": TraceMeanField_ELBO,
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_svi_trains_every_parameter(name: str, images: Tensor):
    """Forty steps on digits improve the bound by more than 20 nats, and each parameter has a gradient."""
    torch.manual_seed(0)
    x = images[:256].flatten(1)
    vae = OrderedVAE((64,), 6, bodies=mlp_bodies((64,), hidden=(32,)), tail="mask")
    guide = vae.guide
    before = vae.log_likelihood(x, 20).mean()
    svi = SVI(vae, guide, Adam({"lr": 0.01}), OBJECTIVES[name]())
    for _ in range(40):
        svi.step(x)
    assert vae.log_likelihood(x, 20).mean() > before + 20
    gradients = loss_and_gradients(OBJECTIVES[name](), vae, guide, vae, x)[1:]
    assert all(torch.isfinite(gradient).all() and (gradient != 0).any() for gradient in gradients)
