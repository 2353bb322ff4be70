"""Nets that nobody wrote down: nested, masked and narrowed."""

import re

import pytest
import torch
from hypothesis import assume, event, example, given
from hypothesis import strategies as st
from random_nets import build, nets, zeroed
from torch import nn

from pyro_vnd.nn import narrow, nest


def close(one, other):
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def masked(net, x, width, sliced=False):
    drawn = net._drawn("posterior", len(x), weights=False)
    with torch.no_grad(), net.cut(width, sliced=sliced), drawn:
        return net.net(x)


def kept_by(net, blocks):
    """Which outputs of layers are kept at numbers of blocks, by what a layer says, and which blocks are dropped."""
    units = {name: width.kept_units(blocks[name]) for name, width in net.widths.items()}

    def outputs(name):
        if name not in net.layers:
            return None
        axis = net.layers[name].output_axis
        index, kept = axis.index(units), torch.zeros(axis.size, dtype=torch.bool)
        kept[slice(None) if index is None else index] = True
        return kept

    dropped = {block.path for block in net.blocks if block.is_dropped(units)}
    return outputs, dropped.__contains__


def assert_explained(message, plain):
    """Without a word of torch's, a refusal names modules, unless it is of blocks and there are none."""
    names = set(re.findall(r"`([^`]*)`", message))
    assert message.startswith("nest: ")
    if "argument `depth` needs residual blocks" not in message:
        assert "no channels of the net can be cut" in message
        assert names <= {name for name, _ in plain.named_modules()}
        assert names


def nested(plain, x, depth, **options):
    """The nested net; without depth where there are no blocks."""
    try:
        return nest(plain, x, depth=depth, **options)
    except ValueError as error:
        event("refused: " + str(error).partition(":\n")[0][:60])
        assert_explained(str(error), plain)
        assume(depth)
        return nested(plain, x, False, **options)


def some_blocks(data, net, most=None):
    """Numbers of blocks by group, none above `most`."""
    return {
        name: data.draw(st.integers(width.always_kept, (most or {}).get(name, width.num_blocks)), label=name)
        for name, width in net.widths.items()
    }


@given(nets(), st.integers(1, 4), st.booleans(), st.sampled_from([None, "normal"]), st.data())
def test_narrowed_is_masked_is_zeroed(described, num_blocks, depth, prior, data):
    plain, x = build(*described)
    net = nested(plain, x, depth, num_blocks=num_blocks, prior=prior)
    blocks = some_blocks(data, net)
    with torch.no_grad():
        close(narrow(net, 1.0)(x), plain(x))
        small = narrow(net, blocks)
        expected = zeroed(plain, described[0], x, *kept_by(net, blocks))
        close(small(x), expected)
        close(masked(net, x, blocks), expected)
        close(masked(net, x, blocks, sliced=True), expected)
        if not any(isinstance(part, nn.Dropout) for part in plain.modules()):
            net.train()
            close(masked(net, x, blocks), narrow(net, blocks)(x))


A_NET_WITH_DROPOUT = [
    ["layer", 6],
    ["gate", [["dropout", 0.5], ["pool", "max"], ["norm", 1]]],
    ["layer", 1, 1, False],
    ["twice", [["dropout", 0.5], ["pool", "max"], ["norm", 1]]],
    *(["end", "flatten"], ["layer", 2]),
]


@given(nets(), st.booleans(), st.lists(st.sampled_from([0.01, 0.25, 0.5, 0.75, 1.0]), min_size=3, max_size=3))
@example(("image", 3, A_NET_WITH_DROPOUT, 3), False, [0.01, 0.01, 0.01])  # was taken to be no net that can be cut
def test_rows_are_as_narrow_as_each_is_told(described, depth, fractions):
    plain, x = build(*described)
    net = nested(plain, x, depth)
    with torch.no_grad(), net.cut(torch.tensor(fractions), rounding="nearest"):
        with net._drawn("posterior", len(x), weights=False):
            rows = net.net(x)
        for row, fraction in enumerate(fractions):
            close(rows[row], narrow(net, fraction, rounding="nearest")(x)[row])


@given(nets(), st.data())
def test_narrowing_twice_is_narrowing_once(described, data):
    plain, x = build(*described)
    net = nested(plain, x, False, num_blocks=3, prior=None)
    wide = some_blocks(data, net)
    fewer = some_blocks(data, net, wide)
    again = nested(narrow(net, wide), x, False, prior=None)
    # A single unit can be cut no more, and a convolution of a single group is one of groups no more.
    units = {
        name: [net.widths[name].kept_units(blocks[name]) for blocks in (fewer, wide)]
        for name in again.widths
        if name in wide
    }
    with torch.no_grad():
        close(narrow(again, {name: few / some for name, (few, some) in units.items()})(x), narrow(net, fewer)(x))


@given(nets(), st.booleans(), st.sampled_from([None, "normal"]), st.data())
def test_states_go_into_nets_of_the_same_making(described, depth, prior, data):
    (plain, x), (other, _) = build(*described), build(*described[:-1], described[-1] + 1)
    net, fresh = nested(plain, x, depth, prior=prior), nested(other, x, depth, prior=prior)
    blocks = some_blocks(data, net)
    with torch.no_grad():
        small, expected = narrow(fresh, blocks), narrow(net, blocks)(x)
        small.load_state_dict(narrow(net, blocks).state_dict())
        close(small(x), expected)
        fresh.load_state_dict(net.state_dict())
        close(narrow(fresh, blocks)(x), expected)
