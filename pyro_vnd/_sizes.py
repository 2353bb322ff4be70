"""What is asked of numbers: that they are there, of the sizes of nets, and of whatever has bounds."""

import math
import sys
from collections.abc import Collection, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "as_integers",
    "as_numbers",
    "check_count",
    "check_num_latents",
    "check_seed",
    "check_sizes",
    "is_integer",
    "is_number",
    "is_one_of",
    "is_truth",
    "is_within",
    "without_values",
]


_STORED = {kind for name, kind in vars(torch).items() if name.startswith("float8_")}


def without_values(x: Tensor) -> str:
    """Say what a tensor is that has no dense values, and how to make them; nothing of others."""
    if x.is_nested:
        return "a nested tensor: give torch.nested.to_padded_tensor(x, 0.0), and say in another what is there"
    if x.layout is not torch.strided:
        return f"layout {x.layout}: give x.to_dense()"
    if x.is_meta:
        return "a tensor on the device 'meta', which has no values"
    if x.is_quantized:
        return "a quantised tensor: give x.dequantize()"
    return f"{x.dtype}, with which torch does not compute: give x.float()" if x.dtype in _STORED else ""


def as_numbers(value: Any) -> Tensor | None:
    """Return real numbers as a tensor, given as one, a list, an array or a tensor; None if something else was given.

    Example:
        >>> as_numbers([1, 2.5]), as_numbers(True), as_numbers(1j), as_numbers("2"), as_numbers(2**70)
        (tensor([1.0000, 2.5000]), None, None, None, None)
    """
    try:
        x = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return None
    return None if x.is_complex() or x.dtype == torch.bool or without_values(x) else x


def as_integers(value: Any) -> Tensor | None:
    """Return integers as a tensor, given as one, a list, an array or a tensor; None if something else was given.

    Example:
        >>> as_integers([1, 2]), as_integers(2.0), as_integers(True), as_integers("2"), as_integers(2**70)
        (tensor([1, 2]), None, None, None, None)
    """
    x = as_numbers(value)
    return None if x is None or x.is_floating_point() else x


def is_integer(value: Any) -> bool:
    """Return whether a value is an integer, of Python or NumPy, and no truth value.

    Example:
        >>> is_integer(3), is_integer(3.0), is_integer(True)
        (True, False, False)
    """
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_truth(value: Any) -> bool:
    """Return whether a value is a truth value, of Python, NumPy or torch, which some of their versions take as 0 or 1.

    Example:
        >>> is_truth(True), is_truth(torch.tensor(False)), is_truth(1)
        (True, True, False)
    """
    return isinstance(value, bool | np.bool_) or (isinstance(value, Tensor) and value.dtype == torch.bool)


def is_number(value: Any) -> bool:
    """Return whether a value is one real number, of Python, NumPy or torch, and no truth value.

    Example:
        >>> is_number(0.5), is_number(torch.tensor([0.5])), is_number("0.5"), is_number(True)
        (True, True, False, False)
    """
    if isinstance(value, Tensor):
        is_one = not without_values(value) and value.numel() == 1
        return is_one and not value.is_complex() and value.dtype != torch.bool
    return isinstance(value, Real) and not isinstance(value, bool)


def is_within(value: Any, least: float = -math.inf, most: float = math.inf, *, above: float = -math.inf) -> bool:
    """Return whether a value is one finite number, from `least` to `most` and larger than `above`.

    Example:
        >>> is_within(0.5, 0, 1), is_within(0, above=0), is_within(float("nan")), is_within([1.0])
        (True, False, False, False)
    """
    try:
        return is_number(value) and math.isfinite(value) and least <= value <= most and bool(value > above)
    except OverflowError:  # an integer beyond all floats
        return False


def is_one_of(value: Any, words: Collection[str | None]) -> bool:
    """Return whether a value is one of some words; an array, which is compared by entry, is none.

    Example:
        >>> is_one_of("up", ("up", None)), is_one_of(None, ("up", None)), is_one_of(torch.ones(2), ("up", None))
        (True, True, False)
    """
    return (value is None or isinstance(value, str)) and value in words


def check_count(function: str, /, least: int = 1, **counts: int) -> None:
    """Raise a ValueError that names the function and its first argument that is no integer of at least `least`.

    Example:
        >>> check_count("sample", num_samples=2.0)
        Traceback (most recent call last):
        ValueError: sample: argument `num_samples` must be an integer >= 1; got 2.0
    """
    for name, count in counts.items():
        if not is_integer(count) or not least <= count <= sys.maxsize:
            most = f" and <= {sys.maxsize}" if is_integer(count) and count > sys.maxsize else ""
            raise ValueError(f"{function}: argument `{name}` must be an integer >= {least}{most}; got {count!r}")


def check_num_latents(function: str, model: Any) -> None:
    """Raise a ValueError if a model says of no latents how many it has."""
    if not is_integer(getattr(model, "num_latents", None)):
        raise ValueError(
            f"{function}: argument `model` must have `num_latents`, as autoencoders do; got {type(model).__name__}"
        )


def check_seed(function: str, seed: Any) -> None:
    """Raise a ValueError if something is no seed of torch."""
    if not is_integer(seed) or not -(2**63) <= seed < 2**64:
        raise ValueError(f"{function}: argument `seed` must be an integer from -2**63 to 2**64 - 1; got {seed!r}")


def check_sizes(function: str, /, fewest: int = 0, **sizes: Sequence[int]) -> None:
    """Raise a ValueError that names the function and its first argument that is no sequence of positive integers.

    Example:
        >>> check_sizes("lenet", channels=(20, 0))
        Traceback (most recent call last):
        ValueError: lenet: argument `channels` must be positive; got (20, 0)
    """
    for name, size in sizes.items():
        is_list = isinstance(size, Sequence) and not isinstance(size, str | bytes) and len(size) >= fewest
        if not is_list or not all(map(is_integer, size)):
            some = f", {fewest} or more" * bool(fewest)
            raise ValueError(
                f"{function}: argument `{name}` must be a list or tuple of integers >= 1{some}; got {size!r}"
            )
        if any(one <= 0 for one in size):
            raise ValueError(f"{function}: argument `{name}` must be positive; got {size}")
