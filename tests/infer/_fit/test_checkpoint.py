"""A fit that was interrupted goes on as if it had not been, to the last bit."""

import os
import traceback
import zipfile
from functools import cached_property, partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule
from torch import nn
from torch.optim import lr_scheduler

from pyro_vnd.distributions import OrderedMask
from pyro_vnd.infer import (
    Callback,
    FitResult,
    KLWeights,
    MaskSchedule,
    NestedELBO,
    OptimizerSettings,
    cosine_to_zero,
    fit,
    linear,
)
from pyro_vnd.nn import NestedClassifier, NestedLayer, NestedNet, Width

N = 40


class Interrupted(Exception):
    pass


class Regression(PyroModule):
    """A Bayesian last layer on a net with BatchNorm and dropout; may stop at a call."""

    def __init__(self, stop_at=None):
        super().__init__()
        torch.manual_seed(5)
        self.net = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.2))
        self.calls, self.stop_at = 0, stop_at

    def forward(self, x, y):
        self.calls += 1
        if self.calls == self.stop_at:
            raise Interrupted
        w = pyro.sample("w", dist.Normal(torch.zeros(6), 1.0).to_event(1))
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        mean = self.net(x) @ w
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, scale), obs=y)

    @cached_property
    def guide(self):
        return AutoNormal(self)


class Nested(NestedClassifier):
    """A nested net with masks from all sources; may stop at a call."""

    masks = "example"

    def __init__(self, stop_at=None):
        torch.manual_seed(5)
        hidden = Width("hidden", 8, num_blocks=4)
        first, last = NestedLayer(nn.Linear(3, 8), outputs=hidden), NestedLayer(nn.Linear(8, 2), inputs=hidden)
        super().__init__(NestedNet(nn.Sequential(first, nn.ReLU(), last), mask_per=self.masks))
        self.calls, self.stop_at = 0, stop_at

    def forward(self, x, y=None):
        self.calls += 1
        if self.calls == self.stop_at:
            raise Interrupted
        return super().forward(x, (y > 0).long())

    @cached_property
    def guide(self):
        return self.net.guide


class NestedBatch(Nested):
    """One mask a batch, which some epochs never draw."""

    masks = "batch"


def settings(optimizer=torch.optim.SGD, **options):
    return OptimizerSettings(optimizer, clip_norm=1.0, **options)


class Counting(Callback):
    """A callback with a state of a number of numpy's."""

    def state_dict(self):
        return {"seen": np.int64(3)}

    def load_state_dict(self, state):
        assert state == {"seen": 3}


ARGUMENTS = {"num_epochs": 6, "batch_size": 10, "lr": 0.05, "progress": False}
OPTIONS = {
    Regression: {"weights": KLWeights(linear(0.0, 1.0)), "optimizer": settings()},
    Nested: {
        "schedule": MaskSchedule(temperature=linear(1.0, 0.2)),
        "optimizer": OptimizerSettings(lr_schedule=cosine_to_zero(0.2)),
    },
}
OPTIONS[NestedBatch] = {"schedule": MaskSchedule(0.2, 0.6, 0.2, sliced=True), "elbo": NestedELBO(local_reparam=True)}


@pytest.fixture
def data():
    x = torch.randn(N, 3)
    return x, x.sum(-1) + 0.1 * torch.randn(N)


def train(kind, data, stop_at=None, **arguments):
    """Fit anew; return the state of all modules and the result, or None for it if interrupted."""
    model = kind(stop_at)
    guide = model.guide
    try:
        result = fit(model, guide, data, **{**ARGUMENTS, **OPTIONS[kind], **arguments})
    except Interrupted:
        result = None
    return {**model.state_dict(), **{f"guide.{k}": v for k, v in guide.state_dict().items()}}, result


def history(result):
    return {name: value for name, value in vars(result).items() if name != "seconds"}


@pytest.mark.parametrize("seed", [3, None])
@pytest.mark.parametrize("kind", [Regression, Nested, NestedBatch])
def test_an_interrupted_fit_ends_where_an_uninterrupted_one_does(kind, seed, data, tmp_path):
    path = tmp_path / "fit.pt"
    torch.manual_seed(8)
    expected, whole = train(kind, data, validation=data, seed=seed)
    # A step calls the model once, after one call in the beginning: stop in the middle of the third epoch.
    torch.manual_seed(8)
    stop = 1 + 2 * (4 + 4) + 2
    _, nothing = train(kind, data, stop_at=stop, validation=data, checkpoint=path, seed=seed)
    assert nothing is None
    torch.manual_seed(99)
    state, result = train(kind, data, validation=data, checkpoint=path, resume=True, seed=seed)
    assert state.keys() == expected.keys()
    assert [name for name in state if not torch.equal(state[name], expected[name])] == []
    assert history(result) == history(whole)
    assert len(result.elbo) == 6
    assert sorted(os.listdir(tmp_path)) == ["fit.best.pt", "fit.previous.pt", "fit.pt"]


