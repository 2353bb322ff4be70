"""Lengths by row from a network: planted lengths are found, and what is learned is what enumeration says."""

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn
from torch.distributions import kl_divergence

from pyro_vnd.distributions import NestedNormal, OrderedMask, RelaxedOrderedMask
from pyro_vnd.infer import AutoNested, MaskSchedule, NestedELBO, PriceSchedule, distil_lengths, fit
from pyro_vnd.infer._fit.values import ValueSites

# A planted problem: of the eight terms of a curve two matter in rows of one kind, and six in those of the other.

K, TIMES, NOISE = 8, 12, 0.3
HEIGHTS = torch.tensor([1.0, -0.9, 0.8, 0.8, -0.7, 0.7, 0.6, 0.6])


def terms(t):
    return 2**0.5 * torch.cos(torch.pi * t.unsqueeze(-1) * torch.arange(1, K + 1))


def curves(num_rows, seed):
    generator = torch.Generator().manual_seed(seed)
    length = torch.where(torch.rand(num_rows, generator=generator) < 0.5, 2, 6)
    t, noise = torch.rand(num_rows, TIMES, generator=generator), torch.randn(num_rows, TIMES, generator=generator)
    kept = torch.arange(K) < length.unsqueeze(-1)
    return (t, (terms(t) * (kept * HEIGHTS).unsqueeze(1)).sum(-1) + NOISE * noise), length.to(t)


def curve_model(t, y):
    w = pyro.sample("w", dist.Normal(torch.zeros(K), 1.0).to_event(1))
    sigma = pyro.sample("sigma", dist.LogNormal(-1.0, 1.0))
    with pyro.plate("data", len(t), dim=-2):
        mask = pyro.sample("mask", OrderedMask.uniform(K))
        with pyro.plate("times", TIMES, dim=-1):
            pyro.sample("y", dist.Normal((terms(t) * mask * w).sum(-1), sigma), obs=y)


def projections(t, y):
    return (terms(t) * y.unsqueeze(-1)).mean(1)


def correlation(guide, data, length):
    found = guide.lengths(*data, mean_length=4.0).mean_length
    return torch.corrcoef(torch.stack([found, length]))[0, 1].item()


def fitted(look, schedule):
    guide, (data, _) = AutoNested(curve_model, amortise=look), curves(200, seed=0)
    fit(curve_model, guide, data, num_epochs=200, batch_size=100, lr=0.01, schedule=schedule, progress=False)
    return guide


@pytest.mark.parametrize("schedule", [PriceSchedule(0.1, 20.0, temperature=2.0), PriceSchedule()])
def test_random_prices_find_the_lengths_of_rows(schedule):
    guide = fitted(projections, schedule)
    for seed in (0, 1):  # those of the fit, and others
        data, length = curves(200 + seed, seed)
        assert correlation(guide, data, length) > 0.9
        assert guide.lengths(*data, mean_length=4.0).mean_length.mean() == pytest.approx(4, abs=0.4)


def test_distilled_after_masks_that_were_prescribed():
    guide, (data, length), (others, other_length) = fitted(projections, MaskSchedule()), curves(200, 0), curves(301, 1)
    report = distil_lengths(guide, data, num_steps=500, batch_size=128, progress=False)
    assert report.correlation[1] > 0.9
    assert correlation(guide, data, length) > 0.9
    assert correlation(guide, others, other_length) > 0.9


def test_features_of_other_rows_find_nothing():
    """The power test: what finds lengths is the features, of 301 rows that were not seen."""
    guide = fitted(lambda t, y: projections(t, y).roll(1, 0), PriceSchedule(0.1, 20.0, temperature=2.0))
    data, length = curves(301, seed=1)
    assert abs(correlation(guide, data, length)) < 0.3  # five deviations of it by chance


# What is learned, against enumeration.


def counts(kind, y, observed=None):
    """Sums of a mask seen thrice, some of them not: kinds of rows have one y each."""
    with pyro.plate("rows", len(y), dim=-2):
        mask = pyro.sample("mask", OrderedMask(probs=torch.tensor([0.4, 0.3, 0.2, 0.1])))
        with pyro.plate("times", 3, dim=-1), poutine.mask(mask=True if observed is None else observed):
            pyro.sample("y", dist.Normal(mask.sum(-1), 0.7), obs=y)


