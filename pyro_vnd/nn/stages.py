"""The stages of a cascade: narrowed nets that go on from what a narrower one computed for the same rows."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from pyro_vnd._state import cuda_devices, module_mode, random_numbers
from pyro_vnd.nn.axis import Index, kept_channels
from pyro_vnd.nn.cost import example_of
from pyro_vnd.nn.layers import NestedLayer
from pyro_vnd.nn.narrow import narrow_layer
from pyro_vnd.nn.net import NestedNet
from pyro_vnd.nn.norms import NestedNorm, mixes_channels
from pyro_vnd.nn.outputs import Output, picked
from pyro_vnd.nn.submodules import replace_modules
from pyro_vnd.nn.tracing.tape import Value, recorded

__all__ = ["Doubt", "Stage", "WidenedLayer", "continued", "doubt_of", "shared_layers"]

Doubt = Literal["entropy", "mutual_information"]


class Stage(nn.Module):
    """One width of a cascade: from inputs, and what the stage before handed on, to logits and the doubt of them.

    Args:
        nets: A net for each draw, which maps (*inputs, *known) to (logits, *known), as `continued` makes them.
        doubt: What doubt is.
        draws: Whether logits have a dimension for the draws.
        num_inputs: Number of inputs.
    """

    def __init__(self, nets: Sequence[nn.Module], doubt: Doubt, draws: bool, num_inputs: int = 1) -> None:
        super().__init__()
        self.nets, self.doubt, self.draws, self.num_inputs = nn.ModuleList(nets), doubt, draws, num_inputs

    def forward(self, x: Tensor, *more: Tensor) -> tuple[Tensor, ...]:
        """Run the stage.

        Args:
            x: The first input, a row for each example.
            *more: Further inputs, and what the stage before handed on for these rows; nothing in the first stage.

        Returns:
            Logits, shape (N, C), or (N, S, C) with draws; their doubt, shape (N,); and what is handed on to the next
            stage: tensors whose first dimension counts the rows, equally many for each draw.
        """
        inputs, known = (x, *more[: self.num_inputs - 1]), more[self.num_inputs - 1 :]
        size = len(known) // len(self.nets)
        outputs = [net(*inputs, *known[i * size : (i + 1) * size]) for i, net in enumerate(self.nets)]
        logits = torch.stack([logits for logits, *_ in outputs], 1)
        handed = [value for _, *values in outputs for value in values]
        return logits if self.draws else logits.squeeze(1), doubt_of(logits, self.doubt), *handed


def doubt_of(logits: Tensor, kind: Doubt) -> Tensor:
    r"""Return how much a predictive doubts, in nats, shape (N,).

    $$\bar p = \frac1S \sum_s p_s, \qquad H[\bar p], \qquad \frac1S \sum_s \mathrm{KL}(p_s \| \bar p).$$

    Args:
        logits: Of S draws, shape (N, S, C).
        kind: The entropy of the mean, or the mutual information of prediction and draw.
    """
    log_probs = logits.log_softmax(-1)
    mean = log_probs.logsumexp(1) - math.log(logits.shape[1])
    if kind == "entropy":
        return torch.special.entr(mean.exp()).sum(-1)
    return (log_probs.exp() * (log_probs - mean.unsqueeze(1))).sum(-1).mean(1).clamp_min(0)


class _Exchange(NamedTuple):
    """What shared layers know of the narrower net, and what they hand on."""

    known: Sequence[Tensor]
    handed: list[Any]


_EXCHANGE: ContextVar[_Exchange] = ContextVar("exchange")


class ContinuedNet(nn.Module):
    """A net whose shared layers go on from their outputs at a narrower width, to (output, *known).

    Args:
        net: The net, with a `SharedLayer` in each of these places.
        num_shared: How many there are.
        num_inputs: Number of inputs, after which come the outputs at a narrower width.
        names: Names of the inputs, if the net takes them by name.
        output: What the outputs are of that which the net returns, as in `NestedModel`.
    """

    def __init__(
        self, net: nn.Module, num_shared: int, num_inputs: int, names: Sequence[str] = (), output: Output = None
    ) -> None:
        super().__init__()
        self.net, self.num_shared, self.output = net, num_shared, output
        self.num_inputs, self.names = num_inputs, tuple(names)

    def forward(self, *tensors: Tensor) -> tuple[Any, ...]:
        """Run the net."""
        inputs, known = tensors[: self.num_inputs], tensors[self.num_inputs :]
        exchange = _Exchange(known, [None] * self.num_shared)
        token = _EXCHANGE.set(exchange)
        try:
            named = dict(zip(self.names, inputs, strict=True)) if self.names else {}
            returned = self.net(**named) if named else self.net(*inputs)
            return (picked("CascadeNet", returned, self.output), *exchange.handed)
        finally:
            _EXCHANGE.reset(token)


class SharedLayer(nn.Module):
    """A layer that hands its outputs on, and goes on from those of a narrower width.

    Args:
        layer: The layer itself, whose sizes and other attributes the code of a net may ask for.
        widened: What goes on from a narrower width; None if there is none.
        place: Which of the shared layers it is.
    """

    def __init__(self, layer: nn.Module, widened: WidenedLayer | None, place: int) -> None:
        super().__init__()
        self.place, self.widened = place, widened
        if widened is None:
            self.layer: Any = layer
        else:
            self.sizes = {name: value for name, value in vars(layer).items() if isinstance(value, int | tuple)}

    def __getattr__(self, name: str) -> Any:
        """Return what the layer has; its weights in so far as they are here, of its type and on its device."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or "_modules" not in vars(self):
                raise
        if self.widened is None:
            return getattr(self.layer, name)
        return self.sizes[name] if name in self.sizes else getattr(self.widened.added or self.widened.more, name)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (as torch's layers name it)
        """Return the outputs of the layer."""
        known, handed = _EXCHANGE.get()
        outputs = self.layer(input) if self.widened is None else self.widened(input, known[self.place])
        handed[self.place] = outputs.clone()  # activations may work in place
        return outputs


class WidenedLayer(nn.Module):
    r"""A layer that adds to what it returned at a narrower width: further inputs, and further outputs.

    Where the narrower one had o outputs and i inputs, the first of those that there are now,

    $$y_{\le o} = y_{\text{before}} + W_{\le o, > i} x_{> i}, \qquad y_{> o} = W_{> o} x + b_{> o}.$$

    Args:
        more: The layer from further inputs to known outputs, without bias; None if there are no such inputs.
        added: The layer from all inputs to further outputs; None if there are no such outputs.
        num_known: Number of inputs of the narrower layer.
        channel_dim: Where the channels of inputs and outputs are.
    """

    def __init__(self, more: nn.Module | None, added: nn.Module | None, num_known: int, channel_dim: int) -> None:
        super().__init__()
        self.more, self.added, self.num_known, self.channel_dim = more, added, num_known, channel_dim

    def forward(self, x: Tensor, known: Tensor) -> Tensor:
        """Return the outputs of the wider layer.

        Args:
            x: All of its inputs.
            known: The outputs of the narrower one.
        """
        if self.more is not None:
            further = x.shape[self.channel_dim] - self.num_known
            known = known + self.more(x.narrow(self.channel_dim, self.num_known, further))
        return known if self.added is None else torch.cat([known, self.added(x)], self.channel_dim)


def shared_layers(net: NestedNet, plain: nn.Module) -> list[str]:
    """Name the layers whose outputs at one width go into those at a wider one, in the order of the net.

    They read what the narrower net gives them, and more of the same: no layer before them reads cut channels, no norm
    before them takes statistics over these, and the first axis of what they make counts the examples. All else that a
    nested net does to channels that can be cut it does to each by itself, or `nest` would have left them whole. Where
    the net decides by its inputs what to do, nothing that comes later is shared.

    Args:
        net: The nested net.
        plain: What `narrow` makes of it, at any width.
    """
    nested = {name: part for name, part in net.net.named_modules() if isinstance(part, NestedLayer | NestedNorm)}
    known = dict(plain.named_modules())
    layers = {known[name]: name for name in nested if name in known}
    with module_mode([plain], training=False), torch.no_grad(), random_numbers(0, cuda_devices([net])):
        tape = recorded(plain, example_of(net), layers.__contains__, lambda *_: None)
    # What is one module of torch's in the narrowed net, such as a recurrent one, reads cut channels somewhere.
    opaque = tuple(_nearest(name, known) for name in nested.keys() - known.keys())
    reads = {id(getattr(plain.get_submodule(path), key)) for path, key in _read_weights(net)}
    calls = Counter(op.path for op in tape.ops if op.target in layers)
    names: list[str] = []
    changed: set[Value] = set()  # what is not the same in a wider net, with more of it perhaps
    from_inputs = tape.from_inputs()
    for op in tape.ops:
        if not op.outputs and not op.in_place and not from_inputs.isdisjoint(op.inputs):
            break  # Python was told
        is_changed = not changed.isdisjoint(op.inputs) or any(id(value.kept) in reads for value in op.inputs)
        is_changed |= any(f"{op.path}.".startswith(f"{path}.") for path in opaque)
        part = nested.get(layers.get(op.target, ""))
        if isinstance(part, NestedLayer) and part.groups == 1:
            in_one_run = len(part.input_axis.runs) == len(part.output_axis.runs) == 1
            as_torch_has_it = not part.runs_plain and not part.is_read
            has_rows = op.outputs[0].shape[0] == 1 and (part.rows is None or part.rows.axis == 0)  # of the one example
            if not is_changed and in_one_run and as_torch_has_it and has_rows and calls[op.path] == 1:
                names.append(layers[op.target])
            is_changed |= bool(part.input_axis.widths)
        elif isinstance(part, NestedNorm):
            is_changed |= mixes_channels(part.plain)
        if is_changed:
            changed.update(op.outputs or op.inputs[:1])
    return names


def _nearest(name: str, known: Mapping[str, nn.Module]) -> str:
    while name not in known:
        name = name.rpartition(".")[0]
    return name


def _read_weights(net: NestedNet) -> list[tuple[str, str]]:
    """Return where functions of the net find weights with which they read channels that can be cut."""
    paths = {part: path for path, part in net.net.named_modules()}
    return [(paths[part], key) for part, key, _ in net.reads]


def continued(
    net: NestedNet,
    plain: nn.Module,
    shared: Sequence[str],
    before: Mapping[str, int] | None,
    after: Mapping[str, int],
    draw: Mapping[str, Tensor] | None = None,
    output: Output = None,
) -> ContinuedNet:
    """Turn a narrowed net into one that goes on from a narrower one, and that a wider one can go on from.

    Args:
        net: The nested net.
        plain: What `narrow` made of it, which becomes part of the result.
        shared: Layers whose outputs are handed on, as of `shared_layers`.
        before: Units that groups keep in the narrower net; None if there is none.
        after: Units that they keep in this one.
        draw: The weights that it was narrowed with, as in `narrow`.
        output: What the outputs are of that which the net returns, as in `NestedModel`.

    Returns:
        A module from (*inputs, *known) to (output, *known): outputs of the shared layers of the narrower net, none if
        there is none, and of this one.
    """
    replacements: dict[nn.Module, nn.Module] = {}
    for place, name in enumerate(shared):
        layer = plain.get_submodule(name)
        widened: WidenedLayer | None = None
        if before is not None:
            widened = _widened(net.layers[name], before, after, net.site_of(name), draw)
        replacements[layer] = SharedLayer(layer, widened, place)
    num_inputs = net.num_inputs or len(net.input_names)
    return ContinuedNet(replace_modules(plain, replacements), len(shared), num_inputs, net.input_names, output)


def _widened(
    layer: NestedLayer,
    before: Mapping[str, int],
    after: Mapping[str, int],
    site: str,
    draw: Mapping[str, Tensor] | None,
) -> WidenedLayer:
    (known_out, num_out), (known_in, num_in) = (
        [kept_channels(axis.index(kept), axis.size) for kept in (before, after)]
        for axis in (layer.output_axis, layer.input_axis)
    )

    def part(outputs: Index, inputs: Index) -> Any:
        return narrow_layer(layer, (outputs, inputs), site, draw)

    more = added = None
    if num_in > known_in:
        more = part(slice(0, known_out), torch.arange(known_in, num_in))
        more.bias = None
    if num_out > known_out:
        added = part(torch.arange(known_out, num_out), slice(0, num_in))
    return WidenedLayer(more, added, known_in, layer.channel_dim)
