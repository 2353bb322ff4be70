"""The Normal laws of a block: draws, densities and gradients."""

import pytest
import torch
from torch.distributions import MultivariateNormal, kl_divergence

from pyro_vnd.infer._conditional.tables import TableNormal

D = 3


def make(correlated: bool = True, batch: tuple[int, ...] = (2,)) -> TableNormal:
    generator = torch.Generator().manual_seed(0)

    def parameter(*shape: int) -> torch.Tensor:
        return (0.5 * torch.randn(shape, generator=generator)).requires_grad_()

    lower = parameter(*batch, D, D) if correlated else None
    center, spread = torch.tensor([1.0, 0.0, -2.0]), torch.tensor([0.5, 1.0, 2.0])
    return TableNormal(parameter(*batch, D), parameter(*batch, D), lower, center, spread)


def exact(law: TableNormal) -> MultivariateNormal:
    scale = torch.diag_embed(law.log_scale.exp())
    if law.lower is not None:
        scale = (law.lower.tril(-1) + torch.eye(D)) @ scale
    return MultivariateNormal(law.center + law.spread * law.loc, scale_tril=law.spread.unsqueeze(-1) * scale)


@pytest.mark.parametrize("correlated", [True, False])
def test_density_is_that_of_the_normal(correlated: bool):
    law = make(correlated)
    value = torch.randn(5, 2, D)
    torch.testing.assert_close(law.log_prob(value), exact(law).log_prob(value))
    torch.testing.assert_close(law.stddev, exact(law).stddev)


@pytest.mark.parametrize("correlated", [True, False])
def test_draws_have_the_moments_of_the_normal(correlated: bool):
    """Whitened by the exact law, 20,000 draws have mean zero and variance one; z-scores at most 4.5."""
    torch.manual_seed(0)
    law = make(correlated)
    with torch.no_grad():
        drawn, normal = law.rsample((20_000,)), exact(law)
        white = torch.linalg.solve_triangular(normal.scale_tril, (drawn - normal.mean).unsqueeze(-1), upper=False)
        white = white.squeeze(-1)
        assert (white.mean(0).abs() * 20_000**0.5 < 4.5).all()
        second = (white.unsqueeze(-1) * white.unsqueeze(-2)).mean(0) - torch.eye(D)
        assert (second.abs() * (20_000 / 2) ** 0.5 < 4.5).all()
        torch.testing.assert_close(law.of_noise(law.noise_of(drawn)), drawn)


def test_at_the_posterior_the_gradient_has_no_noise_and_elsewhere_it_is_that_of_the_kl():
    """One draw each: zero where p = q. 20,000 draws: the gradient of the exact KL, by z-scores."""
    law = make(batch=())
    parameters = [law.loc, law.log_scale, law.lower]
    target = exact(law)
    target = MultivariateNormal(target.mean.detach(), scale_tril=target.scale_tril.detach())
    for _ in range(3):
        z = law.rsample()
        gradients = torch.autograd.grad(law.log_prob(z) - target.log_prob(z), parameters, allow_unused=True)
        assert all(gradient.abs().max() < 1e-5 for gradient in gradients)
    other = MultivariateNormal(torch.zeros(D), torch.eye(D))
    expected = torch.autograd.grad(kl_divergence(exact(law), other), parameters)
    torch.manual_seed(0)
    draws = []
    for _ in range(400):
        z = law.rsample((50,))
        gradients = torch.autograd.grad((law.log_prob(z) - other.log_prob(z)).mean(), parameters)
        draws.append(torch.cat([gradient.flatten() for gradient in gradients]))
    stacked = torch.stack(draws)
    wanted = torch.cat([gradient.flatten() for gradient in expected])
    assert ((stacked.mean(0) - wanted).abs() < 4.5 * stacked.std(0) / 20 + 1e-6).all()
    assert (wanted.abs() > 10 * stacked.std(0) / 20).any()  # power


def test_weights_and_factors():
    law = make()
    z = law.rsample()
    weights = torch.tensor([1.0, 0.0, 0.5])
    law.weights = weights
    terms = law.log_prob_of(z, law.noise_of(z), None)
    torch.testing.assert_close(law.log_prob(z), (weights * terms).sum(-1))
    law.weights = None
    gradients = []
    for factor in (None, torch.tensor([[3.0], [0.5]])):
        law.factor = factor
        torch.manual_seed(0)
        z = law.rsample()
        (gradient,) = torch.autograd.grad((law.log_prob(z) + z.square().sum(-1)).sum(), law.loc)
        gradients.append(gradient)
    torch.testing.assert_close(gradients[1], gradients[0] * torch.tensor([[3.0], [0.5]]))


def test_laws_can_share_their_noise():
    law = make(correlated=False, batch=(4, 1)).expand([4, 6])
    law.common = (-2,)
    noise = law.noise_of(law.rsample().detach())
    torch.testing.assert_close(noise, noise[:1].expand_as(noise), rtol=1e-4, atol=1e-5)
    assert noise[0].std() > 0.1
