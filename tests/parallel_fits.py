"""Fits that several processes share; `torchrun tests/parallel_fits.py FOLDER NAME...` leaves what each rank ends with.

Every fit is a function without arguments, or of a folder, which one process can call, too.
"""

import contextlib
import inspect
import io
import itertools
import os
import shutil
import sys
import warnings
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoDelta, AutoNormal
from pyro.nn import PyroModule, PyroSample
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from pyro_vnd.autoencoders import OrderedVAE, mlp_bodies
from pyro_vnd.distributions import OrderedMask
from pyro_vnd.infer import (
    AutoNested,
    BestEpoch,
    Callback,
    Checkpoint,
    CSVLogger,
    EarlyStopping,
    KLWeights,
    LivePlot,
    MaskSchedule,
    MiniBatchELBO,
    OptimizerSettings,
    TensorBoardLogger,
    Validation,
    fit,
    linear,
)
from pyro_vnd.nn import NestedClassifier, NestedModel, TokenLabels, nest

RANK, SIZE = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
NUM_ROWS = 41  # in batches of 12: the last one has 5, and two processes have 3 and 2 of them
SGD = {"optimizer": torch.optim.SGD, "lr": 0.002, "num_epochs": 3, "progress": False}


def data(num_rows=NUM_ROWS):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(num_rows, 4, generator=generator)
    return x, x.sin().sum(-1) + 0.1 * torch.randn(num_rows, generator=generator)


class Regression(PyroModule):
    """A perceptron with points for weights, of which the last have a prior: nothing is drawn under `AutoDelta`."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.hidden = nn.Linear(4, 6)
        self.last = PyroSample(dist.Normal(0.0, 1.0).expand([6]).to_event(1))
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, x, y):
        last = self.last
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(self.hidden(x).tanh() @ last, 0.5), obs=y)


def points(rows=None, model=None, **arguments):
    """Fit points to rows, and return the parameters and the ELBO."""
    model = Regression() if model is None else model
    guide = AutoDelta(model)
    result = fit(model, guide, data() if rows is None else rows, **SGD | arguments)
    return state(model, guide) | {"elbo": torch.tensor(result.elbo), "steps": result.num_steps}


def state(*modules):
    return {f"{i}.{name}": x.detach().clone() for i, m in enumerate(modules) for name, x in m.state_dict().items()}


def tensors():
    return points(batch_size=12)


def all_rows():
    return points()


def weights():
    settings = OptimizerSettings(torch.optim.SGD, clip_norm=0.5)
    return points(batch_size=12, optimizer=settings, weights=KLWeights(latents=linear(0.1, 1.0)))


def decay():
    """A parameter that is in no gradient is not decayed, other than one whose gradient is zero."""
    return points(batch_size=12, optimizer=lambda p, lr: torch.optim.AdamW(p, lr, weight_decay=0.5))


def shuffled_loader():
    return points(DataLoader(TensorDataset(*data()), batch_size=12, shuffle=True))


def loader_with_a_generator():
    generator = torch.Generator().manual_seed(3)
    return points(DataLoader(TensorDataset(*data()), batch_size=12, shuffle=True, drop_last=True, generator=generator))


def loader_with_workers():
    return points(DataLoader(TensorDataset(*data()), batch_size=12, num_workers=1), num_epochs=1)


def list_of_batches():
    return points([*zip(*(part.split(12) for part in data()), strict=True)])


def accumulated():
    return points(batch_size=12, optimizer=OptimizerSettings(torch.optim.SGD, accumulate=3))


class Branches(Regression):
    """Which parameters are used depends on the batch."""

    def __init__(self):
        super().__init__()
        self.other = nn.Linear(4, 6)

    def forward(self, x, y, branch):
        self.hidden, self.other = (self.hidden, self.other) if branch[0] else (self.other, self.hidden)
        super().forward(x, y)
        self.hidden, self.other = (self.hidden, self.other) if branch[0] else (self.other, self.hidden)


def branches():
    """A parameter is used in the first batch of a step alone, in the last alone, or in none."""
    rows = [
        (x, y, torch.full_like(y, i < 3)) for i, (x, y) in enumerate(zip(*(p.split(5) for p in data()), strict=True))
    ]
    return points(rows[:8], Branches(), optimizer=OptimizerSettings(torch.optim.SGD, accumulate=2))


def sliced():
    """Two particles, of half and of the whole width, in each step."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    model = NestedClassifier(nest(net, torch.zeros(1, 4), num_blocks=2, prior=None))
    x, y = data()
    schedule = MaskSchedule(0, 1, 0, OrderedMask(probs=torch.tensor([0.5, 0.5])), num_particles=2, sliced=True)
    rows = [*zip(x.split(12), ((y > 0).long() + (y > 1).long()).split(12), strict=True)]
    fit(model, model.guide, rows, schedule=schedule, **SGD)
    return state(model)


