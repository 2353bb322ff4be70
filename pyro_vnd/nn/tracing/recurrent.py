"""Recurrent nets in parts that can be nested: the hidden size is a group."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from pyro_vnd._compat import has_hooks
from pyro_vnd.nn.submodules import replace_modules

__all__ = ["Cell", "Recurrent", "unpack_recurrent"]

GATES = {"LSTM": 4, "GRU": 3, "RNN_TANH": 1, "RNN_RELU": 1}
CELLS: dict[type[nn.Module], str] = {nn.LSTMCell: "LSTM", nn.GRUCell: "GRU"}


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone())
    return linear


class _Step(nn.Module):
    """One step in time of one layer: a linear layer of what comes in, and one of the state."""

    def __init__(self, mode: str, weights: list[Tensor], biases: list[Tensor | None]) -> None:
        super().__init__()
        self.mode = mode
        self.input, self.hidden = (_linear(*each) for each in zip(weights, biases, strict=True))

    def forward(self, x: Tensor, h: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the next state."""
        return self.after(self.input(x), h, c)

    def after(self, come_in: Tensor, h: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the next state, of what the first linear layer made of the input."""
        back = self.hidden(h)
        if self.mode == "LSTM":
            i, f, g, o = (come_in + back).chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            return o.sigmoid() * c.tanh(), c
        if self.mode == "GRU":
            (r, z, n), (r_back, z_back, n_back) = come_in.chunk(3, -1), back.chunk(3, -1)
            n, z = (n + (r + r_back).sigmoid() * n_back).tanh(), (z + z_back).sigmoid()
            return n + z * (h - n), None
        return (come_in + back).tanh() if self.mode == "RNN_TANH" else (come_in + back).relu(), None

    def parameters_of_torch(self) -> Iterator[Tensor | None]:
        """Yield weights and biases in the order in which torch has them."""
        yield from (self.input.weight, self.hidden.weight, self.input.bias, self.hidden.bias)


class Cell(nn.Module):
    """What `torch.nn.LSTMCell` and `torch.nn.GRUCell` compute."""

    def __init__(self, cell: Any) -> None:
        super().__init__()
        self.kind, self.hidden_size = type(cell), cell.hidden_size
        weights = [cell.weight_ih, cell.weight_hh]
        self.step = _Step(CELLS[type(cell)], weights, [cell.bias_ih, cell.bias_hh] if cell.bias else [None, None])

    def forward(self, input: Tensor, hx: Any = None) -> Any:  # noqa: A002  (as torch names it)
        """Return the next state, as torch's cell does."""
        if hx is None:
            zeros = input.new_zeros(*input.shape[:-1], self.hidden_size)
            hx = (zeros, zeros) if self.step.mode == "LSTM" else zeros
        h, c = hx if self.step.mode == "LSTM" else (hx, None)
        h, c = self.step(input, h, c)
        return (h, c) if self.step.mode == "LSTM" else h

    def as_torch_has_it(self) -> nn.Module:
        """Return a cell of torch with the same parameters."""
        weight, back, bias, _ = parameters = list(self.step.parameters_of_torch())
        assert weight is not None  # only biases
        assert back is not None  # can be None
        cell = self.kind(weight.shape[1], back.shape[1], bias is not None, device="meta")
        for name, value in zip(("weight_ih", "weight_hh", "bias_ih", "bias_hh"), parameters, strict=True):
            setattr(cell, name, value)
        return cell.train(self.training)


class Recurrent(nn.Module):
    """What `torch.nn.LSTM`, `torch.nn.GRU` and `torch.nn.RNN` compute, step by step in Python.

    Args:
        net: The recurrent net to take the weights from, without projections.
    """

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.kind, self.mode, self.batch_first = type(net), net.mode, net.batch_first
        self.hidden_size, self.num_layers, self.bidirectional = net.hidden_size, net.num_layers, net.bidirectional
        self.dropout = nn.Dropout(net.dropout)
        self.steps = nn.ModuleList()
        for layer in range(net.num_layers):
            for suffix in ("", "_reverse")[: 1 + net.bidirectional]:
                weights = [getattr(net, f"weight_{kind}_l{layer}{suffix}") for kind in ("ih", "hh")]
                biases = [getattr(net, f"bias_{kind}_l{layer}{suffix}", None) for kind in ("ih", "hh")]
                self.steps.append(_Step(net.mode, weights, biases))
        self.train(net.training)

    def flatten_parameters(self) -> None:
        """Do nothing: there is no memory to arrange."""

    def forward(self, input: Tensor, hx: Any = None) -> Any:  # noqa: A002  (as torch names it)
        """Return outputs and the last state, as torch's net does, of padded tensors or a packed sequence."""
        if not isinstance(input, Tensor):
            return self._packed(input, hx)
        return self._run(input, hx)

    def _packed(self, packed: PackedSequence, hx: Any) -> tuple[PackedSequence, Any]:
        """Run over padded steps, where examples lie as they came and masks by example can act; then pack again."""
        x, lengths = pad_packed_sequence(packed, self.batch_first)
        lengths = lengths.to(x.device)
        x, last = self._run(x, hx, lengths)
        order, axis = packed.sorted_indices, 1 - self.batch_first
        if order is not None:
            x, lengths = x.index_select(axis, order), lengths[order]
        data, sizes = pack_padded_sequence(x, lengths.cpu(), self.batch_first)[:2]
        return PackedSequence(data, sizes, order, packed.unsorted_indices), last

    def _run(self, input: Tensor, hx: Any, lengths: Tensor | None = None) -> tuple[Tensor, Any]:  # noqa: A002
        """Return outputs and the last state of padded steps; beyond their lengths, states stay what they are."""
        is_lstm, is_batch = self.mode == "LSTM", input.dim() == 3
        states = (hx if is_lstm else (hx, None)) if hx is not None else (None, None)
        x = input if is_batch else input.unsqueeze(0 if self.batch_first else 1)
        if not is_batch and hx is not None:
            states = tuple(each if each is None else each.unsqueeze(1) for each in states)
        x = x.transpose(0, 1) if self.batch_first else x
        last: list[tuple[Any, Any]] = []
        directions = 1 + self.bidirectional
        for layer in range(self.num_layers):
            outputs = []
            for direction in range(directions):
                place = layer * directions + direction
                h = x.new_zeros(x.shape[1], self.hidden_size) if states[0] is None else states[0][place]
                c = (torch.zeros_like(h) if states[1] is None else states[1][place]) if is_lstm else None
                y, state = self._over_time(self.steps[place], x, h, c, lengths, reverse=direction == 1)
                outputs.append(y)
                last.append(state)
            x = outputs[0] if directions == 1 else torch.cat(outputs, -1)
            x = self.dropout(x) if layer + 1 < self.num_layers else x
        x = x.transpose(0, 1) if self.batch_first else x
        ends = [torch.stack([state[i] for state in last]) for i in range(1 + is_lstm)]
        if not is_batch:
            x, ends = x.squeeze(0 if self.batch_first else 1), [each.squeeze(1) for each in ends]
        return x, tuple(ends) if is_lstm else ends[0]

    def _over_time(
        self, step: Any, x: Tensor, h: Tensor, c: Any, lengths: Tensor | None, reverse: bool
    ) -> tuple[Tensor, tuple[Any, Any]]:
        come_in, outputs = step.input(x), []
        for t in range(x.shape[0])[:: -1 if reverse else 1]:
            before = h, c
            h, c = step.after(come_in[t], h, c)
            if lengths is not None:
                is_there = (lengths > t).unsqueeze(1)
                h = torch.where(is_there, h, before[0])
                c = None if c is None else torch.where(is_there, c, before[1])
            outputs.append(h)
        return torch.stack(outputs[:: -1 if reverse else 1]), (h, c)

    def as_torch_has_it(self) -> nn.Module:
        """Return a recurrent net of torch with the same parameters."""
        first: Any = self.steps[0]
        options = {"bias": first.input.bias is not None, "batch_first": self.batch_first, "dropout": self.dropout.p}
        sizes = first.input.in_features, first.hidden.in_features, self.num_layers
        if self.kind is nn.RNN:
            options["nonlinearity"] = self.mode.removeprefix("RNN_").lower()
        net = self.kind(*sizes, bidirectional=self.bidirectional, device=first.input.weight.device, **options)
        net.to(first.input.weight.dtype)
        for place, step in enumerate(self.steps):
            layer, direction = divmod(place, 1 + self.bidirectional)
            names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            for name, value in zip(names, step.parameters_of_torch(), strict=True):  # type: ignore[operator]
                if value is not None:
                    setattr(net, f"{name}_l{layer}{'_reverse' * direction}", value)
        net.flatten_parameters()
        return net.train(self.training)


def unpack_recurrent(net: nn.Module, excluded: tuple[str, ...] = ()) -> nn.Module:
    """Replace recurrent nets and cells by their parts, in place; not those excluded, with hooks or with projections."""
    found: dict[nn.Module, nn.Module] = {}
    for name, module in net.named_modules():
        part: Any = module
        if has_hooks(part) or any(f"{name}.".startswith(f"{each}.") for each in excluded):
            continue
        if type(part) in (nn.LSTM, nn.GRU, nn.RNN) and not part.proj_size:
            found[part] = Recurrent(part)
        elif type(part) in CELLS:
            found[part] = Cell(part).train(part.training)
    return replace_modules(net, found)
