# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Scaling up
#
# Long masks, much data, many draws, interrupted runs, half precision, several processes: what to write for each, and a
# small check that it does what it should. Everything here runs on a CPU; tensors go to a GPU if there is one.

# %%
import inspect
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, "..")  # `models` and `benchmarks` lie beside this folder
from benchmarks.timing import interleaved_medians, peak_bytes
from models import data_parallel
from models.datasets import load
from pyro_vnd.distributions import OrderedMask, OrderedMaskStraightThrough
from pyro_vnd.infer import AutoNested, LengthCollapseWarning, MaskSchedule, NestedELBO, fit, module_local_params
from pyro_vnd.nn import NestedClassifier, NestedNet, narrow, nest

QUICK = "PYRO_VND_SMOKE" in os.environ  # the tests want to know only whether all of this runs
K, num_rows, num_epochs, num_processes = (1_000, 2_000, 2, 1) if QUICK else (100_000, 100_000, 30, 2)
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
folder = tempfile.TemporaryDirectory()
_ = torch.manual_seed(0)

# %% [markdown]
# ## A mask over 100,000 units
#
# Sums of probabilities are taken in log space, so that nothing cancels and nothing overflows: in float32, with logits
# from 100 to -100, values and gradients are finite.

# %%
logits = torch.linspace(100, -100, K, device=device, requires_grad=True)
law = OrderedMaskStraightThrough(0.2, logits=logits)
masks = law.rsample((64,))
kl = torch.distributions.kl_divergence(law, OrderedMask.uniform(K))
(masks.mean() + law.log_prob(masks).mean() + kl).backward()
print(f"lengths {[int(length) for length in masks.sum(-1)[:5]]} of {K:,}, {masks.dtype}")
print(f"log-probabilities and KL finite: {bool(law.log_prob(masks).isfinite().all() and kl.isfinite())}")
print(f"gradient finite: {bool(logits.grad.isfinite().all())}")

# %% [markdown]
# By hand one would draw a one-hot length by `gumbel_softmax` and sum it from the tail. That takes a random number for
# each unit and mask; `OrderedMaskStraightThrough` takes one for each mask. Both draw 64 masks from one law and go back
# to the logits: ours in a fraction of the time, and in six tenths of the memory.

# %%
scores, values = torch.linspace(1, -1, K, requires_grad=True), torch.randn(K)


def by_hand() -> torch.Tensor:
    """Draw 64 masks by a one-hot length."""
    one_hot = F.gumbel_softmax(scores.log_softmax(-1).expand(64, K), tau=0.2, hard=True)
    return one_hot.flip(-1).cumsum(-1).flip(-1)


def ours() -> torch.Tensor:
    """Draw 64 masks by the law."""
    return OrderedMaskStraightThrough(0.2, logits=scores).rsample((64,))


def step(draw: Callable[[], torch.Tensor]) -> Callable[[], object]:
    """Make a function that draws and goes back."""
    return lambda: torch.autograd.grad((draw() @ values).sum(), scores)


seconds = interleaved_medians({f.__name__: step(f) for f in (by_hand, ours)}, seconds=0 if QUICK else 3, min_rounds=3)
memory = {f.__name__: peak_bytes(step(f)) for f in (by_hand, ours)}
print(f"time ours / by hand: {seconds['ours'] / seconds['by_hand']:.1f}")
print(f"memory ours / by hand: {memory['ours'] / memory['by_hand']:.1f}")

# %% [markdown]
# ## Mini-batches
#
# How many of 16 ordered inputs does a regression on 100,000 rows need? (Five.) Write the model for whole data;
# `fit(batch_size=...)` scales the plate. The law goes to one length, as a posterior from so many rows should; the
# warning of collapse is for those who want all lengths to be useful.

# %%
torch.manual_seed(0)  # the timing above took as many random numbers as it had time for
x = torch.randn(num_rows, 16, device=device)
y = x[:, :5].sum(-1) + torch.randn(num_rows, device=device)
warnings.simplefilter("ignore", LengthCollapseWarning)


