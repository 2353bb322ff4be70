"""Laws of lengths that nobody wrote down, against their definition in wider numbers."""

import math
from contextlib import nullcontext, suppress
from dataclasses import replace

import numpy as np
import oracles
import pytest
import torch
from cases import HARD_CASES, MASK_CASES
from hypothesis import assume, example, given
from hypothesis import strategies as st
from random_laws import DTYPES, Lengths, assert_near, lengths
from torch.distributions import kl_divergence

from pyro_vnd.distributions import OrderedMask

EXACT = MASK_CASES[0]
FEW = 6


def masks_of(length, num_units, like):
    return (torch.arange(1, num_units + 1) <= length.unsqueeze(-1)).to(like)


@given(st.sampled_from(MASK_CASES), lengths())
@example(EXACT, Lengths("logits", torch.linspace(-30, 30, 1_000_000, dtype=torch.float32)))
@example(EXACT, Lengths("probs", torch.tensor([1.4013e-45, 1.3843e267], dtype=torch.float64)))
def test_what_is_known_of_lengths(case, given_):
    law, log_probs, probs, off, steps = given_.of(case), given_.log_probs, given_.probs, given_.off, given_.steps
    rounding, tiny, shape = given_.rounding, given_.tiny, given_.values.shape
    num_units = shape[-1]
    assert (law.batch_shape, law.event_shape, law.num_units) == (shape[:-1], shape[-1:], num_units)
    assert law.probs.dtype == law.logits.dtype == law.mean_length.dtype == given_.dtype
    assert_near(law.probs, probs, off + tiny)
    assert_near(law.logits, log_probs, rounding * steps)

    keep, below, below_off = oracles.tails(probs), oracles.heads(probs), oracles.heads(off)
    keep_off = rounding * keep + oracles.tails(off) + tiny
    assert_near(law.keep_probs, keep, keep_off)
    assert ((law.keep_probs >= 0) & (law.keep_probs <= 1)).all()
    assert (law.keep_probs.diff() <= 0).all()

    units = np.arange(1, num_units + 1, dtype=np.longdouble)
    mean = (probs * units).sum(-1)
    mean_off = rounding * mean + (off * units).sum(-1) + num_units * tiny
    assert_near(law.mean_length, mean, mean_off)
    squares = (probs * (units - mean[..., None]) ** 2).sum(-1)
    squares_off = (
        rounding * squares + (off * (units - mean[..., None]) ** 2).sum(-1) + mean_off**2 + num_units**2 * tiny
    )
    # Of a square root: small squares may be off by more than they are.
    spread_off = np.minimum(np.sqrt(squares_off), squares_off / np.sqrt(squares + tiny))
    assert_near(law.stddev_length, np.sqrt(squares), spread_off + rounding * np.sqrt(squares))
    if case.entropy:
        entropy_off = (off * steps).sum(-1) + rounding + 1e4 * tiny
        assert_near(law.entropy(), -oracles.mean_of(log_probs, log_probs), entropy_off)
    if case.moments:
        assert_near(law.mean, keep, keep_off)
        variance_off = keep_off * below + keep * (below_off + rounding * below) + tiny
        assert_near(law.variance, keep * below, variance_off)
    if num_units <= FEW and case.hard:
        assert_near(law.covariance_matrix, *_covariance(keep, keep_off))


def _covariance(keep, off):
    """S_max(i,j) - S_i S_j, and what it may be off."""
    rows, columns = keep[..., None], keep[..., None, :]
    return np.minimum(rows, columns) - rows * columns, 2 * (off[..., None] + off[..., None, :])


@given(st.sampled_from(HARD_CASES), lengths(), st.data())
def test_scores_of_masks(case, given_, data):
    law, num_units = given_.of(case), given_.values.shape[-1]
    sample_shape = data.draw(st.sampled_from([(), (2,), (0,)]))
    shape = sample_shape + law.batch_shape
    torch.manual_seed(data.draw(st.integers(0, 99)))
    length = torch.randint(1, num_units + 1, shape)
    scores = law.log_prob(masks_of(length, num_units, law.probs))
    at = np.broadcast_to(length.numpy()[..., None] - 1, (*shape, 1))
    log_probs, steps = (np.broadcast_to(x, (*shape, num_units)) for x in (given_.log_probs, given_.steps))
    pick = [np.take_along_axis(x, at, -1)[..., 0] for x in (log_probs, steps)]
    assert_near(scores, pick[0], given_.rounding * pick[1])