def test_the_same_modules_may_go_on(data, tmp_path):
    # Parameters have moved since the last finished epoch, which is where the fit goes on.
    expected, _ = train(Regression, data)
    model = Regression(stop_at=11)
    guide = model.guide
    arguments = {**ARGUMENTS, **OPTIONS[Regression], "checkpoint": str(tmp_path / "fit.pt"), "resume": True}
    with pytest.raises(Interrupted):
        fit(model, guide, data, **arguments)
    fit(model, guide, data, **arguments)
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", [Regression, Nested])
def test_a_finished_fit_returns_at_once(kind, data, tmp_path):
    path = tmp_path / "fit.pt"
    expected, first = train(kind, data, checkpoint=path)
    written = path.stat().st_mtime_ns
    state, second = train(kind, data, checkpoint=path, resume=True, stop_at=3)  # two calls would be a step
    assert second == first
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert path.stat().st_mtime_ns == written


def test_without_resume_a_fit_starts_from_scratch(data, tmp_path):
    path = tmp_path / "fit.pt"
    expected, _ = train(Regression, data, checkpoint=path)
    state, result = train(Regression, data, checkpoint=path)
    assert result.num_steps == 24
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_resume_without_a_file_starts_from_scratch(data, tmp_path):
    state, result = train(Regression, data, checkpoint=tmp_path / "fit.pt", resume=True)
    expected, whole = train(Regression, data)
    assert history(result) == history(whole)
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_resume_with_an_older_state_alone_says_so(data, tmp_path):
    path = tmp_path / "fit.pt"
    train(Regression, data, checkpoint=path)
    kept = {file: file.read_bytes() for file in tmp_path.iterdir() if file != path}
    path.unlink()
    with pytest.raises(ValueError, match=r"fit\.pt', is not there, but '.*fit\.previous\.pt' is: rename that one"):
        train(Regression, data, checkpoint=path, resume=True)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == kept


def test_unfinished_files_of_a_longer_name_are_anothers(data, tmp_path):
    theirs, mine = tmp_path / ".fit.pt.4711.tmp", tmp_path / ".fit.4712.tmp"
    for file in (theirs, mine, tmp_path / ".fit.4712.link.tmp"):
        file.touch()
    train(Regression, data, checkpoint=tmp_path / "fit")
    assert {file for file in tmp_path.iterdir() if file.suffix == ".tmp"} == {theirs}


def test_a_link_to_itself_is_replaced(data, tmp_path):
    path = tmp_path / "fit.pt"
    path.symlink_to(path)
    train(Regression, data, checkpoint=path)
    assert path.is_file()
    assert not path.is_symlink()


def test_the_file_is_read_without_running_code(data, tmp_path):
    train(Nested, data, checkpoint=tmp_path / "fit.pt")
    state = torch.load(tmp_path / "fit.pt", weights_only=True)
    assert FitResult(**state["result"]).num_steps == 24


def test_a_failed_write_leaves_the_last_file(data, tmp_path, monkeypatch):
    path = tmp_path / "fit.pt"
    train(Regression, data, checkpoint=path)
    before = path.read_bytes()

    def full(*_, **__):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(ValueError, match="cannot be written: no space"):
            train(Regression, data, checkpoint=path)
    assert path.read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["fit.previous.pt", "fit.pt"]


class Wider(Regression):
    def __init__(self, stop_at=None):
        super().__init__(stop_at)
        self.net[0], self.net[1] = nn.Linear(3, 6, bias=False), nn.BatchNorm1d(6)


