"""What nets are trained on, and the law of it given their outputs: labels, numbers, counts, levels, pixels, tokens."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.nn.functional import softplus

from pyro_vnd._inputs import check_labels
from pyro_vnd.nn.label_laws import PartlySeenCategorical, ordinal_log_probs

__all__ = [
    "BernoulliLabels",
    "CategoricalLabels",
    "NetLikelihood",
    "NormalTargets",
    "OrdinalLabels",
    "PixelLabels",
    "PoissonCounts",
    "TokenLabels",
]

_LEAST_SCALE = 1e-6  # of a predicted scale, which a perfect fit would take to zero


class NetLikelihood(nn.Module):
    r"""Base of the laws $p(y_n \mid f(x_n))$ of what a net is trained on; give one to `NestedModel`.

    Whatever a row consists of, outputs, labels, pixels or tokens, its *entries* are independent given the net's outputs
    f(x). Parameters of a law of its own, such as a noise scale, are trained with the net as point estimates.

    Attributes:
        site: Name of the Pyro site.
    """

    site: ClassVar[str] = "y"

    def entries(self, outputs: Tensor, batch_dim: int = 1) -> TorchDistribution:
        """Return the law of each entry of each row.

        Args:
            outputs: Of the net, shape (N, ...), or with draws before the rows, (S, N, ...).
            batch_dim: How many dimensions count rows and draws: 1, or 2.

        Returns:
            A law without event dimensions, whose batch shape is that of the rows and draws, and of a row.
        """
        raise NotImplementedError

    def law(self, outputs: Tensor, batch_dim: int = 1) -> TorchDistribution:
        """Return the law of each row, whose entries are independent; arguments as in `entries`."""
        entries = self.entries(outputs, batch_dim)
        return entries.to_event(len(entries.batch_shape) - batch_dim)

    def check_outputs(self, caller: str, outputs: Any, num_rows: int) -> None:
        """Raise a ValueError if outputs of a net, shape (N, ...), are none that this law can take."""
        raise NotImplementedError

    def targets(self, caller: str, y: Any, outputs: Tensor, *, argument: str = "y", values: bool = True) -> Tensor:
        """Return what is observed in the form in which `law` scores it.

        Args:
            caller: What was given it, for messages.
            y: What is observed, a row for each example.
            outputs: Of the net, shape (N, ...), which passed `check_outputs`.
            argument: Name of the argument.
            values: Whether to look at the values.

        Raises:
            ValueError: If it is nothing of the kind; the message says what came.
        """
        raise NotImplementedError


def _refuse_outputs(caller: str, expected: str, outputs: Any, num_rows: int, advice: str = "") -> None:
    got = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
    raise ValueError(
        f"{caller}: argument `net` must return {expected}; got {got} for {num_rows} rows. {advice}".strip()
    )


def _is_rows(outputs: Any, num_rows: int, least_dim: int = 1) -> bool:
    return isinstance(outputs, Tensor) and outputs.dim() >= least_dim and len(outputs) == num_rows


def _single(outputs: Tensor, batch_dim: int) -> Tensor:
    """Drop the last dimension of a net that ends in one output: (..., N, 1) to (..., N)."""
    return outputs.squeeze(-1) if outputs.dim() == batch_dim + 1 and outputs.shape[-1] == 1 else outputs


def _check_shape(caller: str, argument: str, y: Any, shape: Sequence[int], what: str) -> Tensor:
    """Return y in a shape, of which (N,) and (N, 1) are the same; never broadcast."""
    expected = f"{caller}: argument `{argument}` must be {what}, shape {tuple(shape)} as the net's outputs have it"
    if not isinstance(y, Tensor):
        raise ValueError(f"{expected}; got {type(y).__name__}: give torch.as_tensor({argument})")
    if len(shape) == 1:
        y = _single(y, 1)
    if y.shape != tuple(shape) or y.is_complex():
        raise ValueError(f"{expected}; got {y.dtype} of shape {tuple(y.shape)}")
    return y


def _refuse_values(caller: str, argument: str, what: str, y: Tensor, bad: Tensor) -> None:
    if bool(bad.any()):
        shown = ", ".join(f"{value:.4g}" for value in y[bad][:3].tolist())
        raise ValueError(
            f"{caller}: argument `{argument}` must be {what}; {int(bad.sum())} of {y.numel()} are not: {shown}"
        )


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
        if _is_rows(outputs, num_rows) and outputs.dim() == 2 and outputs.shape[1] > 1:
            return
        advice = "Classes of tokens or pixels want NestedModel(net, TokenLabels()) or PixelLabels()"
        if isinstance(outputs, Tensor) and outputs.shape[1:] in ((), (1,)):
            advice = (
                "Of two classes give each its logit, nn.Linear(..., 2), or take NestedModel(net, BernoulliLabels()); "
                "for real numbers NormalTargets()"
            )
        _refuse_outputs(
            caller, "logits of shape (N, C), one for each of two or more classes", outputs, num_rows, advice
        )

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
        return dist.Bernoulli(logits=_single(outputs, batch_dim))

    def check_outputs(self, caller: str, outputs: Any, num_rows: int) -> None:
        """Raise a ValueError unless outputs have a row for each example."""
        if not _is_rows(outputs, num_rows):
            _refuse_outputs(caller, "a logit for each label, shape (N,) or (N, D)", outputs, num_rows)

    def targets(self, caller: str, y: Any, outputs: Tensor, *, argument: str = "y", values: bool = True) -> Tensor:
        """Return labels as numbers of the type of the outputs."""
        what = "labels 0 or 1"
        y = _check_shape(caller, argument, y, _single(outputs, 1).shape, what).to(outputs.dtype)
        if values:
            _refuse_values(caller, argument, what, y, (y != 0) & (y != 1))
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
        self.dim = dim
        if isinstance(scale, str):
            if scale != "predicted":
                raise ValueError(f'NormalTargets: argument `scale` must be numbers or "predicted"; got {scale!r}')
            self.log_scale = None
            return
        start = torch.as_tensor(scale, dtype=torch.get_default_dtype())
        if not bool(((start > 0) & start.isfinite()).all()):
            raise ValueError(f"NormalTargets: argument `scale` must be finite and > 0; got {scale}")
        self.log_scale = nn.Parameter(start.log())

    def entries(self, outputs: Tensor, batch_dim: int = 1) -> TorchDistribution:
        """Return the law of each number."""
        if self.log_scale is not None:
            return dist.Normal(_single(outputs, batch_dim), self.log_scale.to(outputs).exp())
        loc, scale = outputs.chunk(2, self.dim if self.dim < 0 else self.dim + batch_dim - 1)
        return dist.Normal(_single(loc, batch_dim), _LEAST_SCALE + softplus(_single(scale, batch_dim)))

    def check_outputs(self, caller: str, outputs: Any, num_rows: int) -> None:
        """Raise a ValueError unless outputs have a row for each example, and halves if scales are predicted."""
        if self.log_scale is None:
            fits = _is_rows(outputs, num_rows, 2) and -outputs.dim() < self.dim < outputs.dim() and self.dim != 0
            if not fits or outputs.shape[self.dim] % 2:
                expected = f"means and as many scales along dimension {self.dim} of outputs (N, ...)"
                _refuse_outputs(caller, expected, outputs, num_rows, "Of one number give nn.Linear(..., 2)")
        elif not _is_rows(outputs, num_rows):
            _refuse_outputs(caller, "means, shape (N,) or (N, ...)", outputs, num_rows)
        elif self.log_scale.dim() and not _fits_last(self.log_scale.shape, _single(outputs, 1).shape[1:]):
            expected = f"means for the scales of shape {tuple(self.log_scale.shape)}"
            _refuse_outputs(caller, expected, outputs, num_rows)

    def targets(self, caller: str, y: Any, outputs: Tensor, *, argument: str = "y", values: bool = True) -> Tensor:
        """Return numbers of the type of the outputs."""
        shape = self.entries(outputs.detach()).batch_shape
        y = _check_shape(caller, argument, y, shape, "real numbers").to(outputs.dtype)
        if values:
            _refuse_values(caller, argument, "finite", y, ~y.isfinite())
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
        return dist.Poisson(_single(outputs, batch_dim).exp())

    def check_outputs(self, caller: str, outputs: Any, num_rows: int) -> None:
        """Raise a ValueError unless outputs have a row for each example."""
        if not _is_rows(outputs, num_rows):
            _refuse_outputs(caller, "logarithms of rates, shape (N,) or (N, D)", outputs, num_rows)

    def targets(self, caller: str, y: Any, outputs: Tensor, *, argument: str = "y", values: bool = True) -> Tensor:
        """Return counts as numbers of the type of the outputs."""
        y = _check_shape(caller, argument, y, _single(outputs, 1).shape, "counts").to(outputs.dtype)
        if values:
            _refuse_values(caller, argument, "counts, whole numbers >= 0", y, ~((y >= 0) & (y == y.round())))
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
        if isinstance(num_levels, bool) or not isinstance(num_levels, int) or num_levels < 2:
            raise ValueError(f"OrdinalLabels: argument `num_levels` must be an integer, at least 2; got {num_levels!r}")
        self.num_levels = num_levels
        start = torch.logit(torch.arange(1, num_levels) / num_levels)
        self.first, self.log_steps = nn.Parameter(start[:1]), nn.Parameter(start.diff().log())

    @property
    def cutpoints(self) -> Tensor:
        """The cutpoints in order, shape (K - 1,)."""
        return torch.cat([self.first, self.first + self.log_steps.exp().cumsum(0)])

    def entries(self, outputs: Tensor, batch_dim: int = 1) -> TorchDistribution:
        """Return the law of each label."""
        return dist.Categorical(logits=ordinal_log_probs(_single(outputs, batch_dim), self.cutpoints.to(outputs)))

    def check_outputs(self, caller: str, outputs: Any, num_rows: int) -> None:
        """Raise a ValueError unless there is one output for each example."""
        if not (_is_rows(outputs, num_rows) and outputs.shape[1:] in ((), (1,))):
            _refuse_outputs(caller, "one number for each row, shape (N,) or (N, 1)", outputs, num_rows)

    def targets(self, caller: str, y: Any, outputs: Tensor, *, argument: str = "y", values: bool = True) -> Tensor:
        """Return labels as integers."""
        return check_labels(caller, y, len(outputs), self.num_levels, argument=argument, values=values)


class TokenLabels(NetLikelihood):
    r"""A class for each token of a row: $y_{nt} \sim \mathrm{Categorical}(\mathrm{logits} = f_t(x_n))$.

    The net returns logits, shape (N, T, C); labels are integers from 0 to C - 1, shape (N, T). Of a language model they
    are the tokens that come next. Labels to be ignored score nothing: padding, and what is not to be predicted.

    Args:
        ignore_index: The label, or labels, to be ignored: the index of the padding, say, and torch's -100.

    Raises:
        ValueError: If it is no integer or integers.

    Example:
        >>> law = TokenLabels(ignore_index=0).law(torch.zeros(2, 3, 5))
        >>> law.log_prob(torch.tensor([[1, 4, 2], [3, 0, 0]]))  # 3 log 5 and log 5
        tensor([-4.8283, -1.6094])
    """

    site = "label"
    class_dim: ClassVar[int] = -1  # counted from the end, or from the rows

    def __init__(self, ignore_index: int | Sequence[int] = -100) -> None:
        super().__init__()
        ignored = (ignore_index,) if isinstance(ignore_index, int) else tuple(ignore_index)
        if any(isinstance(index, bool) or not isinstance(index, int) for index in ignored):
            raise ValueError(
                f"{type(self).__name__}: argument `ignore_index` must be an integer or integers; got {ignore_index!r}"
            )
        self.ignored = ignored

    def by_entry(self, outputs: Tensor, batch_dim: int = 1) -> Tensor:
        """Return logits with the classes last; arguments as in `entries`."""
        return outputs if self.class_dim < 0 else outputs.movedim(self.class_dim + batch_dim - 1, -1)

    def seen(self, y: Tensor) -> Tensor:
        """Return which labels are not to be ignored, a bool for each."""
        return PartlySeenCategorical.is_seen(y, self.ignored)

    def entries(self, outputs: Tensor, batch_dim: int = 1) -> TorchDistribution:
        """Return the law of each label; it gives those to be ignored a log-probability of zero."""
        return PartlySeenCategorical(self.by_entry(outputs, batch_dim), self.ignored)

    def check_outputs(self, caller: str, outputs: Any, num_rows: int) -> None:
        """Raise a ValueError unless outputs are logits of two or more classes for each token."""
        if not (_is_rows(outputs, num_rows) and outputs.dim() == 3 and outputs.shape[-1] > 1):
            _refuse_outputs(caller, "logits of shape (N, T, C), of two or more classes a token", outputs, num_rows)

    def targets(self, caller: str, y: Any, outputs: Tensor, *, argument: str = "y", values: bool = True) -> Tensor:
        """Return labels as integers."""
        *shape, num_classes = self.by_entry(outputs).shape
        ignored = f" or {', '.join(map(str, self.ignored))}" if self.ignored else ""
        what = f"classes, integers from 0 to {num_classes - 1}{ignored}"
        y = _check_shape(caller, argument, y, shape, what)
        if y.is_floating_point():
            raise ValueError(f"{caller}: argument `{argument}` must be {what}; got {y.dtype}: give {argument}.long()")
        y = y.long()
        if values:
            _refuse_values(caller, argument, what, y, self.seen(y) & ((y < 0) | (y >= num_classes)))
        return y


class PixelLabels(TokenLabels):
    r"""A class for each pixel: $y_{nij} \sim \mathrm{Categorical}(\mathrm{logits} = f_{\cdot ij}(x_n))$.

    The net returns logits with the classes in dimension 1, shape (N, C, H, W), or (N, C, ...) of any grid; labels are
    integers from 0 to C - 1, shape (N, H, W). Those to be ignored, such as the 255 of many data sets, score nothing.

    Args:
        ignore_index: The label, or labels, to be ignored.

    Raises:
        ValueError: If it is no integer or integers.

    Example:
        >>> PixelLabels(ignore_index=255).law(torch.zeros(2, 5, 4, 4)).event_shape
        torch.Size([4, 4])
    """

    class_dim = 1

    def check_outputs(self, caller: str, outputs: Any, num_rows: int) -> None:
        """Raise a ValueError unless outputs are logits of two or more classes for each pixel."""
        if not (_is_rows(outputs, num_rows) and outputs.dim() > 2 and outputs.shape[1] > 1):
            _refuse_outputs(caller, "logits of shape (N, C, H, W), of two or more classes a pixel", outputs, num_rows)
