"""Ordered masks that are hard in the forward pass and soft in the backward pass."""

from typing import Literal, Self, TypeAlias, get_args

import torch
from torch import Tensor
from torch.types import _size

from pyro_vnd._compat import only_plain_code, recall
from pyro_vnd._sizes import is_one_of
from pyro_vnd.distributions._fast.masks import logistic_mask
from pyro_vnd.distributions.constraints import tail_sum
from pyro_vnd.distributions.lengths import LengthLaw, gumbel_like
from pyro_vnd.distributions.masks import Cut, OrderedMask

__all__ = ["Noise", "OrderedMaskStraightThrough"]

Noise: TypeAlias = Literal["logistic", "gumbel"]


class OrderedMaskStraightThrough(OrderedMask):
    r"""Ordered mask with reparameterised hard samples: the default in guides.

    - `rsample` returns masks of zeros and ones whose law is exactly that of `OrderedMask`, at every temperature.
    - `log_prob` scores the hard mask with the exact pmf, as a linear function of the value; it is a function of the
      value alone, and survives clone, detach, expand and replay.
    - The backward pass uses a soft mask. With noise "logistic", one uniform number u a mask,

      $$z_i = 1[u < S_i], \qquad \tilde z_i = \sigma((\mathrm{logit} S_i - \mathrm{logit}\, u) / \tau),$$

      and with noise "gumbel", K numbers $g_k$ a mask,

      $$\tilde z = \mathrm{TailSum}(\mathrm{softmax}((\log p + g) / \tau)), \qquad
        L = \mathrm{arg\,max}_k (\log p_k + g_k).$$

    The gradient is biased towards that of the relaxed objective, and its variance grows as the temperature falls. The
    logistic noise has less variance wherever it was measured, and less bias for strongly nonlinear objectives; for a
    quadratic one at low temperatures the Gumbel noise has less bias. KL divergences to any ordered mask are exact.

    Shapes: parameters (..., K); batch_shape (...); event_shape (K,).

    Args:
        temperature: Temperature of the soft mask, > 0; a number or a tensor that broadcasts to the batch shape.
        probs: Non-negative weights of the lengths 1..K, shape (..., K); zeros are allowed.
        logits: Unnormalised log-weights of the lengths, shape (..., K), finite.
        noise: "logistic" or "gumbel".
        validate_args: Whether values of parameters and samples are checked.

    Raises:
        ValueError: If a shape or value is invalid.

    Source: Cui et al., arXiv 2101.11353, section 3.2 (Gumbel noise); Bengio et al., arXiv 1308.3432 (straight-through).

    Example:
        >>> import torch
        >>> logits = torch.zeros(4, requires_grad=True)
        >>> mask = OrderedMaskStraightThrough(0.2, logits=logits).rsample((1000,))
        >>> mask.unique()
        tensor([0., 1.], grad_fn=<Unique2Backward0>)
        >>> mask.sum(-1).mean().backward()
        >>> bool((logits.grad.diff() > 0).all())  # longer lengths keep more
        True
    """

    has_rsample = True
    has_enumerate_support = False
    _has_temperature = True

    def __init__(
        self,
        temperature: float | Tensor,
        *,
        probs: Tensor | None = None,
        logits: Tensor | None = None,
        noise: Noise = "logistic",
        validate_args: bool | None = None,
    ) -> None:
        LengthLaw.__init__(self, probs, logits, temperature, validate_args=validate_args)
        if not is_one_of(noise, get_args(Noise)):
            raise ValueError(f"{type(self).__name__}: argument `noise` must be 'logistic' or 'gumbel'; got {noise!r}")
        self.noise = noise

    def _with(self, param: Tensor, batch_shape: torch.Size, _instance: Self | None = None) -> Self:
        new = super()._with(param, batch_shape, _instance)
        new.noise = self.noise
        return new

    def rsample(self, sample_shape: _size = torch.Size()) -> Tensor:
        """Draw masks of zeros and ones with a straight-through gradient, shape sample_shape + batch_shape + (K,)."""
        return self._masks(self._noise(sample_shape))

    def _noise(self, sample_shape: _size) -> Tensor:
        if self.noise == "logistic":
            return self._uniform(sample_shape)
        return gumbel_like(self._param, self._extended_shape(sample_shape))

    def _masks(self, noise: Tensor) -> Tensor:
        """Return the masks that noise makes, of one number a mask or one a unit."""
        temperature = self.temperature.unsqueeze(-1) if isinstance(self.temperature, Tensor) else self.temperature
        if self.noise == "logistic":
            param = self._param if self._is_logits else self._probs
            return logistic_mask(param, noise, temperature, self._is_logits)
        # Neither argmax nor softmax sees whether logits are normalised. Infinite ones would have NaN gradients.
        log_weights = self._log_weights.clamp_min(-1e30) if self._may_have_zeros else self._param
        scores = log_weights + noise
        soft = tail_sum((scores / temperature).softmax(-1))
        units = torch.arange(self.num_units, device=scores.device)
        hard = (units <= scores.argmax(-1, keepdim=True)).to(scores.dtype)
        return hard + (soft - soft.detach())  # in this order: the hard values stay exact

    @staticmethod
    def partial_rows(mask: Tensor) -> Tensor | None:
        """Return which masks of a fresh batch may lack a unit, so that work on dropped ones can leave out the others.

        The others are those whose length is given as K, by `cut`: they are whole, and have no gradient.

        Args:
            mask: A sample, shape (N, K).

        Returns:
            Numbers of rows, shape (R,), or None if it is no fresh sample of a batch that was cut.

        Example:
            >>> law = OrderedMaskStraightThrough(0.2, logits=torch.zeros(4, 3)).cut(torch.tensor([3, 1, 0, 3]))
            >>> OrderedMaskStraightThrough.partial_rows(law.rsample())
            tensor([1, 2])
        """
        cut = None if only_plain_code() else recall(mask)  # how many they are would depend on values
        return cut.partial if isinstance(cut, Cut) and cut.lengths.dim() == 1 else None

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """Refuse: Pyro takes reparameterised sites to be sampled, and would give every enumerated mask weight one."""
        raise NotImplementedError("a straight-through mask is sampled; to enumerate lengths, use OrderedMask")
