"""What a code that is cut has lost, as far as it can be told from the rest."""

import torch
from torch import Tensor, nn
from torch.fx import symbolic_trace

from pyro_vnd.distributions import OrderedMaskStraightThrough

__all__ = ["Completion"]

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
    def truncate(self, length: int) -> nn.Module:
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
