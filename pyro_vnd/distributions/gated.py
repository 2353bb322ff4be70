"""Arrays of independent variables whose entries count only as far as a gate is open."""

from typing import Any, ClassVar, Self

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import Distribution, Normal, constraints, kl_divergence, register_kl
from torch.types import _size

from pyro_vnd.distributions.log_scale_normal import LogScaleNormal
from pyro_vnd.distributions.shapes import check_expandable

__all__ = ["Gated"]


class Gated(TorchDistribution):
    r"""Independent variables in an array, such as the weights of a layer, each counted in proportion to a gate.

    $$\log q(w) = \sum_e g_e \log q_e(w_e) + (1 - g_e) \log r_e(w_e), \qquad
    \mathrm{KL}(q \| r) = \sum_e g_e \mathrm{KL}(q_e \| r_e).$$

    A weight between two units that a mask may drop follows the prior r where either is dropped, in guide and model
    alike, so that it only costs when both are kept: g is the probability of that, and the KL above that of weights
    given the mask, averaged over the mask. Such a guide serves a model with the prior alone, `Gated(r, event_shape)`.
    As with Pyro's `mask`, a gated density is no normalised one, and sampling ignores the gate.

    Shapes: base (...), broadcastable to event_shape; batch_shape (); the whole array is one event.

    Args:
        base: The law of the entries, with a univariate event.
        event_shape: Shape of the array; that of `base` by default.
        gate: Weights in [0, 1] that broadcast to `event_shape`; None counts every entry in full.
        rest: The law r of what the gate leaves out, as for `base`; by default that counts nothing.
        validate_args: Whether shapes and samples are checked.

    Raises:
        ValueError: If a law is not univariate, or it or the gate does not broadcast to the event.

    Source: Cui et al., arXiv 2101.11353, section 4.2 (the KL of weights given the mask).

    Example:
        >>> import torch
        >>> from torch.distributions import Normal, kl_divergence
        >>> prior = Normal(0.0, 1.0)
        >>> q = Gated(Normal(torch.ones(2, 3), 1.0), gate=torch.tensor([1.0, 0.5, 0.0]), rest=prior)
        >>> p = Gated(prior, torch.Size([2, 3]))
        >>> kl_divergence(q, p)  # 1/2 for each entry, of which three count
        tensor(1.5000)
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}

    def __init__(
        self,
        base: Distribution,
        event_shape: _size | None = None,
        gate: Tensor | None = None,
        rest: Distribution | None = None,
        *,
        validate_args: bool | None = None,
    ) -> None:
        shape = base.batch_shape if event_shape is None else torch.Size(event_shape)
        shapes = {"base": base.batch_shape, "gate": () if gate is None else gate.shape}
        for name, law in (("base", base), ("rest", rest)):
            if law is not None and law.event_shape:
                raise ValueError(f"Gated: argument `{name}` must be univariate; its event is {tuple(law.event_shape)}")
        shapes["rest"] = () if rest is None else rest.batch_shape
        for name, given in shapes.items():
            try:
                fits = torch.broadcast_shapes(given, shape) == shape
            except RuntimeError:
                fits = False
            if not fits:
                raise ValueError(
                    f"Gated: argument `{name}` of shape {tuple(given)} does not broadcast to the event {tuple(shape)}"
                )
        # The base keeps its own, possibly smaller shape: the KL to a prior with one scale is then mostly sums.
        self.base, self.gate, self.rest = base, gate, rest
        super().__init__(torch.Size(), shape, validate_args=validate_args)

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        """Whether samples carry gradients: as in the base."""
        return self.base.has_rsample

    @property
    def support(self) -> constraints.Constraint:
        """The support of the base, for the whole array."""
        return constraints.independent(self.base.support, len(self.event_shape))

    @property
    def mean(self) -> Tensor:
        """Mean of the base, shape batch_shape + event_shape."""
        return self.base.mean.expand(self.batch_shape + self.event_shape)

    @property
    def variance(self) -> Tensor:
        """Variance of the base, shape batch_shape + event_shape."""
        return self.base.variance.expand(self.batch_shape + self.event_shape)

    def _whole(self) -> Distribution:
        return self.base.expand(self.batch_shape + self.event_shape)

    def rsample(self, sample_shape: _size = torch.Size()) -> Tensor:
        """Draw arrays with gradients, shape sample_shape + batch_shape + event_shape."""
        return self._whole().rsample(sample_shape)

    def sample(self, sample_shape: _size = torch.Size()) -> Tensor:
        """Draw arrays, shape sample_shape + batch_shape + event_shape."""
        return self._whole().sample(sample_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the gated sum of log-probabilities, shape value.shape without the event dimensions."""
        if self._validate_args:
            self._validate_sample(value)
        shape = torch.broadcast_shapes(value.shape, self._extended_shape())
        log_prob = self._sum(self.base.log_prob(value).expand(shape), self.gate)
        if self.gate is None or self.rest is None:
            return log_prob
        return log_prob + self._sum(self.rest.log_prob(value).expand(shape), 1 - self.gate)

    def _sum(self, terms: Tensor, gate: Tensor | None) -> Tensor:
        terms = terms if gate is None else terms * gate
        return terms.sum(list(range(-len(self.event_shape), 0))) if self.event_shape else terms

    def expand(self, batch_shape: _size, _instance: Self | None = None) -> Self:
        """Return the same law with a larger batch shape; parameters are shared, not copied."""
        batch_shape = torch.Size(batch_shape)
        check_expandable(self, batch_shape)
        new = self._get_checked_instance(type(self), _instance)
        new.base, new.gate, new.rest = self.base, self.gate, self.rest
        TorchDistribution.__init__(new, batch_shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @classmethod
    def infer_shapes(cls, **arg_shapes: Any) -> tuple[torch.Size, torch.Size]:
        """Refuse: the shape of the array belongs to the base, which is no tensor."""
        raise NotImplementedError("Gated has a distribution as argument, whose shapes cannot be inferred")

    def __repr__(self) -> str:
        return f"Gated({type(self.base).__name__}, {tuple(self.batch_shape + self.event_shape)})"


@register_kl(Gated, Gated)
def _kl_gated(q: Gated, p: Gated) -> Tensor:
    """Return sum_e g_e KL(q_e || p_e), with the gate of q; not implemented where that of the bases is not."""
    if q.event_shape != p.event_shape:
        raise ValueError(f"KL of arrays of different shapes: {tuple(q.event_shape)} and {tuple(p.event_shape)}")
    batch_shape = torch.broadcast_shapes(q.batch_shape, p.batch_shape)
    if isinstance(q.base, Normal) and isinstance(p.base, Normal):
        kl = _sum_of_normals(q, p.base)
    else:
        terms = kl_divergence(q.base, p.base)
        kl = q._sum(terms.expand(torch.broadcast_shapes(terms.shape, q.event_shape)), q.gate)
    return kl.expand(batch_shape)


def _sum_of_normals(q: Gated, p: Normal) -> Tensor:
    r"""Sum KL = (σ² + (μ - m)²) / 2s² - log σ + log s - 1/2 over an array."""
    normal: Any = q.base
    if q.gate is None and p.loc.numel() == 1 and p.scale.numel() == 1 and normal.batch_shape == q.event_shape:
        # Each term summed by itself: fewer passes over the weights, of which a step of a large net consists.
        if isinstance(normal, LogScaleNormal):
            _, variances, logs = normal.variance_and_sums
        else:
            variances, logs = normal.variance.sum(), normal.scale.log().sum()
        squares = variances + _SquaredDistance.apply(normal.loc, p.loc)
        return (squares * (0.5 / p.scale.square()) - logs + q.event_shape.numel() * (p.scale.log() - 0.5)).reshape(())
    logs = normal.log_scale if isinstance(normal, LogScaleNormal) else normal.scale.log()
    terms = (normal.variance + (normal.loc - p.loc).square()) * (0.5 / p.scale.square())
    terms = terms - logs + (p.scale.log() - 0.5)
    return q._sum(terms.expand(torch.broadcast_shapes(terms.shape, q.event_shape)), q.gate)


class _SquaredDistance(torch.autograd.Function):
    """Σ (x - m)² for a single m, with one array in the backward pass where torch's operations take three."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, m: Tensor) -> Tensor:
        return (x - m).pow_(2).sum()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        x, m = ctx.saved_tensors
        grad_x = (x - m).mul_(2 * grad)
        return grad_x, -grad_x.sum().reshape(m.shape) if ctx.needs_input_grad[1] else None
