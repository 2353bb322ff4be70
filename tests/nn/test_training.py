"""Training of nested nets: by Pyro's own means, in models of others, and what the laws of the widths learn."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule
from torch import nn

from pyro_vnd.infer import AutoNested, KLWeights, MaskSchedule, NestedELBO, fit, module_local_params
from pyro_vnd.nn import NestedClassifier, NestedNet, nest

MASK_PER = pytest.mark.parametrize("mask_per", ["example", "batch"])


def make(inputs=64, hidden=32, outputs=10, **options) -> NestedNet:
    plain = nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))
    return nest(plain, torch.zeros(1, inputs), num_blocks=8, **options)


def regression(net, noise=None):
    """A model in which the noise is a latent, too, unless it is given."""

    class Model(PyroModule):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x, y=None):
            scale = pyro.sample("noise", dist.LogNormal(-1.0, 0.5)) if noise is None else noise
            rows = pyro.plate("data", len(x), dim=-1)
            mean = self.net(x, plate=rows)
            with rows:
                pyro.sample("y", dist.Normal(mean, scale).to_event(1), obs=y)

    return Model()


@MASK_PER
@pytest.mark.parametrize("objective", [Trace_ELBO, TraceMeanField_ELBO])
def test_svi_with_the_global_store(mask_per, objective, digits):
    x, y = digits.train.images[:300], digits.train.labels[:300]
    net = make(mask_per=mask_per)
    model, before = NestedClassifier(net), [p.detach().clone() for p in net.parameters()]
    svi = SVI(model, net.guide, pyro.optim.Adam({"lr": 0.05}), objective())
    losses = [svi.step(x, y) for _ in range(30)]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    assert not any(torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True))


@MASK_PER
@pytest.mark.parametrize("sliced", [False, True])
def test_svi_with_a_cut(mask_per, sliced, digits):
    x, y = digits.train.images[:300], digits.train.labels[:300]
    net = make(mask_per=mask_per)
    model, before = NestedClassifier(net), [p.detach().clone() for p in net.parameters()]
    svi = SVI(model, net.guide, pyro.optim.Adam({"lr": 0.05}), TraceMeanField_ELBO())
    with net.cut(0.5, sliced=sliced):
        losses = [svi.step(x, y) for _ in range(30)]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    weight, start = net.net[0].plain.weight, before[0]
    assert (weight != start)[:16].all(1).any()
    if mask_per == "batch" or sliced:  # the masked part does not matter, and costs nothing
        assert torch.equal(weight[16:], start[16:])
    assert (net.predict(x, width=0.5)[0].argmax(-1) == y).double().mean() > 0.5


def test_nets_of_different_prefix_keep_apart_in_the_store():
    nets = [make(3, 8, 1, prefix=prefix) for prefix in ("a.", "b.")]
    x, y = torch.randn(20, 3), torch.randn(20)

    def model(x, y):
        rows = pyro.plate("data", len(x), dim=-1)
        mean = sum(net(x, plate=rows) for net in nets).squeeze(-1)
        with rows:
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    guides = [net.guide for net in nets]

    def guide(x, y):
        rows = pyro.plate("data", len(x), dim=-1)
        for each in guides:
            each(x, plate=rows)

    before = [[p.detach().clone() for p in net.parameters()] for net in nets]
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), TraceMeanField_ELBO())
    for _ in range(5):
        svi.step(x, y)
    for net, start in zip(nets, before, strict=True):
        assert not any(torch.equal(p, b) for p, b in zip(net.parameters(), start, strict=True))
    assert not torch.equal(nets[0].net[0].plain.weight, nets[1].net[0].plain.weight)
    assert all(value.isfinite().all() for value in nets[0].guide(x).values())


@MASK_PER
def test_further_latents_of_a_model(mask_per):
    x = torch.randn(200, 3)
    y = x[:, :1] + 0.1 * torch.randn(200, 1)
    net = make(3, 16, 1, mask_per=mask_per)
    model = regression(net)
    weights, noise = net.guide, AutoNormal(pyro.poutine.block(model, expose=["noise"]))

    class Guide(PyroModule):
        def __init__(self):
            super().__init__()
            self.weights, self.noise = weights, noise

        def forward(self, x, y=None):
            return self.noise(x, y) | self.weights(x, y)

    guide = Guide()
    result = fit(model, guide, (x, y), num_epochs=50, lr=0.06, progress=False)
    assert result.elbo[-1] > result.elbo[0]
    with module_local_params(model, guide):
        assert noise.median(x, y)["noise"] < 0.5


@MASK_PER
def test_another_guide_has_a_bound_too(mask_per):
    x, y = torch.randn(40, 3), torch.arange(40) % 2
    net = make(3, 8, 2, mask_per=mask_per)
    model = NestedClassifier(net)
    guide = AutoNested(model, shared_plates=["data"] if mask_per == "example" else ())
    result = fit(model, guide, (x, y), num_epochs=40, lr=0.08, progress=False)
    assert result.elbo[-1] > result.elbo[0]
    elbo = NestedELBO()
    with module_local_params(model, guide):
        losses = torch.stack([elbo.differentiable_loss(model, guide, x, y).detach() for _ in range(30)])
    assert losses.mean() > 0  # the log-probability of labels is negative, and so is each bound on it
    assert all(law.num_units == 8 for law in guide.laws.values())


def test_other_guides_do_not_train_the_laws_of_the_net():
    net = make(3, 8, 2, mask_per="batch")
    model, start = NestedClassifier(net), net.widths["0"].logits.detach().clone()
    guide = AutoNested(model)
    fit(model, guide, (torch.randn(40, 3), torch.arange(40) % 2), num_epochs=10, lr=0.05, progress=False)
    assert torch.equal(net.widths["0"].logits, start)


@MASK_PER
@pytest.mark.parametrize("prior", ["normal", None])
def test_the_law_moves_to_the_lengths_that_are_useful(mask_per, prior):
    """Data of rank 1 or 8 pass through linear hidden units, of which they need as many."""
    torch.manual_seed(1)
    x, mean_length = torch.randn(200, 8), {}
    for rank in (1, 8):
        y = x * (torch.arange(8) < rank) + 0.1 * torch.randn(200, 8)
        net = nest(
            nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), x[:1], mask_per=mask_per, prior=prior, width_prior=0.5
        )
        nn.init.zeros_(net.widths["0"].logits)
        fit(regression(net, noise=0.3), net.guide, (x, y), num_epochs=75, lr=0.1, progress=False)
        mean_length[rank] = net.laws["0.mask"].mean_length.item()
    # One mask for all points, without weights to pay for, costs one nat in all for 200 rows: hardly any pull.
    assert mean_length[1] < (5.5 if mask_per == "batch" and prior is None else 2.5)
    assert mean_length[8] > 6.5


def test_digits_are_learned_at_every_width(digits):
    net = make(mask_per="example")
    fit(
        NestedClassifier(net),
        net.guide,
        digits.train,
        num_epochs=25,
        batch_size=128,
        weights=KLWeights(latents=0.1),
        schedule=MaskSchedule(),
        progress=False,
    )
    x, y = digits.test
    accuracy = [
        (net.predict(x, width=w, num_samples=5).softmax(-1).mean(0).argmax(-1) == y).double().mean()
        for w in (0.25, 0.5, 1.0)
    ]
    assert accuracy[0] > 0.85
    assert accuracy[2] > 0.92
    assert accuracy[0] <= accuracy[2]
