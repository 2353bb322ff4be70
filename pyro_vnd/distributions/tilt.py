"""A price for length: laws tilted to shorter or longer lengths, and the price at which a mean length is met."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from pyro_vnd._compat import all_true, only_plain_code
from pyro_vnd._sizes import is_within, without_values
from pyro_vnd.distributions._fast.broadcast import broadcast_shapes
from pyro_vnd.distributions.constraints import extremes, got, within

__all__ = ["Tiltable", "tilted_logits"]

_LEAST = -1e30  # of the logits of possible lengths: far below all that count, finite also over a temperature
_REACH, _STEPS = 50.0, 54  # prices up to sinh(50) = 3e21 nats a unit, to a relative 1e-14
_NEAR = 1e-3  # nats, on which logits depend nearly linearly
_LARGEST = 80.0  # exp of it is finite in float32
_MISSED = 1e-4  # of K: by how much the mean length may be missed, where log-weights are too large to be added to
_FLAT = 1e-12  # of the largest covariance of length and cost: below it no price is told from its neighbours


class Tiltable:
    r"""Base of the laws that have lengths, which a price makes shorter or longer.

    With $C(k) = \sum_{i \le k} c_i$ the cost of a length, one a unit if nothing else is said, a price $\lambda$ makes
    of the lengths of a law

    $$p(L = k \mid \lambda) \propto p_k \exp(-\lambda C(k)).$$

    Their mean falls as the price grows, $\partial E[L] / \partial\lambda = -\mathrm{Cov}(L, C(L))$, so that each mean
    length between the shortest and the longest possible one has one price.
    """

    batch_shape: torch.Size
    _validate_args: bool

    @property
    def num_units(self) -> int:
        """Number of ordered units, K."""
        raise NotImplementedError

    @property
    def _log_weights(self) -> Tensor:
        """Log-weights of the lengths, which need not sum to one; -inf where a length is impossible."""
        raise NotImplementedError

    def _tilt_by(self, price: Tensor, costs: Tensor) -> Self:
        """Return the law tilted by a price and the costs of the lengths, which are known to be right."""
        raise NotImplementedError

    def tilt(self, price: float | Tensor, cost: Tensor | None = None) -> Self:
        r"""Return the law that has the lengths of this one at a price, $p_k \exp(-\lambda C(k))$ up to a constant.

        Computed in float64, so that prices may be as large as log-likelihoods of images are. Prices add up: to tilt
        twice is to tilt by their sum. Lengths that are impossible stay so, and those that are given by `cut` stay
        given. There are gradients to the price, the cost and the parameters of the law.

        Args:
            price: Nats that one more unit of cost takes; negative for longer lengths. A number or a tensor that
                broadcasts with the batch shape.
            cost: Cost of each unit, non-negative and not zero for all units from the second on, shape (..., K); one
                for each by default.

        Returns:
            A law of the same class; its batch shape is that of law, price and cost together.

        Raises:
            ValueError: If a shape or value is invalid.

        Example:
            >>> import torch
            >>> from pyro_vnd.distributions import OrderedMask
            >>> law = OrderedMask.uniform(3)
            >>> law.tilt(1.0).probs
            tensor([0.6652, 0.2447, 0.0900])
            >>> law.tilt(torch.tensor([-1.0, 0.0, 1.0])).mean_length
            tensor([2.5752, 2.0000, 1.4248])
        """
        where = f"{type(self).__name__}.tilt"
        costs = self._costs(where, cost)
        return self._tilt_by(self._numbers(where, "price", price, costs), costs)

    def price_at_mean_length(
        self, mean_length: float | Tensor, cost: Tensor | None = None, *, shared: bool = False
    ) -> Tensor:
        """Return the price at which the lengths have a mean.

        Found by bisection in float64. There are gradients to the mean length, the cost and the parameters of the law,
        of the first and second order, by the implicit function theorem.

        Args:
            mean_length: Expected length in units, strictly between the means at an infinite price and at an infinitely
                negative one: the shortest and the longest possible length, unless units have no cost. A number or a
                tensor that broadcasts with the batch shape; one number if `shared`.
            cost: Cost of each unit, as in `tilt`.
            shared: Whether all laws of the batch have one price, and a mean length on average; else each law has a
                price of its own.

        Returns:
            Prices of the batch shape, or one number if `shared`.

        Raises:
            ValueError: If a shape or value is invalid, or no price makes this mean length.

        Example:
            >>> import torch
            >>> from pyro_vnd.distributions import OrderedMask
            >>> law = OrderedMask(logits=torch.tensor([[0.0, 3.0, 4.0], [0.0, 1.0, 1.5]]))
            >>> law.price_at_mean_length(2.0)
            tensor([2.0000, 0.7500])
            >>> price = law.price_at_mean_length(2.0, shared=True)
            >>> law.tilt(price).mean_length.mean()
            tensor(2.)
        """
        where = f"{type(self).__name__}.price_at_mean_length"
        price = self._price(where, mean_length, self._costs(where, cost), shared).to(self._log_weights.dtype)
        return price if shared else price.expand(broadcast_shapes(price.shape, self.batch_shape))

    def at_mean_length(self, mean_length: float | Tensor, cost: Tensor | None = None, *, shared: bool = False) -> Self:
        """Return the law tilted to a mean length, by the price that `price_at_mean_length` finds.

        Args:
            mean_length: Expected length in units, as there.
            cost: Cost of each unit, as in `tilt`.
            shared: Whether all laws of the batch have one price, and the mean length on average.

        Returns:
            A law of the same class; its batch shape is that of law, mean length and cost together.

        Raises:
            ValueError: If a shape or value is invalid, or no price makes this mean length.

        Example:
            >>> import torch
            >>> from pyro_vnd.distributions import OrderedMask
            >>> OrderedMask.uniform(4).at_mean_length(torch.tensor([1.5, 2.5])).mean_length
            tensor([1.5000, 2.5000])
        """
        where = f"{type(self).__name__}.at_mean_length"
        costs = self._costs(where, cost)
        return self._tilt_by(self._price(where, mean_length, costs, shared), costs)

    def _costs(self, where: str, cost: Any) -> Tensor:
        """Return what each length costs more than the first one, in high precision, once costs are checked."""
        like, num_units = self._log_weights, self.num_units
        if cost is None:
            return torch.arange(num_units, dtype=_precise(like), device=like.device)
        name = f"{where}: argument `cost`"
        if not _is_real(cost) or cost.shape[-1:] != (num_units,):
            came = type(cost).__name__
            if isinstance(cost, Tensor):
                came = without_values(cost) or f"{tuple(cost.shape)}, {cost.dtype}"
            raise ValueError(
                f"{name} must be a tensor of real numbers of shape (..., {num_units}), one a unit; got {came}"
            )
        self._check_fit(name, cost.shape[:-1])
        rest = cost[..., 1:].to(like.device, _precise(like))
        if self._validate_args:
            pays = (rest > 0).any(-1) if num_units > 1 else torch.ones_like(cost[..., 0], dtype=torch.bool)
            if not (within(cost) and all_true((cost >= 0).all(-1) & pays)):
                raise ValueError(
                    f"{name} of shape {tuple(cost.shape)} must be finite and >= 0, and > 0 for one unit at least from "
                    f"the second on; got {got(cost)}"
                )
        return pad(rest.cumsum(-1), (1, 0))

    def _numbers(self, where: str, argument: str, value: Any, costs: Tensor) -> Tensor:
        """Return a price or mean lengths in high precision, once they are checked."""
        name, like = f"{where}: argument `{argument}`", self._log_weights
        if not isinstance(value, Tensor) and is_within(value):
            return torch.as_tensor(float(value), dtype=_precise(like), device=like.device)
        if not _is_real(value):
            came = (without_values(value) or value.dtype) if isinstance(value, Tensor) else repr(value)
            raise ValueError(f"{name} must be a finite number or a tensor of real numbers; got {came}")
        self._check_fit(name, value.shape, costs.shape[:-1])
        if self._validate_args and not within(value):
            raise ValueError(f"{name} of shape {tuple(value.shape)} must be finite; got {got(value)}")
        return value.to(like.device, _precise(like))

    def _check_fit(self, name: str, shape: torch.Size, others: torch.Size = torch.Size()) -> None:
        batch_shape = broadcast_shapes(self.batch_shape, others)
        try:
            broadcast_shapes(shape, batch_shape)
        except RuntimeError:
            raise ValueError(
                f"{name} of shape {tuple(shape)} must broadcast with the batch shape {tuple(batch_shape)}"
            ) from None

    def _price(self, where: str, mean_length: Any, costs: Tensor, shared: bool) -> Tensor:
        """Return prices in high precision, once the mean length is checked."""
        name = f"{where}: argument `mean_length`"
        mean_length = self._numbers(where, "mean_length", mean_length, costs)
        if shared and (mean_length.dim() or not self.batch_shape.numel()):
            raise ValueError(
                f"{name} of shape {tuple(mean_length.shape)} must be one number, and the batch have one law at least, "
                f"for laws that share a price; got batch shape {tuple(self.batch_shape)}"
            )
        log_weights = self._log_weights.to(_precise(self._log_weights))
        if self._validate_args:
            shortest, longest = (_end(log_weights, costs, sign) for sign in (1, -1))
            if shared:
                shortest, longest = shortest.mean(), longest.mean()
            if not all_true((shortest < mean_length) & (mean_length < longest)):
                raise ValueError(
                    f"{name} of shape {tuple(mean_length.shape)} must be strictly between the least and the largest "
                    f"mean length that a price can make, {_say(shortest)} and {_say(longest)}; got {_say(mean_length)}"
                )
        price = (_shared_price if shared else _own_price)(log_weights, costs, mean_length)
        if self._validate_args:
            met = (log_weights - price.unsqueeze(-1) * costs).detach().softmax(-1) @ _lengths(costs)
            if shared:
                met = met.mean()
            if not all_true((met - mean_length).abs() <= _MISSED * self.num_units):  # nor where it is NaN
                raise ValueError(
                    f"{where}: no number is the price of this mean length: the log-weights of the lengths are too far "
                    f"apart, as of logits beyond 1e13; got the means {_say(met)} for {_say(mean_length)}"
                )
        return price


def _is_real(x: Any) -> bool:
    return isinstance(x, Tensor) and not (without_values(x) or x.is_complex() or x.dtype == torch.bool)


def _precise(like: Tensor) -> torch.dtype:
    """Return the type to compute in: float64, where the device has it."""
    return torch.float32 if like.device.type == "mps" else torch.float64


def _say(x: Tensor) -> str:
    """Name a number, or the smallest and the largest of several, if they can be looked at."""
    with suppress(RuntimeError):
        return " to ".join(dict.fromkeys(f"{bound:.6g}" for bound in extremes(x)))
    return "others"


def tilted_logits(log_weights: Tensor, price: Tensor, costs: Tensor) -> Tensor:
    """Return log-weights less price times cost, the largest of them zero.

    Args:
        log_weights: Of the lengths, shape (..., K); -inf for the impossible ones, which stay so.
        price: In high precision, shape (...).
        costs: Of the lengths, in high precision, shape (..., K).

    Returns:
        Logits of the type of `log_weights`, finite where a length is possible.
    """
    logits = log_weights - price.unsqueeze(-1) * costs
    logits = (logits - logits.detach().amax(-1, keepdim=True)).clamp_min(_LEAST)
    return logits.masked_fill(log_weights == -torch.inf, -torch.inf).to(log_weights.dtype)


def _end(log_weights: Tensor, costs: Tensor, sign: int) -> Tensor:
    """Return the mean length at an infinite price of this sign: that of the cheapest lengths, or the dearest ones."""
    log_weights, costs = torch.broadcast_tensors(log_weights.detach(), costs.detach())
    signed = (sign * costs).masked_fill(log_weights == -torch.inf, torch.inf)
    left = log_weights.masked_fill(signed > signed.amin(-1, keepdim=True), -torch.inf)
    return left.softmax(-1) @ _lengths(costs)


def _lengths(costs: Tensor) -> Tensor:
    return torch.arange(1, costs.shape[-1] + 1, dtype=costs.dtype, device=costs.device)


def _own_price(log_weights: Tensor, costs: Tensor, mean_length: Tensor) -> Tensor:
    r"""Return for each law the price $\lambda$ at which $\sum_k p_k \exp(-\lambda C_k) (k - m)$ is zero.

    Its sign is that of the largest terms, however small the weights. So a price is found, and is differentiable, also
    where one length has all the mass that numbers can hold, as laws of whole images have: halfway between those at
    which its neighbours take over.
    """
    gaps = _lengths(costs) - mean_length.unsqueeze(-1)
    log_weights, costs, gaps = torch.broadcast_tensors(log_weights, costs, gaps)
    with torch.no_grad():
        log_terms, signs = log_weights + gaps.abs().log(), gaps.sign()

    def largest(price: Tensor) -> Tensor:
        return (log_terms - price.unsqueeze(-1) * costs.detach()).amax(-1, keepdim=True)

    def is_too_long(price: Tensor) -> Tensor:
        scores = log_terms - price.unsqueeze(-1) * costs
        return ((scores - scores.amax(-1, keepdim=True)).exp_() * signs).sum(-1) > 0

    def step(price: Tensor) -> Tensor:
        logits = log_weights - price.unsqueeze(-1) * costs - largest(price.detach())
        terms = logits.clamp_max(_LARGEST).exp() * gaps  # more has a length that is the mean, to within exp(-80)
        return terms.sum(-1) / (terms * costs).sum(-1)

    return _root(is_too_long, step, costs)


def _shared_price(log_weights: Tensor, costs: Tensor, mean_length: Tensor) -> Tensor:
    """Return the price at which the mean over all laws of their mean lengths is a number."""
    lengths = _lengths(costs)
    log_weights, costs = torch.broadcast_tensors(log_weights, costs)

    def is_too_long(price: Tensor) -> Tensor:
        probs = (log_weights - price * costs).softmax(-1)
        return probs.reshape(-1, len(lengths)).mean(0) @ lengths > mean_length

    def step(price: Tensor) -> Tensor:
        probs = (log_weights - price * costs).softmax(-1)
        means = probs @ lengths
        deviations = costs - (probs * costs).sum(-1, keepdim=True)
        covariance = ((probs * deviations) @ lengths).mean()
        least = _FLAT * len(lengths) * costs.detach()[..., -1].mean()
        return (means.mean() - mean_length) / covariance.clamp_min(least)

    return _root(is_too_long, step, costs.reshape(-1, len(lengths)).mean(0))


def _root(is_too_long: Callable[[Tensor], Tensor], step: Callable[[Tensor], Tensor], costs: Tensor) -> Tensor:
    """Return prices above which lengths are too short, with their first two derivatives by all that `step` depends on.

    Bisection, in the inverse hyperbolic sine of the price, so that one bracket has prices of every size and either
    sign, comes so near that Newton's method does the rest. Two more of its steps, which end where they start, have the
    derivatives of the implicit function: the first step the first one, the second step the second one.

    Args:
        is_too_long: Says at which prices lengths are too long still.
        step: Returns Newton's step from a price.
        costs: Of the lengths, shape (..., K), for each price that is sought.
    """
    with torch.no_grad():
        dearest = costs[..., -1]
        unit = (costs.shape[-1] - 1) / dearest
        high = torch.full_like(unit, _REACH)
        low = -high
        for _ in range(_STEPS):
            middle = (low + high) / 2
            too_long = is_too_long(unit * middle.sinh())
            low, high = torch.where(too_long, middle, low), torch.where(too_long, high, middle)
            if not only_plain_code() and within(dearest * unit * (high.sinh() - low.sinh()), high=_NEAR):
                break
        root = unit * ((low + high) / 2).sinh()
        for _ in range(2):
            root = root + step(root)
    for _ in range(2):
        root = root + step(root)
    return root
