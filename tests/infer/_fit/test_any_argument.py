"""Whatever an argument of `fit`, or of what goes into it, is given: it is taken, or refused by its name."""

import inspect
import math

import numpy as np
import pytest
import torch
from masked_mean import normal_mean
from pyro.infer.autoguide import AutoNormal
from torch import nn

from pyro_vnd.infer import (
    BestEpoch,
    Checkpoint,
    CSVLogger,
    EarlyStopping,
    KLWeights,
    LivePlot,
    MaskSchedule,
    NestedELBO,
    OptimizerSettings,
    Plateau,
    PriceSchedule,
    TensorBoardLogger,
    Validation,
    cosine,
    cosine_to_zero,
    fit,
    linear,
)


class Odd:
    """Cannot be compared, hashed or asked whether it is true."""

    __hash__ = None

    def __eq__(self, other):
        raise TypeError("odd")

    __bool__ = __lt__ = __le__ = __gt__ = __ge__ = __eq__


THINGS = {
    "none": None,
    "object": object(),
    "odd": Odd(),
    "list": [],
    "numbers": [1, 2],
    "mapping": {"a": 1},
    "set": set(),
    "word": "x",
    "nothing": "",
    "bytes": b"x",
    "two": torch.ones(2),
    "truth": torch.tensor(True),
    "array": np.zeros(2),
    "words": np.array(["a"]),
    "nan": math.nan,
    "inf": math.inf,
    "negative": -1,
    "huge": 10**400,
    "complex": 1j,
    "function": lambda: 1,
    "class": int,
    "iterator": iter([1]),
    "module": nn.Linear(1, 1),
    "rest": ...,
    "slice": slice(1),
}
OR_NONE = ("num_epochs", "batch_size", "lr", "optimizer", "elbo", "weights", "schedule", "device", "seed", "num_data")
FIT = {
    **{name: {"none"} for name in OR_NONE},
    "validation": {"none"},
    "checkpoint": {"none", "word"},
    "callbacks": {"list"},
    "plate": {"word", "nothing"},  # all rows in one batch need none of this name
    "precision": set(),
    "progress": set(),
}
SHARES = ("learned", "budget", "full", "law", "anneal", "sliced")
PARTS = {
    **{(OptimizerSettings, name): {"none"} for name in ("optimizer", "lr_schedule", "clip_norm")},
    (OptimizerSettings, "accumulate"): set(),
    **{(KLWeights, name): set() for name in ("latents", "local", "lengths")},
    **{(MaskSchedule, name): set() for name in SHARES},
    (MaskSchedule, "num_particles"): {"huge"},
    (MaskSchedule, "temperature"): {"none", "function", "module", "class"},
    **{(PriceSchedule, name): {"none"} for name in ("low", "high", "temperature")},
    **{(PriceSchedule, name): set() for name in ("full", "explore", "warmup")},
    (Plateau, "window"): {"huge"},
    **{(Plateau, name): set() for name in ("tolerance", "alpha")},
    (EarlyStopping, "patience"): {"huge"},
    **{(EarlyStopping, name): set() for name in ("min_change", "mode")},
    **{(kind, "monitor"): {"word", "nothing"} for kind in (EarlyStopping, BestEpoch)},
    (BestEpoch, "mode"): set(),
    (Checkpoint, "every_steps"): {"none", "huge"},
    (Checkpoint, "every_minutes"): {"none"},
    (Checkpoint, "best"): {"word", "nothing"},
    (Checkpoint, "resume"): set(),
    (Checkpoint, "path"): {"word"},
    (CSVLogger, "path"): {"word"},
    (TensorBoardLogger, "folder"): {"word", "nothing"},
    (TensorBoardLogger, "every_steps"): {"none", "huge"},
    (LivePlot, "every_epochs"): {"huge"},
    (Validation, "metrics"): {"none"},
    (NestedELBO, "local_reparam"): set(),
    **{(kind, name): {"negative"} for kind in (linear, cosine) for name in ("start", "end")},
    **{(kind, "warmup"): set() for kind in (linear, cosine, cosine_to_zero)},
}
USUAL = {"path": "file.csv", "folder": "events", "data": torch.zeros(3), "start": 0.0, "end": 1.0}


def refused(make, taken, name):
    """Assert that all but what is taken is refused by a ValueError that names the argument."""
    for key, value in THINGS.items():
        if key in taken:
            make(value)
            continue
        with pytest.raises(ValueError, match=rf"^\w+: arguments? .*?`([\w.]+\.)?{name}(\[.*\])?`"):
            make(value)


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(("argument", "taken"), FIT.items(), ids=FIT)
def test_arguments_of_fit(argument, taken, y):
    def train(value):
        arguments = {"num_epochs": 1, "progress": False} | {argument: value}
        if argument == "num_epochs" and value is None:  # a hundred by default
            return
        fit(normal_mean, AutoNormal(normal_mean), y, **arguments)

    refused(train, taken, "checkpoint" if argument == "checkpoint" else argument)


@pytest.mark.parametrize(("part", "taken"), PARTS.items(), ids=[f"{kind.__name__}.{name}" for kind, name in PARTS])
def test_arguments_of_what_goes_into_a_fit(part, taken, y):
    kind, argument = part
    needed = {
        name: USUAL[name]
        for name, parameter in inspect.signature(kind).parameters.items()
        if name in USUAL and parameter.default is inspect.Parameter.empty
    }

    def make(value):
        if kind is KLWeights and isinstance(value, nn.Module):  # a function of something else than t, as it finds out
            raise ValueError(f"skipped: argument `{argument}`")
        made = kind(**needed | {argument: value})
        arguments = {KLWeights: "weights", OptimizerSettings: "optimizer"}
        if kind in arguments:
            fit(normal_mean, AutoNormal(normal_mean), y, num_epochs=1, progress=False, **{arguments[kind]: made})

    refused(make, taken, "checkpoint" if part == (Checkpoint, "path") else argument)


@pytest.mark.parametrize("key", THINGS)
def test_rates_by_group(key, y):
    with pytest.raises(ValueError, match=r"^fit: argument `lr\['\*'\]` must be a finite number >= 0"):
        fit(normal_mean, AutoNormal(normal_mean), y, num_epochs=1, progress=False, lr={"*": THINGS[key]})


@pytest.mark.parametrize("key", THINGS)
def test_data(key, y):
    thing = (torch.ones(3), torch.ones(2)) if key == "two" else THINGS[key]  # one of them alone would do
    for data in (thing, (y, thing), {"y": thing}):
        with pytest.raises(ValueError, match=r"^fit: argument `(data(\[.*\])?|num_data)` "):
            fit(normal_mean, AutoNormal(normal_mean), data, num_epochs=1, progress=False)
