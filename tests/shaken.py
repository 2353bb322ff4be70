"""Models whose parameters are not where they start, where much is zero and would hide mistakes."""

from typing import TypeVar

import torch
from torch import nn

AnyModule = TypeVar("AnyModule", bound=nn.Module)


def shaken(module: AnyModule, scale: float) -> AnyModule:
    """Add Normal noise to every parameter of a module, and return it."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += scale * torch.randn_like(parameter)
    return module