def one_hot(kind, *_):
    return nn.functional.one_hot(kind, 2).to(torch.get_default_dtype())


@pytest.fixture
def rows():
    kind = torch.arange(40) % 2
    y = torch.tensor([[1.2, 1.9, 1.6], [3.5, 2.6, 4.1]])[kind]
    observed = torch.tensor([[True, False, True], [True, True, True]])[kind]
    return kind, y, observed


def exact_values(y, observed):
    lengths = torch.arange(1.0, 5.0)
    return (dist.Normal(lengths, 0.7).log_prob(y.unsqueeze(-1)) * observed.unsqueeze(-1)).sum(1)


def test_value_curves_are_those_by_enumeration(rows):
    guide = AutoNested(counts, amortise=one_hot)
    guide(*rows)
    exact = exact_values(*rows[1:])
    torch.testing.assert_close(guide.value_curve(*rows), exact)
    few = [part[3:10] for part in rows]
    torch.testing.assert_close(guide.value_curve(*few, lengths=[2, 4]), exact[3:10][:, [1, 3]])
    # Power: what is hidden would be noticed.
    assert (guide.value_curve(*rows[:2]) - exact).abs().max() > 0.1


def test_what_rows_turn_out_to_be_worth_is_what_their_lengths_are_worth(rows):
    guide = AutoNested(counts, amortise=one_hot)
    guide(*rows)
    with ValueSites("rows", 1.0, True, PriceSchedule(temperature=1.0)) as sites:
        NestedELBO(num_particles=2).differentiable_loss(counts, guide, *rows)
    assert len(sites.rounds) == 2
    for now in sites.rounds:
        length = now.lengths["mask"]
        assert length.shape == (40, 1)
        torch.testing.assert_close(now.worth("mask"), exact_values(*rows[1:]).gather(1, length - 1))


@pytest.mark.parametrize("schedule", [MaskSchedule(0, 1, 0), PriceSchedule(0.01, 10.0, explore=0.5, temperature=1.0)])
def test_laws_at_a_price_are_those_by_enumeration(rows, schedule):
    guide = AutoNested(counts, amortise=one_hot)
    fit(counts, guide, rows, num_epochs=400, lr=0.01, schedule=schedule, plate="rows", progress=False)
    prior = torch.tensor([0.4, 0.3, 0.2, 0.1])
    for price in (0.0, 1.0, 3.0):
        exact = (exact_values(*rows[1:]) + prior.log() - price * torch.arange(4)).softmax(-1)
        found = guide.lengths(*rows, price=price).probs
        assert (found - exact).abs().sum(-1).max() / 2 < 0.03
        # Power: without the prior, or at a temperature, laws are others.
        flat = guide.lengths(*rows, price=price, temperature=2.0).probs
        assert (flat - exact).abs().sum(-1).max() / 2 > 0.1
    uniform = (exact_values(*rows[1:])).softmax(-1)
    assert (guide.lengths(*rows).probs - uniform).abs().sum(-1).max() / 2 > 0.03
    mean = guide.lengths(*rows, mean_length=2.2).mean_length.mean()
    assert mean.item() == pytest.approx(2.2, abs=0.02)


def nested(x):
    with pyro.plate("data", len(x)):
        code = pyro.sample("code", NestedNormal(torch.full((3,), 0.5), torch.tensor([1.0, 2.0, 0.5]), torch.zeros(3)))
        pyro.sample("x", dist.Normal(code, 0.3).to_event(1), obs=x)


def test_codes_start_at_their_law_in_the_model():
    torch.manual_seed(0)
    guide, x = AutoNested(nested, amortise=lambda x: x), torch.randn(7, 3)
    with poutine.trace() as trace:
        guide(x)
    law = trace.trace.nodes["code"]["fn"]
    torch.testing.assert_close(law.loc, torch.full((7, 3), 0.5))
    torch.testing.assert_close(law.scale, torch.tensor([1.0, 2.0, 0.5]).expand(7, 3))
    torch.testing.assert_close(law.length_probs, torch.full((7, 3), 1 / 3))


