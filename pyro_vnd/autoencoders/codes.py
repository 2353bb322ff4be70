"""What a code that is cut has lost, as far as it can be told from the rest."""

from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.fx import symbolic_trace

from pyro_vnd.distributions import NestedNormal, OrderedMask, OrderedMaskStraightThrough

__all__ = [
    "CodeDecoder",
    "CodeEncoder",
    "Completion",
    "LengthEncoder",
    "LengthPosterior",
    "Tail",
    "check_lengths",
    "full_width",
]


GAIN = 4.0  # of inputs and outputs: images may vary quickly with the few numbers of a short code, and it learns fast


class Completion(nn.Module):
    r"""Predict the latents that a code has lost from those that it has kept, $z + (1 - m) \odot g(z, m)$.

    What is dropped is often not far from a function of what is kept. A decoder that has learned whole codes can then do
    much of its work for cut ones, and their share of it is a small net that whole codes never meet. g is zero at first.

    Args:
        num_latents: K.
        hidden: Units of each of its two hidden layers.

    Example:
        >>> complete = Completion(num_latents=4)
        >>> code, mask = torch.tensor([0.3, -1.2, 0.0, 0.0]), torch.tensor([1.0, 1.0, 0.0, 0.0])
        >>> complete(code, mask)[:2]
        tensor([ 0.3000, -1.2000], grad_fn=<SliceBackward0>)
    """

    def __init__(self, num_latents: int, hidden: int = 96) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(2 * num_latents, hidden),
            nn.SiLU(),
            nn.Linear(hidden, hidden),
            nn.SiLU(),
            nn.Linear(hidden, num_latents),
        )
        nn.init.zeros_(self.net[-1].weight)
        nn.init.zeros_(self.net[-1].bias)

    def forward(self, code: Tensor, mask: Tensor) -> Tensor:
        """Return completed codes, given codes, shape (..., K), and their masks."""
        dropped = (1 - mask).expand_as(code)
        inputs = GAIN * torch.cat([code, dropped], -1)
        rows = OrderedMaskStraightThrough.partial_rows(mask) if mask.shape == code.shape else None
        if rows is None:
            return torch.addcmul(code, inputs[..., code.shape[-1] :], self.net(inputs))
        inputs = inputs.index_select(0, rows)  # whole codes have nothing to add
        return code.index_add(0, rows, inputs[:, code.shape[-1] :] * self.net(inputs))

    @torch.no_grad()
    def narrow(self, length: int) -> nn.Module:
        """Return a plain net from the first latents to all of them."""
        first, *middle, last = self.net
        num_latents = last.out_features
        dropped = (torch.arange(num_latents, device=first.weight.device) >= length).to(first.weight)
        narrow_first = nn.Linear(length, first.out_features).to(first.weight)
        narrow_last = nn.Linear(last.in_features, num_latents - length).to(last.weight)
        narrow_first.weight.copy_(GAIN * first.weight[:, :length])
        narrow_first.bias.copy_(first.bias + GAIN * first.weight[:, num_latents:] @ dropped)
        narrow_last.weight.copy_(GAIN * last.weight[length:])
        narrow_last.bias.copy_(GAIN * last.bias[length:])
        return symbolic_trace(_Append(nn.Sequential(narrow_first, *middle, narrow_last)))


class _Append(nn.Module):
    def __init__(self, rest: nn.Module) -> None:
        super().__init__()
        self.rest = rest

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.rest(x)], -1)


LengthPosterior = Literal["prior", "global", "amortised"]
Tail = Literal["zeros", "filler", "mask", "completion"]


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


