"""What stays whole, what cannot be followed, and that the net stays as it was."""

import copy

import pytest
import torch
from channel_nets import Net, conv, lenet, mlp, resnet, vgg
from torch import nn
from torch.nn import functional as F

from pyro_vnd.nn.tracing import channel_groups
from pyro_vnd.nn.tracing.call import rule


def put(x, index, value):
    x = x.clone()
    x[index] = value
    return x


def channels_last(x):
    return x.flatten(2).transpose(1, 2)


def normed(x):
    x = channels_last(x)
    return F.layer_norm(x, x.shape[-1:])


@pytest.mark.filterwarnings("ignore:Implicit dimension choice for softmax")
@pytest.mark.parametrize(
    ("body", "why"),
    [
        (lambda net, x: net.b(net.a(x).view(-1, 36)), "fixed sizes"),
        (lambda net, x: net.b(net.a(x).view(-1, 4, 9).flatten(1)), "fixed sizes"),
        (lambda net, x: net.b(net.a(x).softmax(1).flatten(1)), "mixes channels"),
        (lambda net, x: net.b((net.a(x) + torch.ones(4, 1, 1)).flatten(1)), "cannot be cut"),
        (lambda net, x: net.b((net.a(x) - net.a(x).mean(1, keepdim=True)).flatten(1)), "reduces over"),
        (lambda net, x: net.b((net.a(x) + x.expand(-1, 4, -1, -1)).flatten(1)), "cannot be cut"),
        (lambda net, x: net.b(net.a(x)[:, [1, 0, 2, 3]].flatten(1)), "out of order"),
        (lambda net, x: net.b((net.a(x) / net.a(x).shape[1]).flatten(1)), "number of channels"),
        (lambda net, x: net.b(net.a(x).flatten(2).transpose(1, 2).cumsum(-1).flatten(1)), "mixes channels"),
        (lambda net, x: net.b((net.a(x).flatten(2) @ torch.eye(9)).flatten(1) @ torch.eye(36)), "sums over channels"),
        (lambda net, x: net.b(F.pad(net.a(x)[:, :, 1:], (0, 0, 1, 0, 1, -1)).flatten(1)), "pads channels"),
        (lambda net, x: net.b(F.softmax(net.a(x)).flatten(1)), "mixes channels"),
        (lambda net, x: net.b(net.a(x).flatten(2).tril().flatten(1)), "takes positions"),
        (lambda net, x: net.b(F.glu(torch.cat([net.a(x)] * 3, 1), 1)[:, :4].flatten(1)), "takes channels apart"),
        (
            lambda net, x: net.b(net.a(x).flatten(1) + torch.zeros(len(x), 9 * net.a(x).shape[1] + 1)[:, :-1]),
            "number of channels",
        ),
        (lambda net, x: net.b(torch.cdist(channels_last(net.a(x)), torch.ones(4, 4)).flatten(1)), "sums over channels"),
        (
            lambda net, x: net.b(
                torch.baddbmm(torch.ones(1), channels_last(net.a(x)), torch.ones(len(x), 4, 4)).flatten(1)
            ),
            "sums over channels",
        ),
        (lambda net, x: net.b(F.layer_norm(net.a(x), (4, 3, 3)).flatten(1)), "normalises over several axes"),
        (lambda net, x: net.b(F.layer_norm(channels_last(net.a(x)), (4,)).flatten(1)), "has a fixed size"),
        (lambda net, x: net.b(normed(net.a(x)).flatten(1)), "normalises over channels, without a weight"),
        (lambda net, x: net.b(F.group_norm(net.a(x), 2).flatten(1)), "has a fixed number of groups"),
        (
            lambda net, x: net.b(put(torch.zeros(len(x), 4, 3, 3), ..., net.a(x)).flatten(1)),
            "puts it where nothing can be",
        ),
        (
            lambda net, x: net.b(put(net.a(x), (slice(None), slice(None), 0), x[:, :, 0]).flatten(1)),
            "puts there what ca",
        ),
        (lambda net, x: net.b(put(net.a(x), (slice(None), [3, 0, 2, 1]), net.a(x)).flatten(1)), "cannot be followed"),
        (
            lambda net, x: net.b(put(channels_last(net.a(x)), x.flatten(1) > 0, torch.ones(4)).flatten(1)),
            "cannot be followed",
        ),
        (lambda net, x: net.b(put(channels_last(net.a(x)), x.flatten(1) > 0, 0.0).flatten(1)), "no cut fits all"),
    ],
)
def test_what_leaves_channels_whole(body, why):
    net = Net(lambda net, x: net.c(torch.relu(body(net, x))), a=conv(1, 4), b=nn.Linear(36, 5), c=nn.Linear(5, 2))
    groups = channel_groups(net, torch.randn(2, 1, 3, 3))
    assert groups.names == ("b",)
    assert why in groups.whole["a"]


