"""What a fit leaves alone: data, modules where a resume fails, and other threads."""

import threading

import pyro
import pyro.distributions as dist
import pytest
import torch
from masked_mean import normal_mean
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule
from torch import nn

from pyro_vnd.distributions import OrderedMask
from pyro_vnd.infer import Callback, Checkpoint, fit

QUICK = {"num_epochs": 2, "batch_size": 16, "progress": False}


class Normed(PyroModule):
    """A model with buffers that move in each evaluation."""

    def __init__(self, dtype=None):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(1, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)).to(dtype or torch.float64)

    def forward(self, y):
        return normal_mean(y - self.net(y.unsqueeze(-1)).squeeze(-1))


def test_data_that_want_a_gradient_get_none(y):
    y.requires_grad_()
    for data in (y, [(y[:20],), (y[20:],)]):
        arguments = QUICK if data is y else {"num_epochs": 2, "progress": False}
        fit(normal_mean, AutoNormal(normal_mean), data, **arguments)
        assert y.grad is None
        assert y.requires_grad


def damaged(path):
    path.write_bytes(path.read_bytes()[:-100])


def of_other_rows(path):
    state = torch.load(path, weights_only=True)
    state["arguments"]["batch_size"] = 3
    torch.save(state, path)


def of_another_optimiser(path):
    state = torch.load(path, weights_only=True)
    state["optimizer"] = {"state": {}, "param_groups": []}
    torch.save(state, path)


def of_fewer_modules(path):
    state = torch.load(path, weights_only=True)
    state["modules"].pop("model.net.2.bias")
    state["modules"]["model.net.0.bias"].add_(1)
    torch.save(state, path)


def not_finite(path):
    state = torch.load(path, weights_only=True)
    state["modules"]["model.net.0.bias"].fill_(torch.nan)
    torch.save(state, path)


@pytest.mark.parametrize("spoil", [damaged, of_other_rows, of_another_optimiser, of_fewer_modules, not_finite])
def test_a_resume_that_fails_leaves_the_modules_alone(spoil, y, tmp_path):
    path = tmp_path / "fit.pt"
    model = Normed()
    fit(model, AutoNormal(model), y, checkpoint=path, **QUICK)
    spoil(path)
    other = Normed()
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(ValueError, match=r"fit"):
        fit(other, AutoNormal(other), y, checkpoint=path, resume=True, **QUICK)
    assert [name for name, value in other.state_dict().items() if not torch.equal(value, before[name])] == []


def test_another_dtype_is_another_fit(y, tmp_path):
    path = tmp_path / "fit.pt"
    model = Normed()
    fit(model, AutoNormal(model), y, checkpoint=path, **QUICK)
    other = Normed(torch.float32)
    with torch.no_grad(), pytest.raises(ValueError, match=r"`data` was torch.float64 .*, now torch.float32"):
        fit(other, AutoNormal(other), y.float(), checkpoint=path, resume=True, **QUICK)


def test_a_fit_in_another_thread_is_refused_and_disturbs_nothing(y):
    expected = fit(normal_mean, AutoNormal(normal_mean), y, **QUICK).elbo
    errors = []

    def work():
        try:
            fit(normal_mean, AutoNormal(normal_mean), y, **QUICK)
        except RuntimeError as error:
            errors.append(str(error))

    class Meanwhile(Callback):
        def on_step(self, run):
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()

    assert fit(normal_mean, AutoNormal(normal_mean), y, callbacks=[Meanwhile()], **QUICK).elbo == expected
    assert len(errors) == 6
    assert all("another thread of this process is fitting" in error for error in errors)
    assert not pyro.settings.get("module_local_params")
    work()  # and now it is free
    assert len(errors) == 6


