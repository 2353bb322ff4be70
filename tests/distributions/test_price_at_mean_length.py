"""The price at which lengths have a mean: against a root found slowly, at its ends, and its gradients."""

import oracles
import pytest
import torch
from cases import LENGTH_CASES, each, positive
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, jacfwd, jacrev, vmap

from pyro_vnd.distributions import OrderedMask, OrderedMaskStraightThrough

# Torch itself says so when it first differentiates in forward mode.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
K = 4
COSTS = {"one a unit": None, "by unit": torch.tensor([5.0, 0.5, 0.0, 3.0]).double()}
each_cost = pytest.mark.parametrize("cost", COSTS.values(), ids=COSTS)
each_parameter = pytest.mark.parametrize("parameter", ["logits", "probs"])
each_sharing = pytest.mark.parametrize("shared", [False, True], ids=["prices of their own", "a shared price"])
ZEROS = torch.tensor([[0.0, 0.5, 0.2, 0.3], [0.4, 0.0, 0.0, 0.6], [0.7, 0.2, 0.1, 0.0]]).double()


@each(LENGTH_CASES)
@each_parameter
@each_cost
def test_the_price_of_a_mean_length(case, parameter, cost):
    probs = positive(3, K)
    law = case.with_lengths(**{parameter: probs.log() if parameter == "logits" else probs})
    for mean_length in (2.0, 2.9, 3):
        prices, price = (law.price_at_mean_length(mean_length, cost, shared=shared) for shared in (False, True))
        assert (prices.shape, price.shape) == ((3,), ())
        expected = torch.tensor([oracles.price_of(row[None], mean_length, cost) for row in probs])
        torch.testing.assert_close(prices, expected)
        torch.testing.assert_close(price, torch.tensor(oracles.price_of(probs, mean_length, cost)))
        own, shared = (law.at_mean_length(mean_length, cost, shared=shared) for shared in (False, True))
        assert type(own) is type(shared) is case.cls
        torch.testing.assert_close(own.mean_length, torch.full((3,), float(mean_length)))
        torch.testing.assert_close(shared.mean_length.mean().item(), float(mean_length))
        torch.testing.assert_close(own.length_probs, law.tilt(prices, cost).length_probs)
        torch.testing.assert_close(shared.length_probs, law.tilt(price, cost).length_probs)


@each(LENGTH_CASES)
def test_batches_of_mean_lengths(case):
    law = case.build((3,))
    means = torch.tensor([[1.2], [2.5]])
    assert law.price_at_mean_length(means).shape == (2, 3)
    torch.testing.assert_close(law.at_mean_length(means).mean_length, means.expand(2, 3))
    several = case.with_lengths(logits=torch.zeros(K)).at_mean_length(means[:, 0])
    torch.testing.assert_close(several.mean_length, means[:, 0])
    assert law.expand((2, 3)).price_at_mean_length(2.2).shape == (2, 3)
    wide = law.expand((2, 3)).at_mean_length(2.2, shared=True)
    assert wide.batch_shape == (2, 3)
    torch.testing.assert_close(wide.length_probs[1], law.at_mean_length(2.2, shared=True).length_probs)
    empty = case.build((0,))
    assert empty.at_mean_length(2.0).batch_shape == empty.tilt(1.0).batch_shape == (0,)


