"""What laws of vectors that end at a random length have in common."""

from copy import copy
from typing import Any, Self

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.types import _size

from pyro_vnd.distributions.constraints import nested_vector
from pyro_vnd.distributions.cut import Cut
from pyro_vnd.distributions.fresh import recall
from pyro_vnd.distributions.shapes import check_expandable
from pyro_vnd.distributions.straight_through import OrderedMaskStraightThrough
from pyro_vnd.distributions.tail_sum import tail_sum

__all__ = ["NestedLaw"]


class NestedLaw(TorchDistribution):
    """Base of the laws of K ordered coordinates that are zero past a random length.

    Attributes:
        lengths: Law of the mask.
    """

    support = nested_vector
    has_rsample = True

    lengths: OrderedMaskStraightThrough

    @property
    def keep_probs(self) -> Tensor:
        """Probability that each coordinate is kept, shape batch_shape + (K,)."""
        return self.lengths.keep_probs

    @property
    def length_probs(self) -> Tensor:
        """Probabilities of the lengths 1..K, shape batch_shape + (K,)."""
        return self.lengths.probs

    @property
    def mean_length(self) -> Tensor:
        """Expected kept length in coordinates, shape batch_shape."""
        return self.lengths.mean_length

    @property
    def num_units(self) -> int:
        """Number of ordered coordinates, K."""
        return self.lengths.num_units

    @staticmethod
    def mask_of(value: Tensor) -> Tensor:
        r"""Return the mask of a value, $z_i = 1[i \le L]$ with L its last coordinate that is not zero, or one.

        For a decoder that sees how many coordinates it has. The mask of a fresh sample has its straight-through
        gradient, so that the lengths learn from what is made of it.

        Args:
            value: Samples, shape (..., K).

        Returns:
            Zeros and ones, the shape of `value`.

        Example:
            >>> NestedLaw.mask_of(torch.tensor([0.5, 0.0, -1.0, 0.0]))
            tensor([1., 1., 1., 0.])
        """
        making = recall(value)
        if making is not None:
            return making[0]
        mask = (tail_sum(value != 0) > 0).to(value.dtype)
        return torch.cat([torch.ones_like(mask[..., :1]), mask[..., 1:]], -1)

    def cut(self, length: int | Tensor) -> Self:
        """Return the same law with the length given.

        Args:
            length: L, from 1 to K, or 0 to leave it random; integers that broadcast to the batch shape.

        Returns:
            A law of the same shape whose lengths have all their mass on one where it is given.

        Raises:
            ValueError: If a length is no integer from 0 to K.

        Example:
            >>> from pyro_vnd.distributions import NestedNormal
            >>> law = NestedNormal(torch.zeros(3), torch.ones(3), torch.zeros(3))
            >>> law.cut(2).keep_probs
            tensor([1., 1., 0.])
        """
        return self._cut_by(Cut.checked(length, self.lengths, type(self).__name__))

    def _cut_by(self, cut: Cut) -> Self:
        """Return the law cut to lengths that are known to be right."""
        new = copy(self)
        new.lengths = self.lengths._cut_by(cut)
        return new

    def given(self, value: Tensor) -> Any:
        """Return the law that each coordinate has given those before it in `value`.

        Args:
            value: Samples, shape (..., K).

        Returns:
            A `NestedNormal`, whose coordinates are independent.
        """
        raise NotImplementedError

    def expand(self, batch_shape: _size, _instance: Self | None = None) -> Self:
        """Return the same law with a larger batch shape."""
        new = self._get_checked_instance(type(self), _instance)
        batch_shape = torch.Size(batch_shape)
        check_expandable(self, batch_shape)
        new.lengths = self.lengths.expand(batch_shape)
        TorchDistribution.__init__(new, batch_shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def _validate_sample(self, value: Tensor) -> None:
        if not isinstance(value, Tensor) or value.shape[-1:] != self.event_shape or not torch.isfinite(value).all():
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"{type(self).__name__}: argument `value` must be a tensor of finite numbers of shape "
                f"(..., {self.num_units}); got {got}"
            )

    @classmethod
    def infer_shapes(cls, **arg_shapes: Any) -> tuple[torch.Size, torch.Size]:
        """Infer batch and event shape from the shapes of the arguments."""
        arg_shapes.pop("conditioner", None)
        temperature = arg_shapes.pop("temperature", ())
        shape = torch.broadcast_shapes(*arg_shapes.values())
        return torch.broadcast_shapes(shape[:-1], temperature), shape[-1:]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({tuple(self.batch_shape + self.event_shape)})"
