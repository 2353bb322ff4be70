"""A fit that was interrupted goes on as if it had not been, to the last bit."""

import os
from functools import cached_property

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule
from torch import nn

from pyro_vnd.infer import FitResult, MaskSchedule, cosine_to_zero, fit, linear
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


ARGUMENTS = {"num_epochs": 6, "batch_size": 10, "lr": 0.05, "progress": False}
OPTIONS = {
    Regression: {"kl_weight": linear(0.0, 1.0), "optimizer": torch.optim.SGD, "clip_norm": 1.0},
    Nested: {"schedule": MaskSchedule(), "temperature": linear(1.0, 0.2), "lr_schedule": cosine_to_zero(0.2)},
}
OPTIONS[NestedBatch] = {"schedule": MaskSchedule(0.2, 0.6, 0.2, sliced=True), "local_reparam": True}


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
    assert os.listdir(tmp_path) == ["fit.pt"]


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
        with pytest.raises(OSError, match="no space"):
            train(Regression, data, checkpoint=path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["fit.pt"]


class Wider(Regression):
    def __init__(self, stop_at=None):
        super().__init__(stop_at)
        self.net[0], self.net[1] = nn.Linear(3, 6, bias=False), nn.BatchNorm1d(6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_epochs": 7}, r"fit.pt' is of another fit: `num_epochs` was 6, now 7$"),
        ({"batch_size": 20}, "`batch_size` was 10, now 20$"),
        ({"optimizer": torch.optim.AdamW}, "`optimizer` was SGD, now AdamW$"),
        ({"lr_schedule": cosine_to_zero()}, "`lr_schedule` was given in one of the two only$"),
    ],
)
def test_resume_with_other_arguments_says_what_differs(arguments, message, data, tmp_path):
    train(Regression, data, checkpoint=tmp_path / "fit.pt")
    with pytest.raises(ValueError, match=message):
        train(Regression, data, checkpoint=tmp_path / "fit.pt", resume=True, **arguments)


def test_resume_with_other_data_or_parameters_says_what_differs(data, tmp_path, monkeypatch):
    path = tmp_path / "fit.pt"
    train(Regression, data, checkpoint=path)
    x, y = data
    with pytest.raises(ValueError, match=r"`data` was \[\(40, 3\), \(40,\)\], now \[\(30, 3\), \(30,\)\]$"):
        train(Regression, (x[:30], y[:30]), checkpoint=path, resume=True)
    monkeypatch.setitem(OPTIONS, Wider, OPTIONS[Regression])
    with pytest.raises(ValueError, match=r"parameter `model.net.0.bias` was \[6\], now absent$"):
        train(Wider, data, checkpoint=path, resume=True)


def test_the_form_of_the_data_is_in_the_file(data, tmp_path):
    x, y = data
    path = tmp_path / "fit.pt"
    expected, _ = train(Regression, {"x": x, "y": y})
    train(Regression, {"x": x, "y": y}, stop_at=1 + 2 * 4 + 2, checkpoint=path)
    state, result = train(Regression, {"y": y, "x": x}, checkpoint=path, resume=True)
    assert len(result.elbo) == 6
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    message = r"`data` was \{'y': \(40,\), 'x': \(40, 3\)\}, now \[\(40, 3\), \(40,\)\]$"
    with pytest.raises(ValueError, match=message):
        train(Regression, (x, y), checkpoint=path, resume=True)