@pytest.mark.parametrize("price", [-1e7, -30.0, -1e-9, 1e-3, 4.0, 1e3, 1e7])
@each_sharing
def test_prices_of_every_size_are_found_again(price, shared):
    """The lengths are worth about as much as they cost, or the mean would say nothing of the price."""
    values = price * torch.arange(1.0, K + 1) + torch.randn(5, K)
    law = OrderedMask(logits=values)
    mean_length = law.tilt(price).mean_length
    if shared:
        mean_length = mean_length.mean()
    found = law.price_at_mean_length(mean_length, shared=shared)
    torch.testing.assert_close(found, torch.full_like(mean_length, price), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mean_length", [1.001, 2.0, 4.0, 8.0, 12.5, 31.9])
@each_sharing
def test_mean_lengths_of_sharp_laws(mean_length, shared):
    """In float32, and of laws as whole images have them, with differences of tens of thousands of nats."""
    gains = 3e4 * torch.rand(50, 32) ** 4 / torch.arange(1.0, 33.0)
    logits = gains.cumsum(-1).float().requires_grad_()
    mean = torch.tensor(mean_length, dtype=torch.float32, requires_grad=True)
    law = OrderedMaskStraightThrough(0.2, logits=logits)
    tilted = law.at_mean_length(mean, shared=shared)
    found = tilted.mean_length.mean() if shared else tilted.mean_length
    torch.testing.assert_close(found, torch.full_like(found, mean_length), rtol=1e-5, atol=0)
    price = law.price_at_mean_length(mean, shared=shared)
    assert price.dtype == torch.float32
    ((tilted.rsample() * torch.randn(32).float()).sum() + price.sum()).backward()
    assert torch.isfinite(logits.grad).all()
    assert torch.isfinite(mean.grad)
    # Units worth a thousand nats more each have a price a thousand higher.
    torch.testing.assert_close(
        law.price_at_mean_length(mean_length, shared=shared) + 1000,
        OrderedMask(logits=logits + 1000 * torch.arange(32.0)).price_at_mean_length(mean_length, shared=shared),
        rtol=1e-4,
        atol=0.05,
        check_dtype=False,
    )


def test_where_one_length_has_all_the_mass_the_price_is_halfway_between_its_neighbours():
    """The mean is 2 to all digits from -3000 to 5000; the tails of 1 and 3 are equal at one price alone."""
    logits = torch.tensor([0.0, 5000.0, 2000.0, 2001.0], requires_grad=True)
    price = OrderedMask(logits=logits).price_at_mean_length(2.0)
    torch.testing.assert_close(price.item(), 1000.0)
    (gradient,) = torch.autograd.grad(price, logits)
    torch.testing.assert_close(gradient, torch.tensor([-0.5, 0.0, 0.5, 0.0]))


@each_parameter
@each_sharing
@pytest.mark.parametrize("mean_length", [1.3, 2.0, 3.6])
@pytest.mark.parametrize("unit", [1.0, 1e6])
def test_gradients_of_prices(parameter, shared, mean_length, unit):
    """Of the first and second order; also where a mean is a length, which is no special case of the function."""
    arguments = [x.requires_grad_() for x in (positive(3, K), torch.tensor(mean_length), positive(K))]

    def functions(lengths, mean, cost):
        law = OrderedMask(**{parameter: lengths})
        price = law.price_at_mean_length(mean, unit * cost, shared=shared)
        return unit * price, law.at_mean_length(mean, unit * cost, shared=shared).logits

    assert gradcheck(functions, arguments)
    assert gradgradcheck(functions, arguments)


@each_sharing
def test_gradients_of_prices_with_impossible_lengths(shared):
    probs = ZEROS.clone().requires_grad_()
    price = OrderedMask(probs=probs).price_at_mean_length(2.5, shared=shared)
    (gradient,) = torch.autograd.grad(price.sum(), probs)
    possible = ZEROS > 0
    step = 1e-6 * torch.randn(3, K) * possible
    high, low = (
        OrderedMask(probs=ZEROS + sign * step).price_at_mean_length(2.5, shared=shared).sum() for sign in (1, -1)
    )
    torch.testing.assert_close((gradient * step).sum(), (high - low) / 2, rtol=1e-6, atol=1e-14)
    torch.testing.assert_close(gradient[~possible], torch.zeros(4), rtol=0, atol=1e-14)


@each_sharing
def test_derivatives_by_torch_func(shared):
    logits, mean_length = torch.randn(3, K), torch.tensor(2.2)

    def price(logits, mean_length):
        return OrderedMask(logits=logits).price_at_mean_length(mean_length, shared=shared).sum()

    expected = torch.autograd.functional.jacobian(price, (logits, mean_length))
    for derivative in (grad, jacrev, jacfwd):
        torch.testing.assert_close(derivative(price, (0, 1))(logits, mean_length), expected)
    by_rows = vmap(grad(price), (None, 0))(logits, torch.tensor([2.2, 3.0]))
    torch.testing.assert_close(by_rows[0], expected[0])


def test_the_possible_mean_lengths_are_those_of_the_cheapest_and_the_dearest_lengths():
    law = OrderedMask(probs=ZEROS)
    expected = r"mean_length` of shape \(\) must be strictly between .*, 1 to 2 and 3 to 4; got 3.5"
    with pytest.raises(ValueError, match=expected):
        law.price_at_mean_length(3.5)
    # The first two lengths cost the same, and so do the last two: at the ends of prices they share the mass.
    free = torch.tensor([1.0, 0.0, 1.0, 0.0])
    with pytest.raises(ValueError, match=r"strictly between .*, 1.75 and 3.5; got 1.7"):
        OrderedMask(probs=torch.tensor([0.1, 0.3, 0.2, 0.2])).at_mean_length(1.7, free)
    law = OrderedMask(probs=torch.tensor([0.1, 0.3, 0.2, 0.2])).at_mean_length(1.8, free)
    torch.testing.assert_close(law.mean_length.item(), 1.8)
    with pytest.raises(ValueError, match=r"strictly between .*, 1 and 1; got 1"):
        OrderedMask(logits=torch.zeros(1)).at_mean_length(1.0)


def test_a_shared_price_has_one_mean_length_and_a_law():
    with pytest.raises(ValueError, match=r"`mean_length` of shape \(2,\) must be one number"):
        OrderedMask(logits=torch.zeros(2, K)).at_mean_length(torch.tensor([2.0, 3.0]), shared=True)
    with pytest.raises(ValueError, match=r"one law at least.*got batch shape \(0,\)"):
        OrderedMask(logits=torch.zeros(0, K)).at_mean_length(2.0, shared=True)


@each_sharing
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_mean_length_is_met_or_refused_however_large_the_logits(shared, dtype):
    patterns = torch.tensor([[1, -1, 0], [0, 0, 1], [-1, 0.5, 1], [0, 1, 0]], dtype=dtype)
    refused = []
    for size in (1e3, 1e6, 1e9, 1e12, 1e15, 1e19, 1e30, 3e38):
        for logits in patterns * size:
            for mean_length in (1.3, 2.0, 2.9):
                try:
                    law = OrderedMask(logits=logits).at_mean_length(mean_length, shared=shared)
                except ValueError as error:
                    refused.append((size, str(error)))
                else:
                    assert abs(law.mean_length.item() - mean_length) < 1e-3
    assert len(refused) > 20
    assert min(size for size, _ in refused) > 1e12, "numbers can hold the prices of smaller ones"
    assert all("at_mean_length: no number is the price of this mean length" in said for _, said in refused)