def own_sampler_of_torch():
    """With all rows in a step, of which each process has half."""
    rows = TensorDataset(*data(40))
    sampler = DistributedSampler(rows, SIZE, RANK, shuffle=True)
    return points(DataLoader(rows, batch_size=40 // SIZE, sampler=sampler))


SAME_AS_ALONE = [
    tensors, all_rows, weights, decay, shuffled_loader, loader_with_a_generator, loader_with_workers, list_of_batches,
    accumulated, branches, sliced, own_sampler_of_torch,
]  # fmt: skip


class Noted(Callback):
    def __init__(self):
        self.draws = []

    def on_fit_start(self, run):
        self.on_step(run)

    def on_step(self, run):
        self.draws.append(torch.rand(()).item())


def regression_with_normals(rows=None, callbacks=(), guide=AutoNormal, **arguments):
    pyro.clear_param_store()
    model = Regression()
    guide = guide(model)
    arguments = {"num_epochs": 3, "batch_size": 12, "lr": 0.02, "progress": False} | arguments
    result = fit(model, guide, data() if rows is None else rows, callbacks=callbacks, **arguments)
    return model, guide, result


def draws():
    """Every process draws other numbers, and the caller's are given back."""
    torch.manual_seed(5)
    noted = Noted()
    model, guide, result = regression_with_normals(callbacks=[noted])
    return state(model, guide) | {"own_draws": noted.draws, "elbo": result.elbo, "after": torch.rand(())}


def conditional():
    """The law of the number of inputs, in closed form."""

    def model(x, y):
        mask = pyro.sample("mask", OrderedMask.uniform(4))
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([4]).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ (w * mask), 0.5), obs=y)

    x, _ = data(200)
    y = x[:, :2].sum(-1) + 0.5 * torch.randn(200, generator=torch.Generator().manual_seed(2))
    found = {}
    for name, rows in {
        "tensors": (x, y),
        "loader": DataLoader(TensorDataset(x, y), batch_size=50, shuffle=True),
    }.items():
        guide = AutoNested(model)
        fit(model, guide, rows, num_epochs=40, progress=False)
        found |= {f"{name}.{key}": value for key, value in state(guide).items()}
        found[f"{name}.law"] = guide.laws["mask"].length_probs.detach()
    return found


def batch_norm():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    model = NestedClassifier(nest(net, torch.zeros(2, 4), num_blocks=4))
    x, y = data()
    seen = []

    class Seen(Callback):
        def on_epoch(self, run):
            seen.append({k: v.clone() for k, v in run.model.state_dict().items() if "running" in k})

    fit(model, model.guide, (x, (y > 0).long()), batch_size=18, num_epochs=3, progress=False, callbacks=[Seen()])
    return state(model) | {f"epoch.{i}.{k}": v for i, each in enumerate(seen) for k, v in each.items()}


def logged(folder):
    """Only the first process writes."""
    path = folder / f"log_{RANK}.csv"
    callbacks = [CSVLogger(path), TensorBoardLogger(folder / f"events_{RANK}"), LivePlot()]
    drawn = io.StringIO()
    with contextlib.redirect_stdout(drawn):
        regression_with_normals(callbacks=callbacks, num_epochs=2)
    wrote = path.exists(), (folder / f"events_{RANK}").exists(), "Image object" in drawn.getvalue()
    return {"wrote": wrote, "lines": len(path.read_text().splitlines()) if path.exists() else 0}


def validation():
    """Metrics that differ from process to process are one number afterwards, by which all stop and choose alike."""
    callbacks = [
        Validation(data(30), {"noise": lambda rows: torch.rand(()) + RANK}),
        EarlyStopping("noise", patience=2),
        BestEpoch("noise"),
    ]
    model, guide, result = regression_with_normals(callbacks=callbacks, num_epochs=20)
    return state(model, guide) | {
        "noise": result.metrics["noise"], "validation": result.validation_log_likelihood, "best": callbacks[2].epoch,
    }  # fmt: skip


