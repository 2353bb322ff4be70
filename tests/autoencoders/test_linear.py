"""The linear model, where all is known: its components are principal ones in order, its likelihood has a formula."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from shaken import shaken
from torch import Tensor
from torch.distributions import MultivariateNormal

from models.datasets import load
from pyro_vnd.autoencoders import LinearGaussianVAE, full_length
from pyro_vnd.distributions import NestedNormal, OrderedMask
from pyro_vnd.infer import KLWeights, MaskSchedule, OptimizerSettings, cosine_to_zero, fit

K = 8
# A first fit finds the order. In a step of the second one nearly every image has each of the K budgets once, so that
# the gradient of whole data has hardly any noise of the lengths left. The law pinned to the prior is those budgets.
SCHEDULES = {
    "global": (
        MaskSchedule(0.1, 0.9, 0, law="log-uniform"),
        MaskSchedule(0.005, 0.995, 0, num_particles=K),
    ),
    "prior": (MaskSchedule(0, 1, 0), MaskSchedule(0, 1, 0, num_particles=K)),
}


def synthetic() -> Tensor:
    """300 centred vectors of 32 numbers whose covariance is exact: eigenvalues 4 * .7^i, i = 0..7, and then .02."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 32, generator=generator)
    x = torch.linalg.qr(x - x.mean(0))[0] * math.sqrt(len(x))
    axes = torch.linalg.qr(torch.randn(32, 32, generator=generator))[0]
    return x * torch.cat([4 * 0.7 ** torch.arange(K), torch.full((24,), 0.02)]).sqrt() @ axes.T


def digits() -> Tensor:
    x = load("digits", flatten=True).train.images.double()
    return x - x.mean(0)


DATA = {"synthetic": synthetic, "digits": digits}


def make_vae(x: Tensor, **kwargs: Any) -> LinearGaussianVAE:
    """One whose noise is held at .05, so that all eigenvalues that count are above its square."""
    vae = LinearGaussianVAE((x.shape[1],), K, scale=0.05, **kwargs)
    vae.likelihood.log_scale.requires_grad_(False)
    return vae


def train(vae: LinearGaussianVAE, x: Tensor, num_epochs: int, lr: float, masks: MaskSchedule | None = None) -> None:
    kwargs = {
        "optimizer": OptimizerSettings(lr_schedule=cosine_to_zero()),
        "weights": KLWeights(lengths=100),
        "progress": False,
    }
    fit(vae, vae.guide, x, num_epochs=num_epochs, lr=lr, schedule=masks, **kwargs)


def angles(vae: LinearGaussianVAE, x: Tensor) -> list[float]:
    """The largest angle, in degrees, between the first k columns and the first k eigenvectors, for each k."""
    vectors = torch.linalg.eigh(torch.cov(x.T, correction=0))[1].flip(1)
    found = []
    for k in range(1, K + 1):
        basis = torch.linalg.qr(vae.components(k).detach())[0]
        sines = torch.linalg.svdvals(basis - vectors[:, :k] @ (vectors[:, :k].T @ basis))
        found.append(math.degrees(math.asin(min(sines.max().item(), 1.0))))
    return found


@pytest.mark.parametrize(
    ("data", "posterior", "num_epochs"),
    [("synthetic", "global", 250), ("synthetic", "prior", 250), ("digits", "global", 600)],
)
def test_every_prefix_is_the_principal_subspace(data: str, posterior: str, num_epochs: int):
    x = DATA[data]()
    vae = make_vae(x, posterior_lengths=posterior)
    coarse, fine = SCHEDULES[posterior]
    train(vae, x, num_epochs, 0.1, coarse)
    train(vae, x, 120, 0.05, fine)
    assert max(angles(vae, x)) < 0.8


# A law that was given and not learned, all on the full width, is told of like one that collapsed.
@pytest.mark.filterwarnings("ignore:the law of lengths at site 'code' has collapsed")
@pytest.mark.parametrize("data", DATA)
def test_without_an_order_only_the_whole_subspace_is(data: str):
    """The power test of the one above: the ordinary model has the span of all K components, in no order."""
    x = DATA[data]()
    vae = make_vae(x, posterior_lengths="prior", prior_lengths=full_length(K))
    train(vae, x, 650, 0.1)
    found = angles(vae, x)
    assert found[-1] < 0.8
    assert max(found) > 30


# The likelihood.


def small_vae(**kwargs: Any) -> tuple[LinearGaussianVAE, Tensor]:
    """One of three latents and five pixels that fits nothing, with a guide wide enough for its weights, and images."""
    torch.manual_seed(2)
    prior = OrderedMask(probs=torch.tensor([0.2, 0.5, 0.3]))
    vae = shaken(LinearGaussianVAE((1, 5, 1), 3, prior_lengths=prior, scale=0.8, **kwargs), 0.2)
    with torch.no_grad():
        vae.encoder.heads.weight *= 0.5
        vae.encoder.raw_scale += 0.7
    return vae, torch.randn(4, 1, 5, 1)