def test_one_channel_in_the_batch_does_not_hide_the_axis():
    net, x = lenet()
    assert channel_groups(net, x[:1]) == channel_groups(net, x)


def test_layers_that_share_weights_are_cut_alike():
    def build(tie):
        net = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.Linear(6, 2))
        if tie:
            net[4].weight = net[2].weight
        return net

    assert channel_groups(build(False), torch.randn(2, 3)).names == ("0", "2", "4")
    groups = channel_groups(build(True), torch.randn(2, 3))
    assert groups.names == ("0",)
    assert groups.parameters["2.weight"] == {0: (("0", 6),), 1: (("0", 6),)}


def test_weights_that_the_net_sums_over_stay_whole():
    layers = {"a": nn.Linear(3, 6), "b": nn.Linear(6, 5), "c": nn.Linear(5, 2)}
    net = Net(lambda net, x: net.c(net.b(net.a(x)).relu()) + net.a.bias.sum(), **layers)
    groups = channel_groups(net, torch.randn(2, 3))
    assert groups.names == ("b",)
    assert groups.whole["a"] == "`sum` in the forward of the net reduces over channels"


def test_arguments_left_out_keep_their_defaults():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 6), nn.Linear(6, 2)

        def forward(self, x, mask=None, *, scale=1.0):
            h = self.a(x) * scale
            if mask is not None:
                h = h * mask
            return self.b(h)

    x = torch.randn(2, 3)
    assert channel_groups(Masked(), x).names == ("a",)
    with pytest.raises(ValueError, match=r"`a`: `mul`.* cannot be cut"):
        channel_groups(Masked(), (x, torch.ones(6)))


def test_any_number_of_arguments():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 6), nn.Linear(6, 2)

        def forward(self, first, *others, **options):
            return self.b(sum((self.a(x) for x in others), self.a(first)).relu())

    x = torch.randn(2, 3)
    for count in (1, 3):
        assert channel_groups(Sum(), (x,) * count).names == ("a",)
    with pytest.raises(
        ValueError, match="nest: `example_input` does not fit the arguments of Sequential: too many positional"
    ):
        channel_groups(mlp()[0], (x, x))


def test_a_new_rule_takes_three_lines():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x):
            return torch.fft.ifft(torch.fft.fft(x)).real * self.scale

    net, x = around(Scale()), torch.randn(2, 3)
    assert channel_groups(net, x).names == ("b",)

    @rule(Scale)
    def same(call):
        return call.axes()

    assert channel_groups(net, x).names == ("a", "b")


def test_net_is_left_as_it_was():
    net, x = vgg()
    net.train()
    net[1].eval()
    before, flags = copy.deepcopy(net.state_dict()), [module.training for module in net.modules()]
    attributes, random_state, original = set(vars(net)), torch.get_rng_state(), x.clone()
    channel_groups(nn.Sequential(nn.ReLU(inplace=True), net, Net(lambda net, x: F.dropout(x) + torch.ones(1))), x)
    torch.testing.assert_close(net.state_dict(), before, atol=0, rtol=0)
    assert flags == [module.training for module in net.modules()]
    assert set(vars(net)) == attributes
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.equal(x, original)


def test_constants_of_the_trace_are_removed():
    net = Net(lambda net, x: net.b(net.a(x)) + torch.arange(2), a=nn.Linear(3, 4), b=nn.Linear(4, 2))
    before = dict(vars(net))
    channel_groups(net, torch.randn(2, 3))
    assert vars(net) == before


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(6, 6)

    def forward(self, x):
        return self.gru(x)[0]


def around(part):
    layers = {"part": part, "b": nn.Linear(6, 5), "c": nn.Linear(5, 2)}
    return Net(lambda net, x: net.c(net.b(net.part(net.a(x))).tanh()), a=nn.Linear(3, 6), **layers)


@pytest.mark.parametrize(
    ("part", "culprit", "message"),
    [
        (Recurrent, "part.gru", "`gru` in `part.gru`"),
        (lambda: Net(lambda net, x: torch.linalg.pinv(x).T + x), "part", "`linalg_pinv` in `part`"),
        (lambda: Net(lambda net, x: x * (x @ torch.ones(6)).unsqueeze(-1)), "part", "`matmul` in `part`"),
        (lambda: Net(lambda net, x: x.unsqueeze_(0).squeeze_(0)), "part", "`unsqueeze` in `part`"),
        (lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6)), "part.parametrizations.weight.0", "`mv` in"),
    ],
)
def test_what_cannot_be_followed_is_named_stays_whole_and_can_be_excluded(part, culprit, message):
    net, x = around(part()), torch.randn(6, 3)
    groups = channel_groups(net, x)
    assert groups.unfollowed[culprit].startswith(message)
    for found in (groups, channel_groups(net, x, exclude=["part"])):
        assert found.names == ("b",)
        assert [name for name in found.layers if "." not in name] == ["a", "b", "c"]
        assert "a" in found.whole
    assert not found.unfollowed
    assert "is excluded" in found.whole["a"]


