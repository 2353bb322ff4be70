"""Value heads: what they learn from rows seen at one length each, and the prices of mean lengths."""

import math

import pytest
import torch

from pyro_vnd.distributions import OrderedMask
from pyro_vnd.nn import ValueHead
from pyro_vnd.nn.values import chosen_at_mean, interpolate_values, spaced_lengths

K, D, N = 6, 3, 40


def moved(head: ValueHead) -> ValueHead:
    """A head whose last layer, which starts at zero, says something."""
    with torch.no_grad():
        for parameter in head.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return head


def curves_of(num_rows: int, num_units: int, scale: float = 1.0) -> torch.Tensor:
    """Value curves that rise and level off, each row's at another pace, as those of images do."""
    units = torch.arange(1, num_units + 1).to(torch.get_default_dtype())
    pace, height = torch.rand(num_rows, 1) * 0.5 + 0.05, torch.rand(num_rows, 1) + 0.5
    return scale * 300 * height * (1 - torch.exp(-pace * units)) - 0.5 * scale * units


def test_a_head_starts_at_its_mean_curve():
    head, inputs = ValueHead(D, K), torch.randn(2, N, D)
    assert head(inputs).shape == (2, N, K)
    assert torch.equal(head(inputs), torch.zeros(2, N, K))
    curves = curves_of(N, K)
    head.centre(curves)
    torch.testing.assert_close(head(inputs), curves.mean(0).expand(2, N, K))
    assert head.deviation.item() == pytest.approx((curves - curves.mean(0)).square().mean().sqrt().item())


def test_inputs_are_standardised():
    head, inputs = moved(ValueHead(D, K)), 50 + 7 * torch.randn(N, D)
    outputs = head.net((inputs - inputs.mean(0)) / inputs.std(0))
    head.standardise(inputs, momentum=0.01)  # the first ones all the way
    torch.testing.assert_close(head(inputs), outputs)
    head.seen += 1
    head.standardise(inputs + 1, momentum=0.25)
    torch.testing.assert_close(head.loc, inputs.mean(0) + 0.25)
    before = head.loc.clone()
    head.standardise(inputs[:1])  # one row has no deviation
    assert torch.equal(head.loc, before)


@pytest.mark.parametrize("weighted", [False, True])
def test_regression_has_the_value_and_the_gradient_of_its_formula(weighted: bool):
    head, inputs = moved(ValueHead(D, K)), torch.randn(N, D)
    lengths, observed = torch.randint(1, K + 1, (N,)), 100 + 20 * torch.randn(N)
    head.regression(head(inputs), lengths, observed + 3)  # so that the deviation is not one
    weights = torch.rand(N) if weighted else None
    deviation, curve = head.deviation.item(), head.curve.clone()

    def formula(weights: torch.Tensor, deviation: float) -> torch.Tensor:
        total = torch.zeros(())
        for n in range(N):
            value = curve + deviation * head.net(inputs[n])
            total = total + weights[n] * (value[lengths[n] - 1] - observed[n]) ** 2 / (2 * deviation**2)
        return total

    parameters = list(head.parameters())
    expected = formula(torch.ones(N) if weights is None else weights, deviation)
    gradient = torch.autograd.grad(expected, parameters)
    found = head.regression(head(inputs), lengths, observed, weights)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, parameters), gradient)
    assert not torch.allclose(found, formula(torch.ones(N) / 2, deviation))  # power


def test_rows_of_weight_zero_count_nothing_even_if_nan():
    inputs, lengths, observed = torch.randn(N, D), torch.randint(1, K + 1, (N,)), torch.randn(N)
    weights = (torch.rand(N) < 0.5).to(observed)
    hidden = observed.where(weights > 0, torch.nan)
    state = moved(ValueHead(D, K)).state_dict()
    found = []
    for rows, values, w in [(weights > 0, observed, None), (slice(None), hidden, weights)]:
        head = ValueHead(D, K)
        head.load_state_dict(state)
        for _ in range(3):
            loss = head.regression(head(inputs[rows]), lengths[rows], values[rows], w)
        loss.backward()
        found.append([loss.detach(), head.curve, head.deviation, head.seen, *(p.grad for p in head.parameters())])
    torch.testing.assert_close(found[1], found[0])
    nothing = ValueHead(D, K)
    loss = nothing.regression(nothing(inputs), lengths, torch.full((N,), torch.nan), torch.zeros(N))
    assert loss.item() == 0
    assert nothing.deviation == 1
    assert not nothing.curve.any()


