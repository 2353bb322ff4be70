"""What is fitted and reported in the ablation of the law of a net, and in the tries to find a use of it."""

import json

import pytest
import torch

from benchmarks import net_law, net_law_tries
from benchmarks.nested_fits import Data, build, nested
from benchmarks.net_law import LABELS, METRICS, RECIPE, WIDTHS, cost, markdown, mask_schedule
from benchmarks.net_law_tries import COSTS, GRID, add_prices, at_cost, greedy_steps, units_along
from pyro_vnd.diagnostics import net_cost
from pyro_vnd.infer import NestedELBO
from pyro_vnd.nn import NestedClassifier, narrow

TINY = ["--data", "digits", "--seeds", "1", "--set", "epochs=1", "batch_size=256", "num_samples=2", "--json"]


@pytest.fixture(autouse=True)
def float32():
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    yield
    torch.set_default_dtype(dtype)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder, found = tmp_path_factory.mktemp("net_law"), []
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        for benchmark in (net_law, net_law_tries):
            patch.setattr(benchmark, "PARTS", folder / benchmark.__name__)
            benchmark.main([*TINY, str(folder / "rows.json")])
            found.append(json.loads((folder / "rows.json").read_text()))
    torch.set_default_dtype(dtype)
    return found


def test_every_method_is_scored_at_every_width(results):
    found = {(row["method"], row["width"], row["metric"]) for row in results[0]["rows"]}
    cut = set(LABELS) - {"alone"}
    assert {triple for triple in found if triple[2] in METRICS} == {
        (name, width, metric)
        for name in LABELS
        for width in [*(WIDTHS if name in cut else []), "own"]
        for metric in METRICS
    }
    assert found >= {(name, "own", f"mean_length/{layer}") for name in cut for layer in (1, 2)}


def test_a_net_alone_is_never_cut():
    assert set(mask_schedule("alone", RECIPE).draw(16, (100,)).unique().tolist()) == {1.0}


def test_a_frozen_law_stays_uniform(results):
    spread = {
        row["method"]: row["value"]
        for row in results[0]["rows"]
        if (row["width"], row["metric"]) == ("own", "mean_length/1")
    }
    assert spread["naive_frozen"] == spread["share_50_frozen"] == 8.5
    assert abs(spread["naive"] - 8.5) > 0.01


def test_shares_of_masks_are_those_named():
    shares = {name: getattr(mask_schedule(name, RECIPE), "learned", None) for name in LABELS}
    assert shares == {
        **{"share_0": 0, "share_05": 0.05, "share_50": 0.5, "share_50_frozen": 0.5, "share_100": 1},
        **{"default": 0.5, "default_0": 0, "naive": None, "naive_frozen": None, "paper": None, "alone": 0},
    }
    for share in (0, 0.05, 0.5):
        schedule = RECIPE.schedule(share)
        assert schedule.budget / schedule.full == pytest.approx(RECIPE.budget / RECIPE.full)


def test_tries_are_scored_at_the_same_costs(results):
    rows = results[1]["rows"]
    assert results[1]["header"]["part"] == "validation"
    for name in net_law_tries.TRIES:
        methods = {row["method"] for row in rows if row["try"] == name}
        assert "equal fractions" in methods
        assert len(methods) > 1
        found = {row["cost"] for row in rows if row["try"] == name and row["method"] == "equal fractions"}
        assert found == set(COSTS)


def test_tables_are_those_of_the_rows(results):
    text = markdown(*results)
    (value,) = (
        row["value"]
        for row in results[0]["rows"]
        if (row["method"], row["width"], row["metric"]) == ("paper", 1.0, "nll")
    )
    assert f"| {value:.3f} |" in text
    assert all(label in text for label in LABELS.values())


def test_costs_are_those_of_narrowed_nets():
    data = Data.load("digits")
    net = nested(build("mlp", 8), data, RECIPE)
    whole = net_cost(narrow(net, 1.0), data.train[0][:1])["multiply_adds"]
    for blocks in ((1, 16), (4, 2), (16, 16)):
        narrowed = narrow(net, dict(zip(net.widths, blocks, strict=True)))
        assert cost(*blocks, 8) == pytest.approx(net_cost(narrowed, data.train[0][:1])["multiply_adds"] / whole)


def test_prices_tilt_both_laws_of_both_layers_by_what_they_cost():
    """KL(q || p) is zero at any price where nothing was learned, and dear rows have short masks."""
    data = Data.load("digits")
    net = nested(build("mlp", 8), data, RECIPE)
    add_prices(net, 8)
    torch.manual_seed(0)
    elbo = NestedELBO()
    elbo.loss(NestedClassifier(net), net.guide, *(part[:500] for part in data.train))
    first, second = net.widths.values()
    assert first.prices is second.prices
    assert first.prices.log().std() > 1
    assert (first.costs + second.costs)[-1] == pytest.approx(1)
    lengths = first.posterior.mean_length
    assert lengths[first.prices.argmax()] < 1.5 < 8 < lengths[first.prices.argmin()]
    assert all(elbo.kl[name].abs() < 1e-2 for name in net.laws)
    with torch.no_grad():
        first.logits[3] += 3
    elbo.loss(NestedClassifier(net), net.guide, *(part[:500] for part in data.train))
    assert elbo.kl["1.mask"] > 1


def test_a_greedy_search_widens_the_layer_that_gains():
    """Where the second layer alone matters it is widened first, and a block of the other costs nothing otherwise."""
    nll = {(a, b): -float(b) for a in GRID for b in GRID}
    steps = greedy_steps(nll, 28)
    assert steps[: len(GRID)] == [(1, b) for b in GRID]
    units = units_along(steps, 28)
    assert units[0] == (32, 32)
    assert units[-1] == (512, 512)
    for k, (a, b) in enumerate(units, 1):
        assert cost(a / 32, b / 32, 28) == pytest.approx(cost(k, k, 28), rel=0.05)


def test_curves_are_read_between_points_and_nowhere_else():
    found = [(1 / 16, 1.0, 0.5), (1 / 4, 0.0, 0.7)]
    assert at_cost(found, 1 / 8) == pytest.approx({"nll": 0.5, "accuracy": 0.6})
    assert at_cost(found, 1 / 2) == {}
