"""What all autoencoders with an ordered code have in common."""

from collections.abc import Callable
from copy import deepcopy
from functools import cached_property, partial
from typing import Any, NamedTuple, Self

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_vnd._compat import QuietModule
from pyro_vnd._inputs import check_dtype
from pyro_vnd._sizes import as_integers, check_count, without_values
from pyro_vnd.autoencoders.bodies import Bodies, check_image_shape, mlp_bodies
from pyro_vnd.autoencoders.codes import CodeDecoder, CodeEncoder, Tail, check_tail
from pyro_vnd.autoencoders.images import ImageCheck
from pyro_vnd.autoencoders.lengths import LengthEncoder, LengthSource, check_lengths
from pyro_vnd.autoencoders.likelihoods import GaussianLikelihood, Likelihood
from pyro_vnd.autoencoders.prices import LengthsByPrice
from pyro_vnd.distributions import NestedNormal, OrderedMask
from pyro_vnd.distributions.kl import kl_of_coordinates
from pyro_vnd.distributions.nested import NestedLaw

__all__ = ["ElboTerms", "EncoderGuide", "OrderedAutoencoder"]


class ElboTerms(NamedTuple):
    """The terms of the ELBO of each image, in nats, shape (N,).

    Attributes:
        log_likelihood: E_q log p(x | z), estimated.
        kl_latents: Divergence of the kept latents from their prior, exact; from a prior that is autoregressive it is
            that of each latent given the draws of those before it, and from mixtures that of the draws themselves. Of
            tokens it is their rate.
        kl_lengths: Divergence of the law of the lengths from its prior, exact.
    """

    log_likelihood: Tensor
    kl_latents: Tensor
    kl_lengths: Tensor

    @property
    def elbo(self) -> Tensor:
        """The bound itself."""
        return self.log_likelihood - self.kl_latents - self.kl_lengths