def test_the_mean_curve_is_the_plain_mean_of_all_that_was_seen():
    head, seen = ValueHead(D, K), []
    for batch in range(5):
        lengths = torch.randint(1, K if batch else K - 1, (7 + batch,))  # length K comes last, alone
        if batch == 4:
            lengths[0] = K
        observed, weights = 50 * lengths + torch.randn(len(lengths)), (torch.rand(len(lengths)) < 0.8).double()
        head.regression(head(torch.randn(len(lengths), D)), lengths, observed, weights)
        seen += [(length, value) for length, value, w in zip(lengths, observed, weights, strict=True) if w > 0]
    for length in range(1, K + 1):
        values = [value.item() for found, value in seen if found == length]
        assert head.seen[length - 1] == len(values)
        if values:
            assert head.curve[length - 1].item() == pytest.approx(sum(values) / len(values))
    assert head.seen.sum() == len(seen)


def test_the_deviation_is_that_of_values_of_one_length():
    head = ValueHead(D, K)
    for _ in range(200):
        lengths = torch.randint(1, K + 1, (N,))
        head.regression(head(torch.zeros(N, D)), lengths, 50 * lengths + 3 * torch.randn(N))
    # 8,000 values; the first batch, whose curve was not known, counts one in 200 with a deviation of about 85.
    assert head.deviation.item() == pytest.approx(math.sqrt(9 + 85**2 / 200), rel=0.05)


@pytest.mark.parametrize("batch_size", [1, 2, 4])
@pytest.mark.parametrize("value", [1e-4, 1.0, 1e5])
def test_a_batch_smaller_than_the_number_of_lengths_leaves_errors_finite(batch_size: int, value: float):
    """In float32: at first there is one row a length, which does not deviate from its own mean."""
    head = ValueHead(D, K).float()
    losses = []
    for step in range(20):
        lengths = (torch.arange(batch_size) + step) % K + 1
        observed = value * (lengths + torch.rand(batch_size)).float()
        losses.append(head.regression(head(torch.randn(batch_size, D).float()), lengths, observed).item())
    assert max(losses[2:]) < 100
    assert 0 < head.deviation < 10 * max(value, 1)


MEANS = [1.1, 1.5, 2, 3.3, 4, 8, 12, 16, 24, 30]


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_prices_are_those_of_mean_lengths(scale: float, dtype: torch.dtype):
    curves = curves_of(300, 32, scale)
    head = ValueHead(D, 32).to(dtype)
    head.calibrate(curves.to(dtype))
    law = OrderedMask(logits=curves)
    prices = head.price_at(torch.tensor(MEANS))
    assert prices.dtype == dtype
    assert (prices.diff() < 0).all()
    for mean, price in zip(MEANS, prices, strict=True):
        assert law.tilt(price.double()).mean_length.mean().item() == pytest.approx(mean, rel=0.01)
        exact = law.price_at_mean_length(mean, shared=True).item()
        assert price.item() == pytest.approx(exact, rel=0.01, abs=1e-3 * curves.std().item() + 1e-4)
        other = head.price_at(1.02 * mean).double()
        assert law.tilt(other).mean_length.mean().item() != pytest.approx(mean, rel=0.01)  # power
    assert torch.equal(head.price_at(4), prices[4])


