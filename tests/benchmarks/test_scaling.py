import json

import pytest
import torch

from benchmarks import report, scaling
from benchmarks.scaling import RESULTS, WORK, main


def test_runs_and_reports(tmp_path, monkeypatch, capsys):
    threads = torch.get_num_threads()
    monkeypatch.setattr(scaling, "WORK", [work._replace(sizes=(200, 400)) for work in WORK if work.size == "rows"])
    path = tmp_path / "scaling.json"
    main(["--seconds", "0", "--json", str(path)])
    assert torch.get_num_threads() == threads
    result = json.loads(path.read_text())
    for row in result["work"]:
        few, many = row["seconds"].values()
        assert row["exponent"] == pytest.approx(torch.tensor(many / few).log2().item(), abs=0.01)
    nest_cost = report.PAGES["scaling"].read_results()[1]
    assert len(scaling.markdown(result, nest_cost).splitlines()) == 2 + 3 + len(nest_cost["depths"])


def test_no_work_grows_faster_than_its_size_but_for_caches():
    exponents = {(row["work"], row["size"]): row["exponent"] for row in json.loads(RESULTS.read_text())["work"]}
    assert len(exponents) == len(WORK)
    assert max(exponents.values()) < 1.3
