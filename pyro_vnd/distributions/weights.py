"""Laws of arrays of weights between units that may be dropped."""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, ClassVar, Self

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import Distribution, constraints
from torch.distributions.utils import broadcast_all
from torch.types import _size

from pyro_vnd._compat import all_true, only_plain_code
from pyro_vnd.distributions._fast.broadcast import broadcast_shapes
from pyro_vnd.distributions._fast.normals import draw_and_kl, variance_and_kl
from pyro_vnd.distributions.constraints import (
    as_shape,
    check_dense,
    check_expandable,
    check_sample,
    check_switch,
    counted,
    got,
)
from pyro_vnd.distributions.derived import KeepsDerived, derived, keep
from pyro_vnd.distributions.lengths import batch_facts, span

__all__ = ["FixedNormal", "Gated", "LogScaleNormal", "LogUniform", "fixed_normal"]


class FixedNormal(dist.Normal):
    """A Normal law whose parameters are numbers, which `fixed_normal` makes: nothing of it ever changes.

    Attributes:
        numbers: Location and scale; None where it was made in another way.
    """

    numbers: tuple[float, float] | None = None


def fixed_normal(loc: float, scale: float, like: Tensor) -> FixedNormal:
    """Return a Normal law of numbers, the same object each time.

    Args:
        loc: Location.
        scale: Standard deviation.
        like: A tensor with the type and the device of its samples.

    Example:
        >>> fixed_normal(0.0, 2.0, torch.zeros(3)) is fixed_normal(0.0, 2.0, torch.ones(1))
        True
    """
    make = _fixed_normal.__wrapped__ if only_plain_code() else _fixed_normal  # what is traced must not stay
    return make(float(loc), float(scale), like.dtype, like.device)


@lru_cache(maxsize=1024)
def _fixed_normal(loc: float, scale: float, dtype: torch.dtype, device: torch.device) -> FixedNormal:
    with torch.inference_mode(False):  # for use in training, too
        law = FixedNormal(
            torch.tensor(loc, dtype=dtype, device=device),
            torch.tensor(scale, dtype=dtype, device=device),
            validate_args=False,
        )
    law.numbers = loc, scale
    return law