def validation_of_points():
    found = Regression(), None
    guide = AutoDelta(found[0])
    result = fit(found[0], guide, data(), validation=data(30), batch_size=12, **SGD)
    return {"validation": torch.tensor(result.validation_log_likelihood), "elbo": torch.tensor(result.elbo)}


def stopped_by_one():
    class Stop(Callback):
        def on_epoch(self, run):
            if RANK == SIZE - 1 and run.epoch == 2:
                run.stop()

    return {"epochs": len(regression_with_normals(callbacks=[Stop()], num_epochs=5)[2].elbo)}


class Own(IterableDataset):
    """Rows that each process has for itself: the second one fewer."""

    def __iter__(self):
        yield from itertools.islice(zip(*data(), strict=True), RANK, 40 if RANK == 0 else 30, SIZE)


def rows_of_its_own():
    _, _, result = regression_with_normals(DataLoader(Own(), batch_size=5), num_data=35, batch_size=None)
    return {"steps": result.num_steps, "elbo": result.elbo}


class _InterruptedError(Exception):
    pass


def interrupted(folder, guide, name):
    """Stop within an epoch, go on, and compare with a fit that was not stopped."""

    class Stop(Callback):
        def on_step(self, run):
            if run.step == 7:
                raise _InterruptedError

    rows, path = DataLoader(TensorDataset(*data()), batch_size=9, shuffle=True), folder / f"{name}.pt"
    arguments = {"guide": guide, "rows": rows, "batch_size": None}
    whole = regression_with_normals(**arguments)
    checkpoint = Checkpoint(path, every_steps=3)
    with contextlib.suppress(_InterruptedError):
        regression_with_normals(callbacks=[Stop(), checkpoint], **arguments)
    kept = folder / f"{name}_kept.pt"
    if RANK == 0:
        shutil.copy(path, kept)
    goes_on = regression_with_normals(checkpoint=path, resume=True, **arguments)
    return {
        "whole": state(*whole[:2]), "goes_on": state(*goes_on[:2]), "elbo": whole[2].elbo, "elbo_on": goes_on[2].elbo,
    }  # fmt: skip


def interrupted_normals(folder):
    return interrupted(folder, AutoNormal, "normals")


def interrupted_points(folder):
    return interrupted(folder, AutoDelta, "points")


def resumed(folder, guide, name):
    path = shutil.copy(folder / f"{name}_kept.pt", folder / f"{name}_{SIZE}.pt")
    rows = DataLoader(TensorDataset(*data()), batch_size=9, shuffle=True)
    model, guide, result = regression_with_normals(rows, guide=guide, batch_size=None, checkpoint=path, resume=True)
    return state(model, guide) | {"elbo": result.elbo}


def goes_on_from_one(folder):
    """Go on from what one process left within an epoch."""
    rows, path = DataLoader(TensorDataset(*data()), batch_size=9, shuffle=True), folder / "alone_kept.pt"
    arguments = {"guide": AutoDelta, "rows": rows, "batch_size": None, "checkpoint": path, "resume": True}
    model, guide, result = regression_with_normals(**arguments)
    return state(model, guide) | {"elbo": result.elbo}


