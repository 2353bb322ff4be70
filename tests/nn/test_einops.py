"""Nets that arrange their axes with einops."""

import pytest
import torch
from torch import nn
from written_nets import Net, parameter

from pyro_vnd.nn import narrow, nest

einops = pytest.importorskip("einops")
layers = pytest.importorskip("einops.layers.torch")


def attention():
    def forward(net, x):
        x = net.a(x)
        q, k, v = einops.rearrange(net.qkv(x), "b n (k h d) -> k b h n d", k=3, h=net.h)
        weights = einops.einsum(q, k, "b h i d, b h j d -> b h i j").softmax(-1)
        y = einops.rearrange(einops.einsum(weights, v, "b h i j, b h j d -> b h i d"), "b h n d -> b n (h d)")
        return net.c(einops.reduce(x + net.o(y), "b n d -> b d", "mean"))

    parts = {"a": nn.Linear(4, 16), "qkv": nn.Linear(16, 48), "o": nn.Linear(16, 16), "c": nn.Linear(16, 3)}
    return Net(forward, **parts, h=4), torch.randn(2, 5, 4)


def patches():
    def forward(net, x):
        h = net.patch(net.cut(x))
        h = torch.cat([einops.repeat(net.cls, "1 1 d -> b 1 d", b=len(x)), h], 1)
        return net.c(net.pool(h + net.m2(net.m1(h).relu())))

    parts = {
        "cut": layers.Rearrange("b c (h p) (w q) -> b (h w) (p q c)", p=4, q=4),
        "patch": nn.Linear(16, 24),
        "cls": parameter(1, 1, 24),
        "m1": nn.Linear(24, 32),
        "m2": nn.Linear(32, 24),
        "pool": layers.Reduce("b n d -> b d", "mean"),
        "c": nn.Linear(24, 3),
    }
    return Net(forward, **parts), torch.randn(2, 1, 8, 8)


def convolutions():
    halve = layers.Reduce("b c (h 2) (w 2) -> b c h w", "max")
    parts = [nn.Conv2d(1, 8, 3, padding=1), halve, nn.ReLU(), nn.Conv2d(8, 12, 3, padding=1), halve, nn.ReLU()]
    return nn.Sequential(*parts, layers.Rearrange("b c h w -> b (c h w)"), nn.Linear(48, 3)), torch.randn(2, 1, 8, 8)


def mixer():
    def forward(net, x):
        h = net.a(x)
        return net.c(einops.reduce(h + net.mix(h), "b n d -> b d", "mean"))

    turned = layers.Rearrange("b n d -> b d n"), layers.Rearrange("b d n -> b n d")
    mix = nn.Sequential(turned[0], nn.Linear(5, 8), nn.GELU(), nn.Linear(8, 5), turned[1])
    return Net(forward, a=nn.Linear(4, 16), mix=mix, c=nn.Linear(16, 3)), torch.randn(2, 5, 4)


def mixed_by_a_layer():
    mix = layers.EinMix("b n d -> b n e", weight_shape="d e", bias_shape="e", d=16, e=12)
    net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), mix, nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))
    return net, torch.randn(2, 5, 4)


@pytest.mark.parametrize(
    ("build", "units"),
    [
        (attention, {"a": 16, "qkv": 4}),
        (patches, {"patch": 24, "m1": 32}),
        (convolutions, {"0": 8, "3": 12}),
        (mixer, {"a": 16, "mix.1": 8}),
        (mixed_by_a_layer, {"4": 8}),  # the sum over channels with a weight is left whole
    ],
)
def test_they_nest_as_written(build, units):
    plain, x = build()
    net = nest(plain, x, strict=True)
    assert {name: width.num_units for name, width in net.widths.items()} == units
    with torch.no_grad():
        torch.testing.assert_close(narrow(net, 1.0)(x), plain(x), rtol=1e-9, atol=1e-9)
        with net.cut(0.5), net._drawn("posterior", len(x), weights=False):
            torch.testing.assert_close(narrow(net, 0.5)(x), net.net(x), rtol=1e-9, atol=1e-9)
