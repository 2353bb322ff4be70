"""How channels pass through operations that only move entries: found out by running them on indices."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.fx import Node

from pyro_vnd.nn.tracing.channels import Axes, Mark, Runs, SizeOf, kept, leaves, scaled
from pyro_vnd.nn.tracing.interpreter import Call, rule

__all__: list[str] = []

NAMES = """
    chunk expand flatten flip index_select moveaxis movedim narrow permute pixel_shuffle pixel_unshuffle repeat
    repeat_interleave reshape roll select split squeeze swapaxes swapdims t tensor_split tile transpose unbind unflatten
    unsqueeze view
"""
MODULES = (nn.ChannelShuffle, nn.Flatten, nn.PixelShuffle, nn.PixelUnshuffle, nn.Unflatten)


@rule(NAMES, *MODULES, follows_sizes=True)
def structural(call: Call) -> Mark:
    """Follow each axis, and leave it whole if its channels are not in order, or if the operation has fixed sizes."""
    tensor, axes = call.tensors[0], {axis: runs for axis, runs in call.axes().items() if call.shape()[axis] > 1}
    own = {run.owner.root for runs in axes.values() for run in runs}
    for other in set(call.node.all_input_nodes) - {tensor}:
        for leaf in leaves(call.mark(other)):
            if isinstance(leaf, dict) or not {run.owner.root for run in leaf.runs} <= own:
                call.hold(leaf, "takes it as an argument")
    if not axes:
        return None
    entries = torch.arange(call.shape().numel(), device=call.value(tensor).device).view(call.shape())
    moved = call.again(tensor, entries)
    results: list[Axes] = [{} for _ in moved]
    for axis, runs in axes.items():
        size, stride = call.shape()[axis], entries.stride(axis)
        for out, result in zip(moved, results, strict=True):
            place = _find(out // stride % size, size)
            along = scaled(runs, out.shape[place]) if place is not None else None
            if place is None or along is None:
                call.hold({axis: runs}, "takes channels apart, or out of order")
            else:
                result[place] = along
    if not _bears_a_cut(call, tensor, entries, axes, moved, results):
        call.hold(axes, "has fixed sizes (write -1, or read the size from its own argument)")
    return results[0] if isinstance(call.out, Tensor) else tuple(results)


def _find(indices: Tensor, size: int) -> int | None:
    """Return the axis, the finest if there are several, along which indices below `size` grow in even blocks."""
    found = None
    for axis, length in enumerate(indices.shape):
        if length < 2 or not indices.numel() or (found is not None and length <= indices.shape[found]):
            continue
        rows, t = indices.movedim(axis, 0).reshape(length, -1), torch.arange(length, device=indices.device)
        low, high = t * size // length, ((t + 1) * size - 1) // length
        if torch.equal(rows.amin(1), low) and torch.equal(rows.amax(1), high):
            found = axis
    return found


def _cut(x: Tensor, axes: Axes) -> Tensor:
    """Cut the last atom of each space along the axes of a tensor."""
    for axis, runs in axes.items():
        x = x.index_select(axis, kept(runs).nonzero()[:, 0].to(x.device))
    return x


def _bears_a_cut(
    call: Call, tensor: Node, entries: Tensor, axes: Axes, moved: list[Tensor], results: list[Axes]
) -> bool:
    """Tell whether the operation on fewer channels gives what is left of its result."""
    try:
        outs = call.again(tensor, _cut(entries, axes), narrow=True)
    except (IndexError, RuntimeError, ValueError):
        return False
    expected = [_cut(out, result) for out, result in zip(moved, results, strict=True)]
    return len(outs) == len(expected) and all(map(torch.equal, outs, expected))


@rule("size")
def size(call: Call) -> Mark:
    """Remember which numbers are numbers of channels."""
    axes = call.axes()
    sizes = tuple(_size_of(axes[axis]) if axis in axes else None for axis in range(len(call.shape())))
    dim = call.argument("dim", 1)
    return sizes if dim is None else sizes[dim]


def _size_of(runs: Runs) -> SizeOf:
    return SizeOf(runs, lambda: int(kept(runs).sum()))


@rule("getattr", follows_sizes=True)
def attribute(call: Call) -> Mark:
    """Follow the shape of a tensor, its transpose, and the named parts of a result."""
    of, name = call.node.args
    mark = call.mark(of)
    if name == "shape":
        return tuple(_size_of(call.axes()[axis]) if axis in call.axes() else None for axis in range(len(call.out)))
    if name in ("T", "mT"):
        return structural(call)
    if isinstance(mark, tuple) and name in ("values", "indices"):
        return mark[name == "indices"]
    return call.fail() if mark and isinstance(call.out, Tensor) else None


@rule("getitem", follows_sizes=True)
def item(call: Call) -> Mark:
    """Take an item of a tuple, or slices of a tensor."""
    container, index = call.node.args
    mark = call.mark(container)
    if isinstance(mark, tuple):
        return mark[call.value(index)]
    return structural(call) if call.tensors else None


@rule("dim ndimension get_device is_floating_point _assert", follows_sizes=True)
def nothing(call: Call) -> Mark:
    """Ask for what does not depend on channels."""
    return None
