"""The exact, discrete ordered mask, and laws of masks that are cut to given lengths."""

from typing import Any, ClassVar, Self

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.nn.functional import pad
from torch.types import _size

from pyro_vnd._compat import only_plain_code, remember
from pyro_vnd._sizes import as_integers
from pyro_vnd.distributions._fast.broadcast import broadcast_shapes
from pyro_vnd.distributions._fast.masks import hard_mask
from pyro_vnd.distributions._fast.slopes import log_of_probs
from pyro_vnd.distributions.constraints import binary_ordered_mask, got, tail_difference, tail_sum, within
from pyro_vnd.distributions.derived import derived
from pyro_vnd.distributions.lengths import LengthLaw

__all__ = ["Cut", "CutMask", "OrderedMask", "expectation"]


class Cut:
    """Lengths of a batch of laws, each given or random still.

    Where a length is given there is nothing to draw, to score or to differentiate. All that is done for the laws that
    are random still, and then put among the masks of the others.

    Args:
        length: L, from 1 to K, or 0 where it is random; integers that expand to the batch shape.
        law: The law of the lengths that is cut.

    Attributes:
        length: As above.
        lengths: The same, with the batch shape of the law, and on its device.
        masks: Masks of these lengths, shape batch_shape + (K,).
        rows: Where in the flattened batch a length is random, shape (R,); where torch traces operations all rows, as
            how many these are would depend on values.
    """

    def __init__(self, length: Tensor, law: LengthLaw) -> None:
        self.length, like = length, law._like
        with torch.inference_mode(False):  # parameters may want a gradient of what is taken by these rows
            lengths = length.expand(law.batch_shape)
            self._all_rows = only_plain_code()
            if self._all_rows:
                self.rows = torch.arange(law.batch_shape.numel(), device=like.device)
            else:  # for lengths on the CPU this does not wait for another device
                self.rows = (lengths.reshape(-1) == 0).nonzero().squeeze(-1).to(like.device)
            self.lengths = lengths.to(like.device)
            units = torch.arange(1, law.num_units + 1, device=like.device)
            self.masks = (units <= self.lengths.unsqueeze(-1)).to(like.dtype)

    @classmethod
    def checked(cls, length: int | Tensor, law: LengthLaw, name: str) -> Self:
        """Return the cut of a law to lengths that come from outside.

        Args:
            length: L, from 1 to K, or 0 to leave it random; integers that broadcast to the batch shape.
            law: The law of the lengths.
            name: What the user knows the law by.

        Raises:
            ValueError: If a length is no integer from 0 to K, or they do not fit the batch.
        """
        lengths = as_integers(length)
        if lengths is None or (law._validate_args and not within(lengths, -1, law.num_units + 1)):
            came = repr(length) if lengths is None else f"{got(lengths)}, {lengths.dtype}"
            raise ValueError(
                f"{name}.cut: argument `length` must be integers from 1 to {law.num_units}, or 0 for a random length; "
                f"got {came}"
            )
        lengths = lengths.to(law._like.device)
        try:
            return cls(lengths, law)
        except RuntimeError:
            raise ValueError(
                f"{name}.cut: argument `length` of shape {tuple(lengths.shape)} cannot be expanded to the batch shape "
                f"{tuple(law.batch_shape)}"
            ) from None

    @property
    def partial(self) -> Tensor:
        """Where in the flattened batch a unit may be dropped: the length is random, or given and less than K."""
        lengths = self.length.expand(self.lengths.shape).reshape(-1)
        return (lengths != self.masks.shape[-1]).nonzero().squeeze(-1).to(self.masks.device)

    def take(self, x: Tensor) -> Tensor:
        """Return what belongs to the laws that are random, shape (..., R, n), of shape (...) + batch_shape + (n,)."""
        leading = x.shape[: x.dim() - self.lengths.dim() - 1]
        return x.reshape((*leading, self.lengths.numel(), x.shape[-1])).index_select(len(leading), self.rows)

    def put(self, random: Tensor, given: Tensor) -> Tensor:
        """Put what belongs to the laws that are random among what belongs to the others.

        Args:
            random: Shape (..., R, n).
            given: Shape batch_shape + (n,); what it has in the places of the random ones counts nothing.

        Returns:
            Shape (...) + batch_shape + (n,).
        """
        if self._all_rows:
            random = torch.where(self.lengths.reshape(-1, 1) == 0, random, given.reshape(-1, given.shape[-1]))
        elif random.dim() == given.dim() == 2:
            return given.index_copy(0, self.rows, random)
        leading, flat = random.shape[:-2], given.reshape(-1, given.shape[-1])
        put = flat.expand(leading + flat.shape).index_copy(len(leading), self.rows, random)
        return put.reshape(leading + given.shape)

    def are_those_of(self, other: "Cut") -> bool:
        """Say whether another law is cut by the very same tensor, as those of a guide and a model are in a fit."""
        return other.length is self.length and other.lengths.shape == self.lengths.shape