def test_a_fit_within_a_fit_is_a_fit(y):
    """In one thread, between steps: a metric may fit a probe."""
    expected = fit(normal_mean, AutoNormal(normal_mean), y, **QUICK).elbo
    inner = []

    class Probe(Callback):
        def on_epoch(self, run):
            inner.append(fit(normal_mean, AutoNormal(normal_mean), y, **QUICK).elbo)

    assert fit(normal_mean, AutoNormal(normal_mean), y, callbacks=[Probe()], **QUICK).elbo == expected
    assert inner == [expected, expected]


class Fits(PyroModule):
    """A model that fits another one in one of its calls, inside its plate or before it."""

    def __init__(self, at=0, in_plate=False):
        super().__init__()
        self.at, self.in_plate, self.calls, self.inner = at, in_plate, 0, []

    def look(self, y, in_plate):
        self.calls += not in_plate
        if self.calls == self.at and in_plate == self.in_plate:
            self.rows = y
            self.inner.append(fit(normal_mean, AutoNormal(normal_mean), y, **QUICK).elbo)

    def forward(self, y):
        self.look(y, False)
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            self.look(y, True)
            mask = pyro.sample("mask", OrderedMask.uniform(3), infer={"enumerate": "parallel"})
            pyro.sample("y", dist.Normal(mu + mask.sum(-1), 1.0), obs=y)


@pytest.mark.parametrize("in_plate", [False, True])
@pytest.mark.parametrize("at", [1, 2, 4, 7])
def test_a_fit_that_a_model_starts_is_as_if_it_were_alone(at, in_plate, y):
    """The masks of the outer one are summed out, in dimensions that Pyro counts for all programs together."""

    def train(model):
        guide = AutoNormal(poutine.block(model, hide=["mask"]))
        elbo = fit(model, guide, y, elbo=pyro.infer.TraceEnum_ELBO(max_plate_nesting=1), **QUICK).elbo
        return elbo, [parameter.detach() for parameter in guide.parameters()]

    elbo, parameters = train(Fits())
    model = Fits(at, in_plate)
    found, others = train(model)
    assert found == elbo
    assert all(map(torch.equal, others, parameters))
    (inner,) = model.inner
    assert inner == fit(normal_mean, AutoNormal(normal_mean), model.rows, **QUICK).elbo


@pytest.mark.parametrize(
    ("around", "where"), [(lambda: pyro.plate("rows", 5), "the plate 'rows'"), (poutine.trace, "poutine.trace")]
)
def test_a_fit_inside_a_plate_or_a_trace_is_refused(around, where, y):
    with around(), pytest.raises(ValueError, match=f"fit: called inside {where}, .*: call it outside"):
        fit(normal_mean, AutoNormal(normal_mean), y, **QUICK)


def test_a_fit_behind_a_block_is_in_no_trace(y):
    with poutine.trace() as trace, poutine.block():
        inside = fit(normal_mean, AutoNormal(normal_mean), y, **QUICK).elbo
    assert inside == fit(normal_mean, AutoNormal(normal_mean), y, **QUICK).elbo
    assert not trace.trace.nodes


def test_a_diverged_fit_keeps_its_last_good_state(y, tmp_path):
    """A step of a finite loss throws the parameters to infinity."""
    path = tmp_path / "fit.pt"

    class Spike(Callback):
        def on_step(self, run):
            if run.step == 8:
                with torch.no_grad():
                    next(run.guide.parameters()).fill_(torch.inf)

    guide = AutoNormal(normal_mean)
    arguments = QUICK | {"num_epochs": 4}
    with pytest.raises(ArithmeticError, match=r"after step 8 guide.* are not finite.*keeps the state before"):
        fit(normal_mean, guide, y, callbacks=[Spike(), Checkpoint(path, every_steps=2)], **arguments)
    again = Checkpoint(path, every_steps=2, resume=True)
    result = fit(normal_mean, AutoNormal(normal_mean), y, callbacks=[again], **arguments)
    assert result.elbo == fit(normal_mean, AutoNormal(normal_mean), y, **arguments).elbo
