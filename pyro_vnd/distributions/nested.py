"""Normal laws of ordered coordinates that are zero past a random length."""

from contextlib import suppress
from copy import copy
from numbers import Real
from typing import Any, ClassVar, NoReturn, Self

import torch
from pyro.distributions import TransformedDistribution
from pyro.distributions.distribution import COERCIONS
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import Normal, constraints
from torch.types import _size

from pyro_vnd._compat import recall, remember
from pyro_vnd.distributions._fast.broadcast import broadcast_shapes
from pyro_vnd.distributions.constraints import (
    check_dense,
    check_expandable,
    check_real,
    counted,
    got,
    nested_vector,
    tail_sum,
    within,
)
from pyro_vnd.distributions.masks import Cut, OrderedMask
from pyro_vnd.distributions.straight_through import Noise, OrderedMaskStraightThrough
from pyro_vnd.distributions.tilt import Tiltable

__all__ = ["NestedLaw", "NestedNormal", "find_mask", "in_range", "innermost"]


class NestedLaw(Tiltable, TorchDistribution):
    """Base of the laws of K ordered coordinates that are zero past a random length.

    Attributes:
        mask_law: Law of the mask.
    """

    support = nested_vector
    has_rsample = True

    mask_law: OrderedMask
    loc: Any  # where coordinates are independent, means and
    scale: Any  # standard deviations of the uncut ones, shape batch_shape + (K,)

    @property
    def keep_probs(self) -> Tensor:
        """Probability that each coordinate is kept, shape batch_shape + (K,)."""
        return self.mask_law.keep_probs

    @property
    def length_probs(self) -> Tensor:
        """Probabilities of the lengths 1..K, shape batch_shape + (K,)."""
        return self.mask_law.probs

    @property
    def mean_length(self) -> Tensor:
        """Expected kept length in coordinates, shape batch_shape."""
        return self.mask_law.mean_length

    @property
    def num_units(self) -> int:
        """Number of ordered coordinates, K."""
        return self.mask_law.num_units

    @staticmethod
    def mask_of(value: Tensor) -> Tensor:
        r"""Return the mask of a value, $z_i = 1[i \le L]$ with L its last coordinate that is not zero, or one.

        For a decoder that sees how many coordinates it has. The mask of a fresh sample has its straight-through
        gradient, so that the lengths learn from what is made of it.

        Args:
            value: Samples, shape (..., K).

        Returns:
            Zeros and ones, the shape of `value`.

        Example:
            >>> NestedLaw.mask_of(torch.tensor([0.5, 0.0, -1.0, 0.0]))
            tensor([1., 1., 1., 0.])
        """
        if not isinstance(value, Tensor) or not value.dim():
            came = "one without dimensions" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"mask_of: argument `value` must be a tensor of shape (..., K); got {came}")
        making = recall(value)
        if making is not None:
            return making[0]
        mask = (tail_sum(value != 0) > 0).to(value.dtype)
        return torch.cat([torch.ones_like(mask[..., :1]), mask[..., 1:]], -1)

    def cut(self, length: int | Tensor) -> Self:
        """Return the same law with the length given.

        Args:
            length: L, from 1 to K, or 0 to leave it random; integers that broadcast to the batch shape.

        Returns:
            A law of the same shape whose lengths have all their mass on one where it is given.

        Raises:
            ValueError: If a length is no integer from 0 to K.

        Example:
            >>> from pyro_vnd.distributions import NestedNormal
            >>> law = NestedNormal(torch.zeros(3), torch.ones(3), torch.zeros(3))
            >>> law.cut(2).keep_probs
            tensor([1., 1., 0.])
        """
        return self._cut_by(Cut.checked(length, self.mask_law, type(self).__name__))

    def _cut_by(self, cut: Cut) -> Self:
        """Return the law cut to lengths that are known to be right."""
        new = copy(self)
        new.mask_law = self.mask_law._cut_by(cut)
        return new

    @property
    def _log_weights(self) -> Tensor:
        return self.mask_law._log_weights

    def _tilt_by(self, price: Tensor, costs: Tensor) -> Self:
        mask_law = self.mask_law._tilt_by(price, costs)
        new = self.expand(mask_law.batch_shape)
        new.mask_law = mask_law
        return new

    @property
    def logits(self) -> NoReturn:
        """Not there: `mask_law` has those of the lengths. Pyro's `LocScaleReparam` asks for them."""
        raise AttributeError(
            f"{type(self).__name__} has no `logits` or `probs`: those of the lengths are in `mask_law`. It cannot be "
            "decentred by LocScaleReparam, which would move dropped coordinates away from zero"
        )

    probs = logits

    def given(self, value: Tensor) -> Any:
        """Return the law that each coordinate has given those before it: this law, if they are independent.

        Args:
            value: Samples, shape (..., K).

        Returns:
            A law whose coordinates are independent.
        """
        return self

    def densities(self, dense: Tensor) -> Tensor:
        """Return the log-density of each uncut coordinate where they are independent.

        Args:
            dense: Uncut coordinates, shape (..., K).

        Returns:
            Shape broadcast(dense.shape, batch_shape + (K,)).
        """
        raise NotImplementedError

    def log_prob(self, value: Tensor) -> Tensor:
        """Return log p_L + sum_{i <= L} log p(x_i), shape broadcast(value.shape[:-1], batch_shape)."""
        if self._validate_args:
            self._validate_sample(value)
        making = recall(value)
        mask, dense = (self.mask_of(value), value) if making is None else making
        # A dropped coordinate counts nothing; a straight-through mask still passes its gradient.
        return self.mask_law.log_prob(mask) + counted(mask, self.densities(dense)).sum(-1)

    def expand(self, batch_shape: _size, _instance: Self | None = None) -> Self:
        """Return the same law with a larger batch shape."""
        new = self._get_checked_instance(type(self), _instance)
        batch_shape = torch.Size(batch_shape)
        check_expandable(self, batch_shape)
        new.mask_law = self.mask_law.expand(batch_shape)
        TorchDistribution.__init__(new, batch_shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def _validate_sample(self, value: Tensor) -> None:
        check_real(f"{type(self).__name__}: argument `value`", value)
        if not isinstance(value, Tensor) or value.shape[-1:] != self.event_shape or not within(value):
            came = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"{type(self).__name__}: argument `value` must be a tensor of finite numbers of shape "
                f"(..., {self.num_units}); got {came}"
            )

    @classmethod
    def infer_shapes(cls, **arg_shapes: Any) -> tuple[torch.Size, torch.Size]:
        """Infer batch and event shape from the shapes of the arguments."""
        arg_shapes.pop("conditioner", None)
        temperature = arg_shapes.pop("temperature", ())
        shape = torch.broadcast_shapes(*arg_shapes.values())
        return torch.broadcast_shapes(shape[:-1], temperature), shape[-1:]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(self.mask_law._facts())})"


