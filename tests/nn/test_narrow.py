"""Physically smaller, plain nets."""

import copy
import pickle

import pytest
import torch
from torch import nn

from pyro_vnd.nn import narrow, nest

PLAIN = {
    "linear": (lambda: nn.Sequential(nn.Linear(5, 8), nn.PReLU(8), nn.Linear(8, 2)), (5,)),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(2, 8, 3), nn.GELU(), nn.Conv1d(8, 2, 2)), (2, 7)),
    "conv3d": (lambda: nn.Sequential(nn.Conv3d(1, 8, 2), nn.Tanh(), nn.Conv3d(8, 2, 2)), (1, 4, 4, 4)),
    "padded": (
        lambda: nn.Sequential(nn.Conv2d(2, 8, 3, padding=1, padding_mode="circular"), nn.ReLU(), nn.Conv2d(8, 2, 3)),
        (2, 6, 6),
    ),
    "transposed": (
        lambda: nn.Sequential(
            nn.ConvTranspose2d(2, 8, 3, stride=2, output_padding=1), nn.ReLU(), nn.ConvTranspose2d(8, 2, 2)
        ),
        (2, 4, 4),
    ),
    "depthwise": (
        lambda: nn.Sequential(nn.Conv2d(2, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.Sigmoid(), nn.Conv2d(8, 2, 1)),
        (2, 5, 5),
    ),
    "groups": (
        lambda: nn.Sequential(nn.Conv2d(2, 8, 1), nn.Conv2d(8, 16, 3, groups=4), nn.ReLU(), nn.Conv2d(16, 2, 1)),
        (2, 5, 5),
    ),
}
WIDTHS = [0.25, 0.5, 1.0]


def num_parameters(net) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


def assert_plain(net):
    for module in net.modules():
        for kind in type(module).__mro__:
            assert not kind.__module__.startswith("pyro"), kind
        for value in vars(module).values():
            assert not type(value).__module__.startswith("pyro"), value


def test_families_are_cut_to_plain_nets_with_the_same_outputs(family, mean_pass):
    plain, images = family
    net = nest(plain, images[:2], num_blocks=4).eval()
    sizes = []
    for width in WIDTHS:
        narrowed = narrow(net, width)
        assert_plain(narrowed)
        assert type(narrowed) is type(plain)
        for sliced in (False, True):
            torch.testing.assert_close(narrowed(images), mean_pass(net, images, width, sliced), rtol=1e-9, atol=1e-9)
        sizes.append(num_parameters(narrowed))
    assert sizes[0] < sizes[1] < sizes[2] == num_parameters(plain)
    torch.testing.assert_close(narrowed(images), plain(images), rtol=1e-9, atol=1e-9)


def test_float32_agrees_to_a_hundred_thousandth(family, mean_pass):
    plain, images = family[0].float(), family[1].float()
    net = nest(plain, images[:2], num_blocks=4).eval()
    for width in WIDTHS:
        torch.testing.assert_close(narrow(net, width)(images), mean_pass(net, images, width), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("build", "shape"), PLAIN.values(), ids=PLAIN)
def test_layers_of_each_kind(build, shape, mean_pass):
    plain, x = build(), torch.randn(3, *shape)
    net = nest(plain, x, num_blocks=4)
    for width in (*WIDTHS, 3):
        narrowed = narrow(net, width)
        assert_plain(narrowed)
        torch.testing.assert_close(narrowed(x), mean_pass(net, x, width), rtol=1e-10, atol=1e-10)
    draw = net.guide(x)
    assert not torch.allclose(narrow(net, 1.0, draw=draw)(x), plain(x))


