"""A Wasserstein autoencoder whose code can be cut at any length."""

from typing import Any

import torch
from pyro.contrib.gp.kernels import Kernel
from torch import Tensor

from models.autoencoders.base import OrderedAutoencoder
from models.autoencoders.mmd import AggregateMMD, InverseMultiquadratic, squared_mmd

__all__ = ["OrderedWAE"]


class OrderedWAE(OrderedAutoencoder):
    r"""Wasserstein autoencoder with ordered latents: codes as a whole follow the prior, the code of an image need not.

    $$\max E_q \log p(x \mid z, L) - \lambda \, \mathrm{MMD}^2(\bar q(z), p(z)) - \mathrm{KL}(q(L \mid x) \| p(L)),
      \qquad \bar q(z) = E_x \, q(z \mid x).$$

    Model and guide are those of `OrderedVAE`; it is the objective that makes the difference. A code may say all of an
    image, as nothing charges for it: deviations of q(z | x) may fall to zero, which is the deterministic encoder. It is
    the codes of all images together that are held to the prior, so that draws of the prior decode to images.

    What drives a learned law of the lengths is the likelihood, and the discrepancy of the cut codes where those of a
    length do not fit the prior cut likewise, both straight through the mask. The discrepancy hardly sees how long codes
    are, so that the KL of the lengths is added, exactly as in the VAE. Where codes of all lengths fit,
    $q(L \mid x) \propto p(L) \exp(E \log p(x \mid z, L))$: a longer code costs nothing, and q(L | x) is near K unless
    p(L) charges for length, as `OrderedMask.geometric` does with log(1 / p) nats a latent. Train short codes by
    `fit(..., masks=MaskSchedule(...))`.

    A discrepancy that weighs much from the start keeps codes at the prior, where they say nothing of the image: let it
    rise, `fit(..., local_kl_weight=linear(0, 1, warmup=0.5))`.

    Args:
        image_shape: As in `OrderedAutoencoder`.
        num_latents: K.
        **kwargs: As in `OrderedAutoencoder`.

    Source: Tolstikhin et al., arXiv 1711.01558; Zhao et al., arXiv 1706.02262.

    Example:
        >>> from pyro_vnd.infer import MaskSchedule, fit
        >>> x = torch.rand(64, 1, 8, 8)
        >>> wae = OrderedWAE((1, 8, 8), num_latents=4)
        >>> arguments = {"num_epochs": 2, "batch_size": 32, "masks": MaskSchedule(), "progress": False}
        >>> _ = fit(wae, wae.make_guide(), x, elbo=wae.objective(), **arguments)
        >>> wae.embed(x, length=2).shape, wae.mmd(x, length=2).shape
        (torch.Size([64, 4]), torch.Size([]))
    """

    def objective(self, mmd_scale: float = 100.0, length_weight: float = 1.0, **kwargs: Any) -> AggregateMMD:
        r"""Return the objective, for `fit(..., elbo=...)` or `pyro.infer.SVI`.

        Args:
            mmd_scale: $\lambda$, in nats a row for a squared discrepancy of one, its largest value being two.
            length_weight: Weight of the KL of the lengths.
            **kwargs: As in `AggregateMMD`.

        Returns:
            The objective, with the kernel `InverseMultiquadratic(K)`.

        Raises:
            ValueError: If a weight is not finite or negative.
        """
        return AggregateMMD(InverseMultiquadratic(self.num_latents), mmd_scale, length_weight, **kwargs)

    @torch.no_grad()
    def mmd(self, x: Tensor, length: int | Tensor | None = None, kernel: Kernel | None = None) -> Tensor:
        """Estimate the squared discrepancy of codes of images and of the prior, without bias.

        Args:
            x: Images, shape (N, *image_shape), two or more.
            length: Code length, 1..K, for all images or one an image; None has it random in both.
            kernel: Kernel over K numbers, `InverseMultiquadratic(K)` by default.

        Returns:
            A scalar.

        Raises:
            ValueError: If an argument is invalid.
        """
        codes = self.encode(x, length).sample()
        prior = self.prior().expand(codes.shape[:1])
        draws = (prior if length is None else prior.cut(self._length(length))).sample()
        return squared_mmd(codes, draws, InverseMultiquadratic(self.num_latents) if kernel is None else kernel)
