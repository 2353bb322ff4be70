"""Laws of ordered coordinates, each given those before it, that are zero past a random length."""

from collections.abc import Callable
from contextlib import suppress
from typing import ClassVar, Self

import torch
from torch import Tensor
from torch.distributions import constraints
from torch.types import _size

from pyro_vnd._compat import recall, remember
from pyro_vnd.distributions._fast.broadcast import broadcast_shapes
from pyro_vnd.distributions.constraints import check_real, got
from pyro_vnd.distributions.mixtures import NestedMixture, draw
from pyro_vnd.distributions.nested import NestedLaw, NestedNormal, in_range, mask_law_of
from pyro_vnd.distributions.straight_through import Noise

__all__ = ["NestedAutoregressive"]


class NestedAutoregressive(NestedLaw):
    r"""Law over K ordered coordinates, each Normal given those before it, cut to zero past a random length.

    $$L \sim p, \qquad n_i \sim N(\mu_i(n_{<i}), \sigma_i(n_{<i})), \qquad x_i = n_i \, 1[i \le L],$$
    $$\log p(x) = \log p_L + \sum_{i \le L} \log N(x_i; \mu_i(x_{<i}), \sigma_i(x_{<i})).$$

    What is kept has the same law whatever is dropped after it, which holds for this order of the coordinates and for no
    other: the law of a code that is cut is the law of whole codes, cut. As a prior of ordered latents it learns what
    the latents have in common, so that their draws look like codes.

    From a `NestedNormal` q its divergence is

    $$\mathrm{KL}(L_q \| L_p) + \sum_i S_i \, E_{n_{<i} \sim q}
      \mathrm{KL}(N_{q,i} \| N(\mu_i(n_{<i}), \sigma_i(n_{<i}))),$$

    that of `given` on average over draws, which is how `NestedELBO` takes it. No divergence is registered, so that
    Pyro's objectives score a draw in both laws.

    Each coordinate may be a mixture of M Normals in place of one, with means, deviations and weights that depend on
    those before it. Its divergence is then estimated by a draw: the exact one from the Normal $N_i$ with its mean and
    deviation, plus $\log N_i(n_i) - \log p(n_i \mid n_{<i})$.

    Sampling takes K evaluations of the conditioner, scoring takes one.

    Shapes: batch_shape (...), that of the lengths; event_shape (K,).

    Args:
        conditioner: Maps values, shape (..., K), to $\mu$ and $\sigma > 0$, which broadcast to that shape, entry i
            depending on the entries before it alone: `pyro_vnd.autoencoders.Conditioner`, say. Or to $\mu$, $\sigma$
            and the logits of mixtures, which broadcast to (..., K, M).
        logits: Unnormalised log-weights of the lengths 1..K, shape (..., K).
        probs: Weights of the lengths, in place of `logits`.
        temperature: Temperature of the straight-through mask, > 0.
        noise: Noise of the straight-through mask, "logistic" or "gumbel".
        validate_args: Whether values of parameters and samples, and what the conditioner returns, are checked.

    Raises:
        ValueError: If a shape or value is invalid.

    Source: for the coordinates, Germain et al., arXiv 1502.03509, and Papamakarios et al., arXiv 1705.07057.

    Example:
        >>> import torch
        >>> def conditioner(x):  # x_i ~ N(x_{i-1}, 1)
        ...     return torch.nn.functional.pad(x[..., :-1], (1, 0)), torch.ones_like(x)
        >>> law = NestedAutoregressive(conditioner, torch.tensor([0.0, 0.0, 0.0]))
        >>> law.given(torch.tensor([0.5, 2.0, 0.0])).loc
        tensor([0.0000, 0.5000, 2.0000])
        >>> law.log_prob(torch.tensor([0.5, 2.0, 0.0]))  # log 1/3 + log N(0.5; 0, 1) + log N(2; 0.5, 1)
        tensor(-4.1865)
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {
        "logits": constraints.real_vector,
        "probs": constraints.independent(constraints.nonnegative, 1),
    }

    def __init__(
        self,
        conditioner: Callable[[Tensor], tuple[Tensor, ...]],
        logits: Tensor | None = None,
        *,
        probs: Tensor | None = None,
        temperature: float | Tensor = 0.2,
        noise: Noise = "logistic",
        validate_args: bool | None = None,
    ) -> None:
        if not callable(conditioner) or isinstance(conditioner, type):
            raise ValueError(
                "NestedAutoregressive: argument `conditioner` must be callable with values; got "
                f"{type(conditioner).__name__}"
            )
        self.conditioner = conditioner
        self.mask_law = mask_law_of("NestedAutoregressive", temperature, probs, logits, noise, validate_args)
        super().__init__(self.mask_law.batch_shape, self.mask_law.event_shape, validate_args=False)
        self._validate_args = self.mask_law._validate_args

    def given(self, value: Tensor) -> NestedNormal | NestedMixture:
        """Return the law that each coordinate has given those before it in `value`.

        Args:
            value: Samples, shape (..., K). Of a fresh sample what was dropped is known, and counts.

        Returns:
            A law with independent coordinates; its batch shape is broadcast(value.shape[:-1], batch_shape).

        Raises:
            ValueError: If the values or what the conditioner returns have another shape.
        """
        check_real("NestedAutoregressive: argument `value`", value)
        shape = None
        if isinstance(value, Tensor):
            with suppress(RuntimeError):
                shape = broadcast_shapes(value.shape[:-1], self.batch_shape) + value.shape[-1:]
        if shape is None or shape[-1:] != self.event_shape:
            came = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"NestedAutoregressive: argument `value` must be samples of shape (..., {self.num_units}) that "
                f"broadcast with the batch shape {tuple(self.batch_shape)}; got {came}"
            )
        making = recall(value)
        return self._law(*self._condition(value if making is None else making[1], shape))

    def rsample(self, sample_shape: _size = torch.Size()) -> Tensor:
        """Draw vectors with zeros past a random length, shape sample_shape + batch_shape + (K,)."""
        mask = self.mask_law.rsample(sample_shape)
        noise = torch.randn(mask.shape, dtype=mask.dtype, device=mask.device)
        drawn: list[Tensor] = []
        for i in range(self.num_units):
            rest = torch.zeros_like(noise[..., i:])
            parts = self._condition(torch.cat([*drawn, rest], -1), mask.shape)
            self._check(*parts)
            drawn.append(draw(noise[..., i : i + 1], *(part.narrow(mask.dim() - 1, i, 1) for part in parts)))
        dense = torch.cat(drawn, -1)
        return remember(mask * dense, (mask, dense))

    def densities(self, dense: Tensor) -> Tensor:
        """Return the log-density of each uncut coordinate given those before it, shape (..., K)."""
        parts = self._condition(dense, broadcast_shapes(dense.shape, self.batch_shape + self.event_shape))
        self._check(*parts)
        return self._law(*parts).densities(dense)

    def _condition(self, value: Tensor, shape: torch.Size) -> tuple[Tensor, ...]:
        """Return means, deviations and perhaps logits for coordinates of a shape, given values that broadcast to it."""
        found = self.conditioner(value)
        parts = found if isinstance(found, tuple) else (found,)
        try:
            mixed = len(parts) == 3
            full = shape + torch.broadcast_shapes(*(part.shape for part in parts))[-1:] if mixed else shape
            loc, scale, *logits = (part.expand(full) for part in parts)
            if len(logits) != mixed:
                raise ValueError
        except (ValueError, AttributeError, RuntimeError):
            came = [tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__ for part in parts]
            raise ValueError(
                "NestedAutoregressive: argument `conditioner` must return means and deviations that broadcast to "
                f"{tuple(shape)}, or means, deviations and logits of mixtures, one dimension more; got {came}"
            ) from None
        return loc, scale, *logits

    def _law(self, loc: Tensor, scale: Tensor, logits: Tensor | None = None) -> NestedNormal | NestedMixture:
        if logits is None:
            return NestedNormal._of(loc, scale, self.mask_law)
        return NestedMixture(loc, scale, logits, self.mask_law)

    def _check(self, loc: Tensor, scale: Tensor, logits: Tensor | None = None) -> None:
        if self._validate_args:
            for part in (loc, scale, *([] if logits is None else [logits])):
                check_real("NestedAutoregressive: what argument `conditioner` returns", part)
        if self._validate_args and not (in_range("loc", loc) and in_range("scale", scale)):
            raise ValueError(
                "NestedAutoregressive: argument `conditioner` must return finite means and finite deviations > 0; got "
                f"{got(loc)} and {got(scale)}"
            )

    def expand(self, batch_shape: _size, _instance: Self | None = None) -> Self:
        """Return the same law with a larger batch shape."""
        new = super().expand(batch_shape, _instance)
        new.conditioner = self.conditioner
        return new