@pytest.mark.parametrize("wrong", [False, True])
def test_value_curves_of_codes_have_their_mean(wrong):
    """100 draws, in rows of their own, against the closed form; the power test, of another noise, is rejected."""
    torch.manual_seed(1)
    guide, x = AutoNested(nested, amortise=lambda x: x, num_draws=5), torch.randn(30, 3)
    guide(x)
    nn.init.normal_(guide[0].codes.weight, std=0.3)
    draws = []
    for seed in range(20):
        torch.manual_seed(seed)  # a call gives back the random numbers that it takes
        draws.append(guide.value_curve(x).mean(0))
    with poutine.trace() as trace:
        guide(x)
    q, noise = trace.trace.nodes["code"]["fn"], 0.33 if wrong else 0.3
    kept = torch.ones(3, 3).tril()
    expected = dist.Normal(kept * q.loc.unsqueeze(1), noise).log_prob(x.unsqueeze(1))
    expected = expected - kept * q.scale.unsqueeze(1).square() / (2 * noise**2)
    divergence = kl_divergence(dist.Normal(q.loc, q.scale), dist.Normal(0.5, torch.tensor([1.0, 2.0, 0.5])))
    expected = (expected.sum(-1) - divergence @ kept.T).mean(0)
    means = torch.stack(draws)
    error = means.std(0) / 20**0.5
    assert bool(((means.mean(0) - expected).abs() < 4 * error).all()) != wrong


def test_codes_of_rows_are_as_long_as_these():
    torch.manual_seed(2)
    length = torch.where(torch.rand(200) < 0.5, 1, 3)
    x = 2 * torch.randn(200, 3) * (torch.arange(3) < length.unsqueeze(-1)) + 0.3 * torch.randn(200, 3)
    network = nn.Sequential(nn.Linear(3, 16), nn.SiLU(), nn.Linear(16, 16))
    guide, before = AutoNested(nested, amortise=network), copy.deepcopy(network.state_dict())
    schedule = PriceSchedule(0.1, 20.0, temperature=2.0)
    fit(nested, guide, x, num_epochs=300, batch_size=100, lr=0.01, schedule=schedule, progress=False)
    found = guide.lengths(x, mean_length=2.0).mean_length
    assert torch.corrcoef(torch.stack([found, length.to(x)]))[0, 1] > 0.75  # half of the long ones hardly need it
    assert all((value != before[name]).any() for name, value in network.state_dict().items())
    assert guide.median(x)["code"].shape == (200, 3)
    assert (guide.median(x)["code"][length == 3] - x[length == 3]).abs().mean() < 0.3


@pytest.mark.parametrize("dim", [-1, -2])
def test_codes_begin_at_their_prior_in_any_dimension_of_the_plate(dim):
    loc, scale = torch.tensor([0.5, -1.0, 0.0]), torch.tensor([1.0, 2.0, 0.5])

    def model(x):
        with pyro.plate("data", len(x), dim=dim):
            pyro.sample("code", NestedNormal(loc, scale, torch.zeros(3)))

    guide, x = AutoNested(model, amortise=lambda x: x), torch.randn(5, 2)
    law = poutine.trace(guide).get_trace(x).nodes["code"]["fn"]
    assert law.batch_shape == (5, *[1] * (-1 - dim))
    torch.testing.assert_close(law.loc, loc.expand(*law.batch_shape, 3))
    torch.testing.assert_close(law.scale, scale.expand(*law.batch_shape, 3))


# Guides as others are.