GRADIENTS = {  # functions of a law and of numbers by length, and v_k in the gradient p_k (v_k - E v) by a logit
    "entropy": (lambda law, c: law.entropy(), lambda log_probs, c: -log_probs),
    "divergence": (
        lambda law, c: kl_divergence(law, OrderedMask(logits=c)),
        lambda log_probs, c: log_probs - oracles.log_probs_of(torch.as_tensor(c.astype(float)), True),
    ),
    "mean length": (lambda law, c: law.mean_length, lambda log_probs, c: np.arange(1.0, 1 + log_probs.shape[-1])),
    "keep probabilities": (lambda law, c: law.keep_probs @ c, lambda log_probs, c: np.cumsum(c, -1)),
}


@given(st.sampled_from(HARD_CASES), lengths(dtypes=DTYPES, most=3000), st.sampled_from([*GRADIENTS]), st.integers(0, 9))
@example(EXACT, Lengths("logits", torch.linspace(-40, 40, 20, dtype=torch.float32)), "mean length", 0)
def test_gradients_to_the_lengths(case, given_, name, seed):
    function, values = GRADIENTS[name]
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(given_.values.shape[-1], generator=generator, dtype=given_.dtype)
    leaf = given_.values.clone().requires_grad_()
    function(Lengths(given_.name, leaf).of(case), weights).sum().backward()
    log_probs, probs, steps = given_.log_probs, given_.probs, given_.steps
    v = np.where(probs == 0, 0, values(log_probs, oracles.wide(weights)))
    size = np.abs(v)
    wanted = probs * (v - (probs * v).sum(-1, keepdims=True))
    allowed = given_.off * (size + (probs * size).sum(-1, keepdims=True) + 1)
    allowed = (
        allowed
        + probs * ((given_.off * (1 + size)).sum(-1, keepdims=True) + given_.rounding * steps)
        + given_.tiny * (1 + size)
    )
    if given_.name == "probs":
        weight = oracles.wide(given_.values)
        possible = weight > 0
        weight = np.where(possible, weight, 1)
        wanted, allowed = np.where(possible, wanted, 0) / weight, np.where(possible, allowed / weight, np.inf)
    representable = np.abs(wanted) < torch.finfo(given_.dtype).max / 1e3
    assert_near(leaf.grad, np.where(representable, wanted, 0), np.where(representable, allowed, np.inf))


@given(st.sampled_from(HARD_CASES), st.sampled_from(HARD_CASES), st.data())
def test_divergences(q_case, p_case, data):
    q_given = data.draw(lengths())
    num_units = q_given.values.shape[-1]
    shapes = [q_given.values.shape[:-1], (), (1,)]
    p_given = data.draw(lengths(dtypes=[q_given.values.dtype], shapes=shapes, num_units=num_units))
    kl = kl_divergence(q_given.of(q_case), p_given.of(p_case))
    log_q, log_p, probs = q_given.log_probs, p_given.log_probs, q_given.probs
    with np.errstate(invalid="ignore"):
        difference = np.where(probs == 0, 0, log_q - log_p)
    # Where q is less than numbers are small, it is taken to be zero.
    assume(not (np.isinf(difference) & (probs < 1e3 * torch.finfo(q_given.dtype).tiny)).any())
    wanted = (probs * difference).sum(-1)
    allowed = (q_given.off * np.abs(difference)).sum(-1) + 1e5 * q_given.tiny
    allowed = allowed + (probs * (q_given.rounding * q_given.steps + p_given.rounding * p_given.steps)).sum(-1)
    assert_near(kl, wanted, allowed + q_given.rounding * np.abs(wanted))
    assert not kl.isnan().any()


