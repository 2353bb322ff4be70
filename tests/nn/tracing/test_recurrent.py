"""Packed sequences in nested recurrent nets, and examples that are put into another order by the data."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from pyro_vnd.nn import narrow, nest
from pyro_vnd.nn.tracing.recurrent import Recurrent

IDS = torch.arange(28).reshape(4, 7) * 5 % 11
LENGTHS = torch.tensor([3, 7, 2, 5])
WIDTHS = [0.5, 1.0, 0.25, 0.5]


class Tagger(nn.Module):
    """Reads sequences of several lengths; `ends` is what it makes of the packed sequence that it got."""

    def __init__(self, kind, ends, layers=1, bidirectional=False, batch_first=True, is_sorted=False):
        super().__init__()
        options = {"batch_first": batch_first, "bidirectional": bidirectional}
        self.embedding, self.rnn = nn.Embedding(11, 12), getattr(nn, kind)(12, 16, layers, **options)
        self.start, self.head = nn.Linear(12, 16), nn.Linear(16 * (1 + bidirectional), 3)
        self.ends, self.batch_first, self.is_sorted = ends, batch_first, is_sorted

    def forward(self, ids, lengths):
        x = self.embedding(ids if self.batch_first else ids.T)
        packed = pack_padded_sequence(x, lengths.cpu(), self.batch_first, enforce_sorted=self.is_sorted)
        return self.head(self.ends(self, packed, x))


def padded(net, packed, x):
    y, _ = pad_packed_sequence(net.rnn(packed)[0], net.batch_first)
    return y.sum(int(net.batch_first))


def of_changed_steps(net, packed, x):
    return padded(net, PackedSequence(packed.data.tanh(), *packed[1:]), x)


def last_state(net, packed, x):
    _, state = net.rnn(packed)
    state = state[0] if isinstance(state, tuple) else state
    return torch.cat([*state[-1 - net.rnn.bidirectional :]], -1)


def from_a_state(net, packed, x):
    y, _ = pad_packed_sequence(net.rnn(packed, net.start(x.mean(1))[None])[0], net.batch_first)
    return y.sum(int(net.batch_first))


NETS = {
    "lstm": lambda: Tagger("LSTM", padded, layers=2, bidirectional=True),
    "lstm-last": lambda: Tagger("LSTM", last_state, layers=2, bidirectional=True),
    "gru-time-first": lambda: Tagger("GRU", padded, batch_first=False),
    "gru-of-changed-steps": lambda: Tagger("GRU", of_changed_steps, bidirectional=True),
    "gru-from-a-state": lambda: Tagger("GRU", from_a_state),
    "rnn-last": lambda: Tagger("RNN", last_state, bidirectional=True),
    "lstm-sorted": lambda: Tagger("LSTM", padded, is_sorted=True),
}


def run(net, inputs, width, sliced=False):
    drawn = net._drawn("posterior", len(inputs[0]), weights=False)
    with torch.no_grad(), net.cut(width, sliced=sliced), drawn:
        return net.net(*inputs)


@pytest.mark.parametrize("mask_per", ["example", "batch"])
@pytest.mark.parametrize("build", NETS.values(), ids=NETS)
def test_packed_sequences_are_masked_sliced_and_narrowed_alike(build, mask_per):
    plain = build()
    lengths = LENGTHS.sort(descending=True).values if plain.is_sorted else LENGTHS
    inputs = IDS, lengths
    net = nest(plain, (IDS[:2], lengths[:2]), num_blocks=4, mask_per=mask_per, strict=True)
    assert [width.num_units for width in net.widths.values()] == [12, 16]
    exactly = {"rtol": 1e-10, "atol": 1e-10}
    with torch.no_grad():
        torch.testing.assert_close(run(net, inputs, 1.0), plain(*inputs), **exactly)
        outputs = {}
        for width in (0.25, 0.5, 1.0):
            narrowed = narrow(net, width)
            assert type(narrowed.rnn) is type(plain.rnn)
            outputs[width] = narrowed(*inputs)
            torch.testing.assert_close(run(net, inputs, width), outputs[width], **exactly)
            torch.testing.assert_close(run(net, inputs, width, sliced=True), outputs[width], **exactly)
    assert not torch.allclose(outputs[0.5], outputs[1.0])
    if mask_per == "example":
        expected = torch.stack([outputs[width][row] for row, width in enumerate(WIDTHS)])
        torch.testing.assert_close(run(net, inputs, torch.tensor(WIDTHS)), expected, **exactly)


def test_packed_outputs_keep_their_order():
    lengths = torch.tensor([2, 5, 5, 2])  # ties, which sorting may put in any order

    class Steps(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.head = nn.GRU(6, 8, batch_first=True), nn.Linear(8, 3)

        def forward(self, x, lengths):
            packed, _ = self.rnn(pack_padded_sequence(x, lengths.cpu(), True, enforce_sorted=False))
            return packed._replace(data=self.head(packed.data))

    plain, x = Steps(), torch.randn(4, 5, 6)
    net = nest(plain, (x, lengths), num_blocks=4, mask_per="batch")
    for found, expected in zip(run(net, (x, lengths), 1.0), plain(x, lengths), strict=True):
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(run(net, (x, lengths), 0.5).data, narrow(net, 0.5)(x, lengths).data)
    with pytest.raises(ValueError, match='rows of the input of `head` are not the examples; mask_per="batch" can cut'):
        nest(plain, (x, lengths))


class Reordering(nn.Module):
    """Sorts the rows by the data, and puts them back."""

    def __init__(self, inner, undo):
        super().__init__()
        self.first, self.inner, self.last, self.undo = nn.Linear(4, 8), inner, nn.Linear(8, 3), undo

    def forward(self, x):
        order = x[:, 0].sort().indices
        return self.last(self.undo(self.inner(self.first(x).relu()[order]), order))


UNDONE = {
    "argsort": lambda y, order: y[order.argsort()],
    "index_select": lambda y, order: y.index_select(0, order.sort()[1]),
    "scatter": lambda y, order: y[torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))],
}
SORTED = torch.arange(12, dtype=torch.float64).reshape(3, 4)  # in order, which says nothing about other rows


@pytest.mark.parametrize("undo", UNDONE.values(), ids=UNDONE)
def test_rows_that_come_back_have_masks_of_their_own(undo):
    net = nest(Reordering(nn.Tanh(), undo), SORTED, num_blocks=4)
    assert list(net.widths) == ["first"]
    x, widths = torch.randn(4, 4), torch.tensor(WIDTHS)
    expected = [run(net, (x,), width)[row] for row, width in enumerate(WIDTHS)]
    torch.testing.assert_close(run(net, (x,), widths), torch.stack(expected))


@pytest.mark.parametrize(
    "undo",
    [
        lambda y, order: y,
        lambda y, order: y[order],
        lambda y, order: y[order.argsort(descending=True)],
        lambda y, order: y[(order + 1) % len(order)],
        lambda y, order: y[order >= 0],
    ],
    ids=["never", "twice", "backwards", "elsewhere", "some"],
)
def test_rows_in_an_order_of_the_data_have_no_masks(undo):
    plain = Reordering(nn.Tanh(), undo)
    assert list(nest(plain, SORTED, mask_per="batch").widths) == ["first"]
    with pytest.raises(ValueError, match="rows of the input of `last` are not the examples"):
        nest(plain, SORTED)


def test_a_layer_that_reads_reordered_rows_reads_whole_channels():
    net = nest(Reordering(nn.Linear(8, 8), UNDONE["argsort"]), SORTED)
    assert list(net.widths) == ["inner"]
    assert "rows of the input of `inner` are not the examples" in net.whole["first"]


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_one_sequence_without_an_axis_of_its_own(kind, batch_first):
    net, x = kind(5, 6, 2, batch_first=batch_first, bidirectional=True), torch.randn(7, 5)
    states = [torch.randn(4, 6) for _ in range(1 + (kind is nn.LSTM))]
    for start in (None, tuple(states) if kind is nn.LSTM else states[0]):
        expected, found = net(x, start), Recurrent(net)(x, start)
        assert expected[0].shape == (7, 12)
        torch.testing.assert_close(found, expected)
