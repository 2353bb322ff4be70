"""Nested nets with a likelihood."""

import pyro
from torch import Tensor

from pyro_vnd._compat import QuietModule
from pyro_vnd.nn.net import NestedNet, NetGuide

__all__ = ["NestedClassifier"]


class NestedClassifier(QuietModule):
    r"""A nested net as the model of labels, $y_n \sim \mathrm{Categorical}(\mathrm{logits} = f(x_n))$.

    Args:
        net: The nested net; its outputs are logits, shape (N, C).

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from pyro_vnd.nn import NestedClassifier, nest
        >>> net = nest(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), torch.zeros(1, 4), num_blocks=4)
        >>> model = NestedClassifier(net)
        >>> model.guide is net.guide
        True
    """

    def __init__(self, net: NestedNet) -> None:
        super().__init__()
        self.net = net

    @property
    def guide(self) -> NetGuide:
        """The guide of the net."""
        return self.net.guide

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Run the model and return the logits."""
        plate = pyro.plate("data", len(x), dim=-1)
        logits = self.net(x, plate=plate)
        with plate:
            pyro.sample("label", pyro.distributions.Categorical(logits=logits), obs=y)
        return logits
