"""Log-laws of several lengths over their combinations."""

import math

import torch
from torch import Tensor

from pyro_vnd.distributions import OrderedMask
from pyro_vnd.distributions.nested import NestedLaw
from pyro_vnd.infer._conditional.layout import Lengths

__all__ = ["is_possible", "joint_prior", "marginals", "select", "with_floor"]

_RULED_OUT = -1e3  # in place of log 0, whose KL would be infinite: such a probability underflows to zero and stays
_FLOOR = 1e-6  # share of the uniform law in that of the lengths while training, so that none is without a gradient


def joint_prior(priors: list[OrderedMask | NestedLaw], like: Tensor) -> Tensor:
    """Return the log-law of independent lengths over their combinations, shape (..., combinations)."""
    joint = like.new_zeros(1)
    for prior in priors:
        law = prior.mask_law if isinstance(prior, NestedLaw) else prior
        joint = (joint.unsqueeze(-1) + law.logits.detach().clamp_min(_RULED_OUT).unsqueeze(-2)).flatten(-2)
    return joint


def is_possible(log_law: Tensor) -> Tensor:
    """Say which combinations a prior does not rule out; what is made of its log-law moves a little."""
    return log_law > 0.9 * _RULED_OUT


def marginals(lengths: list[Lengths], joint: Tensor) -> dict[str, OrderedMask]:
    """Return the law of each of some lengths from their joint log-law, shape (..., combinations)."""
    found = {}
    joint = joint.reshape(*joint.shape[:-1], *(each.num_units for each in lengths), 1)
    for i, each in enumerate(lengths):
        others = [j - len(lengths) - 1 for j in range(len(lengths) + 1) if j != i]
        found[each.name] = OrderedMask(logits=joint.logsumexp(others))
    return found


def with_floor(log_q: Tensor, possible: Tensor | None = None) -> Tensor:
    """Return a log-law with some probability for all lengths, or for all that the prior does not rule out."""
    floor = torch.full_like(log_q, math.log(_FLOOR / log_q.shape[-1]))
    if possible is not None:
        floor = torch.where(possible, floor, -torch.inf)
    return torch.logaddexp(log_q, floor).log_softmax(-1)


def select(log_q: Tensor, index: Tensor, dim: int) -> Tensor:
    """Return log_q at an index of one dimension; those before it broadcast with the index."""
    rest = log_q.shape[log_q.dim() + dim + 1 :]
    shape = torch.broadcast_shapes(log_q.shape[:dim], index.shape)
    place = index.expand(shape).reshape(*shape, 1, *(1 for _ in rest)).expand(*shape, 1, *rest)
    return log_q.expand(*shape, *log_q.shape[dim:]).gather(len(shape), place).squeeze(len(shape))
