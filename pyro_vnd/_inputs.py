"""What is asked of data where they meet a model: labels that are classes, inputs that a net takes."""

import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Number
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pyro_vnd._compat import only_plain_code
from pyro_vnd._sizes import without_values

__all__ = [
    "Look",
    "check_dtype",
    "check_features",
    "check_labels",
    "check_numbers",
    "explain_arguments",
    "explain_inputs",
    "not_finite",
    "refuse_nan",
    "takes",
]

_NO_INPUTS = (str, bytes, Number, Mapping, Iterator, np.ndarray)
_REAL = ", if they are classes; real targets need a likelihood of their own"


def takes(function: Any, *args: Any, **named: Any) -> bool:
    """Say whether a function can be called with such arguments; yes where nobody knows.

    Example:
        >>> takes(abs, 1), takes(abs), takes(lambda t: t, s=1)
        (True, False, False)
    """
    try:
        inspect.signature(function).bind(*args, **named)
    except TypeError:
        return False
    except ValueError:  # it has no signature
        pass
    return True


class Look:
    """Say whether the values of a batch are to be looked at.

    On the CPU they always are. On an accelerator a look waits for all that the device has still to do: there it is due
    in the first evaluation, and in the first after each change between training and evaluation mode, as at the start of
    a fit. Shapes and types cost nothing and are not asked about here.

    Attributes:
        done: Whether values have been looked at; setting it to False makes a look due.
    """

    def __init__(self) -> None:
        self.done = False

    def is_due(self, x: Tensor) -> bool:
        """Return whether to look at the values of a tensor; never where torch traces operations."""
        return not only_plain_code() and (x.device.type == "cpu" or not self.done)


def check_labels(
    caller: str,
    labels: Any,
    num_rows: int,
    num_classes: int | None = None,
    *,
    argument: str = "labels",
    values: bool = True,
) -> Tensor:
    """Return labels as integers.

    Args:
        caller: What was given them, for messages.
        labels: The labels.
        num_rows: How many there must be.
        num_classes: They must be from 0 to this number less one; None for any integers.
        argument: Name of the argument.
        values: Whether to look at the values.

    Raises:
        ValueError: If they are no classes; the message says what came, and what to give.

    Example:
        >>> check_labels("caller", torch.tensor([[0], [1]]), 2, 3)
        Traceback (most recent call last):
        ValueError: caller: argument `labels` must be classes, integers from 0 to 2, shape (2,); got torch.int64 of ...
    """
    among = "" if num_classes is None else f" from 0 to {num_classes - 1}"
    expected = f"{caller}: argument `{argument}` must be classes, integers{among}, shape ({num_rows},)"
    if not isinstance(labels, Tensor):
        raise ValueError(f"{expected}; got {type(labels).__name__}: give torch.as_tensor({argument})")
    if said := without_values(labels):
        raise ValueError(f"{expected}; got {said}")
    got = f"{expected}; got {labels.dtype} of shape {tuple(labels.shape)}"
    is_real = labels.is_floating_point() or labels.is_complex()
    if labels.shape == (num_rows, 1):
        raise ValueError(f"{got}: give {argument}[:, 0]{f'.long(){_REAL}' if is_real else ''}")
    if labels.dim() == 2 and labels.shape == (num_rows, num_classes):
        raise ValueError(f"{got}: of one-hot rows give {argument}.argmax(-1)")
    if labels.shape != (num_rows,):
        raise ValueError(got)
    if is_real:
        raise ValueError(f"{got}: give {argument}.long(){_REAL}")
    if values and num_classes is not None and num_rows:
        low, high = (int(bound) for bound in labels.long().aminmax())
        if low < 0 or high >= num_classes:
            count = f": count them from 0, {argument} - 1" if (low, high) == (1, num_classes) else ""
            raise ValueError(f"{got} from {low} to {high}{count}")
    return labels.long()


def check_dtype(expected: str, x: Tensor, dtype: torch.dtype) -> None:
    """Raise a ValueError if numbers are of another type than a model's parameters, and not those of autocast.

    Args:
        expected: What the numbers are, for the message: "Model: argument `x` must be images".
        x: The numbers.
        dtype: Type of the model's parameters.
    """
    mixed = x.is_floating_point() and torch.is_autocast_enabled(x.device.type)
    if x.dtype != dtype and not mixed:
        scaled = "" if x.is_floating_point() else " / 255 of bytes, which go from 0 to 255"
        raise ValueError(
            f"{expected} of {dtype}, as the model's parameters are; got {x.dtype}: give x.to({dtype}){scaled}"
        )


def check_features(expected: str, x: Any, size: int, dtype: torch.dtype) -> None:
    """Raise a ValueError if something is no tensor of so many numbers a row that a net of a type can take.

    Args:
        expected: What it is, for the message: "Net: argument `x`".
        x: Shape (..., size).
        size: The last dimension.
        dtype: Type of the net's parameters.
    """
    said = without_values(x) if isinstance(x, Tensor) else type(x).__name__
    if said or x.shape[-1:] != (size,) or (x.dtype != dtype and not torch.is_autocast_enabled(x.device.type)):
        came = said or f"{x.dtype} of shape {tuple(x.shape)}"
        raise ValueError(f"{expected} must be a dense tensor of {dtype}, shape (..., {size}); got {came}")


