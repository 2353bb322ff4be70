"""What a plain net costs: parameters, and multiply-adds as they are counted in a pass."""

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

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
        counter = FlopCounterMode(display=False)
        # What is attention in one operation is counted by some versions of torch, on some devices.
        counter.flop_registry = {each: f for each, f in counter.flop_registry.items() if "attention" not in str(each)}
        stack.enter_context(counter)
        net(*inputs, **named)
    parameters = sum(parameter.numel() for parameter in net.parameters())
    return {"multiply_adds": counter.get_total_flops() // (2 * Batch(inputs, named).num_rows), "parameters": parameters}


def example_of(net: NestedNet) -> tuple[Any, ...]:
    """Return the first row of the example that a net was nested with, in order; nothing of a net made by hand."""
    like = next(net.parameters())

    def copied(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return x.detach().clone().to(like.device, like.dtype if x.is_floating_point() else x.dtype)

    return tuple(map(copied, net.example))
