"""A net whose outputs each see only the inputs before them."""

from itertools import pairwise

import torch
from pyro.nn.auto_reg_nn import MaskedLinear
from torch import Tensor, nn

__all__ = ["Conditioner"]

GAIN = 4.0  # of inputs and outputs: it must learn fast, as the codes whose law it is learn themselves
MAX_LOG_SCALE = 2.0


class Conditioner(nn.Module):
    r"""Mean and deviation of each coordinate as functions of those before it, for `NestedAutoregressive`.

    $$\mu_i(x_{<i}), \qquad \log \sigma_i(x_{<i}) \in (-2, 2).$$

    A perceptron with masked weights. Its hidden units are bounded, and so is what it puts out: in a chain of K draws a
    value that was never seen must not lead to ever larger ones. It starts at means of zero and deviations of one.

    Args:
        num_units: K.
        hidden: Units of each hidden layer.

    Raises:
        ValueError: If a size is not positive.

    Source: Germain et al., "MADE", arXiv 1502.03509.

    Example:
        >>> conditioner = Conditioner(num_units=3)
        >>> loc, scale = conditioner(torch.randn(5, 3))
        >>> loc.shape, scale.unique()
        (torch.Size([5, 3]), tensor([1.], grad_fn=<Unique2Backward0>))
    """

    def __init__(self, num_units: int, hidden: tuple[int, ...] = (96, 96)) -> None:
        super().__init__()
        if min((num_units, *hidden)) < 1:
            raise ValueError(
                f"Conditioner: arguments `num_units` and `hidden` must be positive; got {num_units} and {hidden}"
            )
        units = torch.arange(1, num_units + 1)
        # A hidden unit of degree d sees the inputs 1..d, and outputs d+1..K see it: degrees go from 1 to K - 1.
        degrees = [units] + [torch.arange(size) % max(num_units - 1, 1) + 1 for size in hidden]
        dtype = torch.get_default_dtype()
        layers: list[nn.Module] = []
        for before, after in pairwise(degrees):
            layers += [MaskedLinear(len(before), len(after), (after.unsqueeze(-1) >= before).to(dtype)), nn.Tanh()]
        last = _Outputs(len(degrees[-1]), 2 * num_units, (units.repeat(2).unsqueeze(-1) > degrees[-1]).to(dtype))
        self.net = nn.Sequential(*layers, last)
        self.net[0].mask *= GAIN  # of the weights: there are fewer of them than inputs in a batch

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return means and deviations, each the shape of `x`, (..., K)."""
        loc, raw_scale = self.net(x).chunk(2, -1)
        return loc, (MAX_LOG_SCALE * raw_scale.tanh()).exp()


class _Outputs(MaskedLinear):
    """The last layer, zero at first, whose means are multiplied by a gain, and whose scales come to be in (-1, 1)."""

    def __init__(self, num_inputs: int, num_outputs: int, mask: Tensor) -> None:
        super().__init__(num_inputs, num_outputs, mask)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)
        gains = torch.tensor([GAIN, 1 / MAX_LOG_SCALE]).repeat_interleave(num_outputs // 2)
        self.register_buffer("gains", gains)
        self.mask *= gains.unsqueeze(-1)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight * self.mask, self.bias * self.gains)
