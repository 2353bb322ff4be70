"""The guide of a nested net."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pyro
from torch import Tensor

from pyro_vnd._compat import QuietModule
from pyro_vnd.distributions import OrderedMask

if TYPE_CHECKING:
    from pyro_vnd.nn.net import NestedNet

__all__ = ["NetGuide"]


class NetGuide(QuietModule):
    """Guide of a `NestedNet`: independent Normal weights and straight-through masks.

    Args:
        net: The net, whose parameters these are.
    """

    def __init__(self, net: NestedNet) -> None:
        super().__init__(net.prefix.rstrip("."))  # nets with different prefixes keep apart in Pyro's parameter store
        self.net = net

    @property
    def laws(self) -> dict[str, OrderedMask]:
        """The learned law of each mask, by name of its site and without gradient."""
        return self.net.laws

    def forward(self, *inputs: Any, plate: pyro.plate | None = None, **named: Any) -> dict[str, Tensor]:
        """Draw masks and weights.

        Args:
            *inputs: Arguments of the model; the first dimension of the first tensor among them counts the examples.
            plate: The plate of the data; by default one named "data" is opened.
            **named: Arguments of the model by name, likewise.

        Returns:
            The draws by name of their site.
        """
        first = next((x for x in (*inputs, *named.values()) if isinstance(x, Tensor)), None)
        if first is None:
            raise ValueError(f"NetGuide: one argument must be a tensor with a row for each example; got {named}")
        with self.net._drawn("posterior", len(first), plate) as values:
            return values