class LengthEncoder(nn.Module):
    """Numbers for each image and a law of lengths, from one linear map: what encoders of ordered codes share.

    Args:
        body: Maps images to features.
        num_features: Features of an image.
        num_values: Numbers for each image.
        prior: Law of the lengths a priori.
        posterior: Where q(L | x) comes from: "prior" leaves it at the prior, which makes the prior's rate a prescribed
            one, as in nested dropout; "global" learns one law for all images; "amortised" one for each.
    """

    def __init__(
        self, body: nn.Module, num_features: int, num_values: int, prior: OrderedMask, posterior: LengthPosterior
    ) -> None:
        super().__init__()
        self.body, self.posterior, self.num_latents, self.num_values = body, posterior, prior.num_units, num_values
        self.heads = nn.Linear(num_features, num_values + (self.num_latents if posterior == "amortised" else 0))
        if posterior == "prior":
            self.register_buffer("length_probs", prior.probs.detach().clone())
        elif posterior == "global":
            self.length_logits = nn.Parameter(prior.logits.detach().clone())
        else:
            with torch.no_grad():  # starts at the prior
                self.heads.weight[num_values:] = 0
                self.heads.bias[num_values:] = prior.logits.detach()

    def values_and_lengths(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the numbers, shape (N, num_values), and the `probs` or `logits` of the law of the lengths."""
        heads = self.heads(self.body(x))
        if self.posterior == "prior":
            return heads, {"probs": self.length_probs}
        if self.posterior == "global":
            return heads, {"logits": self.length_logits}
        values, lengths = heads.split([self.num_values, self.num_latents], -1)
        return values, {"logits": lengths}

    def narrow(self, num_values: int) -> nn.Sequential:
        """Return a plain net from images to the first numbers."""
        head = nn.Linear(self.heads.in_features, num_values).to(self.heads.weight)
        with torch.no_grad():
            head.weight.copy_(self.heads.weight[:num_values])
            head.bias.copy_(self.heads.bias[:num_values])
        return nn.Sequential(self.body, head)


class CodeEncoder(LengthEncoder):
    r"""Amortised posterior over codes: a `NestedNormal` whose mean, deviation and lengths depend on the image.

    $$q(z, L \mid x) = q(L \mid x) \, N(z_{\le L}; \mu(x), \sigma(x)).$$

    Args:
        body: As in `LengthEncoder`.
        num_features: As in `LengthEncoder`.
        prior: As in `LengthEncoder`.
        posterior: As in `LengthEncoder`.
        shared_scale: Whether the deviations are the same for all images.
    """

    def __init__(
        self,
        body: nn.Module,
        num_features: int,
        prior: OrderedMask,
        posterior: LengthPosterior,
        *,
        shared_scale: bool = False,
    ) -> None:
        super().__init__(body, num_features, (1 if shared_scale else 2) * prior.num_units, prior, posterior)
        self.raw_scale = nn.Parameter(torch.zeros(self.num_latents)) if shared_scale else None

    def forward(self, x: Tensor) -> NestedNormal:
        """Return the law of the codes of images, batch shape (N,)."""
        values, lengths = self.values_and_lengths(x)
        loc, raw_scale = values.chunk(2, -1) if self.raw_scale is None else (values, self.raw_scale)
        return NestedNormal(loc, nn.functional.softplus(raw_scale) + 1e-4, **lengths)


class CodeDecoder(nn.Module):
    r"""From codes to the outputs of a decoder, $f(W z + b)$, with something in place of dropped latents.

    What that is, `tail`, starts at nothing and vanishes for whole codes:

    - "zeros", nothing;
    - "filler", a learned number for each;
    - "mask", a shift, $W z + b + U (1 - m)$: zero is a likely value of a latent that is kept, and by the shift the
      decoder knows the one from the other;
    - "completion", a prediction of each from the latents that are kept, see `Completion`.

    Args:
        body: What follows the linear map.
        num_inputs: Outputs of the linear map.
        num_latents: K.
        tail: As above.
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
            self.shift = nn.Parameter(torch.zeros(num_inputs, num_latents))
        elif tail == "completion":
            self.completion = Completion(num_latents)

    def forward(self, code: Tensor, mask: Tensor) -> Tensor:
        """Return the outputs of codes, shape (..., K), and their masks: shape (..., *image_shape)."""
        if self.tail == "filler":
            code = code + (1 - mask) * self.filler
        elif self.tail == "completion":
            code = self.completion(code, mask)
        inputs = self.entry(code)
        if self.tail == "mask":
            inputs = inputs + nn.functional.linear(1 - mask, self.shift)
        outputs = self.body(inputs.reshape(-1, inputs.shape[-1]))
        return outputs.reshape(*code.shape[:-1], *outputs.shape[1:])

    @torch.no_grad()
    def narrow(self, length: int) -> nn.Sequential:
        """Return a plain net from the first latents to the outputs: a filler or shift is part of the linear map."""
        if self.tail == "completion" and length < self.entry.in_features:
            return nn.Sequential(self.completion.narrow(length), self.entry, self.body)
        entry = nn.Linear(length, self.entry.out_features).to(self.entry.weight)
        weight, bias = self.entry.weight, self.entry.bias
        dropped = (torch.arange(weight.shape[1], device=weight.device) >= length).to(weight)
        if self.tail == "filler":
            bias = bias + weight @ (dropped * self.filler)
        elif self.tail == "mask":
            bias = bias + self.shift @ dropped
        entry.weight.copy_(weight[:, :length])
        entry.bias.copy_(bias)
        return nn.Sequential(entry, self.body)


def check_lengths(prior: OrderedMask, num_latents: int, posterior: str) -> None:
    """Raise a ValueError if the law of the lengths is not a single one over K, or its posterior is unknown."""
    if not isinstance(prior, OrderedMask) or prior.batch_shape or prior.num_units != num_latents:
        raise ValueError(
            f"argument `prior_lengths` must be an OrderedMask over {num_latents} units without batch shape; "
            f"got {prior!r}"
        )
    if posterior not in get_args(LengthPosterior):
        raise ValueError(f"argument `posterior_lengths` must be one of {get_args(LengthPosterior)}; got {posterior!r}")
    if posterior != "prior" and not (prior.probs > 0).all():
        raise ValueError(
            "argument `prior_lengths` gives some lengths no probability, so that a learned posterior would have an "
            "infinite KL; give it positive probabilities, or posterior_lengths='prior'"
        )
