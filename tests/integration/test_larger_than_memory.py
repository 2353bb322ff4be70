"""Data in a file that is read a batch at a time: resident memory is flat, however large the file; run as a script."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule
from torch import nn
from torch.utils.data import DataLoader, Dataset

from pyro_vnd.infer import Callback, fit

COLUMNS = 256
MEGABYTE = 2**20


class FileRows(Dataset):
    """Rows of a file. What was read of it would stay mapped for as long as the array lives: it is made for each batch.

    Args:
        path: The file, of float32.
        keep: Whether to keep the array, as a test of the test.
    """

    def __init__(self, path, keep=False):
        self.path, self.kept = path, None
        self.rows = os.path.getsize(path) // 4 // COLUMNS
        if keep:
            self.kept = self.open()

    def open(self):
        return np.memmap(self.path, np.float32, "r").reshape(self.rows, COLUMNS)

    def __len__(self):
        return self.rows

    def __getitems__(self, rows):
        whole = self.open() if self.kept is None else self.kept
        return torch.from_numpy(whole[np.sort(rows)])  # the batch, ready as it is


class LinearFactor(PyroModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(COLUMNS, 1)

    def forward(self, x):
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(self.net(x).squeeze(-1), scale), obs=x.mean(-1))


def resident():
    """Return the resident memory of this process, in bytes; what it maps of files with it."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS")]
    return int(line.split()[1]) * 1024


class Memory(Callback):
    """Resident memory after the first evaluation, and in the middle and at the end of each epoch."""

    def __init__(self, steps):
        self.steps, self.seen = steps, []

    def on_fit_start(self, run):
        self.seen.append(resident())

    def on_step(self, run):
        if run.step % (self.steps // 2) == 0:
            self.seen.append(resident())


def measure(path, keep):
    data = FileRows(path, keep)
    loader = DataLoader(data, 1024, shuffle=True, collate_fn=lambda batch: batch)
    model, memory = LinearFactor(), Memory(len(loader))
    fit(model, AutoNormal(model), loader, num_epochs=3, callbacks=[memory], progress=False)
    print(json.dumps(memory.seen))  # noqa: T201


def write(path, size):
    block = torch.randn(4096, COLUMNS).numpy().astype(np.float32).tobytes()
    with open(path, "wb") as file:
        for _ in range(size // len(block)):
            file.write(block)


def resident_over_a_fit(path, *arguments):
    run = subprocess.run(
        [sys.executable, __file__, str(path), *arguments],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    return json.loads(run.stdout)


needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")


@needs_proc
@pytest.mark.parametrize("size", [256 * MEGABYTE, pytest.param(4096 * MEGABYTE, marks=pytest.mark.slow)])
def test_resident_memory_is_flat_over_the_epochs(size, tmp_path):
    write(tmp_path / "rows.bin", size)
    seen = resident_over_a_fit(tmp_path / "rows.bin")
    assert len(seen) >= 7
    assert max(seen[1:]) < 1.1 * min(seen[1:])
    assert max(seen) - seen[0] < 0.1 * size  # torch's sampler has the order of the rows in a list, 40 bytes a row
    if size < 1024 * MEGABYTE:  # an array that is kept would be found
        kept = resident_over_a_fit(tmp_path / "rows.bin", "keep")
        assert max(kept) > max(seen) + 0.8 * size


if __name__ == "__main__":
    measure(sys.argv[1], "keep" in sys.argv)
