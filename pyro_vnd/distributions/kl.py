"""Exact Kullback-Leibler divergences, found by `torch.distributions.kl_divergence` and `TraceMeanField_ELBO`."""

from torch import Tensor
from torch.distributions import kl_divergence, register_kl

from pyro_vnd.distributions._fast.normal_kl import normal_kl
from pyro_vnd.distributions._fast.shapes import broadcast_shapes
from pyro_vnd.distributions.masks import OrderedMask, expectation
from pyro_vnd.distributions.nested import NestedNormal


@register_kl(OrderedMask, OrderedMask)
def _kl_ordered_mask(q: OrderedMask, p: OrderedMask) -> Tensor:
    """Return sum_k q_k (log q_k - log p_k): straight-through masks are ordered masks too."""
    _check_units(q, p)
    if q._cut is not None and q._cut.is_that_of(p._cut):  # nothing where both have the same length
        kl = kl_divergence(q._random, p._random).unsqueeze(-1)
        return q._cut.put(kl, kl.new_zeros(*q.batch_shape, 1)).squeeze(-1)
    # -inf - -inf only arises where q_k = 0, which counts nothing.
    log_ratio = q._log_probs - p._log_probs
    kl = expectation(q._probs, log_ratio)
    return kl.expand(broadcast_shapes(q.batch_shape, p.batch_shape))


@register_kl(NestedNormal, NestedNormal)
def _kl_nested_normal(q: NestedNormal, p: NestedNormal) -> Tensor:
    """Return KL(L_q || L_p) + sum_i S_i KL(N_q,i || N_p,i): a coordinate costs only when it is kept."""
    lengths, coordinates = kl_parts(q, p)
    return lengths + coordinates


def kl_parts(q: NestedNormal, p: NestedNormal) -> tuple[Tensor, Tensor]:
    """Return the two terms of the divergence, that of the lengths and that of the kept coordinates."""
    _check_units(q, p)
    return kl_divergence(q.mask_law, p.mask_law), (q.keep_probs * normal_kl(q.loc, q.scale, p.loc, p.scale)).sum(-1)


def _check_units(q: OrderedMask | NestedNormal, p: OrderedMask | NestedNormal) -> None:
    if q.num_units != p.num_units:
        raise ValueError(f"KL of masks over different numbers of units: {q.num_units} and {p.num_units}")
