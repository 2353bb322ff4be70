"""The exact, discrete ordered mask, and the same cut to given lengths."""

from copy import copy
from typing import ClassVar, Self

import torch
from torch import Tensor
from torch.distributions.utils import lazy_property
from torch.nn.functional import pad
from torch.types import _size

from pyro_vnd.distributions._fast.logistic_mask import hard_mask
from pyro_vnd.distributions._fast.shapes import broadcast_shapes
from pyro_vnd.distributions.constraints import binary_ordered_mask, tail_difference, tail_sum
from pyro_vnd.distributions.lengths import LengthLaw

__all__ = ["Cut", "OrderedMask", "expectation"]


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
        rows: Where in the flattened batch a length is random, shape (R,).
    """

    def __init__(self, length: Tensor, law: LengthLaw) -> None:
        self.length, param = length, law._param
        lengths = length.expand(law.batch_shape)
        # For lengths on the CPU this does not wait for another device.
        self.rows = (lengths.reshape(-1) == 0).nonzero().squeeze(-1).to(param.device)
        self.lengths = lengths.to(param.device)
        units = torch.arange(1, law.num_units + 1, device=param.device)
        self.masks = (units <= self.lengths.unsqueeze(-1)).to(param.dtype)

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
        lengths = torch.as_tensor(length, device=law._param.device)
        whole = not lengths.is_floating_point() and lengths.dtype != torch.bool
        if not whole or (law._validate_args and not ((lengths >= 0) & (lengths <= law.num_units)).all()):
            raise ValueError(
                f"{name}.cut: argument `length` must be integers from 1 to {law.num_units}, or 0 for a random length; "
                f"got {lengths.tolist()}"
            )
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
        return x.reshape((*leading, -1, x.shape[-1])).index_select(len(leading), self.rows)

    def put(self, random: Tensor, given: Tensor) -> Tensor:
        """Put what belongs to the laws that are random among what belongs to the others.

        Args:
            random: Shape (..., R, n).
            given: Shape batch_shape + (n,); what it has in the places of the random ones counts nothing.

        Returns:
            Shape (...) + batch_shape + (n,).
        """
        if random.dim() == given.dim() == 2:
            return given.index_copy(0, self.rows, random)
        leading, flat = random.shape[:-2], given.reshape(-1, given.shape[-1])
        put = flat.expand(leading + flat.shape).index_copy(len(leading), self.rows, random)
        return put.reshape(leading + given.shape)

    def is_that_of(self, other: "Cut | None") -> bool:
        """Say whether another law is cut by the very same tensor, as those of a guide and a model are in a fit."""
        if other is None or other is self:
            return other is self
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
    _derived: ClassVar[tuple[str, ...]] = (*LengthLaw._derived, "variance", "_random")
    _uncut: Self | None = None  # of a law that was cut, what it was before, and where it was cut
    _cut: Cut | None = None

    def __init__(
        self, *, probs: Tensor | None = None, logits: Tensor | None = None, validate_args: bool | None = None
    ) -> None:
        super().__init__(probs, logits, validate_args=validate_args)

    def _uniform(self, sample_shape: _size) -> Tensor:
        """Draw one uniform number a mask, with a last dimension of one."""
        shape = (*self._extended_shape(sample_shape)[:-1], 1)
        return torch.rand(shape, dtype=self._like.dtype, device=self._like.device)

    @property
    def _like(self) -> Tensor:
        """A tensor with the dtype and device of masks, that is at hand."""
        return self._param if self._cut is None else self._cut.masks

    def sample(self, sample_shape: _size = torch.Size()) -> Tensor:
        """Draw masks of zeros and ones, shape sample_shape + batch_shape + (K,)."""
        with torch.no_grad():
            return hard_mask(tail_sum(self._probs), self._uniform(sample_shape))

    def cut(self, length: int | Tensor) -> Self:
        """Return the same law with the length given.

        Args:
            length: L, from 1 to K, or 0 to leave it random; integers that broadcast to the batch shape.

        Returns:
            A law of the same class and shape whose lengths have all their mass on one where it is given.

        Raises:
            ValueError: If a length is no integer from 0 to K.

        Example:
            >>> OrderedMask.uniform(3).cut(2).keep_probs
            tensor([1., 1., 0.])
        """
        return self._cut_by(Cut.checked(length, self, type(self).__name__))

    def _cut_by(self, cut: Cut) -> Self:
        """Return the law cut to lengths that are known to be right."""
        new = copy(self)
        new.__dict__.pop("_param", None)
        new._param_name, new._uncut, new._cut = "probs", self, cut
        return new

    def _at(self, rows: Tensor) -> Self:
        """Return the laws in some places of the flattened batch, shape (R,): of batch shape (R,)."""
        new = copy(self)
        new._uncut = new._cut = None
        new._param, new._batch_shape = self._param, rows.shape
        if self._param.dim() > 1:
            new._param = self._full(self._param).reshape(-1, self.num_units).index_select(0, rows)
        return new

    @lazy_property
    def _random(self) -> Self:
        """Of a law that was cut, those of its batch whose length is random still, batch shape (R,)."""
        assert self._uncut is not None
        assert self._cut is not None
        return self._uncut._at(self._cut.rows)

    # A law that is not cut has its parameters in place of the first of these, and no use for the others.

    @lazy_property
    def _param(self) -> Tensor:
        return self._probs

    @lazy_property
    def _probs(self) -> Tensor:
        if self._cut is None:
            return super()._probs
        return self._cut.put(self._random.probs, tail_difference(self._cut.masks))

    @lazy_property
    def keep_probs(self) -> Tensor:
        """Probability that each unit is kept, S_i = P(L >= i), shape batch_shape + (K,)."""
        if self._cut is None:
            return super().keep_probs
        return self._cut.put(self._random.keep_probs, self._cut.masks)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-probability of masks, shape broadcast(value.shape[:-1], batch_shape).

        A sum over the one-hot length, linear in `value`: exact for hard masks, with the gradient that a
        straight-through sample needs. A length of probability zero gives -inf.
        """
        if self._validate_args:
            self._validate_sample(value)
        one_hot, log_probs = tail_difference(value.to(self._log_probs.dtype)), self._log_probs
        if self._is_logits:
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
        masks = torch.ones(k, k, dtype=self._param.dtype, device=self._param.device).tril()
        masks = masks.reshape((k,) + (1,) * len(self.batch_shape) + (k,))
        return masks.expand((k, *self.batch_shape, k)) if expand else masks

    @property
    def mean(self) -> Tensor:
        """Mean of the mask, which is the keep probability of each unit."""
        return self.keep_probs

    @lazy_property
    def variance(self) -> Tensor:
        """Variance of each entry, S_i (1 - S_i), with 1 - S_i summed from below rather than subtracted."""
        return self.keep_probs * pad(self._probs[..., :-1], (1, 0)).cumsum(-1)

    @property
    def covariance_matrix(self) -> Tensor:
        """Covariance of the entries, S_max(i,j) - S_i S_j, shape batch_shape + (K, K)."""
        rows, columns = self.keep_probs.unsqueeze(-1), self.keep_probs.unsqueeze(-2)
        return torch.minimum(rows, columns) - rows * columns

    @property
    def mode(self) -> Tensor:
        """The most probable mask, shape batch_shape + (K,)."""
        units = torch.arange(self.num_units, device=self._param.device)
        return self._full((units <= self._log_probs.argmax(-1, keepdim=True)).to(self._param.dtype))


def expectation(probs: Tensor, values: Tensor) -> Tensor:
    """Average `values` under `probs`; lengths of probability zero count nothing."""
    return (probs * values.masked_fill(probs == 0, 0)).sum(-1)
