"""Exact Kullback-Leibler divergences, found by `torch.distributions.kl_divergence` and `TraceMeanField_ELBO`."""

from itertools import product
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence, register_kl
from torch.distributions.utils import broadcast_all

from pyro_vnd._compat import recall
from pyro_vnd.distributions._fast.broadcast import broadcast_shapes
from pyro_vnd.distributions._fast.log_uniform import log_uniform_kl
from pyro_vnd.distributions._fast.normals import normal_kl
from pyro_vnd.distributions.lengths import LengthLaw
from pyro_vnd.distributions.masks import CutMask, OrderedMask, expectation
from pyro_vnd.distributions.mixtures import NestedMixture
from pyro_vnd.distributions.nested import NestedLaw, NestedNormal
from pyro_vnd.distributions.relaxed import RelaxedOrderedMask
from pyro_vnd.distributions.straight_through import OrderedMaskStraightThrough
from pyro_vnd.distributions.weights import Gated, LogScaleNormal, LogUniform


@register_kl(OrderedMask, OrderedMask)
def _kl_ordered_mask(q: OrderedMask, p: OrderedMask) -> Tensor:
    """Return sum_k q_k (log q_k - log p_k): straight-through masks are ordered masks too."""
    _check_units(q, p)
    difference = q._log_probs - p._log_probs
    if q._may_have_zeros or p._may_have_zeros:  # -inf - -inf only arises where q_k = 0, which counts nothing
        kl = expectation(q._probs, difference)
    else:
        kl = (q._probs * difference).sum(-1)
    return kl.expand(broadcast_shapes(q.batch_shape, p.batch_shape))


@register_kl(CutMask, CutMask)
def _kl_cut_mask(q: CutMask, p: CutMask) -> Tensor:
    """Return the same, for the laws that are random still alone where both are cut alike: nothing for the others."""
    if not q.given.are_those_of(p.given):
        return _kl_ordered_mask(q, p)
    kl = kl_divergence(q.random, p.random).unsqueeze(-1)
    return q.given.put(kl, kl.new_zeros(*q.batch_shape, 1)).squeeze(-1)


@register_kl(RelaxedOrderedMask, RelaxedOrderedMask)
def _kl_relaxed_ordered_mask(q: RelaxedOrderedMask, p: RelaxedOrderedMask) -> NoReturn:
    """Refuse: objectives then score draws in both laws, without a word."""
    raise NotImplementedError(
        "KL of two RelaxedOrderedMask: there is no closed form; estimate it by the mean of "
        "q.log_prob(z) - p.log_prob(z) over draws z = q.rsample((n,)), as the objectives of Pyro and NestedELBO do"
    )


@register_kl(RelaxedOrderedMask, OrderedMask)
@register_kl(OrderedMask, RelaxedOrderedMask)
def _kl_of_a_density_and_a_pmf(q: LengthLaw, p: LengthLaw) -> NoReturn:
    """Refuse, and not as what is not implemented: scores of draws would be no better."""
    raise ValueError(
        f"KL of {type(q).__name__} and {type(p).__name__}: a density of soft masks and probabilities of hard ones do "
        "not mix. Take RelaxedOrderedMask in both model and guide, or OrderedMask in the model and "
        "OrderedMaskStraightThrough in the guide"
    )


@register_kl(NestedNormal, NestedNormal)
def _kl_nested_normal(q: NestedNormal, p: NestedNormal) -> Tensor:
    """Return KL(L_q || L_p) + sum_i S_i KL(N_q,i || N_p,i): a coordinate costs only when it is kept."""
    lengths, coordinates = kl_parts(q, p)
    return lengths + coordinates


def kl_parts(q: NestedLaw, p: NestedLaw, value: Any = None) -> tuple[Tensor, Tensor]:
    """Return the two terms of the divergence, that of the lengths and that of the kept coordinates.

    From a mixture the latter is estimated by one draw: the exact one from a Normal with its moments, and the difference
    of the two scores of the draw, which varies little where q is narrow or the mixture is nearly Normal.

    Args:
        q: A law whose coordinates are independent.
        p: The same.
        value: A sample of q, where a coordinate of q or p is a mixture.
    """
    _check_units(q, p)
    lengths, weights, dense = kl_divergence(q.mask_law, p.mask_law), q.keep_probs, value
    if not (isinstance(q, NestedNormal) and isinstance(p, NestedNormal)):
        making = recall(value)
        dense = value if making is None else making[1]
        if making is None:  # what was dropped is not known, and must count nothing
            weights = q.mask_of(value)
    return lengths, expectation(weights, kl_of_coordinates(q, p, dense))


