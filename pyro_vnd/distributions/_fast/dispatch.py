"""When hand-written autograd functions apply, and when the plain code does their work."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from pyro_vnd._compat import only_plain_code

__all__ = ["fast_or_plain", "plain_gradients"]


def fast_or_plain(function: type[torch.autograd.Function], plain: Callable[..., Any], *args: Any) -> Any:
    """Apply an autograd function, or where torch traces operations the plain code that it stands for.

    Args:
        function: Has a `forward` that takes the context: the interface for `torch.func` takes twice the time of a small
            operation.
        plain: Does the same in operations of torch.
        *args: Of both.

    Returns:
        What one of them returns.
    """
    return plain(*args) if only_plain_code() else function.apply(*args)


def plain_gradients(
    plain: Callable[..., Any], inputs: Sequence[Tensor], needed: Sequence[bool], *grads: Tensor
) -> tuple[Tensor | None, ...]:
    """Return gradients that can be differentiated themselves: those of the plain code.

    Args:
        plain: Of the inputs.
        inputs: Tensors that the autograd function saved.
        needed: Which of them need a gradient.
        *grads: Gradients with respect to what `plain` returns.

    Returns:
        A gradient, or None where none is needed, for each input.
    """
    wanted = [x for x, need in zip(inputs, needed, strict=True) if need]
    found = iter(torch.autograd.grad(plain(*inputs), wanted, grads, create_graph=True))
    return cast(tuple[Tensor | None, ...], tuple(next(found) if need else None for need in needed))
