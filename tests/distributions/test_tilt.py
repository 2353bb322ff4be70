"""Laws at a price: their lengths against sums over every length, what they keep, their ends and gradients."""

import copy
import pickle

import oracles
import pytest
import torch
from cases import LENGTH_CASES, compiles, each, positive
from torch.autograd import gradcheck, gradgradcheck
from torch.distributions import kl_divergence
from torch.func import vmap

from pyro_vnd.distributions import (
    NestedAutoregressive,
    NestedNormal,
    OrderedMask,
    OrderedMaskStraightThrough,
    RelaxedOrderedMask,
)
from pyro_vnd.distributions.masks import CutMask

K = 4
CUT_CASES = [case for case in LENGTH_CASES if hasattr(case.cls, "cut")]
COSTS = {"one a unit": None, "by unit": torch.tensor([5.0, 0.5, 0.0, 3.0]).double()}
each_cost = pytest.mark.parametrize("cost", COSTS.values(), ids=COSTS)
each_parameter = pytest.mark.parametrize("parameter", ["logits", "probs"])


def laws(case, parameter, probs):
    """A batch of laws with these probabilities, by either parameter."""
    return case.with_lengths(**{parameter: probs.log() if parameter == "logits" else probs})


def chosen(law):
    """The law of the mask itself."""
    return getattr(law, "mask_law", law)


@each(LENGTH_CASES)
@each_parameter
@each_cost
def test_lengths_are_those_of_the_definition(case, parameter, cost):
    probs, prices = positive(3, K), torch.tensor([-2.0, 0.0, 0.3, 50.0])
    law = laws(case, parameter, probs).tilt(prices[:, None], cost)
    assert type(law) is case.cls
    assert law.batch_shape == (4, 3)
    assert law.event_shape == (K,)
    for i, j in torch.cartesian_prod(torch.arange(4), torch.arange(3)):
        expected = oracles.tilted(probs[j], prices[i].item(), cost)
        torch.testing.assert_close(law.length_probs[i, j], expected)
        torch.testing.assert_close(law.mean_length[i, j].item(), oracles.length_moments(expected)[0])
    for number in (2, 0.3, torch.tensor(2)):
        same = laws(case, parameter, probs).tilt(number, cost)
        expected = torch.stack([oracles.tilted(row, float(number), cost) for row in probs])
        torch.testing.assert_close(same.length_probs, expected)


@each(LENGTH_CASES)
@pytest.mark.parametrize("tilt", [lambda law: law.tilt(1.5), lambda law: law.at_mean_length(2)], ids=["price", "mean"])
def test_all_but_the_lengths_is_kept(case, tilt):
    law = case.build((3,), validate_args=False)
    new = tilt(law)
    assert new._validate_args is False
    old_mask, mask = chosen(law), chosen(new)
    assert type(mask) is type(old_mask)
    for name in ("temperature", "noise"):
        assert getattr(mask, name, None) is getattr(old_mask, name, None)
    if case.cls is NestedNormal:
        assert new._loc is law._loc
        assert new._scale is law._scale
    if case.cls is NestedAutoregressive:
        assert new.conditioner is law.conditioner


def test_a_temperature_by_row_stays_with_its_row():
    temperature = torch.tensor([0.3, 0.7, 2.0])
    law = OrderedMaskStraightThrough(temperature, logits=torch.zeros(K)).tilt(torch.zeros(2, 1))
    assert law.batch_shape == (2, 3)
    torch.manual_seed(1)
    mask = law.rsample((5,))
    torch.manual_seed(1)
    same = OrderedMaskStraightThrough(temperature, logits=torch.zeros(2, 3, K)).rsample((5,))
    assert torch.equal(mask, same)


@each(LENGTH_CASES)
def test_prices_add_up_and_none_changes_nothing(case):
    law = case.build((3,))
    torch.testing.assert_close(law.tilt(0.7).tilt(-2.0).length_probs, law.tilt(-1.3).length_probs)
    torch.testing.assert_close(law.tilt(0).length_probs, law.length_probs)
    torch.testing.assert_close(law.tilt(-2.0).tilt(2.0).length_probs, law.length_probs)


def test_costs_are_not_checked_without_validation():
    """A check would wait for the GPU."""
    probs, cost = positive(K), torch.tensor([0.0, -1.0, 2.0, -0.5])
    with pytest.raises(ValueError, match="finite and >= 0"):
        OrderedMask(probs=probs, validate_args=True).tilt(0.7, cost)
    law = OrderedMask(probs=probs, validate_args=False).tilt(0.7, cost)
    torch.testing.assert_close(law.probs, oracles.tilted(probs, 0.7, cost))


