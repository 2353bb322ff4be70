"""A learned prior that is fitted on: what gains, and what stays as it is."""

import pytest
import torch
from shaken import shaken
from torch import Tensor

from pyro_vnd.autoencoders import LinearGaussianVAE, OrderedVAE, OrderedWAE, fit_prior, mlp_bodies

K, SHAPE = 4, (1, 4, 4)


@pytest.fixture
def x() -> Tensor:
    """Images of two kinds, so that the codes of a net with random weights have a law with two humps."""
    torch.manual_seed(1)
    return (0.3 * torch.rand(400, *SHAPE) + 0.7 * (torch.arange(400) % 2).view(-1, 1, 1, 1)).double()


def make_vae(**kwargs) -> OrderedVAE:
    torch.manual_seed(0)
    options = {"prior_latents": "autoregressive"} | kwargs
    return shaken(OrderedVAE(SHAPE, K, bodies=mlp_bodies(SHAPE, hidden=(12, 10)), **options), 0.1)


def mean_kl(vae: OrderedVAE, x: Tensor, length: int) -> float:
    torch.manual_seed(2)
    with torch.no_grad():
        return vae.elbo(x, length, num_samples=50).kl_latents.mean().item()


def test_the_divergence_falls_at_every_length_and_nothing_else_changes(x: Tensor):
    vae = make_vae()
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    kls = [mean_kl(vae, x, length) for length in (1, 2, K)]
    result = fit_prior(vae, x, num_epochs=60, batch_size=100, progress=False)
    after = [mean_kl(vae, x, length) for length in (1, 2, K)]
    assert all(new < 0.2 * old for new, old in zip(after, kls, strict=True)), (kls, after)
    for name, value in vae.state_dict().items():
        assert torch.equal(value, before[name]) != name.startswith("conditioner.") or name.endswith(("mask", "gains"))
    assert len(result.elbo) == 60
    assert result.elbo[-1] == pytest.approx(-mean_kl(vae, x, K), abs=0.1)


def test_draws_have_the_two_humps_of_the_codes(x: Tensor):
    """Between them is none of the codes and .02 of the draws at most; of one Normal's draws it would be a tenth."""
    vae = make_vae()
    with torch.no_grad():
        features = vae.encoder.body(x)
        apart = features[1::2].mean(0) - features[::2].mean(0)
        vae.encoder.heads.weight[0] = 4 * apart / apart.square().sum()
        vae.encoder.heads.bias[0] -= vae.encoder.heads(features)[:, 0].mean()
        vae.encoder.heads.bias[K] = -4.0  # a narrow posterior
        codes = vae.encode(x, K).loc[:, 0]
    low, high = codes[::2].max() + 0.1, codes[1::2].min() - 0.1
    fit_prior(vae, x, num_epochs=200, batch_size=100, lr=0.01, progress=False)
    torch.manual_seed(0)
    draws = vae.prior(K).sample((5000,))[:, 0]
    assert ((draws > low) & (draws < high)).double().mean() < 0.02
    normal = torch.distributions.Normal(codes.mean(), codes.std())
    assert normal.cdf(high) - normal.cdf(low) > 0.1


def test_the_seed_decides_and_random_numbers_are_the_callers(x: Tensor):
    first, second, other = make_vae(), make_vae(), make_vae()
    torch.manual_seed(5)
    fit_prior(first, x, num_epochs=2, progress=False)
    after = torch.rand(2)
    torch.manual_seed(5)
    torch.testing.assert_close(torch.rand(2), after)
    fit_prior(second, x, num_epochs=2, progress=False)
    fit_prior(other, x, num_epochs=2, seed=1, progress=False)
    torch.testing.assert_close(first.state_dict(), second.state_dict(), rtol=0, atol=0)
    assert not torch.equal(first.conditioner.net[0].weight, other.conditioner.net[0].weight)


def test_arguments_are_checked(x: Tensor):
    for model, came in (
        (make_vae(prior_latents="independent"), "prior_latents='independent'"),
        (LinearGaussianVAE((5,), 3), "prior_latents='independent'"),
        (OrderedWAE(SHAPE, K, bodies=mlp_bodies(SHAPE, hidden=(5,))), "OrderedWAE"),
    ):
        with pytest.raises(ValueError, match=f"fit_prior: argument `vae` must be an OrderedVAE .*; got {came}"):
            fit_prior(model, x)
    with pytest.raises(ValueError, match="argument `x`"):
        fit_prior(make_vae(), x[:, :, :3])
    with pytest.raises(ValueError, match="fit_prior: argument `x` has no rows"):
        fit_prior(make_vae(), [])
