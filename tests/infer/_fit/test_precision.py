"""Nets compute in bfloat16, all else in float32."""

import math
import statistics

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule
from pyro.poutine.messenger import Messenger
from torch import nn

from pyro_vnd.autoencoders import OrderedVAE, OrderedVQVAE, mlp_bodies
from pyro_vnd.distributions import NestedNormal, OrderedMask
from pyro_vnd.infer import AutoNested, MaskSchedule, NestedELBO, PriceSchedule, fit
from pyro_vnd.infer._fit.precision import computing_in
from pyro_vnd.nn import NestedClassifier, nest

HALF = torch.bfloat16


@pytest.fixture(autouse=True)
def single_precision(double_precision):
    torch.set_default_dtype(torch.float32)


class Dtypes(Messenger):
    """The dtypes of values and log-probabilities of sites, and of what nets of some kinds put out."""

    def __init__(self):
        super().__init__()
        self.sites = {}

    def _pyro_post_sample(self, msg):
        law = msg["fn"]
        found = {value.dtype for value in vars(law).values() if isinstance(value, torch.Tensor)}
        if isinstance(law, dist.TorchDistribution) and isinstance(msg["value"], torch.Tensor):
            found |= {law.log_prob(msg["value"]).dtype, msg["value"].dtype}
            self.sites.setdefault(msg["name"], set()).update(found)


class Latents(PyroModule):
    """Codes of rows, and a decoder."""

    def __init__(self):
        super().__init__()
        self.decoder = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 16))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", NestedNormal(torch.zeros(4), torch.ones(4), probs=torch.ones(4)))
            pyro.sample("x", dist.Normal(self.decoder(z), 0.3).to_event(1), obs=x)


def perceptron():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 4))
    return NestedClassifier(nest(net, torch.zeros(1, 16), num_blocks=8))


def convolutions():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 4)
    )  # fmt: skip
    return NestedClassifier(nest(nn.Sequential(nn.Unflatten(1, (1, 4, 4)), net), torch.zeros(2, 16), num_blocks=4))


def rows(num_rows=400):
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(num_rows, 16, generator=generator)
    return x, (x.reshape(num_rows, 4, 4).sum(-1) + 0.3 * torch.randn(num_rows, 4, generator=generator)).argmax(-1)


def autoencoder(kind=OrderedVAE, **options):
    torch.manual_seed(0)
    return kind((16,), 4, bodies=mlp_bodies((16,), hidden=(32,)), **options)


CASES = {
    "perceptron": (perceptron, {}),
    "local reparametrisation": (perceptron, {"elbo": NestedELBO(local_reparam=True)}),
    "sliced": (perceptron, {"schedule": MaskSchedule(0, 0.9, 0.1, num_particles=2, sliced=True)}),
    "masks by row": (perceptron, {"schedule": MaskSchedule()}),
    "convolutions": (convolutions, {}),
    "autoencoder": (autoencoder, {"schedule": MaskSchedule()}),
    "completion": (lambda: autoencoder(tail="completion"), {"schedule": MaskSchedule()}),
    "priced": (lambda: autoencoder(posterior_lengths="priced"), {"schedule": PriceSchedule()}),
    "tokens": (lambda: autoencoder(OrderedVQVAE), {}),
    "a guide that knows the lengths": (Latents, {}),
}


def guide_of(model):
    if not isinstance(model, Latents):
        return model.guide
    encoder = nn.Sequential(nn.Linear(16, 32), nn.Tanh())
    return AutoNested(model, amortise=encoder)


