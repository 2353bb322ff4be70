"""Schedules: their values, what they refuse, and the shares of a MaskSchedule."""

import math
import pickle
from functools import cached_property

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule
from scipy.stats import chisquare, kstest
from torch import nn

from pyro_vnd.autoencoders import OrderedVAE
from pyro_vnd.distributions import OrderedMask, OrderedMaskStraightThrough
from pyro_vnd.infer import AutoNested, MaskSchedule, PriceSchedule, cosine, cosine_to_zero, fit, linear
from pyro_vnd.infer.schedules import schedule_values


@pytest.mark.parametrize("make", [linear, cosine])
def test_a_schedule_goes_from_start_to_end_and_stays(make):
    schedule = make(2.0, 0.5, warmup=0.4)
    values = [schedule(t / 10) for t in range(11)]
    assert values[0] == 2.0
    assert values[2] == pytest.approx(1.25)
    assert values[4:] == pytest.approx([0.5] * 7)
    assert values == sorted(values, reverse=True)


@pytest.mark.parametrize("make", [linear, cosine])
def test_a_schedule_prints_as_the_call_that_made_it_and_can_be_pickled(make):
    schedule = make(2.0, 0.5, warmup=0.4)
    assert repr(schedule) == f"{make.__name__}(2.0, 0.5, warmup=0.4)"
    again = pickle.loads(pickle.dumps(schedule))
    assert again == schedule
    assert [again(t / 7) for t in range(8)] == [schedule(t / 7) for t in range(8)]


def test_a_cosine_is_level_at_both_ends():
    schedule = cosine(1.0, 0.0)
    assert schedule(0.05) > linear(1.0, 0.0)(0.05)
    assert schedule(0.95) < linear(1.0, 0.0)(0.95)


def test_the_first_step_is_at_zero_and_the_last_at_one():
    assert schedule_values("weights.latents", lambda t: t, 5) == [0, 0.25, 0.5, 0.75, 1]
    assert schedule_values("weights.latents", lambda t: t, 1) == [0]
    assert schedule_values("weights.latents", 0.3, 3) == [0.3] * 3


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (math.nan, "`weights.latents` must be finite and >= 0; got nan"),
        (lambda t: 0.5 - t, r"`weights.latents` must be finite and >= 0; got -0.25 at t = 0.75"),
        (lambda t: math.nan if t == 0.5 else 1.0, "got nan at t = 0.5"),
        (lambda t: math.inf, "got inf at t = 0"),
    ],
)
def test_invalid_values_are_refused_before_the_fit(schedule, message):
    with pytest.raises(ValueError, match=message):
        schedule_values("weights.latents", schedule, 5)


def test_a_temperature_must_be_positive():
    with pytest.raises(ValueError, match=r"`temperature` must be finite and > 0; got 0\.0 at t = 1"):
        schedule_values("temperature", linear(1.0, 0.0), 5, positive=True)


