"""The divergence of an array of Normals from one Normal: all that a net's weights add to a training step."""

from typing import Any

from torch import Tensor
from torch.distributions import Normal

from pyro_vnd.distributions.weights import Gated, LogScaleNormal

__all__ = ["gated_normal_kl", "plain_gated_normal_kl"]


def gated_normal_kl(q: Gated, p: Normal) -> Tensor:
    r"""Sum $(\sigma^2 + (\mu - m)^2) / 2 s^2 - \log \sigma + \log s - 1/2$ over an array, with its gate.

    Args:
        q: Its base is Normal.
        p: Normals that broadcast to the event of q.

    Returns:
        Nats, shape ().
    """
    normal: Any = q.base
    if isinstance(normal, LogScaleNormal) and normal.prior is p and q.gate is None and normal.batch_shape == q.event_shape:
        return normal.kl_from_prior
    return plain_gated_normal_kl(q, p)


def plain_gated_normal_kl(q: Gated, p: Normal) -> Tensor:
    """Do what `gated_normal_kl` does, entry by entry."""
    normal: Any = q.base
    logs = normal.log_scale if isinstance(normal, LogScaleNormal) else normal.scale.log()
    terms = (normal.variance + (normal.loc - p.loc).square()) * (0.5 / p.scale.square())
    terms = terms - logs + (p.scale.log() - 0.5)
    return q.sum_over_event(terms.expand(q.event_shape), q.gate)
