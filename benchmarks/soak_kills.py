"""Kill fits at random moments, resume them until they end, and compare what came of them with an unbroken fit.

    python -m benchmarks.soak_kills FOLDER regression/rates/best ...

makes unbroken fits, each in a process of its own, and prints what they came to as JSON.
"""

import gc
import itertools
import json
import os
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any, NoReturn

import torch
from tqdm import tqdm

from benchmarks.soak_fits import CHECKPOINT, Combination, diabetes, digits, outcome, states
from pyro_vnd.infer._fit.checkpoint import Folder, read_state

__all__ = ["PLACES", "Row", "kill_and_resume"]

ROOT = Path(__file__).parents[1]
PLACES = ("before the first", "within: torn", "within: whole", "within: link", "between", "after the last")
UNFINISHED = re.compile(r"\.fit\.(?:pt|csv)\.(\d+)(\.link)?\.tmp")
KEPT = {CHECKPOINT, "fit.previous.pt", "fit.best.pt", "fit.csv", "events"}
SECONDS = 120.0  # after which a fit hangs
GLANCE = 2e-4  # between two looks at a process


@dataclass
class Row:
    """What came of one combination.

    Attributes:
        fit: Its name.
        seconds: CPU time of an unbroken fit.
        write_seconds: CPU time of writing a checkpoint.
        finished: Fits that ended.
        kills: Kills by how they were aimed, and by where they struck.
        resumes: Processes that found files of one before.
        most_unfinished: Most unfinished files that a kill has left.
        differ: How often each part of the outcome was another one than that of the unbroken fit.
        faults: What went wrong.
    """

    fit: str
    seconds: float = 0.0
    write_seconds: float = 0.0
    finished: int = 0
    kills: dict[str, Counter[str]] = field(default_factory=lambda: {"uniform": Counter(), "in writes": Counter()})
    resumes: int = 0
    most_unfinished: int = 0
    differ: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)


def kill_and_resume(
    combinations: Sequence[Combination], num_kills: int, seed: int, folder: Path | None = None
) -> Iterator[list[dict[str, Any]]]:
    """Kill fits until there were so many kills, all combinations in turn.

    Args:
        combinations: What is fitted.
        num_kills: Kills of all together.
        seed: Of the moments.
        folder: Where files are written; the usual folder for temporary files by default.

    Yields:
        A row for each combination as it is then, after each fit that ended.

    Raises:
        RuntimeError: If this process has several threads, which a fork would not copy.
    """
    prepare()
    with tempfile.TemporaryDirectory(dir=folder) as name, tqdm(total=num_kills, desc="kills", unit="kill") as bar:
        base, rows, expected = Path(name), list[Row](), list[dict[str, str]]()
        for which, known in unbroken(combinations, made(base / "unbroken")).items():
            bar.set_postfix_str(f"unbroken {which}")
            here = base / str(len(rows))
            expected.append(known)
            rows.append(Row(str(which)))
            rows[-1].write_seconds = seconds_of_a_write(base / "unbroken" / str(len(rows) - 1) / CHECKPOINT)
            attempt = Attempt(which, made(here))
            compare(rows[-1], attempt.wait(), expected[-1])
            rows[-1].seconds = attempt.seconds
            shutil.rmtree(here)
        for turn in itertools.count():
            if bar.n >= num_kills:
                return
            at, here = turn % len(rows), made(base / str(turn))
            bar.set_postfix_str(rows[at].fit)
            killed_fit(combinations[at], rows[at], expected[at], here, random.Random(f"{seed} {turn}"), bar)
            shutil.rmtree(here)
            yield [vars(row) for row in rows]


def prepare() -> None:
    """Load what all fits need, so that a fork has it.

    Raises:
        RuntimeError: If this process has several threads.
    """
    torch.set_num_threads(1)
    tqdm.monitor_interval = 0  # a thread
    tqdm.set_lock(threading.RLock())  # the usual one is shared by processes, and a killed one would keep it
    diabetes(), digits()
    for name in ("torch._dynamo", "torch.utils.tensorboard", "tensorboard.backend.event_processing.event_accumulator"):
        import_module(name)

    if len(os.listdir("/proc/self/task")) > 1:
        raise RuntimeError("soak: this process has several threads; set OMP_NUM_THREADS=1")
    gc.collect()
    gc.freeze()


def made(folder: Path) -> Path:
    """Make a folder."""
    folder.mkdir()
    return folder


def unbroken(combinations: Sequence[Combination], folder: Path) -> dict[Combination, dict[str, str]]:
    """Fit in processes of another interpreter, in folders that are numbered."""
    command = [sys.executable, "-m", "benchmarks.soak_kills", str(folder), *map(str, combinations)]
    ran = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, check=True)
    return dict(zip(combinations, json.loads(ran.stdout), strict=True))


