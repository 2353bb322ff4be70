"""The fully relaxed ordered mask."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.types import _size

from pyro_vnd._compat import recall, remember
from pyro_vnd.distributions._fast.broadcast import broadcast_shapes
from pyro_vnd.distributions.constraints import ordered_mask, tail_difference, tail_sum
from pyro_vnd.distributions.lengths import LengthLaw, gumbel_like

__all__ = ["RelaxedOrderedMask"]


class RelaxedOrderedMask(LengthLaw):
    r"""Soft ordered mask with a density: a relaxed one-hot length pushed through `TailSum`.

    $$y = \mathrm{softmax}((\log p + g) / \tau), \quad g_k \sim \mathrm{Gumbel}, \qquad z = \mathrm{TailSum}(y),$$
    $$\log q(z) = \log \Gamma(K) + (K - 1) \log \tau
      + \sum_k (\log p_k - (\tau + 1) \log y_k) - K \log \sum_k p_k y_k^{-\tau},$$

    the Downhill variable of the paper. Its density is with respect to the Lebesgue measure of the first K - 1
    coordinates of the simplex, which `TailSum` preserves.

    - `rsample` returns soft masks, 1 = z_1 >= ... >= z_K >= 0.
    - `log_prob` scores the soft mask. A fresh sample remembers log y, because for low temperatures float32 masks
      near one cannot hold it; any other value (a clone, say) is scored from its differences, to float precision.
      Score one site with this class in model and guide alike: a density and a pmf do not mix.
    - The gradient is that of the sample itself; nothing is straight-through.

    `keep_probs`, `mean_length` and their kin are those of the hard mask that the soft one tends to at temperature 0.
    Lengths of probability zero are given the smallest positive probability, since the density needs them all.

    Shapes: parameters (..., K); batch_shape (...); event_shape (K,).

    Args:
        temperature: Temperature, > 0; a number or a tensor that broadcasts to the batch shape.
        probs: Non-negative weights of the lengths 1..K, shape (..., K).
        logits: Unnormalised log-weights of the lengths, shape (..., K), finite.
        validate_args: Whether values of parameters and samples are checked.

    Raises:
        ValueError: If a shape or value is invalid.

    Source: Cui et al., arXiv 2101.11353, section 3.2; Maddison et al., arXiv 1611.00712, equation 10.

    Example:
        >>> import torch
        >>> law = RelaxedOrderedMask(0.5, logits=torch.zeros(4))
        >>> z = law.rsample()
        >>> bool((z.diff() <= 0).all()), law.log_prob(z).shape
        (True, torch.Size([]))
    """

    support = ordered_mask
    has_rsample = True
    _has_temperature = True

    def __init__(
        self,
        temperature: float | Tensor,
        *,
        probs: Tensor | None = None,
        logits: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        super().__init__(probs, logits, temperature, validate_args=validate_args)
        self.temperature = torch.as_tensor(self.temperature, dtype=self._param.dtype, device=self._param.device)

    @property
    def _finite_log_probs(self) -> Tensor:
        log_probs = self._log_probs
        if not self._may_have_zeros:
            return log_probs
        least: Any = math.log(torch.finfo(log_probs.dtype).tiny)
        if self._is_logits:  # a price may have made possible lengths less probable than that
            least = log_probs.detach().masked_fill(log_probs == -torch.inf, 0).amin(-1, keepdim=True).clamp_max(least)
        return log_probs.clamp_min(least)

    def rsample(self, sample_shape: _size = torch.Size()) -> Tensor:
        """Draw soft masks, shape sample_shape + batch_shape + (K,)."""
        scores = self._finite_log_probs + gumbel_like(self._param, self._extended_shape(sample_shape))
        log_one_hot = (scores / self.temperature.unsqueeze(-1)).log_softmax(-1)
        value = tail_sum(log_one_hot.exp())
        return remember(value / value[..., :1], log_one_hot)  # a sum of thousands of terms is not quite one

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-density of soft masks, shape broadcast(value.shape[:-1], batch_shape)."""
        if self._validate_args:
            self._validate_sample(value)
        log_one_hot = recall(value)
        if log_one_hot is None:
            value = value.to(self._param.dtype)
            log_one_hot = tail_difference(value).clamp_min(torch.finfo(value.dtype).tiny).log()
        k, temperature, log_probs = self.num_units, self.temperature, self._finite_log_probs
        scaled = temperature.unsqueeze(-1) * log_one_hot
        density = (log_probs - scaled - log_one_hot).sum(-1) - k * (log_probs - scaled).logsumexp(-1)
        density = density + math.lgamma(k) + (k - 1) * temperature.log()
        return density.expand(broadcast_shapes(density.shape, self.batch_shape))
