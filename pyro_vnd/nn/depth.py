"""Residual blocks that may be dropped, the last ones of a stage first."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx, nn

from pyro_vnd.nn.reads import shaped, substituted
from pyro_vnd.nn.tracing import Given, ResidualBlock
from pyro_vnd.nn.width import Width

__all__ = ["NestedBlock", "is_in_a_list", "stand_in", "take_out", "taken_out"]


@dataclass(eq=False)
class NestedBlock:
    r"""A residual block that a mask over the blocks of its stage may drop.

    $$y = x + m_i (f(x) - x), \qquad m_i = 1[i \le L], \quad L \sim \text{the law of the width},$$

    which is f(x) where the block is kept and x where it is dropped, both exactly. A sliced pass runs f only if it is
    kept.

    Attributes:
        module: The block, in the nested net.
        found: What is known of it.
        width: The width of its stage, whose units are the blocks.
        place: Its place in the stage, from 0.
        can_go: Whether it can be taken out of the container that it is in, rather than replaced.
    """

    module: nn.Module
    found: ResidualBlock
    width: Width
    place: int
    can_go: bool = False

    @property
    def path(self) -> str:
        """Name of the block."""
        return self.found.path

    def is_dropped(self, kept: Mapping[str, int]) -> bool:
        """Say whether the block is dropped when groups keep a number of units."""
        return self.place >= kept.get(self.width.name, self.width.num_units)

    @property
    def is_sliced_away(self) -> bool:
        """Whether this forward pass does not run the block."""
        return self.width.kept is not None and self.place >= self.width.kept

    def keep_prob(self) -> Tensor | None:
        """Return the probability that the block is kept, shape (), or None if it counts in full."""
        return None if self.width.keep_probs is None else self.width.keep_probs[self.place]

    @contextmanager
    def masked(self) -> Iterator[None]:
        """Let the block be dropped as far as this forward pass says, inside a block of code."""
        with substituted(self.module, {"forward": partial(self._run, self.module.forward)}):
            yield

    def _run(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.is_sliced_away:
            return self.found.skipped(args, kwargs)
        mask, always = self.width.mask, self.width.kept_units(self.width.always_kept)
        if mask is None or self.place < always:
            return forward(*args, **kwargs)
        before = self.found.stream.among(args, kwargs)
        before = before.clone() if self.found.changes_input else before
        out = forward(*args, **kwargs)
        after = out if isinstance(out, Tensor) else out[0]
        rows, last = self.found.rows, after.dim() - 1
        entry = shaped(after, mask[..., self.place : self.place + 1], 0 if rows and rows.axis == last else last, rows)
        mixed = torch.lerp(before.to(after.dtype), after, entry)  # which is exact at both ends
        return mixed if isinstance(out, Tensor) else type(out)((mixed, *out[1:]))


def stand_in(block: NestedBlock) -> nn.Module:
    """Return a module of torch that hands on the input of a dropped block, for code that calls it by its place."""
    parameters = list(inspect.signature(block.module.forward).parameters.values())
    returns = block.found.returns
    is_single = len(parameters) == 1 and parameters[0].kind is not inspect.Parameter.VAR_POSITIONAL
    if is_single and isinstance(returns, Given) and returns.position == 0:
        return nn.Identity().train(block.module.training)
    graph = fx.Graph()
    nodes, optional = dict[str, fx.Node](), False
    for each in parameters:
        star = "*" if each.kind is each.VAR_POSITIONAL else "**" if each.kind is each.VAR_KEYWORD else ""
        optional |= each.default is not each.empty  # also what must be given by name, once something before need not
        default = None if optional and not star else each.empty
        nodes[star or each.name] = graph.placeholder(f"{star}{each.name}", default_value=default)

    def argument(given: Given) -> fx.Node:
        if given.name in nodes:
            return nodes[given.name]
        if given.position is None:
            return graph.call_function(getitem, (nodes["**"], given.name))
        return graph.call_function(getitem, (nodes["*"], given.position - list(nodes).index("*")))

    def result(each: Any) -> Any:
        return argument(each) if isinstance(each, Given) else each

    graph.output(result(returns) if isinstance(returns, Given) else type(returns)(map(result, returns)))
    module = fx.GraphModule({}, graph, class_name=type(block.module).__name__)
    for name, value in vars(block.module).items():  # such as the kind of a layer, which the net around it asks for
        if not name.startswith("_") and type(value) in (bool, int, float, str):
            setattr(module, name, value)
    return module


def take_out(net: nn.Module, paths: Collection[str]) -> None:
    """Take modules out of the containers that they are in; the modules after them move up, if they are numbered.

    Args:
        net: The net.
        paths: Names of modules for which `is_in_a_list` holds.
    """
    for container, keys in [(net.get_submodule(path), keys) for path, keys in _by_container(paths).items()]:
        parts = dict(container.named_children())
        is_numbered = list(parts) == [str(number) for number in range(len(parts))]
        left = [(key, part) for key, part in parts.items() if key not in keys]
        _fill(container, {str(number) if is_numbered else key: part for number, (key, part) in enumerate(left)})


@contextmanager
def taken_out(net: nn.Module, paths: Collection[str]) -> Iterator[None]:
    """Do what `take_out` does, inside a block of code."""
    containers = [net.get_submodule(path) for path in _by_container(paths)]
    before = [dict(container.named_children()) for container in containers]
    try:
        take_out(net, paths)
        yield
    finally:
        for container, parts in zip(containers, before, strict=True):
            _fill(container, parts)


def is_in_a_list(net: nn.Module, path: str) -> bool:
    """Say whether a module is in a list of modules, all of which are different ones."""
    container: Any = net.get_submodule(path.rpartition(".")[0])
    is_list = isinstance(container, nn.Sequential | nn.ModuleList)
    return is_list and len(container) == len(list(container.named_children()))


def _by_container(paths: Collection[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for path in paths:
        found.setdefault(path.rpartition(".")[0], []).append(path.rpartition(".")[2])
    return found


def _fill(container: nn.Module, parts: Mapping[str, nn.Module]) -> None:
    for key, _ in list(container.named_children()):
        delattr(container, key)
    for key, part in parts.items():
        container.add_module(key, part)
