"""Widths for a budget: never over it, never worse than one fraction, better where groups are worth unequal things."""

import copy
import math
import time
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from pyro_vnd.diagnostics import evaluate_widths, net_cost
from pyro_vnd.nn import NestedLayer, NestedModel, NestedNet, NormalTargets, Width, narrow, nest, widths_for
from pyro_vnd.nn.table import num_parameters

X = torch.randn(300, 6, generator=torch.Generator().manual_seed(0)).double()
BUDGETS = [0.1, 0.25, 0.5, 0.9, 1.0]
COUNTED = {"macs": "multiply_adds", "parameters": "parameters"}


def cost_of(plain, x, kind):
    return net_cost(plain, x)[COUNTED[kind]]


@pytest.mark.parametrize("cost", COUNTED)
def test_every_family_fits_its_budget_and_no_larger_fraction_does(family, cost):
    plain, images = family
    net = nest(plain, images[:2], num_blocks=4).eval()
    whole, least = (cost_of(narrow(net, width), images[:1], cost) for width in (1.0, 1))
    for budget in (0.02, 0.1, 0.5):
        if least > budget * whole:
            with pytest.raises(ValueError, match=r"`budget` must be at least what the narrowest net costs, "):
                widths_for(net, budget, cost)
            continue
        found = widths_for(net, budget, cost)
        assert cost_of(narrow(net, found), images[:1], cost) <= budget * whole
        assert len(set(found.values())) == 1  # one fraction of groups with as many blocks each
        blocks = next(iter(found.values()))
        if blocks < 4:
            assert cost_of(narrow(net, blocks + 1), images[:1], cost) > budget * whole
        narrowed = narrow(net, budget=budget, cost=cost)
        torch.testing.assert_close(narrowed(images), narrow(net, found)(images))
    assert set(widths_for(net, 1.0, cost).values()) == {4}


def test_budgets_are_shares_or_numbers():
    net = nest(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)), X[:1])
    whole = net_cost(narrow(net, 1.0), X[:1])
    assert whole == {"multiply_adds": 64, "parameters": 74}
    assert widths_for(net, 31) == widths_for(net, 0.49) == widths_for(net, np.int64(31)) == {"0": 3}
    assert widths_for(net, 32) == widths_for(net, 0.5) == {"0": 4}
    assert widths_for(net, 10**9) == {"0": 8}  # one that is too much to be spent
    assert widths_for(net, 20, "parameters") == {"0": 2}
    assert num_parameters(net, {"0": 2}) == 20
    with pytest.raises(ValueError, match=r"at least what the narrowest net costs, 8 multiply-adds or 0\.125 of the wh"):
        widths_for(net, 7)


def test_groups_with_other_blocks_and_frozen_ones():
    plain = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 2))
    net = nest(plain, X[:1], num_blocks={"0": 6, "2": 3}, frozen={"0": 2})
    whole = net_cost(narrow(net, 1.0), X[:1])["multiply_adds"]
    for budget in BUDGETS[1:]:
        found = widths_for(net, budget)
        assert found["0"] >= 2
        assert net_cost(narrow(net, found), X[:1])["multiply_adds"] <= budget * whole
        with net.cut(found, sliced=True):
            net.predict(X[:2])


class Unequal(nn.Module):
    """Two branches, of which one carries all that is to be known, and the other costs the more."""

    def __init__(self):
        super().__init__()
        self.useful, self.idle = nn.Linear(6, 16), nn.Linear(6, 16)
        self.costly, self.last = nn.Linear(16, 16), nn.Linear(32, 1)
        with torch.no_grad():
            self.last.weight[:, 16:] = 0

    def forward(self, x):
        return self.last(torch.cat([self.useful(x).tanh(), self.costly(self.idle(x).tanh()).tanh()], -1))


@pytest.fixture
def unequal():
    torch.manual_seed(3)
    plain = Unequal()
    net = nest(plain, X[:1], num_blocks=8)
    y = plain(X).detach()[:, 0]
    return NestedModel(net, NormalTargets(0.1).double()), (X, y)


def log_likelihood(model, width, data):
    x, y = data
    outputs = narrow(model.net, width)(x)
    return model.likelihood.law(outputs).log_prob(y).mean().item()