class Attempt:
    """A process that fits, or goes on with a fit.

    Args:
        which: What is fitted.
        folder: Where its files are.
    """

    def __init__(self, which: Combination, folder: Path) -> None:
        self.folder, self.seconds, self._hangs = folder, 0.0, False
        self._pipe, write = os.pipe()
        self._end = time.monotonic() + SECONDS
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._pipe)
            child(which, folder, write)
        os.close(write)

    def until(self, comes: Callable[[], bool]) -> bool:
        """Wait until something comes, and say whether it did before the fit was over."""
        while not select.select([self._pipe], [], [], GLANCE)[0]:
            if comes():
                return True
            if time.monotonic() > self._end:
                self._hangs = True
                self.kill()
                return False
        return False

    def runs_for(self, seconds: float) -> bool:
        """Wait until the process has taken so much more CPU time, and say whether it did before the fit was over."""
        clock = (~self.pid << 3) | 2  # Linux's clock of the CPU time of another process
        end = time.clock_gettime(clock) + seconds
        return self.until(lambda: time.clock_gettime(clock) >= end)

    def writes(self) -> bool:
        """Say whether the process writes a checkpoint."""
        mine = f".{CHECKPOINT}.{self.pid}."
        return any(name.startswith(mine) for name in os.listdir(self.folder))

    def kill(self) -> None:
        """Kill the process."""
        os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> dict[str, Any] | None:
        """Wait for the end, and return what the process reported, or None if it was killed."""
        self.until(lambda: False)
        with os.fdopen(self._pipe) as pipe:
            text = pipe.read()
        _, status, usage = os.wait4(self.pid, 0)
        self.seconds = usage.ru_utime + usage.ru_stime
        if self._hangs:
            return {"error": f"the fit was not over after {SECONDS:g} seconds"}
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
            return None
        return json.loads(text) if text else {"error": f"the process ended with status {status}"}


def child(which: Combination, folder: Path, write: int) -> NoReturn:
    """Fit, report, and end without what Python does at the end of the process that was copied."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    try:
        # A model that goes on begins elsewhere: all that the end depends on must be in the file.
        report = outcome(which, folder, seed=os.getpid() if (folder / CHECKPOINT).exists() else 0)
    except BaseException as error:
        report = {"error": f"{type(error).__name__}: {error}"}
    with os.fdopen(write, "w") as pipe:
        json.dump(report, pipe)
    os._exit(0)


def killed_fit(
    which: Combination, row: Row, expected: dict[str, str], folder: Path, moments: random.Random, bar: Any
) -> None:
    """Kill a fit and go on with it until it ends, or fails."""
    steps = 0
    while True:
        row.resumes += any(folder.iterdir())
        attempt = Attempt(which, folder)
        aim = "uniform"
        if bar.n < bar.total:
            aim, moment = moments.choice([*row.kills]), moments.uniform(0, row.seconds)
            strikes = attempt.runs_for(moment)
            if strikes and aim == "in writes":
                strikes = attempt.until(attempt.writes) and attempt.runs_for(
                    moments.uniform(0, 1.2 * row.write_seconds)
                )
            if strikes:
                attempt.kill()
        report = attempt.wait()
        if report is not None:
            row.finished += compare(row, report, expected)
            left = {path.name for path in folder.iterdir()} - KEPT
            row.faults += [f"left behind at the end: {sorted(left)}"] if left and "error" not in report else []
            return
        bar.update()
        try:
            where, now = look(row, folder, attempt.pid, expected)
        except ValueError as error:
            row.faults.append(f"cannot be read after a kill: {error}")
            return
        row.kills[aim][where] += 1
        row.faults += [f"step {steps} was kept, and after one kill more step {now}"] if now < steps else []
        steps = now


def look(row: Row, folder: Path, pid: int, expected: dict[str, str]) -> tuple[str, int]:
    """Look at what a kill has left.

    Args:
        row: Where faults are written down.
        folder: The files.
        pid: The process that was killed.
        expected: What comes of an unbroken fit.

    Returns:
        Where the kill struck, and the step from which the fit will go on.

    Raises:
        ValueError: If a checkpoint cannot be read.
    """
    names = {path.name for path in folder.iterdir()}
    unfinished = {name: match for name in names if (match := UNFINISHED.fullmatch(name))}
    if unknown := names - KEPT - {*unfinished, f".{CHECKPOINT}.lock"}:
        row.faults.append(f"unknown files: {sorted(unknown)}")
    if len({match[1] for match in unfinished.values()}) > 1:
        row.faults.append(f"unfinished files of two processes: {sorted(unfinished)}")
    row.most_unfinished = max(row.most_unfinished, len(unfinished))
    found = states(folder)
    steps = read_state(folder / CHECKPOINT)["result"]["num_steps"] if CHECKPOINT in names else 0
    writes = f".{CHECKPOINT}.{pid}."
    mine = [(name, match[2]) for name, match in unfinished.items() if name.startswith(writes)]
    if mine:
        kind = "link" if any(link for _, link in mine) else "whole" if is_whole(folder / mine[0][0]) else "torn"
        return f"within: {kind}", steps
    if CHECKPOINT not in names:
        return "before the first", steps
    is_last = all(found[name] == value for name, value in expected.items() if name.startswith(f"{CHECKPOINT}: "))
    return "after the last" if is_last else "between", steps


def is_whole(path: Path) -> bool:
    """Say whether a file is a checkpoint."""
    try:
        read_state(path)
    except ValueError:
        return False
    return True


def compare(row: Row, report: dict[str, Any] | None, expected: dict[str, str]) -> bool:
    """Compare what a process reported with what an unbroken fit comes to, and say whether it finished."""
    if report is None or "error" in report:
        row.faults.append("the process was killed by others" if report is None else report["error"])
        return False
    row.differ.update(name for name in expected | report if expected.get(name) != report.get(name))
    return True


def seconds_of_a_write(path: Path) -> float:
    """Return the CPU time that writing a checkpoint takes."""
    state, times = read_state(path), []
    folder = Folder(path.with_name("again.pt"))
    for _ in range(5):
        start = time.process_time()
        folder.write(state)
        times.append(time.process_time() - start)
    folder.free()
    return median(times)


if __name__ == "__main__":
    prepare()
    fits = [Combination.of(name) for name in sys.argv[2:]]
    print(json.dumps([Attempt(which, made(Path(sys.argv[1], str(i)))).wait() for i, which in enumerate(fits)]))