@pytest.mark.parametrize("name", CASES)
def test_laws_and_gradients_are_in_single_precision_and_nets_are_not(name):
    make, arguments = CASES[name]
    model, dtypes, products = make(), Dtypes(), set()
    guide = guide_of(model)
    linear = nn.functional.linear
    data = rows() if isinstance(model, NestedClassifier) else rows()[0]

    class Watched(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            found = function(*args, **kwargs or {})
            if function in (linear, torch.conv2d, nn.functional.conv2d):
                products.add(found.dtype)
            return found

    with dtypes, Watched():
        fit(model, guide, data, num_epochs=2, batch_size=100, precision="bf16", progress=False, **arguments)
    assert HALF in products
    assert dtypes.sites
    for site, found in dtypes.sites.items():
        assert found <= {torch.float32, torch.int64, torch.bool}, site
    gradients = [p.grad for p in [*model.parameters(), *guide.parameters()] if p.grad is not None]
    assert {gradient.dtype for gradient in gradients} == {torch.float32}
    assert {x.dtype for x in model.state_dict().values()} <= {torch.float32, torch.int64, torch.bool}


@pytest.mark.parametrize(("make", "data"), [(perceptron, rows()), (autoencoder, rows()[0])], ids=["net", "autoencoder"])
def test_a_fit_ends_within_the_noise_of_single_precision(make, data):
    """Three seeds each: z of the difference of the means of the last ELBOs."""
    ends = {}
    for precision in ("32", "bf16"):
        model = [make() for _ in range(3)]
        fits = [
            fit(m, m.guide, data, num_epochs=15, batch_size=100, seed=i, precision=precision, progress=False)
            for i, m in enumerate(model)
        ]
        ends[precision] = [statistics.mean(each.elbo[-3:]) for each in fits]
    spread = math.sqrt(sum(statistics.variance(each) for each in ends.values()) / 3)
    difference = statistics.mean(ends["bf16"]) - statistics.mean(ends["32"])
    gained = statistics.mean(ends["32"]) - statistics.mean(each.elbo[0] for each in fits)
    assert abs(difference) < 4 * spread + 0.002 * gained
    assert spread < 0.1 * gained


def test_nets_are_put_back_also_after_an_error():
    model = perceptron()
    with computing_in("bf16", [model, model.guide]):
        assert model.net(torch.zeros(2, 16)).dtype == torch.float32
        with pytest.raises(ValueError, match="like the example"):
            model.net(torch.zeros(2, 15))
        assert not torch.is_autocast_enabled("cpu")
    assert all(not part._forward_hooks and not part._forward_pre_hooks for part in model.modules())


def test_a_program_that_is_a_plain_module_is_no_net_but_its_parts_are():
    class Program(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(2, 1)
            self.seen = []

        def forward(self, x, y):
            self.seen.append(torch.is_autocast_enabled("cpu"))
            with pyro.plate("data", len(x)):
                pyro.sample("y", dist.Normal(self.net(x)[:, 0], 1.0), obs=y)

    model = Program()
    model.net.register_forward_hook(lambda *_: model.seen.append(torch.is_autocast_enabled("cpu")))
    x = torch.randn(10, 2)
    fit(model, lambda *_: None, (x, x[:, 0]), num_epochs=1, precision="bf16", progress=False)
    assert model.seen[-2:] == [False, True]


def test_all_that_a_net_returns_is_single():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, x):
            out = self.linear(x)
            return out, [out.argmax(-1), {"twice": 2 * out}], "as it is"

    class Program(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.act = Heads(), nn.ReLU()

    program, x = Program(), torch.randn(5, 3)
    exact = program.net(x)[0]
    with computing_in("bf16", [program]):
        assert not program.act._forward_hooks  # it has no parameters
        out, (index, named), text = program.net(x)
    assert [out.dtype, index.dtype, named["twice"].dtype, text] == [
        torch.float32,
        torch.int64,
        torch.float32,
        "as it is",
    ]
    assert torch.equal(out, out.to(HALF).float())
    assert torch.equal(named["twice"], 2 * out)
    torch.testing.assert_close(out, exact, rtol=0.02, atol=0.02)


def test_a_law_of_a_prior_is_not_touched():
    law = OrderedMask.uniform(4)
    with computing_in("bf16", [law]):
        assert law.log_prob(law.sample()).dtype == torch.float32
