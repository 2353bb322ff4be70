"""Numbers below the smallest normal one: divergences have the value of more digits, and every slope is finite.

A slope of 1 / x overflows there, and has then the right sign; all others are those of more digits, unless they come
with one that overflows.
"""

from itertools import product

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from pyro_vnd.distributions import Gated, LogUniform, NestedNormal, OrderedMask, OrderedMaskStraightThrough
from pyro_vnd.distributions.weights import LogScaleNormal

SUB, TINY = torch.finfo(torch.float32).tiny / 1024, torch.finfo(torch.float32).tiny
LOCS = [0.0, SUB, -SUB, TINY, 1.0, -1.0]
SCALES = [SUB, TINY / 2, TINY, 1e-10, 1.0]
LOG_SCALES = [-1000.0, -104.0, -92.0, -80.0, 0.0]
Q = [[SUB, 1.0, 1.0], [1.0, SUB, 0.0], [SUB, 2 * SUB, SUB], [TINY, 1.0, SUB]]
P = [[1.0, 1.0, 1.0], [1.0, SUB, SUB], [SUB, TINY, 1.0], [SUB, SUB, 3 * SUB]]


def nested(loc, scale):
    return NestedNormal(torch.stack([loc, loc]), torch.stack([scale, scale]), torch.zeros(2).to(loc))


def standard(like):
    return Normal(torch.zeros(()).to(like), torch.ones(()).to(like))


def gated_kl(loc, scale, gate):
    return kl_divergence(Gated(Normal(loc, scale), gate=gate), Gated(standard(loc), ()))


DIVERGENCES = {
    "masks": (lambda q, p: kl_divergence(OrderedMask(probs=q), OrderedMask(probs=p)), (Q, P)),
    "straight-through": (
        lambda q, p: kl_divergence(OrderedMaskStraightThrough(0.2, probs=q), OrderedMask(probs=p)),
        (Q, P),
    ),
    "tilted": (lambda q, p: kl_divergence(OrderedMask(probs=q).tilt(1.0), OrderedMask(probs=p)), (Q, P)),
    "nested": (lambda m, s, t: kl_divergence(nested(m, s), nested(0 * m, t)), (LOCS, SCALES, [1e-10, 1.0])),
    "narrow prior": (lambda s, t: kl_divergence(nested(0 * s, s), nested(0 * s, t)), ([SUB], [SUB, TINY])),
    "gated": (gated_kl, (LOCS, SCALES, [0.0, 1.0])),
    "log-uniform": (lambda m, s: kl_divergence(Normal(m, s), LogUniform()), (LOCS, SCALES)),
    "log scales": (lambda m, r: kl_divergence(LogScaleNormal(m, r), standard(m)), (LOCS, LOG_SCALES)),
    "log scales, log-uniform": (lambda m, r: kl_divergence(LogScaleNormal(m, r), LogUniform()), (LOCS, LOG_SCALES)),
}


def with_slopes(divergence, arguments, dtype):
    given = [torch.tensor(x, dtype=torch.float32).to(dtype).requires_grad_() for x in arguments]
    value = divergence(*given)
    return value.detach(), torch.autograd.grad(value, given)


@pytest.mark.parametrize(("divergence", "spaces"), DIVERGENCES.values(), ids=DIVERGENCES)
def test_values_and_slopes(divergence, spaces):
    for arguments in product(*spaces):
        value, slopes = with_slopes(divergence, arguments, torch.float32)
        exact, exact_slopes = with_slopes(divergence, arguments, torch.float64)
        if arguments[-1] not in (-1000.0, -104.0):  # of which little is left in single precision
            torch.testing.assert_close(value.double(), exact, rtol=2e-5, atol=1e-5)
        for slope, expected in zip(slopes, exact_slopes, strict=True):
            assert slope.isfinite().all(), arguments
            large = expected.abs() > 1e30
            assert (slope.sign() == expected.sign())[large].all(), arguments
            if not large.any() and arguments[-1] not in (-1000.0, -104.0, -92.0):
                torch.testing.assert_close(slope.double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("divergence", "spaces"), DIVERGENCES.values(), ids=DIVERGENCES)
def test_slopes_in_double_precision(divergence, spaces):
    """The same distances from its own smallest normal number."""
    factor = torch.finfo(torch.float64).tiny / TINY
    near = {x: x * factor for x in (SUB, -SUB, 2 * SUB, 3 * SUB, TINY, TINY / 2)} | {-104.0: -746.0, -92.0: -720.0}

    def moved(x):
        return [near.get(each, each) for each in x] if isinstance(x, list) else near.get(x, x)

    for arguments in product(*spaces):
        given = [torch.tensor(moved(x), dtype=torch.float64, requires_grad=True) for x in arguments]
        value = divergence(*given)
        assert value.isfinite()
        assert all(slope.isfinite().all() for slope in torch.autograd.grad(value, given)), arguments
