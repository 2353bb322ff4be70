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
# Long masks, much data, many draws, interrupted runs, half precision, several processes: what to
# write for each, and a small check that it does what it should. Everything here runs on a CPU;
# tensors go to a GPU if there is one.

# %%
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.benchmark import Timer

from pyro_vnd.distributions import OrderedMask, OrderedMaskStraightThrough
from pyro_vnd.infer import (
    AutoNested,
    Callback,
    KLWeights,
    LengthCollapseWarning,
    MaskSchedule,
    NestedELBO,
    Run,
    fit,
    module_local_params,
)
from pyro_vnd.nn import NestedClassifier, NestedNet, narrow, nest

K, num_rows, num_steps, num_epochs = 100_000, 100_000, 1000, 5
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
folder = tempfile.TemporaryDirectory()
_ = torch.manual_seed(0)

# %% [markdown]
# ## A mask over 100,000 units
#
# Sums of probabilities are taken in log space, so that nothing cancels and nothing overflows: in
# float32, with logits from 100 to -100, values and gradients are finite.

# %%
logits = torch.linspace(100, -100, K, device=device, requires_grad=True)
law = OrderedMaskStraightThrough(0.2, logits=logits)
masks = law.rsample((64,))
kl = torch.distributions.kl_divergence(law, OrderedMask.uniform(K))
(masks.mean() + law.log_prob(masks).mean() + kl).backward()
print(f"lengths {[int(length) for length in masks.sum(-1)[:5]]} of {K:,}, {masks.dtype}")
print(
    f"log-probabilities finite: {bool(law.log_prob(masks).isfinite().all())}, KL {kl.item():.3g}"
)
print(f"gradient finite: {bool(logits.grad.isfinite().all())}")

# %% [markdown]
# By hand one would draw a one-hot length by `gumbel_softmax` and sum it from the tail. That takes
# a random number for each unit and mask; `OrderedMaskStraightThrough` takes one for each mask.
# Both draw 64 masks from one law and go back to the logits: ours in a fraction of the time.

# %%
scores, values = torch.linspace(1, -1, K, requires_grad=True), torch.randn(K)


def by_hand() -> torch.Tensor:
    one_hot = F.gumbel_softmax(scores.log_softmax(-1).expand(64, K), tau=0.2, hard=True)
    return one_hot.flip(-1).cumsum(-1).flip(-1)


def ours() -> torch.Tensor:
    return OrderedMaskStraightThrough(0.2, logits=scores).rsample((64,))


def step(draw: Callable[[], torch.Tensor]) -> None:
    torch.autograd.grad((draw() @ values).sum(), scores)


def seconds(call: str) -> float:
    with torch.random.fork_rng():
        return Timer(call, globals=globals()).blocked_autorange(min_run_time=1).median


print(f"time ours / by hand: {seconds('step(ours)') / seconds('step(by_hand)'):.1f}")

# %% [markdown]
# ## Mini-batches
#
# How many of 16 ordered inputs does a regression on 100,000 rows need? (Five.) Write the model for
# whole data; `fit(batch_size=...)` scales the plate. The law goes to one length, as a posterior
# from so many rows should; the warning of collapse is for those who want all lengths to be useful.
# Mean field draws one length a step, where the default guide would evaluate all 16.

# %%
x = torch.randn(num_rows, 16, device=device)
y = x[:, :5].sum(-1) + torch.randn(num_rows, device=device)
warnings.simplefilter("ignore", LengthCollapseWarning)


def regression(x: torch.Tensor, y: torch.Tensor, size: int | None = None) -> None:
    mask = pyro.sample("mask", OrderedMask.uniform(16))
    weights = pyro.sample("weights", dist.Normal(x.new_zeros(16), 1.0).to_event(1))
    with pyro.plate("data", size or len(x), subsample=torch.arange(len(x))):
        pyro.sample("y", dist.Normal((x * (mask * weights)).sum(-1), 1.0), obs=y)


guide = AutoNested(regression, latents="mean_field")
options = {"batch_size": 500, "lr": 0.02, "progress": False}
result = fit(regression, guide, (x, y), num_epochs=num_epochs, **options)
print(f"fit: {result.num_steps} steps, length {int(guide.laws['mask'].mode.sum())}")

# %% [markdown]
# In a loop of Pyro's own, the plate has the size of the data and the batch is in it.

# %%
own, adam = AutoNested(regression, latents="mean_field"), pyro.optim.Adam({"lr": 0.02})
svi = pyro.infer.SVI(regression, own, adam, pyro.infer.TraceMeanField_ELBO())
for _ in range(num_steps):
    rows = torch.randint(num_rows, (500,), device=device)
    svi.step(x[rows], y[rows], size=num_rows)
print(f"SVI: length {int(own.laws['mask'].mode.sum())}")

# %% [markdown]
# ## Many particles, many draws
#
# The model above broadcasts: with a dimension for particles on the left of the rows it computes
# all at once. Draws of the posterior likewise: a plate around the guide.

# %%
batch = x[:500], y[:500]


def particles(vectorize: bool) -> None:
    elbo = NestedELBO(num_particles=100, vectorize_particles=vectorize, max_plate_nesting=1)
    elbo(regression, guide)(*batch, size=num_rows).backward()


with module_local_params(guide):
    ratio = seconds("particles(True)") / seconds("particles(False)")
    with pyro.plate("draws", 1000, dim=-2), torch.no_grad():
        draws = guide(*batch)
print(f"100 particles, time vectorised / one by one: {ratio:.1g}")
print("1,000 draws at once:", {site: tuple(value.shape) for site, value in draws.items()})

