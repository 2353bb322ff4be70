"""Soft masks, nested vectors and weights that nobody wrote down, against their definition in wider numbers."""

import math

import mpmath
import numpy as np
import oracles
import torch
from cases import CASES
from hypothesis import assume, example, given
from hypothesis import strategies as st
from random_laws import DTYPES, assert_near, lengths
from torch.distributions import Normal, kl_divergence

from pyro_vnd.distributions import Gated, LogUniform, NestedNormal, RelaxedOrderedMask
from pyro_vnd.distributions.weights import LogScaleNormal

NESTED = [case for case in CASES if case.cls is NestedNormal]
HALF_LOG_2PI = np.log(2 * np.longdouble(math.pi)) / 2
locs = st.one_of(st.floats(-3, 3, width=32), st.floats(-1e4, 1e4, width=32))
log_scales = st.one_of(st.floats(-2, 2, width=32), st.floats(-20, 10, width=32))


@st.composite
def arrays(draw, numbers, shape, dtype):
    count = math.prod(shape)
    found = draw(st.lists(numbers, min_size=count, max_size=count))
    return torch.tensor(found, dtype=torch.float64).reshape(shape).to(dtype)


@given(lengths(name="logits", dtypes=DTYPES, most=40), st.floats(0.0625, 16, width=32), st.integers(0, 9))
def test_densities_of_soft_masks(given_, temperature, seed):
    torch.manual_seed(seed)
    law = RelaxedOrderedMask(temperature, logits=given_.values)
    value = law.sample()  # which does not remember how it was made
    num_units, log_probs, tau = value.shape[-1], given_.log_probs, np.longdouble(temperature)
    wide = oracles.wide(value)
    one_hot = wide - np.concatenate([wide[..., 1:], np.zeros_like(wide[..., :1])], -1)
    logs = np.log(np.maximum(one_hot, torch.finfo(value.dtype).tiny))
    scaled = log_probs - tau * logs
    top = scaled.max(-1, keepdims=True, initial=-np.inf)
    normaliser = (top + np.log(np.exp(scaled - top).sum(-1, keepdims=True)))[..., 0]
    wanted = (scaled - logs).sum(-1) - num_units * normaliser + math.lgamma(num_units) + (num_units - 1) * np.log(tau)
    size = (
        (given_.steps + (tau + 1) * np.abs(logs)).sum(-1)
        + num_units * (np.abs(normaliser) + given_.steps.max(-1, initial=1))
        + 10 * num_units
    )
    assert_near(law.log_prob(value.clone()), wanted, 4 * given_.rounding * size)


@st.composite
def nested_laws(draw, given_):
    """Arguments of a nested Normal with these lengths."""
    shape = given_.values.shape
    parts = {
        "loc": draw(arrays(locs, shape, given_.dtype)),
        "scale": draw(arrays(log_scales, shape, given_.dtype)).exp(),
    }
    return parts


def normal_log_prob(value, loc, scale):
    return -0.5 * ((value - loc) / scale) ** 2 - np.log(scale) - HALF_LOG_2PI


@given(st.sampled_from(NESTED[:2]), lengths(dtypes=DTYPES, most=6), st.data())
def test_nested_normals(case, given_, data):
    arguments = data.draw(nested_laws(given_))
    law = given_.of(case, **arguments)
    shape, rounding = given_.values.shape, given_.rounding
    torch.manual_seed(data.draw(st.integers(0, 9)))
    value = law.sample().clone()
    x, loc, scale = oracles.wide(value), *(oracles.wide(arguments[name]) for name in ("loc", "scale"))
    mask = oracles.tails(x != 0) > 0
    mask[..., 0] = True
    at = mask.sum(-1, keepdims=True) - 1
    length_score = np.take_along_axis(given_.log_probs, at, -1)[..., 0]
    terms = np.where(mask, normal_log_prob(x, loc, scale), 0)
    # A distance is rounded before it is divided by the deviation.
    off = np.where(
        mask, 1 + np.abs(terms) + np.abs(np.log(scale)) + np.abs(x - loc) / scale**2 * (np.abs(x) + np.abs(loc)), 0
    )
    steps = np.take_along_axis(given_.steps, at, -1)[..., 0]
    assert_near(law.log_prob(value), length_score + terms.sum(-1), rounding * (steps + off.sum(-1)))

    keep, keep_off = (
        oracles.tails(given_.probs),
        rounding * oracles.tails(given_.probs) + oracles.tails(given_.off) + given_.tiny,
    )
    assert_near(law.mean, keep * loc, (keep_off + rounding * keep) * np.abs(loc) + given_.tiny)
    below, below_off = oracles.heads(given_.probs), oracles.heads(given_.off) + given_.tiny
    variance = keep * scale**2 + keep * below * loc**2
    allowed = keep_off * scale**2 + (keep_off * below + keep * below_off) * loc**2 + rounding * variance + given_.tiny
    assert_near(law.variance, variance, 4 * allowed)
    entropies = 0.5 + HALF_LOG_2PI + np.log(scale)
    entropy = -oracles.mean_of(given_.log_probs, given_.log_probs) + (keep * entropies).sum(-1)
    size = (given_.off * given_.steps).sum(-1) + (keep_off * np.abs(entropies)).sum(-1)
    size = size + rounding * (1 + np.abs(entropy) + (keep * (1 + np.abs(np.log(scale)))).sum(-1))
    assert_near(law.entropy(), entropy, size + 1e4 * given_.tiny)
    assert law.batch_shape + law.event_shape == shape


