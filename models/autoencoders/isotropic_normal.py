"""Many independent Normal values with one scale, scored in one pass over them."""

import math
from typing import ClassVar, Self

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.nn.functional import mse_loss
from torch.types import _size

__all__ = ["IsotropicNormal"]


class IsotropicNormal(TorchDistribution):
    r"""Normal law of an array whose entries are independent and have the same scale.

    $$\log p(x) = -\frac{\lVert x - \mu \rVert^2}{2 \sigma^2} - D \, (\log \sigma + \tfrac12 \log 2 \pi) .$$

    What `Normal(loc, scale).to_event(n)` is, too, but that one takes the logarithm and the square of the scale of each
    entry: of a million pixels, and not of a thousand images.

    Args:
        loc: Means, shape batch_shape + event_shape.
        scale: Standard deviations, > 0, that broadcast to batch_shape.
        event_dim: Dimensions of an event.

    Raises:
        ValueError: If a value that is scored has another shape.

    Example:
        >>> law = IsotropicNormal(torch.zeros(5, 2, 3), torch.ones(5), event_dim=2)
        >>> law.batch_shape, law.event_shape, law.log_prob(torch.zeros(2, 3)).shape
        (torch.Size([5]), torch.Size([2, 3]), torch.Size([5]))
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {
        "loc": constraints.real,
        "scale": constraints.positive,
    }
    has_rsample = True

    def __init__(self, loc: Tensor, scale: Tensor, event_dim: int) -> None:
        self.loc, self.scale, self.event_dims = loc, scale, tuple(range(-event_dim, 0))
        split = loc.dim() - event_dim
        super().__init__(loc.shape[:split], loc.shape[split:], validate_args=False)

    @constraints.dependent_property(is_discrete=False)
    def support(self) -> constraints.Constraint:
        """Real arrays of the event's shape."""
        return constraints.independent(constraints.real, len(self.event_dims))

    @property
    def mean(self) -> Tensor:
        """Mean of each entry."""
        return self.loc

    @property
    def stddev(self) -> Tensor:
        """Standard deviation of each entry, shape batch_shape + event_shape."""
        scale = self.scale.expand(self.batch_shape)
        return scale.reshape(self.batch_shape + (1,) * len(self.event_dims)).expand(self.loc.shape)

    @property
    def variance(self) -> Tensor:
        """Variance of each entry, shape batch_shape + event_shape."""
        return self.stddev**2

    def rsample(self, sample_shape: _size = torch.Size()) -> Tensor:
        """Draw arrays, shape sample_shape + batch_shape + event_shape."""
        noise = torch.randn(self._extended_shape(sample_shape), dtype=self.loc.dtype, device=self.loc.device)
        return self.loc + self.stddev * noise

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-density of arrays, shape broadcast(value's batch, batch_shape)."""
        try:
            value, loc = torch.broadcast_tensors(value, self.loc)
        except RuntimeError:
            raise ValueError(
                "IsotropicNormal: argument `value` must have a shape that broadcasts with "
                f"{tuple(self.loc.shape)}; got {tuple(value.shape)}"
            ) from None
        squares = mse_loss(loc, value, reduction="none").sum(self.event_dims)
        normaliser = self.event_shape.numel() * (self.scale.log() + 0.5 * math.log(2 * math.pi))
        return -squares / (2 * self.scale**2) - normaliser

    def expand(self, batch_shape: _size, _instance: Self | None = None) -> Self:
        """Return the same law with a larger batch shape."""
        new = self._get_checked_instance(IsotropicNormal, _instance)
        batch_shape = torch.Size(batch_shape)
        new.loc, new.scale = self.loc.expand(batch_shape + self.event_shape), self.scale
        new.event_dims = self.event_dims
        TorchDistribution.__init__(new, batch_shape, self.event_shape, validate_args=False)
        return new
