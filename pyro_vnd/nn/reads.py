"""Modules that stay as they are written: the weights that they find, and the masks where their functions read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pyro_vnd.nn.axis import Axis, Rows, kept_channels, take
from pyro_vnd.nn.width import Width

__all__ = ["MaskedReads", "OwnChannels", "Read", "apply_mask", "masked_norm", "on_its_own", "shaped", "substituted"]

READING = {"linear": -1, "matmul": -1, "__matmul__": -1, "mm": -1, "addmm": -1}
READING |= {f"conv{kind}{k}d": -1 - k for kind in ("", "_transpose") for k in (1, 2, 3)}
NORMS = {"layer_norm": "last", "rms_norm": "last", "group_norm": "second"}


def apply_mask(x: Tensor, mask: Tensor | None, channel_dim: int, rows: Rows | None = None) -> Tensor:
    """Multiply channels by a mask of shape (channels,), or (N, channels) with one row an example.

    Args:
        x: A tensor.
        mask: The mask; None keeps all.
        channel_dim: Where the channels are.
        rows: Where the examples are; by default along the first axis, once each.
    """
    return x if mask is None else x * shaped(x, mask, channel_dim, rows)


def shaped(x: Tensor, mask: Tensor, channel_dim: int, rows: Rows | None = None) -> Tensor:
    """Return a mask in the shape in which it can be multiplied with a tensor."""
    mask = mask.to(x.dtype)  # the law of a width may be of another precision
    leading, channel_dim = mask.shape[:-1], channel_dim % x.dim()
    if leading.numel() > 1 and rows is not None:
        return rows.spread(mask.reshape(-1, mask.shape[-1]), x, channel_dim)
    between = [1] * (channel_dim - len(leading))
    return mask.reshape(*leading, *between, mask.shape[-1], *[1] * (x.dim() - 1 - channel_dim))


def masked_norm(x: Tensor, kept: Tensor, dims: int | tuple[int, ...], eps: float | None, centred: bool) -> Tensor:
    """Normalise over axes by the statistics of what is kept."""
    count = kept.sum(dims, keepdim=True)
    x = x * kept
    if centred:
        x = (x - x.sum(dims, keepdim=True) / count) * kept
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    return x * ((x.square().sum(dims, keepdim=True) / count) + eps).rsqrt()


class Read(NamedTuple):
    """Channels that a function reads with a weight.

    Attributes:
        axis: The channels.
        rows: Where the examples lie in what it reads.
    """

    axis: Axis
    rows: Rows | None


class MaskedReads(TorchFunctionMode):
    """Functions that take certain weights, or views of them, read masked channels; norms take statistics over these.

    Args:
        reads: What is read with a weight, by weight.
    """

    def __init__(self, reads: list[tuple[Tensor, Read]]) -> None:
        super().__init__()
        self._reads = {_memory(weight): read for weight, read in reads if read.axis.mask() is not None}

    def __bool__(self) -> bool:
        """Say whether anything is masked."""
        return bool(self._reads)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Mask what a function reads."""
        name, kwargs = getattr(func, "__name__", ""), dict(kwargs or {})
        if _ON_THEIR_OWN:
            return func(*args, **kwargs)
        if name in READING:
            return self._read(func, name, list(args), kwargs)
        if name in NORMS:
            return self._norm(func, name, args, kwargs)
        return func(*args, **kwargs)

    def _read(self, func: Callable[..., Any], name: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
        position = 1 if name == "addmm" else 0
        first = {"addmm": "mat1"}.get(name, "input")
        x = args[position] if len(args) > position else kwargs[first]
        second = [
            *args[position + 1 : position + 2],
            *(kwargs[key] for key in ("weight", "mat2", "other") if key in kwargs),
        ]
        if second and (read := self._reads.get(_memory(second[0]))) is not None:
            masked = apply_mask(x, read.axis.mask(), READING[name], read.rows)
            if len(args) > position:
                args[position] = masked
            else:
                kwargs[first] = masked
        return func(*args, **kwargs)

    def _norm(self, func: Callable[..., Any], name: str, args: Any, kwargs: dict[str, Any]) -> Any:
        names: tuple[str, ...] = ("input", "normalized_shape", "weight", "eps")
        if name != "rms_norm":
            names = ("input", "normalized_shape" if NORMS[name] == "last" else "num_groups", "weight", "bias", "eps")
        given = dict(zip(names, args, strict=False)) | kwargs
        weight = given.get("weight")
        read = None if weight is None else self._reads.get(_memory(weight))
        if read is None or weight is None:
            return func(*args, **kwargs)
        x, bias, last = given["input"], given.get("bias"), NORMS[name] == "last"
        mask = read.axis.mask()
        assert mask is not None  # others are not in the table
        kept = shaped(x, mask, -1 if last else 1, read.rows).expand(x.shape)
        dims = -1 if last else tuple(range(1, x.dim()))
        default = None if name == "rms_norm" else 1e-5
        x = masked_norm(x, kept, dims, given.get("eps", default), name != "rms_norm")
        trailing = (1,) * (0 if last else x.dim() - 2)
        x = x * weight.reshape(-1, *trailing)
        return x if bias is None else x + bias.reshape(-1, *trailing)


_ON_THEIR_OWN: list[None] = []


@contextmanager
def on_its_own() -> Iterator[None]:
    """Let a nested layer whose weights other functions read, too, look after its own reads inside a block."""
    _ON_THEIR_OWN.append(None)
    try:
        yield
    finally:
        _ON_THEIR_OWN.pop()


def _memory(tensor: Tensor) -> int:
    """Return what a tensor and its views have in common."""
    return tensor.untyped_storage().data_ptr()


@contextmanager
def substituted(module: nn.Module, values: Mapping[str, Any]) -> Iterator[None]:
    """Let a module find other values under the names of its parameters, buffers and attributes inside a block."""
    own, before = vars(module), {name: vars(module)[name] for name in values if name in vars(module)}
    own.update(values)
    try:
        yield
    finally:
        for name in values:
            del own[name]
        own.update(before)


@dataclass(eq=False)
class OwnChannels:
    """What a module that is no nested layer has along channels that can be cut: parameters, buffers, numbers of them.

    Attributes:
        path: Name of the module.
        module: The module.
        parameters: Channels along axes of parameters and buffers, by their names.
        numbers: Attributes that count channels, each by its name and, if it is a tuple, the place in it.
    """

    path: str
    module: nn.Module
    parameters: dict[str, dict[int, Axis]]
    numbers: dict[tuple[str, int | None], Axis]

    @property
    def widths(self) -> list[Width]:
        """The widths of the channels, each once."""
        axes = [axis for axes in self.parameters.values() for axis in axes.values()] + list(self.numbers.values())
        return list(dict.fromkeys(width for axis in axes for width in axis.widths))

    def values(self, kept: Mapping[str, int] | None = None) -> dict[str, Any]:
        """Return parameters, buffers and numbers, cut.

        Args:
            kept: Numbers of units that groups keep; those of this forward pass by default.
        """
        cut: dict[str, Any] = {}
        for name, axes in self.parameters.items():
            index = {dim: axis.index(kept) for dim, axis in axes.items()}
            if any(each is not None for each in index.values()):
                cut[name] = take(self.tensor(name), index)
        return cut | self.counts(kept)

    def counts(self, kept: Mapping[str, int] | None = None) -> dict[str, Any]:
        """Return the numbers."""
        cut: dict[str, Any] = {}
        for (name, place), axis in self.numbers.items():
            number = kept_channels(axis.index(kept), axis.size)
            if place is None:
                cut[name] = number
            else:
                before = cut.get(name, vars(self.module)[name])
                cut[name] = type(before)((*before[:place], number, *before[place + 1 :]))
        return cut

    def num_parameters(self, name: str, kept: Mapping[str, int]) -> int:
        """Return how many entries of a parameter are left when groups keep a number of units."""
        count, axes = 1, self.parameters.get(name, {})
        for dim, size in enumerate(self.tensor(name).shape):
            count *= kept_channels(axes[dim].index(kept), size) if dim in axes else size
        return count

    def tensor(self, name: str) -> Tensor:
        """Return a parameter or a buffer."""
        found = {**dict(self.module.named_parameters(recurse=False)), **dict(self.module.named_buffers(recurse=False))}
        return found[name]

    @contextmanager
    def cut(self) -> Iterator[None]:
        """Let the module find what this forward pass computes with, inside a block."""
        with substituted(self.module, self.values()):
            yield