@each(LENGTH_CASES)
def test_one_unit_has_one_length_whatever_its_price(case):
    law = case.build((3,), 1).tilt(torch.tensor([-9.0, 0.0, 9.0]), torch.tensor([0.0]))
    assert torch.equal(law.mean_length, torch.ones(3))


def test_a_price_may_be_paid_by_the_prior_or_by_the_posterior():
    """q ~ p exp(v - price C): the exact law of lengths under a prior that has the price."""
    probs, values, price = positive(5, K), 3 * torch.randn(5, K), torch.tensor(0.8)
    prior = OrderedMask(probs=probs)
    posterior = OrderedMask(logits=values + probs.log())
    with_price = OrderedMask(logits=values + prior.tilt(price).logits)
    torch.testing.assert_close(posterior.tilt(price).probs, with_price.probs)
    # The ELBO of the tilted law under the tilted prior is the evidence there: no other law has more.
    found, paid = posterior.tilt(price), prior.tilt(price)
    kl = kl_divergence(found, paid)
    by_sums = torch.tensor([oracles.kl(*rows) for rows in zip(found.probs, paid.probs, strict=True)])
    torch.testing.assert_close(kl, by_sums)
    torch.testing.assert_close((found.probs * values).sum(-1) - kl, (paid.logits + values).logsumexp(-1))


ZEROS = torch.tensor([[0.0, 0.5, 0.2, 0.3], [0.4, 0.0, 0.0, 0.6], [0.7, 0.2, 0.1, 0.0], [0.2, 0.0, 0.8, 0.0]]).double()


@each(LENGTH_CASES)
@pytest.mark.parametrize("price", [-3.0, 2.0, 1000.0])
def test_impossible_lengths_stay_impossible(case, price):
    probs = ZEROS.clone().requires_grad_()
    price = torch.tensor(price, requires_grad=True)
    law = case.with_lengths(probs=probs).tilt(price)
    expected = torch.stack([oracles.tilted(row, price.item()) for row in ZEROS])
    torch.testing.assert_close(law.length_probs, expected)
    value = law.rsample((20,)) if case.reparameterised else law.sample((20,))
    log_prob = law.log_prob(value)
    assert torch.isfinite(log_prob).all()
    mask = chosen(law)
    parts = [log_prob, law.mean_length**2, (value * torch.randn(value.shape)).sum()]
    if isinstance(mask, OrderedMask):
        scores = mask.log_prob(oracles.all_masks(K)[:, None])
        torch.testing.assert_close(scores.exp().T, expected)
        assert torch.equal(scores.isneginf().T, ZEROS == 0)  # those that underflow are possible still
        parts += [mask.entropy(), mask.variance, kl_divergence(mask, OrderedMask.uniform(K))]
        assert torch.isfinite(kl_divergence(mask, OrderedMask(probs=ZEROS))).all()
        assert torch.isfinite(kl_divergence(OrderedMask(probs=ZEROS), mask)).all()
    total = sum(part.sum() for part in parts)
    total.backward()
    assert torch.isfinite(total)
    assert torch.isfinite(probs.grad).all()
    assert torch.isfinite(price.grad)


@each(CUT_CASES)
def test_draws_have_the_lengths(case):
    """By chi-square, 20,000 draws, with an impossible length; the power test takes a price that is 10 % off."""
    probs = torch.tensor([0.2, 0.0, 0.3, 0.5])
    torch.manual_seed(0)
    masks = (case.with_lengths(probs=probs).tilt(0.6).sample((20_000,)) != 0).double()
    assert oracles.law_pvalue(masks, oracles.tilted(probs, 0.6)) > 1e-3
    assert oracles.law_pvalue(masks, oracles.tilted(probs, 0.66)) < 1e-6


@each(LENGTH_CASES)
@each_cost
def test_the_mean_falls_with_the_price_by_the_covariance_with_the_cost(case, cost):
    law = case.with_lengths(logits=torch.randn(K))
    prices = torch.linspace(-8, 8, 101, requires_grad=True)
    tilted = law.tilt(prices, cost)
    assert (tilted.mean_length.diff() < 0).all()
    lengths = torch.arange(1.0, K + 1)
    costs = lengths if cost is None else cost.cumsum(-1)
    probs = tilted.length_probs
    covariance = (probs * lengths * costs).sum(-1) - (probs * lengths).sum(-1) * (probs * costs).sum(-1)
    (slope,) = torch.autograd.grad(tilted.mean_length.sum(), prices)
    torch.testing.assert_close(slope, -covariance)


