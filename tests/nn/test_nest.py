"""Ordinary nets become nested ones."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Laplace, Normal

from pyro_vnd.distributions import OrderedMask
from pyro_vnd.nn import NestedLayer, NestedNorm, narrow, nest

X = torch.zeros(1, 3, dtype=torch.float64)


def mlp():
    return nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.inner, self.outer = nn.Conv2d(8, 4, 3, padding=1), nn.Conv2d(4, 8, 3, padding=1)
        self.head = nn.Linear(8 * 16, 3)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        return self.head((x + self.outer(self.inner(x).relu())).flatten(1))


def test_families_run_whole_and_cut(family, mean_pass):
    plain, images = family
    net = nest(plain, images[:2], num_blocks=4)
    torch.testing.assert_close(mean_pass(net, images, 1.0), plain(images), rtol=1e-9, atol=1e-9)
    assert net(images).shape == net.predict(images, width=0.25)[0].shape == (6, 10)
    for width in (0.25, 0.5):
        dense, sliced = (mean_pass(net, images, width, each) for each in (False, True))
        torch.testing.assert_close(dense, sliced, rtol=1e-9, atol=1e-9)
        assert not torch.allclose(dense, plain(images))


def test_families_as_masks_by_example_are_a_loop(family, mean_pass):
    plain, images = family
    net = nest(plain, images[:2], num_blocks=4)
    fractions = torch.tensor([0.25, 0.5, 0.75, 1.0, 0.5, 0.25])
    rows = mean_pass(net, images, fractions)
    for n in (0, 1, 2, 3):
        expected = mean_pass(net, images[n : n + 1], fractions[n].item())
        torch.testing.assert_close(rows[n : n + 1], expected, rtol=1e-9, atol=1e-9)


def test_the_net_given_is_left_alone(family):
    plain, images = family
    plain.train()
    state, kinds = copy.deepcopy(plain.state_dict()), [type(module) for module in plain.modules()]
    net = nest(plain, images[:2], num_blocks=4)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(1.0)
    net(images)
    assert [type(module) for module in plain.modules()] == kinds
    assert all(module.training for module in plain.modules())
    assert not plain.state_dict().keys() ^ state.keys()
    assert all(torch.equal(value, state[name]) for name, value in plain.state_dict().items())


def test_statistics_and_modes_are_those_of_the_net_given():
    plain = Residual().train()
    plain.norm.eval()
    nn.init.uniform_(plain.norm.running_mean)
    net = nest(plain, torch.randn(2, 1, 4, 4))
    assert torch.equal(net.net.norm.plain.running_mean, plain.norm.running_mean)
    assert net.net.norm.plain.num_batches_tracked == 0
    assert (net.net.training, net.net.norm.plain.training) == (True, False)


def test_layers_that_are_added_share_a_width():
    net = nest(Residual(), torch.zeros(1, 1, 4, 4), num_blocks={"stem": 4})
    assert {name: width.num_units for name, width in net.widths.items()} == {"stem": 8, "inner": 4}
    assert {name: width.num_blocks for name, width in net.widths.items()} == {"stem": 4, "inner": 4}
    layers = net.layers
    assert layers["stem"].output_axis.widths == layers["outer"].output_axis.widths == [net.widths["stem"]]
    assert isinstance(net.net.norm, NestedNorm)
    assert layers["head"].output_axis.widths == []
    assert layers["stem"].input_axis.widths == []


def test_weights_given_are_the_starting_means():
    plain = mlp()
    net = nest(plain, X, init_scale=0.05)
    for name, layer in net.layers.items():
        for key in ("weight", "bias"):
            mean = layer.law(key, "posterior").mean
            assert torch.equal(mean, plain.get_submodule(name).get_parameter(key))
            assert mean.data_ptr() != plain.get_submodule(name).get_parameter(key).data_ptr()


def test_blocks_frozen_and_laws_by_group():
    law = OrderedMask(probs=torch.tensor([0.5, 0.25, 0.25]))
    net = nest(
        mlp(), X, num_blocks={"0": 4}, frozen={"0": 2}, width_prior={"0": law, "2": 0.3}, width_init=0.5, noise="gumbel"
    )
    first, second = net.widths.values()
    assert (first.num_blocks, first.frozen, second.num_blocks, second.frozen) == (4, 2, 6, 0)
    torch.testing.assert_close(first.prior.probs, law.probs)
    torch.testing.assert_close(second.prior.probs, OrderedMask.geometric(0.3, 6).probs)
    torch.testing.assert_close(first.law.probs, OrderedMask.geometric(0.5, 3).probs)
    assert first.noise == second.noise == "gumbel"
    assert (net.guide(X)["0.mask"][..., 0] == 1).all()
    with pytest.raises(ValueError, match="blocks from 2 to 4"):
        first.kept_blocks(1)
    assert nest(mlp(), X, num_blocks=7).widths["2"].num_blocks == 6


def test_priors_by_layer():
    own = {"weight": Laplace(0.0, 1.0), "bias": Normal(0.0, 2.0)}
    net = nest(mlp(), X, prior={"0": own, "4": None, "": Normal(0.0, 3.0)})
    first, middle, last = net.layers.values()
    assert (first.prior_of("weight"), first.prior_of("bias")) == (own["weight"], own["bias"])
    assert middle.prior_of("weight").scale == 3.0
    assert last.prior is None
    assert "4.weight" not in net.guide(X)
    default = nest(mlp(), X, prior={"0": Laplace(0.0, 1.0)}).layers["2"]
    assert default.prior_of("weight").scale.item() == pytest.approx((2 / 8) ** 0.5)
    both = nest(mlp(), X, prior=own)
    assert all(type(layer.prior_of("weight")) is Laplace for layer in both.layers.values())


def test_excluded_parts_stay_as_they_are():
    plain = nn.Sequential(mlp(), nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2))
    net = nest(plain, X, exclude=["0.2"])
    assert type(net.net[0][2]) is nn.Linear
    assert list(net.widths) == ["0.4", "1"]  # what goes in and out of it stays whole
    assert "0.2.weight" not in net.guide(X)
    assert "0.0.weight" in net.guide(X)


def test_a_net_without_hidden_channels_is_an_error():
    for plain in (nn.Linear(3, 2), nn.Sequential(nn.ReLU(), nn.Linear(3, 2))):
        with pytest.raises(ValueError, match="no channels of the net can be cut"):
            nest(plain, X)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_blocks": {"1": 4}}, r"`num_blocks` names \['1'\]; groups of the net: \['0', '2'\]"),
        ({"frozen": {"4": 1}}, r"`frozen` names \['4'\]"),
        ({"width_prior": {"x": 0.5}}, r"`width_prior` names \['x'\]"),
        ({"width_init": {"x": 0.5}}, r"`width_init` names \['x'\]"),
        ({"prior": {"1": Normal(0.0, 1.0)}}, r"`prior` names \['1'\]; layers of the net: \['0', '2', '4'\]"),
        ({"prior": "laplace"}, "`prior` must be 'normal', a law or None"),
        ({"num_blocks": 0}, "`num_blocks` must be an integer at least 1; got 0"),
        ({"num_blocks": True}, "`num_blocks` must be an integer at least 1; got True"),
        ({"num_blocks": {"2": 2.0}}, "Width '2': argument `num_blocks` must be an integer at least 1; got 2.0"),
        ({"frozen": "all"}, "`frozen` must be an integer from 0 to 8; got 'all'"),
        ({"frozen": 9}, "`frozen` must be an integer from 0 to 8; got 9"),
        ({"width_prior": OrderedMask.uniform(3)}, "`prior` must be an OrderedMask over 8 entries"),
        ({"exclude": ["zero"]}, "`exclude`: the net has no module 'zero'"),
        ({"temperature": 0.0}, "`temperature` must be finite and > 0"),
    ],
)
def test_what_does_not_fit_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        nest(mlp(), X, **arguments)


def test_numbers_may_be_of_numpy():
    net = nest(mlp(), X, num_blocks=np.int64(2), frozen={"0": np.int64(1)})
    assert [(width.num_blocks, width.frozen) for width in net.widths.values()] == [(2, 1), (2, 0)]


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # of what torch.compile imports
def test_a_compiled_net_is_to_be_nested_first():
    whole = torch.compile(mlp())
    with pytest.raises(
        ValueError, match=r"`net` must be the net itself; it is what torch.compile made of one. Nest first"
    ):
        nest(whole, X)
    with pytest.raises(ValueError, match=r"its part '0' is what torch.compile made of one"):
        nest(nn.Sequential(whole, nn.ReLU()), X)
    in_place = mlp()
    in_place.compile()  # which leaves the class what it is
    assert nest(in_place, X).widths


class WritesItsSize(nn.Module):
    def __init__(self, hidden):
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 8, 3), hidden

    def forward(self, x):
        return self.head(self.conv(x).view(-1, 32))


def test_channels_whose_number_is_written_down_are_not_cut(mean_pass):
    x = torch.randn(3, 1, 4, 4)
    with pytest.raises(ValueError, match=r"`conv`: `view` .* has fixed sizes \(write -1"):
        nest(WritesItsSize(nn.Linear(32, 2)), x)
    plain = WritesItsSize(nn.Sequential(nn.Linear(32, 6), nn.ReLU(), nn.Linear(6, 2)))
    net = nest(plain, x)
    assert list(net.widths) == ["head.0"]
    torch.testing.assert_close(mean_pass(net, x, 0.5, True), mean_pass(net, x, 0.5))


def test_a_prefix_goes_before_groups_and_not_before_layers():
    net = nest(mlp(), X, prefix="bnn.")
    assert isinstance(net.layers["0"], NestedLayer)
    assert list(net.laws) == ["bnn.0.mask", "bnn.2.mask"]


class Twice(nn.Module):
    """One layer under two names."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)
        self.middle = self.again = nn.Linear(8, 8)

    def forward(self, x):
        return self.last(self.again(self.middle(self.first(x).relu()).relu()).relu())


