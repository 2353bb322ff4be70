"""Probabilistic principal components of real digits as an `OrderedVAE`: all that can be asked of it is known."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_vnd.autoencoders import GaussianLikelihood, OrderedVAE, linear_bodies


@dataclass(frozen=True)
class LinearVAE:
    r"""A model x = W z + m + noise whose guide is its exact posterior at each length of the code.

    Columns of W are principal components with lengths $\sqrt{\lambda_i - \sigma^2}$: they are orthogonal, so the
    posterior of a latent depends neither on the others nor on the length. Lengths are uniform, a priori and in the
    guide.

    Attributes:
        model: The model.
        eigenvalues: Variances of all components, shape (D,), in descending order.
        noise: Variance of the pixels' noise.
        marginals: Exact laws of x at lengths 1..K.
    """

    model: OrderedVAE
    eigenvalues: Tensor
    noise: float
    marginals: list[torch.distributions.MultivariateNormal]


def linear_vae(x: Tensor, num_latents: int, noise: float = 0.02) -> LinearVAE:
    """Make the model of images, shape (N, D)."""
    dim, mean = x.shape[1], x.mean(0)
    eigenvalues, vectors = torch.linalg.eigh(torch.cov(x.T, correction=0))
    eigenvalues, vectors = eigenvalues.flip(0), vectors.flip(1)
    kept = eigenvalues[:num_latents]
    weights = vectors[:, :num_latents] * (kept - noise).sqrt()
    model = OrderedVAE(
        (dim,), num_latents, bodies=linear_bodies((dim,)), likelihood=GaussianLikelihood(num_latents, scale=noise**0.5)
    ).to(x)
    with torch.no_grad():
        heads, entry = model.encoder.heads, model.decoder.entry
        heads.weight.zero_()
        heads.bias.zero_()
        heads.weight[:num_latents] = weights.T / kept[:, None]
        heads.bias[:num_latents] = -heads.weight[:num_latents] @ mean
        scale = (noise / kept).sqrt() - 1e-4
        heads.bias[num_latents : 2 * num_latents] = scale.expm1().log()  # the inverse of softplus
        entry.weight.copy_(weights)
        entry.bias.copy_(mean)
    covs = [weights[:, :k] @ weights[:, :k].T + noise * torch.eye(dim).to(x) for k in range(1, num_latents + 1)]
    marginals = [torch.distributions.MultivariateNormal(mean, cov) for cov in covs]
    return LinearVAE(model, eigenvalues, noise, marginals)