def kl_of_coordinates(q: NestedLaw, p: NestedLaw, dense: Any = None) -> Tensor:
    """Return the divergence of each uncut coordinate, as `kl_parts` does.

    Args:
        q: A law whose coordinates are independent.
        p: The same.
        dense: A draw of the uncut coordinates of q, where a coordinate of q or p is a mixture.

    Returns:
        Shape (..., K).
    """
    if not isinstance(q, NestedNormal):
        return q.densities(dense) - p.densities(dense)
    if isinstance(p, NestedNormal):
        return normal_kl(q.loc, q.scale, p.loc, p.scale)
    assert isinstance(p, NestedMixture)
    loc, scale, densities = p._terms_at(dense)
    return normal_kl(q.loc, q.scale, loc, scale) + (Normal(loc, scale, validate_args=False).log_prob(dense) - densities)


def _check_units(q: OrderedMask | NestedLaw, p: OrderedMask | NestedLaw) -> None:
    if q.num_units != p.num_units:
        raise ValueError(f"KL of masks over different numbers of units: {q.num_units} and {p.num_units}")


@register_kl(Gated, Gated)
def _kl_gated(q: Gated, p: Gated) -> Tensor:
    """Return sum_e g_e KL(q_e || p_e), with the gate of q; not implemented where that of the bases is not."""
    if q.event_shape != p.event_shape:
        raise ValueError(f"KL of arrays of different shapes: {tuple(q.event_shape)} and {tuple(p.event_shape)}")
    batch_shape = broadcast_shapes(q.batch_shape, p.batch_shape)
    base: Any = q.base
    if q.gate is None and base.batch_shape == q.event_shape and getattr(base, "prior", None) is p.base:
        kl = base.kl_from_prior  # computed beside the draw
    else:
        terms = _kl_of_entries(base, p.base)
        kl = q.sum_over_event(terms.expand(broadcast_shapes(terms.shape, q.event_shape)), q.gate)
    return kl if kl.shape == batch_shape else kl.expand(batch_shape)


def _kl_of_entries(q: Any, p: Any) -> Tensor:
    if isinstance(q, Normal) and isinstance(p, Normal) and not isinstance(q, LogScaleNormal):
        parts = broadcast_all(q.loc, q.scale, p.loc, p.scale)
        if len({part.dtype for part in parts}) == 1:
            return normal_kl(*parts)  # torch's own is infinite where the square of a ratio is no number any more
    return kl_divergence(q, p)


@register_kl(LogScaleNormal, Normal)
def _kl_log_scale_normal(q: LogScaleNormal, p: Normal) -> Tensor:
    r"""Return $(\sigma^2 + (\mu - m)^2) / 2 s^2 - \rho + \log s - 1/2$, entry by entry; ρ is as given, not log σ."""
    terms = (q.variance + (q.loc - p.loc).square()) * (0.5 / p.scale.square())
    return terms - q.log_scale + (p.scale.log() - 0.5)


@register_kl(Normal, LogUniform)
def _kl_normal_log_uniform(q: Normal, p: LogUniform) -> Tensor:
    """Return E log|m + eps| - E log|eps|, m = loc / scale; half precision is computed in float32."""
    dtype = torch.promote_types(q.loc.dtype, torch.float32)
    kl = log_uniform_kl(q.loc.to(dtype), q.scale.to(dtype))
    return kl.expand(broadcast_shapes(q.batch_shape, p.batch_shape))


def _look_up() -> None:
    """Have torch find each divergence once, which it then keeps: how it looks for one, `torch.compile` cannot trace."""
    one = torch.ones(1)
    masks = [OrderedMask(logits=one), OrderedMaskStraightThrough(1.0, logits=one), OrderedMask(logits=one).cut(1)]
    weights = LogScaleNormal(one[0], one[0])
    others = [(law, law) for law in (NestedNormal(one, one, one), weights, Gated(weights))]
    for q, p in [*product(masks, masks), *others, (weights, LogUniform())]:
        kl_divergence(q, p)


_look_up()
