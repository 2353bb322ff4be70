"""Nested nets with a likelihood."""

from typing import Any, Self

import pyro
from torch import Tensor

from pyro_vnd._compat import QuietModule
from pyro_vnd._inputs import Look, check_labels
from pyro_vnd.nn.net import NestedNet, NetGuide

__all__ = ["NestedClassifier"]


class NestedClassifier(QuietModule):
    r"""A nested net as the model of labels, $y_n \sim \mathrm{Categorical}(\mathrm{logits} = f(x_n))$.

    Args:
        net: The nested net; its outputs are logits, shape (N, C), one for each of two or more classes.

    Raises:
        ValueError: If the net is not nested, or, in use, its outputs are no such logits or labels no classes.

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
        if not isinstance(net, NestedNet):
            raise ValueError(
                f"NestedClassifier: argument `net` must be a NestedNet; got {type(net).__name__}: nest it first, "
                "nest(net, example_input)"
            )
        self.net, self._look = net, Look()

    @property
    def guide(self) -> NetGuide:
        """The guide of the net."""
        return self.net.guide

    def train(self, mode: bool = True) -> Self:
        """Set the mode; the next evaluation looks at the values of labels, see `forward`."""
        self._look.done = False
        return super().train(mode)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Run the model and return the logits.

        Args:
            x: Inputs, a row for each example.
            y: Labels, integers from 0 to C - 1, shape (N,). Their values are looked at in the first evaluation of a
                fit, on the CPU in each.

        Returns:
            Shape (N, C).

        Raises:
            ValueError: If outputs of the net are no logits, or labels no classes.
        """
        plate = pyro.plate("data", len(x), dim=-1)
        logits = self.net(x, plate=plate)
        self._check_logits(logits, len(x))
        if y is not None:
            look = self._look.is_due(y) if isinstance(y, Tensor) else False
            y = check_labels("NestedClassifier", y, len(x), logits.shape[-1], argument="y", values=look)
            self._look.done = True
        with plate:
            pyro.sample("label", pyro.distributions.Categorical(logits=logits), obs=y)
        return logits

    @staticmethod
    def _check_logits(logits: Any, num_rows: int) -> None:
        if isinstance(logits, Tensor) and logits.dim() >= 2 and logits.shape[-2] == num_rows and logits.shape[-1] > 1:
            return
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        advice = "Classes of tokens or pixels want a model of your own, with Categorical(logits=...).to_event(1)"
        if isinstance(logits, Tensor) and logits.shape[1:] in ((), (1,)):
            advice = "Of two classes give each its logit, nn.Linear(..., 2)"
        raise ValueError(
            "NestedClassifier: argument `net` must return logits of shape (N, C), one for each of two or more classes; "
            f"got {got} for {num_rows} rows. {advice}"
        )
