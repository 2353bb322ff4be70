"""Laws of labels that torch and Pyro do not have: some labels unseen, levels in order."""

from typing import Any, Self

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from torch.types import _size

__all__ = ["PartlySeenCategorical", "ordinal_log_probs"]


class PartlySeenCategorical(dist.Categorical):
    """A Categorical that gives labels to be ignored a log-probability of zero; draws are of all classes.

    That they are among the values, rather than masked, keeps them in the data that traces and ArviZ have.

    Args:
        logits: Logits, shape (..., C).
        ignored: The labels to be ignored.

    Example:
        >>> law = PartlySeenCategorical(torch.zeros(2, 4), (-100,))
        >>> law.log_prob(torch.tensor([3, -100]))
        tensor([-1.3863,  0.0000])
    """

    def __init__(self, logits: Tensor, ignored: tuple[int, ...], validate_args: bool | None = None) -> None:
        self.ignored = ignored
        super().__init__(logits=logits, validate_args=validate_args)

    @staticmethod
    def is_seen(value: Tensor, ignored: tuple[int, ...]) -> Tensor:
        """Return which labels are not to be ignored."""
        seen = torch.ones_like(value, dtype=torch.bool)
        for index in ignored:
            seen = seen & (value != index)
        return seen

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-probability of each label, zero of those to be ignored."""
        seen = self.is_seen(value, self.ignored)
        return torch.where(seen, super().log_prob(torch.where(seen, value, 0)), 0.0)

    def expand(self, batch_shape: _size, _instance: Any = None) -> Self:
        """Return the same law with a larger batch shape."""
        new = self._get_checked_instance(PartlySeenCategorical, _instance)
        new.ignored = self.ignored
        return super().expand(batch_shape, _instance=new)


def ordinal_log_probs(location: Tensor, cutpoints: Tensor) -> Tensor:
    r"""Return log-probabilities of ordered levels, accurate also where they are tiny.

    With $a_k = c_k - f$ and $a_{-1} = -\infty$, $a_{K-1} = \infty$,

    $$\log(\sigma(a_k) - \sigma(a_{k-1})) = \log \sigma(a_k) + \log \sigma(-a_{k-1}) + \log(1 - e^{a_{k-1} - a_k}).$$

    Args:
        location: f, shape (...).
        cutpoints: c, rising, shape (K - 1,).

    Returns:
        Shape (..., K).

    Example:
        >>> ordinal_log_probs(torch.tensor([0.0, 200.0]), torch.tensor([0.0, 1.0]))
        tensor([[  -0.6931,   -1.4651,   -1.3133],
                [-200.0000, -199.4587,    0.0000]])
    """
    distance = cutpoints - location.unsqueeze(-1)
    below, above = logsigmoid(distance), logsigmoid(-distance)
    between = below[..., 1:] + above[..., :-1] + (-torch.expm1(-cutpoints.diff())).log()
    return torch.cat([below[..., :1], between, above[..., -1:]], -1)
