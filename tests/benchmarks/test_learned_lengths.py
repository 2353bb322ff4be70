import json

import matplotlib.pyplot as plt
import pytest

from benchmarks.learned_lengths import LAWS, LEARNED, METHODS, main
from benchmarks.learned_lengths_report import LENGTHS, Scores, astray, figures, markdown, targets


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """Every method, on digits, for one epoch; the second call finds all of it done."""
    folder = tmp_path_factory.mktemp("learned_lengths")
    few = ["--data", "digits", "--set", "epochs=1", "distil_steps=50", "cost_seconds=0.1", "cost_steps=20", "--json"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main([*few, str(folder / "rows.json"), "--seeds", "1"])
        main([*few, str(folder / "joined.json"), "--seeds", "2", "--join"])
    rows, joined = (json.loads((folder / name).read_text()) for name in ("rows.json", "joined.json"))
    assert rows["rows"] == joined["rows"]  # nothing was fitted for the other seed
    return rows


def test_rows_are_complete(result):
    found = {(row["method"], row["law"], row["mean_length"]) for row in result["rows"] if row["metric"] == "mse"}
    for method in METHODS:
        for law in LAWS.values():
            lengths = {m for *key, m in found if key == [method, law]}
            assert lengths == (set() if law == "own" and method not in LEARNED else {*LENGTHS, 32}), (method, law)
    assert set(result["rows"][0]) == {"data", "model", "method", "law", "mean_length", "seed", "metric", "value"}
    assert set(result["header"]["cost"]) == {"encode_at_price", "encode_at_mean_length", "training_step"}


def test_what_is_exact_gains_all(result):
    rows = result["rows"]
    shares = [row["value"] for row in rows if row["metric"] == "share_of_gain" and row["law"] == "exact"]
    assert len(METHODS) < len(shares) <= len(METHODS) * len(LENGTHS)  # there are none where nothing is gained
    assert set(shares) == {1.0}
    scores = Scores(result)
    for method in METHODS:
        whole = {scores.mean(method, law, 32, "mse") for law in ("fixed", "distilled", "exact")}
        assert len(whole) == 1  # of whole codes there is nothing to choose


def test_targets_are_read_from_the_rows(result):
    """Where the error of one method is what it must be, and where it is a little more."""
    scores = Scores(result)
    better = min(scores.mean(method, "fixed", 2, "mse") for method in ("fixed_uniform", "fixed_geometric"))

    def met(value: float) -> bool:
        key = "priced", "distilled", 2, "mse"
        changed = Scores(result)
        changed.values[key] = [value]
        (row,) = (row for row in targets(changed) if "better fixed law's at one length" in row["what"])
        return row["met"][0]

    assert met(0.899 * better)
    assert not met(0.901 * better)


def test_fits_that_went_astray_do_not_count_in_targets(result):
    rows = [row | {"seed": seed} for seed in range(3) for row in result["rows"]]
    assert astray({"rows": rows}) == []
    place = {"method": "fixed_uniform", "seed": 1}
    lost = [row | {"value": 1.6 * row["value"]} if place.items() <= row.items() else row for row in rows]
    assert astray({"rows": lost}) == [("fixed_uniform", 1)]
    assert len(Scores({"rows": lost}, astray({"rows": lost})).values["fixed_uniform", "fixed", 32, "mse"]) == 2
    assert "nested dropout, uniform, seed 1" in markdown(result | {"rows": lost})


def test_page(result):
    text = markdown(result)
    for heading in ("Error at equal mean length", "Share of the exact gain", "the length paid", "Targets"):
        assert heading in text
    assert "nan" not in text
    drawn = figures(result)["learned_lengths"]
    assert [len(ax.lines) for ax in drawn.axes] == [7, 8]
    plt.close(drawn)
