"""Normal laws of a block of latents, one for each combination of lengths."""

import math
from collections.abc import Sequence
from typing import Any, Self, cast

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from pyro.nn import PyroModule, PyroParam
from torch import Tensor
from torch.distributions import constraints
from torch.types import _size

from pyro_vnd.infer._conditional.layout import MAX_CHOLESKY, MAX_TABLE, Block

__all__ = ["TableNormal", "Tables", "at_rows", "scale_gradient"]

INIT_SCALE = 0.03  # of the deviation of the prior
_HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


class TableNormal(TorchDistribution):
    r"""Normal law of D coordinates, $x = c + s (m + (I + A) \, \mathrm{diag}(e^b) \, \epsilon)$, A lower triangular.

    Samples have their gradient; `log_prob` has none to the parameters but through its value, as the score of a law has
    mean zero at its own draws: where the law is the posterior, the gradient of the ELBO has no noise at all.

    Shapes: batch_shape (...); event_shape (D,).

    Args:
        loc: m, shape (..., D).
        log_scale: b, shape (..., D).
        lower: A, shape (..., D, D), or None for independent coordinates.
        center: c, shape (D,) or any that broadcasts.
        spread: s > 0, the same.

    Attributes:
        common: Dimensions of the batch, from the right, in which all laws have the same noise.
        weights: How much each coordinate counts in `log_prob`, or None for once.
        factor: What the gradient of a draw is multiplied by, or None.

    Source: Roeder, Wu and Duvenaud, "Sticking the landing", arXiv 1703.09194.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, loc: Tensor, log_scale: Tensor, lower: Tensor | None, center: Tensor, spread: Tensor) -> None:
        self.loc, self.log_scale, self.lower, self.center, self.spread = loc, log_scale, lower, center, spread
        self.common: tuple[int, ...] = ()
        self.weights: Tensor | None = None
        self.factor: Tensor | None = None
        super().__init__(loc.shape[:-1], loc.shape[-1:], validate_args=False)

    def expand(self, batch_shape: _size, _instance: Self | None = None) -> Self:
        """Return the same law with a larger batch shape."""
        shape = torch.Size(batch_shape) + self.event_shape
        lower = None if self.lower is None else self.lower.expand(shape + self.event_shape)
        center, spread = self.center.expand(shape), self.spread.expand(shape)
        new = type(self)(self.loc.expand(shape), self.log_scale.expand(shape), lower, center, spread)
        new.common, new.weights, new.factor = self.common, self.weights, self.factor
        return new

    def rsample(self, sample_shape: _size = torch.Size()) -> Tensor:
        """Draw, shape sample_shape + batch_shape + (D,)."""
        shape = list(self._extended_shape(sample_shape))
        for dim in self.common:
            shape[dim - 1] = 1
        noise = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        return self.of_noise(noise)

    def of_noise(self, noise: Tensor) -> Tensor:
        """Return the draw that a standard Normal one of shape (..., D) makes."""
        deviation = self.log_scale.exp() * noise
        if self.lower is not None:
            deviation = deviation + (self.lower.tril(-1) @ deviation.unsqueeze(-1)).squeeze(-1)
        value = self.center + self.spread * (self.loc + deviation)
        return value if self.factor is None else scale_gradient(value, self.factor)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-density, shape (...)."""
        return self.log_prob_of(value, self.noise_of(value), self.weights).sum(-1)

    @torch.no_grad()
    def noise_of(self, value: Tensor) -> Tensor:
        """Return the standard Normal draw that a draw is made of, without gradient."""
        noise = (value - self.center) / self.spread - self.loc
        if self.lower is not None:
            noise = _solve(self.lower.tril(-1).expand(*noise.shape, noise.shape[-1]), noise, upper=False)
        return noise * (-self.log_scale).exp()

    def log_prob_of(self, value: Tensor, noise: Tensor, weights: Tensor | None) -> Tensor:
        r"""Return the terms of the log-density of a draw, $\log q(x_i \mid x_{<i})$, whose sum has the right gradient.

        Args:
            value: The draw, shape (..., D).
            noise: What it was made of.
            weights: Weight of each term, or None for one.

        Returns:
            Shape (..., D).
        """
        with torch.no_grad():
            terms = _times(weights, -0.5 * noise.square() - self.log_scale - self.spread.log() - _HALF_LOG_2PI)
            slope = _times(weights, noise) * (-self.log_scale).exp()
            if self.lower is not None:
                slope = _solve(self.lower.tril(-1).mT.expand(*slope.shape, slope.shape[-1]), slope, upper=True)
            slope = slope / self.spread
        return terms - slope * (value - value.detach()) if value.requires_grad else terms

    @property
    def stddev(self) -> Tensor:
        """Standard deviation of each coordinate, shape (..., D)."""
        scale = self.log_scale.exp()
        if self.lower is not None:
            unit = self.lower.tril(-1) + torch.eye(self.loc.shape[-1], dtype=scale.dtype, device=scale.device)
            scale = (unit * scale.unsqueeze(-2)).square().sum(-1).sqrt()
        return self.spread * scale


