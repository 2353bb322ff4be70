"""Nets that are looked up without messages, and only while a fit goes on."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.nn import PyroModule
from torch import nn

from pyro_vnd.infer import fit, module_local_params
from pyro_vnd.infer.guides import quiet_nets


class Regression(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))

    def forward(self, x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(self.net(x)[:, 0], 1.0), obs=torch.ones(len(x)))


class Nothing(PyroModule):
    def forward(self, x: torch.Tensor) -> None:
        pass


def announced(model: Regression) -> set[str]:
    with poutine.trace(param_only=True) as trace:
        model(torch.zeros(4, 2))
    return set(trace.trace.nodes)


def test_parameters_of_plain_nets_are_not_announced_in_the_block_and_are_after_it():
    model = Regression()
    names = {f"net$$${layer}.{name}" for layer in (0, 2) for name in ("weight", "bias")}
    with module_local_params(model):
        assert announced(model) == names
        with quiet_nets(model, None):
            assert announced(model) == set()
            assert list(model.state_dict()) == list(Regression().state_dict())
        assert announced(model) == names
        with pytest.raises(RuntimeError, match="stop"), quiet_nets(model):
            raise RuntimeError("stop")
        assert announced(model) == names
    assert "net" not in model.__dict__


def test_a_net_that_is_replaced_in_the_block_stays_replaced():
    model, other = Regression(), nn.Linear(2, 1)
    with quiet_nets(model):
        model.net = other
        assert model.net is other
    assert model.net is other
    assert dict(model.named_children())["net"] is other
    with quiet_nets(model):
        del model.net
        model.net = "no net"
    assert model.net == "no net"


def test_after_a_fit_svi_finds_the_parameters():
    pyro.clear_param_store()
    torch.manual_seed(0)
    model, guide, x = Regression(), Nothing(), torch.randn(8, 2)
    fit(model, guide, x, num_epochs=3, progress=False)
    before = model.net[0].weight.detach().clone()
    SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO()).step(x)
    assert (model.net[0].weight != before).any()
    pyro.clear_param_store()
