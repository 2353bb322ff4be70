"""The stages of a cascade: narrowed nets that go on from what a narrower one computed for the same rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from pyro_vnd.nn.axis import Index, kept_channels
from pyro_vnd.nn.layers import NestedLayer
from pyro_vnd.nn.narrow import narrow_layer
from pyro_vnd.nn.net import NestedNet
from pyro_vnd.nn.norms import NestedNorm, mixes_channels

__all__ = ["Doubt", "Stage", "WidenedLayer", "continued", "doubt_of", "shared_layers"]

Doubt = Literal["entropy", "mutual_information"]


class Stage(nn.Module):
    """One width of a cascade: from inputs, and what the stage before handed on, to logits and the doubt of them.

    Args:
        nets: A net for each draw, which maps (x, *known) to (logits, *known), as `continued` makes them.
        doubt: What doubt is.
        draws: Whether logits have a dimension for the draws.
    """

    def __init__(self, nets: Sequence[nn.Module], doubt: Doubt, draws: bool) -> None:
        super().__init__()
        self.nets, self.doubt, self.draws = nn.ModuleList(nets), doubt, draws

    def forward(self, x: Tensor, *known: Tensor) -> tuple[Tensor, ...]:
        """Run the stage.

        Args:
            x: Inputs, a row for each example.
            *known: What the stage before handed on for these rows; nothing in the first stage.

        Returns:
            Logits, shape (N, C), or (N, S, C) with draws; their doubt, shape (N,); and what is handed on to the next
            stage: tensors whose first dimension counts the rows, equally many for each draw.
        """
        size = len(known) // len(self.nets)
        outputs = [net(x, *known[i * size : (i + 1) * size]) for i, net in enumerate(self.nets)]
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

    They read what the narrower net gives them, and more of the same: no layer before them reads cut channels, and no
    norm before them takes statistics over these. All else that a nested net does to channels that can be cut it does
    to each by itself, or `nest` would have left them whole.

    Args:
        net: The nested net.
        plain: What `narrow` makes of it, at any width.
    """
    parts = dict(net.net.named_modules())
    graph = _trace(net, plain)
    calls = [str(node.target) for node in graph.nodes if node.op == "call_module"]
    names: list[str] = []
    as_before: dict[fx.Node, bool] = {}  # whether a wider net has the same there, and perhaps more
    for node in graph.nodes:
        as_before[node] = all(as_before[each] for each in node.all_input_nodes)
        name = str(node.target) if node.op == "call_module" else ""
        part = parts.get(name)
        if isinstance(part, NestedLayer) and part.groups == 1:
            in_one_run = len(part.input_axis.runs) == len(part.output_axis.runs) == 1
            if as_before[node] and in_one_run and calls.count(name) == 1:
                names.append(name)
            as_before[node] &= not part.input_axis.widths
        elif isinstance(part, NestedNorm):
            as_before[node] &= not mixes_channels(part.plain)
    return names


def continued(
    net: NestedNet,
    plain: nn.Module,
    shared: Sequence[str],
    before: Mapping[str, int] | None,
    after: Mapping[str, int],
    draw: Mapping[str, Tensor] | None = None,
) -> fx.GraphModule:
    """Turn a narrowed net into one that goes on from a narrower one, and that a wider one can go on from.

    Args:
        net: The nested net.
        plain: What `narrow` made of it, which becomes part of the result.
        shared: Layers whose outputs are handed on, as of `shared_layers`.
        before: Units that groups keep in the narrower net; None if there is none.
        after: Units that they keep in this one.
        draw: The weights that it was narrowed with, as in `narrow`.

    Returns:
        A module from (x, *known) to (output, *known): outputs of the shared layers of the narrower net, none if there
        is none, and of this one.
    """
    graph = _trace(net, plain)
    calls = {str(node.target): node for node in graph.nodes if node.op == "call_module"}
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    output = next(iter(reversed(graph.nodes)))
    handed: list[fx.Node] = []
    for name in shared:
        node = calls[name]
        if before is not None:
            site = f"{net.prefix}{name}" if name else f"{net.prefix}layer"
            plain.set_submodule(name, _widened(net.layers[name], before, after, site, draw))
            with graph.inserting_after(inputs[-1]):
                inputs.append(graph.placeholder(f"known_{len(handed)}"))
            node.args, node.kwargs = (node.all_input_nodes[0], inputs[-1]), {}
        with graph.inserting_after(node):
            handed.append(graph.call_method("clone", (node,)))  # activations may work in place
    output.args = ((output.args[0], *handed),)
    copied = fx.Graph()  # does without the tracer, which could not be made again where the module is unpickled
    copied.output(copied.graph_copy(graph, {}))
    return fx.GraphModule(plain, copied, class_name=type(plain).__name__)


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


def _trace(net: NestedNet, plain: nn.Module) -> fx.Graph:
    """Trace a narrowed net down to the layers that the nested one has, whatever else is in it."""
    nested = [name for name, part in net.net.named_modules() if isinstance(part, NestedLayer | NestedNorm)]
    operations = {
        id(part)
        for name, part in plain.named_modules()
        if name and not any(other.startswith(f"{name}.") for other in nested)
    }
    try:
        return _Tracer(operations).trace(plain)
    except Exception as error:  # whatever the code of the net does with what is no tensor
        raise ValueError(
            f"CascadeNet: torch.fx, which takes a net apart into stages, cannot trace {type(plain).__name__}: {error}"
        ) from error


class _Tracer(fx.Tracer):
    """Makes of a net of one input a graph that stages can be cut from; other arguments keep their defaults."""

    def __init__(self, operations: set[int]) -> None:
        super().__init__()
        self._operations, self._has_input = operations, False

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Say whether a module is one operation of the trace."""
        return id(m) in self._operations or super().is_leaf_module(m, module_qualified_name)

    def create_proxy(self, kind: str, target: Any, args: tuple[Any, ...], *rest: Any, **kwargs: Any) -> Any:
        """Record an operation; of the net's arguments, the first."""
        if kind == "placeholder":
            if target.startswith("**"):
                return {}
            if self._has_input:
                return () if target.startswith("*") else args[0]
            self._has_input = True
            if target.startswith("*"):
                return (super().create_proxy(kind, f"{target[1:]}_0", (), *rest, **kwargs),)
        return super().create_proxy(kind, target, args, *rest, **kwargs)