def regression(x: torch.Tensor, y: torch.Tensor, size: int | None = None) -> None:
    """Regress on the first L inputs, with a batch of `size` rows in all."""
    mask = pyro.sample("mask", OrderedMask.uniform(16))
    weights = pyro.sample("weights", dist.Normal(x.new_zeros(16), 1.0).to_event(1))
    with pyro.plate("data", size or len(x), subsample=torch.arange(len(x))):
        pyro.sample("y", dist.Normal((x * (mask * weights)).sum(-1), 1.0), obs=y)


guide = AutoNested(regression)
result = fit(regression, guide, [x, y], num_epochs=1 + 4 * (not QUICK), batch_size=500, lr=0.02, progress=False)
print(f"fit: {result.num_steps} steps, length {int(guide.laws['mask'].mode.sum())}")

# %% [markdown]
# In a loop of Pyro's own, the plate has the size of the data and the batch is in it.

# %%
own = AutoNested(regression)
svi = pyro.infer.SVI(regression, own, pyro.optim.Adam({"lr": 0.02}), pyro.infer.TraceMeanField_ELBO())
for _ in range(10 if QUICK else 1000):
    rows = torch.randint(num_rows, (500,), device=device)
    svi.step(x[rows], y[rows], size=num_rows)
print(f"SVI: length {int(own.laws['mask'].mode.sum())}")

# %% [markdown]
# ## Many particles, many draws
#
# The model above broadcasts: with a dimension for particles on the left of the rows it computes all at once. Draws of
# the posterior likewise: a plate around the guide.

# %%
batch, seconds = (x[:500], y[:500]), {}
with module_local_params(guide):
    for vectorize in (False, True):
        elbo = NestedELBO(num_particles=100, vectorize_particles=vectorize, max_plate_nesting=1)
        start = time.perf_counter()
        elbo(regression, guide)(*batch, size=num_rows).backward()
        seconds[vectorize] = time.perf_counter() - start
    with pyro.plate("draws", 1000, dim=-2), torch.no_grad():
        draws = guide(*batch)
print(f"100 particles, time vectorised / one by one: {seconds[True] / seconds[False]:.1g}")
print("1,000 draws at once:", {site: tuple(value.shape) for site, value in draws.items()})

# %% [markdown]
# For small models the gain is large, because Pyro's own work is done once. A nested net draws whole weights, and takes
# its particles one after the other: `MaskSchedule(num_particles=...)`, or `NestedELBO(num_particles=...)` alone.
#
# ## Stop and resume
#
# `fit(checkpoint=...)` writes parameters, optimiser, schedules and random numbers after each epoch. Here a fit is cut
# off in its third epoch, in the middle of a step, and a fresh one resumes: it ends where a fit that was never
# interrupted does, to the last bit.

# %%
digits = load("digits", flatten=True)
train = tuple(part.to(device) for part in digits.train)
plain = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)).to(device)


def fresh() -> NestedNet:
    """Nest the net anew."""
    return nest(plain, train[0][:1], num_blocks=16)


class CutOff(NestedClassifier):
    """A model that loses power after 40 steps."""

    calls = 0

    def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        """Run the model."""
        self.calls += 1
        if self.calls > 40:
            raise KeyboardInterrupt
        return super().forward(x, y)


arguments = {"num_epochs": 5, "batch_size": 64, "kl_weight": 0.02, "schedule": MaskSchedule(), "progress": False}
uninterrupted, cut_off, resumed = fresh(), fresh(), fresh()
fit(NestedClassifier(uninterrupted), uninterrupted.guide, train, **arguments)
arguments["checkpoint"] = Path(folder.name) / "fit.pt"
try:
    fit(CutOff(cut_off), cut_off.guide, train, **arguments)
except KeyboardInterrupt:
    print("cut off")
