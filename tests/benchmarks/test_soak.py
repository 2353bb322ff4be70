import gc
import json
import os
import shutil
import subprocess
import sys
import threading

import pyro
import pytest
import torch

from benchmarks import soak, soak_fits
from benchmarks.soak_fits import CHECKPOINT, COMBINATIONS, Combination, Wander, digest, outcome
from benchmarks.soak_held import BOUNDS, Held, grown, long_fit
from benchmarks.soak_kills import Row, compare, look
from pyro_vnd.infer import Callback
from pyro_vnd.infer._fit.loop import Loop

STEPS, WARM = 240, 3  # rows of ten that are a warm-up
NOISE = 30.0  # KB that a step of so short a fit may take


@pytest.fixture(autouse=True)
def single_precision(double_precision):
    torch.set_default_dtype(torch.float32)


def command(*arguments):
    """A process of its own, as those of tests have threads."""
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.soak", *map(str, arguments)],
        cwd=soak.ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    ).stdout


def test_fits_are_killed_and_end_as_if_they_had_not_been(tmp_path):
    path = tmp_path / "soak.json"
    which = ("--only", "autoencoder/rates/stopping", "--steps", 0, "--fits", 0)
    printed = command("--kills", 4, *which, "--folder", tmp_path, "--json", path)
    result = json.loads(path.read_text())
    (row,) = result["kills"]
    assert sum(sum(places.values()) for places in row["kills"].values()) == 4
    assert row["finished"] > 0
    assert row["differ"] == {}
    assert row["faults"] == []
    assert printed.strip() == soak.markdown(result)
    assert [each.name for each in tmp_path.iterdir()] == ["soak.json"]
    printed = command("--kills", 0, "--steps", 80, "--fits", 0, "--json", path)  # the rest anew
    again = json.loads(path.read_text())
    assert again["kills"] == result["kills"]
    assert len(again["steps"]) == 10
    assert again["header"] == result["header"]
    assert "--steps 80" in again["later_headers"][0]["command"]
    assert "| 80 |" in printed


class Interrupted(Exception):
    pass


@pytest.fixture
def interrupted(monkeypatch, tmp_path):
    """What comes of a fit that was interrupted in its tenth epoch and goes on."""

    def make(which):
        walk = Wander.on_step

        def on_step(self, run):
            walk(self, run)
            if run.step == 38:
                raise Interrupted

        with monkeypatch.context() as patch:
            patch.setattr(Wander, "on_step", on_step)
            with pytest.raises(Interrupted):
                outcome(which, tmp_path)
        return outcome(which, tmp_path, seed=9)

    return make


WHICH = Combination("plain", "rates", "stopping")


@pytest.fixture
def unbroken(tmp_path_factory):
    return outcome(WHICH, tmp_path_factory.mktemp("unbroken"))


def test_what_goes_on_ends_as_the_unbroken_fit(interrupted, unbroken):
    row = Row(str(WHICH))
    assert compare(row, interrupted(WHICH), unbroken)
    assert row.differ == {}


def test_power_random_numbers_that_are_forgotten_are_found(interrupted, unbroken, monkeypatch):
    monkeypatch.setattr(Loop, "_set_random", lambda self, state: None)
    row = Row(str(WHICH))
    compare(row, interrupted(WHICH), unbroken)
    assert {"result.elbo", "guide", "optimiser", "draws", "events", f"{CHECKPOINT}: random"} <= row.differ.keys()


def test_power_the_state_of_a_callback_that_is_forgotten_is_found(interrupted, unbroken, monkeypatch):
    monkeypatch.setattr(Wander, "load_state_dict", lambda self, state: None)
    row = Row(str(WHICH))
    compare(row, interrupted(WHICH), unbroken)
    assert {"result.metrics", "events", f"{CHECKPOINT}: callbacks"} <= row.differ.keys()
    assert "guide" not in row.differ


def test_all_combinations_are_different_fits():
    assert len(set(COMBINATIONS)) == 24
    assert all(Combination.of(str(which)) == which for which in COMBINATIONS)


def test_the_smallest_difference_changes_a_digest():
    x = torch.tensor([0.1, 0.2])
    y = x.clone()
    y[1] = y[1].nextafter(torch.tensor(1.0))
    assert digest({"a": [x, 1]}) == digest({"a": [x.clone(), 1]})
    for other in ({"a": [y, 1]}, {"a": [x, 1.0]}, {"b": [x, 1]}, {"a": [x.double().float()[:1], 1]}, {"a": [x]}):
        assert digest(other) != digest({"a": [x, 1]})


