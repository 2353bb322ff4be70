"""What the check of a nested net finds, and what nest takes for it."""

import cProfile
import gc
import pstats

import pytest
import torch
from torch import Tensor, nn
from written_nets import Block, FusedAttention, Net

from pyro_vnd.nn import nest
from pyro_vnd.nn.checking import Misfit, check_and_count


class Seen(nn.Module):
    """Notes the rows of what it is given, and how many tensors of that size there are."""

    rows: list[int]
    tensors: list[int]

    def forward(self, x):
        Seen.rows.append(len(x))
        Seen.tensors.append(sum(type(each) is Tensor and each.shape == x.shape for each in gc.get_objects()))
        return x


@pytest.fixture(autouse=True)
def forget_what_was_seen():
    Seen.rows, Seen.tensors = [], []


def perceptron(layers, *last):
    hidden = [part for _ in range(layers) for part in (nn.Linear(8, 8), nn.ReLU())]
    return nn.Sequential(*hidden, *last, nn.Linear(8, 3))


class Dropping(nn.Module):
    """Dropout as a function."""

    def forward(self, x):
        return nn.functional.dropout(x, 0.1, self.training)


@pytest.mark.parametrize("dropout", [nn.Dropout(0.3), Dropping()], ids=["layer", "function"])
@pytest.mark.parametrize("make", [torch.zeros, torch.randn])
def test_what_dropout_drops_is_no_misfit(make, dropout):
    """Of a small net it drops something or nothing by chance."""
    for width in range(4, 16):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.ReLU(), dropout, nn.Linear(width, 2))
        assert nest(net, make(2, 3)).widths.keys() == {"0"}


class Swapped(nn.Module):
    """In training, channels in another order: those that are kept are others when the net is cut."""

    def forward(self, x):
        return x.flip(-1) if self.training else x


def test_dropout_hides_no_misfit():
    with pytest.raises(ValueError, match="nest"):
        nest(nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Dropout(0.1), Swapped(), nn.Linear(6, 2)), torch.randn(2, 3))


@pytest.mark.parametrize(("examples", "rows"), [(1, [2, 1, 2, 1, 1, 1]), (2, [3, 1, 2, 1, 1, 1])])
def test_a_net_is_run_six_times_on_few_rows(examples, rows):
    nest(perceptron(2, Seen()), torch.randn(examples, 8))
    assert Seen.rows == rows


def test_a_net_that_does_something_else_in_training_mode_is_run_on_more():
    def forward(net, x):
        x = net.a(net.seen(x)).relu()
        return net.b(x * 2 if net.training else x)

    nest(Net(forward, seen=Seen(), a=nn.Linear(8, 16), b=nn.Linear(16, 3)), torch.randn(2, 8))
    assert Seen.rows == [3, 1, 3, 2, 1, 2, 2]


def test_what_is_computed_on_the_way_is_not_kept():
    nest(perceptron(20, Seen()), torch.randn(2, 5, 8))
    assert max(Seen.tensors) <= 4


def attention_blocks(layers):
    blocks = [Block(8, FusedAttention(8, 2)) for _ in range(layers // 4)]
    return nn.Sequential(nn.Linear(8, 8), nn.Unflatten(1, (1, 8)), *blocks, nn.Linear(8, 3))


@pytest.mark.parametrize("build", [perceptron, attention_blocks])
def test_calls_grow_with_the_number_of_layers(build):
    def calls(layers):
        net, profile = build(layers), cProfile.Profile()
        profile.runcall(nest, net, torch.randn(2, 8))
        return pstats.Stats(profile).total_calls

    calls(10)  # what is set up once
    few, more, many = (calls(layers) for layers in (20, 40, 80))
    assert many - more < 1.05 * 2 * (more - few)


def test_tensors_are_kept_where_a_rule_cannot_follow():
    """Rows are known behind an operation that no rule follows in this form: it is run again with rows turned around."""

    def forward(net, x):
        x = torch.einsum("...i->...i", net.a(net.seen(x)).relu())
        return net.c(net.b(x).relu())

    plain = Net(forward, seen=Seen(), a=nn.Linear(8, 16), b=nn.Linear(16, 12), c=nn.Linear(12, 3))
    with pytest.warns(UserWarning, match="`einsum` in the forward of the net"):
        net = nest(plain, torch.randn(2, 8))
    assert list(net.widths) == ["b"]
    assert Seen.rows[:4] == [3, 1, 3, 1]


@pytest.mark.parametrize("of_rows", [lambda x: x.mean(0, keepdim=True), lambda x: x.amax(0, keepdim=True)])
def test_rows_that_are_compared_with_each_other_are_refused(of_rows):
    def forward(net, x):
        x = net.b(net.a(x).relu())
        return x - of_rows(x)

    plain, x = Net(forward, a=nn.Linear(8, 16), b=nn.Linear(16, 4)), torch.randn(4, 8)
    with pytest.raises(Misfit, match="rows of different widths disturb each other"):
        nest(plain, x)


@pytest.mark.parametrize("of_whole", ["the net's", "other", "none"])
def test_what_depends_on_channels_that_are_cut_is_found_whatever_the_whole_net_returned(of_whole):
    plain, x = perceptron(2), torch.randn(2, 8)
    net = nest(plain, x)
    whole = {"the net's": [plain(x)], "other": [plain(x) + 1], "none": []}[of_whole]
    assert check_and_count(net, (x,), True, whole, one_row_trains=True) == dict.fromkeys(net.layers, 1)
    net.layers["2"].register_forward_hook(lambda layer, given, out: out * out.shape[-1])
    with pytest.raises(Misfit, match="`2` is the first layer that differs"):
        check_and_count(net, (x,), True, whole, one_row_trains=True)


def test_wide_rows_must_be_those_of_the_net_given():
    """Where they are not, rows of one width are compared with each other."""
    plain, x = perceptron(2, Seen()), torch.randn(2, 8)
    net = nest(plain, x)
    Seen.rows.clear()
    check_and_count(net, (x,), False, [plain(x)])
    of_the_net = list(Seen.rows)
    Seen.rows.clear()
    check_and_count(net, (x,), False, [plain(x) * torch.tensor([[1.0], [1.1]])])
    assert len(Seen.rows) > len(of_the_net)
