"""Which layers of a net share channels, so that a prefix of them can be kept and the rest cut."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy

from pyro_vnd.nn.axis import Run
from pyro_vnd.nn.tracing import channel_rules, structural_rules  # noqa: F401  (they fill the table of rules)
from pyro_vnd.nn.tracing.channels import Runs
from pyro_vnd.nn.tracing.interpreter import Interpreter, find_rule

__all__ = ["ChannelGroups", "LayerChannels", "Layout", "Tracer", "channel_groups"]

Layout: TypeAlias = tuple[Run[str | None], ...]


@dataclass(frozen=True)
class LayerChannels:
    """What lies, in order, along the channel axis that a layer reads and the one that it makes.

    The owner of a run is the name of its group, or None where channels are left whole.
    """

    inputs: Layout
    outputs: Layout


@dataclass(frozen=True)
class ChannelGroups:
    """The channels of a net that are cut together.

    Attributes:
        units: How many pieces each group can be cut into, by its name, that of the first layer that makes its channels.
        layers: Channels of each layer with parameters or statistics along them, by name, in order of execution.
        whole: Why channels cannot be cut, by the first layer that makes them.
    """

    units: dict[str, int]
    layers: dict[str, LayerChannels]
    whole: dict[str, str]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the groups, in order of execution."""
        return tuple(self.units)


def channel_groups(
    net: nn.Module, example_input: Tensor | tuple[Any, ...], *, exclude: Collection[str] = ()
) -> ChannelGroups:
    r"""Find which layers of a net share channels.

    Each linear or convolutional layer makes a space of channels. Spaces whose channels are added, multiplied or tied
    by a grouped convolution are one group. For each group g and each number of units $k \le$ `units[g]`, the net of
    which all layers lose the channels past the first k units computes what the whole net does if these channels are
    zero wherever a linear or convolutional layer reads them. Only norms over the channels themselves (LayerNorm,
    RMSNorm, GroupNorm of one group) differ: their statistics are then over the channels that are left.

    Inputs and outputs of the net are left whole, and so is what meets them, or a parameter of the net, a softmax, sum
    or maximum over channels, fixed sizes as in `x.view(-1, 400)`, or a layer that shares its weights.

    The net is traced by torch.fx and run once on the example, in evaluation mode; it is left as it was.

    Args:
        net: Any module that torch.fx can trace.
        example_input: Its input, or the tuple of its arguments; arguments left out keep their defaults.
        exclude: Names of submodules to leave alone, and all in them; what they read and make is left whole.

    Returns:
        The groups in order of execution, and the channels of each layer.

    Raises:
        ValueError: If the net cannot be traced, an operation cannot be followed, a name in `exclude` does not exist,
            or nothing can be cut.

    Example:
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(54, 4))
        >>> groups = channel_groups(net, torch.zeros(1, 1, 5, 5))
        >>> groups.units
        {'0': 6}
        >>> groups.layers["3"].inputs
        (Run(owner='0', size=54),)
    """
    inputs = example_input if isinstance(example_input, tuple) else (example_input,)
    if not any(isinstance(value, Tensor) for value in inputs):
        raise ValueError(
            f"nest: argument `example_input` must be a tensor or a tuple with one; got {type(example_input).__name__}"
        )
    first = next(value for value in inputs if isinstance(value, Tensor))
    if first.numel() == 0:
        raise ValueError(f"nest: argument `example_input` must have at least one example; got {tuple(first.shape)}")
    if first.dim() == 0 or (first.dim() == 1 and first.is_floating_point()):
        raise ValueError(
            "nest: argument `example_input` must have examples along its first dimension, (N, ...); got shape "
            f"{tuple(first.shape)}: give `x[None]` for a single example"
        )
    if lazy := [name for name, parameter in net.named_parameters() if is_lazy(parameter)]:
        raise ValueError(f"nest: run the net once before; `{lazy[0]}` has no shape yet")
    excluded = _find_excluded(net, exclude)
    with _undisturbed(net, inputs):
        graph = _trace(net, excluded, len(inputs))
        wanted = sum(node.op == "placeholder" for node in graph.nodes)
        if wanted != len(inputs):
            raise ValueError(f"nest: `example_input` has {len(inputs)} arguments; the net takes {wanted}")
        clones = [value.clone() if isinstance(value, Tensor) else value for value in inputs]
        interpreter = Interpreter(net, graph, clones, excluded)
        interpreter.run()
    spaces = list(dict.fromkeys(space.root for space in interpreter.made))
    whole = {space.name: space.reason for space in spaces if space.reason}
    cut = [space for space in spaces if not space.reason]
    if not cut:
        reasons = "".join(f"\n- `{name}`: {reason}" for name, reason in whole.items()) or " it has no layers to cut"
        raise ValueError(f"nest: no channels of the net can be cut:{reasons}")
    layers = {name: LayerChannels(_layout(a), _layout(b)) for name, (a, b) in interpreter.layers.items()}
    return ChannelGroups({space.name: space.atoms for space in cut}, layers, whole)