@pytest.mark.parametrize("scale", [0.3, 1.0, 1e4])
def test_chosen_lengths_have_the_mean_that_is_asked_for(scale: float):
    """Means of modes of 1,000 rows; those at the price of the laws are elsewhere."""
    curves = curves_of(1000, 32, scale)
    head = Known(curves)
    head.calibrate(curves)
    off = []
    for mean in MEANS:
        chosen = head.choose(torch.arange(1000), mean_length=mean)
        assert chosen.double().mean().item() == pytest.approx(mean, rel=0.02, abs=0.05), mean
        by_law = OrderedMask(logits=curves).tilt(head.price_at(mean)).logits.argmax(-1) + 1
        off.append(abs(by_law.double().mean().item() - mean))
    assert max(off) > 0.2 or scale > 1  # laws of many nats are as good as chosen lengths
    assert torch.equal(head.choose(torch.arange(1000), price=0.3 * scale), best_by_hand(curves, 0.3 * scale))


def best_by_hand(curves: torch.Tensor, price: float) -> torch.Tensor:
    return torch.tensor([max(range(1, 33), key=lambda k: row[k - 1] - price * k) for row in curves.tolist()])


class Known(ValueHead):
    """A head that knows the curves of its rows."""

    def __init__(self, curves: torch.Tensor):
        super().__init__(1, curves.shape[-1])
        self.double().curves = curves

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.curves[inputs]


def test_lengths_chosen_among_known_curves_by_search():
    """Against all prices at which a row changes its length."""
    curves = curves_of(12, 5, 1.0)
    prices = [
        ((a - b) / (j - i)).item() for row in curves for i, b in enumerate(row) for j, a in enumerate(row) if j > i
    ]
    for mean in (1.0, 1.4, 2.5, 3.0, 4.9, 5.0):
        chosen = chosen_at_mean(curves, mean).double().mean().item()
        means = [best_of(curves, price + step).mean().item() for price in prices for step in (1e-9, -1e-9)]
        assert chosen == pytest.approx(max(m for m in [*means, 1.0] if m <= mean + 1e-12))
    assert chosen_at_mean(curves, 5.0).tolist() == [5] * 12
    impossible = curves.index_fill(-1, torch.tensor([4]), -torch.inf)
    assert chosen_at_mean(impossible, 4.9).max() == 4


def best_of(curves: torch.Tensor, price: float) -> torch.Tensor:
    return (curves - price * torch.arange(1, curves.shape[-1] + 1)).argmax(-1).double() + 1


def test_prices_know_of_the_prior():
    prior = OrderedMask.geometric(0.3, 32)
    for scale in (1e-6, 1.0):  # values that say nothing leave the prior, whose mean is one of 3.3 at no price
        curves = curves_of(300, 32, scale)
        head = ValueHead(D, 32, prior=prior).double()
        head.calibrate(curves)
        law = OrderedMask(logits=curves + prior.logits)
        for mean in MEANS:
            found = law.tilt(head.price_at(mean)).mean_length.mean().item()
            assert found == pytest.approx(mean, rel=0.02)  # the mean of a geometric law rises steeply
    without = OrderedMask(logits=curves).tilt(head.price_at(4)).mean_length.mean().item()
    assert without != pytest.approx(4, rel=0.02)  # power


@pytest.mark.parametrize("num_units", [1, 2, 7])
def test_one_row_and_equal_rows_have_prices_too(num_units: int):
    for curves in (torch.zeros(5, num_units), curves_of(1, num_units)):
        head = ValueHead(D, num_units)
        head.calibrate(curves)
        assert head.prices.isfinite().all()
        for mean in [] if num_units == 1 else [1.25, 1.5, 0.8 * num_units]:
            law = OrderedMask(logits=curves).tilt(head.price_at(mean))
            assert law.mean_length.mean().item() == pytest.approx(mean, rel=0.03)


def calibrated() -> ValueHead:
    head = ValueHead(D, K)
    head.calibrate(curves_of(10, K))
    return head


