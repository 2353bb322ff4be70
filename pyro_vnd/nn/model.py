"""A nested net with a likelihood: the Pyro model of labels, numbers, counts, pixels or tokens."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Self

import pyro
from torch import Tensor

from pyro_vnd._compat import QuietModule, only_plain_code
from pyro_vnd._data import split_inputs
from pyro_vnd._inputs import Look, check_numbers
from pyro_vnd.nn.guide import NetGuide
from pyro_vnd.nn.likelihoods import CategoricalLabels
from pyro_vnd.nn.net import NestedNet
from pyro_vnd.nn.net_likelihood import NetLikelihood
from pyro_vnd.nn.outputs import Output, picked

if TYPE_CHECKING:
    from pyro_vnd.nn.draws import NetDraws

__all__ = ["NestedClassifier", "NestedModel", "taken_apart"]


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

    A net that takes several inputs was nested with them, as a tuple or by name, and the data of a fit are the same and
    y: (left, right, y), or {"input_ids": ..., "attention_mask": ..., "y": ...}. In data by name "y" is always what is
    observed, so that a net whose input has this name is to be nested with a tuple, and gets its data in order.

    `evaluate_widths`, `evaluate_learned`, `loo_widths` and `widths_for` take it, and score with its likelihood.

    Args:
        net: The nested net.
        likelihood: The law of y given its outputs: one of the above, or a `NetLikelihood` of your own.
        output: What of that which the net returns the likelihood takes: a key, the name of an attribute, a place in a
            tuple, or a function that picks it. By default the tensor that it returns, or what is called "logits".

    Raises:
        ValueError: If the net is not nested, or was nested with an input by the name "y", or, in use, its outputs do
            not suit the likelihood, or y does not, or the inputs are not those of the net.

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

    def __init__(self, net: NestedNet, likelihood: NetLikelihood, *, output: Output = None) -> None:
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
        _refuse_input_y(name, net)
        if isinstance(output, bool) or not (output is None or isinstance(output, str | int) or callable(output)):
            raise ValueError(
                f"{name}: argument `output` must be a key or the name of an attribute (a string), a place in a tuple "
                f"(an int) or a function; got {output!r}"
            )
        self.net, self.likelihood, self.output, self._look = net, likelihood, output, Look()

    @property
    def guide(self) -> NetGuide:
        """The guide of the net."""
        return self.net.guide

    def train(self, mode: bool = True) -> Self:
        """Set the mode; the next evaluation looks at the values of inputs and of y, see `forward`."""
        self._look.done = False
        return super().train(mode)

    def forward(self, *data: Any, **named: Any) -> Tensor:
        """Run the model and return the outputs of the net.

        Args:
            *data: Inputs, as many as the net was nested with, a row for each example, and what is observed, y. Values
                of inputs are looked at in the first evaluation of a fit, and those of y too, on the CPU in each.
            **named: The same by name: "y" is what is observed, "x" the first input; other names are those of the net.

        Returns:
            Outputs of the net, shape (N, ...).

        Raises:
            ValueError: If outputs of the net, or y, do not suit the likelihood, or inputs are NaN.

        Warns:
            UserWarning: If inputs look like images of bytes.
        """
        caller = type(self).__name__
        batch = split_inputs(data, named, self.net.num_inputs)
        batch.check(caller, self.net.num_inputs, alone=True)
        if not self._look.done and not only_plain_code():
            check_numbers(caller, "x", batch.inputs)
        plate = pyro.plate("data", batch.num_rows, dim=-1)
        outputs = self.outputs_of(self.net(*batch.args, plate=plate, **batch.kwargs))
        self.likelihood.check_outputs(caller, outputs, batch.num_rows)
        y = batch.y
        if y is not None:
            look = self._look.is_due(y) if isinstance(y, Tensor) else False
            y = self.likelihood.targets(caller, y, outputs, values=look)
            self._look.done = True
        with plate:
            pyro.sample(self.likelihood.site, self.likelihood.law(outputs), obs=y)
        return outputs

    def draws(self, num_samples: int, seed: int | None = None, *, keep: bool = True) -> NetDraws:
        """Return draws of the net, whose predictions are what the likelihood takes; arguments as in `net.draws`."""
        return self.net.draws(num_samples, seed, keep=keep).picking(self.outputs_of)

    def outputs_of(self, returned: Any) -> Tensor:
        """Return what the likelihood takes of what the net returned; raise a ValueError if there is no such tensor."""
        return picked(type(self).__name__, returned, self.output)


class NestedClassifier(NestedModel):
    r"""A nested net as the model of classes: short for `NestedModel(net, CategoricalLabels())`.

    Args:
        net: The nested net; its outputs are logits, shape (N, C), one for each of two or more classes.
        output: As in `NestedModel`.

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

    def __init__(self, net: NestedNet, *, output: Output = None) -> None:
        super().__init__(net, CategoricalLabels(), output=output)


def taken_apart(caller: str, model: Any) -> tuple[NestedNet, NetLikelihood, Callable[[Any], Tensor]]:
    """Return a nested net, its likelihood, which is that of classes where a net comes alone, and what picks outputs.

    Args:
        caller: What was given the model, for messages.
        model: A `NestedModel`, or a nested net.

    Raises:
        ValueError: If it is neither.
    """
    if isinstance(model, NestedModel):
        return model.net, model.likelihood, model.outputs_of
    if isinstance(model, NestedNet):
        _refuse_input_y(caller, model)
        return model, CategoricalLabels(), partial(picked, caller)
    raise ValueError(
        f"{caller}: argument `model` must be a NestedModel, or a NestedNet of classes, as `nest` returns; got "
        f"{type(model).__name__}"
    )


def _refuse_input_y(caller: str, net: NestedNet) -> None:
    if "y" in net.input_names:
        raise ValueError(
            f"{caller}: {type(net.net).__name__} was nested with an input by the name 'y', by which data have what is "
            "observed: nest it with a tuple of its inputs, and give them in order, or rename the input"
        )
