"""Where a fit runs."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pyro_vnd.autoencoders import OrderedVAE, mlp_bodies
from pyro_vnd.distributions import OrderedMask
from pyro_vnd.infer import AutoNested, MaskSchedule, fit
from pyro_vnd.infer._fit.parallel import local_device
from pyro_vnd.nn import NestedClassifier, nest


class Regression(PyroModule):
    """Regression on ordered inputs; its tensors are where the data are."""

    def forward(self, x, y):
        zeros = x.new_zeros(4)
        mask = pyro.sample("mask", OrderedMask(logits=zeros))
        w = pyro.sample("w", dist.Normal(zeros, 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ (w * mask), 0.5), obs=y)


def net():
    torch.manual_seed(0)
    return NestedClassifier(nest(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), torch.zeros(1, 4)))


def autoencoder():
    torch.manual_seed(0)
    return OrderedVAE((4,), 4, bodies=mlp_bodies((4,), hidden=(8,)))


def data(kind):
    x = torch.rand(60, 4, generator=torch.Generator().manual_seed(0))
    return {"net": (x, (3 * x[:, 0]).long()), "autoencoder": x, "regression": (x, x[:, 0])}[kind]


def made(kind):
    model = {"net": net, "autoencoder": autoencoder, "regression": Regression}[kind]()
    return model, AutoNested(model) if kind == "regression" else model.guide


KINDS = ["net", "autoencoder", "regression"]
ARGUMENTS = {"num_epochs": 2, "batch_size": 20, "progress": False}


@pytest.mark.parametrize("kind", KINDS)
def test_on_the_cpu_that_is_named_as_on_the_one_that_is_not(kind):
    states = []
    for device in (None, "cpu", torch.device("cpu")):
        model, guide = made(kind)
        fit(model, guide, data(kind), device=device, **ARGUMENTS)
        states.append(model.state_dict() | guide.state_dict())
    for state in states[1:]:
        assert all(torch.equal(x, state[name]) for name, x in states[0].items())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_there_is_not_is_said_to_be_missing():
    model, guide = made("net")
    with pytest.raises(
        ValueError, match=r"fit: argument `device` must be a device that torch has here; got 'cuda': .+"
    ):
        fit(model, guide, data("net"), device="cuda", **ARGUMENTS)
    with pytest.raises(ValueError, match="got 'gpu'"):
        fit(model, guide, data("net"), device="gpu", **ARGUMENTS)


def test_a_device_with_a_number_stays_what_it_is(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert local_device(torch.device("cuda:0")) == torch.device("cuda:0")
    assert local_device(torch.device("cpu")) == torch.device("cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_model_guide_and_batches_are_moved(kind, precision):
    torch.set_default_dtype(torch.float32)
    model, guide = made(kind)
    result = fit(model, guide, data(kind), device="cuda", precision=precision, validation=data(kind), **ARGUMENTS)
    tensors = [*model.state_dict().values(), *guide.state_dict().values()]
    assert {x.device.type for x in tensors} == {"cuda"}
    assert {x.dtype for x in tensors} <= {torch.float32, torch.int64, torch.bool}
    assert len(result.validation_log_likelihood) == 2


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["net", "regression"])
def test_a_pinned_loader_is_what_tensors_are(kind):
    ends = []
    for loader in (False, True):
        model, guide = made(kind)
        parts = TensorDataset(*data(kind))
        rows = DataLoader(parts, 60, pin_memory=True) if loader else data(kind)
        fit(model, guide, rows, num_epochs=2, device="cuda", progress=False)
        ends.append(guide.state_dict())
    for name, x in ends[0].items():
        torch.testing.assert_close(x, ends[1][name])


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_a_checkpoint_goes_on_there_and_elsewhere(device, tmp_path):
    class Cut(NestedClassifier):
        calls = 0

        def forward(self, *args, **kwargs):
            self.calls += 1
            if self.calls > 5:
                raise KeyboardInterrupt
            return super().forward(*args, **kwargs)

    whole, cut = net(), Cut(net().net)
    arguments = ARGUMENTS | {"schedule": MaskSchedule()}
    fit(whole, whole.guide, data("net"), device="cuda", **arguments)
    arguments["checkpoint"] = tmp_path / "fit.pt"
    with pytest.raises(KeyboardInterrupt):
        fit(cut, cut.guide, data("net"), device="cuda", **arguments)
    on = net()
    fit(on, on.guide, data("net"), device=device, resume=True, **arguments)
    if device == "cuda":
        assert all(torch.equal(x, on.state_dict()[name]) for name, x in whole.state_dict().items())
    else:
        assert {x.device.type for x in on.state_dict().values()} == {"cpu"}