class NestedNormal(NestedLaw):
    r"""Diagonal Normal over K ordered coordinates, cut to zero past a random length.

    $$L \sim p, \qquad n_i \sim N(\mu_i, \sigma_i), \qquad x_i = n_i \, 1[i \le L],$$
    $$\log q(x) = \log p_L + \sum_{i \le L} \log N(x_i; \mu_i, \sigma_i),
      \quad L \text{ the last non-zero coordinate},$$
    $$\mathrm{KL}(q \| p) = \mathrm{KL}(L_q \| L_p) + \sum_i S_i \, \mathrm{KL}(N_{q,i} \| N_{p,i}).$$

    One sample site carries the mask and the value: the mixture posterior of the paper. The KL is exact and
    registered, so `TraceMeanField_ELBO` uses it; prefer it to `Trace_ELBO`, whose estimate has more variance.

    - `rsample` returns values with exact zeros; the mask has the straight-through gradient of
      `OrderedMaskStraightThrough`.
    - `log_prob` is exact for every value. A fresh sample remembers the mask and the uncut Normal draw, so that
      Monte Carlo objectives (`Trace_ELBO`, `RenyiELBO`) have the whole gradient with respect to the lengths; a copy
      (clone, reshape) scores the same, but its gradient misses the dropped coordinates.
    - The law has atoms at zero, and no density there: HMC, Pyro's autoguides and its `TransformedDistribution` refuse
      it. `AutoNested` has a part for it. (Torch's own `TransformedDistribution` does not ask, and is wrong.)

    Shapes: loc, scale and lengths broadcast to (..., K); batch_shape (...); event_shape (K,).

    Args:
        loc: Means, floating-point and broadcastable to (..., K), or one number for all.
        scale: Standard deviations, > 0, the same.
        logits: Unnormalised log-weights of the lengths 1..K, shape (..., K).
        probs: Weights of the lengths, in place of `logits`.
        temperature: Temperature of the straight-through mask, > 0.
        noise: Noise of the straight-through mask, "logistic" or "gumbel".
        validate_args: Whether values of parameters and samples are checked.

    Raises:
        ValueError: If a shape or value is invalid.

    Source: Cui et al., arXiv 2101.11353, section 4.1.

    Example:
        >>> import torch
        >>> law = NestedNormal(torch.zeros(3), torch.ones(3), torch.tensor([0.0, 0.0, 0.0]))
        >>> law.keep_probs
        tensor([1.0000, 0.6667, 0.3333])
        >>> law.log_prob(torch.tensor([0.5, 0.0, 0.0]))  # log 1/3 + log N(0.5; 0, 1)
        tensor(-2.1426)
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {
        "loc": constraints.real_vector,
        "scale": constraints.independent(constraints.positive, 1),
        "logits": constraints.real_vector,
        "probs": constraints.independent(constraints.nonnegative, 1),
    }

    def __init__(
        self,
        loc: Tensor | float,
        scale: Tensor | float,
        logits: Tensor | None = None,
        *,
        probs: Tensor | None = None,
        temperature: float | Tensor = 0.2,
        noise: Noise = "logistic",
        validate_args: bool | None = None,
    ) -> None:
        mask_law = mask_law_of("NestedNormal", temperature, probs, logits, noise, validate_args)
        self._fill(_coordinates("loc", loc, mask_law), _coordinates("scale", scale, mask_law), mask_law)

    @classmethod
    def _of(cls, loc: Tensor, scale: Tensor, mask_law: OrderedMask) -> Self:
        """Return the law with the law of a mask that is at hand, cut perhaps; means and deviations are not checked."""
        new = cls.__new__(cls)
        new._fill(loc, scale, mask_law)
        return new

    def _fill(self, loc: Tensor, scale: Tensor, mask_law: OrderedMask) -> None:
        try:
            shape = broadcast_shapes(loc.shape, scale.shape, mask_law.batch_shape + mask_law.event_shape)
        except RuntimeError:
            raise ValueError(
                f"NestedNormal: arguments `loc` {tuple(loc.shape)}, `scale` {tuple(scale.shape)} and lengths "
                f"{tuple(mask_law.batch_shape + mask_law.event_shape)} do not broadcast"
            ) from None
        TorchDistribution.__init__(self, shape[:-1], shape[-1:], validate_args=False)
        self._validate_args = mask_law._validate_args
        self.mask_law = mask_law if mask_law.batch_shape == shape[:-1] else mask_law.expand(shape[:-1])
        # As given, not expanded: a leaf that can be copied.
        self._loc, self._scale = loc, scale

    @property
    def loc(self) -> Tensor:
        """Means of the uncut coordinates, shape batch_shape + (K,)."""
        return self._loc.expand(self.batch_shape + self.event_shape)

    @property
    def scale(self) -> Tensor:
        """Standard deviations of the uncut coordinates, shape batch_shape + (K,)."""
        return self._scale.expand(self.batch_shape + self.event_shape)

    @property
    def normal(self) -> Normal:
        """The uncut Normal of the coordinates."""
        return Normal(self.loc, self.scale, validate_args=False)

    @property
    def mean(self) -> Tensor:
        """Mean of the cut vector, S_i mu_i."""
        return self.keep_probs * self.loc

    @property
    def variance(self) -> Tensor:
        """Variance of each coordinate, S_i sigma_i^2 + S_i (1 - S_i) mu_i^2."""
        return self.keep_probs * self.scale**2 + self.mask_law.variance * self.loc**2

    def entropy(self) -> Tensor:
        """Return H(L) + sum_i S_i H(N_i) in nats, shape batch_shape."""
        return self.mask_law.entropy() + (self.keep_probs * self.normal.entropy()).sum(-1)

    def rsample(self, sample_shape: _size = torch.Size()) -> Tensor:
        """Draw vectors with zeros past a random length, shape sample_shape + batch_shape + (K,)."""
        mask = self.mask_law.rsample(sample_shape)
        # torch.randn works under vmap, unlike the noise of torch's Normal.
        dense = self._loc + self._scale * torch.randn(mask.shape, dtype=self._loc.dtype, device=mask.device)
        return remember(mask * dense, (mask, dense))

    def densities(self, dense: Tensor) -> Tensor:
        """Return the log-density of each uncut coordinate, shape broadcast(dense.shape, batch_shape + (K,))."""
        return self.normal.log_prob(dense)

    def expand(self, batch_shape: _size, _instance: Self | None = None) -> Self:
        """Return the same law with a larger batch shape."""
        new = super().expand(batch_shape, _instance)
        new._loc, new._scale = self._loc, self._scale
        return new


def mask_law_of(
    law: str, temperature: Any, probs: Any, logits: Any, noise: Any, validate_args: Any
) -> OrderedMaskStraightThrough:
    """Return the law of a nested law's mask; errors name the nested law, which was given the arguments."""
    try:
        return OrderedMaskStraightThrough(
            temperature, probs=probs, logits=logits, noise=noise, validate_args=validate_args
        )
    except ValueError as error:
        raise ValueError(str(error).replace("OrderedMaskStraightThrough", law, 1)) from None


