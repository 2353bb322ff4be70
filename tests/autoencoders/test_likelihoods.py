"""Laws of images: one scale for many pixels, a scale for each length, and pixels that must be in [0, 1]."""

import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from torch import Tensor

from pyro_vnd.autoencoders import (
    BernoulliLikelihood,
    ContinuousBernoulliLikelihood,
    GaussianLikelihood,
    OrderedVAE,
    mlp_bodies,
)
from pyro_vnd.autoencoders.likelihoods import IsotropicNormal

SHAPE = (2, 3)


# One scale for many pixels: the law of torch's independent Normals, scored without an array of scales.


def laws(loc: Tensor, scale: Tensor) -> tuple[IsotropicNormal, dist.Independent]:
    wide = scale.reshape((*scale.shape, 1, 1)) if scale.dim() else scale
    return IsotropicNormal(loc, scale, 2), dist.Normal(loc, wide).to_event(2)


@pytest.mark.parametrize("scale_shape", [(), (5,), (4, 5), (4, 1)])
@pytest.mark.parametrize("value_shape", [SHAPE, (5, *SHAPE), (4, 5, *SHAPE), (7, 4, 5, *SHAPE)])
def test_it_is_a_product_of_normals(scale_shape: tuple[int, ...], value_shape: tuple[int, ...]):
    loc, scale = torch.randn(4, 5, *SHAPE, dtype=torch.float64), torch.rand(scale_shape, dtype=torch.float64) + 0.1
    value = torch.randn(value_shape, dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (loc, scale, value)]
    ours, theirs = laws(loc, scale)
    assert (ours.batch_shape, ours.event_shape) == (theirs.batch_shape, theirs.event_shape)
    for name in ("mean", "stddev", "variance"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name))
    scores = ours.log_prob(value), theirs.log_prob(value)
    torch.testing.assert_close(*scores)
    for gradients in zip(*(torch.autograd.grad(score.square().sum(), inputs) for score in scores), strict=True):
        torch.testing.assert_close(*gradients)


def test_second_derivatives_and_vmap():
    loc, scale = torch.randn(5, *SHAPE, dtype=torch.float64), torch.rand(5, dtype=torch.float64) + 0.5
    value = torch.randn(5, *SHAPE, dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (loc, scale, value)]
    assert torch.autograd.gradgradcheck(lambda m, s, x: IsotropicNormal(m, s, 2).log_prob(x), inputs)
    scores = torch.vmap(lambda m, s, x: IsotropicNormal(m, s, 2).log_prob(x))(loc, scale, value)
    torch.testing.assert_close(scores, IsotropicNormal(loc, scale, 2).log_prob(value))


def test_expanding_and_no_images_at_all():
    law = IsotropicNormal(torch.zeros(5, *SHAPE), torch.arange(1.0, 6.0), 2)
    wide = law.expand((3, 5))
    assert wide.batch_shape == (3, 5)
    assert wide.rsample((2,)).shape == (2, 3, 5, *SHAPE)
    torch.testing.assert_close(wide.log_prob(torch.ones(SHAPE)), law.log_prob(torch.ones(SHAPE)).expand(3, 5))
    none = IsotropicNormal(torch.zeros(0, *SHAPE), torch.zeros(0), 2)
    assert none.log_prob(torch.zeros(0, *SHAPE)).shape == (0,)


def test_draws_follow_the_law():
    """Of 20,000 draws for each of three scales, by Kolmogorov and Smirnov; a scale off by a twentieth is found."""
    torch.manual_seed(0)
    scale = torch.tensor([0.1, 1.0, 30.0], dtype=torch.float64)
    law = IsotropicNormal(torch.full((3, 4, 5), 2.0, dtype=torch.float64), scale, 2)
    draws = (law.sample((1000,)) - 2) / scale.reshape(3, 1, 1)
    for standard in draws.unbind(1):
        assert stats.kstest(standard.flatten(), "norm").pvalue > 0.001
        assert stats.kstest(1.05 * standard.flatten(), "norm").pvalue < 0.05


def test_values_are_checked():
    message = r"`value` must have a shape that broadcasts with \(5, 2, 3\); got \(4, 2, 3\)"
    with pytest.raises(ValueError, match=message):
        IsotropicNormal(torch.zeros(5, *SHAPE), torch.ones(5), 2).log_prob(torch.zeros(4, *SHAPE))


# Likelihoods.


def test_noise_by_length_is_the_shared_one_at_full_width():
    shared, by_length = GaussianLikelihood(4), GaussianLikelihood(4, noise="by_length")
    with torch.no_grad():
        shared.log_scale.fill_(-1.2)
        by_length.log_scale.copy_(torch.tensor([0.5, 0.2, -0.3, -1.2]))
    outputs, x = torch.randn(3, *SHAPE), torch.rand(3, *SHAPE)
    scores = [likelihood.law(outputs, torch.ones(3, 4), 2).log_prob(x) for likelihood in (shared, by_length)]
    torch.testing.assert_close(*scores)
    law = by_length.law(outputs, (torch.arange(4) < 3).double().expand(3, 4), 2)
    torch.testing.assert_close(law.stddev.log(), torch.full(x.shape, -0.3))


@pytest.mark.parametrize(
    ("option", "value"), [("noise", "none"), ("mean", "tanh"), ("scale", 0.0), ("scale", 1e-310), ("scale", 10**400)]
)
def test_options_are_checked(option: str, value: object):
    with pytest.raises(ValueError, match=f"GaussianLikelihood: argument `{option}` must be .*; got "):
        GaussianLikelihood(4, **{option: value})


@pytest.mark.parametrize("scale", [-0.1, 1.1])
def test_bounded_pixels_are_checked(scale: float):
    x = torch.rand(3, *SHAPE)
    for law in (BernoulliLikelihood, ContinuousBernoulliLikelihood):
        with pytest.raises(ValueError, match=rf"`x` must have pixels in \[0, 1\] for {law.__name__}; got "):
            OrderedVAE(SHAPE, 4, likelihood=law()).encode(x / x.max() * scale)
    OrderedVAE(SHAPE, 4).encode(x * scale)  # those of a Gaussian are free


@pytest.mark.parametrize("num_latents", [2, 8])
def test_a_noise_by_length_is_for_as_many_latents_as_the_code_has(num_latents):
    likelihood = GaussianLikelihood(num_latents, noise="by_length")
    with pytest.raises(ValueError, match=rf"`likelihood` must be for 4 latents, .*; it is for {num_latents}"):
        OrderedVAE((8,), 4, bodies=mlp_bodies((8,)), likelihood=likelihood)
    OrderedVAE((8,), 4, bodies=mlp_bodies((8,)), likelihood=GaussianLikelihood(num_latents))  # one scale for all
