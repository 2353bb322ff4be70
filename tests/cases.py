"""One row a distribution: what a contract test needs to build it, and what it promises.

A new distribution is one row of `CASES`; a contract is one parametrised test.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from pyro_vnd.distributions import (
    NestedAutoregressive,
    NestedNormal,
    OrderedMask,
    OrderedMaskStraightThrough,
    RelaxedOrderedMask,
)

Draw = Callable[..., Tensor]


def real(*shape: int, dtype: torch.dtype | None = None) -> Tensor:
    return torch.randn(shape).to(dtype or torch.get_default_dtype())


def positive(*shape: int, dtype: torch.dtype | None = None) -> Tensor:
    return (torch.rand(shape) + 0.3).to(dtype or torch.get_default_dtype())


def half_of_the_last(x: Tensor) -> tuple[Tensor, Tensor]:
    """Condition each coordinate on the one before it: x_i ~ N(x_{i-1} / 2, 1/2 + 1/4 tanh(x_{i-1})^2)."""
    last = torch.nn.functional.pad(x[..., :-1], (1, 0))
    return last / 2, 0.5 + last.tanh() ** 2 / 4


@dataclass(frozen=True)
class Case:
    """A class, its arguments, and flags.

    `units` are arguments of shape batch_shape + (K,), `batch` those of shape batch_shape, `options` the same for all.
    """

    name: str
    cls: type
    units: dict[str, Draw]
    batch: dict[str, Draw] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    hard: bool = True  # samples are zeros and ones
    reparameterised: bool = True
    enumerable: bool = True
    exact: bool = True  # has a mean, a variance and a divergence from its own kind
    learned: tuple[str, ...] = ()  # arguments that a reparameterised sample must have a gradient to

    def arguments(
        self, batch_shape: tuple[int, ...] = (), num_units: int = 4, dtype: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        units = {name: draw(*batch_shape, num_units, dtype=dtype) for name, draw in self.units.items()}
        return units | {name: draw(*batch_shape, dtype=dtype) for name, draw in self.batch.items()}

    def build(
        self,
        batch_shape: tuple[int, ...] = (),
        num_units: int = 4,
        dtype: torch.dtype | None = None,
        **given: Any,
    ) -> Any:
        """An instance with random arguments, but for those `given`."""
        return self.cls(**(self.arguments(batch_shape, num_units, dtype) | self.options | given))


CASES = [
    Case("ordered-logits", OrderedMask, {"logits": real}, reparameterised=False),
    Case("ordered-probs", OrderedMask, {"probs": positive}, reparameterised=False),
    Case(
        "relaxed-logits",
        RelaxedOrderedMask,
        {"logits": real},
        {"temperature": positive},
        hard=False,
        enumerable=False,
        exact=False,
        learned=("logits", "temperature"),
    ),
    Case(
        "relaxed-probs",
        RelaxedOrderedMask,
        {"probs": positive},
        options={"temperature": 0.7},
        hard=False,
        enumerable=False,
        exact=False,
        learned=("probs",),
    ),
    Case(
        "logistic-logits",
        OrderedMaskStraightThrough,
        {"logits": real},
        {"temperature": positive},
        enumerable=False,
        learned=("logits", "temperature"),
    ),
    Case(
        "logistic-probs",
        OrderedMaskStraightThrough,
        {"probs": positive},
        options={"temperature": 0.5},
        enumerable=False,
        learned=("probs",),
    ),
    Case(
        "gumbel-logits",
        OrderedMaskStraightThrough,
        {"logits": real},
        {"temperature": positive},
        options={"noise": "gumbel"},
        enumerable=False,
        learned=("logits", "temperature"),
    ),
    Case(
        "gumbel-probs",
        OrderedMaskStraightThrough,
        {"probs": positive},
        options={"noise": "gumbel", "temperature": 0.5},
        enumerable=False,
        learned=("probs",),
    ),
    Case(
        "nested-normal-logits",
        NestedNormal,
        {"loc": real, "scale": positive, "logits": real},
        {"temperature": positive},
        hard=False,
        enumerable=False,
        learned=("loc", "scale", "logits", "temperature"),
    ),
    Case(
        "nested-normal-probs",
        NestedNormal,
        {"loc": real, "scale": positive, "probs": positive},
        options={"noise": "gumbel"},
        hard=False,
        enumerable=False,
        learned=("loc", "scale", "probs"),
    ),
    Case(
        "nested-autoregressive-logits",
        NestedAutoregressive,
        {"logits": real},
        {"temperature": positive},
        options={"conditioner": half_of_the_last},
        hard=False,
        enumerable=False,
        exact=False,
        learned=("logits", "temperature"),
    ),
    Case(
        "nested-autoregressive-probs",
        NestedAutoregressive,
        {"probs": positive},
        options={"conditioner": half_of_the_last, "noise": "gumbel"},
        hard=False,
        enumerable=False,
        exact=False,
        learned=("probs",),
    ),
]


def each(cases: list[Case] = CASES, **flags: bool) -> pytest.MarkDecorator:
    """Run a test for each case, or each with the given flags."""
    chosen = [case for case in cases if all(getattr(case, name) == value for name, value in flags.items())]
    return pytest.mark.parametrize("case", chosen, ids=lambda case: case.name)