def _coordinates(name: str, value: Any, mask_law: OrderedMask) -> Tensor:
    """Return means or deviations, of which a number is one for all coordinates, once they are checked."""
    if isinstance(value, Real) and not isinstance(value, bool):
        with suppress(OverflowError):  # of an integer beyond all floats
            value = torch.as_tensor(float(value), dtype=mask_law._like.dtype, device=mask_law._like.device)
    if mask_law._validate_args:
        check_dense(f"NestedNormal: argument `{name}`", value)
    fits = isinstance(value, Tensor) and (not value.dim() or value.shape[-1] in (1, mask_law.num_units))
    if not fits or not value.is_floating_point():
        came = f"{tuple(value.shape)}, {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"NestedNormal: argument `{name}` must be a number, or a floating-point tensor that broadcasts to "
            f"(..., {mask_law.num_units}), as many coordinates as lengths; got {came}"
        )
    if mask_law._validate_args and not in_range(name, value):
        raise ValueError(
            f"NestedNormal: argument `{name}` of shape {tuple(value.shape)} must be finite"
            f"{' and > 0' if name == 'scale' else ''}; got {got(value)}"
        )
    return value


def in_range(name: str, value: Tensor) -> bool:
    """Say whether means or deviations are finite and deviations positive."""
    return within(value, 0 if name == "scale" else -torch.inf)


def _refuse_to_transform(cls: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise a ValueError where Pyro is about to make a `TransformedDistribution` of a nested law."""
    if TransformedDistribution in cls.__mro__:
        for law in map(innermost, (*args, *kwargs.values())):
            if isinstance(law, NestedLaw):
                raise ValueError(
                    f"{cls.__name__}: a {type(law).__name__} cannot be transformed: its dropped coordinates are "
                    "exactly zero and have no density, so that the Jacobian of all is wrong. Scale `loc` and `scale` "
                    "of the law itself, or transform its draws, "
                    "`pyro.deterministic(name, transform(pyro.sample(...)))`"
                )


COERCIONS.append(_refuse_to_transform)


def innermost(fn: Any) -> Any:
    """Return the law below `to_event`, `mask` and `expand`."""
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return fn


def find_mask(fn: Any) -> OrderedMask | NestedLaw | None:
    """Return the law of a mask below `to_event`, `mask` and `expand`, or None if `fn` is about something else."""
    law = innermost(fn)
    return law if isinstance(law, OrderedMask | NestedLaw) else None
