"""Layers of one's own that are recognised are the layers of torch that compute the same; others are left alone."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pyro_vnd.nn.recognition import as_torch_has_it


class Norm(nn.Module):
    """A norm over the last axis, written by hand."""

    def __init__(self, function, bias=True, eps=1e-6):
        super().__init__()
        self.function, self.eps = function, eps
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, 7))
        self.bias = nn.Parameter(torch.linspace(-1.0, 1.0, 7)) if bias else None

    def forward(self, x):
        x = self.function(x, self.eps) * self.weight
        return x if self.bias is None else x + self.bias


def standardised(x, eps):
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def scaled(x, eps):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda: Norm(standardised), nn.LayerNorm),
        (lambda: Norm(standardised, bias=False, eps=0.3), nn.LayerNorm),
        (lambda: Norm(scaled, bias=False, eps=1e-5), nn.RMSNorm),
    ],
)
def test_norms(make, kind, training):
    own = make().train(training)
    found = as_torch_has_it(own)
    assert type(found) is kind
    assert (found.eps, found.training, own.training) == (own.eps, training, training)
    assert found.weight is own.weight
    assert getattr(found, "bias", None) is own.bias
    x = torch.randn(3, 7)
    torch.testing.assert_close(found(x), own(x))


@pytest.mark.parametrize(
    "function",
    [
        lambda x, eps: x,
        lambda x, eps: x / (x.abs().mean(-1, keepdim=True) + eps),
        lambda x, eps: standardised(x, eps).tanh(),
        lambda x, eps: standardised(x, eps)[..., :1],  # of another shape, after the weight, too
        lambda x, eps: x.flatten(1),
        lambda x, eps: standardised(x, eps).unsqueeze(0),
    ],
)
@pytest.mark.parametrize("bias", [True, False])
def test_what_is_no_norm_is_left_alone(function, bias):
    assert as_torch_has_it(Norm(function, bias)) is None


class Computed:
    """A layer that computes its weight."""

    def computed(self):
        return F.normalize(self.weight, dim=0)


class Linear(Computed, nn.Linear):
    def forward(self, x):
        return F.linear(x, self.computed(), self.bias)


class Conv(Computed, nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.computed(), self.bias, self.stride, self.padding, self.dilation, self.groups)


class ConvTranspose(Computed, nn.ConvTranspose2d):
    def forward(self, x):
        options = self.stride, self.padding, self.output_padding, self.groups, self.dilation
        return F.conv_transpose2d(x, self.computed(), self.bias, *options)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("own", "kind", "shape"),
    [
        (lambda bias: Linear(4, 6, bias), nn.Linear, (3, 4)),
        (lambda bias: Conv(4, 6, 3, 2, 1, bias=bias), nn.Conv2d, (3, 4, 7, 7)),
        (lambda bias: ConvTranspose(4, 6, 3, 2, 1, 1, bias=bias, dilation=2), nn.ConvTranspose2d, (3, 4, 5, 5)),
    ],
)
def test_computed_weights(own, kind, shape, bias):
    torch.manual_seed(0)
    own = own(bias).eval()
    found = as_torch_has_it(own)
    assert type(found) is kind
    assert not found.training
    torch.testing.assert_close(found.weight, own.computed())
    assert (found.bias is None) == (not bias)
    x = torch.randn(shape)
    torch.testing.assert_close(found(x), own(x))


class Own(nn.Linear):
    """A layer with a forward of its own."""

    def __init__(self, function):
        super().__init__(4, 4)
        self.function = function

    def forward(self, x):
        return self.function(self, x)


def by_mode(layer, x):
    return F.linear(x, layer.weight * (2.0 if layer.training else 3.0), layer.bias)


@pytest.mark.parametrize(
    "function",
    [
        lambda layer, x: F.linear(F.linear(x, 2 * layer.weight), 2 * layer.weight),  # twice
        lambda layer, x: F.linear(x, layer.weight, layer.bias),  # its own weight
        lambda layer, x: F.linear(x, 2 * layer.weight, layer.bias).relu(),  # more than that
        lambda layer, x: F.linear(2 * x, 2 * layer.weight, layer.bias),  # of something else
        lambda layer, x: F.linear(x, layer.weight * x.mean(), layer.bias),  # a weight that depends on the input
        by_mode,
        lambda layer, x: F.linear(x, (2 * layer.weight)[:2]),  # of another shape
        lambda layer, x: x @ layer.weight.T,
        lambda layer, x: F.linear(x["features"], 2 * layer.weight),  # another input
    ],
)
def test_what_is_no_layer_with_a_computed_weight_is_left_alone(function):
    torch.manual_seed(0)
    assert as_torch_has_it(Own(function)) is None


def test_padding_that_is_not_by_zeros_is_left_alone():
    assert as_torch_has_it(Conv(4, 6, 3, padding=1, padding_mode="reflect")) is None