@given(st.sampled_from(HARD_CASES), lengths("logits", DTYPES, most=40), st.integers(0, 34), st.floats(0.01, 0.99))
@example(EXACT, Lengths("logits", torch.tensor([1e4, -1e4, 0.0])), 15, 0.5)
def test_a_mean_length_is_met_or_refused(case, given_, power, share):
    num_units, logits = given_.values.shape[-1], given_.values * 10.0**power
    assume(num_units > 1 and bool(logits.isfinite().all()))
    law, mean_length = replace(given_, values=logits).of(case), 1 + share * (num_units - 1)
    # It may be refused where numbers do not hold its price.
    with suppress(ValueError) if (logits.abs() > 1e12).any() else nullcontext():
        met = law.at_mean_length(mean_length).mean_length
        assert_near(met, np.full(law.batch_shape, mean_length), 2e-4 * num_units)


@given(st.sampled_from([1, 2, 3, 50, 10_000]), st.floats(0, 1, exclude_min=True, exclude_max=True))
@example(1_000_000, 0.999999)
@example(1_000_000, 1 - 2**-53)
@example(3, 5e-324)
def test_geometric_lengths(num_units, p):
    law = OrderedMask.geometric(p, num_units)
    keep = np.longdouble(p)
    log_probs = np.arange(num_units) * np.log(keep) + np.append(np.full(num_units - 1, np.log1p(-keep)), 0)
    logit = abs(math.log(p) - math.log1p(-p))
    # The same number is added again and again, and rounded the same way each time.
    rounding = (8 + num_units) * torch.finfo(torch.float64).eps * (1 + logit)
    assert_near(law.logits, log_probs, rounding * (1 + np.abs(log_probs)))
    mean = num_units if keep == 1 else (1 - keep**num_units) / (1 - keep)
    assert_near(law.mean_length, mean, rounding * mean * 8)


@given(st.sampled_from(MASK_CASES), lengths(), st.sampled_from([(), (2,), (0,), (3, 1)]), st.integers(0, 99))
def test_draws(case, given_, sample_shape, seed):
    """Of the shape, type and support; of possible lengths; and those of the expanded law have the expanded shape."""
    law, num_units = given_.of(case), given_.values.shape[-1]
    torch.manual_seed(seed)
    assume(math.prod(sample_shape) * law.batch_shape.numel() * num_units <= 400_000)
    draws = law.sample(sample_shape)
    assert draws.shape == sample_shape + law.batch_shape + law.event_shape
    assert draws.dtype == given_.dtype
    assert law.support.check(draws).all()
    if case.hard:
        assert law.log_prob(draws).isfinite().all()  # the length is possible
        assert torch.equal(draws, draws.round())
    larger = law.expand((2, *law.batch_shape))
    assert larger.sample(sample_shape).shape == (*sample_shape, 2, *law.batch_shape, num_units)
    assert torch.equal(larger.logits, law.logits.expand(2, *law.logits.shape))
    score = larger.log_prob(law.sample())
    assert torch.equal(score, score[:1].expand_as(score))


def drawn_lengths(law, count):
    """Lengths of draws; of soft masks the one that weighs most, which has the same law at every temperature."""
    draws = (law.rsample if law.has_rsample else law.sample)((count,))
    one_hot = draws - torch.nn.functional.pad(draws[..., 1:], (0, 1))
    return masks_of(one_hot.argmax(-1) + 1, law.num_units, draws)


@given(st.sampled_from(MASK_CASES), lengths(shapes=[()], most=40), st.integers(0, 9))
def test_draws_have_the_law(case, given_, seed):
    """Of a true law such a p-value comes once in a hundred million cases."""
    law = given_.of(case, **({"temperature": 0.5} if "temperature" in {**case.batch, **case.options} else {}))
    torch.manual_seed(seed)
    probs = torch.as_tensor(given_.probs.astype(float))
    assert oracles.law_pvalue(drawn_lengths(law, 20_000), probs) > 1e-8


