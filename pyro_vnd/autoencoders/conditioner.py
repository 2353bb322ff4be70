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
        masks = [after.unsqueeze(-1) >= before for before, after in pairwise(degrees)]
        masks = [mask.to(torch.get_default_dtype()) for mask in (*masks, units.repeat(2).unsqueeze(-1) > degrees[-1])]
        masks[0] *= GAIN  # on the weights, of which there are fewer than inputs in a batch
        layers: list[nn.Module] = []
        for mask in masks[:-1]:
            layers += [MaskedLinear(mask.shape[1], mask.shape[0], mask), nn.Tanh()]
        self.net = nn.Sequential(*layers, _Outputs(masks[-1]))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return means and deviations, each the shape of `x`, (..., K)."""
        loc, raw_scale = self.net(x).chunk(2, -1)
        return loc, (MAX_LOG_SCALE * raw_scale.tanh()).exp()


class _Outputs(MaskedLinear):
    """Means times their gain, and log-scales over their largest value, which `tanh` is to bound; all zero at first."""

    gains: Tensor

    def __init__(self, mask: Tensor) -> None:
        num_outputs, num_inputs = mask.shape
        gains = torch.tensor([GAIN, 1 / MAX_LOG_SCALE]).to(mask).repeat_interleave(num_outputs // 2)
        super().__init__(num_inputs, num_outputs, mask * gains.unsqueeze(-1))
        self.register_buffer("gains", gains)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight * self.mask, self.bias * self.gains)
