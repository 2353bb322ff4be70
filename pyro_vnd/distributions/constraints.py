"""Constraints of masks and nested vectors, the map from one-hot lengths to masks, and checks of arguments."""

import math
from collections.abc import Iterator, Mapping, Set
from contextlib import suppress
from typing import Any, NoReturn

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Distribution, Transform, biject_to, constraints, transform_to
from torch.distributions.transforms import ComposeTransform, SoftmaxTransform, StickBreakingTransform

from pyro_vnd._compat import all_true, only_plain_code
from pyro_vnd._sizes import is_truth, without_values
from pyro_vnd.distributions._fast.broadcast import broadcast_shapes

__all__ = [
    "TailSum",
    "as_shape",
    "binary_ordered_mask",
    "check_dense",
    "check_expandable",
    "check_real",
    "check_sample",
    "check_switch",
    "got",
    "nested_vector",
    "ordered_mask",
    "within",
]


def extremes(x: Tensor) -> tuple[float, float]:
    """Return the smallest and the largest entry, both NaN if there is one: one pass, and one look at the device."""
    low, high = torch.stack(x.detach().aminmax()).tolist()
    return low, high


def within(x: Tensor, low: float = -math.inf, high: float = math.inf) -> bool:
    """Say whether all entries are strictly between two bounds, NaN being nowhere; yes where nobody knows, as if traced.

    Args:
        x: Any tensor; that of a whole batch in `vmap`.
        low: Lower bound.
        high: Upper bound.
    """
    if not x.numel():
        return True
    if only_plain_code():
        return all_true((x > low) & (x < high))
    least, largest = extremes(x)
    return low < least and largest < high


def check_dense(name: str, x: Any) -> None:
    """Raise a ValueError if a tensor has no dense values; what is no tensor passes.

    Args:
        name: What it is, for the message: "Law.method: argument `x`".
        x: The tensor.
    """
    if isinstance(x, Tensor) and (said := without_values(x)):
        raise ValueError(f"{name} must be a dense tensor; got {said}")


def check_real(name: str, x: Any) -> None:
    """Do the same also if the numbers of a tensor are not real."""
    check_dense(name, x)
    if isinstance(x, Tensor) and (x.is_complex() or x.dtype == torch.bool):
        raise ValueError(f"{name} must be a tensor of real numbers; got {x.dtype}")


def check_switch(name: str, validate_args: Any) -> None:
    """Raise a ValueError if what says whether a law checks its arguments says neither, nor nothing."""
    if not (validate_args is None or isinstance(validate_args, bool | np.bool_)):
        raise ValueError(f"{name}: argument `validate_args` must be True, False or None; got {validate_args!r}")


def check_sample(law: Distribution, value: Any) -> None:
    """Raise a ValueError if a value is none that a law without a mask can score, by torch's own check."""
    name = f"{type(law).__name__}: argument `value`"
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} must be a tensor; got {type(value).__name__}")
    check_real(name, value)
    try:
        broadcast_shapes(value.shape, law.batch_shape + law.event_shape)
        if value.numel():  # torch's check of independent entries fails where there are none
            Distribution._validate_sample(law, value)
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"{name} must be numbers in the support, of a shape that broadcasts with "
            f"{tuple(law.batch_shape + law.event_shape)}; got shape {tuple(value.shape)}: {error}"
        ) from None


def as_shape(name: str, shape: Any) -> torch.Size:
    """Return a shape, or raise a ValueError if it is none.

    Args:
        name: What it is, for the message: "Law: argument `x`".
        shape: The shape.
    """
    if not isinstance(shape, str | bytes | Mapping | Set | Iterator):
        with suppress(TypeError):
            sizes = torch.Size(shape)
            if not any(map(is_truth, shape)) and all(size >= 0 for size in sizes):
                return sizes
    raise ValueError(f"{name} must be a sequence of sizes >= 0; got {shape!r}")


def got(x: Tensor) -> str:
    """Say for an error what values came, if they can be looked at."""
    with suppress(RuntimeError):
        return "values from {:.4g} to {:.4g}".format(*extremes(x))
    return "others"


def check_expandable(distribution: Distribution, batch_shape: torch.Size) -> None:
    """Raise a ValueError if the batch shape of a distribution does not broadcast to another one."""
    try:
        fits = broadcast_shapes(batch_shape, distribution.batch_shape) == batch_shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(
            f"{type(distribution).__name__}: batch shape {tuple(distribution.batch_shape)} cannot be expanded to "
            f"{tuple(batch_shape)}"
        )


