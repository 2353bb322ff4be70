"""Outputs drawn instead of weights: the same law, with less noise in gradients."""

import math
from contextlib import nullcontext

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from scipy import stats
from torch import nn
from torch.distributions import Laplace, Normal, StudentT

from models import datasets
from pyro_vnd.distributions import Gated, LogUniform
from pyro_vnd.infer import LocalReparameterization, NestedELBO, fit
from pyro_vnd.nn import NestedClassifier, NestedLayer, Width, nest

LAYERS = {
    "linear": (lambda: nn.Linear(6, 8), (4, 6)),
    "linear-without-bias": (lambda: nn.Linear(6, 8, bias=False), (4, 6)),
    "conv": (lambda: nn.Conv2d(6, 8, 3, padding=1, padding_mode="reflect"), (4, 6, 4, 4)),
    "groups": (lambda: nn.Conv1d(6, 8, 3, groups=2), (4, 6, 5)),
    "transposed": (lambda: nn.ConvTranspose2d(6, 8, 2, stride=2, output_padding=1), (4, 6, 3, 3)),
}
every = pytest.mark.parametrize(("build", "shape"), LAYERS.values(), ids=LAYERS)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def outputs(layer, x, num_samples, local=True):
    """Draw outputs of a layer, by local noise or by noise of the weights."""
    draws = []
    for _ in range(num_samples):
        if local:
            with LocalReparameterization():
                layer.draw("posterior", "layer")
                draws.append(layer(x))
        else:
            layer.draw("posterior", "layer")
            draws.append(layer(x))
        layer.values = {}
    return torch.stack(draws).detach()


def moments_by_hand(layer, x):
    """Mean and variance of each output: each entry of a weight adds its own, (d y / d w)^2 times its variance."""
    mean, variance = layer.plain(x), 0.0
    for name, parameter in layer.plain.named_parameters():
        scale = layer.log_scales[name].exp()
        for index in range(parameter.numel()):
            nudge = torch.zeros(parameter.numel()).index_fill_(0, torch.tensor(index), 1.0).view_as(parameter)
            values = {n: torch.zeros_like(p) for n, p in layer.plain.named_parameters()} | {name: nudge}
            slope = torch.func.functional_call(layer.plain, values, (x,))
            variance = variance + slope.square() * scale.flatten()[index] ** 2
    return mean.detach(), variance.detach()


@every
def test_mean_and_variance_are_those_of_noise_on_the_weights(build, shape):
    layer, x = NestedLayer(build(), init_scale=0.7), torch.randn(shape)
    mean, variance = moments_by_hand(layer, x)
    for local in (True, False):
        draws = outputs(layer, x, 1500, local)
        z_mean = (draws.mean(0) - mean) / (variance / 1500).sqrt()
        z_variance = (draws.var(0) / variance - 1) / math.sqrt(2 / 1499)
        assert z_mean.abs().max() < 5
        assert z_variance.abs().max() < 5


def test_law_of_an_output_is_that_of_noise_on_the_weights():
    layer, x = NestedLayer(nn.Linear(6, 8), init_scale=0.7), torch.randn(1, 6).expand(4000, 6)
    mean, variance = moments_by_hand(layer, x[:1])
    standard = (outputs(layer, x, 1)[0] - mean) / variance.sqrt()
    for unit in range(8):
        assert stats.kstest(standard[:, unit].numpy(), "norm").pvalue > 1e-4
    assert stats.kstest(standard.flatten().numpy(), "norm").pvalue > 1e-3
    assert stats.kstest(1.05 * standard.flatten().numpy(), "norm").pvalue < 1e-3  # a deviation 5 % off is noticed
    correlation = torch.corrcoef(standard.T) - torch.eye(8)
    assert correlation.abs().max() < 5 / math.sqrt(4000)


def test_examples_have_noise_of_their_own():
    layer, x = NestedLayer(nn.Linear(6, 8), init_scale=0.7), torch.randn(1, 6).expand(2, 6)
    pair = outputs(layer, x, 1)[0]
    assert not torch.equal(pair[0], pair[1])
    assert torch.equal(*outputs(layer, x, 1, local=False)[0])