def test_a_module_is_trained_by_the_values_of_a_mask_and_kept_with_the_guide(rows):
    class Look(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(2, 3)

        def forward(self, kind, y, observed):
            return self.table(kind)

    torch.manual_seed(0)
    network = Look()
    guide, before = AutoNested(counts, amortise=network), network.table.weight.detach().clone()
    fit(counts, guide, rows, num_epochs=20, schedule=MaskSchedule(), plate="rows", progress=False)
    assert (network.table.weight != before).all()
    assert "0.network.table.weight" in guide.state_dict()
    twin = copy.deepcopy(guide)
    torch.testing.assert_close(twin.lengths(*rows, price=1.0).probs, guide.lengths(*rows, price=1.0).probs)


def test_the_best_lengths_are_the_modes_of_their_laws(rows):
    guide = AutoNested(counts, amortise=one_hot)
    fit(counts, guide, rows, num_epochs=100, lr=0.01, schedule=PriceSchedule(), plate="rows", progress=False)
    for price in (0.0, 1.0, 100.0):
        law = guide.lengths(*rows, price=price)
        assert torch.equal(guide.choose_lengths(*rows, price=price), law.probs.argmax(-1) + 1)
    assert guide.choose_lengths(*rows, price=1e6).eq(1).all()
    chosen = guide.choose_lengths(*rows, mean_length=2.0).double().mean().item()
    assert abs(chosen - 2.0) < abs(guide.choose_lengths(*rows, mean_length=3.5).double().mean().item() - 2.0)


def test_calls_leave_a_fitted_guide_as_it_is(rows):
    guide = AutoNested(counts, amortise=one_hot)
    guide(*rows)
    state = copy.deepcopy(guide.state_dict())
    with torch.no_grad():
        guide(*rows)
    for call in (guide.lengths, guide.median, guide.value_inputs, guide.value_curve):
        call(*[part[5:9] for part in rows])
    for name, value in guide.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=0, atol=0, equal_nan=True)


def test_a_guide_says_what_it_is_and_draws_any_rows(rows):
    guide = AutoNested(counts, amortise=one_hot)
    assert guide(*rows)["mask"].shape == (40, 1, 4)
    assert guide(*[part[:7] for part in rows])["mask"].shape == (7, 1, 4)
    assert repr(guide).startswith("AutoNested(mask: 1 to 4 by row, from 2 features; mean field, as argument `amortise`")
    assert guide.laws == {}
    assert guide.median(*rows)["mask"].shape == (40, 1, 4)


def numbered(i, y):
    with pyro.plate("data", 12, subsample=i):
        level = pyro.sample("level", dist.Normal(0.0, 1.0))
        mask = pyro.sample("mask", OrderedMask.uniform(3))
        pyro.sample("y", dist.Normal(mask.sum(-1) + level, 0.5), obs=y)


def test_other_latents_of_numbered_rows():
    i, y = torch.arange(12), torch.linspace(0, 4, 12)
    guide = AutoNested(numbered, amortise=lambda i, y: y.unsqueeze(-1), num_draws=200)
    data = (i, y)
    fit(numbered, guide, data, num_epochs=30, batch_size=4, schedule=MaskSchedule(), progress=False)
    part = next(part for part in guide if hasattr(part, "locs"))
    loc, scale = part.locs.level.detach(), part.scales.level.detach()
    lengths = torch.arange(1.0, 4.0)
    exact = dist.Normal(loc.unsqueeze(-1) + lengths, 0.5).log_prob(y.unsqueeze(-1)) - scale.unsqueeze(-1) ** 2 / 0.5
    exact = exact - kl_divergence(dist.Normal(loc, scale), dist.Normal(0.0, 1.0)).unsqueeze(-1)
    rows = torch.tensor([7, 2, 5])
    difference = guide.value_curve(rows, y[rows]) - exact[rows]
    assert difference.abs().max() < 4 * (2 * scale.max() / 0.5**2) / 200**0.5  # deviations of the mean of 200 draws
    assert (guide.value_curve(rows, y[rows]) - exact[rows.flip(0)]).abs().max() > 1.5
    with ValueSites("data", 1.0, True, None) as sites:  # also of latents that come before the mask
        NestedELBO(num_particles=2).differentiable_loss(numbered, guide, *data)
    assert [len(now.nats) for now in sites.rounds] == [3, 3]


def test_rows_that_nobody_numbered_are_not_known_again():
    def model(y):
        with pyro.plate("data", len(y)):
            level = pyro.sample("level", dist.Normal(0.0, 1.0))
            mask = pyro.sample("mask", OrderedMask.uniform(3))
            pyro.sample("y", dist.Normal(mask.sum(-1) + level, 0.5), obs=y)

    guide, y = AutoNested(model, amortise=lambda y: y.unsqueeze(-1)), torch.linspace(0, 4, 12)
    guide(y)
    assert guide.lengths(y[:5], price=1.0).batch_shape == (5,)
    with pytest.raises(ValueError, match=r"latents \['level'\] have a law for each row, and nothing says which"):
        guide.value_curve(y)


