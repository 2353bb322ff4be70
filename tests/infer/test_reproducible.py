"""The same seed gives the same fit, bit by bit: in another process, and with other numbers of threads."""

import functools
import hashlib
import os
import subprocess
import sys

import pytest

PROGRAM = """
import hashlib, sys, torch
from torch import nn
from pyro_vnd.infer import MaskSchedule, NestedELBO, fit
from pyro_vnd.nn import NestedClassifier, nest
torch.set_num_threads(int(sys.argv[1]))
hidden, rows = int(sys.argv[2]), int(sys.argv[3])
torch.manual_seed(0)
x = torch.randn(4 * rows, 16)
y = (x[:, 0] > 0).long()
net = nest(nn.Sequential(nn.Linear(16, hidden), nn.ReLU(), nn.Linear(hidden, 2)), x[:1], num_blocks=8)
torch.rand(int(sys.argv[4]))  # what the caller drew before is of no account
result = fit(NestedClassifier(net), net.guide, (x, y), num_epochs=3, batch_size=rows, schedule=MaskSchedule(),
             elbo=NestedELBO(local_reparam=True), seed=int(sys.argv[5]), progress=False)
parts = [value.numpy().tobytes() for value in net.state_dict().values()]
print(hashlib.sha256(b"".join(parts) + repr(result.elbo).encode()).hexdigest())
"""


@functools.cache
def trained(threads=1, hidden=64, rows=64, drawn=0, seed=0):
    """The hash of all that a fit in a process of its own leads to."""
    arguments = [str(each) for each in (threads, hidden, rows, drawn, seed)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    run = [sys.executable, "-c", PROGRAM, *arguments]
    return subprocess.run(run, capture_output=True, text=True, check=True, env=environment).stdout.strip()


def test_a_seed_is_all_that_a_fit_depends_on():
    first = trained()
    assert len(first) == len(hashlib.sha256().hexdigest())
    assert trained(drawn=5) == first
    assert trained(seed=1) != first  # power


@pytest.mark.parametrize(("hidden", "rows"), [(64, 64), (512, 256)], ids=["small", "large"])
def test_threads_change_no_bit(hidden, rows):
    """torch splits sums among threads at places that do not depend on their number, at these sizes at least."""
    assert trained(1, hidden, rows) == trained(2, hidden, rows)
