"""Laws of the pixels given what the decoder puts out."""

from typing import ClassVar, Literal

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.fx import symbolic_trace

from models.autoencoders.isotropic_normal import IsotropicNormal

__all__ = ["BernoulliPixels", "ContinuousBernoulliPixels", "GaussianPixels", "Pixels"]


class Pixels(nn.Module):
    """Base of the laws of pixels.

    Attributes:
        bounded: Whether pixels must lie in [0, 1].
    """

    bounded: ClassVar[bool]

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


class GaussianPixels(Pixels):
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

    def __init__(
        self,
        num_latents: int,
        noise: Literal["shared", "by_length"] = "shared",
        scale: float = 0.3,
        mean: Literal["identity", "sigmoid"] = "identity",
    ) -> None:
        super().__init__()
        if noise not in ("shared", "by_length"):
            raise ValueError(f"GaussianPixels: argument `noise` must be 'shared' or 'by_length'; got {noise!r}")
        if mean not in ("identity", "sigmoid"):
            raise ValueError(f"GaussianPixels: argument `mean` must be 'identity' or 'sigmoid'; got {mean!r}")
        if not 0 < scale < torch.inf:
            raise ValueError(f"GaussianPixels: argument `scale` must be finite and > 0; got {scale}")
        self.log_scale = nn.Parameter(torch.full((num_latents if noise == "by_length" else 1,), scale).log())
        # log s_L = sum_i z_i (log s_i - log s_{i-1}): linear in the mask, whose gradient so sees the noise.
        steps = torch.eye(len(self.log_scale)).diff(dim=0, prepend=torch.zeros(1, len(self.log_scale)))
        self.register_buffer("steps", steps, persistent=False)
        self.squash = mean == "sigmoid"

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


class BernoulliPixels(Pixels):
    r"""Independent bits, $\log p(x) = \sum_d x_d \log \pi_d + (1 - x_d) \log(1 - \pi_d)$ with $\pi = \sigma(f(z))$.

    For gray values in between it is a cross-entropy, not a normalised likelihood: see `ContinuousBernoulliPixels`.
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


class ContinuousBernoulliPixels(Pixels):
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