@pytest.mark.parametrize("noise", ["shared", "by_length"])
@pytest.mark.parametrize("tail", ["zeros", "filler", "mask"])
def test_exact_log_likelihood_is_that_of_the_marginal_law(tail: str, noise: str):
    """Moments of x given the length by hand, with a dense covariance."""
    vae, x = small_vae(tail=tail, noise=noise)
    entry, sigma = vae.decoder.entry, vae.likelihood.log_scale.exp().expand(3)
    parts = []
    for k in (1, 2, 3):
        mean = entry.bias
        if tail == "filler":
            mean = mean + entry.weight[:, k:] @ vae.decoder.filler[k:]
        elif tail == "mask":
            mean = mean + vae.decoder.shift[:, k:].sum(-1)
        assert torch.equal(vae.components(k), entry.weight[:, :k])
        covariance = vae.components(k) @ vae.components(k).T + sigma[k - 1] ** 2 * torch.eye(5)
        parts.append(MultivariateNormal(mean, covariance).log_prob(x.flatten(1)))
        torch.testing.assert_close(vae.exact_log_likelihood(x, k), parts[-1])
    mixture = (torch.stack(parts) + vae.prior_probs.log().unsqueeze(-1)).logsumexp(0)
    torch.testing.assert_close(vae.exact_log_likelihood(x), mixture)


@pytest.mark.parametrize("posterior", ["prior", "global", "amortised"])
@pytest.mark.parametrize("length", [None, 1, 2, 3])
def test_importance_weights_average_to_the_likelihood(length: int | None, posterior: str):
    """The mean of 100,000 weights over p(x) is one, by its z-score, for each image; wrong weights are rejected."""
    vae, x = small_vae(posterior_lengths=posterior)
    images = x.repeat_interleave(100_000, 0)
    exact = vae.exact_log_likelihood(images, length)
    weights = (vae.log_likelihood(images, 1, length) - exact).exp().detach().reshape(len(x), -1)
    assert z_scores(weights).abs().max() < 4
    # Power: weights 3 % too large, and the likelihood of another length.
    assert z_scores(1.03 * weights).abs().max() > 4
    other = vae.exact_log_likelihood(images, 2 if length == 1 else 1).detach()
    assert z_scores(weights * (exact.detach() - other).exp().reshape(len(x), -1)).abs().max() > 4


def z_scores(weights: Tensor) -> Tensor:
    return (weights.mean(-1) - 1) / weights.std(-1) * math.sqrt(weights.shape[-1])


@pytest.mark.parametrize("length", [None, 2])
def test_the_bound_rises_to_the_likelihood(length: int | None):
    """With 1, 4, 16 ... draws; the ELBO is the bound of one draw."""
    vae, x = small_vae()
    images = x.repeat(2_000, 1, 1, 1)
    bounds = [vae.log_likelihood(images, 4**i, length).mean().item() for i in range(5)]
    gaps = [vae.exact_log_likelihood(x, length).mean().item() - bound for bound in bounds]
    assert all(larger > 1.5 * smaller > 0 for larger, smaller in pairwise(gaps))
    assert vae.elbo(images, length).elbo.mean().item() == pytest.approx(bounds[0], abs=0.1)
    assert gaps[-1] < 0.02


@pytest.mark.parametrize("length", [1, 2, 3])
def test_the_bound_is_the_likelihood_at_the_principal_components(length: int):
    """The optimum of all prefixes at once: columns at right angles have the same posterior at each length."""
    vae, x = small_vae()
    variance = vae.likelihood.log_scale.exp() ** 2
    with torch.no_grad():
        weight = vae.decoder.entry.weight
        weight.copy_(torch.linalg.qr(weight)[0] * torch.tensor([3.0, 2.0, 1.0]))
        precision = weight.square().sum(0) + variance
        vae.encoder.heads.weight[:3] = weight.T / precision.unsqueeze(-1)
        vae.encoder.heads.bias[:3] = -vae.encoder.heads.weight[:3] @ vae.decoder.entry.bias
        vae.encoder.raw_scale.copy_(((variance / precision).sqrt() - 1e-4).expm1().log())
    torch.testing.assert_close(vae.log_likelihood(x, 1, length), vae.exact_log_likelihood(x, length))


def test_the_deviation_is_the_same_for_all_images():
    vae, x = small_vae(posterior_lengths="amortised")
    code = vae.encode(x)
    assert isinstance(code, NestedNormal)
    torch.testing.assert_close(code.scale, code.scale[:1].expand(4, 3))
    assert (code.length_probs.std(0) > 0.01).all()
    loss = -vae.elbo(x).elbo.sum()
    loss.backward()
    assert all((parameter.grad != 0).any() for parameter in vae.parameters())


def test_bad_input():
    vae, x = small_vae()
    for length in (0, 4, 1.5):
        for call in (vae.components, lambda k: vae.exact_log_likelihood(x, k)):
            with pytest.raises(ValueError, match=f"`length` must be integers from 1 to 3; got {length}"):
                call(length)
    with pytest.raises(ValueError, match=r"`x` must be images of shape \(N, 1, 5, 1\); got \(4, 5\)"):
        vae.exact_log_likelihood(x.flatten(1))
    with pytest.raises(ValueError, match="`scale` must be a finite number > 0"):
        LinearGaussianVAE((5,), 3, scale=0.0)
    with pytest.raises(
        ValueError, match="LinearGaussianVAE: argument `tail` must not be 'completion', which is not li"
    ):
        LinearGaussianVAE((5,), 3, tail="completion")
    with pytest.raises(ValueError, match="argument `prior_latents` must be 'independent', or it is not Gaussian"):
        LinearGaussianVAE((5,), 3, prior_latents="autoregressive")
