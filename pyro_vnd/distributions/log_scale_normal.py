"""A Normal whose scale is given by its logarithm, for arrays of weights in which every pass over memory counts."""

from functools import cached_property
from typing import Any, ClassVar, Self

import torch
from pyro.distributions import Normal
from torch import Tensor
from torch.distributions import Distribution, constraints
from torch.distributions.utils import broadcast_all
from torch.types import _size

__all__ = ["LogScaleNormal"]


class LogScaleNormal(Normal):
    r"""Normal law $N(\mu, e^{2\rho})$ with the parameter that weights of nets have.

    It is Pyro's `Normal`, and what holds for that holds here. But σ, σ² and the sums in a divergence are each computed
    once, on demand, from ρ: for nets of millions of weights a training step consists of such arrays, and Σ ρ is exact
    where the logarithm of a rounded σ is not.

    Shapes: loc and log_scale broadcast to batch_shape; a scalar event.

    Args:
        loc: Mean μ.
        log_scale: ρ, the logarithm of the standard deviation.
        validate_args: Whether arguments and samples are checked.

    Raises:
        ValueError: If the shapes do not broadcast, or arguments are checked and are no real numbers.

    Example:
        >>> q = LogScaleNormal(torch.tensor([1.0, 2.0]), torch.tensor([0.0, -80.0]))
        >>> q.scale, q.variance, q.variance_and_sums[2]
        (tensor([1.0000e+00, 1.8049e-35]), tensor([1., 0.]), tensor(-80.))
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {  # type: ignore[misc]
        "loc": constraints.real,
        "log_scale": constraints.real,
    }

    def __init__(self, loc: Tensor, log_scale: Tensor, *, validate_args: bool | None = None) -> None:
        try:
            self.loc, self.log_scale = broadcast_all(loc, log_scale)
        except RuntimeError:
            raise ValueError(
                "LogScaleNormal: arguments `loc` and `log_scale` must broadcast; got shapes "
                f"{tuple(loc.shape)} and {tuple(log_scale.shape)}"
            ) from None
        Distribution.__init__(self, self.loc.shape, validate_args=validate_args)

    @cached_property
    def scale(self) -> Tensor:  # type: ignore[override]
        """Standard deviation σ, shape batch_shape."""
        return self.log_scale.exp()

    @property
    def variance(self) -> Tensor:
        """Variance σ², shape batch_shape."""
        return self.variance_and_sums[0]

    @cached_property
    def variance_and_sums(self) -> tuple[Tensor, Tensor, Tensor]:
        """σ², shape batch_shape, and the sums Σ σ² and Σ ρ, with a gradient in one array for all three."""
        return _VarianceAndSums.apply(self.log_scale)

    def expand(self, batch_shape: _size, _instance: Self | None = None) -> Self:
        """Return the same law with a larger batch shape; parameters are shared, not copied."""
        new = self._get_checked_instance(type(self), _instance)
        batch_shape = torch.Size(batch_shape)
        new.loc, new.log_scale = self.loc.expand(batch_shape), self.log_scale.expand(batch_shape)
        Distribution.__init__(new, batch_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new


class _VarianceAndSums(torch.autograd.Function):
    r"""$v_e = e^{2\rho_e}$, $\sum v$ and $\sum \rho$: $d\rho_e = 2 v_e (dv_e + d\sum v) + d\sum\rho$."""

    generate_vmap_rule = True

    @staticmethod
    def forward(log_scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        variance = (2 * log_scale).exp_()
        return variance, variance.sum(), log_scale.sum()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output[0])

    @staticmethod
    def backward(ctx: Any, each: Tensor | None, variances: Tensor | None, logs: Tensor | None) -> Tensor | None:
        (variance,) = ctx.saved_tensors
        grad = None
        # In place on arrays made here only; those that come in may belong to others.
        if each is not None and variances is not None:
            grad = (each + variances).mul_(variance).mul_(2)
        elif each is not None or variances is not None:
            grad = (variance * (variances if each is None else each)).mul_(2)
        if logs is None:
            return grad
        return logs.expand(variance.shape) if grad is None else grad.add_(logs)