@given(lengths(dtypes=DTYPES, most=6), st.data())
def test_divergences_of_nested_normals(given_, data):
    shape, rounding = given_.values.shape, given_.rounding
    other = data.draw(lengths(name="logits", dtypes=[given_.dtype], shapes=[shape[:-1]], num_units=shape[-1]))
    q, p = (data.draw(nested_laws(each)) for each in (given_, other))
    kl = kl_divergence(given_.of(NESTED[1 if given_.name == "probs" else 0], **q), other.of(NESTED[0], **p))
    (q_loc, q_scale), (p_loc, p_scale) = ((oracles.wide(x["loc"]), oracles.wide(x["scale"])) for x in (q, p))
    ratio, distance = q_scale / p_scale, (q_loc - p_loc) / p_scale
    terms = (ratio**2 + distance**2 - 1) / 2 - np.log(ratio)
    keep, keep_off = oracles.tails(given_.probs), oracles.tails(given_.off) + given_.tiny
    largest = torch.finfo(given_.dtype).max ** 0.9
    assume((np.abs(terms) < largest).all())
    difference = np.where(given_.probs == 0, 0, given_.log_probs - other.log_probs)
    wanted = (given_.probs * difference).sum(-1) + (keep * terms).sum(-1)
    apart = (
        np.abs(distance) / p_scale * (np.abs(q_loc) + np.abs(p_loc))
    )  # locations are rounded before their difference
    size = ratio**2 + distance**2 + 1 + np.abs(np.log(ratio)) + apart
    allowed = (given_.off * np.abs(difference)).sum(-1) + 1e5 * given_.tiny
    allowed = allowed + (given_.probs * rounding * (given_.steps + other.steps)).sum(-1)
    allowed = allowed + ((keep_off + rounding * keep) * size).sum(-1) + rounding * np.abs(wanted)
    assert_near(kl, wanted, allowed)


@given(st.sampled_from(DTYPES), st.sampled_from([(), (3,), (2, 2), (0,), (2, 0)]), st.data())
def test_gated_weights(dtype, shape, data):
    loc, log_scale, value = (data.draw(arrays(each, shape, dtype)) for each in (locs, log_scales, locs))
    gate = data.draw(arrays(st.one_of(st.floats(0, 1, width=32), st.sampled_from([0.0, 1.0])), shape, dtype))
    m, s = data.draw(locs), math.exp(data.draw(st.floats(-5, 5)))
    prior = Normal(torch.tensor(m, dtype=dtype), torch.tensor(s, dtype=dtype))
    q = Gated(LogScaleNormal(loc, log_scale), gate=gate, rest=prior)
    p = Gated(prior, torch.Size(shape))
    rounding = (8 + math.sqrt(math.prod(shape))) * torch.finfo(dtype).eps
    loc, rho, x, g = map(oracles.wide, (loc, log_scale, value, gate))
    m, s = oracles.wide(prior.loc), oracles.wide(prior.scale)
    scale = np.exp(rho)
    first, second = normal_log_prob(x, loc, scale), normal_log_prob(x, m, s)
    wanted = (np.where(g > 0, g * first, 0) + np.where(g < 1, (1 - g) * second, 0)).sum()
    off = g * (1 + np.abs(rho)) * (1 + np.abs(first)) + g * np.abs(x - loc) / scale**2 * (np.abs(x) + np.abs(loc))
    off = off + (1 - g) * (1 + np.abs(second) + np.abs(np.log(s)) + np.abs(x - m) / s**2 * (np.abs(x) + np.abs(m)))
    assert_near(q.log_prob(value), np.asarray(wanted), 8 * rounding * (1 + off.sum()))
    terms = (scale**2 + (loc - m) ** 2) / (2 * s**2) - rho + np.log(s) - 0.5
    size = (
        scale**2 / s**2 * (1 + np.abs(rho))
        + np.abs(loc - m) * (np.abs(loc) + np.abs(m)) / s**2
        + np.abs(rho)
        + np.abs(np.log(s))
        + 1
    )
    assert_near(kl_divergence(q, p), np.asarray((g * terms).sum()), 8 * rounding * (1 + (g * size).sum()))


def log_uniform_kl(m):
    """E log|m + eps| - E log|eps| = m^2/2 2F2(1, 1; 3/2, 2; -m^2/2), by mpmath; far off, log|m| and its series."""
    square = mpmath.mpf(m) ** 2
    if square > 1e4:
        return mpmath.log(square) / 2 + (mpmath.euler + mpmath.log(2)) / 2 - 1 / (2 * square) - 3 / (4 * square**2)
    return square / 2 * mpmath.hyp2f2(1, 1, 1.5, 2, -square / 2)


@given(st.sampled_from(DTYPES), st.floats(-12, 12), st.floats(-20, 20), st.booleans())
@example(torch.float64, 0.0, 0.0, False)
def test_divergences_from_the_log_uniform(dtype, log_ratio, log_scale, minus):
    scale = torch.tensor(math.exp(log_scale), dtype=dtype)
    loc = scale * (-1 if minus else 1) * torch.tensor(10.0**log_ratio, dtype=dtype)
    loc.requires_grad_()
    kl = kl_divergence(Normal(loc, scale), LogUniform())
    kl.backward()
    ratio = mpmath.mpf(loc.item()) / mpmath.mpf(scale.item())
    wanted = log_uniform_kl(ratio)
    claimed = 1e-11 if dtype == torch.float64 else 0
    relative = claimed + 200 * torch.finfo(dtype).eps
    assert abs(kl.item() - wanted) <= relative * wanted
    slope = (
        mpmath.sqrt(2) * mpmath.sqrt(mpmath.pi) / 2 * mpmath.exp(-(ratio**2) / 2) * mpmath.erfi(ratio / mpmath.sqrt(2))
        if abs(ratio) < 1e3
        else 1 / ratio + ratio**-3
    )
    assert abs(loc.grad.item() * scale.item() - slope) <= (20 * claimed + 400 * torch.finfo(dtype).eps) * abs(slope)
