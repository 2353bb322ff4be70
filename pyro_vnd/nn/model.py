"""A nested net with a likelihood: the Pyro model of labels, numbers, counts, pixels or tokens."""

from typing import Any, Self

import pyro
from torch import Tensor

from pyro_vnd._compat import QuietModule, only_plain_code
from pyro_vnd._inputs import Look, check_numbers
from pyro_vnd.nn.likelihoods import CategoricalLabels
from pyro_vnd.nn.net import NestedNet, NetGuide
from pyro_vnd.nn.net_likelihood import NetLikelihood

__all__ = ["NestedClassifier", "NestedModel", "net_and_likelihood"]


class NestedModel(QuietModule):
    r"""A nested net as the model of what it is trained on, $y_n \sim p(y \mid f(x_n))$.

    | y | likelihood | outputs of the net |
    |---|---|---|
    | one of C classes | `CategoricalLabels` | (N, C) logits |
    | yes or no, or D of them | `BernoulliLabels` | (N, 1) or (N, D) logits |
    | real numbers | `NormalTargets` | (N, D) means, and scales if they are predicted, too |
    | counts | `PoissonCounts` | (N, D) logarithms of rates |
    | one of K ordered levels | `OrdinalLabels` | (N, 1) |
    | a class for each token | `TokenLabels` | (N, T, C) logits |
    | a class for each pixel | `PixelLabels` | (N, C, H, W) logits |

    `evaluate_widths`, `evaluate_learned`, `loo_widths` and `widths_for` take it, and score with its likelihood.

    Args:
        net: The nested net.
        likelihood: The law of y given its outputs: one of the above, or a `NetLikelihood` of your own.

    Raises:
        ValueError: If the net is not nested, or, in use, its outputs do not suit the likelihood, or y does not.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from pyro_vnd.infer import fit
        >>> from pyro_vnd.nn import NestedModel, NormalTargets, nest
        >>> net = nest(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1)), torch.zeros(1, 4), num_blocks=4)
        >>> model = NestedModel(net, NormalTargets(scale=0.5))
        >>> x, y = torch.randn(50, 4), torch.randn(50)
        >>> result = fit(model, model.guide, (x, y), num_epochs=2, progress=False)
    """

    def __init__(self, net: NestedNet, likelihood: NetLikelihood) -> None:
        super().__init__()
        name = type(self).__name__
        if not isinstance(net, NestedNet):
            raise ValueError(
                f"{name}: argument `net` must be a NestedNet; got {type(net).__name__}: nest it first, "
                "nest(net, example_input)"
            )
        if not isinstance(likelihood, NetLikelihood):
            got = f"the class {likelihood.__name__}" if isinstance(likelihood, type) else type(likelihood).__name__
            raise ValueError(
                f"{name}: argument `likelihood` must be a NetLikelihood, such as CategoricalLabels() or "
                f"NormalTargets(); got {got}"
            )
        self.net, self.likelihood, self._look = net, likelihood, Look()

    @property
    def guide(self) -> NetGuide:
        """The guide of the net."""
        return self.net.guide

    def train(self, mode: bool = True) -> Self:
        """Set the mode; the next evaluation looks at the values of inputs and of y, see `forward`."""
        self._look.done = False
        return super().train(mode)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Run the model and return the outputs of the net.

        Args:
            x: Inputs, a row for each example. Their values are looked at in the first evaluation of a fit.
            y: What is observed, a row for each example. Its values are looked at in the first evaluation of a fit, on
                the CPU in each.

        Returns:
            Outputs of the net, shape (N, ...).

        Raises:
            ValueError: If outputs of the net, or y, do not suit the likelihood, or inputs are NaN.

        Warns:
            UserWarning: If inputs look like images of bytes.
        """
        caller = type(self).__name__
        if not self._look.done and not only_plain_code():
            check_numbers(caller, "x", (x,))
        plate = pyro.plate("data", len(x), dim=-1)
        outputs = self.net(x, plate=plate)
        self.likelihood.check_outputs(caller, outputs, len(x))
        if y is not None:
            look = self._look.is_due(y) if isinstance(y, Tensor) else False
            y = self.likelihood.targets(caller, y, outputs, values=look)
            self._look.done = True
        with plate:
            pyro.sample(self.likelihood.site, self.likelihood.law(outputs), obs=y)
        return outputs


class NestedClassifier(NestedModel):
    r"""A nested net as the model of classes: short for `NestedModel(net, CategoricalLabels())`.

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
        super().__init__(net, CategoricalLabels())


def net_and_likelihood(caller: str, model: Any) -> tuple[NestedNet, NetLikelihood]:
    """Return a nested net and its likelihood, which is that of classes where a net comes alone.

    Args:
        caller: What was given the model, for messages.
        model: A `NestedModel`, or a nested net.

    Raises:
        ValueError: If it is neither.
    """
    if isinstance(model, NestedModel):
        return model.net, model.likelihood
    if isinstance(model, NestedNet):
        return model, CategoricalLabels()
    raise ValueError(
        f"{caller}: argument `model` must be a NestedModel, or a NestedNet of classes, as `nest` returns; got "
        f"{type(model).__name__}"
    )