class LogScaleNormal(KeepsDerived, dist.Normal):
    r"""Normal law $N(\mu, e^{2\rho})$ with the parameter that weights of nets have.

    It is Pyro's `Normal`, and what holds for that holds here. But what a training step needs, draws or variances and
    the divergence from the prior, is computed once and together: for nets of millions of weights such a step consists
    of passes over arrays, and Σ ρ is exact where the logarithm of a rounded σ is not.

    Shapes: loc and log_scale broadcast to batch_shape; a scalar event.

    Args:
        loc: Mean μ.
        log_scale: ρ, the logarithm of the standard deviation.
        prior: One law for all entries, if `kl_from_prior` is to be asked for.
        validate_args: Whether arguments and samples are checked.

    Raises:
        ValueError: If the shapes do not broadcast, or arguments are checked and are no real numbers.

    Example:
        >>> q = LogScaleNormal(torch.tensor([1.0, 2.0]), torch.tensor([0.0, -80.0]))
        >>> q.scale, q.variance
        (tensor([1.0000e+00, 1.8049e-35]), tensor([1., 0.]))
        >>> prior = fixed_normal(0.0, 1.0, q.loc)
        >>> LogScaleNormal(q.loc, q.log_scale, prior=prior).kl_from_prior  # 1/2 and 2 - 1/2 + 80
        tensor(82.)
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {  # type: ignore[misc]
        "loc": constraints.real,
        "log_scale": constraints.real,
    }

    def __init__(
        self,
        loc: Tensor,
        log_scale: Tensor,
        *,
        prior: FixedNormal | None = None,
        validate_args: bool | None = None,
    ) -> None:
        try:
            self.loc, self.log_scale = (
                (loc, log_scale) if loc.shape == log_scale.shape else broadcast_all(loc, log_scale)
            )
        except RuntimeError:
            raise ValueError(
                "LogScaleNormal: arguments `loc` and `log_scale` must broadcast; got shapes "
                f"{tuple(loc.shape)} and {tuple(log_scale.shape)}"
            ) from None
        self.prior = prior
        Distribution.__init__(self, self.loc.shape, validate_args=validate_args)

    @property
    def _derived_from(self) -> tuple[Tensor, ...]:
        return self.loc, self.log_scale

    @derived
    def scale(self) -> Tensor:
        """Standard deviation σ, shape batch_shape."""
        return self.log_scale.exp()

    @property
    def variance(self) -> Tensor:
        """Variance σ², shape batch_shape."""
        return self.mean_and_variance[1]

    def rsample(self, sample_shape: _size = torch.Size()) -> Tensor:
        """Draw weights with gradients, shape sample_shape + batch_shape."""
        # torch.randn works under vmap, unlike the noise of torch's Normal.
        shape = self._extended_shape(sample_shape)
        noise = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        if self._numbers is None or sample_shape or not torch.is_grad_enabled():
            return self.loc + self.scale * noise
        draw, kl = draw_and_kl(self.loc, self.log_scale, noise, self._numbers)
        keep(self, "kl_from_prior", kl)
        return draw

    def sample(self, sample_shape: _size = torch.Size()) -> Tensor:
        """Draw weights, shape sample_shape + batch_shape."""
        with torch.no_grad():
            return self.rsample(sample_shape)

    @property
    def _numbers(self) -> tuple[float, float] | None:
        return None if self.prior is None else self.prior.numbers

    @derived
    def mean_and_variance(self) -> tuple[Tensor, Tensor]:
        """μ and σ², each of shape batch_shape; the first is a tensor of its own, which belongs to no other law."""
        if self._numbers is None:
            return self.loc.view_as(self.loc), (2 * self.log_scale).exp()
        mean, variance, kl = variance_and_kl(self.loc, self.log_scale, self._numbers)
        keep(self, "kl_from_prior", kl)
        return mean, variance

    @derived
    def kl_from_prior(self) -> Tensor:
        """Divergence from the prior, summed over all entries, shape (); what was computed beside draws or variances."""
        assert self._numbers is not None, "the law has no prior"
        return variance_and_kl(self.loc, self.log_scale, self._numbers)[2]

    def expand(self, batch_shape: _size, _instance: Self | None = None) -> Self:
        """Return the same law with a larger batch shape; parameters are shared, not copied."""
        batch_shape = torch.Size(batch_shape)
        new = self._get_checked_instance(type(self), _instance)
        new.loc, new.log_scale, new.prior = self.loc.expand(batch_shape), self.log_scale.expand(batch_shape), self.prior
        Distribution.__init__(new, batch_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new


_EULER_GAMMA = 0.57721566490153286
_CONSTANT = 0.5 * (1 + _EULER_GAMMA + math.log(4 * math.pi))


class LogUniform(TorchDistribution):
    r"""Improper prior $p(w) \propto 1 / |w|$ on the real line: uniform over the sign and the logarithm of w.

    $$\log p(w) = -\log |w| - c, \qquad c = \tfrac12 (1 + \gamma + \log 4 \pi),$$
    $$\mathrm{KL}(N(\mu, \sigma^2) \,\|\, p) = E_q[\log q(w) - \log p(w)]
      = E \log |m + \epsilon| - E \log |\epsilon|, \qquad m = \mu / \sigma, \quad \epsilon \sim N(0, 1),$$
    $$\partial \mathrm{KL} / \partial m = \sqrt 2 \, D(m / \sqrt 2), \quad D \text{ the Dawson function}.$$

    The KL is exact and registered, so `TraceMeanField_ELBO` uses it. It only depends on $\alpha = \sigma^2 / \mu^2$: it
    is 0 at m = 0, $m^2 / 2$ near it, grows with |m|, and tends to $\log |m| + (\gamma + \log 2) / 2$. Its relative
    error is 1e-11 in float64, that of its gradient 2e-10.

    An improper prior has no normalising constant, so c is a convention: here the one for which the smallest KL is
    zero. Weights that are always in the model do not notice. Where a width is *learned*, each unit pays for its
    weights, any other c would shift that price by the same amount for each weight, and the learned width would be as
    arbitrary as c: use a proper prior there. Nor is there a posterior to come close to in general: 1 / |w| has infinite
    mass around zero, and a likelihood that is positive at w = 0 leaves it there.

    - Sampling raises, as there is no law to sample from. Give guides a starting point of their own, such as
      `init_to_value` for an autoguide.
    - `log_prob` is infinite at w = 0; there, the value at the smallest normal float is returned, with gradient zero.

    Shapes: batch_shape as given, event_shape ().

    Args:
        batch_shape: Batch shape; further dimensions come from `expand` or a plate.
        validate_args: Whether values are checked.

    Raises:
        ValueError: If `batch_shape` is not a sequence of sizes >= 0.
        NotImplementedError: If a sample is drawn.

    Source: Kingma et al., "Variational dropout and the local reparameterization trick", arXiv 1506.02557; Molchanov
    et al., "Variational dropout sparsifies deep neural networks", arXiv 1701.05369, whose sigmoid approximates this KL
    to .009 nats; Hron et al., "Variational Bayesian dropout: pitfalls and fixes", arXiv 1807.01969, on improperness.

    Example:
        >>> import torch
        >>> from torch.distributions import Normal, kl_divergence
        >>> prior = LogUniform().expand([3])
        >>> kl_divergence(Normal(torch.tensor([0.0, 0.1, 100.0]), 0.1), prior)
        tensor([0.0000, 0.4267, 7.5429])
        >>> prior.log_prob(torch.tensor([0.1, 1.0, -1.0]))
        tensor([ 0.2485, -2.0541, -2.0541])
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    support = constraints.real

    def __init__(self, batch_shape: Sequence[int] = (), *, validate_args: bool | None = None) -> None:
        check_switch("LogUniform", validate_args)
        shape = as_shape("LogUniform: argument `batch_shape`", batch_shape)
        super().__init__(shape, validate_args=validate_args)

    def expand(self, batch_shape: _size, _instance: Self | None = None) -> Self:
        """Return the same prior with a larger batch shape."""
        batch_shape = torch.Size(batch_shape)
        check_expandable(self, batch_shape)
        new = self._get_checked_instance(LogUniform, _instance)
        TorchDistribution.__init__(new, batch_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def rsample(self, sample_shape: _size = torch.Size()) -> Tensor:
        """Raise: an improper prior has no samples. So does `sample`, which comes here too."""
        raise NotImplementedError(
            "LogUniform: an improper prior cannot be sampled. Score values of a guide with it, start autoguides with "
            "`init_loc_fn=init_to_value(values=...)`, and use a proper prior for prior predictive draws"
        )

    def log_prob(self, value: Tensor) -> Tensor:
        """Return -log |w| - c, finite at zero, shape broadcast(value.shape, batch_shape)."""
        if self._validate_args and not torch.compiler.is_compiling():
            check_sample(self, value)
            if not value.is_floating_point():
                raise ValueError(f"LogUniform: argument `value` must be floating-point numbers; got {value.dtype}")
        log_prob = -value.abs().clamp_min(torch.finfo(value.dtype).tiny).log() - _CONSTANT
        return log_prob.expand(broadcast_shapes(value.shape, self.batch_shape))

    def __repr__(self) -> str:
        return f"LogUniform({tuple(self.batch_shape)})"


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
        ValueError: If a law is not univariate, it or the gate does not broadcast to the event, or a gate is outside
            [0, 1].

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
        check_switch("Gated", validate_args)
        for name, law in (("base", base), ("rest", rest)):
            if not isinstance(law, Distribution) and (name == "base" or law is not None):
                raise ValueError(f"Gated: argument `{name}` must be a distribution; got {type(law).__name__}")
        given_shape = base.batch_shape if event_shape is None else event_shape
        shape = as_shape("Gated: argument `event_shape`", given_shape)
        check_dense("Gated: argument `gate`", gate)
        if gate is not None and not (isinstance(gate, Tensor) and gate.is_floating_point()):
            came = gate.dtype if isinstance(gate, Tensor) else type(gate).__name__
            raise ValueError(f"Gated: argument `gate` must be a floating-point tensor or None; got {came}")
        shapes = {"base": base.batch_shape, "gate": () if gate is None else gate.shape}
        for name, law in (("base", base), ("rest", rest)):
            if law is not None and law.event_shape:
                raise ValueError(f"Gated: argument `{name}` must be univariate; its event is {tuple(law.event_shape)}")
        shapes["rest"] = () if rest is None else rest.batch_shape
        for name, given in shapes.items():
            try:
                fits = broadcast_shapes(torch.Size(given), shape) == shape
            except RuntimeError:
                fits = False
            if not fits:
                raise ValueError(
                    f"Gated: argument `{name}` of shape {tuple(given)} does not broadcast to the event {tuple(shape)}"
                )
        # The base keeps its own, possibly smaller shape: the KL to a prior with one scale is then mostly sums.
        self.base, self.gate, self.rest = base, gate, rest
        super().__init__(torch.Size(), shape, validate_args=validate_args)
        if gate is not None and self._validate_args and not all_true((gate >= 0) & (gate <= 1)):
            raise ValueError(
                f"Gated: argument `gate` of shape {tuple(gate.shape)} must have values in [0, 1]; got {got(gate)}"
            )

    @classmethod
    def _of(
        cls, base: Distribution, event_shape: _size, gate: Tensor | None = None, rest: Distribution | None = None
    ) -> Self:
        """Return the law of parts that are known to fit; its values are not checked either."""
        law = cls.__new__(cls)
        law.base, law.gate, law.rest = base, gate, rest
        TorchDistribution.__init__(law, torch.Size(), torch.Size(event_shape), validate_args=False)
        return law

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
        shape = self.batch_shape + self.event_shape
        return self.base if self.base.batch_shape == shape else self.base.expand(shape)

    def rsample(self, sample_shape: _size = torch.Size()) -> Tensor:
        """Draw arrays with gradients, shape sample_shape + batch_shape + event_shape."""
        return self._whole().rsample(sample_shape)

    def sample(self, sample_shape: _size = torch.Size()) -> Tensor:
        """Draw arrays, shape sample_shape + batch_shape + event_shape."""
        return self._whole().sample(sample_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the gated sum of log-probabilities, shape value.shape without the event dimensions."""
        if self._validate_args and not torch.compiler.is_compiling():
            check_sample(self, value)
        shape = broadcast_shapes(value.shape, self._extended_shape())
        log_prob = self.sum_over_event(self.base.log_prob(value).expand(shape), self.gate)
        if self.gate is None or self.rest is None:
            return log_prob
        return log_prob + self.sum_over_event(self.rest.log_prob(value).expand(shape), 1 - self.gate)

    def sum_over_event(self, terms: Tensor, gate: Tensor | None) -> Tensor:
        """Return the sum of terms, one for each entry, each times its gate; zero times infinity is zero, if checked.

        Args:
            terms: Shape (...) + event_shape.
            gate: Broadcastable to that, or None to count all terms in full.
        """
        if gate is not None:  # nets, which have no checks, are spared four passes over their weights
            terms = counted(gate, terms) if self._validate_args else gate * terms
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
        parts = [type(self.base).__name__, *batch_facts(self), f"event {tuple(self.event_shape)}"]
        if self.gate is not None:
            gate = self.gate
            parts += span("gate", lambda: gate)
        return f"Gated({', '.join(parts)})"