OTHER = [
    (
        {"num_epochs": 7},
        r"fit.pt' is of another fit: `num_epochs` was 6, now 7; resume=\"extend\" goes on to more epochs$",
    ),
    ({"num_epochs": 5}, "`num_epochs` was 6, now 5$"),
    ({"batch_size": 20}, "`batch_size` was 10, now 20$"),
    ({"optimizer": settings(torch.optim.AdamW)}, r"`optimizer` was SGD\(.*\), now AdamW\(.*\)$"),
    (
        {"optimizer": settings(partial(torch.optim.SGD, momentum=0.5))},
        r"`optimizer` was SGD\(momentum=0, .*, now SGD\(momentum=0.5",
    ),
    ({"lr": 0.5}, "`lr` was 0.05, now 0.5$"),
    (
        {"optimizer": settings(lr_schedule=cosine_to_zero())},
        "`lr_schedule` was None, now SequentialLR, 0.0005 at first, hash .{8}$",
    ),
    ({"weights": KLWeights(latents=0.5)}, "`weights.latents` was 0 to 1, hash .{8}, now 0.5$"),
    (
        {"weights": KLWeights(linear(0.0, 1.0, warmup=0.5))},
        "`weights.latents` was 0 to 1, hash (.{8}), now 0 to 1, hash (?!\\1).{8}$",
    ),
    ({"weights": KLWeights(linear(0.0, 1.0), local=0.0)}, "another fit: `weights.local` was 1.0, now 0.0$"),
    (
        {"weights": KLWeights(linear(0.0, 1.0), lengths=lambda t: t)},
        "another fit: `weights.lengths` was 1.0, now 0 to 1, hash .{8}$",
    ),
    ({"optimizer": torch.optim.SGD}, "`clip_norm` was 1.0, now None$"),
    ({"seed": 1}, "`seed` was 0, now 1$"),
    ({"seed": None}, "`seed` was 0, now None$"),
    ({"elbo": NestedELBO(local_reparam="linear")}, "`local_reparam` was False, now linear$"),
    (
        {"elbo": pyro.infer.Trace_ELBO(num_particles=2)},
        "`elbo` was NestedELBO of 1 particles, now Trace_ELBO of 2 particles$",
    ),
    ({"lr": 0.5, "seed": 1}, "`lr` was 0.05, now 0.5; `seed` was 0, now 1$"),
]


@pytest.mark.parametrize(("arguments", "message"), OTHER)
def test_resume_with_other_arguments_says_what_differs(arguments, message, data, tmp_path):
    train(Regression, data, checkpoint=tmp_path / "fit.pt")
    with pytest.raises(ValueError, match=message):
        train(Regression, data, checkpoint=tmp_path / "fit.pt", resume=True, **arguments)


OTHER_MASKS = [
    (
        {"schedule": MaskSchedule(0.2, 0.7, 0.1, temperature=linear(1.0, 0.2))},
        r"`schedule` was MaskSchedule\(.*, now MaskSchedule\(learned=0.2",
    ),
    (
        {"schedule": None},
        r"`schedule.temperature` was .*, now None; `schedule` was MaskSchedule\(learned=0.5, bud.*, now None$",
    ),
    ({"schedule": MaskSchedule(temperature=0.1)}, "`schedule.temperature` was 1 to 0.2, hash .{8}, now 0.1$"),
    (
        {"optimizer": OptimizerSettings(lr_schedule=cosine_to_zero(0.3))},
        "`lr_schedule` was SequentialLR, .*, now SequentialLR, .*$",
    ),
    (
        {"optimizer": OptimizerSettings(lr_schedule=lambda o, _: lr_scheduler.LambdaLR(o, lambda step: 0.5**step))},
        "`lr_schedule` was SequentialLR, 0.0005 at first, hash .{8}, now LambdaLR, 0.05 at first, hash .{8}$",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), OTHER_MASKS)
def test_resume_with_other_schedules_says_what_differs(arguments, message, data, tmp_path):
    train(Nested, data, checkpoint=tmp_path / "fit.pt")
    with pytest.raises(ValueError, match=f"is of another fit: {message}"):
        train(Nested, data, checkpoint=tmp_path / "fit.pt", resume=True, **arguments)


def test_laws_of_a_schedule_are_told_apart(data, tmp_path):
    laws = [MaskSchedule(law=OrderedMask.geometric(rate, 4)) for rate in (0.5, 0.6)]
    train(Nested, data, checkpoint=tmp_path / "fit.pt", schedule=laws[0])
    train(Nested, data, checkpoint=tmp_path / "fit.pt", schedule=laws[0], resume=True)
    with pytest.raises(ValueError, match=r"`schedule` was MaskSchedule.*, now MaskSchedule"):
        train(Nested, data, checkpoint=tmp_path / "fit.pt", schedule=laws[1], resume=True)


def test_learning_rates_are_told_apart_by_their_values(data, tmp_path):
    """Also where they are made by functions, which have no values of their own."""

    def falling(rate):
        return settings(lr_schedule=lambda optimizer, _: lr_scheduler.LambdaLR(optimizer, lambda step: rate**step))

    path = tmp_path / "fit.pt"
    _, first = train(Regression, data, checkpoint=path, optimizer=falling(0.9))
    _, again = train(Regression, data, checkpoint=path, resume=True, optimizer=falling(0.9))
    assert first == again
    with pytest.raises(ValueError, match=r"`lr_schedule` was LambdaLR, 0.05 at first, hash .{8}, now LambdaLR"):
        train(Regression, data, checkpoint=path, resume=True, optimizer=falling(0.8))