class _OrderedMask(constraints.Constraint):
    """Vectors with 1 = z_1 >= z_2 >= ... >= z_K >= 0, up to rounding."""

    event_dim = 1
    tolerance = 1e-5

    def check(self, value: Tensor) -> Tensor:
        """Tell, for each vector, whether it is an ordered mask."""
        falls = (value[..., 1:] - value[..., :-1] <= self.tolerance).all(-1)
        starts_at_one = (value[..., 0] - 1).abs() <= self.tolerance
        return falls & starts_at_one & (value[..., -1] >= -self.tolerance)

    def __repr__(self) -> str:
        return "ordered_mask"


class _BinaryOrderedMask(constraints.Constraint):
    """Vectors of k ones followed by K - k zeros, 1 <= k <= K."""

    event_dim = 1
    is_discrete = True

    def check(self, value: Tensor) -> Tensor:
        """Tell, for each vector, whether it is a hard ordered mask."""
        binary = ((value == 0) | (value == 1)).all(-1)
        return binary & (value[..., 0] == 1) & (value[..., 1:] <= value[..., :-1]).all(-1)

    def __repr__(self) -> str:
        return "binary_ordered_mask"


class _NestedVector(constraints.Constraint):
    """Real vectors whose coordinates past some length are zero.

    As a set this is every real vector; as the support of a law with atoms at zero it must not be mapped from
    unconstrained space, so that HMC and the autoguides of Pyro refuse such a latent.
    """

    event_dim = 1

    def check(self, value: Tensor) -> Tensor:
        """Tell, for each vector, whether it is real."""
        return torch.isfinite(value).all(-1)

    def __repr__(self) -> str:
        return "nested_vector"


ordered_mask = _OrderedMask()
r"""Vectors with $1 = z_1 \ge z_2 \ge \dots \ge z_K \ge 0$, up to rounding: the support of `RelaxedOrderedMask`."""

binary_ordered_mask = _BinaryOrderedMask()
r"""Vectors of k ones followed by K - k zeros, $1 \le k \le K$: the support of `OrderedMask`."""

nested_vector = _NestedVector()
"""Real vectors whose coordinates past some length are zero: the support of `NestedNormal`; nothing maps to it."""


def tail_sum(x: Tensor) -> Tensor:
    """Sum every tail of the last dimension: y_i = sum_{j >= i} x_j."""
    return x.flip(-1).cumsum(-1).flip(-1)


def tail_difference(y: Tensor) -> Tensor:
    """Undo `tail_sum`: x_i = y_i - y_{i+1}, with y_{K+1} = 0."""
    return y - F.pad(y[..., 1:], (0, 1))


def counted(weights: Tensor, terms: Tensor) -> Tensor:
    """Multiply terms by weights; what counts nothing may be infinite, and else has its gradient to the weight."""
    return weights * terms.masked_fill((weights == 0) & terms.isinf(), 0)


class TailSum(Transform):
    r"""Map the simplex to ordered masks by summing tails.

    $$z_i = \sum_{j \ge i} c_j, \qquad c_i = z_i - z_{i+1}, \qquad \log |\det J| = 0.$$

    The Jacobian is a triangular matrix of ones, so volume is preserved. A one-hot vector at position k becomes the
    mask that keeps the first k units.

    Shapes: (..., K) to (..., K).

    Source: Cui et al., "Variational Nested Dropout", arXiv 2101.11353, section 3.2.

    Example:
        >>> import torch
        >>> TailSum()(torch.tensor([0.0, 0.0, 1.0, 0.0]))
        tensor([1., 1., 1., 0.])
        >>> TailSum().inv(torch.tensor([1.0, 1.0, 1.0, 0.0]))
        tensor([0., 0., 1., 0.])
    """

    domain = constraints.simplex
    codomain = ordered_mask
    bijective = True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TailSum)

    def __hash__(self) -> int:
        return hash(TailSum)

    def _call(self, x: Tensor) -> Tensor:
        return tail_sum(x)

    def _inverse(self, y: Tensor) -> Tensor:
        return tail_difference(y)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Return zero for each vector of the batch."""
        return torch.zeros_like(x[..., 0])


@biject_to.register(_OrderedMask)
def _biject_to_ordered_mask(constraint: constraints.Constraint) -> Transform:
    return ComposeTransform([StickBreakingTransform(), TailSum()])


@transform_to.register(_OrderedMask)
def _transform_to_ordered_mask(constraint: constraints.Constraint) -> Transform:
    return ComposeTransform([SoftmaxTransform(), TailSum()])


@biject_to.register(_NestedVector)
@transform_to.register(_NestedVector)
def _refuse_nested_vector(constraint: constraints.Constraint) -> NoReturn:
    raise NotImplementedError(
        "nested_vector: a vector that is zero past a random length cannot be made of unconstrained numbers; for such a "
        "latent site take pyro_vnd.infer.AutoNested or a NestedNormal in a guide of your own, not an autoguide of Pyro "
        "or HMC"
    )
