"""Which rows of a cascade go on, so that it predicts as well as can be at a mean cost."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["best_thresholds", "last_stage"]

_STEPS = 50  # of a bisection: all that float64 resolves


def last_stage(doubts: Tensor, thresholds: Tensor) -> Tensor:
    r"""Return where rows stop, $\min \{k : u_{kn} < t_k\}$ or else the last stage, shape (N,).

    Args:
        doubts: Doubt u of each stage but the last, shape (K - 1, N).
        thresholds: Their thresholds t, shape (K - 1,).

    Example:
        >>> last_stage(torch.tensor([[0.1, 0.9, 0.9], [0.8, 0.2, 0.7]]), torch.tensor([0.5, 0.5]))
        tensor([0, 1, 2])
    """
    return (doubts >= thresholds.unsqueeze(-1)).long().cumprod(0).sum(0)


def best_thresholds(doubts: Tensor, losses: Tensor, costs: Tensor, mean_cost: float) -> Tensor:
    r"""Find the thresholds with the least mean loss at a mean cost.

    At a price $\lambda$ they minimise $\sum_n [\ell_{s_n n} + \lambda \sum_{k \le s_n} c_k]$, s the stages where rows
    stop, one after the other from the last: what it brings to go on is known once the later ones are. The price is
    found by bisection, and the mean cost met between the thresholds of neighbouring prices. Each is fitted to
    all rows, also to those that an earlier one stops.

    Args:
        doubts: Doubt of each stage but the last, shape (K - 1, N).
        losses: Loss l of each stage, shape (K, N).
        costs: Cost c of each stage for a row, shape (K,).
        mean_cost: Mean over rows of the costs of all stages that they go through; at least that of the first.

    Returns:
        Shape (K - 1,), of the type of the doubts and between them. Rows cost the mean, or less by what one of them may
        cost, or several with the same doubt.

    Example:
        >>> doubts = torch.tensor([[0.1, 0.2, 0.3, 0.4]])
        >>> thresholds = best_thresholds(doubts, torch.cat([doubts, 0 * doubts]), torch.tensor([1.0, 2.0]), 2.0)
        >>> last_stage(doubts, thresholds)
        tensor([0, 0, 1, 1])
    """
    given, doubts, losses, costs = doubts, doubts.double(), losses.double(), costs.double()
    total = costs.cumsum(0)

    def excess(thresholds: Tensor) -> float:
        return total[last_stage(doubts, thresholds)].mean().item() - mean_cost

    order = doubts.argsort(-1, descending=True)
    ranked = doubts.gather(-1, order)
    ceiling = ranked[:, :1] * (1 + 1e-6) + torch.finfo(torch.float32).tiny
    # Thresholds by the number of rows that go on; between two rows, since a doubt is never computed quite the same.
    cuts = torch.cat([ceiling, (ranked[:, 1:] + ranked[:, :-1]) / 2, torch.zeros_like(ceiling)], -1)

    def at_price(price: float) -> Tensor:
        thresholds, ahead = torch.zeros(len(doubts), dtype=torch.float64), losses[-1]
        for k in reversed(range(len(doubts))):
            ahead = ahead + price * costs[k + 1]
            change = (ahead - losses[k])[order[k]].cumsum(0)  # by the number of rows that go on
            thresholds[k] = cuts[k, 0 if change.min() >= 0 else change.argmin() + 1]
            ahead = torch.where(doubts[k] >= thresholds[k], ahead, losses[k])
        return thresholds

    if excess(torch.zeros(len(doubts))) <= 0:
        return given.new_zeros(len(doubts))
    highest = ((losses.max() - losses.min() + 1) / costs[1:].min()).item()  # at which going on never pays
    below, above = _bisect(lambda share: excess(at_price(highest * share)) > 0)
    dear, cheap = at_price(highest * above), at_price(highest * below)
    cheap = torch.minimum(cheap, dear) if excess(cheap) > 0 else torch.zeros_like(dear)
    share, _ = _bisect(lambda share: excess(dear.lerp(cheap, share)) <= 0)
    return torch.stack([_between(*each) for each in zip(given, dear.lerp(cheap, share), strict=True)])


def _between(doubts: Tensor, threshold: Tensor) -> Tensor:
    """Return a threshold that sends on the same rows, as far as can be from any: rounded, it still does."""
    going = doubts.double() >= threshold
    if not going.any():
        return doubts.max() * (1 + 1e-6) + torch.finfo(torch.float32).tiny
    above = doubts[going].min()
    if going.all():
        return torch.zeros_like(above)
    below = doubts[~going].max()
    middle = below + (above - below) / 2
    return torch.where(middle > below, middle, above)


def _bisect(holds: Callable[[float], bool]) -> tuple[float, float]:
    """Return neighbouring numbers in [0, 1] between which a condition that holds at 0 ceases to hold."""
    low, high = 0.0, 1.0
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low, high
