"""Numbers and counts scored: how far off the mean, how sharp, and how often intervals hold them."""

import math
from typing import Any

import torch
import xarray as xr
from torch import Tensor

from pyro_vnd.diagnostics.metrics.scorer import Columns, Scorer, mean_and_error, named_variable

__all__ = ["LEVELS", "CountScorer", "NumberScorer", "normal_mixture_crps"]

LEVELS = (0.5, 0.8, 0.9, 0.95)  # of the central intervals whose coverage is told


class NumberScorer(Scorer):
    r"""Real numbers under equal mixtures of S Normals, one a draw.

    As scores of foreign rows, a mixture counts as the Normal with its mean and variance $\bar\sigma^2 + v$, the mean of
    the draws' variances and the variance of their means: its entropy is
    $\frac12 \log 2 \pi e (\bar\sigma^2 + v)$, and its mutual information with the draw
    $\frac12 \log(1 + v / \bar\sigma^2)$. Both are means over the entries of a row.
    """

    scores = ("entropy", "mutual_information")

    def columns(self, outputs: Tensor, y: Tensor | None, hidden: Any = None) -> Columns:
        """Keep what each row has of every metric, as means over its entries."""
        law: Any = self.likelihood.entries(self.finite(outputs), 2)
        within, between = law.variance.mean(0), law.mean.var(0, correction=0)
        columns = {
            "entropy": 0.5 * (2 * math.pi * math.e * (within + between)).log(),
            "mutual_information": 0.5 * (between / within).log1p(),
        }
        if y is not None:
            y = y.cpu().double()
            columns |= {"nll": math.log(len(outputs)) - law.log_prob(y).logsumexp(0)}
            columns |= {"squared_error": (law.mean.mean(0) - y).square()} | self.of_law(law, y)
        return {name: values.flatten(1).mean(1) if values.dim() > 1 else values for name, values in columns.items()}

    def of_law(self, law: Any, y: Tensor) -> dict[str, Tensor]:
        """Return metrics of each entry that the law alone has, and whether its intervals hold y.

        The distribution function of a mixture is the mean of the draws'. A central interval holds y where that is
        between the tails at y: exactly, without quantiles of a mixture.
        """
        below = law.cdf(y).mean(0)
        return {"crps": normal_mixture_crps(law.loc, law.scale.expand_as(law.loc), y)} | _covered(below, below)

    def variables(self, columns: Columns) -> dict[str, xr.Variable]:
        """Return the metrics; the coverage has the dimension `level`."""
        means = [name for name in columns if name != "squared_error" and not name.startswith("covered_")]
        found = {key: value for name in means for key, value in mean_and_error(name, columns[name]).items()}
        squares = columns["squared_error"]
        rmse = squares.mean().sqrt().item()
        error = (squares.var(correction=0) / len(squares)).sqrt().item() / (2 * rmse) if rmse else 0.0
        coverage = [columns[f"covered_{level}"].mean().item() for level in LEVELS]
        return found | {
            "rmse": named_variable("rmse", (), rmse),
            "rmse_se": named_variable("rmse_se", (), error),
            "coverage": named_variable("coverage", ("level",), coverage),
        }


class CountScorer(NumberScorer):
    r"""Counts under equal mixtures of S Poisson laws, one a draw; scores of foreign rows as of numbers.

    The deviance of a row is $2 (y \log(y / \mu) - (y - \mu))$, with the mean $\mu$ of the mixture.
    """

    def of_law(self, law: Any, y: Tensor) -> dict[str, Tensor]:
        """Return the deviance, and whether intervals from one quantile to another, both inclusive, hold y."""
        mean = law.mean.mean(0)
        at_most = torch.special.gammaincc(y + 1, law.rate).mean(0)  # P(Y <= y)
        less = torch.where(y > 0, torch.special.gammaincc(y.clamp_min(1), law.rate), 0.0).mean(0)
        return {"deviance": 2 * (torch.xlogy(y, y / mean) - (y - mean))} | _covered(less, at_most)


def _covered(less: Tensor, at_most: Tensor) -> dict[str, Tensor]:
    """Say whether central intervals hold y, with the probabilities of less than y and of at most y."""
    tails = {level: (1 - level) / 2 for level in LEVELS}
    return {f"covered_{level}": ((at_most >= tail) & (less <= 1 - tail)).double() for level, tail in tails.items()}


def normal_mixture_crps(loc: Tensor, scale: Tensor, y: Tensor) -> Tensor:
    r"""Return the continuous ranked probability score of equal mixtures of Normals, smaller is better.

    $$\frac1S \sum_s A(y - \mu_s, \sigma_s^2) - \frac1{2 S^2} \sum_{s, t} A(\mu_s - \mu_t, \sigma_s^2 + \sigma_t^2),
      \qquad A(m, v) = m (2 \Phi(m / \sqrt v) - 1) + 2 \sqrt v \, \varphi(m / \sqrt v),$$

    which is $\int (F(t) - 1[t \ge y])^2 dt$ of the distribution function F.

    Args:
        loc: Means, shape (S, ...).
        scale: Standard deviations, the same shape.
        y: What was observed, shape (...).

    Returns:
        Shape (...).

    Source: Grimit et al., "The continuous ranked probability score for circular variables", 2006, for the mixture.

    Example:
        >>> normal_mixture_crps(torch.zeros(2, 1), torch.ones(2, 1), torch.zeros(1))
        tensor([0.2337])
    """
    to_y = _mean_distance(y - loc, scale.square()).mean(0)
    # A draw at a time: memory holds S numbers a row rather than S squared.
    pairs = [_mean_distance(loc - m, scale.square() + s.square()).mean(0) for m, s in zip(loc, scale, strict=True)]
    return to_y - torch.stack(pairs).mean(0) / 2


def _mean_distance(mean: Tensor, variance: Tensor) -> Tensor:
    r"""Return $E |X|$ of $X \sim N(m, v)$."""
    scale = variance.sqrt()
    ratio = mean / scale
    density = (-ratio.square() / 2).exp() / math.sqrt(2 * math.pi)
    return mean * torch.special.erf(ratio / math.sqrt(2)) + 2 * scale * density
