"""Fits that nobody wrote down: what they repeat, how they go on after a fault, and what they refuse."""

import math
import tempfile
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from masked_mean import MaskedMeanGuide, make_net, masked_mean
from torch.utils.data import DataLoader, TensorDataset

from pyro_vnd.infer import (
    AutoNested,
    BestEpoch,
    Callback,
    Checkpoint,
    CSVLogger,
    EarlyStopping,
    KLWeights,
    MaskSchedule,
    NestedELBO,
    OptimizerSettings,
    Plateau,
    cosine_to_zero,
    fit,
    linear,
)
from pyro_vnd.nn import NestedClassifier

PROGRAMS = ["masked mean", "nested net", "lengths known"]


class Interrupted(Exception):
    pass


class Stop(Callback):
    """A fault in a step."""

    def __init__(self, step):
        self.step = step

    def on_step(self, run):
        if run.step == self.step:
            raise Interrupted


def programs(kind):
    """A model and its guide, always the same."""
    torch.manual_seed(1)
    if kind == "nested net":
        model = NestedClassifier(make_net())
        return model, model.guide
    return masked_mean, MaskedMeanGuide() if kind == "masked mean" else AutoNested(masked_mean)


def rows_of(kind, count):
    """Tensors by argument."""
    torch.manual_seed(2)
    if kind == "nested net":
        return {"x": torch.randn(count, 3), "y": torch.randint(0, 2, (count,))}
    return {"y": torch.randn(count) + 1}


def in_form(parts, form, batch_size, shuffle, own_generator):
    """Data in one of their forms."""
    tensors = tuple(parts.values())
    if form == "mapping":
        return parts
    if form == "dataset":
        return TensorDataset(*tensors)
    if form == "loader":
        generator = torch.Generator().manual_seed(3) if own_generator else None
        return DataLoader(TensorDataset(*tensors), batch_size=batch_size, shuffle=shuffle, generator=generator)
    if form == "list":
        return list(zip(*(x.split(batch_size) for x in tensors), strict=True))
    return tensors[0] if len(tensors) == 1 and form == "tensor" else tensors


def integer(low, high):
    return st.builds(lambda kind, x: kind(x), st.sampled_from([int, np.int64, torch.tensor]), st.integers(low, high))


rates = st.builds(
    lambda kind, x: kind(x),
    st.sampled_from([float, np.float64, np.float32, torch.tensor]),
    st.floats(0.0078125, 0.125, width=32),
)
schedules = st.builds(linear, st.floats(0, 2), st.floats(0, 2))
weights = st.one_of(st.floats(0, 2), st.builds(np.float64, st.floats(0, 2)), schedules)


@st.composite
def fits(draw):
    """A kind of program, data and how they come, and arguments of `fit` that go with them."""
    kind, form = (
        draw(st.sampled_from(PROGRAMS)),
        draw(st.sampled_from(["tensor", "tuple", "mapping", "dataset", "loader", "list"])),
    )
    count = draw(st.integers(2, 9))
    batch_size = draw(st.integers(1, count))
    asked = {
        "num_epochs": draw(integer(1, 3)),
        "seed": draw(st.one_of(st.integers(0, 2**63 - 1), st.just(np.int64(5)))),
    }
    if form in ("tensor", "tuple", "mapping", "dataset"):
        given_size = draw(st.sampled_from([int, np.int64, torch.tensor]))(batch_size)
        asked["batch_size"] = given_size if form == "dataset" else draw(st.sampled_from([given_size, None]))
    by_group = st.builds(lambda a, b: {"laws": a, "*": b}, rates, rates)
    several = [by_group] if kind == "nested net" else []  # which alone has parameters that are laws
    asked["lr"] = draw(st.one_of(st.none(), rates, *several))
    makers = st.sampled_from([None, torch.optim.SGD, torch.optim.AdamW])
    asked["optimizer"] = draw(
        st.one_of(
            makers,
            st.builds(
                OptimizerSettings,
                makers,
                st.sampled_from([None, cosine_to_zero(), cosine_to_zero(0.5)]),
                st.sampled_from([None, 1.0, np.float32(0.5)]),
                st.integers(1, 3),
            ),
        )
    )
    asked["weights"] = draw(st.one_of(st.none(), st.builds(KLWeights, weights, weights, weights)))
    asked["elbo"] = draw(st.sampled_from([None, NestedELBO(num_particles=2)])) if kind != "lengths known" else None
    if kind == "nested net":
        masks = [None, MaskSchedule(), MaskSchedule(1, 0, 0), MaskSchedule(0.2, 0.6, 0.2, temperature=0.5)]
        asked["schedule"] = draw(st.sampled_from(masks))
    data = (form, batch_size, draw(st.booleans()), draw(st.booleans()))
    return kind, count, data, {name: value for name, value in asked.items() if value is not None}


