"""Small fits of every kind, 24 of them, and what is to be the same however often one was interrupted."""

import csv
import hashlib
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from models.datasets import load
from models.order_selection import OrderedRegression, orthonormalise
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
    LengthCollapseWarning,
    MaskSchedule,
    OptimizerSettings,
    PoorFitWarning,
    ProgressBar,
    Run,
    TensorBoardLogger,
    Validation,
    cosine_to_zero,
    fit,
    linear,
)
from pyro_vnd.infer._fit.checkpoint import read_state
from pyro_vnd.nn import NestedClassifier, nest

__all__ = ["CHECKPOINT", "COMBINATIONS", "Combination", "digest", "outcome", "states"]

CHECKPOINT, ROWS, EPOCHS = "fit.pt", 64, 14
EVERY_STEPS = 3  # no divisor of the four steps of an epoch: within epochs, and at their ends

Data = tuple[Tensor, ...]


class Combination(NamedTuple):
    """One kind of fit.

    Attributes:
        model: A key of `MODELS`.
        training: A key of `TRAININGS`.
        callbacks: A key of `CALLBACKS`.
    """

    model: str
    training: str
    callbacks: str

    def __str__(self) -> str:
        return "/".join(self)

    @classmethod
    def of(cls, name: str) -> "Combination":
        """Return the one of a name, `regression/rates/best` say."""
        return cls(*name.split("/"))


class Plain(PyroModule):
    """Pyro alone: a Bayesian last layer on a net with BatchNorm and dropout, and a parameter of Pyro's kind."""

    def __init__(self, num_inputs: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(num_inputs, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.2))
        self.noise = PyroParam(torch.tensor(1.0), constraint=dist.constraints.positive)

    def forward(self, x: Tensor, y: Tensor) -> None:
        """Run the model."""
        w = pyro.sample("w", dist.Normal(torch.zeros(6), 1.0).to_event(1))
        mean, noise = self.net(x) @ w, torch.as_tensor(self.noise)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("y", dist.Normal(mean, noise), obs=y)


@cache
def diabetes() -> tuple[Data, Data]:
    """Return rows to fit and held-out ones: ten orthonormal features and the course of the disease, standardised."""
    from sklearn.datasets import load_diabetes  # type: ignore[import-untyped]

    x, y = (torch.tensor(part, dtype=torch.float32) for part in load_diabetes(return_X_y=True))
    x, y = orthonormalise(x)[: 2 * ROWS], ((y - y.mean()) / y.std())[: 2 * ROWS]
    return (x[:ROWS], y[:ROWS]), (x[ROWS:], y[ROWS:])


@cache
def digits() -> tuple[Data, Data]:
    """Return images with their labels, to fit and held out."""
    found = load("digits")
    train, held_out = found.train, found.validation
    return (train.images[:ROWS], train.labels[:ROWS]), (held_out.images[:ROWS], held_out.labels[:ROWS])


def regression(training: str) -> tuple[Any, Any, Data, Data]:
    """Make a regression whose order is not known; its weights know the order but where masks have a temperature."""
    model = OrderedRegression(OrderedMask.uniform(10))
    latents = "mean_field" if training == "draws" else "conditional"
    return model, AutoNested(model, latents=latents), *diabetes()  # type: ignore[arg-type]


def classifier(training: str) -> tuple[Any, Any, Data, Data]:
    """Make a nested perceptron."""
    data, held_out = digits()
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 10))
    model = NestedClassifier(nest(net, data[0][:2], num_blocks=4))
    return model, model.guide, data, held_out


def autoencoder(training: str) -> tuple[Any, Any, Data, Data]:
    """Make an autoencoder with a code of four latents."""
    (x, _), (held_out, _) = digits()
    shape = tuple(x.shape[1:])
    model = OrderedVAE(shape, 4, bodies=mlp_bodies(shape, hidden=(16,)))
    return model, model.guide, (x,), (held_out,)