def refused(folder):
    """What several processes cannot share, and what is said of it."""
    x, y = data()
    rows = TensorDataset(x, y)

    class Mine(RandomSampler):
        pass

    def by_row(x, y):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    def by_group(x, y):
        with pyro.plate("groups", 3):
            mask = pyro.sample("mask", OrderedMask.uniform(4))
            z = pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))
            pyro.sample("sums", dist.Normal((z * mask).sum(-1), 1.0), obs=torch.arange(3.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(0.0, 1.0), obs=y)

    def said(call):
        try:
            call()
        except ValueError as error:
            return str(error)
        return ""

    regression_with_normals(num_epochs=1, checkpoint=folder / "own_0.pt")  # which the first process writes
    return {
        "by_group": said(lambda: fit(by_group, AutoNested(by_group), (x, y), num_epochs=1, progress=False)),
        "own_disk": said(
            lambda: regression_with_normals(num_epochs=1, checkpoint=folder / f"own_{RANK}.pt", resume=True)
        ),
        "sampler": said(lambda: points(DataLoader(rows, batch_size=8, sampler=Mine(rows)))),
        "no_batches": said(lambda: points(DataLoader(rows, batch_size=None))),
        "one_row": said(lambda: points(batch_size=1)),
        "by_row": said(lambda: fit(by_row, AutoNormal(by_row), (x, y), num_epochs=1, progress=False)),
    }


def elbos():
    """The ELBO that a nested net and an autoencoder end with, of some seeds, after fits of some epochs."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    from models.datasets import load

    digits = load("digits", flatten=True).train
    images, labels = digits.images[:600], digits.labels[:600]
    found = {"net": [], "autoencoder": []}
    for seed in range(4):
        torch.manual_seed(seed)
        net = nest(nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)), images[:1], num_blocks=8)
        for name, model, rows in (
            ("net", NestedClassifier(net), (images, labels)),
            ("autoencoder", OrderedVAE((64,), 8, bodies=mlp_bodies((64,), hidden=(32,))), images),
        ):
            result = fit(model, model.guide, rows, num_epochs=10, batch_size=60, seed=seed, progress=False)
            found[name].append((result.elbo[0], sum(result.elbo[-3:]) / 3))
    torch.set_default_dtype(before)
    return found


def sharded():
    """A small nested GPT whose parameters, gradients and optimiser are shared out: losses, and shares of them."""
    from models.language import GPT

    torch.manual_seed(0)
    x, y = torch.randint(20, (2, 8, 6)).unbind()
    found = {}
    for name, prior in (("weights drawn", "normal"), ("points", None)):
        gpt = GPT(num_symbols=20, context=6, dim=8, depth=2, heads=2)
        model = NestedModel(nest(gpt, x, num_blocks=4, prior=prior), TokenLabels())
        objective = MiniBatchELBO(model, model.guide, (x[:2], y[:2]), num_data=len(x))
        if SIZE > 1:
            if prior is None:  # what is not drawn before the net runs can be gathered block by block
                for block in model.net.net.get_submodule("blocks"):
                    fully_shard(block)
            fully_shard(objective)
        optimizer = torch.optim.Adam(objective.parameters(), lr=0.01)
        torch.manual_seed(1)  # the same draws everywhere, here only, to compare
        losses = []
        for _ in range(4):
            optimizer.zero_grad()
            loss = objective(x, y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        held = [x for each in optimizer.state.values() for x in each.values() if x.dim()]
        whole = get_model_state_dict(objective, options=StateDictOptions(full_state_dict=True))
        found[name] = {
            "losses": torch.tensor(losses),
            "held": sum(x.to_local().numel() if SIZE > 1 else x.numel() for x in held),
            "whole": {key: value.clone() for key, value in whole.items()} if RANK == 0 else {},
        }
    return found


def error_on_one():
    class Fail(Callback):
        def on_step(self, run):
            if RANK == SIZE - 1 and run.step == 3:
                raise RuntimeError("the disk of this process is full")

    regression_with_normals(callbacks=[Fail()], num_epochs=10_000)


def infinite_on_one():
    class Shaken(Regression):
        calls = 0

        def forward(self, x, y):
            self.calls += 1
            super().forward(x, y * torch.nan if RANK == SIZE - 1 and self.calls > 20 else y)

    model = Shaken()
    with pyro.validation_enabled(False):
        fit(model, AutoNormal(model), data(), batch_size=12, num_epochs=10_000, progress=False)


SHORT = [
    *SAME_AS_ALONE, draws, conditional, batch_norm, logged, validation, validation_of_points, stopped_by_one,
    rows_of_its_own, interrupted_normals, interrupted_points, goes_on_from_one, refused,
]  # fmt: skip
LONG = [elbos, sharded, error_on_one, infinite_on_one]


def run(program, folder):
    """Call a fit."""
    return program(folder) if inspect.signature(program).parameters else program()


def main(folder, *names):
    torch.set_default_dtype(torch.float64)
    warnings.simplefilter("error", RuntimeWarning)
    folder = Path(folder)
    programs = [program for program in LONG if program.__name__ in names] if names else SHORT
    found = {program.__name__: run(program, folder) for program in programs}
    torch.save(found, folder / f"rank{RANK}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
