"""Laws of what a net is trained on, given its outputs: classes, bits, numbers, counts, ordered levels."""

from collections.abc import Sequence
from typing import Any, Literal

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.nn.functional import softplus

from pyro_vnd._inputs import check_labels
from pyro_vnd._sizes import as_numbers, is_integer
from pyro_vnd.nn.label_laws import ordinal_log_probs
from pyro_vnd.nn.net_likelihood import (
    NetLikelihood,
    check_shape,
    drop_single,
    is_rows,
    refuse_outputs,
    refuse_values,
)

__all__ = ["BernoulliLabels", "CategoricalLabels", "NormalTargets", "OrdinalLabels", "PoissonCounts"]

_LEAST_SCALE = 1e-6  # of a predicted scale, which a perfect fit would take to zero


class CategoricalLabels(NetLikelihood):
    r"""One of C classes a row: $y_n \sim \mathrm{Categorical}(\mathrm{logits} = f(x_n))$.

    The net returns logits, shape (N, C) of two or more classes; labels are integers from 0 to C - 1, shape (N,).

    Example:
        >>> CategoricalLabels().law(torch.zeros(5, 3)).batch_shape
        torch.Size([5])
    """

    site = "label"

    def entries(self, outputs: Tensor, batch_dim: int = 1) -> TorchDistribution:
        """Return the law of each label."""
        return dist.Categorical(logits=outputs)

    def check_outputs(self, caller: str, outputs: Any, num_rows: int) -> None:
        """Raise a ValueError unless outputs are logits of two or more classes."""
        if is_rows(outputs, num_rows) and outputs.dim() == 2 and outputs.shape[1] > 1:
            return
        advice = "Classes of tokens or pixels want NestedModel(net, TokenLabels()) or PixelLabels()"
        if isinstance(outputs, Tensor) and outputs.shape[1:] in ((), (1,)):
            advice = (
                "Of two classes give each its logit, nn.Linear(..., 2), or take NestedModel(net, BernoulliLabels()); "
                "for real numbers NormalTargets()"
            )
        refuse_outputs(caller, "logits of shape (N, C), one for each of two or more classes", outputs, num_rows, advice)

    def targets(self, caller: str, y: Any, outputs: Tensor, *, argument: str = "y", values: bool = True) -> Tensor:
        """Return labels as integers."""
        return check_labels(caller, y, *outputs.shape, argument=argument, values=values)


class BernoulliLabels(NetLikelihood):
    r"""Yes or no, once or several times a row: $y_{nd} \sim \mathrm{Bernoulli}(\mathrm{logits} = f_d(x_n))$.

    The net returns one logit a label, shape (N,) or (N, 1), or (N, D) of D labels that do not exclude each other;
    labels are 0 or 1, as numbers or bools, of the same shape.

    Example:
        >>> BernoulliLabels().law(torch.zeros(5, 1)).event_shape, BernoulliLabels().law(torch.zeros(5, 3)).event_shape
        (torch.Size([]), torch.Size([3]))
    """

    site = "label"

    def entries(self, outputs: Tensor, batch_dim: int = 1) -> TorchDistribution:
        """Return the law of each label."""
        return dist.Bernoulli(logits=drop_single(outputs, batch_dim))

    def check_outputs(self, caller: str, outputs: Any, num_rows: int) -> None:
        """Raise a ValueError unless outputs have a row for each example."""
        if not is_rows(outputs, num_rows):
            refuse_outputs(caller, "a logit for each label, shape (N,) or (N, D)", outputs, num_rows)

    def targets(self, caller: str, y: Any, outputs: Tensor, *, argument: str = "y", values: bool = True) -> Tensor:
        """Return labels as numbers of the type of the outputs."""
        what = "labels 0 or 1"
        y = check_shape(caller, argument, y, drop_single(outputs, 1).shape, what).to(outputs.dtype)
        if values:
            refuse_values(caller, argument, what, y, (y != 0) & (y != 1))
        return y


