"""The bijection between one-hot lengths and ordered masks."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Transform, biject_to, constraints, transform_to
from torch.distributions.transforms import ComposeTransform, SoftmaxTransform, StickBreakingTransform

from pyro_vnd.distributions.constraints import _OrderedMask, ordered_mask

__all__ = ["TailSum"]


def tail_sum(x: Tensor) -> Tensor:
    """Sum every tail of the last dimension: y_i = sum_{j >= i} x_j."""
    return x.flip(-1).cumsum(-1).flip(-1)


def tail_difference(y: Tensor) -> Tensor:
    """Undo `tail_sum`: x_i = y_i - y_{i+1}, with y_{K+1} = 0."""
    return y - F.pad(y[..., 1:], (0, 1))


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