def forgetful() -> ValueHead:
    head = calibrated()
    assert head.is_calibrated
    head.forget()
    return head


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ValueHead(0, K), "ValueHead: argument `num_inputs` must be an integer >= 1; got 0"),
        (lambda: ValueHead(D, 0), "ValueHead: argument `num_units` must be an integer >= 1"),
        (lambda: ValueHead(D, K, (8, 0)), "ValueHead: argument `hidden`"),
        (lambda: ValueHead(D, K, prior=OrderedMask.uniform(K - 1)), f"`prior` must be a single law over {K} units"),
        (lambda: ValueHead(D, K, prior=OrderedMask.uniform(K).expand((2,))), "`prior` must be a single law"),
        (lambda: ValueHead(D, 2, prior=OrderedMask(probs=torch.tensor([0.0, 1.0]))), "a positive probability"),
        (lambda: ValueHead(D, K).price_at(2.0), "needs a price, which is not known yet"),
        (lambda: forgetful().choose(torch.zeros(2, D), mean_length=2.0), "or not since the model was fitted without"),
        (lambda: calibrated().choose(torch.zeros(2, D), 1.0, 2.0), "give one of `price` and `mean_length`; got both"),
        (lambda: calibrated().price_at("2"), f"strictly between 1 and {K}; got '2'"),
    ],
)
def test_errors(make, message: str):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("mean", [1, K, 0.5, K + 1.0, math.nan, torch.tensor([2.0, 1.0])], ids=str)
def test_a_mean_length_lies_between_the_ends(mean):
    head = ValueHead(D, K)
    head.calibrate(curves_of(N, K))
    with pytest.raises(ValueError, match=f"`mean_length` must be strictly between 1 and {K}; got"):
        head.price_at(mean)


def test_a_head_without_hidden_layers_is_linear():
    head = moved(ValueHead(D, K, hidden=()))
    x, y = torch.randn(2, D)
    torch.testing.assert_close(head(x) + head(y), head(x + y) + head(torch.zeros(D)))


def test_weights_keep_all_that_was_learned():
    head, inputs = moved(ValueHead(D, K, prior=OrderedMask.geometric(0.4, K))), torch.randn(N, D)
    head.standardise(inputs + 2)
    head.regression(head(inputs), torch.randint(1, K + 1, (N,)), 30 + torch.randn(N)).backward()
    head.calibrate(head(inputs).detach())
    again = ValueHead(D, K)
    assert not torch.equal(again(inputs), head(inputs))
    again.load_state_dict(head.state_dict())
    assert torch.equal(again(inputs), head(inputs))
    assert torch.equal(again.price_at(2.5), head.price_at(2.5))
    assert torch.equal(again.log_probs, head.log_probs)
    assert torch.equal(again.seen, head.seen)


def test_spaced_lengths_go_from_one_to_all_at_equal_ratios():
    for num_units in (1, 2, 3, 5, 12, 32, 100, 1000):
        for num_lengths in (1, 2, 3, 7, 12, 64, 2000):
            lengths = spaced_lengths(num_units, num_lengths)
            assert len(lengths) == min(max(num_lengths, 2), num_units)
            assert lengths == sorted(set(lengths))
            assert (lengths[0], lengths[-1]) == (1, num_units)
            if len(lengths) > 4 and lengths[-1] > 3 * len(lengths):
                ratios = torch.tensor(lengths[2:], dtype=torch.double).log().diff()
                assert ratios[-2:].max() < 2 * math.log(num_units) / (len(lengths) - 3)


def test_values_between_lengths_are_on_lines_over_the_logarithm():
    units = torch.arange(1, 33).double()
    for num_lengths in (2, 5, 12, 40):
        lengths = spaced_lengths(32, num_lengths)
        index = torch.tensor(lengths) - 1
        lines = torch.tensor([[2.0], [-1.0]]) * units.log() + 3  # exact for these
        torch.testing.assert_close(interpolate_values(lines[:, index], lengths, 32), lines)
        values = torch.randn(4, len(lengths))
        found = interpolate_values(values, lengths, 32)
        torch.testing.assert_close(found[:, index], values)  # and through what is known
        assert (found.amax(-1) == values.amax(-1)).all()
    torch.testing.assert_close(interpolate_values(torch.ones(3, 1), [1], 1), torch.ones(3, 1))
