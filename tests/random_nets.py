"""Small nets from a grammar, for Hypothesis to choose from, and what they compute when units are dropped.

A net is a chain of parts between an input and outputs, each written as a list whose first entry says what it is:
`["layer", 4]`, `["norm", "batch"]`, `["act", "ReLU"]`, `["sum", chain]`, `["cat", chain]`, and so on.
"""

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

Part = list[Any]
Kept = Tensor  # which channels are kept, boolean

ACTIVATIONS = ["ReLU", "Tanh", "GELU", "SiLU", "Sigmoid", "Softplus", "ELU", "Hardswish", "PReLU", "LeakyReLU"]
NORMS = {
    "rows": ["BatchNorm1d", "LayerNorm", "GroupNorm"],
    "tokens": ["LayerNorm"],
    "line": ["BatchNorm1d", "GroupNorm", "InstanceNorm1d"],
    "image": ["BatchNorm2d", "GroupNorm", "InstanceNorm2d"],
}
STREAMS = {"rows": (), "tokens": (3,), "line": (4,), "image": (4, 4)}


class Around(nn.Module):
    """Joins its input with what a chain makes of it."""

    def __init__(self, how: str, body: nn.Module) -> None:
        super().__init__()
        self.how, self.body = how, body

    def forward(self, x: Tensor) -> Tensor:
        return JOINS[self.how](x, self.body(x), self.body)

    def extra_repr(self) -> str:
        return self.how


JOINS: dict[str, Callable[[Tensor, Tensor, nn.Module], Tensor]] = {
    "sum": lambda x, y, _: x + y,
    "gate": lambda x, y, _: x * torch.sigmoid(y),
    "cat": lambda x, y, _: torch.cat([x, y], 1),
    "cat of tokens": lambda x, y, _: torch.cat([x, y], -1),
    "twice": lambda _, y, body: body(y),
}


class Average(nn.Module):
    """Mean over the places of a stream."""

    def __init__(self, stream: str) -> None:
        super().__init__()
        self.dims = [1] if stream == "tokens" else list(range(2, 2 + len(STREAMS[stream])))

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(self.dims)


def build(stream: str, channels: int, parts: list[Part], seed: int = 0) -> tuple[nn.Module, Tensor]:
    """A net, in evaluation mode and with random norms, and an input of three rows."""
    torch.manual_seed(seed)
    layers, _ = _chain(stream, channels, parts)
    net = nn.Sequential(*layers)
    for name, tensor in [*net.named_parameters(), *net.named_buffers()]:
        if tensor.is_floating_point() and ("running" in name or tensor.dim() == 1):
            nn.init.uniform_(tensor.detach(), 0.5, 1.5)
    shape = STREAMS[stream]
    return net.eval(), torch.randn(3, *((*shape, channels) if stream == "tokens" else (channels, *shape)))


def _chain(stream: str, channels: int, parts: list[Part]) -> tuple[list[nn.Module], int]:
    layers: list[nn.Module] = []
    for part in parts:
        made, channels = _part(stream, channels, *part)
        layers.append(made)
        if part[0] == "end":
            stream = "rows"
    return layers, channels


def _part(stream: str, channels: int, kind: str, *rest: Any) -> tuple[nn.Module, int]:
    if kind == "layer":
        return _layer(stream, channels, *rest)
    if kind in ("norm", "act", "dropout", "pool"):
        return _pointwise(stream, channels, kind, *rest), channels
    if kind == "stage":
        number, body = rest
        blocks = [Around("sum", nn.Sequential(*_back(stream, channels, body))) for _ in range(number)]
        return nn.Sequential(*blocks), channels
    if kind == "end":
        if rest[0] == "flatten":
            size = channels * torch.Size(STREAMS[stream]).numel()
            return nn.Flatten(), size
        return (Average(stream) if stream != "rows" else nn.Identity()), channels
    (body,) = rest
    if kind == "cat":
        layers, more = _chain(stream, channels, body)
        return Around("cat of tokens" if stream == "tokens" else "cat", nn.Sequential(*layers)), channels + more
    return Around(kind, nn.Sequential(*_back(stream, channels, body))), channels


def _back(stream: str, channels: int, body: list[Part]) -> list[nn.Module]:
    """A chain that ends with a layer of as many channels as it begins with."""
    layers, last = _chain(stream, channels, body)
    return [*layers, _layer(stream, last, channels)[0]]


