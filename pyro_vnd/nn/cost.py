"""What a plain net costs: parameters, and multiply-adds as they are counted in a pass."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pyro_vnd._data import Batch
from pyro_vnd._state import module_mode
from pyro_vnd.nn.net import NestedNet

__all__ = ["net_cost", "zeros_for"]


def net_cost(net: nn.Module, *inputs: Any, **named: Any) -> dict[str, int]:
    """Count the parameters of a net and its multiply-adds for one row.

    Args:
        net: A plain module, such as `narrow` makes.
        *inputs: A batch of inputs; any number of rows, which the first tensor counts.
        **named: Inputs that it takes by name.

    Returns:
        multiply_adds, half the floating-point operations of matrix products and convolutions, and parameters.

    Example:
        >>> import torch
        >>> net_cost(torch.nn.Linear(2, 3), torch.zeros(1, 2))
        {'multiply_adds': 6, 'parameters': 9}
    """
    with torch.no_grad(), module_mode([net], training=False), FlopCounterMode(display=False) as counter:
        net(*inputs, **named)
    parameters = sum(parameter.numel() for parameter in net.parameters())
    return {"multiply_adds": counter.get_total_flops() // (2 * Batch(inputs, named).num_rows), "parameters": parameters}


def zeros_for(net: NestedNet, plain: nn.Module) -> tuple[Tensor, ...]:
    """Return zeros like the example that a net was nested with, numbers or else indices; nothing if it takes neither.

    Args:
        net: The nested net.
        plain: What `narrow` makes of it.
    """
    zeros = tuple(next(net.parameters()).new_zeros(shape) for shape in net.input_shapes)
    with torch.no_grad(), module_mode([plain], training=False):
        for inputs in (zeros, tuple(x.long() for x in zeros)):  # of indices, say, for an embedding
            try:
                if inputs:
                    plain(*inputs)
                    return inputs
            except RuntimeError:
                continue
    return ()