def _times(weights: Tensor | None, x: Tensor) -> Tensor:
    return x if weights is None else weights * x


def _solve(unit: Tensor, x: Tensor, *, upper: bool) -> Tensor:
    solved = torch.linalg.solve_triangular(unit, x.unsqueeze(-1), upper=upper, unitriangular=True)
    return solved.squeeze(-1)


def scale_gradient(x: Tensor, factor: Tensor) -> Tensor:
    """Return x with its gradient multiplied by a factor that broadcasts to it."""
    return x.detach() + factor * (x - x.detach()) if x.requires_grad else x


class Tables(PyroModule):
    """Parameters of the laws of one block, by combination of lengths and row.

    Lengths are told from each other while there is room: first the correlations of a large block are left out, then
    there is one law for all lengths.

    Args:
        block: The latents.
        num_laws: Combinations of lengths.
        center: Where they start, shape block.shape + (D,).
        spread: Deviation of the prior, the same shape.
        offsets: Where the laws of each of several separate lengths begin, whose entries are added.
    """

    loc: Any
    log_scale: Any
    lower: Any
    center: Tensor
    spread: Tensor

    def __init__(
        self, block: Block, num_laws: int, center: Tensor, spread: Tensor, offsets: Sequence[int] = (0,)
    ) -> None:
        super().__init__()
        size, rows = block.size, math.prod(block.shape)
        self.knows_lengths = num_laws * rows * size <= MAX_TABLE
        self.num_laws = num_laws if self.knows_lengths else 1
        self.offsets = tuple(offsets)
        self.correlated = size > 1 and self.num_laws * rows * size**2 <= MAX_CHOLESKY
        self.register_buffer("center", center)
        self.register_buffer("spread", spread)
        shape = (self.num_laws, *block.shape, size)
        self.loc = PyroParam(center.new_zeros(shape))
        self.log_scale = PyroParam(
            center.new_full(shape, math.log(INIT_SCALE) / (len(offsets) if self.knows_lengths else 1))
        )
        if self.correlated:
            self.lower = PyroParam(center.new_zeros(*shape, size))

    def law(self, index: Tensor | None = None) -> TableNormal:
        """Return the laws of all combinations, or of some.

        Args:
            index: Numbers of combinations, shape (...) that broadcasts with the rows; or of separate lengths, from 0,
                shape (..., lengths).

        Returns:
            A law of batch shape (num_laws, *rows), or that of `index` broadcast with the rows.
        """
        loc, log_scale = self.loc, self.log_scale
        # An optimiser like Adam moves all D^2 entries by the same amount: together they must not make (I + A) singular.
        lower = self.lower * min(1.0, (10 / self.loc.shape[-1]) ** 1.5) if self.correlated else None
        if index is not None:
            loc, log_scale = self._at(loc, index), self._at(log_scale, index)
            lower = None if lower is None else self._at(lower, index, 2)
        return TableNormal(loc, log_scale, lower, self.center, self.spread)

    @torch.no_grad()
    def release(self, which: Tensor) -> None:
        """Give coordinates, shape (*rows, D), their prior, as far as it is known, and no part in the others."""
        self.loc.masked_fill_(which, 0)
        self.log_scale.masked_fill_(which, 0)
        if self.correlated:
            self.lower.masked_fill_(which.unsqueeze(-1) | which.unsqueeze(-2), 0)

    def _at(self, table: Tensor, index: Tensor, event_dim: int = 1) -> Tensor:
        if len(self.offsets) > 1:
            indices = [offset + i for offset, i in zip(self.offsets, index.unbind(-1), strict=True)]
        else:
            indices = [index]
        if self.num_laws == 1:
            return at_rows(table, torch.zeros_like(indices[0]), event_dim)
        total: Any = sum(at_rows(table, each, event_dim) for each in indices)
        return cast(Tensor, total)


def at_rows(table: Tensor, index: Tensor, event_dim: int = 1) -> Tensor:
    """Return entries of the first dimension of a table, chosen for each row.

    Args:
        table: Shape (n, *rows, *event).
        index: Numbers from 0 to n - 1 that broadcast with the rows.
        event_dim: Dimensions of an event.
    """
    rows = table.shape[1 : table.dim() - event_dim]
    places = [
        torch.arange(n, device=index.device).reshape((-1,) + (1,) * (len(rows) - i - 1)) for i, n in enumerate(rows)
    ]
    return table[(index, *places)]
