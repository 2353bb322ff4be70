"""Laws of images given what the decoder puts out."""

import math
from typing import ClassVar, Literal, Self

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints
from torch.fx import symbolic_trace
from torch.nn.functional import mse_loss
from torch.types import _size

from pyro_vnd._sizes import check_count, is_one_of, is_within

__all__ = [
    "BernoulliLikelihood",
    "ContinuousBernoulliLikelihood",
    "GaussianLikelihood",
    "IsotropicNormal",
    "Likelihood",
]


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


class Likelihood(nn.Module):
    """Base of the laws of images given what a decoder puts out.

    Attributes:
        bounded: Whether pixels must lie in [0, 1].
        num_latents: How many latents the code must have, or None.
    """

    bounded: ClassVar[bool]
    num_latents: int | None = None

    def law(self, outputs: Tensor, mask: Tensor, event_dim: int) -> dist.TorchDistribution:
        """Return the law of images.

        Args:
            outputs: Of the decoder, shape (..., *image_shape).
            mask: Of the code, shape (..., K).
            event_dim: Dimensions of an image.

        Returns:
            A law with batch shape (...) and event shape image_shape.
        """
        raise NotImplementedError

    def mean(self, outputs: Tensor) -> Tensor:
        """Return the mean of each pixel, the shape of the outputs."""
        raise NotImplementedError

    def mean_layers(self) -> list[nn.Module]:
        """Return plain torch layers that do what `mean` does."""
        raise NotImplementedError


class GaussianLikelihood(Likelihood):
    r"""Normal pixels whose noise is learned: one scale for all codes, or one for each length of the code.

    $$x_d \sim N(f_d(z), \sigma_L).$$

    A code of one number explains an image less well than a code of thirty-two. A shared scale is a compromise between
    the lengths: too small for short codes, whose errors then drown those of long ones in the gradient, and too large
    for long ones, whose likelihood suffers. With a scale a length the model is calibrated at each.

    Args:
        num_latents: K, the longest code.
        noise: "shared" or "by_length".
        scale: Where the scale starts.
        mean: "identity", or "sigmoid" for pixels in [0, 1].

    Raises:
        ValueError: If an argument is invalid.
    """

    bounded = False
    steps: Tensor

    def __init__(
        self,
        num_latents: int,
        noise: Literal["shared", "by_length"] = "shared",
        scale: float = 0.3,
        mean: Literal["identity", "sigmoid"] = "identity",
    ) -> None:
        super().__init__()
        if not is_one_of(noise, ("shared", "by_length")):
            raise ValueError(f"GaussianLikelihood: argument `noise` must be 'shared' or 'by_length'; got {noise!r}")
        if not is_one_of(mean, ("identity", "sigmoid")):
            raise ValueError(f"GaussianLikelihood: argument `mean` must be 'identity' or 'sigmoid'; got {mean!r}")
        limits = torch.finfo(torch.get_default_dtype())
        if not is_within(scale, limits.tiny, limits.max):
            raise ValueError(
                f"GaussianLikelihood: argument `scale` must be a finite number > 0, which {limits.dtype} has; got "
                f"{scale!r}"
            )
        check_count("GaussianLikelihood", num_latents=num_latents)
        self.log_scale = nn.Parameter(torch.full((num_latents if noise == "by_length" else 1,), float(scale)).log())
        # log s_L = sum_i z_i (log s_i - log s_{i-1}): linear in the mask, whose gradient so sees the noise.
        steps = torch.eye(len(self.log_scale)).diff(dim=0, prepend=torch.zeros(1, len(self.log_scale)))
        self.register_buffer("steps", steps, persistent=False)
        self.squash = mean == "sigmoid"
        self.num_latents = num_latents if noise == "by_length" else None

    def law(self, outputs: Tensor, mask: Tensor, event_dim: int) -> IsotropicNormal:
        """Return the Normal law of images."""
        log_scale = self.log_scale[0] if len(self.log_scale) == 1 else mask @ (self.steps @ self.log_scale)
        return IsotropicNormal(self.mean(outputs), log_scale.exp(), event_dim)

    def mean(self, outputs: Tensor) -> Tensor:
        """Return the mean of each pixel."""
        return outputs.sigmoid() if self.squash else outputs

    def mean_layers(self) -> list[nn.Module]:
        """Return a sigmoid or nothing."""
        return [nn.Sigmoid()] if self.squash else []


class BernoulliLikelihood(Likelihood):
    r"""Independent bits, $\log p(x) = \sum_d x_d \log \pi_d + (1 - x_d) \log(1 - \pi_d)$ with $\pi = \sigma(f(z))$.

    For gray values in between it is a cross-entropy, not a normalised likelihood: see `ContinuousBernoulliLikelihood`.
    """

    bounded = True

    def law(self, outputs: Tensor, mask: Tensor, event_dim: int) -> dist.TorchDistribution:
        """Return the Bernoulli law of images."""
        return dist.Independent(dist.Bernoulli(logits=outputs, validate_args=False), event_dim, validate_args=False)

    def mean(self, outputs: Tensor) -> Tensor:
        """Return the probability of each pixel."""
        return outputs.sigmoid()

    def mean_layers(self) -> list[nn.Module]:
        """Return a sigmoid."""
        return [nn.Sigmoid()]


class ContinuousBernoulliLikelihood(Likelihood):
    r"""Gray values in [0, 1] with a normalised density of the Bernoulli's form.

    $$\log p(x) = \sum_d x_d \eta_d - \log \frac{e^{\eta_d} - 1}{\eta_d}, \qquad
      E x_d = \frac{1}{1 - e^{-\eta_d}} - \frac{1}{\eta_d}, \qquad \eta = f(z).$$

    Source: Loaiza-Ganem and Cunningham, "The continuous Bernoulli", NeurIPS 2019, arXiv 1907.06845.
    """

    bounded = True

    def law(self, outputs: Tensor, mask: Tensor, event_dim: int) -> dist.TorchDistribution:
        """Return the continuous Bernoulli law of images."""
        return dist.Independent(
            dist.ContinuousBernoulli(logits=outputs, validate_args=False), event_dim, validate_args=False
        )

    def mean(self, outputs: Tensor) -> Tensor:
        """Return the mean of each pixel, which is not the Bernoulli's."""
        return _ContinuousBernoulliMean()(outputs)

    def mean_layers(self) -> list[nn.Module]:
        """Return the formula of the mean, traced so that it needs no code of ours."""
        return [symbolic_trace(_ContinuousBernoulliMean())]


class _ContinuousBernoulliMean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        near_zero = x.abs() < 0.1  # the two terms are large there and cancel: E x = 1/2 + x/12 - x^3/720 + O(x^5)
        safe = torch.where(near_zero, torch.ones_like(x), x)
        series = 0.5 + x / 12 - x**3 / 720
        return torch.where(near_zero, series, -1 / torch.expm1(-safe) - 1 / safe)
