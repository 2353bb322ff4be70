"""What a plain net costs: parameters, and multiply-adds as they are counted in a pass."""

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from pyro_vnd._compat import replaced_attention
from pyro_vnd._data import Batch
from pyro_vnd._state import module_mode
from pyro_vnd.nn.net import NestedNet

__all__ = ["example_of", "net_cost"]


def net_cost(net: nn.Module, *inputs: Any, **named: Any) -> dict[str, int]:
    """Count the parameters of a net and its multiply-adds for one row.

    Args:
        net: A plain module, such as `narrow` makes.
        *inputs: A batch of inputs; any number of rows, which the first tensor counts.
        **named: Inputs that it takes by name.

    Returns:
        multiply_adds, half the floating-point operations of matrix products and convolutions, without those of
        `torch.nn.functional.scaled_dot_product_attention`, and parameters.

    Example:
        >>> import torch
        >>> net_cost(torch.nn.Linear(2, 3), torch.zeros(1, 2))
        {'multiply_adds': 6, 'parameters': 9}
    """
    with ExitStack() as stack:
        # The counter does not bear views of parameters that have a gradient as arguments of modules.
        for parameter in (each for each in net.parameters() if each.requires_grad):
            stack.callback(parameter.requires_grad_)
            parameter.requires_grad_(False)
        stack.enter_context(torch.no_grad())
        stack.enter_context(module_mode([net], training=False))
        stack.enter_context(_in_single_operations(net))
        counter = stack.enter_context(FlopCounterMode(display=False))
        attention = stack.enter_context(_of_attention(counter))
        net(*inputs, **named)
    num_flops = counter.get_total_flops() - sum(attention)
    parameters = sum(parameter.numel() for parameter in net.parameters())
    return {"multiply_adds": num_flops // (2 * Batch(inputs, named).num_rows), "parameters": parameters}


@contextmanager
def _in_single_operations(net: nn.Module) -> Iterator[None]:
    """Let recurrent and transformer layers run as products that can be counted, not as one operation that cannot."""
    with ExitStack() as stack:
        stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
        if any(isinstance(part, nn.RNNBase) for part in net.modules()):  # other layers are as fast as ever
            stack.enter_context(_without_mkldnn())
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        yield


@contextmanager
def _without_mkldnn() -> Iterator[None]:
    flags = torch.backends.mkldnn.flags(enabled=False)
    with _quietly():
        flags.__enter__()
    try:
        yield
    finally:
        with _quietly():
            flags.__exit__(None, None, None)


@contextmanager
def _quietly() -> Iterator[None]:
    """Hide that torch has no Intel GPU, which it says where mkldnn is turned on or off."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


@contextmanager
def _of_attention(counter: FlopCounterMode) -> Iterator[list[int]]:
    """Give a list of what attention was counted as, which depends on device, shape and version of torch."""
    counted: list[int] = []
    attention = functional.scaled_dot_product_attention

    def watched(*args: Any, **kwargs: Any) -> Tensor:
        before = counter.get_total_flops()
        out = attention(*args, **kwargs)
        counted.append(counter.get_total_flops() - before)
        return out

    with replaced_attention(watched):
        yield counted


def example_of(net: NestedNet) -> tuple[Any, ...]:
    """Return the first row of the example that a net was nested with, in order; nothing of a net made by hand."""
    like = next(net.parameters())

    def copied(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return x.detach().clone().to(like.device, like.dtype if x.is_floating_point() else x.dtype)

    return tuple(map(copied, net.example))
