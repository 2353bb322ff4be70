"""Priors and posteriors of the weights of a layer."""

import math

import pytest
import torch
from torch import nn
from torch.distributions import Categorical, Laplace, MixtureSameFamily, Normal, StudentT

from pyro_vnd.distributions import LogUniform
from pyro_vnd.nn import NestedLayer, Width


def scale_mixture(*shape):
    scales = torch.tensor([1.0, 0.1]).expand(*shape, 2)
    return MixtureSameFamily(Categorical(torch.ones_like(scales)), Normal(torch.zeros_like(scales), scales))


@pytest.mark.parametrize(
    ("plain", "fan_in"),
    [
        (nn.Linear(6, 8), 6),
        (nn.Conv2d(6, 8, (3, 2)), 36),
        (nn.Conv2d(6, 8, 3, groups=2), 27),
        (nn.ConvTranspose2d(6, 8, 3), 54),
        (nn.ConvTranspose1d(6, 8, 3, groups=2), 9),
    ],
)
def test_default_prior_has_the_fan_in_of_a_unit(plain, fan_in):
    layer = NestedLayer(plain)
    assert layer.prior_of("weight").scale.item() == pytest.approx(math.sqrt(2 / fan_in))
    assert layer.prior_of("bias").scale.item() == 1
    assert layer.law("weight", "prior").event_shape == plain.weight.shape


def test_posterior_starts_at_the_weights_given():
    plain = nn.Linear(6, 8)
    layer = NestedLayer(plain, init_scale=0.2)
    law = layer.law("weight", "posterior")
    assert torch.equal(law.mean, plain.weight)
    torch.testing.assert_close(law.variance, torch.full((8, 6), (0.2 * math.sqrt(2 / 6)) ** 2))
    torch.testing.assert_close(layer.law("bias", "posterior").variance, torch.full((8,), 0.04))


@pytest.mark.parametrize(
    ("prior", "spread"),
    [
        (Normal(0.0, 3.0), 3.0),
        (Laplace(0.0, 3.0), 3.0 * math.sqrt(2)),
        (scale_mixture(), math.sqrt((1 + 0.01) / 2)),
        (LogUniform(), math.sqrt(2 / 6)),
        (StudentT(1.0), math.sqrt(2 / 6)),
        (lambda name, layer: Normal(0.0, 5.0), 5.0),
        ({"weight": Normal(0.0, 3.0), "bias": Laplace(0.0, 1.0)}, 3.0),
    ],
)
def test_priors_of_all_kinds_and_the_start_they_give(prior, spread):
    layer = NestedLayer(nn.Linear(6, 8), prior=prior, init_scale=0.1)
    scale = layer.law("weight", "posterior").base.scale
    torch.testing.assert_close(scale, torch.full((8, 6), 0.1 * spread))
    value = layer.law("weight", "posterior").sample()
    assert torch.isfinite(layer.law("weight", "prior").log_prob(value))


def test_a_prior_with_entries_of_its_own_is_cut_with_the_layer():
    a, b = Width("a", 6, 3), Width("b", 8, 4)
    loc = torch.randn(8, 6)
    for law, keys in [(Normal(loc, 1.0), ["loc"]), (StudentT(3.0, loc, 2.0), ["loc", "df"])]:
        layer = NestedLayer(nn.Linear(6, 8, bias=False), inputs=a, outputs=b, prior=law)
        a.hold(kept_units=2), b.hold(kept_units=4)
        prior = layer.law("weight", "prior")
        assert type(prior.base) is type(law)
        assert prior.event_shape == (4, 2)
        for key in keys:
            torch.testing.assert_close(getattr(prior.base, key), getattr(law, key).expand(8, 6)[:4, :2])
        a.release(), b.release()
    layer = NestedLayer(nn.Linear(6, 8, bias=False), inputs=a, outputs=b, prior=scale_mixture(8, 6))
    assert layer.law("weight", "prior").sample().shape == (8, 6)
    a.hold(kept_units=2)
    with pytest.raises(ValueError, match="with entries of its own cannot be cut"):
        layer.law("weight", "prior")


def test_point_estimates_have_no_law():
    layer = NestedLayer(nn.Linear(6, 8), prior=None)
    assert layer.draw("prior", "layer") == {}
    assert [name for name, _ in layer.named_parameters()] == ["plain.weight", "plain.bias"]


def test_used_outside_of_a_net_it_computes_with_the_mean():
    plain, x = nn.Linear(6, 8), torch.randn(3, 6)
    assert torch.equal(NestedLayer(plain)(x), plain(x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((nn.ReLU(),), "`layer` must be one of Linear, Conv1d, .*; got ReLU"),
        ((nn.Bilinear(2, 2, 2),), "`layer` must be one of"),
        ((nn.Linear(6, 8), {"init_scale": 0.0}), "`init_scale` must be finite and > 0; got 0.0"),
        ((nn.Linear(6, 8), {"init_scale": math.nan}), "`init_scale`"),
        ((nn.Linear(6, 8), {"prior": "laplace"}), "`prior` must be 'normal', a law or None; got 'laplace'"),
        ((nn.Linear(6, 8), {"prior": {"weight": Normal(0.0, 1.0)}}), r"`prior` lacks 'bias'; got \['weight'\]"),
        ((nn.Linear(6, 8), {"prior": Normal(torch.zeros(8, 1), 1.0)}), r"array \(8, 6\)"),
        ((nn.Linear(6, 8), {"inputs": Width("a", 4)}), "width 'a' of 4 units cannot share 6 channels"),
    ],
)
def test_what_does_not_fit_is_named(arguments, message):
    layer, options = arguments if len(arguments) == 2 else (arguments[0], {})
    with pytest.raises(ValueError, match=message):
        NestedLayer(layer, **options)


def test_the_layer_says_what_it_reads_and_writes():
    layer = NestedLayer(nn.Linear(6, 8), outputs=Width("b", 8))
    assert "inputs=whole, outputs=['b']" in repr(layer)