def test_what_the_net_does_may_depend_on_the_data():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x):
            return self.layer(x) if x.mean() > -1e9 else x

    assert channel_groups(around(Branching()), torch.randn(2, 3)).names == ("part.layer", "b")


@pytest.mark.parametrize(
    ("body", "whole"),
    [
        (lambda net, x: torch.cat([net.a(x), net.b(x)], 1) + torch.cat([net.b(x), net.a(x)], 1), "ab"),
        (lambda net, x: net.conv(x[:, None, None]).flatten(1)[:, :8] + torch.cat([net.a(x), net.b(x)], 1), "ab"),
    ],
)
def test_sums_of_channels_of_different_make_up_stay_whole(body, whole):
    layers = {"a": nn.Linear(4, 5), "b": nn.Linear(4, 3), "conv": nn.Conv2d(1, 4, 1), "c": nn.Linear(8, 6)}
    net = Net(lambda net, x: net.d(net.c(body(net, x)).relu()), **layers, d=nn.Linear(6, 2))
    groups = channel_groups(net, torch.randn(2, 4))
    assert groups.names == ("c",)
    assert all("combines channels of different make-up" in groups.whole[name] for name in whole)


def test_channels_of_two_layers_that_meet_in_a_group_stay_whole():
    def forward(net, x):
        return net.d(net.c(torch.cat([net.a(x), net.b(x)], 1)))

    net = Net(forward, a=conv(3, 5), b=conv(3, 3), c=conv(8, 8, groups=4), d=conv(8, 2))
    with pytest.raises(ValueError, match="`a`: `Conv2d` in `c` has groups in which channels of several layers meet"):
        channel_groups(net, torch.randn(2, 3, 4, 4))


def test_a_table_whose_rows_are_rescaled_cannot_be_followed():
    for table in (nn.Embedding(9, 6, max_norm=1.0), nn.EmbeddingBag(9, 6, max_norm=1.0)):
        layers = {"a": table, "b": nn.Linear(6, 5), "c": nn.Linear(5, 2)}
        net = Net(lambda net, x: net.c(net.b(net.a(x)).relu()), **layers)
        groups = channel_groups(net, torch.randint(9, (2, 3)))
        assert groups.names == ("b",)
        assert groups.unfollowed == {"a": f"`{type(table).__name__}` in `a`"}


def test_a_table_that_a_function_rescales_cannot_be_followed():
    layers = {"a": nn.Embedding(9, 6), "b": nn.Linear(6, 5), "c": nn.Linear(5, 2)}
    net = Net(lambda net, x: net.c(net.b(F.embedding(x, net.a.weight, max_norm=1.0)).relu()), **layers)
    groups = channel_groups(net, torch.randint(9, (2, 3)))
    assert groups.names == ("b",)
    assert groups.unfollowed == {"": "`embedding` in the forward of the net"}


def test_layers_of_an_excluded_module_are_left_alone():
    net, x = resnet()
    groups = channel_groups(net, x, exclude=["blocks.2", "blocks.3.conv1"])
    assert groups.names == ("blocks.0.conv1", "blocks.1.conv1")  # the second stage adds to what is excluded
    assert not any(name.startswith("blocks.2") for name in groups.layers)


def test_bad_arguments():
    net, x = mlp()
    with pytest.raises(
        ValueError, match=r"nest: argument `exclude`: the net has no module 'block.2'; close are \['blocks.2'"
    ):
        channel_groups(resnet()[0], x, exclude=["block.2"])
    with pytest.raises(ValueError, match="nest: argument `exclude` must be a list of names; got the string '0'"):
        channel_groups(net, x, exclude="0")
    with pytest.raises(
        ValueError, match="nest: argument `example_input` must be a tensor or a tuple with one; got list"
    ):
        channel_groups(net, [x])
    with pytest.raises(ValueError, match=r"nest: run the net once before; `weight` has no shape yet"):
        channel_groups(nn.LazyLinear(3), x)


def test_a_net_that_has_nothing_to_cut_says_why():
    net = nn.Sequential(nn.Linear(3, 1), nn.Linear(1, 4), nn.Softmax(-1), nn.Linear(4, 2))
    with pytest.raises(ValueError, match="nest: no channels of the net can be cut") as caught:
        channel_groups(net, torch.randn(2, 3))
    lines = str(caught.value).splitlines()[1:]
    assert [line.split(":")[0] for line in lines] == ["- `0`", "- `1`", "- `3`"]
    assert "`Softmax`" in lines[1]
    assert "the net's output" in lines[2]
