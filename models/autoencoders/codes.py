"""The linear maps between features and codes: what an encoder and a decoder have of the order of the code."""

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from pyro_vnd.distributions import NestedNormal, OrderedMask

__all__ = ["CodeDecoder", "CodeEncoder", "Posterior", "Tail", "check_lengths", "full_width"]

Posterior = Literal["prior", "global", "amortised"]
Tail = Literal["zeros", "filler", "mask"]


def full_width(num_latents: int) -> OrderedMask:
    """Return the law that keeps every latent: with it an ordered model is an ordinary one.

    Args:
        num_latents: K.

    Returns:
        The law, all of whose mass is on L = K.

    Example:
        >>> full_width(3).keep_probs
        tensor([1., 1., 1.])
    """
    return OrderedMask(probs=(torch.arange(num_latents) == num_latents - 1).to(torch.get_default_dtype()))


class CodeEncoder(nn.Module):
    r"""Amortised posterior over codes: a `NestedNormal` whose mean, deviation and lengths depend on the image.

    $$q(z, L \mid x) = q(L \mid x) \, N(z_{\le L}; \mu(x), \sigma(x)).$$

    Args:
        body: Maps images to features.
        num_features: Features of an image.
        prior: Law of the lengths a priori.
        posterior: Where q(L | x) comes from: "prior" leaves it at the prior, which makes the prior's rate a prescribed
            one, as in nested dropout; "global" learns one law for all images; "amortised" one for each.
    """

    def __init__(self, body: nn.Module, num_features: int, prior: OrderedMask, posterior: Posterior) -> None:
        super().__init__()
        self.body, self.posterior, self.num_latents = body, posterior, prior.num_units
        self.heads = nn.Linear(num_features, (3 if posterior == "amortised" else 2) * self.num_latents)
        if posterior == "prior":
            self.register_buffer("length_probs", prior.probs.detach().clone())
        elif posterior == "global":
            self.length_logits = nn.Parameter(prior.logits.detach().clone())
        else:
            with torch.no_grad():  # starts at the prior
                self.heads.weight[2 * self.num_latents :] = 0
                self.heads.bias[2 * self.num_latents :] = prior.logits.detach()

    def forward(self, x: Tensor) -> NestedNormal:
        """Return the law of the codes of images, batch shape (N,)."""
        heads = self.heads(self.body(x)).split(self.num_latents, -1)
        scale = nn.functional.softplus(heads[1]) + 1e-4
        if self.posterior == "prior":
            return NestedNormal(heads[0], scale, probs=self.length_probs)
        return NestedNormal(heads[0], scale, self.length_logits if self.posterior == "global" else heads[2])

    def truncate(self, length: int) -> nn.Sequential:
        """Return a plain net from images to the means of the first latents."""
        head = nn.Linear(self.heads.in_features, length).to(self.heads.weight)
        with torch.no_grad():
            head.weight.copy_(self.heads.weight[:length])
            head.bias.copy_(self.heads.bias[:length])
        return nn.Sequential(self.body, head)


class CodeDecoder(nn.Module):
    r"""From codes to the outputs of a decoder, $f(W z + b + \text{tail})$.

    Args:
        body: What follows the linear map.
        num_inputs: Outputs of the linear map.
        num_latents: K.
        tail: What takes the place of dropped latents: "zeros", nothing; "filler", a learned number for each; "mask",
            the map sees which are dropped, a vector U (1 - z) that starts at zero and vanishes for whole codes. Zero is
            a likely value of a latent that is kept; a decoder that sees the mask knows the one from the other.
    """

    def __init__(self, body: nn.Module, num_inputs: int, num_latents: int, tail: Tail) -> None:
        super().__init__()
        if tail not in get_args(Tail):
            raise ValueError(f"argument `tail` must be one of {get_args(Tail)}; got {tail!r}")
        self.entry = nn.Linear(num_latents, num_inputs)
        self.body, self.tail = body, tail
        if tail == "filler":
            self.filler = nn.Parameter(torch.zeros(num_latents))
        elif tail == "mask":
            self.dropped = nn.Parameter(torch.zeros(num_inputs, num_latents))

    def forward(self, code: Tensor, mask: Tensor) -> Tensor:
        """Return the outputs of codes, shape (..., K), and their masks: shape (..., *image_shape)."""
        if self.tail == "filler":
            code = code + (1 - mask) * self.filler
        inputs = self.entry(code)
        if self.tail == "mask":
            inputs = inputs + nn.functional.linear(1 - mask, self.dropped)
        outputs = self.body(inputs.reshape(-1, inputs.shape[-1]))
        return outputs.reshape(*code.shape[:-1], *outputs.shape[1:])

    def truncate(self, length: int) -> nn.Sequential:
        """Return a plain net from the first latents to the outputs: the tail becomes part of the bias."""
        entry = nn.Linear(length, self.entry.out_features).to(self.entry.weight)
        with torch.no_grad():
            entry.weight.copy_(self.entry.weight[:, :length])
            entry.bias.copy_(self.entry.bias)
            if self.tail == "filler":
                entry.bias += self.entry.weight[:, length:] @ self.filler[length:]
            elif self.tail == "mask":
                entry.bias += self.dropped[:, length:].sum(-1)
        return nn.Sequential(entry, self.body)


def check_lengths(prior: OrderedMask, num_latents: int, posterior: str) -> None:
    """Raise a ValueError if the law of the lengths is not a single one over K, or its posterior is unknown."""
    if not isinstance(prior, OrderedMask) or prior.batch_shape or prior.num_units != num_latents:
        raise ValueError(
            f"argument `prior_lengths` must be an OrderedMask over {num_latents} units without batch shape; "
            f"got {prior!r}"
        )
    if posterior not in get_args(Posterior):
        raise ValueError(f"argument `posterior_lengths` must be one of {get_args(Posterior)}; got {posterior!r}")
    if posterior != "prior" and not (prior.probs > 0).all():
        raise ValueError(
            "argument `prior_lengths` gives some lengths no probability, so that a learned posterior would have an "
            "infinite KL; give it positive probabilities, or posterior_lengths='prior'"
        )
