"""A net whose outputs each see only the inputs before them."""

import math
from itertools import pairwise
from typing import Any

import torch
from pyro.nn.auto_reg_nn import MaskedLinear
from torch import Tensor, nn

from pyro_vnd._inputs import check_features
from pyro_vnd._sizes import check_count, check_sizes

__all__ = ["Conditioner"]

GAIN = 4.0  # of inputs and outputs: it must learn fast, as the codes whose law it is learn themselves
MAX_LOG_SCALE = 2.0


class Conditioner(nn.Module):
    r"""Mean and deviation of each coordinate as functions of those before it, for `NestedAutoregressive`.

    $$\mu_i(x_{<i}), \qquad \log \sigma_i(x_{<i}) \in (-2, 2).$$

    A perceptron with masked weights. Its hidden units are bounded, and so is what it puts out: in a chain of K draws a
    value that was never seen must not lead to ever larger ones. It starts at means of zero and deviations of one.

    With more components it has a mixture of Normals for each coordinate, and the logits of their weights:

    $$\mu_{im}(x_{<i}), \qquad \log \sigma_{im}(x_{<i}) \in (-2, 2), \qquad \log w_{im}(x_{<i}).$$

    They start apart, at a mixture with mean zero and deviation one.

    Args:
        num_units: K.
        hidden: Units of each hidden layer.
        num_components: Normals of a mixture, M.

    Raises:
        ValueError: If a size is not positive.

    Source: Germain et al., "MADE", arXiv 1502.03509.

    Example:
        >>> conditioner = Conditioner(num_units=3)
        >>> loc, scale = conditioner(torch.randn(5, 3))
        >>> loc.shape, scale.unique()
        (torch.Size([5, 3]), tensor([1.], grad_fn=<Unique2Backward0>))
    """

    def __init__(self, num_units: int, hidden: tuple[int, ...] = (96, 96), num_components: int = 1) -> None:
        super().__init__()
        check_count("Conditioner", num_units=num_units, num_components=num_components)
        check_sizes("Conditioner", hidden=hidden)
        self.num_units, self.num_components = num_units, num_components
        units = torch.arange(1, num_units + 1)
        # A hidden unit of degree d sees the inputs 1..d, and outputs d+1..K see it: degrees go from 1 to K - 1.
        degrees = [units] + [torch.arange(size) % max(num_units - 1, 1) + 1 for size in hidden]
        masks = [after.unsqueeze(-1) >= before for before, after in pairwise(degrees)]
        outputs = units.repeat_interleave(num_components).repeat(2 if num_components == 1 else 3)
        masks = [mask.to(torch.get_default_dtype()) for mask in (*masks, outputs.unsqueeze(-1) > degrees[-1])]
        masks[0] *= GAIN  # on the weights, of which there are fewer than inputs in a batch
        layers: list[nn.Module] = []
        for mask in masks[:-1]:
            layers += [MaskedLinear(mask.shape[1], mask.shape[0], mask), nn.Tanh()]
        self.net = nn.Sequential(*layers, _Outputs(masks[-1], num_components))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return means and deviations, each the shape of `x`, (..., K); of mixtures logits, too, each (..., K, M)."""
        last: Any = self.net[-1]
        check_features("Conditioner: argument `x`", x, self.num_units, last.bias.dtype)
        found = self.net(x)
        if self.num_components > 1:
            found = found.unflatten(-1, (3, x.shape[-1], self.num_components)).movedim(-3, 0)
            loc, raw_scale, logits = found
            return loc, _scale(raw_scale), logits
        loc, raw_scale = found.chunk(2, -1)
        return loc, _scale(raw_scale)


def _scale(raw_scale: Tensor) -> Tensor:
    return (MAX_LOG_SCALE * raw_scale.tanh()).exp()


class _Outputs(MaskedLinear):
    """Means times their gain, log-scales over their largest value, which `tanh` is to bound, and logits as they are.

    Weights are zero at first. So are biases, but for those that set components of a mixture apart: at quantiles of a
    Normal, with half of the variance between them and half within.
    """

    gains: Tensor

    def __init__(self, mask: Tensor, num_components: int) -> None:
        num_outputs, num_inputs = mask.shape
        gains = torch.tensor([GAIN, 1 / MAX_LOG_SCALE, 1.0][: 2 if num_components == 1 else 3]).to(mask)
        gains = gains.repeat_interleave(num_outputs // len(gains))
        super().__init__(num_inputs, num_outputs, mask * gains.unsqueeze(-1))
        self.register_buffer("gains", gains)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)
        if num_components > 1:
            quantiles = torch.special.ndtri((torch.arange(num_components).to(mask) + 0.5) / num_components)
            with torch.no_grad():
                loc, raw_scale, _ = self.bias.view(3, -1, num_components)
                loc[:] = quantiles / quantiles.square().mean().sqrt() * 0.5**0.5 / GAIN
                raw_scale[:] = math.atanh(math.log(0.5**0.5) / MAX_LOG_SCALE) * MAX_LOG_SCALE

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight * self.mask, self.bias * self.gains)