# Bad input.


def outside(y):
    mask = pyro.sample("mask", OrderedMask.uniform(3))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mask.sum(-1), 1.0), obs=y)


def in_plate(make):
    def model(y):
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(make().sum(-1), 1.0), obs=y)

    return model


def two_masks():
    return pyro.sample("a", OrderedMask.uniform(3)) + pyro.sample("b", OrderedMask.uniform(3))


@pytest.mark.parametrize(
    ("model", "change", "message"),
    [
        (outside, {}, r"the model's masks \['mask'\] are outside plates"),
        (in_plate(two_masks), {}, r"got those of {'a': \['data'\], 'b': \['data'\]}"),
        (in_plate(lambda: pyro.sample("m", RelaxedOrderedMask(0.5, logits=torch.zeros(3)))), {}, r"or soft"),
        (
            in_plate(lambda: pyro.sample("m", OrderedMask.uniform(3), infer={"enumerate": "parallel"})),
            {},
            "the model marks site 'm' for enumeration",
        ),
        (in_plate(lambda: pyro.sample("m", OrderedMask.uniform(3).mask(True))), {}, "the law at site 'm' is wrapped"),
        (in_plate(lambda: pyro.sample("m", OrderedMask(logits=torch.randn(6, 3)))), {}, "one law a priori for all"),
        (
            in_plate(lambda: pyro.sample("m", OrderedMask(probs=torch.tensor([0.5, 0.5, 0.0])))),
            {},
            "`prior` must be a single law over 3 units that gives each length a positive probability",
        ),
        ("mask", {"shared_plates": ["data"]}, "`shared_plates` says that the rows of 'data' share their law"),
        ("mask", {"latents": "conditional"}, "must be 'mean_field' here, not 'conditional': argument `amortise` is"),
        ("mask", {"amortise": lambda y: y}, r"shape \(N, D\), of floating-point numbers; got shape \(6,\)"),
        ("mask", {"amortise": lambda y: None}, "got NoneType"),
        ("mask", {"amortise": lambda y: torch.ones(6, 1).long()}, r"got shape \(6, 1\), torch.int64"),
        ("mask", {"amortise": lambda y: torch.ones(5, 1)}, r"for each of the 6 rows of plate 'data'; got shape \(5, 1"),
    ],
)
def test_bad_arguments(model, change, message):
    model = in_plate(lambda: pyro.sample("m", OrderedMask.uniform(3))) if model == "mask" else model
    guide = AutoNested(model, **({"amortise": lambda y: y.unsqueeze(-1)} | change))
    with pytest.raises(ValueError, match=message):
        guide(torch.randn(6))


@pytest.mark.parametrize("network", [3, nn.Linear])
def test_what_is_no_network(network):
    with pytest.raises(ValueError, match="argument `amortise` must be a function or a module"):
        AutoNested(outside, amortise=network)


def test_bad_questions(rows):
    guide = AutoNested(counts, amortise=one_hot)
    with pytest.raises(ValueError, match=r"AutoNested.lengths: .* and fit it, or call it, first"):
        guide.lengths(*rows)
    with pytest.raises(ValueError, match=r"AutoNested.add_value_head: .* AutoNested\(model, amortise=network\)"):
        distil_lengths(AutoNested(counts), rows, progress=False)
    guide(*rows)
    with pytest.raises(ValueError, match="price, which is not known yet"):
        guide.lengths(*rows, mean_length=2.0)
    with pytest.raises(ValueError, match="give one of `price` and `mean_length`"):
        guide.lengths(*rows, price=1.0, mean_length=2.0)
    for temperature in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="argument `temperature` must be finite and > 0"):
            guide.lengths(*rows, temperature=temperature)
    for lengths in ([], [0], [5], [1.5]):
        with pytest.raises(ValueError, match="argument `lengths` must be integers from 1 to 4; got"):
            guide.value_curve(*rows, lengths=lengths)
    with pytest.raises(ValueError, match=r"use AutoNested\(model, amortise=network\), whose lengths are by row"):
        fit(counts, AutoNested(counts), rows, schedule=PriceSchedule(), plate="rows", progress=False)
