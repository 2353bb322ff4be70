"""One row a distribution: what a contract test needs to build it, and what it promises.

A new distribution is one row of `CASES`; a contract is one parametrised test.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from inspect import signature
from typing import Any

import pytest
import torch
from torch import Tensor

from pyro_vnd.autoencoders.likelihoods import IsotropicNormal
from pyro_vnd.distributions import (
    Gated,
    LogUniform,
    NestedAutoregressive,
    NestedNormal,
    OrderedMask,
    OrderedMaskStraightThrough,
    RelaxedOrderedMask,
)
from pyro_vnd.distributions.masks import CutMask
from pyro_vnd.distributions.weights import LogScaleNormal

Draw = Callable[..., Tensor]


def real(*shape: int, dtype: torch.dtype | None = None) -> Tensor:
    return torch.randn(shape).to(dtype or torch.get_default_dtype())


compiles = pytest.mark.skipif(
    torch.__version__ < "2.13", reason="older versions of torch do not compile all that laws do to one graph"
)


def positive(*shape: int, dtype: torch.dtype | None = None) -> Tensor:
    return (torch.rand(shape) + 0.3).to(dtype or torch.get_default_dtype())


def share(*shape: int, dtype: torch.dtype | None = None) -> Tensor:
    return torch.rand(shape).to(dtype or torch.get_default_dtype())


def half_of_the_last(x: Tensor) -> tuple[Tensor, Tensor]:
    """Condition each coordinate on the one before it: x_i ~ N(x_{i-1} / 2, 1/2 + 1/4 tanh(x_{i-1})^2)."""
    last = torch.nn.functional.pad(x[..., :-1], (1, 0))
    return last / 2, 0.5 + last.tanh() ** 2 / 4


def two_humps(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Condition each coordinate on the one before it: two Normals, the heavier one on the other side of zero."""
    last = torch.nn.functional.pad(x[..., :-1], (1, 0)).unsqueeze(-1)
    sides = torch.tensor([-1.0, 1.0]).to(x)
    return sides + last / 4, 0.4 + last.tanh() ** 2 / 4, -sides * last


def cut(law: Any) -> Any:
    """The law with every third length given, from the second on: two units, or all if there are no two."""
    given = torch.arange(law.batch_shape.numel()).reshape(law.batch_shape) % 3 == 1
    return law.cut(given * min(2, law.num_units))


def gated(loc: Tensor, log_scale: Tensor, gate: Tensor, validate_args: bool | None = None) -> Gated:
    prior = torch.distributions.Normal(torch.zeros_like(loc), torch.ones_like(loc))
    return Gated(LogScaleNormal(loc, log_scale), gate=gate, rest=prior, validate_args=validate_args)