class OrderedAutoencoder(LengthsByPrice):
    r"""Autoencoder whose code can be cut at any length.

    $$L \sim p, \qquad z_i \sim N(0, 1) \text{ for } i \le L, \text{ else } 0, \qquad x \sim p(x \mid f(z, L)).$$

    The law of lengths is an argument. With a `prior_lengths` of one's choice and posterior_lengths="prior" the rate
    is prescribed, as in nested dropout; with `full_length(K)` the model is an ordinary autoencoder; otherwise q(L | x)
    is learned.

    Args:
        image_shape: Shape of an image, (D,) or (C, H, W).
        num_latents: K, the longest code.
        bodies: Encoder and decoder without what touches the code; `mlp_bodies(image_shape)` by default.
        likelihood: Law of an image given what the decoder puts out; `GaussianLikelihood(num_latents)` by default.
        prior_lengths: Law of the lengths a priori; uniform by default.
        posterior_lengths: "prior", "global", "amortised" or "priced", see `LengthEncoder`.
        tail: What the decoder has in place of dropped latents: "zeros", "filler", "mask" or "completion", see
            `CodeDecoder`.
        make_encoder: Makes the encoder from bodies, law of the lengths a priori and source of the learned one.
        make_decoder: Makes the decoder from bodies, number of latents and tail.

    Raises:
        ValueError: If an argument is invalid.
    """

    prior_probs: Tensor

    def __init__(
        self,
        image_shape: tuple[int, ...],
        num_latents: int = 16,
        *,
        bodies: Bodies | None = None,
        likelihood: Likelihood | None = None,
        prior_lengths: OrderedMask | None = None,
        posterior_lengths: LengthSource = "amortised",
        tail: Tail = "zeros",
        make_encoder: Callable[[Bodies, OrderedMask, LengthSource], LengthEncoder] = CodeEncoder,
        make_decoder: Callable[[Bodies, int, Tail], CodeDecoder] = CodeDecoder,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        image_shape = check_image_shape(name, image_shape)
        check_count(name, num_latents=num_latents)
        num_latents = int(num_latents)
        prior_lengths = OrderedMask.uniform(num_latents) if prior_lengths is None else prior_lengths
        check_lengths(name, prior_lengths, num_latents, posterior_lengths)
        check_tail(name, tail)
        bodies = mlp_bodies(image_shape) if bodies is None else bodies
        likelihood = GaussianLikelihood(num_latents) if likelihood is None else likelihood
        if not isinstance(bodies, Bodies):
            raise ValueError(f"{name}: argument `bodies` must be Bodies, see `mlp_bodies`; got {type(bodies).__name__}")
        if not isinstance(likelihood, Likelihood):
            raise ValueError(f"{name}: argument `likelihood` must be a Likelihood; got {type(likelihood).__name__}")
        self.image_shape, self.num_latents = image_shape, num_latents
        self.encoder = make_encoder(bodies, prior_lengths, posterior_lengths)
        self.decoder = make_decoder(bodies, num_latents, tail)
        self.likelihood: Likelihood = likelihood
        if self.likelihood.num_latents not in (None, num_latents):
            raise ValueError(
                f"{name}: argument `likelihood` must be for {num_latents} latents, as many as the code has; it is for "
                f"{self.likelihood.num_latents}"
            )
        bounded_by = type(self.likelihood).__name__ if self.likelihood.bounded else None
        self._images = ImageCheck(name, self.image_shape, bounded_by)
        self.register_buffer("prior_probs", prior_lengths.probs.detach().clone())

    def forward(self, x: Tensor) -> Any:
        """Run the model on images, shape (N, *image_shape); errors are those of `check_images`."""
        self._images.in_evaluation(x, self.prior_probs.dtype)
        with pyro.plate("data", len(x)):
            code = pyro.sample("code", self.prior())
            return self._observe(x, code, NestedNormal.mask_of(code))

    def _observe(self, x: Tensor, code: Tensor, mask: Tensor) -> Any:
        """Observe images given codes and masks; what lengths are worth is said with one noise, as in `value_curve`."""
        outputs = self.decoder(code, mask)
        law = partial(self.likelihood.law, outputs, event_dim=len(self.image_shape))
        infer: Any = {"value_law": partial(law, torch.ones_like(mask))}
        return pyro.sample("x", law(mask), obs=x, infer=infer)

    def check_images(self, x: Tensor) -> None:
        """Check that the model takes these images: their shape, their type, and their pixels.

        Every method with images does. Model and guide look at pixels in the first evaluation of a fit, and on the CPU
        in each, as it costs nothing there.

        Args:
            x: Images, shape (N, *image_shape).

        Raises:
            ValueError: If it does not; the message says what came and what to give.
        """
        self._images(x, self.prior_probs.dtype)

    def train(self, mode: bool = True) -> Self:
        """Set the mode; the next evaluation looks at the pixels of images."""
        self._images.look.done = False
        return super().train(mode)

    @cached_property
    def guide(self) -> "EncoderGuide":
        """The amortised guide, a module of its own that shares this model's encoder."""
        return EncoderGuide(self)

    def prior(self, length: int | Tensor | None = None) -> NestedLaw:
        """Return the prior of a code, cut to a length if one is given, or of a batch of codes to a length each."""
        prior = self._prior()
        if length is None:
            return prior
        lengths = self._length(length)
        return prior.expand(lengths.shape).cut(lengths)

    def _prior(self) -> NestedLaw:
        """Return the prior of a code whose length is random."""
        zeros = self.prior_probs.new_zeros(self.num_latents)
        return NestedNormal(zeros, zeros + 1, probs=self.prior_probs)

    def likelihood_given(self, code: Tensor, mask: Tensor) -> dist.TorchDistribution:
        """Return the law of images given their codes, shape (..., K), and masks: batch shape (...)."""
        return self.likelihood.law(self.decoder(code, mask), mask, len(self.image_shape))

    def encode(
        self,
        x: Tensor,
        length: int | Tensor | None = None,
        *,
        price: float | Tensor | None = None,
        mean_length: float | None = None,
    ) -> NestedNormal:
        """Return the law of the codes of images.

        Args:
            x: Images, shape (N, *image_shape).
            length: Code length, 1..K, for all images or one an image; None leaves it random.
            price: Of a latent, for random lengths that are worth it, as in `lengths`.
            mean_length: In place of the price, as in `lengths`.

        Returns:
            A law with batch shape (N,).

        Raises:
            ValueError: If images or lengths are invalid.
        """
        law: NestedNormal = self._law_of(x, length, price, mean_length)
        return law

    def _law_of(self, x: Tensor, length: int | Tensor | None, price: Any, mean_length: Any) -> Any:
        """Return what the encoder says of codes, or of their masks, cut to a length or at a price."""
        self._check_one("encode", length=length, price=price, mean_length=mean_length)
        self.check_images(x)
        self._check_rows("encode", len(x), price=price, mean_length=mean_length)
        if not (price is None and mean_length is None):
            return self._random_length(x, priced=True).tilt(self._price("encode", price, mean_length))
        return self._cut_to(self._random_length(x), length)

    def _cut_to(self, law: Any, length: int | Tensor | None) -> Any:
        """Return laws of images with given lengths, one for all or one an image; None leaves them random."""
        if length is None:
            return law
        return law.cut(self._length(length, law.batch_shape))

    def _random_length(self, x: Tensor, *, priced: bool = False) -> Any:
        """Return the law whose length is random, one an image."""
        return self._encoded(x, priced=priced)

    def decode(self, z: Tensor) -> Tensor:
        """Return the mean images of codes; a code ends with its last latent or block that is not zero.

        Args:
            z: Codes as `embed` returns them, shape (..., n).

        Returns:
            Images, shape (..., *image_shape).

        Raises:
            ValueError: If the codes have another length or type, or are not finite.
        """
        expected = f"{type(self).__name__}: argument `z` must be finite codes of shape (..., {self._code_size})"
        if not isinstance(z, Tensor):
            raise ValueError(f"{expected}; got {type(z).__name__}: give a tensor, torch.as_tensor(z)")
        if said := without_values(z):
            raise ValueError(f"{expected}; got {said}")
        if z.shape[-1:] != (self._code_size,) or not torch.isfinite(z).all():
            bad = "" if torch.isfinite(z).all() else " with NaN or inf"
            raise ValueError(f"{expected}; got {tuple(z.shape)}{bad}")
        check_dtype(f"{type(self).__name__}: argument `z` must be codes", z, self.prior_probs.dtype)
        return self.likelihood.mean(self.decoder(z, self._mask_of(z)))

    @property
    def _code_size(self) -> int:
        return self.num_latents

    def _codes_and_costs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        law = self._encoded(x)
        return law.loc, self._costs(law)

    def _costs(self, law: NestedNormal) -> Tensor:
        """Return the divergence of the first latents, given the mean code, for each length."""
        return kl_of_coordinates(law, self.prior().given(law.loc), law.loc).cumsum(-1)

    def _mask_of(self, code: Tensor) -> Tensor:
        return NestedNormal.mask_of(code)

    def embed(
        self,
        x: Tensor,
        length: int | Tensor | None = None,
        *,
        price: float | Tensor | None = None,
        mean_length: float | None = None,
        exact: int | None = None,
    ) -> Tensor:
        """Return the mean codes of images, cut to a length.

        Args:
            x: Images, shape (N, *image_shape).
            length: Latents to keep, 1..K, for all images or one an image; None keeps all.
            price: In place of a length, for the most probable one of each image at a price, as in `lengths`.
            mean_length: The same for a mean length, as in `lengths`.
            exact: As in `lengths`.

        Returns:
            Codes with zeros past the length, shape (N, K), or flat ones, block by block, of a model of blocks.

        Raises:
            ValueError: If images or lengths are invalid.
        """
        return self._embedded(x, self._choose("embed", x, length, price, mean_length, exact))[0]

    def _embedded(self, x: Tensor, length: int | Tensor) -> tuple[Tensor, Tensor]:
        """Return codes cut to given lengths, and their masks."""
        law = self.encode(x, length)
        return law.mean, law.keep_probs

    @torch.no_grad()
    def reconstruct(
        self,
        x: Tensor,
        length: int | Tensor | None = None,
        *,
        price: float | Tensor | None = None,
        mean_length: float | None = None,
        exact: int | None = None,
    ) -> Tensor:
        """Return the mean image for the mean code, cut to a length.

        Args:
            x: Images, shape (N, *image_shape).
            length: As in `embed`.
            price: As in `embed`.
            mean_length: As in `embed`.
            exact: As in `embed`.

        Returns:
            Images, shape (N, *image_shape).

        Raises:
            ValueError: If images or lengths are invalid.
        """
        chosen = self._choose("reconstruct", x, length, price, mean_length, exact)
        return self.likelihood.mean(self.decoder(*self._embedded(x, chosen)))

    @torch.no_grad()
    def sample(self, num_samples: int, length: int | None = None, *, noise: bool = False) -> Tensor:
        """Draw images from the prior.

        Args:
            num_samples: Number of images, N.
            length: Code length, 1..K; None draws it from its prior.
            noise: Whether to draw pixels from their law rather than to return its mean.

        Returns:
            Images, shape (N, *image_shape).

        Raises:
            ValueError: If the number is negative, or the length not one in 1..K.
        """
        check_count(f"{type(self).__name__}.sample", least=0, num_samples=num_samples)
        code, mask = self._draw(int(num_samples), None if length is None else self._one_length(length))
        return self.likelihood_given(code, mask).sample() if noise else self.likelihood.mean(self.decoder(code, mask))

    def _draw(self, num_samples: int, length: int | None) -> tuple[Tensor, Tensor]:
        """Draw codes and their masks from the prior."""
        code = self.prior(length).sample((num_samples,))
        return code, NestedNormal.mask_of(code)

    def narrow(self, length: int) -> tuple[nn.Module, nn.Module]:
        """Return plain, smaller torch nets for codes of a given length.

        Args:
            length: Code length, 1..K.

        Returns:
            An encoder, from images to mean codes of shape (N, length), and a decoder, from these to mean images; they
            have weights of their own and need neither Pyro nor this library.

        Raises:
            ValueError: If the length is not in 1..K.
        """
        length = self._one_length(length)
        encoder, decoder = self.encoder.narrow(length), self.decoder.narrow(length)
        return deepcopy(encoder), nn.Sequential(*deepcopy(decoder), *self.likelihood.mean_layers())

    def extra_repr(self) -> str:
        """Say in the first line of the representation what the code is like."""
        prior = OrderedMask(probs=self.prior_probs, validate_args=False)
        return (
            f"images {self.image_shape}, codes of {self.num_latents}, a priori of mean length "
            f"{prior.mean_length.item():.4g}, lengths: {self.encoder.source}, tail: {self.decoder.tail}"
        )

    def _length(self, length: int | Tensor, shape: tuple[int, ...] | None = None) -> Tensor:
        """Return lengths as a tensor, one or as many as there are images, whose batch shape may be given."""
        lengths = as_integers(length)
        if lengths is None or not ((lengths >= 1) & (lengths <= self.num_latents)).all():
            raise ValueError(
                f"{type(self).__name__}: argument `length` must be integers from 1 to {self.num_latents}; got "
                f"{length!r}"
            )
        if shape is not None and lengths.dim() and lengths.shape != shape:
            raise ValueError(
                f"{type(self).__name__}: argument `length` must be one for each of {shape[0]} images; "
                f"got {tuple(lengths.shape)}"
            )
        return lengths.to(self.prior_probs.device, torch.int64)

    def _one_length(self, length: int | Tensor) -> int:
        lengths = self._length(length)
        if lengths.numel() != 1:
            raise ValueError(
                f"{type(self).__name__}: argument `length` must be one integer here; got shape {tuple(lengths.shape)}"
            )
        return int(lengths)


class EncoderGuide(QuietModule):
    """Amortised guide of an autoencoder.

    Args:
        model: The autoencoder, whose encoder it shares.
    """

    def __init__(self, model: OrderedAutoencoder) -> None:
        super().__init__()
        self.encoder, self._images = model.encoder, model._images

    def _check(self, x: Tensor) -> None:
        self._images.in_evaluation(x, self.encoder.heads.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Draw codes of images, shape (N, *image_shape)."""
        self._check(x)
        with pyro.plate("data", len(x)):
            return pyro.sample("code", self.encoder(x), infer=self._infer())

    def _infer(self) -> Any:
        """Tell `fit` of the value head, if the law of lengths is by values."""
        return {"value_head": self.encoder.value_head} if self.encoder.source == "priced" else {}
