"""Constraints of masks over ordered units, and of vectors cut after a random length."""

import torch
from torch import Tensor
from torch.distributions import constraints

__all__ = ["binary_ordered_mask", "extremes", "nested_vector", "ordered_mask"]


def extremes(x: Tensor) -> tuple[float, float]:
    """Return the smallest and the largest entry, both NaN if there is one: one pass, and one look at the device."""
    low, high = torch.stack(x.detach().aminmax()).tolist()
    return low, high


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
    unconstrained space, so no bijection is registered and HMC or autoguides refuse such a latent.
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