@pytest.fixture
def folder(tmp_path):
    outcome(Combination("plain", "rates", "best"), tmp_path)
    return tmp_path


def test_a_look_tells_where_a_kill_struck(folder):
    expected = soak_fits.states(folder)
    row = Row("")
    assert look(row, folder, 5, expected) == ("after the last", 56)
    assert look(row, folder, 5, expected | {f"{CHECKPOINT}: random": "another"}) == ("between", 56)
    content = (folder / CHECKPOINT).read_bytes()
    unfinished = folder / f".{CHECKPOINT}.5.tmp"
    for count, kind in ((-1000, "torn"), (None, "whole")):
        unfinished.write_bytes(content[:count])
        assert look(row, folder, 5, expected)[0] == f"within: {kind}"
    unfinished.rename(folder / f".{CHECKPOINT}.5.link.tmp")
    assert look(row, folder, 5, expected)[0] == "within: link"
    (folder / f".{CHECKPOINT}.5.link.tmp").rename(folder / ".fit.csv.5.tmp")
    assert look(row, folder, 5, expected)[0] == "after the last"
    assert row.most_unfinished == 1
    assert row.faults == []
    for path in [*folder.iterdir()]:
        path.unlink()
    assert look(row, folder, 5, expected) == ("before the first", 0)


def test_power_files_that_pile_up_or_cannot_be_read_are_faults(folder):
    row = Row("")
    for pid in (4, 5):
        (folder / f".{CHECKPOINT}.{pid}.tmp").write_bytes(b"half")
    shutil.copy(folder / CHECKPOINT, folder / "copy")
    look(row, folder, 5, soak_fits.states(folder))
    assert [fault.partition(":")[0] for fault in row.faults] == ["unknown files", "unfinished files of two processes"]
    (folder / "fit.previous.pt").unlink()  # which may be one file with the best
    (folder / "fit.previous.pt").write_bytes(b"half")
    with pytest.raises(ValueError, match=r"fit\.previous\.pt' is no checkpoint"):
        look(row, folder, 5, {})


@pytest.fixture
def small_heap():
    """What is there before is not looked through each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


class Leak(Callback):
    """A callback that forgets to give something back."""

    def __init__(self, kind):
        self.kind, self.kept, self.over = kind, [], threading.Event()

    def on_epoch(self, run):
        if self.kind == "tensors":
            self.kept.append(torch.zeros(1))
        elif self.kind == "files":
            self.kept.append(open(os.devnull))  # noqa: SIM115
        elif self.kind == "threads":
            self.kept.append(threading.Thread(target=self.over.wait, daemon=True))
            self.kept[-1].start()
        elif self.kind == "params":
            pyro.get_param_store().setdefault(f"x{run.step}", torch.zeros(1))
        elif self.kind == "memory":
            self.kept.append(b"x" * 2**20)

    def close(self):
        self.over.set()
        for each in self.kept:
            if self.kind == "files":
                each.close()
            elif self.kind == "threads":
                each.join()


def test_a_long_fit_holds_what_it_held(small_heap):
    rows = long_fit(STEPS)
    assert [row.at for row in rows] == [*range(24, 241, 24)]
    assert grown(rows[WARM:], NOISE) == []


@pytest.mark.parametrize("kind", ["tensors", "files", "threads", "params", "memory"])
def test_power_what_is_not_given_back_is_found(kind, small_heap):
    assert kind in grown(long_fit(STEPS, [Leak(kind)])[WARM:], NOISE)


def test_committed_fits_ended_as_the_unbroken_ones_and_nothing_grew():
    result = json.loads(soak.RESULTS.read_text())
    rows = result["kills"]
    assert [row["fit"] for row in rows] == [str(which) for which in COMBINATIONS]
    assert sum(sum(sum(places.values()) for places in row["kills"].values()) for row in rows) >= 2000
    assert all(row["finished"] for row in rows)
    assert {name for row in rows for name in row["differ"]} == set()
    assert {fault for row in rows for fault in row["faults"]} == set()
    for kind, bound in BOUNDS.items():
        assert grown([Held(**row) for row in result[kind]], bound) == []
    assert result["steps"][-1]["at"] == 10_000
    assert result["fits"][-1]["at"] >= 200