@pytest.mark.parametrize("kept", [(2, 4), (6, 8), (3, 2)])
def test_a_sliced_pass_draws_the_kept_outputs(kept):
    a, b = Width("a", 6), Width("b", 8)
    layer = NestedLayer(nn.Linear(6, 8), inputs=a, outputs=b, init_scale=0.7)
    x = torch.randn(4, 6)
    zeroed = x.clone()
    zeroed[:, kept[0] :] = 0
    mean, variance = (moment[:, : kept[1]] for moment in moments_by_hand(layer, zeroed))
    a.hold(kept_units=kept[0]), b.hold(kept_units=kept[1])
    draws = outputs(layer, x[:, : kept[0]], 1500)
    assert draws.shape == (1500, 4, kept[1])
    assert ((draws.mean(0) - mean) / (variance / 1500).sqrt()).abs().max() < 5
    assert ((draws.var(0) / variance - 1) / math.sqrt(2 / 1499)).abs().max() < 5


class CountDraws(torch.overrides.TorchFunctionMode):
    """Sizes of all arrays of random numbers."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        value = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in ("randn", "randn_like", "normal", "normal_", "_standard_normal"):
            self.sizes.append(tuple(value.shape))
        return value


def small(**options):
    plain = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 3))
    net = nest(plain, torch.zeros(1, 5), num_blocks=4, **options)
    return net, NestedClassifier(net), (torch.randn(7, 5), torch.arange(7) % 3)


@pytest.mark.parametrize("mask_per", ["example", "batch"])
def test_no_noise_of_the_shape_of_weights_is_drawn(mask_per):
    net, model, data = small(mask_per=mask_per)
    for local in (True, False):
        with CountDraws() as count:
            if local:
                with LocalReparameterization():
                    NestedELBO().differentiable_loss(model, net.guide, *data)
            else:
                NestedELBO().differentiable_loss(model, net.guide, *data)
        assert ((16, 5) in count.sizes) == (not local)
        assert ((7, 16) in count.sizes) == local


@pytest.mark.parametrize("mask_per", ["example", "batch"])
def test_every_parameter_gets_a_gradient_and_the_elbo_is_the_same(mask_per):
    net, model, data = small(mask_per=mask_per)
    losses = {}
    for local in (True, False):
        values = []
        for _ in range(150):
            with LocalReparameterization() if local else nullcontext():
                values.append(NestedELBO().differentiable_loss(model, net.guide, *data))
        losses[local] = torch.stack(values)
    losses[True].sum().backward()
    assert all((p.grad != 0).any() and torch.isfinite(p.grad).all() for p in net.parameters())
    means, errors = zip(*[(v.detach().mean(), v.detach().var() / 150) for v in losses.values()], strict=True)
    assert abs(means[0] - means[1]) < 4 * math.sqrt(sum(errors))


def test_weights_without_a_closed_form_kl_are_drawn():
    mixture = dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), dist.Normal(torch.zeros(2), torch.ones(2)))
    drawn_under = {mixture: True, StudentT(3.0): True, Laplace(0.0, 1.0): False, LogUniform(): False}
    for prior, drawn in drawn_under.items():
        net, model, data = small(prior=prior)
        with LocalReparameterization():
            trace = poutine.trace(net.guide).get_trace(*data)
            assert torch.isfinite(NestedELBO().differentiable_loss(model, net.guide, *data))
        for name, layer in net.layers.items():
            mean = torch.equal(trace.nodes[f"{name}.weight"]["value"], layer.plain.weight)
            assert mean != drawn


@pytest.mark.parametrize("other", ["weight", "bias"])
def test_weight_and_bias_may_differ(other):
    prior = {"weight": Normal(0.0, 1.0), "bias": Normal(0.0, 1.0)} | {other: StudentT(3.0)}
    layer, x = NestedLayer(nn.Linear(6, 8), prior=prior, init_scale=0.7), torch.randn(4, 6)
    mean, variance = moments_by_hand(layer, x)
    draws = outputs(layer, x, 1500)
    assert ((draws.mean(0) - mean) / (variance / 1500).sqrt()).abs().max() < 5
    assert ((draws.var(0) / variance - 1) / math.sqrt(2 / 1499)).abs().max() < 5


def test_other_gated_latents_are_drawn():
    law = Gated(Normal(torch.zeros(3), 1.0))
    with LocalReparameterization():
        value = pyro.sample("w", law)
    assert (value != 0).all()


@pytest.mark.parametrize("bias", [True, False])
def test_gradients_are_those_of_the_formula(bias):
    layer, x = NestedLayer(nn.Linear(6, 8, bias=bias), init_scale=0.7), torch.randn(4, 6, requires_grad=True)
    names = list(layer.log_scales)
    inputs = (x, *layer.plain.parameters(), *layer.log_scales.values())

    def by_formula():
        means = dict(layer.plain.named_parameters())
        variances = {name: torch.exp(2 * layer.log_scales[name]) for name in names}
        mean = nn.functional.linear(x, *(means[name] for name in names))
        variance = nn.functional.linear(x**2, *(variances[name] for name in names))
        return mean + variance.sqrt() * torch.randn_like(mean)

    gradients = []
    for draw in (by_formula, lambda: layer(x)):
        with LocalReparameterization():
            layer.draw("posterior", "layer")
            torch.manual_seed(1)
            gradients.append(torch.autograd.grad(draw().pow(3).sum(), inputs))
    for expected, found in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected)


def test_rows_of_zeros_have_finite_gradients():
    layer = NestedLayer(nn.Linear(6, 8, bias=False))
    with LocalReparameterization():
        layer.draw("posterior", "layer")
        y = layer(torch.zeros(4, 6))
    y.square().sum().backward()
    assert (y.abs() < 1e-6).all()
    assert all(torch.isfinite(parameter.grad).all() for parameter in layer.parameters())


def test_the_gradient_has_less_variance_on_digits():
    data = datasets.load("digits", flatten=True)
    x, y = data.train.images[:256].double(), data.train.labels[:256]
    net = nest(nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)), x[:1], init_scale=0.5)
    model, variances = NestedClassifier(net), {}
    with net.cut(1.0):
        for local in (True, False):
            gradients = []
            for _ in range(60):
                net.zero_grad()
                with LocalReparameterization() if local else nullcontext():
                    NestedELBO().differentiable_loss(model, net.guide, x, y).backward()
                gradients.append(net.net[0].plain.weight.grad.clone())
            variances[local] = torch.stack(gradients).var(0).sum().item()
    assert variances[True] < 0.5 * variances[False]


def test_fit_on_digits_with_local_noise():
    data = datasets.load("digits", flatten=True)
    x, y = data.train.images.double(), data.train.labels
    net = nest(nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)), x[:1], num_blocks=8)
    fit(
        NestedClassifier(net),
        net.guide,
        (x, y),
        num_epochs=15,
        batch_size=128,
        elbo=NestedELBO(local_reparam=True),
        progress=False,
    )
    test = data.test.images.double()
    assert (net.predict(test, width=1.0)[0].argmax(-1) == data.test.labels).double().mean() > 0.85


def test_layers_that_there_are_not_are_refused():
    with pytest.raises(
        ValueError, match="LocalReparameterization: argument `layers` must be 'all' or 'linear'; got 'c"
    ):
        LocalReparameterization("convolution")


def test_handlers_say_their_settings():
    assert repr(LocalReparameterization()) == "LocalReparameterization(layers='all')"
    assert repr(LocalReparameterization("linear")) == "LocalReparameterization(layers='linear')"
    assert repr(NestedELBO(num_particles=3)) == "NestedELBO(num_particles=3)"
    assert repr(NestedELBO(num_particles=3, vectorize_particles=True)).endswith("=3, vectorize_particles=True)")