@dataclass(frozen=True)
class Case:
    """A class, its arguments, and flags.

    `units` are arguments of shape batch_shape + (K,), `batch` those of shape batch_shape, `options` the same for all.
    """

    name: str
    cls: type
    units: dict[str, Draw] = field(default_factory=dict)
    batch: dict[str, Draw] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    make: Callable[..., Any] | None = None  # makes a law of the class from the arguments, where the class does not
    learned: tuple[str, ...] = ()  # arguments that a reparameterised sample must have a gradient to, in each row
    univariate: bool = False
    expanded: bool = False  # has a batch shape only when expanded
    over_lengths: bool = True  # has a law over lengths, and what follows from it
    hard: bool = True  # samples are zeros and ones
    is_cut: bool = False
    samples: bool = True
    reparameterised: bool = True
    enumerable: bool = False
    moments: bool = True  # has a mean and a variance
    entropy: bool = True
    divergence: bool = True  # from its own kind
    infers_shapes: bool = True

    def arguments(
        self, batch_shape: tuple[int, ...] = (), num_units: int = 4, dtype: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        shape = () if self.expanded else batch_shape
        units = {name: draw(*shape, num_units, dtype=dtype) for name, draw in self.units.items()}
        return units | {name: draw(*shape, dtype=dtype) for name, draw in self.batch.items()}

    def of(self, **arguments: Any) -> Any:
        """The law with these arguments."""
        return (self.make or self.cls)(**(self.options | arguments))

    def build(
        self,
        batch_shape: tuple[int, ...] = (),
        num_units: int = 4,
        dtype: torch.dtype | None = None,
        **given: Any,
    ) -> Any:
        """A law with random arguments, but for those `given`."""
        law = self.of(**(self.arguments(batch_shape, num_units, dtype) | given))
        return law.expand(batch_shape) if self.expanded and batch_shape else law

    def by_lengths(self, num_units: int = 4, dtype: torch.dtype | None = None, **given: Any) -> Callable[..., Any]:
        """Laws by `logits` or `probs` of their lengths; the other arguments are random once, but for those `given`."""
        arguments = self.arguments((), num_units, dtype)
        return partial(self.of, **{name: x for name, x in arguments.items() if name not in ("logits", "probs")} | given)

    def with_lengths(self, dtype: torch.dtype | None = None, **given: Any) -> Any:
        """A law with random arguments, but for `logits` or `probs` of the lengths, and perhaps others, `given`."""
        lengths = given.get("logits", given.get("probs"))
        num_units = lengths.shape[-1] if isinstance(lengths, Tensor) and lengths.dim() else 4
        return self.by_lengths(num_units, dtype)(**given)

    @property
    def takes_noise(self) -> bool:
        return "noise" in signature(self.cls).parameters

    def event_shape(self, num_units: int = 4) -> tuple[int, ...]:
        return () if self.univariate else (num_units,)

    def value(self, law: Any, sample_shape: tuple[int, ...] = ()) -> Tensor:
        """A sample, or where there are none something to score."""
        if self.samples:
            return law.sample(sample_shape)
        return torch.randn((*sample_shape, *law.batch_shape, *law.event_shape))


CASES = [
    Case("ordered-logits", OrderedMask, {"logits": real}, reparameterised=False, enumerable=True),
    Case("ordered-probs", OrderedMask, {"probs": positive}, reparameterised=False, enumerable=True),
    Case(
        "relaxed-logits",
        RelaxedOrderedMask,
        {"logits": real},
        {"temperature": positive},
        hard=False,
        moments=False,
        entropy=False,
        divergence=False,
        learned=("logits", "temperature"),
    ),
    Case(
        "relaxed-probs",
        RelaxedOrderedMask,
        {"probs": positive},
        options={"temperature": 0.7},
        hard=False,
        moments=False,
        entropy=False,
        divergence=False,
        learned=("probs",),
    ),
    Case(
        "logistic-logits",
        OrderedMaskStraightThrough,
        {"logits": real},
        {"temperature": positive},
        learned=("logits", "temperature"),
    ),
    Case(
        "logistic-probs",
        OrderedMaskStraightThrough,
        {"probs": positive},
        options={"temperature": 0.5},
        learned=("probs",),
    ),
    Case(
        "gumbel-logits",
        OrderedMaskStraightThrough,
        {"logits": real},
        {"temperature": positive},
        options={"noise": "gumbel"},
        learned=("logits", "temperature"),
    ),
    Case(
        "gumbel-probs",
        OrderedMaskStraightThrough,
        {"probs": positive},
        options={"noise": "gumbel", "temperature": 0.5},
        learned=("probs",),
    ),
    Case(
        "nested-normal-logits",
        NestedNormal,
        {"loc": real, "scale": positive, "logits": real},
        {"temperature": positive},
        hard=False,
        learned=("loc", "scale", "logits", "temperature"),
    ),
    Case(
        "nested-normal-probs",
        NestedNormal,
        {"loc": real, "scale": positive, "probs": positive},
        options={"noise": "gumbel"},
        hard=False,
        learned=("loc", "scale", "probs"),
    ),
    Case(
        "nested-autoregressive-logits",
        NestedAutoregressive,
        {"logits": real},
        {"temperature": positive},
        options={"conditioner": half_of_the_last},
        hard=False,
        moments=False,
        entropy=False,
        divergence=False,
        learned=("logits", "temperature"),
    ),
    Case(
        "nested-autoregressive-probs",
        NestedAutoregressive,
        {"probs": positive},
        options={"conditioner": half_of_the_last, "noise": "gumbel"},
        hard=False,
        moments=False,
        entropy=False,
        divergence=False,
        learned=("probs",),
    ),
    Case(
        "nested-autoregressive-mixtures",
        NestedAutoregressive,
        {"logits": real},
        {"temperature": positive},
        options={"conditioner": two_humps},
        hard=False,
        moments=False,
        entropy=False,
        divergence=False,
        learned=("logits", "temperature"),
    ),
    Case(
        "cut-exact",
        CutMask,
        {"logits": real},
        make=lambda **lengths: cut(OrderedMask(**lengths)),
        is_cut=True,
        reparameterised=False,
        enumerable=True,
        infers_shapes=False,
    ),
    Case(
        "cut-straight-through",
        CutMask,
        {"probs": positive},
        {"temperature": positive},
        make=lambda **arguments: cut(OrderedMaskStraightThrough(**arguments)),
        is_cut=True,
        infers_shapes=False,
    ),
    Case(
        "cut-nested-normal",
        NestedNormal,
        {"loc": real, "scale": positive, "logits": real},
        options={"noise": "gumbel"},
        make=lambda **arguments: cut(NestedNormal(**arguments)),
        hard=False,
        is_cut=True,
    ),
    Case(
        "gated",
        Gated,
        {"loc": real, "log_scale": real, "gate": share},
        make=gated,
        learned=("loc", "log_scale"),
        expanded=True,
        over_lengths=False,
        hard=False,
        entropy=False,
        infers_shapes=False,
    ),
    Case(
        "log-scale-normal",
        LogScaleNormal,
        batch={"loc": real, "log_scale": real},
        learned=("loc", "log_scale"),
        univariate=True,
        over_lengths=False,
        hard=False,
    ),
    Case(
        "log-uniform",
        LogUniform,
        univariate=True,
        expanded=True,
        over_lengths=False,
        hard=False,
        samples=False,
        reparameterised=False,
        moments=False,
        entropy=False,
        divergence=False,
    ),
    Case(
        "isotropic-normal",
        IsotropicNormal,
        {"loc": real},
        {"scale": positive},
        options={"event_dim": 1},
        learned=("loc", "scale"),
        over_lengths=False,
        hard=False,
        entropy=False,
        divergence=False,
        infers_shapes=False,
    ),
]
LENGTH_CASES = [case for case in CASES if "logits" in case.units and not case.is_cut]  # one of each class and noise
MASK_CASES = [case for case in LENGTH_CASES if case.cls not in (NestedNormal, NestedAutoregressive)]
HARD_CASES = [case for case in MASK_CASES if case.hard]


def each(cases: list[Case] = CASES, **flags: bool) -> pytest.MarkDecorator:
    """Run a test for each case, or each with the given flags."""
    chosen = [case for case in cases if all(getattr(case, name) == value for name, value in flags.items())]
    return pytest.mark.parametrize("case", chosen, ids=lambda case: case.name)
