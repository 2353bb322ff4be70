"""The GPT sees what came before and nothing else; parts of the text do not meet."""

import random
from collections import Counter
from itertools import pairwise

import pytest
import torch
from torch import nn

from models.language import GPT, NUM_SYMBOLS, split_text, topics, windows
from pyro_vnd.nn import narrow, nest


def small(**options):
    torch.manual_seed(0)
    return GPT(**{"context": 12, "dim": 16, "depth": 2, "heads": 4} | options).eval()


def test_a_symbol_changes_what_is_said_from_there_on_and_nothing_before():
    net, x = small(), torch.arange(12).unsqueeze(0)
    changed = x.clone()
    changed[0, 5] = 99
    before, after = net(x), net(changed)
    assert torch.equal(before[:, :5], after[:, :5])
    assert ((before - after).abs().amax(-1) > 0)[:, 5:].all()


def test_places_are_told_apart():
    net = small()
    logits = net(torch.zeros(1, 12, dtype=torch.long))
    assert (logits[:, 1:] - logits[:, :1]).abs().amax(-1).min() > 1e-6


def test_a_tied_head_is_the_embedding():
    tied, free = small(tied=True), small()
    assert tied.head.weight is tied.symbols.weight
    assert sum(p.numel() for p in free.parameters()) - sum(p.numel() for p in tied.parameters()) == NUM_SYMBOLS * 16


@pytest.mark.parametrize("tied", [False, True])
def test_it_nests_as_it_is_written(tied):
    """Residual stream, heads and feed-forward layers are cut, and a narrowed net is a smaller GPT."""
    x = torch.randint(NUM_SYMBOLS, (3, 12))
    net = nest(small(tied=tied), x[:1], num_blocks=4, strict=True)
    assert [width.num_units for width in net.widths.values()] == [16, 4, 64, 4, 64]
    narrowed = narrow(net, 0.5).eval()
    plain = small(dim=8, heads=2, tied=tied)
    plain.load_state_dict(narrowed.state_dict())
    torch.testing.assert_close(plain(x), narrowed(x))
    assert {type(module) for module in narrowed.modules()} <= {type(module) for module in plain.modules()}
    assert isinstance(narrowed.head, nn.Linear)


def test_every_symbol_has_the_next_as_its_label():
    x, y = windows(b"abcdefghij", length=4, step=2)
    assert [bytes(row.tolist()) for row in x] == [b"abcd", b"cdef", b"efgh"]
    assert [bytes(row.tolist()) for row in y] == [b"bcde", b"defg", b"fghi"]


def test_parts_of_the_text_do_not_meet():
    """Of a text in which every pair of symbols says where it stands, no pair is in two parts."""
    text, length = random.Random(0).randbytes(20_000), 16
    pairs = [pair for pair, count in Counter(pairwise(text)).items() if count == 1]
    data = split_text(text, length)
    parts = [{pair for row in torch.cat([x, y[:, -1:]], 1).tolist() for pair in pairwise(row)} for x, y in data[:3]]
    train, validation, test = (part.intersection(pairs) for part in parts)
    assert not train & validation
    assert not (train | validation) & test
    assert len(train) / len(pairs) == pytest.approx(0.8, abs=0.05)
    assert len(validation) / len(pairs) == pytest.approx(len(test) / len(pairs), abs=0.03)
    assert len(test) / len(pairs) == pytest.approx(0.1, abs=0.03)


def test_paragraphs_are_there_once():
    words = [part.split() for part in topics().split(b"\n\n")]
    assert len({tuple(each) for each in words}) > 0.995 * len(words)  # those with other symbols than ASCII may agree
    assert len(topics()) > 100_000


@pytest.mark.parametrize(
    ("options", "complaint"),
    [({"heads": 3}, "`heads` must divide `dim`, 16; got 3"), ({"depth": 0}, "`depth` must be positive")],
)
def test_wrong_sizes_are_named(options, complaint):
    with pytest.raises(ValueError, match=complaint):
        small(**options)