def test_sizes_are_those_of_the_tensors(family):
    plain, images = family
    narrowed = narrow(nest(plain, images[:2], num_blocks=4), 0.5)
    for module in narrowed.modules():
        if isinstance(module, nn.Linear):
            assert (module.out_features, module.in_features) == module.weight.shape
        elif isinstance(module, nn.Conv2d):
            assert module.weight.shape[:2] == (module.out_channels, module.in_channels // module.groups)
        elif isinstance(module, nn.BatchNorm2d):
            assert module.weight.shape == module.running_var.shape == (module.num_features,)
        elif isinstance(module, nn.LayerNorm):
            assert module.weight.shape == module.normalized_shape


def test_a_narrowed_net_says_what_is_left_of_it(family):
    plain, images = family
    net = nest(plain, images[:2], num_blocks=4)
    narrowed = narrow(net, 0.5)
    assert list(narrowed.narrowed_to) == list(net.widths)
    lines = repr(narrowed).splitlines()
    for name, width in net.widths.items():
        left = {"blocks": 2, "num_blocks": 4, "units": width.kept_units(2), "num_units": width.num_units}
        assert narrowed.narrowed_to[name] == left
        assert f"  narrowed to {left['units']} of {width.num_units} units (2 of 4 blocks) of group {name}" in lines
    for again in (copy.deepcopy(narrowed), pickle.loads(pickle.dumps(narrowed))):
        assert again.narrowed_to == narrowed.narrowed_to
        assert repr(again).splitlines()[: 1 + len(net.widths)] == lines[: 1 + len(net.widths)]


def test_what_a_net_says_of_itself_stays():
    class Talkative(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(3, 8), nn.Linear(8, 2)

        def forward(self, x):
            return self.last(self.first(x).relu())

        def extra_repr(self):
            return "rectified"

    narrowed = narrow(nest(Talkative(), torch.zeros(1, 3), num_blocks=4), {})
    assert repr(narrowed).splitlines()[1:3] == [
        "  rectified",
        "  narrowed to 8 of 8 units (4 of 4 blocks) of group first",
    ]


def test_one_is_the_narrowest_net_and_one_point_zero_the_whole():
    net = nest(nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2)), torch.zeros(1, 4), num_blocks=4)
    for width, rounding, units in [
        (1, None, 4),
        (1.0, None, 16),
        (0.3, "nearest", 4),
        (0.3, "up", 8),
        (0.01, "down", 4),
    ]:
        narrowed = narrow(net, width, rounding=rounding)
        assert narrowed[0].out_features == narrowed.narrowed_to["0"]["units"] == units
    with pytest.raises(ValueError, match=r"width 0.3 .* near it are 0.25 \(1 of 4 blocks\) and 0.5 \(2 of 4 blocks\)"):
        narrow(net, 0.3)


def test_state_dict_goes_into_another_narrow_net_of_the_width(family):
    plain, images = family
    net = nest(plain, images[:2], num_blocks=4).eval()
    first = narrow(net, 0.5)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(0.9)
    second = narrow(net, 0.5)
    assert not torch.allclose(first(images), second(images))
    second.load_state_dict(first.state_dict())
    torch.testing.assert_close(first(images), second(images))


def test_a_narrowed_net_is_on_its_own(family):
    plain, images = family
    net = nest(plain, images[:2], num_blocks=4).eval()
    narrowed = narrow(net, 1.0)
    theirs = {p.untyped_storage().data_ptr() for p in (*net.parameters(), *net.buffers())}
    assert not theirs & {p.untyped_storage().data_ptr() for p in (*narrowed.parameters(), *narrowed.buffers())}
    assert all(p.requires_grad and p.is_leaf and p.is_contiguous() for p in narrowed.parameters())
    nn.functional.cross_entropy(narrowed(images), torch.arange(6)).backward()
    assert all(p.grad is not None for p in narrowed.parameters())
    assert not narrowed.training
    assert narrow(net.train(), 0.5).training


def test_frozen_parameters_stay_frozen():
    plain = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    plain[0].weight.requires_grad_(False)
    narrowed = narrow(nest(plain, torch.zeros(1, 3)), 0.5)
    assert [p.requires_grad for p in narrowed.parameters()] == [False, True, True, True]


def test_a_mapping_leaves_other_groups_whole():
    plain = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
    narrowed = narrow(nest(plain, torch.zeros(1, 3), frozen={"0": 3}), {"0": 0.125}, rounding="nearest")
    assert [tuple(narrowed[i].weight.shape) for i in (0, 2, 4)] == [(3, 3), (6, 3), (2, 6)]


def test_dropout_of_attention_follows_the_mode():
    class Attend(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 4, dropout=0.5, batch_first=True)
            self.last = nn.Linear(8, 2)

        def forward(self, x):
            return self.last(self.attention(x, x, x)[0])

    plain, x = Attend().train(), torch.randn(2, 3, 8)
    net = nest(plain, x)
    narrowed = narrow(net, 1.0)
    assert not torch.equal(narrowed(x), narrowed(x))
    torch.testing.assert_close(narrowed.eval()(x), plain.eval()(x))
    assert torch.equal(narrowed(x), narrowed(x))


def test_what_does_not_fit_is_named():
    x = torch.zeros(1, 3)
    plain = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    net = nest(plain, x)
    with pytest.raises(ValueError, match="`net` must be a NestedNet, as `nest` returns; got Sequential"):
        narrow(plain, 0.5)
    with pytest.raises(ValueError, match=r"fraction in \(0.0, 1.0\]"):
        narrow(net, 0.0)
    with pytest.raises(ValueError, match=r"groups of the net: \['0'\]"):
        narrow(net, {"2": 0.5})
    with pytest.raises(ValueError, match=r"width tensor\(\[1., 1., 1.\]\) is invalid for group '0': give a fraction"):
        narrow(net, torch.ones(3))
    with pytest.raises(ValueError, match=r"`draw` has no value for site '0\.weight'"):
        narrow(net, 0.5, draw={})
    with net.cut(0.5, sliced=True):
        draw = net.guide(x)
    with pytest.raises(ValueError, match=r"shape \(4, 3\) at site '0.weight'; expected \(8, 3\)"):
        narrow(net, 0.5, draw=draw)
