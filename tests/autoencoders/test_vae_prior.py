"""A VAE whose latents have a prior in which each depends on those before it."""

import pytest
import torch
from oracles import z_scores
from pyro.infer import SVI, Predictive, RenyiELBO, Trace_ELBO, TraceMeanField_ELBO
from pyro.optim import Adam
from shaken import shaken
from torch import Tensor
from torch.distributions import kl_divergence

from models.datasets import Dataset
from models.features import FeatureRecipe, train_features
from pyro_vnd.autoencoders import GaussianLikelihood, LinearGaussianVAE, OrderedVAE, full_length, mlp_bodies
from pyro_vnd.diagnostics import evaluate_prefixes
from pyro_vnd.diagnostics.metrics.generative import generative_metrics
from pyro_vnd.distributions import NestedAutoregressive, NestedNormal
from pyro_vnd.infer import KLWeights, MaskSchedule, NestedELBO, OptimizerSettings, cosine_to_zero, fit, linear

K, N, SHAPE = 4, 3, (1, 4, 4)


def make_vae(**kwargs) -> OrderedVAE:
    """A small one, all of whose parameters have moved from where they start."""
    torch.manual_seed(0)
    options = {"prior_latents": "autoregressive", "tail": "completion"} | kwargs
    vae = OrderedVAE(SHAPE, K, bodies=mlp_bodies(SHAPE, hidden=(12, 10)), **options)
    return shaken(vae, 0.1)


@pytest.fixture
def x() -> Tensor:
    return torch.rand(N, *SHAPE)


@torch.no_grad()
@pytest.mark.parametrize("length", [None, 2, 4])
def test_divergences_are_those_of_draws(length: int | None, x: Tensor):
    """Log-ratios of 50,000 draws an image, by z-score; those from independent latents are rejected."""
    vae = make_vae()
    q, p = vae.encode(x, length), vae.prior(length).expand((N,))
    assert isinstance(p, NestedAutoregressive)
    terms = vae.elbo(x, length, num_samples=20_000)
    z = q.sample((50_000,))
    draws = q.log_prob(z) - p.log_prob(z)
    assert z_scores(draws, terms.kl_latents + terms.kl_lengths).abs().max() < 4
    zeros = torch.zeros(K)
    independent = NestedNormal(zeros, zeros + 1, probs=vae.prior_probs).expand((N,))
    wrong = kl_divergence(q, independent if length is None else independent.cut(length))
    assert z_scores(draws, wrong).abs().max() > 4


def test_a_fit_has_the_terms_of_the_bound(x: Tensor):
    vae = make_vae()
    torch.manual_seed(5)
    terms = vae.elbo(x)
    elbo = NestedELBO()
    torch.manual_seed(5)
    torch.testing.assert_close(elbo.differentiable_loss(vae, vae.guide, x), -terms.elbo.sum())
    torch.testing.assert_close(elbo.kl_lengths["code"], terms.kl_lengths.sum().detach())
    torch.testing.assert_close(elbo.kl["code"], (terms.kl_latents + terms.kl_lengths).sum().detach())


@pytest.mark.parametrize("objective", [Trace_ELBO, TraceMeanField_ELBO])
def test_objectives_of_pyro_agree(objective: type, x: Tensor):
    """Means over 300 evaluations with the same draws, to four standard errors; what the prior costs varies less."""
    vae = make_vae()
    guide, ours = vae.guide, NestedELBO()
    found = []
    for seed in range(300):
        pair = []
        for elbo in (ours, objective()):
            torch.manual_seed(seed)
            pair.append(elbo.loss(vae, guide, x))
        found.append([*pair, float(ours.log_likelihood)])
    mine, theirs, likelihood = torch.tensor(found, dtype=torch.float64).T
    differences = mine - theirs
    assert differences.mean().abs() < 4 * differences.std() / len(differences) ** 0.5
    assert (mine + likelihood).var() < (theirs + likelihood).var()


@pytest.mark.parametrize("objective", [Trace_ELBO, TraceMeanField_ELBO, RenyiELBO(num_particles=2)])
def test_svi_trains_the_prior(objective, x: Tensor):
    vae = make_vae()
    before = [parameter.clone() for parameter in vae.conditioner.parameters()]
    svi = SVI(vae, vae.guide, Adam({"lr": 0.01}), objective() if isinstance(objective, type) else objective)
    assert all(torch.isfinite(torch.tensor(svi.step(x))) for _ in range(3))
    assert all(not torch.equal(old, new) for old, new in zip(before, vae.conditioner.parameters(), strict=True))