CALLBACKS = {
    "csv": lambda folder: [CSVLogger(folder / "log.csv")],
    "best": lambda folder: [BestEpoch()],
    "early": lambda folder: [EarlyStopping(patience=1), BestEpoch()],
    "plateau": lambda folder: [Plateau()],
    "none": lambda folder: [],
}


def run(described, folder, more=(), names=("none",), **others):
    """Fit anew; return the programs and the result, or None for it after a fault."""
    kind, count, data, asked = described
    model, guide = programs(kind)
    parts = rows_of(kind, count)
    callbacks = [*more, *(each for name in names for each in CALLBACKS[name](folder))]
    options = {
        **deepcopy(asked),
        "callbacks": callbacks,
        "progress": False,
        "validation": parts if data[0] == "mapping" else tuple(parts.values()),
        **others,
    }
    try:
        result = fit(model, guide, in_form(parts, *data), **options)
    except Interrupted:
        result = None
    return (model, guide), result


def state_of(both):
    return [{name: x.clone() for name, x in part.state_dict().items()} for part in both if hasattr(part, "state_dict")]


def history(result):
    return {name: value for name, value in vars(result).items() if name != "seconds"}


def assert_same(one, other):
    (programs_of_one, result), (programs_of_other, again) = one, other
    for a, b in zip(state_of(programs_of_one), state_of(programs_of_other), strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert str(history(result)) == str(history(again))


def num_steps(described):
    """Steps that a fit takes: all batches, so many together as gradients are added up."""
    _, count, (form, batch_size, *_), asked = described
    size = int(asked.get("batch_size", batch_size if form in ("loader", "list") else count))
    together = asked["optimizer"].accumulate if isinstance(asked.get("optimizer"), OptimizerSettings) else 1
    return int(asked["num_epochs"]) * math.ceil(math.ceil(count / size) / together)


@given(fits(), st.lists(st.sampled_from([*CALLBACKS]), max_size=2, unique=True))
def test_a_fit_is_repeated_by_its_seed(described, names):
    with tempfile.TemporaryDirectory() as folder:
        one, other = (run(described, Path(folder), names=names) for _ in range(2))
    assert_same(one, other)
    result = one[1]
    assert result.num_steps == num_steps(described) or "early" in names
    assert all(map(math.isfinite, result.elbo))


@given(fits(), st.data(), st.booleans(), st.sampled_from([*CALLBACKS]))
def test_a_fit_goes_on_after_a_fault(described, data, within, name):
    last = num_steps(described)
    stop = data.draw(st.integers(1, last), label="fault at step")
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        unbroken = run(described, Path(other), names=[name])
        kept = {"every_steps": 1} if within else {}
        path = Path(one) / "fit.pt"
        _, result = run(described, Path(one), [Stop(stop), Checkpoint(path, **kept)], [name])
        assert result is None or unbroken[1].num_steps < stop
        resumed = run(described, Path(one), [Checkpoint(path, resume=True, **kept)], [name])
    assert_same(unbroken, resumed)


NUMBERS = torch.tensor([1.0, 2.0])
nothing = st.sampled_from([-1, 1.5, math.nan, "x", b"x", object(), [3], (), NUMBERS])  # for next to nothing
other = {
    "num_epochs": [0, True, "3", 2**70],
    "batch_size": [0, True, 10],
    "lr": [0, True, math.inf, {"*": -1.0}, {"nothing": 0.1}, {"laws": "x"}, np.array([0.1, 0.2])],
    "optimizer": [torch.optim.LBFGS, torch.optim.Optimizer, cosine_to_zero(), int, True, {}],
    "elbo": [NestedELBO, True, {}],
    "weights": [KLWeights, 0.5, KLWeights(-1.0), KLWeights(lengths="x"), KLWeights(local=linear(-1, 1))],
    "schedule": [MaskSchedule, linear(0, 1), True],
    "callbacks": [Callback, [Callback], Plateau(), True],
    "plate": [0, True, None],
    "device": ["nowhere", "cuda:99", torch.float32],
    "precision": [32, "16", None],
    "seed": [2**63, True],
    "checkpoint": ["/nowhere/at/all.pt", "/", "", True],
    "resume": ["more", None],
    "progress": [1, None],
    "validation": ["x", b"x"],
    "model": [None, int],
    "guide": [None, int, AutoNested],
    "data": [
        None,
        {},
        [],
        torch.tensor(1.0),
        torch.empty(0, 3),
        torch.full((3,), math.nan),
        torch.ones(3, device="meta"),
    ],
}
RIGHT = {
    "lr": [1.5],
    "checkpoint": ["x"],
    "plate": ["x"],
    "callbacks": [()],
    "data": [NUMBERS],
    "validation": [NUMBERS],
}


@st.composite
def wrong(draw):
    """An argument of `fit` and a value that is none of its own."""
    argument = draw(st.sampled_from([*other]))
    value = draw(st.one_of(nothing, st.sampled_from(other[argument])))
    assume(not any(value is right for right in RIGHT.get(argument, ())))
    return argument, value


@given(st.sampled_from(PROGRAMS), st.sampled_from(["tuple", "mapping", "loader", "list"]), wrong())
def test_a_wrong_argument_is_named_before_anything_is_trained(kind, form, wrong):
    argument, value = wrong
    model, guide = programs(kind)
    before = state_of((model, guide))
    data = in_form(rows_of(kind, 4), form, 2, False, False)
    with tempfile.TemporaryDirectory() as folder:
        given_ = {"model": model, "guide": guide, "data": data, "num_epochs": 1, "progress": False, argument: value}
        if argument == "resume":
            given_["checkpoint"] = f"{folder}/fit.pt"
        with pytest.raises(ValueError, match=rf"(?s)^fit: .*`{argument}") as caught:
            fit(given_.pop("model"), given_.pop("guide"), given_.pop("data"), **given_)
        assert not list(Path(folder).iterdir())
    assert "\n" not in str(caught.value)
    for one, now in zip(before, state_of((model, guide)), strict=True):
        assert all(torch.equal(one[name], now[name]) for name in one)  # an autoguide makes more in its first call


@pytest.mark.parametrize("kind", PROGRAMS)
def test_power(kind, tmp_path):
    """Another seed, or a fit that begins anew where it should go on, ends elsewhere."""
    described = kind, 6, ("tuple", 2, False, False), {"num_epochs": 2, "batch_size": 2, "seed": 3}
    unbroken = run(described, tmp_path)
    assert_same(unbroken, run(described, tmp_path))
    with pytest.raises(AssertionError):
        assert_same(unbroken, run(described, tmp_path, seed=4))
    programs_, _ = run(described, tmp_path, [Stop(4)])
    with pytest.raises(AssertionError):
        assert_same(unbroken, (programs_, unbroken[1]))
