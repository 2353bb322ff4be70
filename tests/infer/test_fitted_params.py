"""What `fit` has trained keeps its own values, however and after whatever it is called."""

import copy
import pickle
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceEnum_ELBO
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal
from pyro.nn import PyroModule, PyroParam
from torch import nn

from pyro_vnd.autoencoders import OrderedVAE, OrderedVQVAE, OrderedWAE, mlp_bodies
from pyro_vnd.diagnostics import to_arviz
from pyro_vnd.distributions import OrderedMask
from pyro_vnd.infer import AutoNested, KLWeights, NestedELBO, fit, module_local_params
from pyro_vnd.nn import NestedClassifier, nest

QUICK = {"num_epochs": 25, "lr": 0.1, "progress": False}
X = torch.randn(40, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = X[:, 0] - X[:, 1]


@pytest.fixture(autouse=True)
def _clean_store():
    pyro.clear_param_store()
    yield
    assert len(pyro.get_param_store()) == 0


def masked(x, y=None):
    mask = pyro.sample("mask", OrderedMask.uniform(3))
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal((x * mask * w).sum(-1), 0.5), obs=y)


def plain(x, y=None):
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal((x * w).sum(-1), 0.5), obs=y)


class HandWritten(PyroModule):
    def __init__(self):
        super().__init__()
        self.loc, self.scale = nn.Parameter(torch.zeros(3)), PyroParam(torch.ones(3), dist.constraints.positive)

    def forward(self, x, y=None):
        pyro.sample("w", dist.Normal(self.loc, self.scale).to_event(1))