@given(st.sampled_from(HARD_CASES), lengths(shapes=[(), (2,), (0,)], most=3000), st.data())
def test_laws_at_a_price(case, given_, data):
    num_units, log_probs = given_.values.shape[-1], given_.log_probs
    price = data.draw(st.one_of(st.floats(-3, 3), st.floats(-1e6, 1e6)))
    law = given_.of(case).tilt(price)
    scores = log_probs - price * np.arange(num_units)
    scores = scores - scores.max(-1, keepdims=True)
    wanted = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
    finite = np.where(np.isinf(wanted), 0, np.abs(wanted))
    double = 16 * torch.finfo(torch.float64).eps * abs(price) * num_units
    assert_near(law.logits, wanted, given_.rounding * (given_.steps + finite) + double)


@given(lengths(name="logits", dtypes=DTYPES, shapes=[(), (2,)], most=3000), st.floats(0.001, 0.999))
def test_the_price_of_a_mean_length(given_, share):
    num_units = given_.values.shape[-1]
    assume(num_units > 1)
    mean = 1 + share * (num_units - 1)
    law = OrderedMask(logits=given_.values).at_mean_length(mean)
    # Each probability is off by as many steps as its logit is large.
    logits = np.where(law.probs.numpy() == 0, 0, np.abs(oracles.wide(law._param)))
    deviation = np.abs(np.arange(1, num_units + 1) - mean)
    largest = given_.steps.max()  # the logits given are rounded, and the price is as large as they are
    off = 4 * given_.rounding * (oracles.wide(law.probs) * (1 + logits) * deviation).sum(-1)
    assert_near(
        law.mean_length, np.full(law.batch_shape, mean), off + given_.rounding * mean + largest * 1e-13 * num_units
    )


@given(st.sampled_from(HARD_CASES), lengths(most=3000), st.data())
def test_laws_cut_to_lengths(case, given_, data):
    base, num_units = given_.of(case), given_.values.shape[-1]
    count = base.batch_shape.numel()
    given_lengths = data.draw(st.lists(st.integers(0, num_units), min_size=count, max_size=count))
    length = torch.tensor(given_lengths, dtype=torch.long).reshape(base.batch_shape)
    law, is_given = base.cut(length), length.numpy() > 0
    at = masks_of(length.clamp_min(1), num_units, base.probs)
    log_probs = np.where(
        is_given[..., None],
        np.where(np.arange(1, num_units + 1) == length.numpy()[..., None], 0, -np.inf),
        given_.log_probs,
    )
    assert_near(law.logits, log_probs, given_.rounding * given_.steps)
    for draws in (law.sample(), law.sample((2,))):
        assert torch.equal(draws[..., length > 0, :], at.expand_as(draws)[..., length > 0, :])
        assert law.support.check(draws).all()
    wanted = -oracles.mean_of(log_probs, log_probs)
    assert_near(law.entropy(), wanted, (given_.off * given_.steps).sum(-1) + given_.rounding + 1e4 * given_.tiny)
    assert_near(kl_divergence(law, base.cut(length)), np.zeros(base.batch_shape), 0)
    assert (law.log_prob(at)[length > 0] == 0).all()


WRONG = {
    "a temperature that is 5 % off": lambda logits: OrderedMask(logits=1.05 * logits),
    "weights taken for logits": lambda logits: OrderedMask(logits=logits.softmax(-1)),
    "one length more": lambda logits: OrderedMask(logits=logits.roll(1, -1)),
    "a hundred-millionth off": lambda logits: OrderedMask(logits=logits + 1e-8 * torch.arange(len(logits))),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_power(wrong):
    """A wrong law is found by what is known of it and by its gradients, one that is far off by its draws, too."""
    case, given_ = (
        replace(EXACT, make=WRONG[wrong]),
        Lengths("logits", torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)),
    )
    checks = [(test_what_is_known_of_lengths, ()), (test_gradients_to_the_lengths, ("mean length", 0))]
    if wrong in ("weights taken for logits", "one length more"):
        checks.append((test_draws_have_the_law, (0,)))
    for check, rest in checks:
        check.hypothesis.inner_test(EXACT, given_, *rest)
        with pytest.raises(AssertionError):
            check.hypothesis.inner_test(case, given_, *rest)
