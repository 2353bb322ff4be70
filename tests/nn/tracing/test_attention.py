"""Attention in parts computes what torch's does, in all the ways in which that can be called."""

import pytest
import torch
from torch import nn

from pyro_vnd.nn.tracing.attention import Attention, as_graph

SIZE, HEADS, ROWS, QUERIES, KEYS = 12, 3, 2, 4, 5
PADDING = torch.tensor([[0, 0, 0, 1, 1], [0, 0, 0, 0, 1]]).bool()
NETS = {
    "plain": {},
    "no bias": {"bias": False},
    "other sizes": {"kdim": 7, "vdim": 10},
    "other sizes, no bias": {"kdim": 7, "vdim": 10, "bias": False},
    "time first": {"batch_first": False},
}
CALLS = {
    "plain": {},
    "without weights": {"need_weights": False},
    "weights of heads": {"average_attn_weights": False},
    "padding": {"key_padding_mask": PADDING},
    "mask": {"attn_mask": torch.ones(QUERIES, KEYS).triu(1).bool()},
    "mask by head, padding": {
        "attn_mask": torch.randn(ROWS * HEADS, QUERIES, KEYS).double(),
        "key_padding_mask": PADDING,
    },
}


def build(**options):
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(SIZE, HEADS, **{"batch_first": True} | options).eval()
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=0.5)
    return attention


def inputs(attention, rows=(ROWS,)):
    sizes = (QUERIES, SIZE), (KEYS, attention.kdim), (KEYS, attention.vdim)
    given = [torch.randn(*rows, *size) for size in sizes]
    return given if attention.batch_first or not rows else [x.transpose(0, 1) for x in given]


def agree(found, expected):
    torch.testing.assert_close(found[0], expected[0])
    assert (found[1] is None) == (expected[1] is None)
    if expected[1] is not None:
        torch.testing.assert_close(found[1], expected[1])


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask and attn_mask")
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("options", NETS.values(), ids=NETS)
def test_it_is_torchs(options, call):
    attention = build(**options)
    parts, given = Attention(attention), inputs(attention)
    expected = attention(*given, **call)
    agree(parts(*given, **call), expected)
    agree(as_graph(parts)(*given, **call), expected)


@pytest.mark.parametrize("call", [{}, {"key_padding_mask": PADDING[0]}, {"need_weights": False}])
@pytest.mark.parametrize("batch_first", [True, False])
def test_one_example_without_an_axis_of_its_own(batch_first, call):
    attention = build(batch_first=batch_first)
    parts, given = Attention(attention), inputs(attention, rows=())
    expected = attention(*given, **call)
    assert expected[0].shape == (QUERIES, SIZE)
    agree(parts(*given, **call), expected)
    agree(as_graph(parts)(*given, **call), expected)


def test_a_hint_without_a_mask_is_an_error_as_in_torch():
    attention = build()
    for part in (attention, Attention(attention)):
        with pytest.raises(RuntimeError, match="Need attn_mask if specifying the is_causal hint"):
            part(*inputs(attention), is_causal=True)