def plain(training: str) -> tuple[Any, Any, Data, Data]:
    """Make a model without masks, and a guide of Pyro's."""
    model = Plain(10)
    return model, AutoNormal(model), *diabetes()


def rates(model: str) -> dict[str, Any]:
    """A learning rate that falls, shortened gradients."""
    return {"optimizer": OptimizerSettings(lr_schedule=cosine_to_zero(0.2), clip_norm=10.0)}


def weights(model: str) -> dict[str, Any]:
    """A KL that grows, another optimiser, and the caller's random numbers."""
    weights = KLWeights(linear(0.1, 1.0, warmup=0.3), local=linear(0.0, 1.0, warmup=0.3))
    optimizer = OptimizerSettings(lambda parts, lr: torch.optim.SGD(parts, lr / 100, momentum=0.9), clip_norm=1.0)
    return {"weights": weights, "optimizer": optimizer, "seed": None}


def draws(model: str) -> dict[str, Any]:
    """Masks from several sources at a falling temperature; of what has no such masks, a loader that draws itself."""
    temperature = linear(1.0, 0.2)
    if model == "plain":
        return {"optimizer": OptimizerSettings(accumulate=2)}
    shares = (1.0, 0.0, 0.0) if model == "regression" else (0.5, 0.4, 0.1)
    return {"schedule": MaskSchedule(*shares, temperature=None if model == "autoencoder" else temperature)}