class HasNet(PyroModule):
    """A guide whose parameters are those of a plain net."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(1, 3)

    def forward(self, x, y=None):
        pyro.sample("w", dist.Normal(self.net(torch.ones(1)), 0.1).to_event(1))


GUIDES = {
    "AutoNested": (masked, partial(AutoNested, masked)),
    "mean field": (masked, partial(AutoNested, masked, latents="mean_field")),
    "AutoNormal": (plain, partial(AutoNormal, plain)),
    "AutoMultivariateNormal": (plain, partial(AutoMultivariateNormal, plain)),
    "AutoDelta": (plain, partial(AutoDelta, plain)),
    "hand-written": (plain, HandWritten),
    "net": (plain, HasNet),
}


def fit_pair(model, make):
    guides = make(), make()
    for guide, y in zip(guides, (Y, -Y), strict=True):
        fit(model, guide, (X, y), **QUICK)
    return guides


def values(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def same(module, before):
    return all(torch.equal(p, before[name]) for name, p in module.named_parameters())


@pytest.mark.parametrize(("model", "make"), GUIDES.values(), ids=GUIDES)
def test_two_guides_of_one_name_keep_apart(model, make):
    first, second = fit_pair(model, make)
    before = values(first), values(second)
    slopes = [Predictive(model, guide=guide, num_samples=200)(X)["w"].mean((0, -2)) for guide in (first, second)]
    assert slopes[0].flatten()[0] > 0.5
    assert slopes[1].flatten()[0] < -0.5
    for guide in (second, first):
        torch.manual_seed(0)
        drawn = guide(X, Y)
        with module_local_params(guide):
            torch.manual_seed(0)
            again = guide(X, Y)
        assert drawn is again is None or torch.equal(drawn["w"], again["w"])
    assert same(first, before[0])
    assert same(second, before[1])


@pytest.mark.parametrize(("model", "make"), GUIDES.values(), ids=GUIDES)
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda guide: pickle.loads(pickle.dumps(guide))])
def test_copies_keep_apart(model, make, duplicate):
    first, second = fit_pair(model, make)
    first(X, Y)
    copied, before = duplicate(second), values(second)
    copied(X, Y)
    assert same(copied, before)
    with torch.no_grad():
        for p in copied.parameters():
            p.add_(1.0)
    second(X, Y)
    assert same(second, before)


def test_what_a_guide_tells_of_itself_is_its_own():
    first, second = fit_pair(*GUIDES["AutoNested"])
    expected = [(g.median(X)["w"], g.quantiles([0.1])["w"], g.laws["mask"].logits) for g in (first, second)]
    for guide in (first, second):
        Predictive(masked, guide=guide, num_samples=2)(X)
        to_arviz(masked, guide, (X, Y), num_samples=2)
    found = [(g.median(X)["w"], g.quantiles([0.1])["w"], g.laws["mask"].logits) for g in (first, second)]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert found[0][0][0] > 0.5 > -0.5 > found[1][0][0]


MEAN_FIELD = {name: guide for name, guide in GUIDES.items() if name != "AutoNested"}


@pytest.mark.parametrize(("model", "make"), MEAN_FIELD.values(), ids=MEAN_FIELD)
def test_svi_goes_on_with_the_guide_it_is_given(model, make):
    first, second = fit_pair(model, make)
    before, kept = values(first), values(second)
    svi = SVI(model, first, pyro.optim.Adam({"lr": 0.1}), NestedELBO())
    losses = [svi.step(X, -Y) for _ in range(40)]
    assert sum(losses[-5:]) < sum(losses[:5]) - 100  # nats
    assert not same(first, before)
    second(X, -Y)
    assert same(second, kept)


def test_guides_that_fit_never_had_are_as_in_pyro():
    fitted, _ = fit_pair(*GUIDES["AutoNormal"])
    kept = values(fitted)
    svi = SVI(plain, AutoNormal(plain), pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    for _ in range(3):
        svi.step(X, Y)
    fitted(X)  # in between
    names = set(pyro.get_param_store().keys())
    assert names == {"AutoNormal.locs.w", "AutoNormal.scales.w"}
    other = AutoNormal(plain)
    other(X)  # as Pyro has it: by name
    assert torch.equal(other.locs.w, pyro.param("AutoNormal.locs.w"))
    assert same(fitted, kept)
    pyro.clear_param_store()


def test_an_error_in_a_guide_gives_the_store_back():
    class Fails(HandWritten):
        fails = False

        def forward(self, x, y=None):
            if self.fails:
                raise KeyError("mine")
            super().forward(x, y)

    guide = Fails()
    fit(plain, guide, (X, Y), **QUICK)
    pyro.param("mine", torch.tensor(1.0))
    guide.fails = True
    with pytest.raises(KeyError):
        guide(X)
    assert list(pyro.get_param_store()) == ["mine"]
    pyro.clear_param_store()


def make_net():
    return nest(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)), X[:1], num_blocks=4)


def test_two_nets_keep_apart():
    nets, labels = (make_net(), make_net()), (Y > 0).long()
    for net, target in zip(nets, (labels, 1 - labels), strict=True):
        fit(NestedClassifier(net), net.guide, (X, target), weights=KLWeights(latents=0.01), **QUICK)
    before = [values(net) for net in nets]
    for net, target in zip(nets, (labels, 1 - labels), strict=True):
        drawn = Predictive(NestedClassifier(net), guide=net.guide, num_samples=50)(X)["label"]
        assert (drawn == target).float().mean() > 0.8
        assert same(net, before[nets.index(net)])
        copied = copy.deepcopy(net)
        copied(X)
        assert same(copied, before[nets.index(net)])


def autoencoder(kind, **arguments):
    return kind((3,), bodies=mlp_bodies((3,), hidden=(8,)), **arguments)


AUTOENCODERS = {
    "VAE": partial(autoencoder, OrderedVAE, num_latents=2),
    "enumerated": partial(autoencoder, OrderedVAE, num_latents=2, enumerate_lengths=True),
    "autoregressive": partial(autoencoder, OrderedVAE, num_latents=2, prior_latents="autoregressive"),
    "VQ-VAE": partial(autoencoder, OrderedVQVAE, num_tokens=2),
    "WAE": partial(autoencoder, OrderedWAE, num_latents=2),
}


@pytest.mark.parametrize("make", AUTOENCODERS.values(), ids=AUTOENCODERS)
def test_two_autoencoders_keep_apart(make):
    models = make(), make()
    enumerated = getattr(models[0], "enumerate_lengths", False)
    elbo = TraceEnum_ELBO(max_plate_nesting=1) if enumerated else None
    for model, x in zip(models, (X, -X), strict=True):
        fit(model, model.guide, x, num_epochs=3, elbo=elbo, progress=False)
    before = [(values(model), model.reconstruct(X)) for model in models]
    for model in models:
        Predictive(model, guide=model.guide, num_samples=2)(X)
    for model, (kept, images) in zip(models, before, strict=True):
        assert same(model, kept)
        assert torch.equal(model.reconstruct(X), images)
