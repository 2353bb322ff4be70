"""A variational autoencoder whose code can be cut at any length."""

import math
from collections.abc import Callable
from functools import cached_property
from typing import Any, Literal, get_args

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_vnd._sizes import check_count, is_one_of
from pyro_vnd.autoencoders.base import ElboTerms, EncoderGuide, OrderedAutoencoder
from pyro_vnd.autoencoders.bodies import Bodies
from pyro_vnd.autoencoders.codes import CodeDecoder, CodeEncoder, Tail
from pyro_vnd.autoencoders.conditioner import Conditioner
from pyro_vnd.autoencoders.lengths import LengthEncoder, LengthSource
from pyro_vnd.autoencoders.likelihoods import Likelihood
from pyro_vnd.distributions import NestedAutoregressive, NestedNormal, OrderedMask
from pyro_vnd.distributions.kl import kl_parts
from pyro_vnd.distributions.nested import NestedLaw

__all__ = ["EnumeratingGuide", "OrderedVAE", "PriorLatents"]

PriorLatents = Literal["independent", "autoregressive"]
CONDITIONER: dict[str, Any] = {"hidden": (128, 128), "num_components": 10}  # of a learned prior


class OrderedVAE(OrderedAutoencoder):
    r"""Variational autoencoder with ordered latents.

    $$\log p(x) \ge E_q \log p(x \mid z, L) - \mathrm{KL}(q(L \mid x) \| p(L))
      - \sum_i P_q(L \ge i \mid x) \, \mathrm{KL}(q(z_i \mid x) \| N(0, 1)).$$

    The objective of training is one of Pyro's or `NestedELBO`, the default of `fit`; in both of `NestedELBO` and
    `TraceMeanField_ELBO` the divergences are exact. `RenyiELBO` under `pyro.infer.SVI` trains importance-weighted. For
    a beta-VAE give `fit` `KLWeights(local=beta)`; for prefixes that are all useful, `schedule=MaskSchedule(...)`.

    The latents may have a prior that is learned with the rest, in which each depends on those before it:

    $$z_i \mid z_{<i} \sim \sum_m w_{im}(z_{<i}) N(\mu_{im}(z_{<i}), \sigma_{im}(z_{<i})).$$

    A decoder that is good for short codes makes later latents repeat part of what earlier ones say; independent ones
    drawn from N(0, 1) then hardly ever look like the code of an image. Of latents that have an order such a prior is
    the natural one: that of a code that is cut is the same, cut. Mixtures follow the edges of the first latents' law,
    which are sharp, and which one Normal overshoots, to where no decoder has been trained.

    Args:
        image_shape: As in `OrderedAutoencoder`.
        num_latents: K.
        prior_latents: "independent", N(0, 1) each, or "autoregressive".
        enumerate_lengths: Whether mask and latents are two sites, "mask" and "code", so that `TraceEnum_ELBO` sums over
            the K lengths instead of drawing one; decodes K codes an image.
        bodies: Encoder and decoder without what touches the code; `mlp_bodies(image_shape)` by default.
        likelihood: Law of an image given what the decoder puts out; `GaussianLikelihood(num_latents)` by default.
        prior_lengths: Law of the lengths a priori; uniform by default.
        posterior_lengths: "prior", "global", "amortised" or "priced", see `LengthEncoder`.
        tail: What the decoder has in place of dropped latents: "zeros", "filler", "mask" or "completion", see
            `CodeDecoder`.
        make_encoder: As in `OrderedAutoencoder`.
        make_decoder: As in `OrderedAutoencoder`.

    Raises:
        ValueError: If an argument is invalid.

    Example:
        >>> from pyro_vnd.infer import MaskSchedule, fit
        >>> x = torch.rand(64, 1, 8, 8)
        >>> vae = OrderedVAE((1, 8, 8), num_latents=4)
        >>> _ = fit(vae, vae.guide, x, num_epochs=2, batch_size=32, schedule=MaskSchedule(), progress=False)
        >>> vae.reconstruct(x, length=2).shape, vae.sample(5, length=1).shape
        (torch.Size([64, 1, 8, 8]), torch.Size([5, 1, 8, 8]))
    """

    def __init__(
        self,
        image_shape: tuple[int, ...],
        num_latents: int = 16,
        *,
        prior_latents: PriorLatents = "independent",
        enumerate_lengths: bool = False,
        bodies: Bodies | None = None,
        likelihood: Likelihood | None = None,
        prior_lengths: OrderedMask | None = None,
        posterior_lengths: LengthSource = "amortised",
        tail: Tail = "zeros",
        make_encoder: Callable[[Bodies, OrderedMask, LengthSource], LengthEncoder] = CodeEncoder,
        make_decoder: Callable[[Bodies, int, Tail], CodeDecoder] = CodeDecoder,
    ) -> None:
        super().__init__(
            image_shape,
            num_latents,
            bodies=bodies,
            likelihood=likelihood,
            prior_lengths=prior_lengths,
            posterior_lengths=posterior_lengths,
            tail=tail,
            make_encoder=make_encoder,
            make_decoder=make_decoder,
        )
        if not is_one_of(prior_latents, get_args(PriorLatents)):
            raise ValueError(
                f"{type(self).__name__}: argument `prior_latents` must be one of {get_args(PriorLatents)}; "
                f"got {prior_latents!r}"
            )
        if enumerate_lengths and posterior_lengths == "priced":
            raise ValueError(
                f"{type(self).__name__}: argument `enumerate_lengths` needs another posterior_lengths than 'priced', "
                "whose head learns from the one length that each image is seen at"
            )
        if enumerate_lengths and prior_latents != "independent":
            raise ValueError(
                f"{type(self).__name__}: argument `enumerate_lengths` needs prior_latents='independent'; "
                f"got {prior_latents!r}"
            )
        self.conditioner = Conditioner(num_latents, **CONDITIONER) if prior_latents == "autoregressive" else None
        self._enumerate_lengths = enumerate_lengths

    @property
    def enumerate_lengths(self) -> bool:
        """Whether mask and latents are two sites; the guide is made for one or the other, so that it stays."""
        return self._enumerate_lengths

    def _prior(self) -> NestedLaw:
        """Return the prior of a code whose length is random."""
        conditioner = self.conditioner  # once: Pyro announces its parameters whenever it is looked up
        return super()._prior() if conditioner is None else NestedAutoregressive(conditioner, probs=self.prior_probs)

    def forward(self, x: Tensor) -> Any:
        """Run the model on images, shape (N, *image_shape)."""
        if not self.enumerate_lengths:
            return super().forward(x)
        self._images.in_evaluation(x, self.prior_probs.dtype)
        zeros = self.prior_probs.new_zeros(self.num_latents)
        with pyro.plate("data", len(x)):
            mask = pyro.sample("mask", OrderedMask(probs=self.prior_probs))
            code = pyro.sample("code", dist.Normal(zeros, 1.0).to_event(1))
            return self._observe(x, mask * code, mask)

    @cached_property
    def guide(self) -> EncoderGuide:
        """The amortised guide, a module of its own that shares this model's encoder."""
        return EnumeratingGuide(self) if self.enumerate_lengths else EncoderGuide(self)

    def elbo(self, x: Tensor, length: int | Tensor | None = None, num_samples: int = 1) -> ElboTerms:
        """Estimate the ELBO of each image and its terms.

        Args:
            x: Images, shape (N, *image_shape).
            length: Code length, 1..K, for all images or one an image: the bound of log p(x | L); None has it random.
            num_samples: Draws of the code for the likelihood.

        Returns:
            The terms, each of shape (N,).

        Raises:
            ValueError: If an argument is invalid.
        """
        check_count(f"{type(self).__name__}.elbo", num_samples=num_samples)
        q, p = self.encode(x, length), self.prior(length)
        p = p.expand(q.batch_shape)
        code = q.rsample((num_samples,))
        likelihood = self._log_prob(x, code).mean(0)
        lengths, latents = (kl.expand(code.shape[:-1]).mean(0) for kl in kl_parts(q, p.given(code), code))
        return ElboTerms(likelihood, latents, lengths)

    @torch.no_grad()
    def log_likelihood(
        self,
        x: Tensor,
        num_samples: int = 100,
        length: int | None = None,
        *,
        unit: Literal["nats", "bits_per_dim"] = "nats",
        chunk_size: int = 10_000,
    ) -> Tensor:
        r"""Estimate log p(x) of each image by importance sampling from the guide, a lower bound in expectation.

        $$\log \frac1S \sum_s \frac{p(x, z_s)}{q(z_s \mid x)} , \quad z_s \sim q.$$

        Args:
            x: Images, shape (N, *image_shape).
            num_samples: Draws S for each image; the bound rises with S and tends to log p(x).
            length: Code length, 1..K: of log p(x | L); None sums over the lengths.
            unit: "nats", or "bits_per_dim", -log2 p(x) / D of D pixels.
            chunk_size: Codes that are decoded at once.

        Returns:
            Shape (N,).

        Raises:
            ValueError: If an argument is invalid.

        Source: Burda, Grosse and Salakhutdinov, arXiv 1509.00519, equation 8.
        """
        check_count(f"{type(self).__name__}.log_likelihood", num_samples=num_samples, chunk_size=chunk_size)
        if not is_one_of(unit, ("nats", "bits_per_dim")):
            raise ValueError(
                f"{type(self).__name__}.log_likelihood: argument `unit` must be 'nats' or 'bits_per_dim'; got {unit!r}"
            )
        q, p = self.encode(x, length), self.prior(length)
        at_once = max(chunk_size // max(len(x), 1), 1)
        log_weights = []
        for start in range(0, num_samples, at_once):
            code = q.sample((min(at_once, num_samples - start),))
            log_weights.append(self._log_prob(x, code) + p.log_prob(code) - q.log_prob(code))
        estimate = torch.cat(log_weights).logsumexp(0) - math.log(num_samples)
        return estimate if unit == "nats" else -estimate / (math.log(2) * math.prod(self.image_shape))

    def _log_prob(self, x: Tensor, code: Tensor) -> Tensor:
        """Return log p(x | z), shape code.shape[:-1]; torch's `Independent` does not know of no images at all."""
        if not code.numel():
            return code.new_zeros(code.shape[:-1])
        return self.likelihood_given(code, NestedNormal.mask_of(code)).log_prob(x)


class EnumeratingGuide(EncoderGuide):
    """Guide with two sites, the mask, which is summed out, and the latents, which follow their prior where dropped."""

    def forward(self, x: Tensor) -> Tensor:
        """Draw masks and codes of images, shape (N, *image_shape)."""
        self._check(x)
        law = self.encoder(x)
        with pyro.plate("data", len(x)):
            mask_law = OrderedMask(probs=law.length_probs)
            mask = pyro.sample("mask", mask_law, infer={"enumerate": "parallel"})
            kept = dist.Normal(mask * law.loc, torch.where(mask > 0, law.scale, 1.0))
            return pyro.sample("code", kept.to_event(1))