# %% [markdown]
# For small models the gain is large, because Pyro's own work is done once. A nested net draws
# whole weights, and takes its particles one after the other: `MaskSchedule(num_particles=...)`, or
# `NestedELBO(num_particles=...)` alone.
#
# ## Stop and resume
#
# `fit(checkpoint=...)` writes parameters, optimiser, schedules and random numbers after each
# epoch. Here a fit is interrupted in its third epoch, in the middle of a step, and a fresh one
# resumes: it ends where a fit that was never interrupted does, to the last bit.

# %%
pixels, labels = load_digits(return_X_y=True)
train = torch.tensor(pixels / 16).float().to(device), torch.tensor(labels, device=device)
plain = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)).to(device)


def fresh() -> NestedNet:
    return nest(plain, train[0][:1], num_blocks=16)


class CutOff(Callback):
    def on_step(self, run: Run) -> None:
        if run.step == 70:
            raise KeyboardInterrupt


arguments = {"num_epochs": num_epochs, "batch_size": 64, "progress": False}
arguments |= {"weights": KLWeights(latents=0.02), "schedule": MaskSchedule()}
uninterrupted, cut_off, resumed = fresh(), fresh(), fresh()
fit(NestedClassifier(uninterrupted), uninterrupted.guide, train, **arguments)
arguments["checkpoint"] = Path(folder.name) / "fit.pt"
try:
    fit(NestedClassifier(cut_off), cut_off.guide, train, callbacks=[CutOff()], **arguments)
except KeyboardInterrupt:
    print("cut off")
fit(NestedClassifier(resumed), resumed.guide, train, resume=True, **arguments)
pairs = zip(uninterrupted.state_dict().values(), resumed.state_dict().values(), strict=True)
print(f"the very same: {all(torch.equal(a, b) for a, b in pairs)}")

# %% [markdown]
# ## Half precision
#
# `fit(precision="bf16")` lets products of matrices run in bfloat16. Laws get what nets give in
# float32: divergences and sums of log-probabilities want the digits. Parameters and their
# optimiser stay in float32 as well. The likelihood after five epochs is the same to three digits;
# the speed comes with hardware that has fast bfloat16.

# %%
del arguments["checkpoint"]
for precision in ("32", "bf16"):
    net = fresh()
    result = fit(NestedClassifier(net), net.guide, train, precision=precision, **arguments)
    print(f"{precision:4} log-likelihood {result.log_likelihood[-1]:.3f} nats per image")

# %% [markdown]
# ## Several processes
#
# Under `torchrun` the same `fit` is data-parallel: each process takes its share of the rows of
# every batch, gradients are averaged by torch's `DistributedDataParallel`, and all end with the
# same parameters. `batch_size` is that of all of them together, so that nothing else changes.
# Processes start alike and draw apart; the first one writes checkpoints and shows how far it is.
# On GPUs give `device="cuda"`: each process takes its own.
#
# Here two processes on a CPU end with the very same net, which is about as good as that of one:
# their draws differ.

# %%
program = Path(folder.name) / "train.py"
program.write_text("""
import os
import sys
import torch
from sklearn.datasets import load_digits
from torch import nn
from pyro_vnd.infer import KLWeights, MaskSchedule, fit
from pyro_vnd.nn import NestedClassifier, nest

pixels, labels = load_digits(return_X_y=True)
x, y = torch.tensor(pixels / 16, dtype=torch.float), torch.tensor(labels)
torch.manual_seed(0)
plain = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
net = nest(plain, x[:1], num_blocks=16)
result = fit(
    NestedClassifier(net), net.guide, (x, y), num_epochs=20, batch_size=64,
    weights=KLWeights(latents=0.02), schedule=MaskSchedule(), progress=False,
)
rank, size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
torch.save(net.state_dict(), f"{sys.argv[1]}/{rank}_of_{size}.pt")
if rank == "0":
    print(f"{size} process(es): ELBO {result.elbo[-1]:.3f} nats per image")
""")
torchrun = "torch.distributed.run --standalone --nproc_per_node"  # in a shell: torchrun
for size in (1, 2):
    ran = subprocess.run(
        [sys.executable, "-m", *torchrun.split(), str(size), str(program), folder.name],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
        text=True,
    )
    print(ran.stdout.strip())
first, second = (torch.load(Path(folder.name) / f"{rank}_of_2.pt") for rank in range(2))
print("both end with the same net:", all(torch.equal(first[key], second[key]) for key in first))

# %% [markdown]
# ## Out of the door
#
# A narrowed net is plain torch, and leaves as such: by `torch.export` here, or for other runtimes
# by `torch.onnx.export(small, (rows,), "net.onnx", dynamo=True)`.

# %%
small, rows = narrow(net, 1 / 4).cpu().eval(), train[0].cpu()
batch_dim = {0: torch.export.Dim("rows")}
exported = torch.export.export(small, (rows,), dynamic_shapes=(batch_dim,)).module()
difference = (exported(rows[:5]) - small(rows[:5])).abs().max().item()
print(f"largest difference on five rows: {difference:.0e}")
folder.cleanup()

# %% [markdown]
# ## What is not shown
#
# `torch.compile`: for nets as small as these, on one core, it takes ten seconds and gains nothing.
# Where it is worth it, compile the torch net inside a model, by `module.compile()`, which leaves
# the names of the parameters alone; not the ELBO, as Pyro's handlers break its graph.
# `nn.Sequential.compile()` does nothing in torch 2.13, silently: wrap it in a module of your own.
