"""A variational autoencoder whose latent code can be cut at any length."""

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_vnd.distributions import NestedNormal


class OrderedEncoder(nn.Module):
    r"""Amortised posterior over codes: a `NestedNormal` whose location, scale and lengths depend on the image.

    $$q(L = k \mid x) = (1 - \epsilon) \, \mathrm{softmax}_k(a(x)) + \epsilon / K.$$

    The fixed share keeps every prefix in training. Without it q(L | x) becomes nearly deterministic, and prefixes
    that are never drawn never learn; with it the objective is the exact ELBO of a constrained family.

    Args:
        num_inputs: Pixels of an image.
        num_latents: K, the longest code.
        num_hidden: Hidden units.
        share_of_uniform: The fixed share, epsilon.
    """

    def __init__(self, num_inputs: int, num_latents: int, num_hidden: int, share_of_uniform: float) -> None:
        super().__init__()
        self.share_of_uniform = share_of_uniform
        self.net = _mlp(num_inputs, num_hidden, 3 * num_latents)

    def forward(self, x: Tensor) -> NestedNormal:
        """Return the law of the codes of flattened images, shape (N, num_inputs)."""
        loc, raw_scale, logits = self.net(x).chunk(3, -1)
        probs = torch.lerp(logits.softmax(-1), logits.new_tensor(1 / logits.shape[-1]), self.share_of_uniform)
        return NestedNormal(loc, nn.functional.softplus(raw_scale) + 1e-4, probs=probs)


class OrderedVAE(PyroModule):
    r"""Variational autoencoder with ordered latents.

    $$z_n \sim \mathrm{NestedNormal}(0, 1, \mathrm{uniform}), \qquad x_n \sim N(f(z_n), \sigma),$$

    with a decoder f and a noise scale that are learned, and an amortised guide (`OrderedEncoder`) whose KL is exact
    under `TraceMeanField_ELBO`.

    Args:
        num_inputs: Pixels of an image.
        num_latents: K, the longest code.
        num_hidden: Hidden units of encoder and decoder.
        share_of_uniform: Share of code lengths drawn uniformly in training.
    """

    def __init__(
        self, num_inputs: int, num_latents: int = 16, num_hidden: int = 128, share_of_uniform: float = 0.5
    ) -> None:
        super().__init__()
        self.num_latents = num_latents
        self.encoder = OrderedEncoder(num_inputs, num_latents, num_hidden, share_of_uniform)
        self.decoder = _mlp(num_latents, num_hidden, num_inputs)
        self.noise = PyroParam(torch.tensor(0.3), constraints.positive)

    def forward(self, x: Tensor) -> Any:
        """Run the model on flattened images, shape (N, num_inputs)."""
        zeros = x.new_zeros(self.num_latents)
        with pyro.plate("data", len(x)):
            code = pyro.sample("code", NestedNormal(zeros, zeros + 1, zeros))
            return pyro.sample("pixels", dist.Normal(self.decoder(code), self.noise).to_event(1), obs=x)

    def make_guide(self) -> "EncoderGuide":
        """Return the amortised guide, a module of its own that shares this VAE's encoder."""
        return EncoderGuide(self.encoder)

    @torch.no_grad()
    def reconstruct(self, x: Tensor, length: int | None = None) -> Tensor:
        """Return the mean image for the mean code, cut to a length.

        Args:
            x: Flattened images, shape (N, num_inputs).
            length: Latents to keep, 1..K; None keeps all.

        Returns:
            Images, shape (N, num_inputs).

        Raises:
            ValueError: If the length is not in 1..K.
        """
        length = self.num_latents if length is None else length
        if not 1 <= length <= self.num_latents:
            raise ValueError(f"argument `length` must be from 1 to {self.num_latents}; got {length}")
        code = self.encoder(x).loc.clone()
        code[..., length:] = 0
        return self.decoder(code)


class EncoderGuide(PyroModule):
    """Amortised guide of an `OrderedVAE`.

    Args:
        encoder: Maps images to the law of their codes.
    """

    def __init__(self, encoder: OrderedEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor) -> Tensor:
        """Draw codes of flattened images, shape (N, num_inputs)."""
        with pyro.plate("data", len(x)):
            return pyro.sample("code", self.encoder(x))


def _mlp(num_inputs: int, num_hidden: int, num_outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(num_inputs, num_hidden),
        nn.SiLU(),
        nn.Linear(num_hidden, num_hidden),
        nn.SiLU(),
        nn.Linear(num_hidden, num_outputs),
    )
