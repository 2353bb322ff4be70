import json
from dataclasses import replace

import matplotlib.pyplot as plt
import pytest
import torch

from benchmarks import cascade
from benchmarks.cascade import COSTS, WIDTHS, main
from benchmarks.cascade_report import Rows, figures, markdown
from benchmarks.nested_nets import RECIPES, Data


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """Digits, for two epochs; the second call finds all of it done."""
    folder = tmp_path_factory.mktemp("cascade")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cascade, "PARTS", folder / "parts")
        patch.setattr(cascade, "RECIPES", {"mlp": replace(RECIPES["mlp"], epochs=2, batch_size=32)})
        for _ in range(2):
            main(["--data", "digits", "--arch", "mlp", "--seeds", "1", "--json", str(folder / "rows.json")])
            patch.setattr(cascade, "train", None)
    return json.loads((folder / "rows.json").read_text())


def test_rows_are_complete(result):
    found = {(row["method"], row["cost"]) for row in result["rows"] if row["metric"] == "nll"}
    assert found == {
        *(("cascade", cost) for cost in COSTS),
        *(("fixed", cost) for cost in (*COSTS, 1.0)),
        *(("stage", width) for width in WIDTHS),
    }
    assert {"command", "versions", "revision", "recipe", "widths"} <= set(result["header"])


def test_both_cost_the_same(result):
    rows = Rows(result)
    for cost in COSTS:
        spent = rows.mean("mlp", "cascade", cost, "multiply_adds")
        assert spent == pytest.approx(cost, rel=0.2)  # other rows than those of the fit
        assert rows.mean("mlp", "fixed", cost, "multiply_adds") == pytest.approx(spent)
        shares = [rows.mean("mlp", "cascade", cost, f"share_of_rows/{k}") for k in range(len(WIDTHS))]
        assert sum(shares) == pytest.approx(1, abs=1e-3)


def test_the_whole_net_is_the_last_stage(result):
    rows = Rows(result)
    for metric in ("accuracy", "nll", "auroc"):
        assert rows.mean("mlp", "fixed", 1.0, metric) == rows.mean("mlp", "stage", 1.0, metric)


def test_tables_and_figure(result):
    rows = Rows(result)
    text = markdown(result)
    assert f"| {100 * rows.mean('mlp', 'cascade', 0.25, 'accuracy'):.2f} |" in text
    gain = rows.mean("mlp", "cascade", 0.25, "nll") - rows.mean("mlp", "fixed", 0.25, "nll")
    assert f"| {gain:+.4f} |" in text
    at_random = sum(
        rows.mean("mlp", "cascade", 0.25, f"share_of_rows/{k}") * rows.mean("mlp", "stage", width, "accuracy")
        for k, width in enumerate(WIDTHS)
    )
    assert rows.at_random("mlp", 0.25) == [pytest.approx(at_random)]
    (drawn,) = figures(result).values()
    assert all(len(ax.lines) == 2 for ax in drawn.axes)
    plt.close(drawn)


def test_where_recipes_are_compared_thresholds_and_scores_have_rows_of_their_own():
    data = Data.load("digits", "validation")
    halved = cascade.halves(data)
    assert halved.calibration is not None
    assert len(halved.scored[0]) + len(halved.calibration[0]) == len(data.scored[0])
    both = torch.cat([halved.scored[0], halved.calibration[0]])
    assert len(both.flatten(1).unique(dim=0)) == len(data.scored[0].flatten(1).unique(dim=0))
    test = Data.load("digits")
    assert cascade.halves(test) is test
