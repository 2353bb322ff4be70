import json

import pytest
import torch

from benchmarks.fast_paths import LIMIT, PATHS, RESULTS, _forward_backward, main, markdown, merged, run
from benchmarks.record import write_json

SMALL = {name: tuple(min(n, 8) for n in sizes[-1]) for name, (_, _, sizes) in PATHS.items()}


def tensors(found):
    return [x for x in (found if isinstance(found, tuple | list) else [found]) if isinstance(x, torch.Tensor)]


@pytest.mark.parametrize("name", [name for name in PATHS if name != "MaskSchedule.draw"])
def test_what_is_timed_does_the_same(name):
    torch.manual_seed(0)
    fast, plain = (function() for function in PATHS[name][0](*SMALL[name]))
    if name == "broadcast_shapes":
        assert fast == plain
    else:
        assert len(tensors(fast)) > 0
        torch.testing.assert_close(tensors(fast), tensors(plain))


def test_both_draws_of_a_schedule_have_its_shares():
    torch.manual_seed(0)
    found = [function().squeeze(0).sort().values for function in PATHS["MaskSchedule.draw"][0](1000, 4)]
    shares = [[(x == k / 4).double().mean().item() for k in range(5)] for x in found]
    assert shares[0] == pytest.approx([0.5, 0.1, 0.1, 0.1, 0.2], abs=2e-3)
    assert shares[1] == pytest.approx(shares[0], abs=2e-3)


def test_gradients_are_timed_where_there_are_any():
    x = torch.ones(3, requires_grad=True)
    assert torch.equal(_forward_backward(torch.square, (x,))[0], 2 * torch.ones(3))
    assert torch.equal(_forward_backward(torch.square, (x.detach(),))[0], torch.ones(3))


def test_runs_and_reports(tmp_path, capsys):
    threads = torch.get_num_threads()
    result = run(["broadcast_shapes"], seconds=0.0, min_rounds=1)
    assert torch.get_num_threads() == threads
    assert [(row["path"], row["size"]) for row in result["rows"]] == [("broadcast_shapes", [256])]
    assert result["rows"][0]["ratio"] < LIMIT
    write_json(tmp_path / "fast.json", result, table="rows")
    main(["--table", str(tmp_path / "fast.json")])
    assert capsys.readouterr().out == markdown(result) + "\n"


def test_a_run_of_some_paths_replaces_their_rows():
    def row(path, ratio):
        return {"path": path, "size": [1], "ratio": ratio}

    whole = {"header": "first", "rows": [row("noisy", 0.5), row("what is gone", 0.5), row("hard_mask", 0.5)]}
    part = {"header": "second", "rows": [row("Cut.put", 0.25), row("noisy", 0.25)]}
    found = merged(merged(whole, part), {"header": "third", "rows": []})
    assert found["rows"] == [row("hard_mask", 0.5), row("noisy", 0.25), row("Cut.put", 0.25)]
    assert (found["header"], found["later_headers"]) == ("first", ["second", "third"])


def test_every_path_that_stays_gains():
    rows = json.loads(RESULTS.read_text())["rows"]
    assert {row["path"] for row in rows} == set(PATHS)
    assert max({row["path"]: row["ratio"] for row in rows}.values()) <= LIMIT
