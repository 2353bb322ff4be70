import json

import torch

from benchmarks import nested_speed, report
from benchmarks.nested_speed import TARGETS, main


def test_runs_and_reports(tmp_path, monkeypatch, capsys):
    threads = torch.get_num_threads()
    for name, value in (("HIDDEN", 32), ("BATCH", 16)):
        monkeypatch.setattr(nested_speed, name, value)
    monkeypatch.setattr(nested_speed.plain_net, "__defaults__", (32,))
    path = tmp_path / "speed.json"
    main(["--seconds", "0", "--threads", "1", "--json", str(path)])
    result = json.loads(path.read_text())
    assert torch.get_num_threads() == threads
    assert [row["what"] for row in result["targets"]] == [target[0] for target in TARGETS]
    assert result["ratio"]["plain"] == 1
    assert all(value > 0 for value in (*result["seconds"].values(), *result["peak_mib"].values()))
    table = capsys.readouterr().out
    report.main(["nested_speed", "--json", str(path)])
    where, _, rest = capsys.readouterr().out.partition("\n\n")
    assert where.startswith("Measured 2")
    assert rest == table