@torch.no_grad()
def test_more_draws_give_a_tighter_bound(x: Tensor):
    vae = make_vae()
    one, many = (torch.stack([vae.log_likelihood(x, n) for _ in range(300)]) for n in (1, 30))
    assert (many.mean(0) > one.mean(0)).all()
    single = vae.elbo(x, num_samples=20_000).elbo
    assert z_scores(one, single).abs().max() < 4
    assert z_scores(one, many.mean(0)).abs().max() > 4


@torch.no_grad()
def test_draws_of_the_model_follow_the_prior():
    vae = make_vae()
    codes = Predictive(vae, num_samples=20)(torch.zeros(5, *SHAPE))["code"]
    assert codes.shape == (20, 5, K)
    for length in (1, 3, None):
        assert vae.sample(6, length).shape == (6, *SHAPE)
    # The covariance of whole codes is not that of independent ones: by z-score, draws against draws.
    draws = vae.prior(K).sample((50_000,))
    ranks = (draws - vae.prior(K).given(draws).loc) / vae.prior(K).given(draws).scale
    assert (torch.corrcoef(ranks.T) - torch.eye(K)).abs().max() < 4 / 50_000**0.5
    assert (torch.corrcoef(draws.T) - torch.eye(K)).abs().max() > 10 / 50_000**0.5


def test_with_a_whole_code_it_is_the_plain_model(x: Tensor):
    pinned = make_vae(prior_lengths=full_length(K), posterior_lengths="prior")
    torch.manual_seed(1)
    whole = pinned.elbo(x)
    torch.manual_seed(1)
    given = pinned.elbo(x, K)
    torch.testing.assert_close(whole.elbo, given.elbo)
    assert torch.equal(whole.kl_lengths, torch.zeros(N))


def test_options_are_checked():
    with pytest.raises(ValueError, match=r"`prior_latents` must be one of .*; got 'flow'"):
        make_vae(prior_latents="flow")
    with pytest.raises(ValueError, match="`enumerate_lengths` needs prior_latents='independent'"):
        make_vae(enumerate_lengths=True)
    with pytest.raises(ValueError, match="LinearGaussianVAE: argument `prior_latents` must be 'independent'"):
        LinearGaussianVAE((5,), 3, prior_latents="autoregressive")


def test_no_images_and_one_latent():
    assert make_vae().elbo(torch.zeros(0, *SHAPE)).elbo.shape == make_vae().sample(0).shape[:1] == (0,)
    one = OrderedVAE(SHAPE, 1, bodies=mlp_bodies(SHAPE, hidden=(5,)), prior_latents="autoregressive")
    assert torch.isfinite(one.elbo(torch.rand(N, *SHAPE)).elbo).all()
    assert one.sample(2).shape == (2, *SHAPE)


def test_on_digits_the_bound_is_higher_and_samples_are_nearer(digits: Dataset):
    """Same nets, data and seed: by two nats at least, and a Fréchet distance that is two thirds at most."""
    torch.set_default_dtype(torch.float32)
    features = train_features(digits, FeatureRecipe(channels=(16, 32), num_features=32, num_epochs=10), progress=False)
    held = digits.validation.images
    elbo, distances = {}, {}
    for prior in ("independent", "autoregressive"):
        torch.manual_seed(0)
        vae = OrderedVAE(
            (1, 8, 8),
            num_latents=8,
            bodies=mlp_bodies((1, 8, 8), hidden=(64, 64)),
            likelihood=GaussianLikelihood(8, noise="by_length"),
            tail="completion",
            prior_latents=prior,
        )
        options = {
            "weights": KLWeights(local=linear(0, 1)),
            "schedule": MaskSchedule(0.1, 0.5, 0.4),
            "batch_size": 64,
            "lr": 0.004,
        }
        options |= {"optimizer": OptimizerSettings(lr_schedule=cosine_to_zero()), "progress": False}
        fit(vae, vae.guide, digits.train.images, num_epochs=35, **options)
        with torch.no_grad():
            elbo[prior] = vae.elbo(held, 8, num_samples=50).elbo.mean()
            distances[prior] = torch.tensor(
                [generative_metrics(vae.sample(1500, k), digits.train.images, features.net)["fid"] for k in (4, 8)]
            )
    assert elbo["autoregressive"] > elbo["independent"] + 2
    assert (distances["autoregressive"] < 2 / 3 * distances["independent"]).all()
    scores = evaluate_prefixes(vae, digits.validation, [4, 8], num_importance=5, progress=False)
    assert (scores["iw_bound"].squeeze() > scores["elbo"].squeeze()).all()