class NormalTargets(NetLikelihood):
    r"""Real numbers: $y_{nd} \sim N(\mu_d(x_n), \sigma)$.

    The net returns the means, shape (N,) or (N, D), or (N, ...) for arrays, and targets have the same shape. The scale
    is learned, one for all rows; or the net predicts it, too, as $\mathrm{softplus}$ of a second half of its outputs,
    so that nn.Linear(..., 2) is for a single number. Targets of mean 0 and standard deviation 1 suit the priors of the
    weights.

    Args:
        scale: Where the learned scale starts, a number or one for each entry, such as shape (D,); or "predicted".
        dim: Dimension of outputs (N, ...) that holds means and then scales, if these are predicted: 1 for images.

    Raises:
        ValueError: If an argument is invalid.

    Example:
        >>> NormalTargets(0.5).law(torch.zeros(4, 2)).event_shape
        torch.Size([2])
        >>> law = NormalTargets("predicted").law(torch.zeros(4, 2))
        >>> law.event_shape, law.scale[0]
        (torch.Size([]), tensor(0.6931))
    """

    log_scale: Tensor | None

    def __init__(self, scale: float | Tensor | Literal["predicted"] = 1.0, *, dim: int = -1) -> None:
        super().__init__()
        if not is_integer(dim):
            raise ValueError(f"NormalTargets: argument `dim` must be an integer; got {dim!r}")
        self.dim = int(dim)
        if isinstance(scale, str) and scale == "predicted":
            self.log_scale = None
            return
        start = as_numbers(scale)
        if start is None or not start.numel():
            raise ValueError(f'NormalTargets: argument `scale` must be numbers or "predicted"; got {scale!r}')
        start = start.detach().to(torch.get_default_dtype())
        if not bool(((start > 0) & start.isfinite()).all()):
            raise ValueError(f"NormalTargets: argument `scale` must be finite and > 0; got {scale}")
        self.log_scale = nn.Parameter(start.log())

    def entries(self, outputs: Tensor, batch_dim: int = 1) -> TorchDistribution:
        """Return the law of each number."""
        if self.log_scale is not None:
            return dist.Normal(drop_single(outputs, batch_dim), self.log_scale.to(outputs).exp())
        loc, scale = outputs.chunk(2, self.dim if self.dim < 0 else self.dim + batch_dim - 1)
        return dist.Normal(drop_single(loc, batch_dim), _LEAST_SCALE + softplus(drop_single(scale, batch_dim)))

    def check_outputs(self, caller: str, outputs: Any, num_rows: int) -> None:
        """Raise a ValueError unless outputs have a row for each example, and halves if scales are predicted."""
        if self.log_scale is None:
            fits = is_rows(outputs, num_rows, 2) and -outputs.dim() < self.dim < outputs.dim() and self.dim != 0
            if not fits or outputs.shape[self.dim] % 2:
                expected = f"means and as many scales along dimension {self.dim} of outputs (N, ...)"
                refuse_outputs(caller, expected, outputs, num_rows, "Of one number give nn.Linear(..., 2)")
        elif not is_rows(outputs, num_rows):
            refuse_outputs(caller, "means, shape (N,) or (N, ...)", outputs, num_rows)
        elif self.log_scale.dim() and not _fits_last(self.log_scale.shape, drop_single(outputs, 1).shape[1:]):
            expected = f"means for the scales of shape {tuple(self.log_scale.shape)}"
            refuse_outputs(caller, expected, outputs, num_rows)

    def targets(self, caller: str, y: Any, outputs: Tensor, *, argument: str = "y", values: bool = True) -> Tensor:
        """Return numbers of the type of the outputs."""
        shape = self.entries(outputs.detach()).batch_shape
        y = check_shape(caller, argument, y, shape, "real numbers").to(outputs.dtype)
        if values:
            refuse_values(caller, argument, "finite", y, ~y.isfinite())
        return y