fit(NestedClassifier(resumed), resumed.guide, train, resume=True, **arguments)
pairs = zip(uninterrupted.state_dict().values(), resumed.state_dict().values(), strict=True)
print(f"the very same: {all(torch.equal(a, b) for a, b in pairs)}")

# %% [markdown]
# ## Half precision
#
# Let matrix products run in bfloat16, and give the likelihood logits in float32: divergences and sums of
# log-probabilities want the digits. Parameters and their optimiser stay in float32 as well. The likelihood after five
# epochs is the same to three digits; the speed comes with hardware that has fast bfloat16.


# %%
class HalfPrecision(NestedClassifier):
    """A classifier whose net runs in bfloat16."""

    def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        """Run the model."""
        rows = pyro.plate("data", len(x), dim=-1)
        with torch.autocast(x.device.type, torch.bfloat16):
            logits = self.net(x, plate=rows)
        with rows:
            pyro.sample("label", dist.Categorical(logits=logits.float()), obs=y)
        return logits


del arguments["checkpoint"]
for model_class in (NestedClassifier, HalfPrecision):
    net = fresh()
    result = fit(model_class(net), net.guide, train, **arguments)
    print(f"{model_class.__name__:17} log-likelihood {result.log_likelihood[-1]:.3f} nats per image")

# %% [markdown]
# ## Several processes
#
# `torchrun` starts the processes, and `DistributedDataParallel` averages their gradients. The module that it wraps is
# the ELBO, an `nn.Module` under module-local parameters. What to see to, in `models/data_parallel.py`:
#
# - one seed for all until the net is built, then another for each process, or all draw the same masks;
# - a first call of the ELBO before the optimiser and DDP look for parameters: autoguides are made by it;
# - a plate with the size of the whole data, and a `DistributedSampler` in place of the plate's own subsampling;
# - `find_unused_parameters=True` if a step leaves layers out.
#
# On GPUs the process group is "nccl", and each process takes the device of its local rank. Here two processes on a CPU
# end with the very same net, which is about as good as that of one process: their draws differ.

# %%
source = inspect.getsource(data_parallel.train)
print(source[source.index("    torch.manual_seed") : source.index("        with torch.no_grad")])
command = f"torch.distributed.run --standalone --nproc_per_node {num_processes} -m models.data_parallel"  # torchrun ...
subprocess.run(
    [sys.executable, "-m", *command.split(), "--out", folder.name, "--epochs", str(num_epochs)],
    cwd="..",
    env=os.environ | {"OMP_NUM_THREADS": "1"},
    check=True,
    capture_output=True,
)
ranks = [torch.load(Path(folder.name) / f"rank{rank}.pt") for rank in range(num_processes)]
print(f"all end with the same net: {all(torch.equal(ranks[0][key], ranks[-1][key]) for key in ranks[0])}")
print(f"ELBO, {num_processes} processes: {json.loads((Path(folder.name) / 'elbo.json').read_text()):.3f} nats per row")
print(f"ELBO, 1 process:   {data_parallel.train(num_epochs)[1]:.3f} nats per row")

# %% [markdown]
# ## Out of the door
#
# A narrowed net is plain torch, and leaves as such: by `torch.export` here, or for other runtimes by
# `torch.onnx.export(small, (rows,), "net.onnx", dynamo=True)`.

# %%
small, rows = narrow(net, 1 / 4).cpu().eval(), digits.test.images
batch_dim = {0: torch.export.Dim("rows")}
exported = torch.export.export(small, (rows,), dynamic_shapes=(batch_dim,)).module()
print(f"largest difference on five rows: {(exported(rows[:5]) - small(rows[:5])).abs().max().item():.0e}")
folder.cleanup()

# %% [markdown]
# ## What is not shown
#
# `torch.compile`: for nets as small as these, on one core, it takes ten seconds and gains nothing. Where it is worth
# it, compile the torch net inside a model, by `module.compile()`, which leaves the names of the parameters alone; not
# the ELBO, as Pyro's handlers break its graph. `nn.Sequential.compile()` does nothing in torch 2.13, silently: wrap it
# in a module of your own.
