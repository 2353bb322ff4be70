"""Mixtures of Normals at ordered coordinates that are zero past a random length."""

from typing import Self

import torch
from torch import Tensor
from torch.types import _size

from pyro_vnd._compat import remember
from pyro_vnd.distributions._fast.mixtures import mixture_terms
from pyro_vnd.distributions.lengths import gumbel_like
from pyro_vnd.distributions.masks import OrderedMask
from pyro_vnd.distributions.nested import NestedLaw

__all__ = ["NestedMixture"]


class NestedMixture(NestedLaw):
    r"""Independent mixtures of M Normals at K ordered coordinates, cut to zero past a random length.

    $$L \sim p, \qquad n_i \sim \sum_m w_{im} N(\mu_{im}, \sigma_{im}), \qquad x_i = n_i \, 1[i \le L].$$

    What `NestedAutoregressive.given` returns where its conditioner has mixtures. Draws have the gradient of the whole
    law, its weights included, by the implicit function: of $F(n; \theta) = u$ it is
    $dn / d\theta = -(\partial F / \partial \theta) / p(n)$.

    Shapes: batch_shape (...), that of the lengths and the coordinates; event_shape (K,).

    Args:
        loc: Means, shape (..., K, M).
        scale: Standard deviations, > 0, the same shape.
        logits: Unnormalised log-weights, the same shape.
        mask_law: Law of the mask, batch shape (...).

    Source: for the gradient, Figurnov, Mohamed and Mnih, arXiv 1805.08498, equation 5.

    Example:
        >>> import torch
        >>> law = NestedMixture(
        ...     torch.tensor([[-1.0, 1.0]]), torch.ones(1, 2), torch.zeros(1, 2), OrderedMask(probs=torch.ones(1))
        ... )
        >>> law.loc, law.scale  # of the mixture
        (tensor([0.]), tensor([1.4142]))
    """

    def __init__(self, loc: Tensor, scale: Tensor, logits: Tensor, mask_law: OrderedMask) -> None:
        shape = loc.shape[:-1]
        super().__init__(shape[:-1], shape[-1:], validate_args=False)
        self._validate_args = mask_law._validate_args
        self.mask_law = mask_law if mask_law.batch_shape == shape[:-1] else mask_law.expand(shape[:-1])
        self._parts = loc, scale, logits

    @property
    def loc(self) -> Tensor:
        """Means of the uncut coordinates, shape batch_shape + (K,)."""
        return self._terms_at(self._parts[0][..., 0])[0]

    @property
    def scale(self) -> Tensor:
        """Standard deviations of the uncut coordinates, shape batch_shape + (K,)."""
        return self._terms_at(self._parts[0][..., 0])[1]

    def _terms_at(self, dense: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return means, standard deviations and log-densities of uncut coordinates; the first two are of the law."""
        mean, variance, densities = mixture_terms(dense, *self._parts)
        return mean, variance.sqrt(), densities

    def rsample(self, sample_shape: _size = torch.Size()) -> Tensor:
        """Draw vectors with zeros past a random length, shape sample_shape + batch_shape + (K,)."""
        mask = self.mask_law.rsample(sample_shape)
        dense = draw(torch.randn(mask.shape, dtype=mask.dtype, device=mask.device), *self._parts)
        return remember(mask * dense, (mask, dense))

    def densities(self, dense: Tensor) -> Tensor:
        """Return the log-density of each uncut coordinate, shape (..., K)."""
        return mixture_terms(dense, *self._parts)[2]

    def expand(self, batch_shape: _size, _instance: Self | None = None) -> Self:
        """Return the same law with a larger batch shape."""
        new = super().expand(batch_shape, _instance)
        loc, scale, logits = (part.expand(*batch_shape, *part.shape[-2:]) for part in self._parts)
        new._parts = loc, scale, logits
        return new


def draw(noise: Tensor, loc: Tensor, scale: Tensor, logits: Tensor | None = None) -> Tensor:
    """Draw from Normals, or from mixtures of them with the implicit gradient, given standard Normal noise."""
    if logits is None:
        return torch.addcmul(loc, scale, noise)
    scores = logits + gumbel_like(noise, noise.shape + logits.shape[-1:])
    which = scores.argmax(-1, keepdim=True)
    picked_loc, picked_scale = (part.expand_as(scores).gather(-1, which).squeeze(-1) for part in (loc, scale))
    drawn = torch.addcmul(picked_loc, picked_scale, noise)
    if not any(part.requires_grad for part in (loc, scale, logits)):
        return drawn
    drawn, weights = drawn.detach(), (logits - logits.logsumexp(-1, keepdim=True)).exp()
    below = (weights * torch.special.ndtr((drawn.unsqueeze(-1) - loc) / scale)).sum(-1)
    return drawn - (below - below.detach()) / mixture_terms(drawn, loc, scale, logits)[2].detach().exp()
