"""Weights that hooks or parametrizations compute: nested as they are, or left whole by name."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

from pyro_vnd.nn import narrow, nest


class Scaled(nn.Module):
    def forward(self, x):
        return 1.5 * x


def scaled(layer, name="weight"):
    parametrize.register_parametrization(layer, name, Scaled())
    return layer


def pruned(layer, name="weight"):
    return prune.l1_unstructured(layer, name, 0.5)


LAYERS = {
    "linear": lambda: nn.Linear(8, 8),
    "conv": lambda: nn.Conv2d(8, 8, 3, padding=1),
    "transposed": lambda: nn.ConvTranspose2d(8, 8, 3, padding=1),
    "depthwise": lambda: nn.Conv2d(8, 8, 3, padding=1, groups=8),
    "transposed-in-groups": lambda: nn.ConvTranspose2d(8, 8, 3, padding=1, groups=4),
}
COMPUTED = {
    "weight norm": parametrizations.weight_norm,
    "weight norm by a hook": weight_norm,
    "weight norm of all": lambda layer: weight_norm(layer, dim=None),
    "spectral norm": parametrizations.spectral_norm,
    "spectral norm by a hook": spectral_norm,
    "own": scaled,
    "own of the bias": lambda layer: scaled(layer, "bias"),
    "pruned": pruned,
    "pruned bias": lambda layer: pruned(layer, "bias"),
    "pruned twice": lambda layer: prune.random_unstructured(pruned(layer), "weight", 0.3),
    "pruned units": lambda layer: prune.ln_structured(layer, "weight", 0.25, 2, 0),
    "weight norm, then own": lambda layer: scaled(parametrizations.weight_norm(layer)),
    "weight norm, then spectral": lambda layer: parametrizations.spectral_norm(parametrizations.weight_norm(layer)),
    "weight norm, pruned": lambda layer: pruned(weight_norm(layer), "weight_v"),
    "pruned bias, spectral norm": lambda layer: parametrizations.spectral_norm(pruned(layer, "bias")),
}
IS_WHOLE = {name for name in COMPUTED if "spectral" in name or ", " in name}

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")


def build(kind, how):
    layer = COMPUTED[how](LAYERS[kind]())
    if kind == "linear":
        layers, x = [nn.Linear(4, 8), nn.Tanh(), layer, nn.Tanh()], torch.randn(3, 4)
    else:
        layers = [nn.Conv2d(2, 8, 3), nn.Tanh(), layer, nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        x = torch.randn(3, 2, 6, 6)
    return nn.Sequential(*layers, nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)), x


def quietly(plain, x, **options):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "nest: some of the net")
        return nest(plain, x, **options)


def check_cuts(net, x):
    exactly = {"rtol": 1e-9, "atol": 1e-9}
    with torch.no_grad():
        for width in (0.25, 0.5):
            expected = narrow(net, width, rounding="nearest")(x)
            for sliced in (False, True):
                drawn = net._drawn("posterior", len(x), weights=False)
                with net.cut(width, sliced=sliced, rounding="nearest"), drawn:
                    torch.testing.assert_close(net.net(x), expected, **exactly)


@pytest.mark.parametrize("how", COMPUTED)
@pytest.mark.parametrize("kind", LAYERS)
def test_computed_weights_are_exact_or_left_whole(kind, how):
    plain, x = build(kind, how)
    plain.eval()
    before = plain(x).detach()
    net = quietly(plain, x).eval()
    with torch.no_grad(), net.cut(1.0), net._drawn("posterior", len(x), weights=False):
        torch.testing.assert_close(net.net(x), before, rtol=1e-9, atol=1e-9)
    check_cuts(net, x)
    torch.testing.assert_close(plain(x).detach(), before, rtol=0, atol=0)  # the net given is what it was


# Torch's own hooks compute weights that are normalised, then pruned, of what the call before had pruned.
@pytest.mark.parametrize("how", [how for how in COMPUTED if how != "weight norm, pruned"])
@pytest.mark.parametrize("kind", ["linear", "transposed"])
def test_they_follow_their_parameters_through_training(kind, how):
    plain, x = build(kind, how)
    net = quietly(plain.eval(), x).train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    before = [parameter.detach().clone() for parameter in net.net[2].parameters()]
    for _ in range(3):
        optimizer.zero_grad()
        with net._drawn("posterior", len(x)):
            net.net(x).square().sum().backward()
        optimizer.step()
    assert all(not torch.equal(old, new) for old, new in zip(before, net.net[2].parameters(), strict=True))
    check_cuts(net.eval(), x)


@pytest.mark.parametrize("how", ["pruned", "pruned twice", "pruned units"])
def test_pruned_weights_stay_zero(how):
    plain, x = build("linear", how)
    net = quietly(plain, x)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(1.0)
        narrowed = narrow(net, 0.5, rounding="nearest")
        narrowed(x)
    rows, columns = narrowed[2].weight.shape
    assert torch.equal(narrowed[2].weight == 0, (plain[2].weight == 0)[:rows, :columns])
    assert (narrowed[2].weight == 0).any()


@pytest.mark.parametrize("how", sorted(IS_WHOLE))
def test_what_cannot_be_cut_is_named(how):
    plain, x = build("linear", how)
    net = quietly(plain, x)
    assert "2" not in net.layers
    assert any("`2" in reason for name, reason in net.whole.items() if name == "0")
    assert net.widths.keys() == {"4"}
