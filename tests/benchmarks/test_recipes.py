"""What benchmarks of many fits keep."""

import json
from argparse import Namespace
from dataclasses import dataclass

import pytest

from benchmarks.recipes import read_arguments, write_rows


@dataclass(frozen=True)
class Recipe:
    epochs: int = 1


def row(method, value, seed=0):
    return {"method": method, "seed": seed, "metric": "nll", "value": value}


def test_joined_rows_go_beside_those_of_other_fits(tmp_path):
    args = Namespace(json=tmp_path / "rows.json", part="test", join=False)
    write_rows(args, "benchmarks.first", [row("old", 1.0), row("both", 2.0)], {"recipe": {"epochs": 1}})
    args.join = True
    write_rows(args, "benchmarks.second", [row("both", 3.0), row("new", 4.0), row("old", 5.0, seed=1)], {})
    result = json.loads(args.json.read_text())
    assert result["rows"] == [row("old", 1.0), row("both", 3.0), row("new", 4.0), row("old", 5.0, seed=1)]
    assert "benchmarks.first" in result["header"]["command"]
    assert result["header"]["recipe"] == {"epochs": 1}
    assert ["benchmarks.second" in header["command"] for header in result["later_headers"]] == [True]


def test_rows_of_a_run_replace_the_file(tmp_path):
    args = Namespace(json=tmp_path / "rows.json", part="test", join=False)
    for method in ("old", "new"):
        write_rows(args, "benchmarks.first", [row(method, 1.0)], {})
    result = json.loads(args.json.read_text())
    assert [found["method"] for found in result["rows"]] == ["new"]
    assert "later_headers" not in result


def test_another_part_than_that_of_the_results_needs_a_file(tmp_path, capsys):
    results = tmp_path / "rows.json"
    assert read_arguments("benchmarks.first", "", {}, Recipe, results, [], "validation").part == "validation"
    with pytest.raises(SystemExit):
        read_arguments("benchmarks.first", "", {}, Recipe, results, ["--part", "test"], "validation")
    assert "--part test needs --json FILE: the committed results are of the validation part" in capsys.readouterr().err
