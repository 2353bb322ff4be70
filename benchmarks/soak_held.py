"""What a process holds while fits go on: memory, tensors, files, threads, and Pyro's global state.

    python -m benchmarks.soak_held steps 10000
    python -m benchmarks.soak_held fits 216

The first is one long fit with checkpoints, validation, loggers and a bar; the second all small fits, one after another.
Both print what is held, from a warm-up on, as JSON.
"""

import ctypes
import gc
import json
import os
import resource
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import linear_regression
from typing import NamedTuple

import pyro
import torch
from pyro.infer.autoguide import AutoNormal
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor

from benchmarks.soak_fits import CHECKPOINT, COMBINATIONS, Plain, diabetes, outcome
from pyro_vnd.infer import (
    BestEpoch,
    Callback,
    Checkpoint,
    CSVLogger,
    ProgressBar,
    Run,
    TensorBoardLogger,
    Validation,
    fit,
)

__all__ = ["BOUNDS", "COUNTS", "Held", "grown", "held", "long_fit", "many_fits", "slope"]

STEPS_PER_EPOCH, EVERY_STEPS = 8, 5
BOUNDS = {"steps": 0.1, "fits": 4.0}  # KB that each may add: histories, and what the C library does not give back


class Held(NamedTuple):
    """What a process holds.

    Attributes:
        at: When, in steps or fits.
        memory: Resident memory, in KB.
        tensors: Tensors that Python knows.
        files: Open files.
        threads: Threads.
        params: Parameters in Pyro's global store.
        handlers: Pyro's active handlers.
    """

    at: int
    memory: float
    tensors: int
    files: int
    threads: int
    params: int
    handlers: int


COUNTS = Held._fields[2:]


def held(at: int) -> Held:
    """Count what this process holds, but for garbage and what the C library keeps for later."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return Held(
        at=at,
        memory=pages * resource.getpagesize() / 1024,
        tensors=sum(issubclass(type(each), Tensor) for each in gc.get_objects()),
        files=len(os.listdir("/proc/self/fd")),
        threads=len(os.listdir("/proc/self/task")),
        params=len(pyro.get_param_store()),
        handlers=len(_PYRO_STACK),
    )


def slope(rows: Sequence[Held]) -> float:
    """Return by how many KB the memory grows with each step, or fit."""
    return linear_regression([row.at for row in rows], [row.memory for row in rows]).slope


def grown(rows: Sequence[Held], bound: float) -> list[str]:
    """Return what has become more: any count since the first row, and memory by more than a bound.

    Args:
        rows: What was held, from a warm-up on.
        bound: KB that each step, or fit, may add.
    """
    more = [name for name in COUNTS if max(getattr(row, name) for row in rows) > getattr(rows[0], name)]
    return more + (["memory"] if slope(rows) > bound else [])


class Meter(Callback):
    """A callback that counts what is held.

    Args:
        every: Steps after which it does, a multiple of those of an epoch.
    """

    def __init__(self, every: int) -> None:
        self.every, self.rows = every, list[Held]()

    def on_epoch(self, run: Run) -> None:
        """Count, if it is time to."""
        if run.step % self.every == 0:
            self.rows.append(held(run.step))


def long_fit(num_steps: int, callbacks: Sequence[Callback] = ()) -> list[Held]:
    """Fit for long, and count what is held after each tenth.

    Args:
        num_steps: Steps, a multiple of ten epochs'.
        callbacks: More callbacks.
    """
    data, held_out = diabetes()
    meter, model = Meter(num_steps // 10), Plain(10)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        usual = [
            *(Validation(held_out), BestEpoch(), CSVLogger(folder / "fit.csv"), TensorBoardLogger(folder / "events")),
            *(ProgressBar(), Checkpoint(folder / CHECKPOINT, every_steps=EVERY_STEPS)),
        ]
        fit(
            model,
            AutoNormal(model),
            data,
            num_epochs=num_steps // STEPS_PER_EPOCH,
            batch_size=len(data[0]) // STEPS_PER_EPOCH,
            callbacks=[*callbacks, meter, *usual],
        )
    return meter.rows


def many_fits(num_fits: int) -> list[Held]:
    """Fit all that is small, one after another, and count what is held after each round of all.

    Args:
        num_fits: Fits, at least; rounds are whole.
    """
    rows = list[Held]()
    for _ in range(-(-num_fits // len(COMBINATIONS))):
        for which in COMBINATIONS:
            with tempfile.TemporaryDirectory() as folder:
                outcome(which, Path(folder))
        rows.append(held(len(COMBINATIONS) * (len(rows) + 1)))
    return rows


if __name__ == "__main__":
    torch.set_num_threads(1)
    number = int(sys.argv[2])
    found = long_fit(number) if sys.argv[1] == "steps" else many_fits(number)
    print(json.dumps([row._asdict() for row in found]))
