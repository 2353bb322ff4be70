"""The precision in which the nets of a fit compute."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pyro_vnd.nn import NestedNet
from pyro_vnd.nn.values import ValueHead

__all__ = ["computing_in"]


@contextmanager
def computing_in(precision: str, programs: Iterable[Any]) -> Iterator[None]:
    """Let the nets of model and guide compute in a precision inside a block, and return float32.

    Laws, divergences and their gradients are outside nets, and so in float32, whatever the model is.

    Args:
        precision: "32" or "bf16".
        programs: Model and guide, which have been called, so that all their modules are there.

    Yields:
        Nothing.
    """
    with ExitStack() as stack:
        if precision == "bf16":
            roots = [program for program in programs if isinstance(program, nn.Module)]
            for net in dict.fromkeys(net for root in roots for net in _nets(root, is_root=True)):
                half = _Half(next(net.parameters()).device.type)
                stack.callback(net.register_forward_pre_hook(half.begin).remove)
                stack.callback(net.register_forward_hook(half.end, always_call=True).remove)
        yield


class _Half:
    """Autocast for as long as a net runs."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.running: list[torch.autocast] = []

    def begin(self, net: nn.Module, inputs: Any) -> None:
        self.running.append(torch.autocast(self.device, dtype=torch.bfloat16))
        self.running[-1].__enter__()

    def end(self, net: nn.Module, inputs: Any, outputs: Any) -> Any:
        self.running.pop().__exit__(None, None, None)
        return _single(outputs)


def _single(outputs: Any) -> Any:
    """Return what a net returns in float32; what is no tensor and no plain container stays what it is."""
    if isinstance(outputs, Tensor):
        return outputs.float() if outputs.dtype == torch.bfloat16 else outputs
    if type(outputs) in (tuple, list):
        return type(outputs)(map(_single, outputs))
    return {key: _single(each) for key, each in outputs.items()} if type(outputs) is dict else outputs


def _nets(module: nn.Module, *, is_root: bool = False) -> Iterator[nn.Module]:
    """Yield the nets in a program: what was nested, and the largest parts that are all plain torch."""
    if isinstance(module, NestedNet):
        yield module.net
    elif isinstance(module, ValueHead):  # whose values are of hundreds of nats
        return
    elif is_root or any(map(_may_hold_laws, module.modules())):
        for child in module.children():
            yield from _nets(child)
    elif next(module.parameters(), None) is not None:
        yield module


def _may_hold_laws(module: nn.Module) -> bool:
    """Say whether a module is one of Pyro's or of this library."""
    return any(kind.__module__.partition(".")[0] in ("pyro", "pyro_vnd") for kind in type(module).__mro__)
