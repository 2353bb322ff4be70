"""A linear variational autoencoder: probabilistic principal components with a learned order."""

from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.distributions import LowRankMultivariateNormal

from pyro_vnd._sizes import check_count, is_one_of
from pyro_vnd.autoencoders.bodies import check_image_shape, linear_bodies
from pyro_vnd.autoencoders.codes import CodeEncoder, Tail
from pyro_vnd.autoencoders.lengths import LengthSource
from pyro_vnd.autoencoders.likelihoods import GaussianLikelihood
from pyro_vnd.autoencoders.vae import OrderedVAE
from pyro_vnd.distributions import OrderedMask

__all__ = ["LinearGaussianVAE"]


class LinearGaussianVAE(OrderedVAE):
    r"""Probabilistic principal component analysis with ordered components.

    $$x = W (z \odot m) + b + \epsilon, \qquad \epsilon \sim N(0, \sigma^2 I), \qquad
      q(z_i \mid x) = N(v_i^\top x + c_i, s_i).$$

    Given a length k and the noise, the best first k columns of W are $u_i \sqrt{\lambda_i - \sigma^2}$ with the first
    k eigenpairs of the covariance of the data, in any rotation. One W is best for all k at once, and it has no
    rotation left: the columns in order. Their posterior is of the form of q, the same for each k, so that the bound
    given a length is then the exact likelihood. Components with $\lambda_i < \sigma^2$ vanish.

    This holds for every law of the lengths that gives each length a chance and does not look at the image ("prior",
    "global", or a `MaskSchedule` of budgets only). An amortised law weighs the images differently for each length, and
    the columns are then those of weighted data. With `full_length(K)` it is the ordinary model, which finds the span of
    all K components but not their order. Centre the data: with a large mean, gradient steps find the order slowly.

    Args:
        image_shape: Shape of an image, (D,) or (C, H, W).
        num_latents: K.
        posterior_lengths: "prior", "global", "amortised" or "priced", see `LengthEncoder`.
        noise: "shared", or "by_length" for a sigma for each length.
        scale: Where sigma starts.
        prior_lengths: As in `OrderedVAE`.
        tail: As in `OrderedVAE`, but for "completion", which is not linear.
        prior_latents: "independent".
        enumerate_lengths: As in `OrderedVAE`.

    Raises:
        ValueError: If an argument is invalid.

    Source: Tipping and Bishop, "Probabilistic principal component analysis", JRSS B 61, 1999; for the order, Rippel,
    Gelbart and Adams, arXiv 1402.0915, section 3.

    Example:
        >>> vae = LinearGaussianVAE((5,), num_latents=3)
        >>> vae.components(2).shape, vae.exact_log_likelihood(torch.zeros(7, 5), length=2).shape
        (torch.Size([5, 2]), torch.Size([7]))
    """

    def __init__(
        self,
        image_shape: tuple[int, ...],
        num_latents: int = 8,
        *,
        posterior_lengths: LengthSource = "global",
        noise: Literal["shared", "by_length"] = "shared",
        scale: float = 0.3,
        prior_lengths: OrderedMask | None = None,
        tail: Tail = "zeros",
        prior_latents: Literal["independent"] = "independent",
        enumerate_lengths: bool = False,
    ) -> None:
        name = type(self).__name__
        image_shape = check_image_shape(name, image_shape)
        check_count(name, num_latents=num_latents)
        if isinstance(tail, str) and tail == "completion":
            raise ValueError(f"{name}: argument `tail` must not be 'completion', which is not linear")
        if not is_one_of(prior_latents, ("independent",)):
            raise ValueError(f"{name}: argument `prior_latents` must be 'independent', or it is not Gaussian")
        super().__init__(
            image_shape,
            num_latents,
            bodies=linear_bodies(image_shape),
            likelihood=GaussianLikelihood(num_latents, noise, scale),
            posterior_lengths=posterior_lengths,
            prior_lengths=prior_lengths,
            tail=tail,
            enumerate_lengths=enumerate_lengths,
            make_encoder=partial(CodeEncoder, shared_scale=True),
        )

    def components(self, length: int | None = None) -> Tensor:
        """Return the first columns of W.

        Args:
            length: Number of columns, 1..K; None is all.

        Returns:
            Shape (D, length).

        Raises:
            ValueError: If the length is not in 1..K.
        """
        return self.decoder.entry.weight[:, : self.num_latents if length is None else self._one_length(length)]

    def exact_log_likelihood(self, x: Tensor, length: int | None = None) -> Tensor:
        r"""Return the log-likelihood of each image, its latents integrated out.

        $$\log N(x; b, W_k W_k^\top + \sigma^2 I), \qquad \log \sum_k p_k N(x; b, W_k W_k^\top + \sigma^2 I).$$

        Args:
            x: Images, shape (N, *image_shape).
            length: k, 1..K: log p(x | L = k); None sums over the lengths.

        Returns:
            Nats, shape (N,).

        Raises:
            ValueError: If images or length are invalid.
        """
        self.check_images(x)
        if length is None:
            lengths = range(1, self.num_latents + 1)
            return (torch.stack([self._marginal(x, k) for k in lengths], -1) + self.prior_probs.log()).logsumexp(-1)
        return self._marginal(x, self._one_length(length))

    def _marginal(self, x: Tensor, length: int) -> Tensor:
        code = self.prior_probs.new_zeros(self.num_latents)
        given = self.likelihood_given(code, self.prior(length).keep_probs)  # at z = 0 its mean is b, whatever the tail
        law = LowRankMultivariateNormal(
            given.mean.flatten(), self.components(length), given.variance.flatten(), validate_args=False
        )
        return law.log_prob(x.flatten(1))