def _layer(stream: str, channels: int, size: int, groups: int = 1, bias: bool = True) -> tuple[nn.Module, int]:
    if stream in ("rows", "tokens"):
        return nn.Linear(channels, size, bias=bias), size
    if groups == 0:  # depthwise
        groups, size = channels, channels * max(1, size // 3)
    elif channels % groups or size % groups:
        groups = 1
    conv = nn.Conv1d if stream == "line" else nn.Conv2d
    return conv(channels, size, 3, padding=1, groups=groups, bias=bias), size


def _pointwise(stream: str, channels: int, kind: str, which: Any) -> nn.Module:
    if kind == "act":
        if which == "PReLU":
            return nn.PReLU(1 if stream == "tokens" else channels)
        return getattr(nn, which)()
    if kind == "dropout":
        return nn.Dropout(which)
    if kind == "pool":
        names = {"line": ("MaxPool1d", "AvgPool1d"), "image": ("MaxPool2d", "AvgPool2d")}.get(stream)
        return nn.Identity() if names is None else getattr(nn, names[which == "avg"])(3, 1, 1)
    name = NORMS[stream][which % len(NORMS[stream])]
    if name == "GroupNorm":
        return nn.GroupNorm(next(g for g in (2, 3, 1) if channels % g == 0), channels)
    if name.startswith("InstanceNorm"):
        return getattr(nn, name)(channels, affine=True)
    return getattr(nn, name)(channels)


_simple = st.one_of(
    st.tuples(st.just("layer"), st.integers(1, 6), st.sampled_from([1, 0, 2]), st.booleans()),
    st.tuples(st.just("act"), st.sampled_from(ACTIVATIONS)),
    st.tuples(st.just("norm"), st.integers(0, 2)),
    st.tuples(st.just("pool"), st.sampled_from(["max", "avg"])),
    st.tuples(st.just("dropout"), st.just(0.5)),
)


def _nested(chains: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.lists(
        st.one_of(
            _simple,
            st.tuples(st.sampled_from(["sum", "cat", "gate", "twice"]), chains),
            st.tuples(st.just("stage"), st.integers(2, 3), chains),
        ),
        min_size=1,
        max_size=4,
    )


chains = st.recursive(st.lists(_simple, min_size=1, max_size=3), _nested, max_leaves=5)


@st.composite
def nets(draw: st.DrawFn) -> tuple[str, int, list[Part], int]:
    """What `build` takes; the first part is a layer, and the last one too, so that something can be cut."""
    stream = draw(st.sampled_from([*STREAMS]))
    first = draw(st.integers(2, 6))
    end = ("end", draw(st.sampled_from(["mean", "flatten"])))
    return (
        stream,
        draw(st.integers(1, 3)),
        [("layer", first), *draw(chains), end, ("layer", 2)],
        draw(st.integers(0, 9)),
    )


def zeroed(
    net: nn.Module,
    stream: str,
    x: Tensor,
    kept_outputs: Callable[[str], Kept | None],
    skipped: Callable[[str], bool],
) -> Tensor:
    """What a net computes when units are dropped: layers read zeros there, and norms go over the rest.

    Args:
        net: A plain net of `build`.
        stream: What its input is.
        x: Its input.
        kept_outputs: Which outputs of a layer, by its name, are kept; None for all.
        skipped: Whether a block of a stage, by its name, is passed over.
    """
    dim = -1 if stream == "tokens" else 1
    return _run(net, "", x, torch.ones(x.shape[dim], dtype=torch.bool), dim, kept_outputs, skipped)[0]


def _run(part: nn.Module, name: str, x: Tensor, kept: Kept, dim: int, *ask: Any) -> tuple[Tensor, Kept]:
    kept_outputs, skipped = ask
    if isinstance(part, nn.Sequential):
        for each, inner in part.named_children():
            path = f"{name}.{each}".lstrip(".")
            if not skipped(path):
                x, kept = _run(inner, path, x, kept, dim, *ask)
            if isinstance(inner, Average | nn.Flatten):
                dim = 1
        return x, kept
    if isinstance(part, Around):
        y, kept_y = _run(part.body, f"{name}.body", x, kept, dim, *ask)
        if part.how == "twice":
            assert torch.equal(kept, kept_y), "a layer that is called twice reads other units the second time"
            return _run(part.body, f"{name}.body", y, kept_y, dim, *ask)
        if part.how.startswith("cat"):
            return torch.cat([x, y], dim), torch.cat([kept, kept_y])
        assert torch.equal(kept, kept_y), "what is added has other units"
        return JOINS[part.how](x, y, part.body), kept
    if isinstance(part, nn.Linear | nn.Conv1d | nn.Conv2d):
        outputs = part.weight.shape[0]
        found = kept_outputs(name)
        dropped = ~kept.reshape(-1, *[1] * (0 if dim == -1 else x.dim() - 2))
        return part(x.masked_fill(dropped, 0)), torch.ones(outputs, dtype=torch.bool) if found is None else found
    if isinstance(part, nn.Flatten):
        if dim == -1:
            return x.flatten(1), kept.repeat(x.shape[1])
        return x.flatten(1), kept.repeat_interleave(x[0, 0].numel())
    if isinstance(part, nn.LayerNorm | nn.GroupNorm):
        return _normed(part, x, kept, dim), kept
    return part(x), kept


def _normed(norm: Any, x: Tensor, kept: Kept, dim: int) -> Tensor:
    """Each group of channels normalised by what is kept of it."""
    channels = x.movedim(dim, -1)
    out = torch.zeros_like(channels)
    groups = norm.num_groups if isinstance(norm, nn.GroupNorm) else 1
    over = [-1] if groups == 1 and isinstance(norm, nn.LayerNorm) else list(range(1, channels.dim()))
    for group in torch.arange(len(kept)).chunk(groups):
        some = group[kept[group]]
        if len(some):
            values = channels[..., some]
            variance, mean = torch.var_mean(values, over, keepdim=True, correction=0)
            out[..., some] = (values - mean) / (variance + norm.eps).sqrt() * norm.weight[some] + norm.bias[some]
    return out.movedim(-1, dim)
