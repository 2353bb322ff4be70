"""Training on two processes is training."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from models import data_parallel

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_two_processes_end_with_one_net_as_good_as_that_of_one(tmp_path):
    torch.set_default_dtype(torch.float32)  # as the processes have it; the fixture puts it back
    command = "-m torch.distributed.run --standalone --nproc_per_node 2 -m models.data_parallel --epochs 10 --out"
    result = subprocess.run(
        [sys.executable, *command.split(), str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    alone = data_parallel.train(10)[1]
    untrained = data_parallel.train(0)[1]
    together = json.loads((tmp_path / "elbo.json").read_text())
    assert together == pytest.approx(alone, abs=0.1 * (alone - untrained))


def test_one_process_writes_its_net(tmp_path):
    torch.set_default_dtype(torch.float32)
    data_parallel.main(["--out", str(tmp_path), "--epochs", "1"])
    assert json.loads((tmp_path / "elbo.json").read_text()) < 0
    net = torch.load(tmp_path / "rank0.pt")
    assert all(value.isfinite().all() for value in net.values())
