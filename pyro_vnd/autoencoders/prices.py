"""Lengths of codes at a price, or of a given mean: by what an encoder predicts, or by decoding."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_vnd._compat import QuietModule
from pyro_vnd._sizes import check_count, is_within, without_values
from pyro_vnd._state import module_mode
from pyro_vnd.autoencoders.codes import CodeDecoder
from pyro_vnd.autoencoders.lengths import LengthEncoder
from pyro_vnd.autoencoders.likelihoods import Likelihood
from pyro_vnd.distributions import OrderedMask
from pyro_vnd.distributions.nested import NestedLaw
from pyro_vnd.nn.values import ValueHead, checked_lengths, chosen_at_mean, interpolate_values, spaced_lengths

__all__ = ["LengthsByPrice"]


class LengthsByPrice(QuietModule):
    r"""Autoencoders that know what each length is worth to an image, and so its best length at any price.

    $$q(L \mid x, \lambda) \propto p(L) \exp(v_L(x) - \lambda L), \qquad
      v_L(x) = \log p(x \mid z_{\le L}) - \mathrm{KL}(q(z_{\le L} \mid x) \| p(z_{\le L})).$$
    """

    encoder: LengthEncoder
    decoder: CodeDecoder
    likelihood: Likelihood
    image_shape: tuple[int, ...]
    num_latents: int
    prior_probs: Tensor

    def check_images(self, x: Tensor) -> None:
        """Raise a ValueError if the model does not take these images."""
        raise NotImplementedError

    def encode(
        self,
        x: Tensor,
        length: int | Tensor | None = None,
        *,
        price: float | Tensor | None = None,
        mean_length: float | None = None,
    ) -> Any:
        """Return the law of the codes of images, or of their masks."""
        raise NotImplementedError

    def _encoded(self, x: Tensor, *, priced: bool = False) -> Any:
        """Return what the encoder says of images; outside of a fit nothing is learned from them, whatever the mode."""
        with module_mode([self.encoder.value_head], training=False):
            return self.encoder(x, priced=True) if priced else self.encoder(x)

    def add_value_head(self) -> ValueHead:
        """Return the part that predicts what lengths are worth, a new one, which knows nothing, if there is none.

        `distil_lengths` calls it; call it to load weights of a model that has one.

        Raises:
            ValueError: If the prior of the lengths gives some of them no probability.
        """
        if not (self.prior_probs > 0).all():
            raise ValueError(
                f"{type(self).__name__}: argument `prior_lengths` gives some lengths no probability, so that codes are "
                "never to be cut there and there is no length to choose; make and train the model with a prior that "
                "gives all lengths some, such as OrderedMask.uniform(K)"
            )
        return self.encoder.add_value_head()

    def value_inputs(self, x: Tensor) -> Tensor:
        """Return what the value head looks at: features and mean codes of images, shape (N, num_inputs)."""
        self.check_images(x)
        return self.encoder.value_inputs(x)

    @torch.no_grad()
    def value_curve(self, x: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
        """Return what lengths are worth to images, at their mean codes, by decoding each.

        The noise is that of whole codes for all lengths: a noise by length would have easy images gain by its being
        less, which is no information about them.

        Args:
            x: Images, shape (N, *image_shape).
            lengths: Rising, in 1..K; all K by default.

        Returns:
            Nats, shape (N, number of lengths).

        Raises:
            ValueError: If images or lengths are invalid.
        """
        self.check_images(x)
        lengths = checked_lengths(f"{type(self).__name__}.value_curve", lengths, self.num_latents)
        codes, costs = self._codes_and_costs(x)
        everything = self.prior_probs.new_ones(len(x), self.num_latents)
        curve = [
            self.likelihood.law(self.decoder(*self._cut_code(codes, length)), everything, len(self.image_shape))
            .log_prob(x)
            .sub(costs[..., length - 1])
            for length in lengths
        ]
        return torch.stack(curve, -1)

    def _codes_and_costs(self, x: Tensor) -> tuple[Any, Tensor]:
        """Return uncut mean codes of images, and what lengths 1..K of them cost, in nats, shape (N, K)."""
        raise NotImplementedError

    def _cut_code(self, codes: Any, length: int) -> tuple[Tensor, Tensor]:
        """Return codes cut to a length, and their masks."""
        mask = (torch.arange(self.num_latents, device=codes.device) < length).to(codes)
        return codes * mask, mask.expand(len(codes), -1)

    @torch.no_grad()
    def lengths(
        self,
        x: Tensor,
        *,
        price: float | Tensor | None = None,
        mean_length: float | None = None,
        exact: int | None = None,
        temperature: float = 1.0,
    ) -> OrderedMask:
        """Return the law of the lengths of images at a price.

        Args:
            x: Images, shape (N, *image_shape).
            price: Nats for one more latent, one for all images or one an image, shape (N,).
            mean_length: In place of a price that at which the mean length is this, strictly between 1 and K: over the
                images that were kept to calibrate the model, or over `x` itself with `exact`. One for all images, or
                one an image, of those at whose price they all would have it.
            exact: How many lengths to decode, and to interpolate, in place of what the encoder predicts.
            temperature: Flattens the law, > 0, once its price is known: its mean is no longer that asked for.

        Returns:
            A law with batch shape (N,), which is random still: `choose_lengths` has the best length of each image. With
            neither price nor mean it is the encoder's, at no price.

        Raises:
            ValueError: If an argument is invalid, or the model does not know what lengths are worth.

        Example:
            >>> from pyro_vnd.autoencoders import OrderedVAE
            >>> vae = OrderedVAE((64,), num_latents=8, posterior_lengths="priced")
            >>> vae.lengths(torch.rand(100, 64), mean_length=3.0, exact=4).mean_length.mean().round(decimals=3)
            tensor(3.)
        """
        if not is_within(temperature, above=0):
            raise ValueError(
                f"{type(self).__name__}.lengths: argument `temperature` must be finite and > 0; got {temperature!r}"
            )
        self._check_one("lengths", price=price, mean_length=mean_length)
        if exact is None:
            encoded = self.encode(x, price=price, mean_length=mean_length)
            law = encoded.mask_law if isinstance(encoded, NestedLaw) else encoded
        else:
            check_count(f"{type(self).__name__}.lengths", exact=exact)
            law = self._exact_law(x, exact)
            self._check_rows("lengths", len(x), price=price)
            if mean_length is not None:
                law = law.at_mean_length(mean_length, shared=True)
            elif price is not None:
                law = law.tilt(price)
        return law if temperature == 1 else OrderedMask(logits=law.logits / float(temperature))

    @torch.no_grad()
    def choose_lengths(
        self,
        x: Tensor,
        *,
        price: float | Tensor | None = None,
        mean_length: float | None = None,
        exact: int | None = None,
    ) -> Tensor:
        """Return the best length of each image at a price: what `embed` and `reconstruct` take.

        Args:
            x: As in `lengths`.
            price: As in `lengths`.
            mean_length: In place of a price that at which these lengths, and not random ones by `lengths`, have this
                mean: over the images that were kept to calibrate the model, or over `x` itself with `exact`, as nearly
                as whole lengths allow.
            exact: As in `lengths`.

        Returns:
            Integers from 1 to K, shape (N,): the modes of the laws of `lengths` at the price.

        Raises:
            ValueError: As in `lengths`.

        Example:
            >>> from pyro_vnd.autoencoders import OrderedVAE
            >>> vae = OrderedVAE((64,), num_latents=8)
            >>> vae.choose_lengths(torch.rand(100, 64), mean_length=3.0, exact=8).double().mean().round(decimals=1)
            tensor(3., dtype=torch.float64)
        """
        self._check_one("choose_lengths", price=price, mean_length=mean_length)
        if mean_length is not None and exact is not None:
            if not (is_within(mean_length, 1, self.num_latents)):
                raise ValueError(
                    f"{type(self).__name__}.choose_lengths: argument `mean_length` must be a number from 1 to "
                    f"{self.num_latents}; got {mean_length!r}"
                )
            return chosen_at_mean(self.lengths(x, exact=exact).logits, float(mean_length))
        if mean_length is not None:
            price = self._price("choose_lengths", None, mean_length, chosen=True)
        return self.lengths(x, price=price, exact=exact).logits.argmax(-1) + 1

    def _exact_law(self, x: Tensor, num_lengths: int) -> OrderedMask:
        """Return the law of lengths at no price by decoding some of them."""
        if not (self.prior_probs > 0).all():
            raise ValueError(
                f"{type(self).__name__}: the model's `prior_lengths` gives some lengths no probability: there is no "
                "choosing among them"
            )
        lengths = spaced_lengths(self.num_latents, num_lengths)
        values = interpolate_values(self.value_curve(x, lengths), lengths, self.num_latents)
        return OrderedMask(logits=values + self.prior_probs.log())

    def _price(
        self, method: str, price: float | Tensor | None, mean_length: float | None, *, chosen: bool = False
    ) -> Any:
        """Return a price, or that of a mean length."""
        head = self.encoder.value_head
        # A head that was distilled knows nothing of what the model has learned since.
        if head is None or not (head.is_calibrated or self.encoder.source == "priced"):
            raise ValueError(
                f"{type(self).__name__}.{method}: arguments `price` and `mean_length` need a model that knows what "
                "lengths are worth: make it with posterior_lengths='priced', call `distil_lengths(model, data)` after "
                "a fit, and again after the next one, or give `exact=12` to `lengths` or `reconstruct`"
            )
        return price if mean_length is None else head.price_at(mean_length, chosen=chosen)

    def _choose(
        self,
        method: str,
        x: Tensor,
        length: int | Tensor | None,
        price: float | Tensor | None,
        mean_length: float | None,
        exact: int | None,
    ) -> int | Tensor:
        """Return the length given, or those that are the most probable at a price, or else K."""
        self._check_one(method, length=length, price=price, mean_length=mean_length)
        self._check_one(method, length=length, exact=exact)
        if length is not None:
            return length
        if price is None and mean_length is None and exact is None:
            return self.num_latents
        return self.choose_lengths(x, price=price, mean_length=mean_length, exact=exact)

    def _check_rows(self, method: str, num_rows: int, **given: Any) -> None:
        """Raise a ValueError if there are several numbers, and not one for each of the images."""
        for name, value in given.items():
            if not isinstance(value, Tensor) or without_values(value):  # the law says what it takes
                continue
            if value.dim() and value.shape not in ((1,), (num_rows,)):
                raise ValueError(
                    f"{type(self).__name__}.{method}: argument `{name}` must be one number, or one for each of "
                    f"{num_rows} images; got shape {tuple(value.shape)}"
                )

    def _check_one(self, method: str, **given: Any) -> None:
        names = [name for name, value in given.items() if value is not None]
        if len(names) > 1:
            raise ValueError(f"{type(self).__name__}.{method}: give one of {', '.join(given)}; got {', '.join(names)}")
