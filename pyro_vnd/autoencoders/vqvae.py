"""A vector-quantised autoencoder whose code can be cut at any length."""

import math
from copy import deepcopy
from functools import cached_property, partial
from typing import Any, Literal, get_args

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import kl_divergence
from torch.fx import symbolic_trace
from torch.nn.functional import one_hot

from pyro_vnd._sizes import check_count, is_one_of
from pyro_vnd.autoencoders.base import ElboTerms, EncoderGuide, OrderedAutoencoder
from pyro_vnd.autoencoders.bodies import Bodies
from pyro_vnd.autoencoders.codes import Tail
from pyro_vnd.autoencoders.lengths import LengthSource
from pyro_vnd.autoencoders.likelihoods import Likelihood
from pyro_vnd.autoencoders.quantiser import BlockDecoder, Blocks, LookUp, Nearest, Quantiser, TokenEncoder, TokenPrior
from pyro_vnd.distributions import NestedNormal, OrderedMask, OrderedMaskStraightThrough

__all__ = ["Ordered", "OrderedVQVAE", "TokenGuide"]

Ordered = Literal["tokens", "dims"]


class OrderedVQVAE(OrderedAutoencoder):
    r"""Vector-quantised autoencoder with ordered tokens, or with tokens of ordered dimensions.

    $$L \sim p, \qquad t_i \sim \mathrm{Uniform}\{1..V\}, \qquad z = m(L) \odot e_t, \qquad x \sim p(x \mid f(z, L)),$$
    $$\log p(x) \ge E_{q(L \mid x)} [\log p(x \mid z, L) - R_L] - \mathrm{KL}(q(L \mid x) \| p(L)).$$

    The encoder has one token for each of T places, and q(t | x) is a point. With ordered="tokens" a mask keeps the
    first of K = T tokens, whose rate is $R_L = L \log V$ nats: q(L | x) weighs what a token explains against what it
    costs. With ordered="dims" it keeps the first of K = D dimensions of all tokens, which are then the nearest in these
    dimensions; $R_L = T \log V$ whatever L, so that nothing charges for length but p(L).

    Sites are "mask" and "code" in the plate "data", and "quantiser" in the guide: the penalty of `Quantiser`, which is
    in the gradient but not in the value of the objective, so that this stays a bound of log p(x). All is exact but the
    straight-through gradients: train with `fit` and its `NestedELBO`, or with `TraceMeanField_ELBO` or `Trace_ELBO`.
    Of the `KLWeights` of `fit`, `local` weighs the rate, `lengths` the KL of the lengths; `schedule=MaskSchedule(...)`
    trains all prefixes. One codebook serves all places.

    Args:
        image_shape: Shape of an image, (D,) or (C, H, W).
        num_tokens: T.
        dim: D, numbers of a token.
        codebook_size: V.
        ordered: "tokens" or "dims".
        commitment: Pull of the encoder to the codebook, in nats for a squared distance of one; the usual 0.25 is for a
            squared error without its $1 / 2 \sigma^2$, which is some 20 times as large for images that are told well.
        bodies: As in `OrderedVAE`.
        likelihood: As in `OrderedVAE`.
        prior_lengths: As in `OrderedVAE`, over K = T or D.
        posterior_lengths: As in `OrderedVAE`.
        tail: As in `OrderedVAE`.

    Raises:
        ValueError: If an argument is invalid.

    Source: van den Oord, Vinyals and Kavukcuoglu, "Neural discrete representation learning", arXiv 1711.00937.

    Example:
        >>> from pyro_vnd.infer import MaskSchedule, fit
        >>> x = torch.rand(64, 1, 8, 8)
        >>> vae = OrderedVQVAE((1, 8, 8), num_tokens=4, dim=2, codebook_size=16)
        >>> _ = fit(vae, vae.guide, x, num_epochs=2, batch_size=32, schedule=MaskSchedule(), progress=False)
        >>> vae.tokens(x, length=3).shape, vae.bits(3), vae.reconstruct(x, length=3).shape
        (torch.Size([64, 3]), 12.0, torch.Size([64, 1, 8, 8]))
    """

    token_probs: Tensor

    def __init__(
        self,
        image_shape: tuple[int, ...],
        num_tokens: int = 8,
        dim: int = 8,
        codebook_size: int = 64,
        *,
        ordered: Ordered = "tokens",
        commitment: float = 5.0,
        bodies: Bodies | None = None,
        likelihood: Likelihood | None = None,
        prior_lengths: OrderedMask | None = None,
        posterior_lengths: LengthSource = "amortised",
        tail: Tail = "zeros",
    ) -> None:
        name = type(self).__name__
        if not is_one_of(ordered, get_args(Ordered)):
            raise ValueError(f"{name}: argument `ordered` must be one of {get_args(Ordered)}; got {ordered!r}")
        if not 0 <= commitment < math.inf:
            raise ValueError(f"{name}: argument `commitment` must be finite and >= 0; got {commitment}")
        check_count(name, num_tokens=num_tokens, dim=dim, codebook_size=codebook_size)
        num_tokens, dim, codebook_size = int(num_tokens), int(dim), int(codebook_size)
        blocks = Blocks(num_tokens, dim, ordered == "tokens")
        super().__init__(
            image_shape,
            blocks.num_blocks,
            bodies=bodies,
            likelihood=likelihood,
            prior_lengths=prior_lengths,
            posterior_lengths=posterior_lengths,
            tail=tail,
            make_encoder=partial(TokenEncoder, block_size=blocks.size),
            make_decoder=partial(BlockDecoder, block_size=blocks.size),
        )
        self.blocks, self.codebook_size = blocks, codebook_size
        self.quantiser = Quantiser(codebook_size, dim, commitment)
        self.register_buffer("token_probs", torch.full((num_tokens, codebook_size), 1 / codebook_size))

    def forward(self, x: Tensor) -> Any:
        """Run the model on images, shape (N, *image_shape); errors are those of `check_images`."""
        self._images.in_evaluation(x, self.prior_probs.dtype)
        with pyro.plate("data", len(x)):
            mask = pyro.sample("mask", self.prior())
            code = pyro.sample("code", TokenPrior(self.quantiser.codebook, mask, self.blocks))
            return self._observe(x, code, mask)

    @cached_property
    def guide(self) -> "TokenGuide":
        """The amortised guide, a module of its own that shares this model's encoder and codebook."""
        return TokenGuide(self)

    def prior(self, length: int | Tensor | None = None) -> OrderedMask:
        """Return the prior of the mask over blocks, cut to a length if one is given, or of a batch to a length each."""
        prior = OrderedMask(probs=self.prior_probs)
        if length is None:
            return prior
        lengths = self._length(length)
        return prior.expand(lengths.shape).cut(lengths)

    def encode(
        self,
        x: Tensor,
        length: int | Tensor | None = None,
        *,
        price: float | Tensor | None = None,
        mean_length: float | None = None,
    ) -> OrderedMaskStraightThrough:
        """Return the law of the masks over blocks; given its mask a code is a point, see `embed` and `tokens`.

        Args:
            x: Images, shape (N, *image_shape).
            length: Code length, 1..K, for all images or one an image; None leaves it random.
            price: Of a block, in nats beyond its own rate, for random lengths that are worth it, as in `lengths`.
            mean_length: In place of the price, as in `lengths`.

        Returns:
            A law with batch shape (N,).

        Raises:
            ValueError: If images or lengths are invalid.
        """
        law: OrderedMaskStraightThrough = self._law_of(x, length, price, mean_length)
        return law

    def _random_length(self, x: Tensor, *, priced: bool = False) -> OrderedMaskStraightThrough:
        law: OrderedMaskStraightThrough = self._encoded(x, priced=priced)[1]
        return law.expand((len(x),))

    def _codes_and_costs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._encoded(x)[0], self._rates()

    def _rates(self) -> Tensor:
        """Return the rates of the lengths 1..K in nats."""
        counts = torch.arange(1, self.num_latents + 1).to(self.prior_probs)
        tokens = counts if self.blocks.by_token else torch.full_like(counts, self.blocks.num_tokens)
        return math.log(self.codebook_size) * tokens

    def _cut_code(self, codes: Tensor, length: int) -> tuple[Tensor, Tensor]:
        mask = self._mask(len(codes), length)
        return self._code(codes, mask), mask

    def elbo(self, x: Tensor, length: int | Tensor | None = None, num_samples: int = 1) -> ElboTerms:
        """Estimate the ELBO of each image and its terms.

        Args:
            x: Images, shape (N, *image_shape).
            length: Code length, 1..K, for all images or one an image: the bound of log p(x | L); None has it random.
            num_samples: Draws of a random length; given its length a code is a point.

        Returns:
            The terms, each of shape (N,).

        Raises:
            ValueError: If an argument is invalid.
        """
        check_count(f"{type(self).__name__}.elbo", num_samples=num_samples)
        self.check_images(x)
        values, lengths = self._encoded(x)
        law = self._cut_to(lengths.expand((len(x),)), length)
        mask = law.sample((num_samples,))
        likelihood = self.likelihood_given(self._code(values, mask), mask).log_prob(x).mean(0)
        return ElboTerms(likelihood, law.probs @ self._rates(), kl_divergence(law, self.prior(length)))

    @torch.no_grad()
    def tokens(self, x: Tensor, length: int | None = None) -> Tensor:
        """Return the tokens of images: what a code of a given length is to a channel.

        Args:
            x: Images, shape (N, *image_shape).
            length: Code length, 1..K; None is K.

        Returns:
            Integers from 0 to V - 1, shape (N, length) or, with ordered dimensions, (N, T).

        Raises:
            ValueError: If images or lengths are invalid.
        """
        self.check_images(x)
        length = self.num_latents if length is None else self._one_length(length)
        mask = self.blocks.over_vectors(self._prefix(length).expand(len(x), -1))
        index = self.quantiser.nearest(self.blocks.vectors(self._encoded(x)[0]), mask)
        return index[:, :length] if self.blocks.by_token else index

    def bits(self, length: int | None = None) -> float:
        """Return the rate of codes of a given length, 1..K or by default K, in bits: log2 V for each token."""
        length = self.num_latents if length is None else self._one_length(length)
        return (length if self.blocks.by_token else self.blocks.num_tokens) * math.log2(self.codebook_size)

    @torch.no_grad()
    def _embedded(self, x: Tensor, length: int | Tensor) -> tuple[Tensor, Tensor]:
        self.check_images(x)
        mask = self._mask(len(x), length)
        return self._code(self._encoded(x)[0], mask), mask

    @property
    def _code_size(self) -> int:
        return self.blocks.num_blocks * self.blocks.size

    def _mask_of(self, code: Tensor) -> Tensor:
        used = (code.unflatten(-1, (self.blocks.num_blocks, self.blocks.size)) != 0).any(-1)
        return NestedNormal.mask_of(used.to(code.dtype))

    @torch.no_grad()
    def count_tokens(self, x: Tensor) -> None:
        """Let `sample` draw the token at each place as often as it is there in images, plus one of each.

        Tokens of one image depend on one another, which a law for each place does not know: images drawn so are better
        than those of uniform tokens and worse than those of a learned, autoregressive law, which is not part of this.

        Args:
            x: Images, shape (N, *image_shape).

        Raises:
            ValueError: If the images are invalid.
        """
        counts = one_hot(self.tokens(x), self.codebook_size).sum(0) + 1
        self.token_probs.copy_(counts / counts.sum(-1, keepdim=True))

    def _draw(self, num_samples: int, length: int | None) -> tuple[Tensor, Tensor]:
        """Draw codes and their masks from the prior, whose tokens are uniform until `count_tokens` has seen data."""
        mask = self.prior(length).sample((num_samples,))
        return TokenPrior(self.quantiser.codebook, mask, self.blocks, self.token_probs).sample(), mask

    def narrow(self, length: int) -> tuple[nn.Module, nn.Module]:
        """Return plain, smaller torch nets for codes of a given length.

        Args:
            length: Code length, 1..K.

        Returns:
            An encoder, from images to tokens as in `tokens`, and a decoder, from these to mean images; they have
            weights of their own and need neither Pyro nor this library.

        Raises:
            ValueError: If the length is not in 1..K.
        """
        length = self._one_length(length)
        size, by_token = length * self.blocks.size, self.blocks.by_token
        codebook = self.quantiser.codebook.detach()[:, : None if by_token else length].clone()
        num_tokens = length if by_token else self.blocks.num_tokens
        nearest = symbolic_trace(Nearest(codebook, num_tokens, by_token))
        look_up = symbolic_trace(LookUp(codebook.clone(), by_token))
        encoder, decoder = deepcopy(self.encoder.narrow(size)), deepcopy(self.decoder.narrow(length))
        return nn.Sequential(*encoder, nearest), nn.Sequential(look_up, *decoder, *self.likelihood.mean_layers())

    def _prefix(self, length: int | Tensor) -> Tensor:
        units = torch.arange(1, self.num_latents + 1, device=self.prior_probs.device)
        return (units <= self._length(length).unsqueeze(-1)).to(self.prior_probs)

    def _mask(self, num_rows: int, length: int | Tensor | None) -> Tensor:
        lengths = self._length(self.num_latents if length is None else length, (num_rows,))
        return self._prefix(lengths).expand(num_rows, -1)

    def _code(self, values: Tensor, mask: Tensor) -> Tensor:
        over_vectors = self.blocks.over_vectors(mask)
        index = self.quantiser.nearest(self.blocks.vectors(values), over_vectors)
        return self.blocks.flat(over_vectors * nn.functional.embedding(index, self.quantiser.codebook))


class TokenGuide(EncoderGuide):
    """Amortised guide of a vector-quantised autoencoder.

    Args:
        model: The autoencoder, whose encoder and codebook it shares.
    """

    def __init__(self, model: OrderedVQVAE) -> None:
        super().__init__(model)
        self.quantiser, self.blocks = model.quantiser, model.blocks

    def forward(self, x: Tensor) -> Tensor:
        """Draw masks and codes of images, shape (N, *image_shape)."""
        self._check(x)
        values, lengths = self.encoder(x)
        with pyro.plate("data", len(x)):
            mask = pyro.sample("mask", lengths, infer=self._infer())
            over_vectors = self.blocks.over_vectors(mask)
            vectors, penalty = self.quantiser(self.blocks.vectors(values), over_vectors)
            # In the loss as it is, a factor of the guide being subtracted from the bound; its value is zero.
            pyro.factor("quantiser", penalty - penalty.detach(), has_rsample=True)
            return pyro.sample("code", dist.Delta(self.blocks.flat(over_vectors * vectors), event_dim=1))
