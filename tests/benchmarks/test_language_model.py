"""What is fitted and reported of the nested language model, at a tiny size."""

import json
from dataclasses import replace
from itertools import product

import matplotlib.pyplot as plt
import pytest
import torch

from benchmarks import language_model
from benchmarks.language_model import COSTS, CUTS, LABELS, METRICS, RECIPE, TextRecipe, figures, load, main, markdown
from benchmarks.nested_fits import fit_plain
from benchmarks.tables import Rows
from pyro_vnd.diagnostics import evaluate

TINY = [
    "epochs=1",
    "batch_size=256",
    "num_samples=2",
    "context=32",
    "num_blocks=2",
    "head_dim=4",
    "depth=2",
    "init_scale=1",
]


@pytest.fixture(autouse=True)
def float32():
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    yield
    torch.set_default_dtype(dtype)


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """Every method; the second call finds all of it done."""
    folder, dtype = tmp_path_factory.mktemp("language_model"), torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(language_model, "PARTS", folder / "parts")
        for _ in range(2):
            main(["--data", "compound", "--seeds", "1", "--set", *TINY, "--json", str(folder / "rows.json")])
            patch.setattr(language_model, "fit_nested", None)
            patch.setattr(language_model, "fit_plain", None)
    torch.set_default_dtype(dtype)
    return json.loads((folder / "rows.json").read_text())


def test_every_method_is_scored_at_every_width(result):
    found = {(row["cut"], row["method"], row["kept"], row["metric"]) for row in result["rows"]}
    metrics = ("nll", *METRICS, *COSTS, "fit_seconds")
    assert found == {
        (cut, name, kept, metric) for cut in CUTS for name in LABELS for kept in (0.5, 1.0) for metric in metrics
    }
    assert len(result["header"]["text_sha256"]) == 64
    assert result["header"]["versions"]["python"]


def test_nets_trained_alone_have_the_size_of_narrowed_ones(result):
    rows = Rows(result, "cut", "kept", LABELS)
    for cut, kept, metric in product(CUTS, (0.5, 1.0), COSTS):
        assert len({rows.mean(cut, method, kept, metric) for method in LABELS}) == 1
    assert rows.mean("width", "vnd", 1.0, "parameters") == rows.mean("depth", "vnd", 1.0, "parameters")


def test_draws_are_scored_beside_their_mean(result):
    rows = Rows(result, "cut", "kept", LABELS)
    assert abs(rows.mean("width", "vnd", 1.0, "nll") - rows.mean("width", "vnd_mean", 1.0, "nll")) > 1e-3


def test_a_gpt_learns_from_what_came_before():
    """In one epoch, better than any law of single symbols."""
    recipe = replace(RECIPE, epochs=1, num_blocks=2, head_dim=8, depth=1, context=32, lr=1e-2)
    data, _ = load("topics", recipe, "validation")
    torch.manual_seed(0)
    net = recipe.net()
    fit_plain(net, 0, data, recipe)
    nll = evaluate(net, data.scored, data.likelihood, progress=False)["nll"].item()
    counts = data.scored[1].flatten().bincount()
    shares = counts[counts > 0] / counts.sum()
    assert nll < -(shares * shares.log()).sum() - 0.3


def test_the_parts_are_those_asked_for():
    recipe = TextRecipe(context=32)
    validation, test = (load("compound", recipe, part)[0] for part in ("validation", "test"))
    assert torch.equal(validation.train[0], test.train[0])
    assert not torch.equal(validation.scored[0], test.scored[0])


def test_tables_and_figure_are_those_of_the_rows(result):
    rows = Rows(result, "cut", "kept", LABELS)
    text = markdown(result)
    assert f"| {rows.mean('width', 'vnd', 0.5, 'perplexity'):.3f} |" in text
    assert f"| {rows.mean('width', 'independent', 0.5, 'parameters'):,.0f} |" in text
    assert all(label in text for label in LABELS.values())
    (drawn,) = figures(result).values()
    assert [len(ax.lines) for ax in drawn.axes] == [len(LABELS)] * len(CUTS)
    plt.close(drawn)