class Wander(Callback):
    """A callback with a state of its own that takes random numbers from the fit's."""

    def __init__(self) -> None:
        self.at, self.path = torch.zeros(2), [0.0]

    def on_step(self, run: Run) -> None:
        """Take a step."""
        self.at = self.at + torch.randn(2)

    def on_epoch(self, run: Run) -> None:
        """Write down how far off it is."""
        self.path.append(float(self.at.norm()))
        run.log("wander", self.path[-1])

    def state_dict(self) -> dict[str, Any]:
        """Return where it is, and was."""
        return {"at": self.at, "path": self.path}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take it back."""
        self.at, self.path = state["at"], list(state["path"])


def best(folder: Path, held_out: Data) -> list[Callback]:
    """Validation with the best epoch, a CSV file, checkpoints within epochs."""
    checkpoint = Checkpoint(folder / CHECKPOINT, every_steps=EVERY_STEPS, resume=True)
    return [Validation(held_out), BestEpoch(), CSVLogger(folder / "fit.csv"), checkpoint]


def stopping(folder: Path, held_out: Data) -> list[Callback]:
    """A rule that may stop, a callback with a state, TensorBoard, a bar, checkpoints after epochs."""
    logger = TensorBoardLogger(folder / "events", every_steps=2)
    rule, checkpoint = EarlyStopping("wander", patience=6), Checkpoint(folder / CHECKPOINT, resume=True)
    return [Wander(), rule, logger, ProgressBar(), checkpoint]


MODELS = {each.__name__: each for each in (regression, classifier, autoencoder, plain)}
TRAININGS = {each.__name__: each for each in (rates, weights, draws)}
CALLBACKS: dict[str, Callable[[Path, Data], list[Callback]]] = {each.__name__: each for each in (best, stopping)}
COMBINATIONS = tuple(Combination(*names) for names in product(MODELS, TRAININGS, CALLBACKS))


class Seen(Callback):
    """A callback that only looks: it knows the optimiser afterwards."""

    run: Run

    def on_fit_start(self, run: Run) -> None:
        """Look."""
        self.run = run


def outcome(which: Combination, folder: Path, seed: int = 0) -> dict[str, str]:
    """Fit, or go on with a fit, and return a digest of all that came of it, by name.

    Args:
        which: What is fitted.
        folder: Where its files are.
        seed: Seed of the model's first parameters and of the caller's random numbers. Where there is a checkpoint all
            depends on that alone.
    """
    torch.manual_seed(seed)
    model, guide, data, held_out = MODELS[which.model](which.training)
    given: Any = data
    if (which.model, which.training) == ("plain", "draws"):
        own = torch.Generator().manual_seed(3 + seed)
        given = DataLoader(TensorDataset(*data), batch_size=ROWS // 8, shuffle=True, generator=own)
    seen = Seen()
    callbacks = [seen, *CALLBACKS[which.callbacks](folder, held_out)]
    arguments: dict[str, Any] = {"num_epochs": EPOCHS, "callbacks": callbacks, "progress": False, "seed": 0}
    arguments |= TRAININGS[which.training](which.model) | ({"batch_size": ROWS // 4} if given is data else {})
    before = torch.get_rng_state()
    with warnings.catch_warnings():
        for kind in (LengthCollapseWarning, PoorFitWarning):  # of fits that are this short
            warnings.simplefilter("ignore", kind)
        result = fit(model, guide, given, **arguments)
    if arguments["seed"] is None:  # the caller's random numbers are where those of the fit ended
        random = digest(torch.get_rng_state())
    else:
        random = "untouched" if torch.equal(torch.get_rng_state(), before) else "touched"
        torch.manual_seed(1)
    draws = poutine.trace(guide).get_trace(*data)
    parts = {name: part for name, part in (("model", model), ("guide", guide)) if isinstance(part, nn.Module)}
    found = {name: digest(part.state_dict()) for name, part in parts.items()}
    found |= {f"result.{name}": digest(value) for name, value in asdict(result).items() if name != "seconds"}
    found |= {"draws": digest({name: site["value"] for name, site in draws.nodes.items() if site["type"] == "sample"})}
    found |= {"random": random, "optimiser": digest(seen.run.optimizer.state_dict())}
    return found | states(folder) | logs(folder)


def states(folder: Path) -> dict[str, str]:
    """Return digests of what checkpoints have, but for the seconds that the fit took.

    Raises:
        ValueError: If one cannot be read.
    """
    found: dict[str, str] = {}
    for path in sorted(folder.glob("*.pt")):
        state = read_state(path)
        del state["result"]["seconds"]
        found |= {f"{path.name}: {name}": digest(value) for name, value in state.items()}
    return found


def logs(folder: Path) -> dict[str, str]:
    """Return digests of what loggers wrote, but for the seconds."""
    found: dict[str, str] = {}
    if (path := folder / "fit.csv").exists():
        with path.open(newline="") as file:
            found[path.name] = digest([row | {"seconds": None} for row in csv.DictReader(file)])
    if (path := folder / "events").exists():
        found[path.name] = digest(events(path))
    return found


def events(folder: Path) -> dict[str, list[tuple[int, list[float]]]]:
    """Return what was written for TensorBoard by name and step: a step that was repeated has the same number again."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

    found: dict[str, dict[int, set[float]]] = {}
    for path in folder.iterdir():  # each alone: files that were made within a second are in no order
        read = EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()
        for name in set(read.Tags()["scalars"]) - {"seconds"}:
            for each in read.Scalars(name):
                found.setdefault(name, {}).setdefault(each.step, set()).add(each.value)
    return {name: [(step, sorted(values)) for step, values in sorted(steps.items())] for name, steps in found.items()}


def digest(value: Any) -> str:
    """Return a digest of tensors, to the last bit, and of numbers and strings, in dicts and lists.

    Example:
        >>> x = torch.tensor([0.1])
        >>> digest({"x": [x]}) == digest({"x": [x.clone()]}), digest(x) == digest(x.nextafter(x + 1))
        (True, False)
    """
    made = hashlib.sha256()
    _feed(made, value)
    return made.hexdigest()[:16]


def _feed(made: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        made.update(f"{value.dtype} {tuple(value.shape)}".encode())
        made.update(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            made.update(f"{key!r}:".encode())
            _feed(made, value[key])
    elif isinstance(value, list | tuple):
        made.update(f"{len(value)} items".encode())
        for each in value:
            _feed(made, each)
    else:
        made.update(repr(value).encode())
