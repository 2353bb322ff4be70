"""Autograd functions without the interface of `torch.func`, which costs as much as a small operation."""

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

__all__ = ["apply_eagerly"]


def apply_eagerly(
    function: type[torch.autograd.Function], otherwise: Callable[..., Tensor], *args: Tensor | float
) -> Tensor:
    """Apply a function that only ordinary autograd can follow, or, under `torch.func`, what it stands for.

    Args:
        function: Has a `forward` that takes the context.
        otherwise: Does the same in a way that `vmap`, `grad` and their like can follow.
        *args: Of both.

    Returns:
        What one of them returns.
    """
    try:
        return cast(Tensor, function.apply(*args))
    except RuntimeError as error:
        if "functorch" not in str(error):  # what torch says of such functions under vmap, grad and their like
            raise
        return otherwise(*args)