@pytest.mark.parametrize("total_steps", [1, 2, 7, 100])
@pytest.mark.parametrize("warmup", [0.0, 0.05, 0.5])
def test_the_learning_rate_rises_to_its_value_and_falls_towards_zero(total_steps, warmup):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    scheduler, rates = cosine_to_zero(warmup)(optimizer, total_steps), []
    for _ in range(total_steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    rising = math.floor(warmup * total_steps)
    assert rates[rising] == pytest.approx(0.3)
    assert rates[:rising] == pytest.approx([0.3 * (0.01 + 0.99 * i / rising) for i in range(rising)])
    falling = total_steps - rising
    expected = [0.15 * (1 + math.cos(math.pi * i / falling)) for i in range(falling)]
    assert rates[rising:] == pytest.approx(expected)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: linear(0, 1, warmup=0), r"linear: argument `warmup` must be in \(0, 1\]; got 0"),
        (lambda: cosine(0, 1, warmup=1.5), r"cosine: argument `warmup`"),
        (lambda: cosine_to_zero(1.0), r"cosine_to_zero: argument `warmup` must be in \[0, 1\)"),
        (lambda: MaskSchedule(0.5, 0.5, 0.5), r"shares that sum to 1; got \(0.5, 0.5, 0.5\)"),
        (lambda: MaskSchedule(1.5, -0.5, 0.0), "shares that sum to 1"),
        (lambda: MaskSchedule(math.nan, 0.5, 0.5), "shares that sum to 1"),
        (lambda: MaskSchedule(law="loguniform"), "'uniform', 'log-uniform' or an OrderedMask; got 'loguniform'"),
        (lambda: MaskSchedule(law=OrderedMask(logits=torch.zeros(2, 3))), r"single law; got batch shape \(2,\)"),
        (lambda: MaskSchedule(num_particles=0), "`num_particles` must be an integer at least 1; got 0"),
        (lambda: MaskSchedule(anneal=1.5), r"`anneal` must be in \[0, 1\]; got 1.5"),
        (lambda: PriceSchedule(0.0, 1.0), r"PriceSchedule: arguments `low` and `high` must be prices 0 < low < high"),
        (lambda: PriceSchedule(2.0, 2.0), r"0 < low < high; got 2\.0, 2\.0"),
        (lambda: PriceSchedule(1.0, math.inf), "0 < low < high; got 1.0, inf"),
        (lambda: PriceSchedule(math.nan), "0 < low < high"),
        (lambda: PriceSchedule("a"), "0 < low < high; got 'a', None"),
        (lambda: PriceSchedule(low=True), "0 < low < high; got True, None"),
        (lambda: PriceSchedule(high=0.0), "0 < low < high; got None, 0.0"),
        (lambda: PriceSchedule(full="a"), "`full` must be a share from 0 to 1; got 'a'"),
        (lambda: PriceSchedule(full=1.5), "`full` must be a share from 0 to 1; got 1.5"),
        (lambda: PriceSchedule(explore=-0.1), "`explore` must be a share from 0 to 1; got -0.1"),
        (lambda: PriceSchedule(warmup=math.nan), "`warmup` must be a share from 0 to 1; got nan"),
        (lambda: PriceSchedule(temperature=0.0), "`temperature` must be finite and > 0; got 0.0"),
        (lambda: PriceSchedule(temperature=math.inf), "`temperature` must be finite and > 0; got inf"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_schedule_is_short_in_print():
    assert repr(MaskSchedule()) == "MaskSchedule(learned=0.5, budget=0.4, full=0.1)"
    changed = MaskSchedule(0.0, 0.9, 0.1, "log-uniform", num_particles=2, sliced=True)
    assert repr(changed) == (
        "MaskSchedule(learned=0, budget=0.9, full=0.1, law='log-uniform', num_particles=2, sliced=True)"
    )
    assert len(repr(MaskSchedule(law=OrderedMask.uniform(1000)))) < 200


N = 10_000
LAWS = {
    "uniform": ("uniform", torch.full((4,), 0.25)),
    "log-uniform": ("log-uniform", torch.tensor([12.0, 6.0, 4.0, 3.0]) / 25),
    "OrderedMask": (OrderedMask(probs=torch.tensor([0.7, 0.1, 0.1, 0.1])), torch.tensor([0.7, 0.1, 0.1, 0.1])),
}


@pytest.mark.parametrize(("num_rows", "num_particles"), [(1, 1), (1, 3), (7, 2)])
@pytest.mark.parametrize(("law", "probs"), LAWS.values(), ids=LAWS)
def test_shares_and_budgets_have_their_probabilities(law, probs, num_rows, num_particles):
    schedule = MaskSchedule(0.3, 0.5, 0.2, law=law, num_particles=num_particles)
    # What is drawn together depends on each other: one particle of one row of each draw has the law.
    fractions = torch.cat([schedule.draw(4, (num_rows,)).flatten()[None] for _ in range(N)])
    fractions = fractions.gather(1, torch.randint(num_rows * num_particles, (N, 1)))
    first = torch.stack([schedule.draw(4, (num_rows,))[torch.randint(num_particles, ()), 0] for _ in range(N)])
    expected = torch.tensor([0.3, *(0.5 * probs)])
    expected[-1] += 0.2

    def p_value(fractions, expected):
        counts = torch.bincount((fractions * 4).long().flatten(), minlength=5).double().numpy()
        return chisquare(counts, N * expected.double().numpy() / expected.double().sum().item()).pvalue

    wrong = expected + torch.tensor([0.03, 0, 0, 0, -0.03])
    for drawn in (fractions, first):
        assert p_value(drawn, expected) > 0.001
        assert p_value(drawn, wrong) < 1e-4  # the test would see a share that is off


def test_a_batch_has_of_each_source_what_is_its_share():
    expected = 40 * torch.tensor([0.1, 0.18, 0.18, 0.18, 0.36])
    rows = MaskSchedule(0.1, 0.72, 0.18).draw(4, (40,))
    counts = torch.bincount((rows * 4).long().flatten(), minlength=5)
    assert (counts - expected).abs().max() < 1
    independent = torch.bincount(torch.multinomial(expected, 40, replacement=True), minlength=5)
    assert (independent - expected).abs().max() > 1  # so the bound says something
    assert MaskSchedule().draw(4, (0,)).shape == (1, 0)


@pytest.mark.parametrize("num_particles", [2, 3, 8])
def test_particles_are_spread_evenly(num_particles):
    expected = num_particles * torch.tensor([0.1, 0.18, 0.18, 0.18, 0.36])

    def counts(schedule):
        drawn = torch.cat([schedule.draw(4, (1000,)) for _ in range(num_particles // schedule.num_particles)])
        return torch.stack([(drawn == k / 4).sum(0) for k in range(5)], -1)

    # As many of each kind as expected, up to rounding; drawn independently they differ by more.
    assert (counts(MaskSchedule(0.1, 0.72, 0.18, num_particles=num_particles)) - expected).abs().max() < 1
    assert (counts(MaskSchedule(0.1, 0.72, 0.18)) - expected).abs().max() > 1


def test_the_whole_model_comes_first_if_asked():
    schedule = MaskSchedule(0.5, 0.5, 0.0, anneal=0.5)
    assert schedule.draw(4, (1000,), t=0.0).unique().tolist() == [1.0]
    half_way = schedule.draw(4, (1000,), t=0.25)
    assert abs((half_way == 1).float().mean() - (0.5 + 0.5 * 0.125)) < 0.002
    assert abs((half_way == 0).float().mean() - 0.25) < 0.002
    for t in (0.5, 1.0):
        assert abs((schedule.draw(4, (1000,), t=t) == 0).float().mean() - 0.5) < 0.002


def test_shares_of_zero_never_occur():
    assert set(MaskSchedule(0.5, 0.0, 0.5).draw(4, (1000,)).flatten().tolist()) == {0.0, 1.0}
    assert set(MaskSchedule(1.0, 0.0, 0.0).draw(4, (1000,)).flatten().tolist()) == {0.0}
    assert MaskSchedule(0.0, 0.0, 1.0).draw(4).tolist() == [1.0]
    third = OrderedMask(probs=torch.tensor([0.0, 0.0, 1.0, 0.0]))
    assert MaskSchedule(0.0, 1.0, 0.0, law=third, num_particles=2).draw(4).tolist() == [0.75, 0.75]


def test_a_law_over_other_blocks_gives_fractions():
    halves = MaskSchedule(0.0, 1.0, 0.0, law=OrderedMask.uniform(2)).draw(16, (100,))
    assert set(halves.flatten().tolist()) == {0.5, 1.0}


def test_a_price_schedule_prints_as_the_call_that_made_it_and_can_be_pickled():
    schedule = PriceSchedule(1.0, 400.0, 0.2, 0.1, 8.0, 0.3)
    text = "PriceSchedule(low=1.0, high=400.0, full=0.2, explore=0.1, temperature=8.0, warmup=0.3)"
    assert repr(schedule) == text
    assert pickle.loads(pickle.dumps(schedule)) == schedule == eval(text)
    assert PriceSchedule() != schedule


@pytest.mark.parametrize("t", [0.0, 0.1, 0.2, 1.0])
def test_lengths_are_uniform_at_first_and_then_at_a_price(t):
    schedule = PriceSchedule(full=0.25, explore=0.1, warmup=0.2)
    drawn = torch.stack([schedule.draw(4, (7,), t)[0, torch.randint(7, ())] for _ in range(N)])
    explore = 1 - 0.9 * min(t / 0.2, 1)
    expected = 0.75 * torch.tensor([1 - explore, *[explore / 4] * 4])
    expected[-1] += 0.25
    counts = torch.bincount((drawn * 4).long(), minlength=5).double()

    def p_value(expected):
        possible = expected > 0
        assert counts[~possible].sum() == 0
        return chisquare(counts[possible].numpy(), N * (expected / expected.sum()).numpy()[possible]).pvalue

    assert p_value(expected) > 0.001
    assert p_value(0.95 * expected + 0.05 * torch.tensor([0.0, 1, 0, 0, 0])) < 1e-4  # power


@pytest.mark.parametrize("explore", [0.05, 0.1, 0.3, 0.7, 1 / 3, 1.0])
def test_shares_sum_to_one_wherever_the_fit_stands(explore):
    schedule = PriceSchedule(full=0.3, explore=explore, warmup=0.7)
    for step in range(101):
        assert schedule.draw(4, (3,), step / 100).shape == (1, 3)
    assert schedule.draw(4, (1000,), 0.0).min() > 0  # none from the law that is not learned yet
    assert (PriceSchedule(full=0.0, explore=0.0, warmup=0.0).draw(4, (1000,), 0.0) == 0).all()
    assert (PriceSchedule(full=1.0).draw(4, (1000,), 0.5) == 1).all()
    assert schedule.anneal == 0.7


def test_prices_are_log_uniform():
    schedule = PriceSchedule(0.5, 200.0)
    values = torch.randn(10, 5)
    prices, _ = schedule.draw_prices((N,), values)
    assert 0.5 <= prices.min() <= prices.max() <= 200
    place = (prices / 0.5).log() / math.log(400)
    assert kstest(place.numpy(), "uniform").pvalue > 0.001
    assert kstest(((prices - 0.5) / 199.5).numpy(), "uniform").pvalue < 1e-6  # they are not uniform themselves
    assert kstest((0.95 * place).numpy(), "uniform").pvalue < 1e-6  # nor with an end 5 % off
    assert schedule.draw_prices((3, 2), values)[0].shape == (3, 2)
    assert PriceSchedule(temperature=3.0).draw_prices((N,), values)[1] == 3


@pytest.mark.parametrize("scale", [0.1, 50.0, 3000.0])
def test_prices_are_by_default_in_proportion_to_what_lengths_are_worth(scale):
    values = torch.tensor([[0.0, 0.5, 1.0, 0.8], [0.0, 1.5, 2.0, 2.2]])  # their mean rises by 1.5
    shift = torch.tensor([[7.0], [-90.0]])  # which no length has to itself
    spread = max(1.5 * scale, 1)
    prices, temperature = PriceSchedule().draw_prices((N,), scale * values + shift)
    place = (prices * 6500 / spread).log() / math.log(6500 / 2.2)
    assert place.min() > -1e-5
    assert place.max() < 1 + 1e-5
    assert kstest(place.numpy(), "uniform").pvalue > 0.001
    assert float(temperature) == pytest.approx(max(spread / 260, 1))
    low, _ = PriceSchedule(low=3 * spread).draw_prices((5,), scale * values)  # above what would be the highest
    torch.testing.assert_close(low, torch.full((5,), 3.0 * spread))


@pytest.mark.parametrize("make", [lambda: OrderedVAE((4,), 3), lambda: MaskedRows()], ids=["amortised", "of one's own"])
def test_prices_need_laws_by_values(make):
    """Also where there are codes or masks that a `MaskSchedule` would cut."""
    model = make()
    with pytest.raises(ValueError, match="fit: argument `schedule` is a PriceSchedule, for laws of lengths by values"):
        fit(model, model.guide, torch.rand(20, 4), num_epochs=1, schedule=PriceSchedule(), progress=False)


def test_the_rate_of_laws_is_that_of_value_heads():
    vae, x = OrderedVAE((4,), 3, posterior_lengths="priced"), torch.rand(20, 4)
    before = {name: value.clone() for name, value in vae.named_parameters()}
    fit(vae, vae.guide, x, num_epochs=2, schedule=PriceSchedule(), lr={"laws": 0.1, "*": 0.0}, progress=False)
    moved = {name for name, value in vae.named_parameters() if not torch.equal(value, before[name])}
    assert moved
    assert all("value_head" in name for name in moved)


def test_laws_in_closed_form_have_no_rate():
    def model(x):
        mask = pyro.sample("mask", OrderedMask.uniform(4))
        w = pyro.sample("w", dist.Normal(torch.zeros(4), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal((mask * w).sum(), 1.0), obs=x)

    message = r"`lr` has a rate for 'laws', and the guide has its law of lengths in closed form, .*: leave 'laws' out"
    for lr in ({"laws": 0.1}, {"laws": 0.1, "*": 0.01}):
        with pytest.raises(ValueError, match=message):
            fit(model, AutoNested(model), torch.rand(20), num_epochs=1, lr=lr, progress=False)
    with pytest.raises(ValueError, match="no parameter of model or guide is in that group"):
        fit(model, AutoNested(model), torch.rand(20), num_epochs=1, lr={"w": 0.1}, progress=False)


def test_prices_need_a_head_that_is_drawn_from():
    """A head that was distilled stays out of the fit of an amortised law."""
    vae, x = OrderedVAE((4,), 3), torch.rand(20, 4)
    vae.add_value_head()
    fit(vae, vae.guide, x, num_epochs=1, progress=False)
    with pytest.raises(ValueError, match="is a PriceSchedule, but no site in the plate 'data' has a law of lengths"):
        fit(vae, vae.guide, x, num_epochs=1, schedule=PriceSchedule(), progress=False)


class MaskedRows(PyroModule):
    """A model with a mask for each row that knows of no value, and its guide."""

    def forward(self, x):
        with pyro.plate("data", len(x)):
            mask = pyro.sample("mask", OrderedMask.uniform(4))
            pyro.sample("x", dist.Normal(mask, 1.0).to_event(1), obs=x)

    @cached_property
    def guide(self):
        return RowsGuide()


class RowsGuide(PyroModule):
    def __init__(self):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(4))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("mask", OrderedMaskStraightThrough(0.2, logits=self.logits))