def _fits_last(shape: Sequence[int], of: Sequence[int]) -> bool:
    """Return whether a shape broadcasts with another, and to no more than that."""
    return len(shape) <= len(of) and all(
        mine in (1, other) for mine, other in zip(reversed(shape), reversed(of), strict=False)
    )


class PoissonCounts(NetLikelihood):
    r"""Counts: $y_{nd} \sim \mathrm{Poisson}(e^{f_d(x_n)})$.

    The net returns logarithms of rates, shape (N,) or (N, D), and counts have the same shape.

    Example:
        >>> PoissonCounts().law(torch.zeros(2, 1)).mean
        tensor([1., 1.])
    """

    def entries(self, outputs: Tensor, batch_dim: int = 1) -> TorchDistribution:
        """Return the law of each count."""
        return dist.Poisson(drop_single(outputs, batch_dim).exp())

    def check_outputs(self, caller: str, outputs: Any, num_rows: int) -> None:
        """Raise a ValueError unless outputs have a row for each example."""
        if not is_rows(outputs, num_rows):
            refuse_outputs(caller, "logarithms of rates, shape (N,) or (N, D)", outputs, num_rows)

    def targets(self, caller: str, y: Any, outputs: Tensor, *, argument: str = "y", values: bool = True) -> Tensor:
        """Return counts as numbers of the type of the outputs."""
        y = check_shape(caller, argument, y, drop_single(outputs, 1).shape, "counts").to(outputs.dtype)
        if values:
            refuse_values(caller, argument, "counts, whole numbers >= 0", y, ~((y >= 0) & (y == y.round())))
        return y


class OrdinalLabels(NetLikelihood):
    r"""One of K ordered levels a row: $P(y_n \le k) = \sigma(c_k - f(x_n))$, with cutpoints c that are learned.

    The net returns one number a row, shape (N,) or (N, 1); labels are integers from 0 to K - 1, shape (N,).

    Args:
        num_levels: K, at least two.

    Raises:
        ValueError: If there are less than two levels.

    Source: McCullagh, "Regression models for ordinal data", 1980 (proportional odds).

    Example:
        >>> OrdinalLabels(4).law(torch.zeros(1, 1)).probs  # at the start
        tensor([[0.2500, 0.2500, 0.2500, 0.2500]], grad_fn=<SoftmaxBackward0>)
    """

    site = "label"

    def __init__(self, num_levels: int) -> None:
        super().__init__()
        if not is_integer(num_levels) or not 2 <= num_levels < 2**31:
            raise ValueError(f"OrdinalLabels: argument `num_levels` must be an integer, at least 2; got {num_levels!r}")
        self.num_levels = int(num_levels)
        start = torch.logit(torch.arange(1, num_levels) / num_levels)
        self.first, self.log_steps = nn.Parameter(start[:1]), nn.Parameter(start.diff().log())

    @property
    def cutpoints(self) -> Tensor:
        """The cutpoints in order, shape (K - 1,)."""
        return torch.cat([self.first, self.first + self.log_steps.exp().cumsum(0)])

    def entries(self, outputs: Tensor, batch_dim: int = 1) -> TorchDistribution:
        """Return the law of each label."""
        return dist.Categorical(logits=ordinal_log_probs(drop_single(outputs, batch_dim), self.cutpoints.to(outputs)))

    def check_outputs(self, caller: str, outputs: Any, num_rows: int) -> None:
        """Raise a ValueError unless there is one output for each example."""
        if not (is_rows(outputs, num_rows) and outputs.shape[1:] in ((), (1,))):
            refuse_outputs(caller, "one number for each row, shape (N,) or (N, 1)", outputs, num_rows)

    def targets(self, caller: str, y: Any, outputs: Tensor, *, argument: str = "y", values: bool = True) -> Tensor:
        """Return labels as integers."""
        return check_labels(caller, y, len(outputs), self.num_levels, argument=argument, values=values)