def test_costs_by_row():
    probs, cost = positive(2, K), positive(3, 1, K)
    law = OrderedMask(probs=probs).tilt(0.7, cost)
    assert law.batch_shape == (3, 2)
    for i, j in torch.cartesian_prod(torch.arange(3), torch.arange(2)):
        torch.testing.assert_close(law.probs[i, j], oracles.tilted(probs[j], 0.7, cost[i, 0]))
    own, shared = (OrderedMask(probs=probs).at_mean_length(2.3, cost, shared=shared) for shared in (False, True))
    torch.testing.assert_close(own.mean_length, torch.full((3, 2), 2.3))
    torch.testing.assert_close(shared.mean_length.mean(), torch.tensor(2.3))
    named = OrderedMask(probs=probs).at_mean_length(mean_length=2.3, cost=cost, shared=True)
    torch.testing.assert_close(named.probs, shared.probs, rtol=0, atol=0)
    whole = torch.tensor([7, 1000, 1000, 2000])
    torch.testing.assert_close(
        OrderedMask(probs=probs).tilt(0.01, whole).probs, OrderedMask(probs=probs).tilt(0.01, whole.double()).probs
    )


PATTERNS = {
    "flat": lambda k: torch.zeros(k),
    "first high": lambda k: torch.cat([torch.tensor([1e5]), torch.zeros(k - 1)]),
    "last high": lambda k: torch.cat([torch.zeros(k - 1), torch.tensor([1e5])]),
    "rising": lambda k: torch.linspace(-1e5, 1e5, k),
    "signs": lambda k: 2e5 * torch.randint(2, (k,)) - 1e5,
}


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
@pytest.mark.parametrize("price", [-1e5, -1.0, 0.0, 1e-3, 1e5])
@pytest.mark.parametrize("num_units", [2, 10_000])
def test_ends_of_float32(pattern, price, num_units):
    logits = pattern(num_units).float().requires_grad_()
    price = torch.tensor(price, dtype=torch.float32, requires_grad=True)
    cost = torch.linspace(0, 1e3, num_units, dtype=torch.float32, requires_grad=True)
    law = OrderedMaskStraightThrough(1e-3, logits=logits).tilt(price, cost)
    exact = OrderedMask(logits=logits.double()).tilt(price.double(), cost.double())
    torch.testing.assert_close(law.probs.double(), exact.probs, rtol=1e-4, atol=1e-7)
    results = [law.logits, law.keep_probs, law.mean_length, law.variance, law.entropy(), law.rsample()]
    results.append(kl_divergence(law, OrderedMask(logits=logits)))
    results.append(OrderedMaskStraightThrough(1e-3, logits=law.logits, noise="gumbel").rsample())
    assert all(torch.isfinite(x).all() for x in results)
    sum((x * torch.randn(x.shape).float()).sum() for x in results).backward()
    assert all(torch.isfinite(x.grad).all() for x in (logits, price, cost))


def test_prices_that_overflow_leave_finite_logits():
    law = OrderedMaskStraightThrough(1e-3, logits=torch.zeros(3).float(), noise="gumbel")
    price = torch.tensor([-1e38, 1e38], dtype=torch.float32, requires_grad=True)
    tilted = law.tilt(price, torch.full((3,), 1e9))
    assert tilted.mean_length.tolist() == [3, 1]
    assert torch.isfinite(tilted.logits).all()
    (tilted.rsample().sum() + tilted.entropy().sum()).backward()
    assert torch.isfinite(price.grad).all()


@each(LENGTH_CASES)
@each_parameter
def test_gradients_of_tilted_laws(case, parameter):
    by_lengths = case.by_lengths(K)
    arguments = [positive(3, K), torch.randn(2, 1), positive(K)]
    arguments = [x.requires_grad_() for x in arguments]

    def functions(lengths, price, cost):
        law = by_lengths(**{parameter: lengths}).tilt(price, cost)
        return law.length_probs, law.mean_length, chosen(law).logits

    assert gradcheck(functions, arguments)
    assert gradgradcheck(functions, arguments)


