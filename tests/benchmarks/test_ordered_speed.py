import json
from dataclasses import replace

import pytest
import torch

from benchmarks import ordered_speed
from benchmarks.ordered_speed import LABELS, RECIPE, TARGETS, main


@pytest.mark.parametrize("number", [1, 2])
def test_runs_and_reports(number, tmp_path, monkeypatch, capsys):
    torch.set_default_dtype(torch.float32)
    threads = torch.get_num_threads()
    monkeypatch.setattr(ordered_speed, "RECIPE", replace(RECIPE, batch_size=8))
    monkeypatch.setattr(ordered_speed, "STEPS", 2)
    path = tmp_path / "speed.json"
    main(["--seconds", "0", "--threads", str(number), "--json", str(path)])
    result = json.loads(path.read_text())
    assert torch.get_num_threads() == threads
    assert result["header"]["machine"]["threads"] == number
    assert [row["what"] for row in result["targets"]] == list(TARGETS)
    assert set(result["seconds"]) == set(LABELS)
    assert all(value > 0 for value in (*result["seconds"].values(), *result["peak_mib"].values()))
    assert "plain VAE, by hand without Pyro" in capsys.readouterr().out