def test_resume_with_other_data_or_parameters_says_what_differs(data, tmp_path, monkeypatch):
    path = tmp_path / "fit.pt"
    train(Regression, data, checkpoint=path)
    x, y = data
    message = r"`data\[0\]` was torch.float64 of shape \(40, 3\), hash .{8}, now torch.float64 of shape \(30, 3\), hash"
    with pytest.raises(ValueError, match=message):
        train(Regression, (x[:30], y[:30]), checkpoint=path, resume=True)
    for other in (
        y + 1,
        y.clone().index_fill(0, torch.tensor([39]), 0.0),
        y.clone().index_fill(0, torch.tensor([7]), 9),
    ):
        with pytest.raises(ValueError, match=r"another fit: `data\[1\]` was .*, hash (.{8}), now .*, hash (?!\1).{8}$"):
            train(Regression, (x, other), checkpoint=path, resume=True)
    monkeypatch.setitem(OPTIONS, Wider, OPTIONS[Regression])
    with pytest.raises(
        ValueError, match=r"parameter `model.net.0.bias` was torch.float64 of shape \(6,\), now absent$"
    ):
        train(Wider, data, checkpoint=path, resume=True)


def test_the_form_of_the_data_is_in_the_file(data, tmp_path):
    x, y = data
    path = tmp_path / "fit.pt"
    expected, _ = train(Regression, {"x": x, "y": y})
    train(Regression, {"x": x, "y": y}, stop_at=1 + 2 * 4 + 2, checkpoint=path)
    state, result = train(Regression, {"y": y, "x": x}, checkpoint=path, resume=True)
    assert len(result.elbo) == 6
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    message = r"`data\['y'\]` was .*, now absent; .*`data\[0\]` was absent, now .* of shape \(40, 3\)"
    with pytest.raises(ValueError, match=message):
        train(Regression, (x, y), checkpoint=path, resume=True)