@each(LENGTH_CASES)
def test_under_vmap(case):
    by_lengths = case.by_lengths(K)
    logits, price, mean_length, cost = torch.randn(5, 3, K), torch.randn(5), 1.5 + 2 * torch.rand(5), positive(5, K)

    def results(logits, price, mean_length, cost):
        law = by_lengths(logits=logits)
        return (
            law.tilt(price, cost).length_probs,
            law.price_at_mean_length(mean_length, cost),
            law.at_mean_length(mean_length, shared=True).mean_length,
        )

    actual = vmap(results)(logits, price, mean_length, cost)
    for row in range(5):
        expected = results(logits[row], price[row], mean_length[row], cost[row])
        torch.testing.assert_close(tuple(x[row] for x in actual), expected)


@compiles
def test_one_graph_in_a_compilation():
    logits, price = torch.randn(3, K), torch.tensor([0.5, -1.0, 2.0])

    def run(logits, price):
        law = OrderedMaskStraightThrough(0.2, logits=logits)
        return law.tilt(price).log_prob(torch.ones(K)), law.at_mean_length(2.0, shared=True).keep_probs

    torch.compiler.reset()
    graph = torch.compile(run, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(graph(logits, price), run(logits, price))


@each(CUT_CASES)
def test_lengths_that_are_given_stay_given(case):
    law = case.with_lengths(probs=positive(3, K))
    lengths = torch.tensor([2, 0, 4])
    price = torch.tensor([[0.0], [1.5]], requires_grad=True)
    cut = law.cut(lengths).tilt(price)
    assert type(chosen(cut)) is CutMask
    assert cut.batch_shape == (2, 3)
    torch.testing.assert_close(cut.length_probs, law.tilt(price).cut(lengths).length_probs)
    assert cut.mean_length[:, [0, 2]].tolist() == [[2, 4], [2, 4]]
    (slope,) = torch.autograd.grad(cut.mean_length.sum(), price)
    assert (slope < 0).all()
    shared = law.cut(lengths).at_mean_length(2.6, shared=True)
    torch.testing.assert_close(shared.mean_length, torch.tensor([2.0, 1.8, 4.0]))
    with pytest.raises(ValueError, match=r"must be strictly between .* 1 to 4 and 2 to 4; got 3"):
        law.cut(lengths).at_mean_length(3.0)
    with pytest.raises(ValueError, match=r"must be strictly between .* 2.33333 and 3.33333; got 3.5"):
        law.cut(lengths).at_mean_length(3.5, shared=True)


@each(LENGTH_CASES)
def test_tilted_laws_can_be_copied_expanded_and_tilted_again(case):
    law = case.with_lengths(probs=ZEROS).tilt(0.5)
    value = law.sample()
    for other in (pickle.loads(pickle.dumps(law)), copy.deepcopy(law), law.expand((2, 4))):
        torch.testing.assert_close(other.log_prob(value), law.log_prob(value).expand(other.batch_shape))
        torch.testing.assert_close(other.tilt(1.0).keep_probs, law.tilt(1.0).keep_probs.expand(*other.batch_shape, K))
        torch.testing.assert_close(other.tilt(1.0).keep_probs[..., 1:].sum(-1) + 1, other.tilt(1.0).mean_length)
    assert "K = 4" in repr(law)


@each(LENGTH_CASES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_types_are_those_of_the_law(case, dtype):
    law = case.with_lengths(probs=positive(3, K).to(dtype))
    expected = law.mean_length.dtype
    for price in (0.5, torch.tensor(0.5, dtype=torch.float16), torch.tensor(0.5, dtype=torch.float64)):
        assert law.tilt(price).mean_length.dtype == law.at_mean_length(2 + price).mean_length.dtype == expected
        assert law.price_at_mean_length(2 + price).dtype == expected
    with torch.inference_mode():
        inside = law.at_mean_length(2.0).sample()
    assert inside.shape == (3, K)


def test_relaxed_laws_of_impossible_lengths_have_finite_densities():
    """Whatever the price, an impossible length is no more probable than the least of the others."""
    law = RelaxedOrderedMask(0.5, probs=torch.tensor([0.5, 0.5, 0.0]))
    for price in (-1000.0, 1000.0):
        value = law.tilt(price).rsample((50,))
        assert torch.isfinite(law.tilt(price).log_prob(value)).all()
        assert (value[:, 2] < 1e-30).all()