def test_a_layer_under_two_names_is_nested_and_narrowed_under_both():
    net = nest(Twice(), torch.zeros(1, 4), num_blocks=4)
    assert net.net.again is net.net.middle
    assert list(net.layers) == ["first", "last", "middle"]
    narrowed = narrow(net, 0.5)
    assert narrowed.again is narrowed.middle
    assert narrowed.middle.weight.shape == (4, 4)
    assert torch.equal(narrowed.middle.weight, net.net.middle.plain.weight[:4, :4])


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (torch.zeros(8), r"along its first dimension, \(N, ...\); got shape \(8,\): give `x\[None\]`"),
        (torch.zeros(0, 8), r"at least one example; got \(0, 8\)"),
        (torch.tensor(1.0), r"along its first dimension, \(N, ...\); got shape \(\): give"),
        (torch.tensor(1), r"along its first dimension, \(N, ...\); got shape \(\): give"),
    ],
)
def test_an_example_without_examples_is_refused(example, message):
    with pytest.raises(ValueError, match=message):
        nest(nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2)), example)


def test_examples_may_be_integers_one_each():
    net, ids = (
        nest(nn.Sequential(nn.Embedding(8, 4), nn.ReLU(), nn.Linear(4, 2)), torch.tensor([3, 7])),
        torch.arange(8),
    )
    assert {name: width.num_units for name, width in net.widths.items()} == {"0": 4}
    with torch.no_grad(), net.cut(0.5), net._drawn("posterior", 8, weights=False):
        torch.testing.assert_close(net.net(ids), narrow(net, 0.5)(ids))
