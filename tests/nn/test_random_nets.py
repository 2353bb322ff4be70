"""Nets that nobody wrote down: nested, masked and narrowed."""

import re
from itertools import cycle

import pytest
import torch
from hypothesis import assume, event, example, given
from hypothesis import strategies as st
from random_nets import build, nets, zeroed
from torch import nn

from pyro_vnd.nn import narrow, nest

# Where the grammar has no net that can be cut: groups of norms and convolutions without a common divisor, and the like.
REASONS = (
    "no cut fits all the layers that share it|it reaches the net's output|channels of different make-up|"
    "with what cannot be cut|has groups in which channels of several layers meet|is used again on other channels"
)
shares = st.lists(st.floats(0, 1), min_size=4, max_size=4)  # of blocks, one group after the other, and again

SPLIT_BEHIND_A_SPLIT = [  # blocks whose channels are known only when those before them are
    *(["layer", 2], ["cat", [["act", "ReLU"]]], ["stage", 2, [["act", "ReLU"]]], ["end", "flatten"], ["layer", 2])
]
ONE_NUMBER_TO_NORM = [["layer", 5], ["norm", 2], ["end", "mean"], ["layer", 2]]  # of a row, if a single unit is left
RANDOM_IN_TRAINING = [
    ["layer", 6],
    ["gate", [["dropout", 0.5], ["pool", "max"], ["norm", 1]]],
    ["layer", 1, 1, False],
    ["twice", [["dropout", 0.5], ["pool", "max"], ["norm", 1]]],
    *(["end", "flatten"], ["layer", 2]),
]


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


def nested(plain, x, depth=False, **options):
    """The nested net; without depth where there are no blocks. What is refused is said, with modules and reasons."""
    try:
        return nest(plain, x, depth=depth, **options)
    except ValueError as error:
        message, *lines = str(error).splitlines()
        event("refused: " + message[:60])
        if message.startswith("nest: argument `depth` needs residual blocks"):
            return nested(plain, x, **options)
        assert message == "nest: no channels of the net can be cut:"
        for line in lines:
            name, reason = re.fullmatch(r"- `([^`]*)(?:\[\d+\])?`: (.*)", line).groups()
            assert isinstance(plain.get_submodule(name), nn.Linear | nn.Conv1d | nn.Conv2d)
            assert re.search(REASONS, reason), reason
        assume(False)


def some_blocks(net, shares, most=None):
    """Numbers of blocks by group, none above `most`."""
    return {
        name: width.always_kept + round(share * ((most or {}).get(name, width.num_blocks) - width.always_kept))
        for (name, width), share in zip(net.widths.items(), cycle(shares), strict=False)
    }


@given(nets(), st.integers(1, 4), st.booleans(), st.sampled_from([None, "normal"]), shares)
@example(("tokens", 1, SPLIT_BEHIND_A_SPLIT, 0), 2, False, None, [0.0])
@example(("rows", 1, ONE_NUMBER_TO_NORM, 0), 5, False, None, [0.0])
@example(("rows", 1, [["layer", 2], *ONE_NUMBER_TO_NORM[1:]], 0), 2, False, None, [0.0])
def test_narrowed_is_masked_is_zeroed(described, num_blocks, depth, prior, shares):
    plain, x = build(*described)
    net = nested(plain, x, depth, num_blocks=num_blocks, prior=prior)
    blocks = some_blocks(net, shares)
    with torch.no_grad():
        close(narrow(net, 1.0)(x), plain(x))
        expected = zeroed(plain, described[0], x, *kept_by(net, blocks))
        close(narrow(net, blocks)(x), expected)
        close(masked(net, x, blocks), expected)
        close(masked(net, x, blocks, sliced=True), expected)
        if not any(isinstance(part, nn.Dropout) for part in plain.modules()):
            net.train()
            close(masked(net, x, blocks), narrow(net, blocks)(x))


@given(nets(), st.booleans(), st.lists(st.sampled_from([0.01, 0.25, 0.5, 0.75, 1.0]), min_size=3, max_size=3))
@example(("image", 3, RANDOM_IN_TRAINING, 3), False, [0.01, 0.01, 0.01])
def test_rows_are_as_narrow_as_each_is_told(described, depth, fractions):
    plain, x = build(*described)
    net = nested(plain, x, depth)
    with torch.no_grad(), net.cut(torch.tensor(fractions), rounding="nearest"):
        with net._drawn("posterior", len(x), weights=False):
            rows = net.net(x)
        for row, fraction in enumerate(fractions):
            close(rows[row], narrow(net, fraction, rounding="nearest")(x)[row])


@given(nets(), shares, shares)
def test_narrowing_twice_is_narrowing_once(described, first, second):
    plain, x = build(*described)
    net = nested(plain, x, num_blocks=3, prior=None)
    wide = some_blocks(net, first)
    fewer = some_blocks(net, second, wide)
    again = nested(narrow(net, wide), x, prior=None)
    # A single unit can be cut no more, and a convolution of a single group is one of groups no more.
    units = {name: [net.widths[name].kept_units(blocks[name]) for blocks in (fewer, wide)] for name in wide}
    some = {name: few / many for name, (few, many) in units.items() if name in again.widths}
    with torch.no_grad():
        close(narrow(again, some)(x), narrow(net, fewer)(x))


@given(nets(), st.booleans(), st.sampled_from([None, "normal"]), shares)
def test_states_go_into_nets_of_the_same_making(described, depth, prior, shares):
    (plain, x), (other, _) = build(*described), build(*described[:-1], described[-1] + 1)
    net, fresh = nested(plain, x, depth, prior=prior), nested(other, x, depth, prior=prior)
    blocks = some_blocks(net, shares)
    with torch.no_grad():
        small, expected = narrow(fresh, blocks), narrow(net, blocks)(x)
        small.load_state_dict(narrow(net, blocks).state_dict())
        close(small(x), expected)
        fresh.load_state_dict(net.state_dict())
        close(narrow(fresh, blocks)(x), expected)


def test_power():
    """Units that are kept in place of others, or a unit more or less, make a difference."""
    plain, x = build("image", 2, [["layer", 6], ["norm", 0], ["act", "Sigmoid"], ["end", "flatten"], ["layer", 2]])
    net = nested(plain, x)
    with torch.no_grad():
        close(narrow(net, 3)(x), zeroed(plain, "image", x, *kept_by(net, {"0": 3})))
        last = torch.tensor([False, False, False, True, True, True])
        wrong = [kept_by(net, {"0": 4})[0], {"0": last}.get]
        for outputs in wrong:
            with pytest.raises(AssertionError):
                close(narrow(net, 3)(x), zeroed(plain, "image", x, outputs, lambda name: False))
