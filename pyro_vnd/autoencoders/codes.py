"""From images to codes and back, and what stands in for what a code that is cut has lost."""

from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.fx import symbolic_trace

from pyro_vnd._sizes import is_one_of
from pyro_vnd.autoencoders.bodies import Bodies
from pyro_vnd.autoencoders.lengths import LengthEncoder, LengthSource
from pyro_vnd.distributions import NestedNormal, OrderedMask, OrderedMaskStraightThrough

__all__ = ["CodeDecoder", "CodeEncoder", "Completion", "Tail", "check_tail"]

Tail: TypeAlias = Literal["zeros", "filler", "mask", "completion"]
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
        body = nn.Sequential(nn.Linear(2 * num_latents, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU())
        last = nn.Linear(hidden, num_latents)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.net = nn.Sequential(*body, last)

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
        assert isinstance(first, nn.Linear)
        assert isinstance(last, nn.Linear)
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


class CodeEncoder(LengthEncoder):
    r"""Amortised posterior over codes: a `NestedNormal` whose mean, deviation and lengths depend on the image.

    $$q(z, L \mid x) = q(L \mid x) \, N(z_{\le L}; \mu(x), \sigma(x)).$$

    Args:
        bodies: As in `LengthEncoder`.
        prior: As in `LengthEncoder`.
        source: As in `LengthEncoder`.
        shared_scale: Whether the deviations are the same for all images.
    """

    def __init__(self, bodies: Bodies, prior: OrderedMask, source: LengthSource, *, shared_scale: bool = False) -> None:
        super().__init__(bodies, (1 if shared_scale else 2) * prior.num_units, prior, source)
        self.raw_scale = nn.Parameter(torch.zeros(self.num_latents)) if shared_scale else None

    @property
    def _num_means(self) -> int:
        return self.num_latents

    def forward(self, x: Tensor, *, priced: bool = False) -> NestedNormal:
        """Return the law of the codes of images, batch shape (N,); `priced` as in `values_and_lengths`."""
        values, lengths = self.values_and_lengths(x, priced=priced)
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
        bodies: Whose decoder follows the linear map.
        num_latents: K.
        tail: As above.

    Raises:
        ValueError: If `tail` is none of these.
    """

    def __init__(self, bodies: Bodies, num_latents: int, tail: Tail) -> None:
        super().__init__()
        check_tail(type(self).__name__, tail)
        self.entry = nn.Linear(num_latents, bodies.num_inputs)
        self.body, self.tail = bodies.decoder, tail
        if tail == "filler":
            self.filler = nn.Parameter(torch.zeros(num_latents))
        elif tail == "mask":
            self.shift = nn.Parameter(torch.zeros(bodies.num_inputs, num_latents))
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
        weight: Tensor = self.entry.weight
        bias: Tensor = self.entry.bias
        dropped = (torch.arange(weight.shape[1], device=weight.device) >= length).to(weight)
        if self.tail == "filler":
            bias = bias + weight @ (dropped * self.filler)
        elif self.tail == "mask":
            bias = bias + self.shift @ dropped
        entry.weight.copy_(weight[:, :length])
        entry.bias.copy_(bias)
        return nn.Sequential(entry, self.body)


def check_tail(model: str, tail: str) -> None:
    """Raise a ValueError if nobody knows the tail."""
    if not is_one_of(tail, get_args(Tail)):
        raise ValueError(f"{model}: argument `tail` must be one of {get_args(Tail)}; got {tail!r}")