@pytest.mark.parametrize("cost", COUNTED)
def test_a_search_is_never_worse_than_the_fraction_and_never_over_budget(unequal, cost):
    model, data = unequal
    whole = cost_of(narrow(model.net, 1.0), X[:1], cost)
    for budget in (0.15, 0.3, 0.5, 0.8):
        uniform, found = widths_for(model, budget, cost), widths_for(model, budget, cost, data)
        assert cost_of(narrow(model.net, found), X[:1], cost) <= budget * whole
        # What is worth something gets the blocks of what is not.
        assert found["useful"] > uniform["useful"]
        assert log_likelihood(model, found, data) > log_likelihood(model, uniform, data) + 0.1
        if budget > 0.15:  # enough for all that is to be known, and it is found
            assert found["useful"] == 8
    again = widths_for(model, 0.3, cost, [(X[:100], data[1][:100]), (X[100:], data[1][100:])])
    assert again == widths_for(model, 0.3, cost, data)
    narrowed = narrow(model, budget=0.3, cost=cost, data=data)
    torch.testing.assert_close(narrowed(X), narrow(model.net, again)(X))


def test_a_search_of_random_nets_is_never_worse():
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, 3, (300,), generator=generator)
    for seed in range(3):
        torch.manual_seed(seed)
        sizes = [6, *torch.randint(4, 20, (3,)).tolist(), 3]
        layers = [part for a, b in pairwise(sizes) for part in (nn.Linear(a, b), nn.ReLU())][:-1]
        net = nest(nn.Sequential(*layers), X[:1])
        whole = net_cost(narrow(net, 1.0), X[:1])["multiply_adds"]
        for budget in (0.2, 0.6):
            uniform, found = widths_for(net, budget), widths_for(net, budget, data=(X, labels), max_tries=60)
            scores = [
                torch.distributions.Categorical(logits=narrow(net, width)(X)).log_prob(labels).mean().item()
                for width in (uniform, found)
            ]
            assert scores[1] >= scores[0]
            assert net_cost(narrow(net, found), X[:1])["multiply_adds"] <= budget * whole


def test_few_tries_end_a_search_early(unequal):
    model, data = unequal
    counts = []

    class Counted(NormalTargets):
        def law(self, outputs, batch_dim=1):
            counts.append(len(outputs))
            return super().law(outputs, batch_dim)

    counted = NestedModel(model.net, Counted(0.1).double())
    widths_for(counted, 0.3, data=data, batch_size=300, max_tries=5)
    assert len(counts) == 5
    assert widths_for(counted, 0.3, data=data, max_tries=1) == widths_for(counted, 0.3)


def test_latency_is_measured():
    """A net of which nearly all time goes into one product of 2048 by 2048 at full width."""
    plain = nn.Sequential(nn.Linear(6, 2048), nn.ReLU(), nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, 1)).float()
    net = nest(plain, X[:1].float(), num_blocks=8)

    def latency(width):
        narrowed, x = narrow(net, width), X[:1].float()
        seconds = []
        with torch.no_grad():
            for _ in range(30):
                start = time.perf_counter()
                narrowed(x)
                seconds.append(time.perf_counter() - start)
        return min(seconds)

    found = widths_for(net, 0.4, "latency")
    assert set(found) == {"0", "2"}
    assert 2 <= found["0"] == found["2"] < 8
    assert latency(found) < 0.6 * latency(1.0)  # another measurement
    assert widths_for(net, 10**9, "latency") == {"0": 8, "2": 8}
    with pytest.raises(ValueError, match=r"the narrowest net costs, \d+ microseconds or 0\.\d+ of the whole net's"):
        widths_for(net, 1, "latency")


def test_batchnorm_gets_statistics_of_each_candidate():
    plain = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU())
    plain = nn.Sequential(*plain, nn.BatchNorm1d(16), nn.Linear(16, 2))
    net = nest(plain, X[:2], num_blocks=8)
    before = copy.deepcopy(net.state_dict())
    labels = (X[:, 0] > 0).long()
    found = widths_for(net, 0.4, data=(X, labels), recalibrate=X, max_tries=40)
    assert set(found) == set(net.widths)
    for name, value in net.state_dict().items():
        torch.testing.assert_close(value, before[name])


