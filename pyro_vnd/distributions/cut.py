"""Lengths that the laws of a batch are cut to: given for some, random still for others."""

from typing import Self

import torch
from torch import Tensor

from pyro_vnd.distributions.length_law import LengthLaw

__all__ = ["Cut"]


class Cut:
    """Lengths of a batch of laws, each given or random still.

    Where a length is given there is nothing to draw, to score or to differentiate. All that is done for the laws that
    are random still, and then put among the masks of the others.

    Args:
        length: L, from 1 to K, or 0 where it is random; integers that expand to the batch shape.
        law: The law of the lengths that is cut.

    Attributes:
        length: As above.
        lengths: The same, with the batch shape of the law, and on its device.
        masks: Masks of these lengths, shape batch_shape + (K,).
        rows: Where in the flattened batch a length is random, shape (R,).
    """

    def __init__(self, length: Tensor, law: LengthLaw) -> None:
        self.length, param = length, law._param
        lengths = length.expand(law.batch_shape)
        # For lengths on the CPU this does not wait for another device.
        self.rows = (lengths.reshape(-1) == 0).nonzero().squeeze(-1).to(param.device)
        self.lengths = lengths.to(param.device)
        units = torch.arange(1, law.num_units + 1, device=param.device)
        self.masks = (units <= self.lengths.unsqueeze(-1)).to(param.dtype)

    @classmethod
    def checked(cls, length: int | Tensor, law: LengthLaw, name: str) -> Self:
        """Return the cut of a law to lengths that come from outside.

        Args:
            length: L, from 1 to K, or 0 to leave it random; integers that broadcast to the batch shape.
            law: The law of the lengths.
            name: What the user knows the law by.

        Raises:
            ValueError: If a length is no integer from 0 to K, or they do not fit the batch.
        """
        lengths = torch.as_tensor(length, device=law._param.device)
        whole = not lengths.is_floating_point() and lengths.dtype != torch.bool
        if not whole or (law._validate_args and not ((lengths >= 0) & (lengths <= law.num_units)).all()):
            raise ValueError(
                f"{name}.cut: argument `length` must be integers from 1 to {law.num_units}, or 0 for a random length; "
                f"got {lengths.tolist()}"
            )
        try:
            return cls(lengths, law)
        except RuntimeError:
            raise ValueError(
                f"{name}.cut: argument `length` of shape {tuple(lengths.shape)} cannot be expanded to the batch shape "
                f"{tuple(law.batch_shape)}"
            ) from None

    @property
    def partial(self) -> Tensor:
        """Where in the flattened batch a unit may be dropped: the length is random, or given and less than K."""
        lengths = self.length.expand(self.lengths.shape).reshape(-1)
        return (lengths != self.masks.shape[-1]).nonzero().squeeze(-1).to(self.masks.device)

    def take(self, x: Tensor) -> Tensor:
        """Return what belongs to the laws that are random, shape (..., R, n), of shape (...) + batch_shape + (n,)."""
        leading = x.shape[: x.dim() - self.lengths.dim() - 1]
        return x.reshape((*leading, -1, x.shape[-1])).index_select(len(leading), self.rows)

    def put(self, random: Tensor, given: Tensor) -> Tensor:
        """Put what belongs to the laws that are random among what belongs to the others.

        Args:
            random: Shape (..., R, n).
            given: Shape batch_shape + (n,); what it has in the places of the random ones counts nothing.

        Returns:
            Shape (...) + batch_shape + (n,).
        """
        if random.dim() == given.dim() == 2:
            return given.index_copy(0, self.rows, random)
        leading, flat = random.shape[:-2], given.reshape(-1, given.shape[-1])
        put = flat.expand(leading + flat.shape).index_copy(len(leading), self.rows, random)
        return put.reshape(leading + given.shape)

    def is_that_of(self, other: "Cut | None") -> bool:
        """Say whether another law is cut by the very same tensor, as those of a guide and a model are in a fit."""
        if other is None or other is self:
            return other is self
        return other.length is self.length and other.lengths.shape == self.lengths.shape