def broken(path):
    """Ways in which a file is no checkpoint, made of a good one."""
    good = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        entry = next(each for each in archive.infolist() if each.filename.endswith("/data/0"))
        start = good.index(archive.read(entry), entry.header_offset)
    flipped = bytearray(good)
    flipped[start + 2] ^= 0x80
    yield from (b"", b"hello world" * 50, good[:10], good[: len(good) // 2], good[:-1], bytes(flipped))
    state = torch.load(path, weights_only=True)
    for other in (
        {"a": 1},
        [1],
        nn.Linear(2, 2),
        {name: value for name, value in state.items() if name != "optimizer"},
        state | {"result": {"elbo": []}},
    ):
        torch.save(other, path)
        yield path.read_bytes()


def test_what_is_no_checkpoint_is_refused_and_kept(data, tmp_path):
    path = tmp_path / "fit.pt"
    train(Regression, data, checkpoint=path)
    for content in [*broken(path)]:
        path.write_bytes(content)
        model = Regression()
        before = {name: value.clone() for name, value in model.named_parameters()}
        with pytest.raises(ValueError, match=r"fit: '.*fit.pt' is no checkpoint of fit, or a damaged one") as caught:
            fit(model, model.guide, data, **ARGUMENTS, **OPTIONS[Regression], checkpoint=path, resume=True)
        assert "weights_only" not in "".join(traceback.format_exception(caught.value)).partition("Error:")[2]
        assert caught.value.__cause__ is None
        assert caught.value.__suppress_context__ or caught.value.__context__ is None
        assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
        assert path.read_bytes() == content


def test_a_folder_is_no_file(data, tmp_path):
    with pytest.raises(ValueError, match=r"`checkpoint` is .*, a folder; give the path of a file in it"):
        train(Regression, data, checkpoint=tmp_path)


class Extra(nn.Module):
    """A module with a state of its own, of a number of numpy's."""

    def get_extra_state(self):
        return {"made": np.float64(1.0), "seen": [np.int64(3)]}

    def set_extra_state(self, state):
        assert state == {"made": 1.0, "seen": [3]}


class WithExtra(Regression):
    def __init__(self, stop_at=None):
        super().__init__(stop_at)
        self.extra = Extra()


NUMPY = {
    "num_epochs": np.int64(6),
    "batch_size": np.int64(10),
    "lr": np.logspace(-3, -1, 3)[1],
}


def test_numbers_of_numpy_are_read_again(data, tmp_path, monkeypatch):
    monkeypatch.setitem(OPTIONS, WithExtra, {})
    path = tmp_path / "fit.pt"
    how = NUMPY | {"weights": KLWeights(np.float64(0.5)), "callbacks": [Counting()], "checkpoint": path}
    how["optimizer"] = OptimizerSettings(
        partial(torch.optim.SGD, momentum=np.float64(0.5)),
        lr_schedule=lambda o, n: lr_scheduler.StepLR(o, 3, gamma=np.float64(0.5)),
        clip_norm=np.float32(1),
    )
    expected, whole = train(WithExtra, data, **how)
    path.unlink()
    train(WithExtra, data, **how, stop_at=12)
    state, result = train(WithExtra, data, **how, resume=True)
    assert history(result) == history(whole)
    assert all(torch.equal(state[name], expected[name]) for name in expected if "extra" not in name)


class Warm:
    """A rate as an object, which torch's `LambdaLR` keeps the attributes of."""

    def __init__(self):
        self.table = np.linspace(0, 1, 5)

    def __call__(self, step):
        return 1.0


def test_what_could_not_be_read_again_is_not_written(data, tmp_path):
    message = r"`checkpoint` cannot hold lr_schedule\['lr_lambdas'\]\[0\]\['table'\], of type numpy.ndarray, which wo"
    with pytest.raises(ValueError, match=message):
        train(
            Regression,
            data,
            checkpoint=tmp_path / "fit.pt",
            optimizer=OptimizerSettings(lr_schedule=lambda optimizer, _: lr_scheduler.LambdaLR(optimizer, Warm())),
        )
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("stop_at", [None, 11])
def test_extended_without_schedules_is_as_if_it_had_been_as_long(stop_at, data, tmp_path):
    path, constant = tmp_path / "fit.pt", {"weights": KLWeights(0.5)}
    expected, whole = train(Regression, data, **constant)
    train(Regression, data, num_epochs=3, checkpoint=path, stop_at=stop_at, **constant)
    state, result = train(Regression, data, checkpoint=path, resume="extend", **constant)
    assert history(result) == history(whole)
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    # It is a checkpoint of the longer fit now, with which "extend" is no more than True.
    for resume in (True, "extend"):
        assert train(Regression, data, checkpoint=path, resume=resume, **constant)[1] == result
    with pytest.raises(ValueError, match=r"`num_epochs` was 6, now 3$"):
        train(Regression, data, num_epochs=3, checkpoint=path, resume="extend", **constant)
    with pytest.raises(ValueError, match=r"`lr` was 0.05, now 0.1$"):
        train(Regression, data, num_epochs=9, lr=0.1, checkpoint=path, resume="extend", **constant)


@pytest.mark.parametrize(
    "lr_schedule", [cosine_to_zero(0.2), lambda o, n: lr_scheduler.OneCycleLR(o, 0.1, total_steps=n + 1)]
)
def test_extended_schedules_are_those_of_the_longer_fit(lr_schedule, data, tmp_path):
    seen = []

    class Recorded(torch.optim.SGD):
        def step(self, closure=None):
            seen.append((self.param_groups[0]["lr"], self.param_groups[0]["momentum"]))
            return super().step(closure)

    optimizer = settings(partial(Recorded, momentum=0.5), lr_schedule=lr_schedule)
    how = {"optimizer": optimizer, "checkpoint": tmp_path / "fit.pt"}
    train(Regression, data, **how)
    whole = [*seen]
    seen.clear()
    train(Regression, data, num_epochs=3, **how)
    seen.clear()
    _, result = train(Regression, data, resume="extend", **how)
    assert (len(whole), len(seen), len(result.elbo)) == (24, 12, 6)
    assert seen == [pytest.approx(each) for each in whole[12:]]


def test_weights_of_an_extended_fit_go_on_from_where_the_longer_schedule_stands(data, tmp_path):
    seen = []

    def rising(t):
        seen.append(t)
        return t

    path = tmp_path / "fit.pt"
    train(Regression, data, num_epochs=3, weights=KLWeights(rising), checkpoint=path)
    _, result = train(Regression, data, weights=KLWeights(rising), checkpoint=path, resume="extend")
    weighted = [kl / latents for kl, latents in zip(result.kl, result.kl_latents, strict=True)]
    # Means of t over the four steps of an epoch, first of twelve, then of twenty-four.
    assert weighted[:3] == pytest.approx([1.5 / 11, 5.5 / 11, 9.5 / 11], abs=0.05)
    assert weighted[3:] == pytest.approx([13.5 / 23, 17.5 / 23, 21.5 / 23], abs=0.05)
