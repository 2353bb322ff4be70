"""What a nested net shows of itself."""

import copy

import pytest
import torch
from torch import nn

from models import nets
from pyro_vnd.diagnostics import net_cost
from pyro_vnd.nn import NestedLayer, NestedNet, Width, narrow, nest
from pyro_vnd.nn.table import multiply_adds, num_parameters

TABLE = """\
NestedNet(Sequential), one mask for each batch, prefix 'bnn.'
  group  units  blocks         mean blocks kept  mode  layers
  0      64     16 (2 frozen)  9                 2-16  0, 2
  2      32     8              1.666             1     2, 4
2,755 parameters: 11.1% at width 1/4, 31.5% at width 1/2, to the nearest block
2,656 multiply-adds: 10.5% at width 1/4, 30.7% at width 1/2, to the nearest block
whole: 4 (it reaches the net's output)"""


def mlp(**options):
    plain = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 3))
    return nest(plain, torch.zeros(2, 8), **options)


def test_the_table_of_a_small_net():
    net = mlp(num_blocks={"0": 16, "2": 8}, frozen={"0": 2}, width_init={"2": 0.4}, mask_per="batch", prefix="bnn.")
    assert repr(net) == TABLE
    assert "(0): NestedLayer(" in repr(net.net)
    assert repr(copy.deepcopy(net)) == TABLE


def test_the_table_in_a_notebook():
    html = mlp(num_blocks=8)._repr_html_()
    assert html.count("<tr>") == 3
    assert "<td>64</td><td>8</td><td>4.5</td>" in html
    assert "it reaches the net&#x27;s output" in html


@pytest.mark.parametrize("width", [0.25, 0.5, 1.0])
def test_costs_are_those_of_the_narrowed_net(family, width):
    plain, images = family
    net = nest(plain, images[:2], num_blocks=4)
    kept = {name: each.kept_units(width) for name, each in net.widths.items()}
    cost = net_cost(narrow(net, width), images[:1])
    assert num_parameters(net, kept) == cost["parameters"]
    assert multiply_adds(net, kept) == cost["multiply_adds"]  # neither has the fused products of attention


def test_a_net_put_together_by_hand_has_no_multiply_adds():
    width = Width("hidden", 8, 4)
    layers = NestedLayer(nn.Linear(2, 8), outputs=width), nn.ReLU(), NestedLayer(nn.Linear(8, 1), inputs=width)
    lines = repr(NestedNet(nn.Sequential(*layers))).splitlines()
    assert lines[2].split() == ["hidden", "8", "4", "2.5", "1-4", "0,", "2"]
    assert lines[3:] == ["33 parameters: 27.3% at width 1/4, 51.5% at width 1/2, to the nearest block"]


def test_reasons_and_long_lists_are_shown():
    net = nest(nets.resnet18(1, base=8), torch.zeros(2, 1, 16, 16), num_blocks=8)
    assert " and 4 more" in repr(net)
    assert net.whole == {"13": "it reaches the net's output"}
    frozen = nest(nn.Sequential(nn.Linear(3, 1), nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 2)), torch.zeros(1, 3))
    assert "whole: 0 (no cut fits all the layers that share it)" in repr(frozen).splitlines()