class OrderedMask(LengthLaw):
    r"""Distribution over masks that keep a random prefix of K ordered units and drop the tail.

    With $P(L = k) = p_k$, a sample is $z_i = 1[i \le L]$; its first unit is always one, and

    $$E z_i = S_i = \sum_{j \ge i} p_j, \qquad
      \mathrm{Cov}(z_i, z_j) = S_{\max(i,j)} - S_i S_j, \qquad
      \log P(z) = \sum_k (z_k - z_{k+1}) \log p_k.$$

    Samples are exact (to the 2^-24 steps of a float32 uniform) and carry no gradient: use this class as a prior, as
    an enumerated site (`infer={"enumerate": "parallel"}`, NUTS) or with a score-function estimator. `log_prob` is
    linear in the mask, so that it passes the right gradient to a mask drawn from `OrderedMaskStraightThrough`.

    Shapes: parameters (..., K); batch_shape (...); event_shape (K,).

    Args:
        probs: Non-negative weights of the lengths 1..K, shape (..., K), normalised over the last dimension; zeros
            are allowed.
        logits: Unnormalised log-weights of the lengths, shape (..., K), finite.
        validate_args: Whether values of parameters and samples are checked.

    Raises:
        ValueError: If not exactly one of `probs` and `logits` is given, or a shape or value is invalid.

    Source: Cui et al., "Variational Nested Dropout", arXiv 2101.11353, section 3.

    Example:
        >>> import torch
        >>> mask = OrderedMask(probs=torch.tensor([0.1, 0.2, 0.3, 0.4]))
        >>> mask.keep_probs
        tensor([1.0000, 0.9000, 0.7000, 0.4000])
        >>> mask.log_prob(torch.tensor([1.0, 1.0, 0.0, 0.0])).exp()
        tensor(0.2000)
        >>> mask.sample((1000,)).mean(0)[0]
        tensor(1.)
    """

    support = binary_ordered_mask
    has_enumerate_support = True

    def __init__(
        self, *, probs: Tensor | None = None, logits: Tensor | None = None, validate_args: bool | None = None
    ) -> None:
        super().__init__(probs, logits, validate_args=validate_args)

    def _uniform(self, sample_shape: _size) -> Tensor:
        """Draw one uniform number a mask, with a last dimension of one."""
        shape = (*self._extended_shape(sample_shape)[:-1], 1)
        return torch.rand(shape, dtype=self._like.dtype, device=self._like.device)

    def sample(self, sample_shape: _size = torch.Size()) -> Tensor:
        """Draw masks of zeros and ones, shape sample_shape + batch_shape + (K,)."""
        with torch.no_grad():
            return self._hard_masks(self._uniform(sample_shape))

    def _hard_masks(self, uniform: Tensor) -> Tensor:
        return hard_mask(tail_sum(self._probs), uniform)

    def cut(self, length: int | Tensor) -> "CutMask":
        """Return the same law with the length given.

        Args:
            length: L, from 1 to K, or 0 to leave it random; integers that broadcast to the batch shape.

        Returns:
            A law of the same shape whose lengths have all their mass on one where it is given.

        Raises:
            ValueError: If a length is no integer from 0 to K.

        Example:
            >>> OrderedMask.uniform(3).cut(2).keep_probs
            tensor([1., 1., 0.])
        """
        return self._cut_by(Cut.checked(length, self, type(self).__name__))

    def _cut_by(self, cut: Cut) -> "CutMask":
        """Return the law cut to lengths that are known to be right."""
        return CutMask(self, cut)

    def _rows(self, rows: Tensor) -> Self:
        """Return the laws in some places of the flattened batch, of batch shape (R,) as `rows`."""

        def take(x: Tensor, event_shape: torch.Size) -> Tensor:
            return x.expand(self.batch_shape + event_shape).reshape(-1, *event_shape).index_select(0, rows)

        param = self._param if self._param.dim() == 1 else take(self._param, self.event_shape)
        new = self._with(param, rows.shape)
        if self._has_temperature and isinstance(self.temperature, Tensor) and self.temperature.dim():
            new.temperature = take(self.temperature, torch.Size())
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-probability of masks, shape broadcast(value.shape[:-1], batch_shape).

        A sum over the one-hot length, linear in `value`: exact for hard masks, with the gradient that a
        straight-through sample needs. A length of probability zero gives -inf.
        """
        if self._validate_args:
            self._validate_sample(value)
        one_hot, log_probs = tail_difference(value.to(self._log_probs.dtype)), self._log_probs
        if not self._may_have_zeros:
            result = (one_hot * log_probs).sum(-1)
        else:
            # 0 * -inf is nan: sum over the possible lengths, then say which masks were impossible.
            impossible = log_probs == -torch.inf
            result = (one_hot * log_probs.masked_fill(impossible, 0)).sum(-1)
            result = result.masked_fill((one_hot.detach() * impossible).sum(-1) > 0, -torch.inf)
        return result.expand(broadcast_shapes(result.shape, self.batch_shape))

    def entropy(self) -> Tensor:
        """Return the entropy of the kept length in nats, shape batch_shape."""
        return -expectation(self._probs, self._log_probs).expand(self.batch_shape)

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """Return all K masks, shape (K,) + batch_shape + (K,), or with ones for batch_shape if not `expand`."""
        k = self.num_units
        masks = torch.ones(k, k, dtype=self._like.dtype, device=self._like.device).tril()
        masks = masks.reshape((k,) + (1,) * len(self.batch_shape) + (k,))
        return masks.expand((k, *self.batch_shape, k)) if expand else masks

    @property
    def mean(self) -> Tensor:
        """Mean of the mask, which is the keep probability of each unit."""
        return self.keep_probs

    @property
    def variance(self) -> Tensor:
        """Variance of each entry, S_i (1 - S_i), with 1 - S_i summed from below rather than subtracted."""
        return self._full(self._keep_probs * pad(self._probs[..., :-1], (1, 0)).cumsum(-1))

    @property
    def covariance_matrix(self) -> Tensor:
        """Covariance of the entries, S_max(i,j) - S_i S_j, shape batch_shape + (K, K)."""
        rows, columns = self.keep_probs.unsqueeze(-1), self.keep_probs.unsqueeze(-2)
        return torch.minimum(rows, columns) - rows * columns

    @property
    def mode(self) -> Tensor:
        """The most probable mask, shape batch_shape + (K,)."""
        units = torch.arange(self.num_units, device=self._like.device)
        return self._full((units <= self._log_probs.argmax(-1, keepdim=True)).to(self._like.dtype))


class CutMask(OrderedMask):
    """Law of masks, of which some have their length given: what `OrderedMask.cut` returns.

    Whatever is drawn, scored or differentiated, is so for the laws that are random still alone, by the law that is
    cut; the others have one mask each, of probability one, and no gradient.

    Args:
        base: The law that is cut.
        given: Where its lengths are given.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    _is_logits = False
    _may_have_zeros = True

    base: Any

    def __init__(self, base: OrderedMask, given: Cut) -> None:
        self.base, self.given = base, given
        TorchDistribution.__init__(self, base.batch_shape, base.event_shape, validate_args=False)
        self._validate_args = base._validate_args

    @property
    def _derived_from(self) -> tuple[Tensor, ...]:
        return tuple(self.base._derived_from)

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        """Whether samples carry gradients: as in the base."""
        return self.base.has_rsample

    @property
    def has_enumerate_support(self) -> bool:  # type: ignore[override]
        """Whether all K masks can be enumerated: as in the base."""
        return self.base.has_enumerate_support

    @property
    def temperature(self) -> Any:
        """Temperature of the base, if it has one."""
        return self.base.temperature

    @property
    def noise(self) -> Any:
        """Noise of the base, if it is straight-through."""
        return self.base.noise

    @derived
    def random(self) -> Any:
        """The laws that are random still, batch shape (R,)."""
        return self.base._rows(self.given.rows)

    @derived
    def _probs(self) -> Tensor:
        return self.given.put(self.random.probs, tail_difference(self.given.masks))

    @derived
    def _log_probs(self) -> Tensor:
        return self.given.put(self.random.logits, log_of_probs(tail_difference(self.given.masks)))

    @derived
    def _keep_probs(self) -> Tensor:
        return self.given.put(self.random.keep_probs, self.given.masks)

    @property
    def _like(self) -> Tensor:
        return self.given.masks

    def rsample(self, sample_shape: _size = torch.Size()) -> Tensor:
        """Draw masks of zeros and ones as the base does, shape sample_shape + batch_shape + (K,)."""
        if not self.has_rsample:
            raise NotImplementedError(f"{type(self.base).__name__} has no reparameterised samples")
        # Noise is drawn for all, so that random numbers are the same whatever is cut.
        masks = self._masks(self._noise(sample_shape))
        return masks if sample_shape else remember(masks, self.given)

    def _noise(self, sample_shape: _size) -> Tensor:
        return self.base._noise(sample_shape)

    def _masks(self, noise: Tensor) -> Tensor:
        return self.given.put(self.random._masks(self.given.take(noise)), self.given.masks)

    def _hard_masks(self, uniform: Tensor) -> Tensor:
        return self.given.put(self.random._hard_masks(self.given.take(uniform)), self.given.masks)

    def _rows(self, rows: Tensor) -> "CutMask":
        base = self.base._rows(rows)
        return CutMask(base, Cut(self.given.lengths.reshape(-1).index_select(0, rows), base))

    def _tilt_by(self, price: Tensor, costs: Tensor) -> "CutMask":
        base = self.base._tilt_by(price, costs)
        return CutMask(base, Cut(self.given.length, base))

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """Return all K masks as the base does; those of other lengths than the given ones have probability zero."""
        return self.base.enumerate_support(expand)

    def expand(self, batch_shape: _size, _instance: Any = None) -> "CutMask":
        """Return the same law with a larger batch shape; parameters are shared, not copied."""
        base = self.base.expand(batch_shape)
        return CutMask(base, Cut(self.given.length, base))

    @classmethod
    def infer_shapes(cls, **arg_shapes: Any) -> tuple[torch.Size, torch.Size]:
        """Refuse: the shape of the law belongs to the base, which is no tensor."""
        raise NotImplementedError("CutMask has a distribution as argument, whose shapes cannot be inferred")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({type(self.base).__name__}, {', '.join(self._facts())})"

    def _facts(self) -> list[str]:
        count = self.given.lengths.numel()
        return [*super()._facts(), f"{count - len(self.given.rows)} of {count} cut"]


def expectation(probs: Tensor, values: Tensor) -> Tensor:
    """Average `values` under `probs`; lengths of probability zero count nothing."""
    return (probs * values.masked_fill(probs == 0, 0)).sum(-1)