def test_inputs_of_integers_need_no_data():
    plain = nn.Sequential(nn.Embedding(10, 6), nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 2)).double()
    net = nest(plain, torch.zeros(1, 5, dtype=torch.long), num_blocks=8, exclude=["0"])
    whole = net_cost(narrow(net, 1.0), torch.zeros(1, 5).long())["multiply_adds"]
    assert net_cost(narrow(net, budget=0.5), torch.zeros(1, 5).long())["multiply_adds"] <= whole / 2


def test_a_net_without_an_example_needs_data():
    hidden = Width("hidden", 16, num_blocks=8)
    parts = NestedLayer(nn.Linear(6, 16), outputs=hidden), nn.ReLU(), NestedLayer(nn.Linear(16, 2), inputs=hidden)
    net = NestedNet(nn.Sequential(*parts))
    message = "`data` is needed for cost='macs', as the net does not say what its inputs are like"
    with pytest.raises(ValueError, match=f"widths_for: argument {message}"):
        widths_for(net, 0.5)
    assert widths_for(net, 0.5, cost="parameters") == {"hidden": 3}  # with 4 blocks, 74 of 146


def test_the_result_is_a_width_to_be_scored(unequal):
    model, data = unequal
    found = widths_for(model, 0.3, data=data)
    partly = {"useful": 0.5}
    scores = evaluate_widths(model, data, [found, partly], None, progress=False)
    assert scores["blocks"].dims == ("width", "group")
    assert scores["blocks"].values[0].tolist() == list(found.values())
    assert scores["blocks"].sel(group="useful").values[1] == 4
    assert scores["blocks"].sel(group="idle").values[1] == 8
    assert scores["nll"].values[0, 0] == pytest.approx(-log_likelihood(model, found, data))
    assert str(found) in scores["requested"].values.tolist()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": 0.0}, r"`budget` must be a share of the whole net's cost in \(0.0, 1.0\] .* got 0.0"),
        ({"budget": 1.5}, r"number of multiply-adds \(an int\); got 1.5"),
        ({"budget": 0}, "got 0"),
        ({"budget": True}, "got True"),
        ({"budget": math.nan}, "got nan"),
        ({"budget": 0.5, "cost": "flops"}, "`cost` must be one of macs, parameters, latency; got 'flops'"),
        ({"budget": 0.5, "max_tries": 0}, "`max_tries` must be an integer, at least 1; got 0"),
        ({"budget": 0.5, "data": X}, "`data` must have inputs and what was observed; got inputs only"),
        ({"budget": 0.5, "data": []}, "`data` has no rows"),
        ({"budget": 0.5, "data": (X, X)}, r"`y` must be classes, integers from 0 to 1, shape \(256,\)"),
        (
            {"budget": 0.5, "data": (X * math.nan, (X[:, 0] > 0).long())},
            "outputs of the net have NaN or inf for 256 of 256 rows of `data`: inputs must be finite",
        ),
        ({"budget": 0.5, "data": (X.float(), X)}, "inputs must be of the type of the net's parameters"),
    ],
)
def test_bad_arguments(arguments, message):
    net = nest(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)), X[:1])
    with pytest.raises(ValueError, match=rf"(?s)^widths_for: .*{message}"):
        widths_for(net, **arguments)


def test_narrow_takes_a_width_or_a_budget():
    net = nest(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)), X[:1])
    for arguments in ({}, {"width": 0.5, "budget": 0.5}):
        with pytest.raises(ValueError, match="narrow: give exactly one of `width` and `budget`"):
            narrow(net, **arguments)
    with pytest.raises(
        ValueError, match=r"widths_for: argument `model` must be a NestedModel, or a NestedNet.*Sequent"
    ):
        widths_for(net.net, 0.5)


def test_views_of_parameters_as_arguments_of_modules_have_a_cost():
    class Queries(nn.Module):
        def __init__(self):
            super().__init__()
            self.p, self.a, self.b = nn.Parameter(torch.randn(8)), nn.Linear(8, 12), nn.Linear(12, 3)

        def forward(self, x):
            return self.b((self.a(self.p.expand(len(x), -1)) + self.a(x)).relu())

    plain = Queries()
    assert net_cost(plain, torch.randn(2, 8))["multiply_adds"] == 2 * 96 + 36
    assert all(parameter.requires_grad for parameter in plain.parameters())
    net = nest(plain, torch.randn(2, 8))
    assert net_cost(narrow(net, budget=0.5), torch.randn(2, 8))["multiply_adds"] <= 114