def _layout(runs: Runs) -> Layout:
    return tuple(Run(None if space.reason else space.name, size) for space, size in runs)


def _find_excluded(net: nn.Module, names: Collection[str]) -> set[int]:
    """Return the ids of the modules to leave alone."""
    if isinstance(names, str):
        raise ValueError(f"nest: argument `exclude` must be a list of names; got the string {names!r}")
    modules = {name: module for name, module in net.named_modules(remove_duplicate=False) if name}
    for name in names:
        if name not in modules:
            close = difflib.get_close_matches(name, modules, cutoff=0.4) or list(modules)[:5]
            raise ValueError(f"nest: argument `exclude`: the net has no module {name!r}; close are {close}")
    return {id(module) for name in names for module in modules[name].modules()}


@contextmanager
def _undisturbed(net: nn.Module, inputs: Sequence[Any]) -> Iterator[None]:
    """Evaluate the net without a trace: training flags, attributes and random numbers are as before."""
    before = {module: dict(vars(module)) for module in net.modules()}
    tensors = [*net.parameters(), *net.buffers(), *(value for value in inputs if isinstance(value, Tensor))]
    devices = {tensor.device.index for tensor in tensors if tensor.is_cuda}
    try:
        for module in before:
            module.training = False
        with torch.no_grad(), torch.random.fork_rng(devices):
            yield
    finally:
        for module, attributes in before.items():
            vars(module).clear()
            vars(module).update(attributes)


def _trace(net: nn.Module, excluded: set[int], num_inputs: int) -> fx.Graph:
    tracer = Tracer(excluded, num_inputs)
    try:
        return tracer.trace(net)
    except Exception as error:  # whatever the code of the net does with what is no tensor
        path = tracer.culprit
        where = f"`{path}` ({type(net.get_submodule(path)).__name__})" if path else type(net).__name__
        advice = f'`exclude=["{path}"]` leaves it alone' if path else "put the code into a submodule, to exclude that"
        raise ValueError(f"nest: torch.fx cannot trace {where}: {error}; {advice}") from error


class Tracer(fx.Tracer):
    """Enters modules that have no rule; arguments that the example input leaves out keep their defaults.

    Args:
        excluded: Ids of modules that are not entered either.
        num_inputs: How many arguments the net is given.

    Attributes:
        culprit: Name of the module in which tracing failed, "" if it did not.
    """

    def __init__(self, excluded: set[int], num_inputs: int) -> None:
        super().__init__()
        self.culprit = ""
        self._excluded, self._num_inputs = excluded, num_inputs

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Say whether a module is one operation of the trace."""
        known = id(m) in self._excluded or find_rule(m) is not None
        return known or super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Enter a module, or record its call."""
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            self.culprit = self.culprit or self.path_of_module(m)
            raise

    def create_proxy(self, kind: str, target: Any, args: tuple[Any, ...], *rest: Any, **kwargs: Any) -> Any:
        """Record an operation; of the net's arguments, those it is given."""
        if kind != "placeholder":
            return super().create_proxy(kind, target, args, *rest, **kwargs)
        if target.startswith("**"):
            return {}
        count = max(self._num_inputs, 0) if target.startswith("*") else 1
        self._num_inputs -= count
        if self._num_inputs < 0 and args:
            return args[0]
        names = [f"{target[1:]}_{i}" for i in range(count)] if target.startswith("*") else [target]
        proxies = tuple(super(Tracer, self).create_proxy(kind, name, (), *rest, **kwargs) for name in names)
        return proxies if target.startswith("*") else proxies[0]