def not_finite(x: Tensor) -> Tensor:
    """Return which numbers of data are NaN or inf, but for a mask to be added to scores: nothing but 0 and -inf.

    Example:
        >>> inf = torch.inf
        >>> not_finite(torch.tensor([0, -inf])).tolist(), not_finite(torch.tensor([1, -inf])).tolist()
        ([False, False], [False, True])
    """
    bad = ~x.isfinite()
    is_mask = bool(bad.any()) and bool(((x == 0) | x.isneginf()).all())
    return torch.zeros_like(bad) if is_mask else bad


def refuse_nan(caller: str, argument: str, inputs: Sequence[Any]) -> None:
    """Raise a ValueError if some of the numbers that a net is given are NaN; infinities may be those of a mask.

    Nor has it anything to compute with where there are no numbers, or no tensor.
    """
    others = [x for x in inputs if x is not None and not isinstance(x, _NO_INPUTS) and type(x) not in (list, tuple)]
    if not others:
        is_named = any(isinstance(x, Mapping) for x in inputs)
        by_name = f", and those of a mapping by name, {caller.rpartition('.')[2]}(**x)" * is_named
        raise ValueError(
            f"{caller}: argument `{argument}` must be tensors with a row for each example{by_name}; got "
            f"{', '.join(type(x).__name__ for x in inputs) or 'none'}"
        )
    for x in inputs:
        if isinstance(x, Tensor) and (said := without_values(x)):
            raise ValueError(f"{caller}: argument `{argument}` must be dense tensors; got {said}")
        if isinstance(x, Tensor) and x.is_floating_point() and bool(x.isnan().any()):
            count = int(x.isnan().sum())
            raise ValueError(
                f"{caller}: argument `{argument}` has {count} numbers that are NaN, shape {tuple(x.shape)}"
            )


def check_numbers(caller: str, argument: str, inputs: Sequence[Any]) -> None:
    """Say what is odd about the numbers that a net is given: those that are NaN, and bytes where a net wants floats.

    Args:
        caller: What was given them, for messages.
        argument: Name of the argument.
        inputs: The inputs.

    Raises:
        ValueError: If some are NaN.

    Warns:
        UserWarning: If they look like images of bytes.
    """
    refuse_nan(caller, argument, inputs)
    for x in inputs:
        if not isinstance(x, Tensor) or not x.is_floating_point() or not x.numel():
            continue
        if x.dim() == 4 and x.min() >= 0 and 16 < x.max() <= 255 and torch.equal(x, x.round()):
            warnings.warn(
                f"{caller}: argument `{argument}` looks like images of bytes, whole numbers from 0 to 255; nets want "
                f"small numbers: give {'x' if argument == 'example_input' else argument} / 255",
                stacklevel=3,
            )


@contextmanager
def explain_inputs(
    caller: str, inputs: Sequence[Any], dtype: torch.dtype | None, shapes: Sequence[tuple[int, ...]] = ()
) -> Iterator[None]:
    """Run a net in the block, and say what came where torch cannot compute with it.

    Args:
        caller: What was given the inputs, for messages.
        inputs: The inputs.
        dtype: Type of the net's parameters, if it is known.
        shapes: Shapes of inputs that the net is known to take.

    Raises:
        ValueError: In place of an error of torch, if inputs have another type than the net, or other shapes than those
            known.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        came = [x for x in inputs if isinstance(x, Tensor)]
        got = ", ".join(f"{x.dtype} of shape {tuple(x.shape)}" for x in came)
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        if dtype is not None and "type" in why and any(x.dtype != dtype for x in came):
            raise ValueError(
                f"{caller}: inputs must be of the type of the net's parameters, {dtype}; got {got}: give "
                f"x.to({dtype}), of bytes x / 255 (torch says: {why})"
            ) from error
        if any(x.shape[1:] != shape[1:] for x, shape in zip(came, shapes, strict=False)):
            raise ValueError(
                f"{caller}: inputs must be like the example that the net was nested with, of shape "
                f"{', '.join(map(str, shapes))}; got {got} (torch says: {why})"
            ) from error
        raise


@contextmanager
def explain_arguments(caller: str, net: nn.Module, args: Sequence[Any], named: Mapping[str, Any]) -> Iterator[None]:
    """Call a net in the block, and say which arguments it takes where it does not take those given.

    Args:
        caller: What was given the inputs, for messages.
        net: The net.
        args: Inputs in order.
        named: Inputs by name.

    Raises:
        ValueError: In place of a TypeError, if the inputs are not the arguments of the net.
    """
    try:
        yield
    except TypeError as error:
        signature = inspect.signature(net.forward)
        try:
            signature.bind(*args, **named)
        except TypeError as why:
            raise ValueError(
                f"{caller}: inputs must be the arguments of {type(net).__name__}, {signature}; got {len(args)} in "
                f"order and {list(named)} by name: {why}"
            ) from error
        raise
