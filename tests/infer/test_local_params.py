"""Parameters of modules, and plain nets that our own modules look up without messages while a fit runs."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import nn

from pyro_vnd._compat import QuietModule, quiet_lookups
from pyro_vnd.autoencoders import OrderedVAE, OrderedVQVAE
from pyro_vnd.infer import fit, module_local_params
from pyro_vnd.nn import NestedClassifier, nest


class Regression(QuietModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
        self.shift = nn.Parameter(torch.zeros(()))
        self.scale = PyroParam(torch.tensor(1.0), dist.constraints.positive)
        self.slope = PyroSample(dist.Normal(0.0, 1.0))
        self.part = PyroModule[nn.Linear](1, 1)

    def forward(self, x: torch.Tensor) -> None:
        mean = self.part(self.slope * self.net(x))[:, 0] + self.shift
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, self.scale), obs=torch.ones(len(x)))


class Nothing(PyroModule):
    def forward(self, x: torch.Tensor) -> None:
        pyro.sample("slope", dist.Normal(0.0, 1.0))


def announced(model: PyroModule, *args: torch.Tensor) -> set[str]:
    with poutine.trace(param_only=True) as trace:
        model(*args)
    return set(trace.trace.nodes)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(8, 2)


def test_parameters_of_plain_nets_are_not_announced_in_the_block_and_are_after_it(x):
    model = Regression()
    others = {"shift", "scale", "part.weight", "part.bias"}
    names = {f"net$$${layer}.{name}" for layer in (0, 2) for name in ("weight", "bias")} | others
    with module_local_params(model):
        assert announced(model, x) == names
        with quiet_lookups():
            assert announced(model, x) == others
        assert announced(model, x) == names
        with pytest.raises(RuntimeError, match="stop"), quiet_lookups():
            raise RuntimeError("stop")
        assert announced(model, x) == names


def test_a_module_made_without_the_setting_gets_a_store_of_its_own():
    """Pyro gives one to modules that are made under the setting, of the same form."""
    early = Nothing()
    with pyro.settings.context(module_local_params=True):
        late = Nothing()
    assert not hasattr(early._pyro_context, "param_state")
    with module_local_params(early, late, None):
        assert early._pyro_context.param_state == late._pyro_context.param_state
        assert early._pyro_context.param_state is not late._pyro_context.param_state


def test_values_are_the_same_in_the_block(x):
    model, scores = Regression(), []
    for _ in range(2):
        torch.manual_seed(0)
        trace = poutine.trace(model).get_trace(x)
        scores.append(trace.log_prob_sum())
        assert "slope" in trace.nodes
        with quiet_lookups():
            torch.manual_seed(0)
            scores.append(poutine.trace(model).get_trace(x).log_prob_sum())
    assert len({score.item() for score in scores}) == 1


def test_a_net_that_is_replaced_in_the_block_stays_replaced():
    model, other = Regression(), nn.Linear(2, 1)
    with quiet_lookups():
        model.net = other
        assert model.net is other
    assert model.net is other
    assert dict(model.named_children())["net"] is other
    with quiet_lookups():
        del model.net
        with pytest.raises(AttributeError, match="net"):
            _ = model.net
        model.net = "no net"
    assert model.net == "no net"


def test_after_a_fit_svi_finds_the_parameters(x):
    pyro.clear_param_store()
    torch.manual_seed(0)
    model, guide = Regression(), Nothing()
    fit(model, guide, x, num_epochs=3, progress=False)
    before = model.net[0].weight.detach().clone()
    SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO()).step(x)
    assert (model.net[0].weight != before).any()
    pyro.clear_param_store()


def classifier() -> tuple[PyroModule, tuple[torch.Tensor, ...]]:
    net = nest(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), torch.zeros(1, 4), num_blocks=4)
    return NestedClassifier(net), (torch.randn(6, 4), torch.arange(6) % 3)


MODELS = {
    "classifier": classifier,
    "vae": lambda: (OrderedVAE((4,), num_latents=3), (torch.rand(6, 4),)),
    "vqvae": lambda: (OrderedVQVAE((4,), num_tokens=4), (torch.rand(6, 4),)),
}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_the_models_of_the_library_keep_quiet(make):
    model, data = make()
    guide = model.net.guide if isinstance(model, NestedClassifier) else model.guide
    for module in (model, guide):
        with module_local_params(model, guide):
            aloud = announced(module, *data)
            with quiet_lookups():
                quiet = announced(module, *data)
        assert quiet < aloud
        assert not any("$$$" in name for name in quiet)
