"""The law of the kept length: parameters, temperatures, normalisation and keep probabilities shared by every mask."""

import sys
from collections.abc import Callable
from contextlib import suppress
from numbers import Real
from operator import index
from typing import Any, ClassVar, Self

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import Distribution, constraints
from torch.nn.functional import logsigmoid, pad
from torch.types import _size

from pyro_vnd._compat import all_true
from pyro_vnd._sizes import is_truth, is_within
from pyro_vnd.distributions._fast.broadcast import broadcast_shapes
from pyro_vnd.distributions._fast.slopes import finite_slope, log_of_probs
from pyro_vnd.distributions.constraints import (
    check_dense,
    check_expandable,
    check_real,
    check_switch,
    got,
    tail_sum,
    within,
)
from pyro_vnd.distributions.derived import KeepsDerived, derived
from pyro_vnd.distributions.tilt import Tiltable, tilted_logits

__all__ = ["LengthLaw", "batch_facts", "gumbel_like", "span"]

_HALF_PRECISION = (torch.bfloat16, torch.float16)  # too coarse for sums of thousands of probabilities


class LengthLaw(Tiltable, KeepsDerived, TorchDistribution):
    r"""Base of the distributions over masks that keep a random prefix of K ordered units.

    The length L takes the values 1..K with $P(L = k) = p_k$; unit i is kept with probability
    $S_i = P(L \ge i) = \sum_{j \ge i} p_j$.

    Args:
        probs: Non-negative weights of the lengths, shape (..., K); normalised over the last dimension.
        logits: Unnormalised log-weights of the lengths, shape (..., K).
        temperature: Of a class that has one, > 0; a number or a tensor that broadcasts to the batch shape.
        validate_args: Whether values of parameters and samples are checked.

    Raises:
        ValueError: If not exactly one of `probs` and `logits` is given, or its shape or values are invalid.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {
        "probs": constraints.independent(constraints.nonnegative, 1),
        "logits": constraints.real_vector,
    }
    support: ClassVar[constraints.Constraint]
    _has_temperature: ClassVar[bool] = False

    temperature: Any
    _param: Tensor
    _is_logits: bool
    _may_have_zeros: bool  # whether a length may be impossible, and its log-probability -inf

    def __init__(
        self,
        probs: Tensor | None = None,
        logits: Tensor | None = None,
        temperature: float | Tensor | None = None,
        *,
        validate_args: bool | None = None,
    ) -> None:
        if (probs is None) == (logits is None):
            count = "both" if logits is not None else "none"
            raise ValueError(f"{type(self).__name__}: give exactly one of `probs` and `logits`; got {count}")
        check_switch(type(self).__name__, validate_args)
        self._is_logits, self._may_have_zeros = probs is None, probs is not None
        if validate_args is None:
            validate_args = type(self)._validate_args
        given = logits if probs is None else probs
        if validate_args:
            check_dense(f"{type(self).__name__}: argument `{self._param_name}`", given)
        param = self._check_shape(given)
        self._param = param.float() if param.dtype in _HALF_PRECISION else param
        if validate_args:
            self._check_values(self._param)
        batch_shape = self._param.shape[:-1]
        if self._has_temperature:
            self.temperature, batch_shape = self._check_temperature(temperature, batch_shape, validate_args)
        super().__init__(batch_shape, self._param.shape[-1:], validate_args=False)
        self._validate_args = validate_args

    @property
    def _param_name(self) -> str:
        return "logits" if self._is_logits else "probs"

    def _check_shape(self, param: Any) -> Tensor:
        if not isinstance(param, Tensor):
            raise ValueError(
                f"{type(self).__name__}: argument `{self._param_name}` must be a tensor of shape (..., num_units); "
                f"got {type(param).__name__}"
            )
        if param.dim() == 0 or param.shape[-1] == 0 or not param.dtype.is_floating_point:
            raise ValueError(
                f"{type(self).__name__}: argument `{self._param_name}` must be a floating-point tensor of shape "
                f"(..., num_units) with num_units >= 1; got shape {tuple(param.shape)}, {param.dtype}"
            )
        return param

    def _check_values(self, param: Tensor) -> None:
        expected = None
        if not within(param):
            expected = "finite values" + (" (use `probs` for lengths of probability zero)" if self._is_logits else "")
        elif not self._is_logits and not all_true((param >= 0).all(-1) & (param > 0).any(-1)):
            expected = "values >= 0, at least one positive along the last dimension"
        if expected is not None:
            raise ValueError(
                f"{type(self).__name__}: argument `{self._param_name}` of shape {tuple(param.shape)} must have "
                f"{expected}; got {got(param)}"
            )

    def _check_temperature(
        self, temperature: Any, batch_shape: torch.Size, validate_args: bool
    ) -> tuple[float | Tensor, torch.Size]:
        """Return a temperature, a tensor with dtype and device of the parameters, and the batch shape of the two."""
        name = f"{type(self).__name__}: argument `temperature`"
        if not isinstance(temperature, Tensor):
            if not is_within(temperature, above=0):
                raise ValueError(f"{name} must be a positive, finite number or tensor; got {temperature!r}")
            return float(temperature), batch_shape
        if validate_args:
            check_real(name, temperature)
        value = temperature.to(self._param)
        if validate_args and not within(value, 0):
            raise ValueError(f"{name} of shape {tuple(value.shape)} must be positive and finite; got {got(value)}")
        try:
            return value, broadcast_shapes(value.shape, batch_shape)
        except RuntimeError:
            raise ValueError(
                f"{name} of shape {tuple(value.shape)} must broadcast with the batch shape {tuple(batch_shape)} of "
                "the parameters"
            ) from None

    @property
    def _derived_from(self) -> tuple[Tensor, ...]:
        return (self._param,)

    # Parameters, and what is derived from them, keep their own, possibly smaller shape: a law shared by a plate is
    # normalised and differentiated once, not once a row. The public properties show them at the full batch shape.

    @derived
    def _probs(self) -> Tensor:
        if self._is_logits:
            return self._param.softmax(-1)
        weights, _ = self._scaled_weights()
        return weights / weights.sum(-1, keepdim=True)

    @derived
    def _log_probs(self) -> Tensor:
        if self._is_logits:
            return self._param.log_softmax(-1)
        weights, scale = self._scaled_weights()
        # One that is too small beside the largest to be a normal number keeps its digits if its logarithm comes first.
        is_small = weights < torch.finfo(weights.dtype).tiny
        small = log_of_probs(self._param.where(is_small, 1)) - scale.log()
        logs = small.where(is_small, log_of_probs(weights.masked_fill(is_small, 1)))
        return logs - weights.sum(-1, keepdim=True).log()

    def _scaled_weights(self) -> tuple[Tensor, Tensor]:
        """Return weights of which the largest is one, as a sum of large ones may overflow, and what it was."""
        scale = self._param.detach().amax(-1, keepdim=True)
        return finite_slope(self._param) / scale, scale

    @derived
    def _keep_probs(self) -> Tensor:
        keep_probs = tail_sum(self._probs)
        # Rounding may leave some a hair above one, where a clamp has no gradient.
        return keep_probs + (keep_probs.clamp(max=1) - keep_probs).detach()

    @property
    def _like(self) -> Tensor:
        """A tensor with the dtype and device of masks, that is at hand."""
        return self._param

    def _full(self, x: Tensor) -> Tensor:
        return x.expand(self.batch_shape + x.shape[-1:])

    @property
    def probs(self) -> Tensor:
        """Probabilities of the lengths 1..K, shape batch_shape + (K,)."""
        return self._full(self._probs)

    @property
    def logits(self) -> Tensor:
        """Normalised log-probabilities of the lengths 1..K, shape batch_shape + (K,)."""
        return self._full(self._log_probs)

    @property
    def length_probs(self) -> Tensor:
        """Probabilities of the lengths 1..K: another name of `probs`."""
        return self.probs

    @property
    def keep_probs(self) -> Tensor:
        """Probability that each unit is kept, S_i = P(L >= i), shape batch_shape + (K,)."""
        return self._full(self._keep_probs)

    @property
    def mean_length(self) -> Tensor:
        """Expected kept length in units, E L = sum_i S_i, shape batch_shape."""
        return self.keep_probs.sum(-1)

    @property
    def stddev_length(self) -> Tensor:
        """Standard deviation of the kept length in units, shape batch_shape."""
        lengths = torch.arange(1, self.num_units + 1, dtype=self._like.dtype, device=self._like.device)
        variance = (self.probs * (lengths - self.mean_length.unsqueeze(-1)) ** 2).sum(-1)
        return variance.clamp_min(torch.finfo(variance.dtype).tiny).sqrt()  # the root has no slope at zero

    @property
    def num_units(self) -> int:
        """Number of ordered units, K."""
        return self.event_shape[-1]

    def expand(self, batch_shape: _size, _instance: Self | None = None) -> Self:
        """Return the same law with a larger batch shape; parameters are shared, not copied."""
        batch_shape = torch.Size(batch_shape)
        check_expandable(self, batch_shape)
        new = self._with(self._param, batch_shape, _instance)
        new._share_derived(self)
        return new

    def _with(self, param: Tensor, batch_shape: torch.Size, _instance: Self | None = None) -> Self:
        """Return a law that differs in its parameter and batch shape alone; the new parameter is not checked."""
        new = self._get_checked_instance(type(self), _instance)
        new._param, new._is_logits, new._may_have_zeros = param, self._is_logits, self._may_have_zeros
        if self._has_temperature:
            new.temperature = self.temperature
        TorchDistribution.__init__(new, batch_shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def _log_weights(self) -> Tensor:
        return self._param if self._is_logits else self._log_probs

    def _tilt_by(self, price: Tensor, costs: Tensor) -> Self:
        logits = tilted_logits(self._log_weights, price, costs)
        new = self._with(logits, broadcast_shapes(self.batch_shape, logits.shape[:-1]))
        new._is_logits = True  # also where a length may be impossible: probabilities would underflow
        return new

    @classmethod
    def infer_shapes(cls, **arg_shapes: torch.Size) -> tuple[torch.Size, torch.Size]:
        """Infer batch and event shape from the shapes of the arguments."""
        shape = arg_shapes["probs"] if arg_shapes.get("probs") is not None else arg_shapes["logits"]
        batch_shape = torch.broadcast_shapes(shape[:-1], arg_shapes.get("temperature", ()))
        return torch.Size(batch_shape), torch.Size(shape[-1:])

    def _validate_sample(self, value: Tensor) -> None:
        name = type(self).__name__
        if not isinstance(value, Tensor):
            raise ValueError(f"{name}: argument `value` must be a tensor; got {type(value).__name__}")
        if not (self.support.is_discrete and value.dtype == torch.bool):
            check_real(f"{name}: argument `value`", value)
        if value.shape[-1:] != self.event_shape:
            raise ValueError(
                f"{name}: argument `value` must have shape (..., {self.num_units}), one entry a unit; "
                f"got {tuple(value.shape)}"
            )
        try:
            broadcast_shapes(value.shape[:-1], self.batch_shape)
        except RuntimeError:
            raise ValueError(
                f"{name}: argument `value` of shape {tuple(value.shape)} does not broadcast with batch shape "
                f"{tuple(self.batch_shape)}"
            ) from None
        valid = self.support.check(value)
        if not all_true(valid):
            example = "others"
            with suppress(RuntimeError):
                wrong = value.reshape(-1, self.num_units)[~valid.reshape(-1)]
                example = f"for example, {wrong[0].tolist()[:8]}"
            raise ValueError(
                f"{name}: argument `value` of shape {tuple(value.shape)} must be masks 1 = z_1 >= ... >= z_K >= 0"
                f"{' of zeros and ones' if self.support.is_discrete else ''}; got {example}"
            )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(self._facts())})"

    def _facts(self) -> list[str]:
        """Return what one wants to know of the law, for its repr."""
        facts = [*batch_facts(self), f"K = {self.num_units}"]
        facts += span("mean length", lambda: self.mean_length, ".1f")
        facts += span("mode", lambda: self._log_probs.argmax(-1) + 1, "d")
        return facts + (span("temperature", lambda: self.temperature) if self._has_temperature else [])

    @classmethod
    def from_chain_logits(cls, chain_logits: Tensor, **kwargs: Any) -> Self:
        r"""Build the law from the Bernoulli chain $\beta_i = P(z_{i+1} = 1 \mid z_i = 1) = \sigma(a_i)$.

        $$\log p_k = \sum_{j<k} \log\sigma(a_j) + \log\sigma(-a_k), \quad\text{without the last term at } k = K.$$

        Args:
            chain_logits: The logits a of the chain, shape (..., K - 1).
            **kwargs: Further arguments of the class, such as `temperature`.

        Returns:
            The law over K units.

        Source: Cui et al., arXiv 2101.11353, equations 4 and 5.

        Example:
            >>> import torch
            >>> from pyro_vnd.distributions import OrderedMask
            >>> OrderedMask.from_chain_logits(torch.zeros(3)).probs
            tensor([0.5000, 0.2500, 0.1250, 0.1250])
        """
        name = f"{cls.__name__}: argument `chain_logits`"
        if not isinstance(chain_logits, Tensor):
            raise ValueError(
                f"{name} must be a tensor of shape (..., num_units - 1); got {type(chain_logits).__name__}"
            )
        check_real(name, chain_logits)
        if chain_logits.dim() == 0 or not chain_logits.is_floating_point():
            raise ValueError(
                f"{name} must be a floating-point tensor of shape (..., num_units - 1); "
                f"got shape {tuple(chain_logits.shape)}, {chain_logits.dtype}"
            )
        check_switch(cls.__name__, validate_args := kwargs.get("validate_args"))
        if (cls._validate_args if validate_args is None else validate_args) and not within(chain_logits):
            raise ValueError(f"{name} of shape {tuple(chain_logits.shape)} must have finite values; got NaN or inf")
        if chain_logits.dtype in _HALF_PRECISION:
            chain_logits = chain_logits.float()
        go_on = pad(logsigmoid(chain_logits).cumsum(-1), (1, 0))
        stop = pad(logsigmoid(-chain_logits), (0, 1))
        return cls(logits=go_on + stop, **kwargs)

    @classmethod
    def geometric(cls, p: float | Tensor, num_units: int, **kwargs: Any) -> Self:
        r"""Build the truncated geometric law of nested dropout, $p_k \propto p^{k-1} (1 - p)$ with its tail at K.

        Args:
            p: Probability to keep the next unit given this one, strictly between 0 and 1; a number or a tensor of
                any batch shape.
            num_units: Number of units, K >= 1.
            **kwargs: Further arguments of the class, such as `temperature`.

        Returns:
            The law over K units, with batch shape that of `p`.

        Source: Rippel, Gelbart and Adams, "Learning Ordered Representations with Nested Dropout", ICML 2014.

        Example:
            >>> from pyro_vnd.distributions import OrderedMask
            >>> OrderedMask.geometric(0.5, 3).probs
            tensor([0.5000, 0.2500, 0.2500])
        """
        num_units = positive_int(cls, num_units)
        name = f"{cls.__name__}: argument `p`"
        if not isinstance(p, Real | Tensor) or isinstance(p, bool):
            raise ValueError(f"{name} must be a number or a tensor; got {type(p).__name__}")
        if not isinstance(p, Tensor) and not is_within(p, 0, 1):
            raise ValueError(f"{name} must be strictly between 0 and 1; got {p}")
        check_real(name, p)
        keep = p if isinstance(p, Tensor) else torch.tensor(p, dtype=torch.float64)
        if not within(keep, 0, 1):
            raise ValueError(f"{name} must be strictly between 0 and 1; got {got(p) if isinstance(p, Tensor) else p}")
        # The logit first: near one a number has more digits than what becomes of it.
        chain = torch.logit(keep.float() if keep.dtype in _HALF_PRECISION else keep)
        chain = chain if isinstance(p, Tensor) else chain.to(torch.get_default_dtype())
        return cls.from_chain_logits(chain.unsqueeze(-1).expand(*chain.shape, num_units - 1), **kwargs)

    @classmethod
    def uniform(
        cls,
        num_units: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        **kwargs: Any,
    ) -> Self:
        """Build the law in which the lengths 1..K are equally likely.

        Args:
            num_units: Number of units, K >= 1.
            dtype: Floating-point type of the parameters.
            device: Device of the parameters.
            **kwargs: Further arguments of the class, such as `temperature`.

        Returns:
            The law over K units.

        Example:
            >>> from pyro_vnd.distributions import OrderedMask
            >>> OrderedMask.uniform(4).keep_probs
            tensor([1.0000, 0.7500, 0.5000, 0.2500])
        """
        return cls(logits=torch.zeros(positive_int(cls, num_units), dtype=dtype, device=device), **kwargs)


def positive_int(cls: type, num_units: int) -> int:
    """Return a number of units, of Python or numpy, as an `int`."""
    with suppress(TypeError):
        if not is_truth(num_units) and 1 <= index(num_units) <= sys.maxsize:
            return index(num_units)
    raise ValueError(f"{cls.__name__}: argument `num_units` must be an integer >= 1; got {num_units!r}")


def batch_facts(law: Distribution) -> list[str]:
    """Return the batch shape of a law for its repr, if it has one."""
    return [f"batch {tuple(law.batch_shape)}"] if law.batch_shape else []


def span(name: str, compute: Callable[[], Any], digits: str = ".4g") -> list[str]:
    """Return a name with a number, or the smallest and largest of several, for a repr.

    Args:
        name: Of the numbers.
        compute: Returns a number or a tensor.
        digits: Format of the numbers.

    Returns:
        One text, or none where there are no numbers to be had: of empty batches, on the meta device, under `vmap`.
    """
    with suppress(RuntimeError), torch.no_grad():
        low, high = (format(bound.item(), digits) for bound in torch.as_tensor(compute()).aminmax())
        return [f"{name} {low}" if low == high else f"{name} {low} to {high}"]
    return []


def gumbel_like(param: Tensor, shape: torch.Size) -> Tensor:
    """Draw standard Gumbel noise of a shape, with the dtype and device of a parameter."""
    uniform = torch.rand(shape, dtype=param.dtype, device=param.device)  # works under vmap, unlike exponential_
    exponential = -torch.log1p(-uniform)
    return -exponential.clamp_min(torch.finfo(param.dtype).tiny).log()
