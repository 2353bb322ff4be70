"""The tensor that a likelihood takes, of what a net returns."""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from torch import Tensor

__all__ = ["Output", "picked"]

Output: TypeAlias = str | int | Callable[[Any], Tensor] | None


def picked(caller: str, returned: Any, output: Output = None) -> Tensor:
    """Return the outputs of a net for a likelihood.

    Args:
        caller: What needs them, for messages.
        returned: What the net returned: a tensor, tuple, mapping or object.
        output: What of it: a key or the name of an attribute, a place in a tuple, or a function that picks it. By
            default the tensor itself, or what is called "logits".

    Raises:
        ValueError: If that is no tensor.

    Example:
        >>> import torch
        >>> picked("caller", {"logits": torch.zeros(2), "states": []})
        tensor([0., 0.])
    """
    if callable(output):
        found = output(returned)
    elif output is None and isinstance(returned, Tensor):
        return returned
    else:
        key: Any = "logits" if output is None else output
        try:
            is_item = isinstance(key, int) or isinstance(returned, Mapping)
            found = returned[key] if is_item else getattr(returned, key)
        except (KeyError, IndexError, AttributeError, TypeError):
            found = None
    if not isinstance(found, Tensor):
        got = (
            f"{type(returned).__name__} with {list(returned)}"
            if isinstance(returned, Mapping)
            else type(returned).__name__
        )
        raise ValueError(
            f"{caller}: the outputs of the net must be a tensor, or have one called 'logits'; it returns {got}, and "
            f"output={output!r}: say what they are by `NestedModel(net, likelihood, output=...)`, a key, an attribute, "
            "a place in a tuple or a function"
        )
    return found
