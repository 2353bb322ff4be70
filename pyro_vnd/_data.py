"""Data as every function of the library takes them: tensors, data sets of torch, or what comes in batches."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from operator import itemgetter
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from pyro_vnd._sizes import is_integer, without_values

__all__ = [
    "Batch",
    "Data",
    "Rows",
    "as_arguments",
    "as_batch",
    "batches",
    "batches_of",
    "check_call",
    "check_repeatable",
    "check_rows",
    "check_whole",
    "input_batches",
    "is_tensors",
    "map_parts",
    "named_parts",
    "num_rows",
    "shapes",
    "split_inputs",
    "split_rows",
    "take_rows",
    "without_wrapper",
]

Data: TypeAlias = Tensor | Sequence[Any] | Mapping[str, Any]
# Inputs, and labels if there are any: tensors, a data set, a loader, or another iterable of batches.
Rows: TypeAlias = Tensor | Iterable[Any] | Mapping[str, Tensor] | Dataset[Any]

_LOOK = 2**22  # numbers that are looked at together, so that of a file that is mapped only a part is in memory


def as_arguments(data: Data) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments with which models and guides are called: `model(*args, **kwargs)`.

    Args:
        data: A tensor, the one argument; a tuple or list, the arguments in order, or a mapping, arguments by name.

    Returns:
        Positional arguments and keyword arguments.

    Example:
        >>> import torch
        >>> as_arguments(torch.zeros(2))
        ((tensor([0., 0.]),), {})
        >>> as_arguments({"x": 1.0})
        ((), {'x': 1.0})
    """
    if isinstance(data, Mapping):
        return (), dict(data)
    return (tuple(data), {}) if isinstance(data, tuple | list) else ((data,), {})


def named_parts(data: Data, name: str = "data") -> dict[str, Any]:
    """Return the parts of data by the words in which an error speaks of them.

    Args:
        data: The data.
        name: Name of the argument.

    Returns:
        The parts in order.

    Example:
        >>> list(named_parts({"x": 1.0, "y": 2.0})), list(named_parts((1.0, 2.0))), list(named_parts(1.0, "images"))
        (["data['x']", "data['y']"], ['data[0]', 'data[1]'], ['images'])
    """
    if isinstance(data, Mapping):
        return {f"{name}[{key!r}]": part for key, part in data.items()}
    if isinstance(data, tuple | list):
        return {f"{name}[{i}]": part for i, part in enumerate(data)}
    return {name: data}


def map_parts(function: Callable[[Any], Any], data: Data) -> Data:
    """Apply a function to each part of data; a tuple or list becomes a tuple, a mapping a dict.

    Example:
        >>> map_parts(len, {"x": [1, 2], "y": [3]})
        {'x': 2, 'y': 1}
    """
    if isinstance(data, Mapping):
        return {key: function(part) for key, part in data.items()}
    return tuple(map(function, data)) if isinstance(data, tuple | list) else function(data)


def shapes(data: Data) -> list[Any] | dict[str, Any]:
    """Return the shapes of tensors, by name if they have one; of anything else the name of its type."""
    args, kwargs = as_arguments(data)
    found = [tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__ for x in (*args, *kwargs.values())]
    return dict(zip(kwargs, found, strict=True)) if kwargs else found


def num_rows(data: Data) -> int:
    """Return the number of rows, of data that passed `check_rows`."""
    return len(next(iter(named_parts(data).values())))


def split_rows(data: Data, batch_size: int) -> Iterator[Data]:
    """Yield data in batches of neighbouring rows; the last one may have fewer.

    Example:
        >>> import torch
        >>> [batch["x"].tolist() for batch in split_rows({"x": torch.arange(3)}, 2)]
        [[0, 1], [2]]
    """
    for start in range(0, num_rows(data), batch_size):
        yield map_parts(itemgetter(slice(start, start + batch_size)), data)


def check_rows(caller: str, data: Data, name: str = "data", *, values: Literal["all", "cpu"] = "all") -> None:
    """Check that data are tensors with the same number of rows, all of them finite, but for masks of 0 and -inf.

    Args:
        caller: The function that was given the data.
        data: The data; anything else is refused before it is read.
        name: Name of the argument.
        values: Which numbers to look at; "cpu" leaves those of accelerators, which would have to be waited for.

    Raises:
        ValueError: If they are no such data.
    """
    expected = "a tensor, a tuple of tensors, or a mapping from names of arguments to tensors"
    if not isinstance(data, Tensor | tuple | list | Mapping):
        raise ValueError(f"{caller}: argument `{name}` must be {expected}; got {_kind(data)}")
    if isinstance(data, Mapping) and not all(isinstance(key, str) for key in data):
        raise ValueError(f"{caller}: argument `{name}` must be {expected}; got the keys {list(data)}")
    parts = named_parts(data, name)
    for part, rows in parts.items():
        if not isinstance(rows, Tensor) or rows.dim() == 0:
            got = "a tensor without rows" if isinstance(rows, Tensor) else _kind(rows)
            raise ValueError(f"{caller}: argument `{part}` must be a tensor with rows; got {got}")
        if said := without_values(rows):
            raise ValueError(f"{caller}: argument `{part}` must be a dense tensor; got {said}")
        if (values == "all" or rows.device.type == "cpu") and not _is_finite(rows):
            raise ValueError(
                f"{caller}: argument `{part}` of shape {tuple(rows.shape)} must be finite; got NaN or inf (-inf only "
                "in a mask to be added, with 0 for all that is seen). For missing values give zeros, and say in "
                "another tensor of the data, `observed`, which are none, for the model to hide the rest by "
                'poutine.mask(mask=observed): "Missing values" in docs/guides/other_models.md'
            )
    counts = {len(rows) for rows in parts.values()}
    if len(counts) != 1 or 0 in counts:
        raise ValueError(
            f"{caller}: argument `{name}` must be tensors with the same number of rows, at least 1; got {shapes(data)}"
        )


def check_call(caller: str, program: Callable[..., Any], data: Data) -> None:
    """Check that a program can be called with data, and that tensors among them have rows and values.

    Args:
        caller: The function that was given the data.
        program: A model or guide.
        data: The data, of which some may be no tensors.

    Raises:
        ValueError: If not.
    """
    for name, part in named_parts(data).items():
        if isinstance(part, Tensor) and (said := without_values(part)):
            raise ValueError(f"{caller}: argument `{name}` must be a dense tensor; got {said}")
        if isinstance(part, Tensor) and 0 in part.shape[:1]:
            raise ValueError(f"{caller}: argument `{name}` must have at least 1 row; got shape {tuple(part.shape)}")
    args, kwargs = as_arguments(data)
    function = program.forward if isinstance(program, torch.nn.Module) else program
    try:
        inspect.signature(function).bind(*args, **kwargs)
    except TypeError as error:
        raise ValueError(
            f"{caller}: argument `data` must be the arguments of model and guide, {inspect.signature(function)}; got "
            f"{[*kwargs] if kwargs else f'{len(args)} by place'}: {error}"
        ) from None
    except ValueError:  # it has no signature
        pass


@torch.no_grad()
def _is_finite(x: Tensor) -> bool:
    """Say whether all numbers are finite, or all are those of a mask, 0 and -inf; without a copy of them."""
    if not x.is_floating_point() or not x.numel():
        return True
    rows = x.split(max(1, _LOOK * len(x) // x.numel()))
    # A sum is finite only if all terms are; and where terms are, but not their sum, there is another look at them.
    if all(bool(each.sum().isfinite()) or bool(each.isfinite().all()) for each in rows):
        return True
    return all(bool(((each == 0) | each.isneginf()).all()) for each in rows)


def _kind(thing: Any) -> str:
    """Name a thing that is no tensor, and say how to make tensors of it."""
    advice = ""
    if isinstance(thing, TensorDataset):
        advice = "dataset.tensors"
    elif isinstance(thing, Dataset | DataLoader):
        of = "dataset" if isinstance(thing, Dataset) else "loader.dataset"
        advice = f"torch.utils.data.default_collate([*{of}])"
    elif hasattr(thing, "to_numpy"):  # of pandas, say
        advice = "torch.as_tensor(x.to_numpy())"
    elif hasattr(thing, "__array__"):
        advice = "torch.as_tensor(x)"
    return f"{type(thing).__name__}{': give tensors, ' * bool(advice)}{advice}"


def is_tensors(data: Any) -> bool:
    """Say whether data are meant to be tensors, not batches.

    Example:
        >>> import torch
        >>> x = torch.zeros(3)
        >>> is_tensors(x), is_tensors([x, x]), is_tensors({"x": x}), is_tensors([(x, x), (x, x)])
        (True, True, True, False)
    """
    if isinstance(data, tuple | list):
        return not any(isinstance(each, tuple | list | Mapping) for each in data)
    return isinstance(data, Tensor | Mapping)


def without_wrapper(data: Any) -> Any:
    """Return the tensors of torch's own `TensorDataset`; one that is derived from it may have a transform."""
    return data.tensors if type(data) is TensorDataset else data


def batches_of(data: Any, batch_size: int) -> Iterator[Data]:
    """Yield the batches of data in any of their forms, in their order, one at a time.

    Args:
        data: Tensors; a data set of torch; or batches, each of tensors: a list of tuples, a `DataLoader`, a generator.
        batch_size: Rows of a batch, where data do not come in batches.

    Raises:
        ValueError: If data are none of these, or tensors have different numbers of rows.

    Example:
        >>> import torch
        >>> x = torch.arange(3)
        >>> [[*map(len, batch)] for batch in batches_of(torch.utils.data.TensorDataset(x, x), 2)]
        [[2, 2], [1, 1]]
        >>> list(batches_of(iter([x]), 2))
        [tensor([0, 1, 2])]
    """
    if not is_integer(batch_size) or batch_size < 1:
        raise ValueError(f"argument `batch_size` must be an integer at least 1; got {batch_size!r}")
    data = without_wrapper(data)
    if is_tensors(data):
        parts = [*named_parts(data).values()]
        _check_batch(parts)
        if len({len(rows) for rows in parts}) > 1:
            raise ValueError(
                "argument `data`: tensors of one data set must have the same rows, and batches come from a DataLoader "
                f"or a generator; got {[*map(len, parts)]} rows"
            )
        yield from split_rows(data, batch_size) if parts else ()
        return
    if isinstance(data, Dataset):
        data = DataLoader(data, batch_size=batch_size)
    if not isinstance(data, Iterable):
        _check_batch([data])
    yield from map(as_batch, data)


def check_repeatable(caller: str, **given: Any) -> None:
    """Raise a ValueError if some of the data given, or of a mapping of them, can be gone through only once."""
    for argument, value in given.items():
        for name, data in named_parts(value, argument).items() if isinstance(value, Mapping) else [(argument, value)]:
            if isinstance(data, Iterator):
                raise ValueError(
                    f"{caller}: argument `{name}` is read more than once, and a {type(data).__name__} ends: give "
                    "tensors, a Dataset, a DataLoader, a list of batches, or an object whose __iter__ begins again"
                )


def check_whole(caller: str, data: Any, why: str, name: str = "data") -> None:
    """Raise a ValueError if data come in batches, and say why a function needs all of them at once."""
    if isinstance(data, Dataset | DataLoader | Iterator):
        raise ValueError(f"{caller}: argument `{name}` must be tensors, all rows at once, {why}; got {_kind(data)}")


def as_batch(batch: Any) -> Data:
    """Return what came as a batch as data: named tuples and lists as tuples, mappings as dicts."""
    if isinstance(batch, Mapping):
        return dict(batch)
    return tuple(batch) if isinstance(batch, tuple | list) else batch


def batches(data: Rows, batch_size: int) -> Iterator[Sequence[Tensor]]:
    """Yield the batches of data, each a sequence of tensors that begins with the inputs.

    Args:
        data: As in `batches_of`. Of parts with names "x" comes first and "y" second, where there are such names.
        batch_size: Rows of a batch, where data do not come in batches.

    Raises:
        ValueError: If tensors have different numbers of rows, or a batch is none.

    Example:
        >>> import torch
        >>> [len(inputs) for inputs, labels in batches((torch.zeros(5, 2), torch.zeros(5)), 2)]
        [2, 2, 1]
    """
    for batch in batches_of(data, batch_size):
        if isinstance(batch, Mapping):
            batch = tuple(batch[name] for name in sorted(batch, key=lambda name: {"x": 0, "y": 1}.get(name, 2)))
        parts = batch if isinstance(batch, tuple) else (batch,)
        _check_batch(parts[:1])
        yield parts


class Batch(NamedTuple):
    """Rows as a net takes them, and what was observed of them.

    Attributes:
        args: Inputs in order.
        kwargs: Inputs by name.
        y: What was observed, None if nothing was.
        more: What came after it.
        unknown: Names of what came after it by name.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    y: Any = None
    more: tuple[Any, ...] = ()
    unknown: tuple[str, ...] = ()

    @property
    def inputs(self) -> tuple[Any, ...]:
        """All inputs."""
        return (*self.args, *self.kwargs.values())

    @property
    def num_rows(self) -> int:
        """Rows of the first input that is a tensor."""
        return next((len(x) for x in self.inputs if isinstance(x, Tensor) and x.dim()), 0)

    def map_inputs(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        """Apply a function to all inputs that are tensors."""

        def of(x: Any) -> Any:
            return function(x) if isinstance(x, Tensor) else x

        return self._replace(args=tuple(map(of, self.args)), kwargs={name: of(x) for name, x in self.kwargs.items()})

    def check(self, caller: str, num_inputs: int, *, alone: bool = False) -> None:
        """Raise a ValueError unless inputs came as a net takes them, and nothing by a name that it does not know.

        Args:
            caller: What was given the data.
            num_inputs: As in `split_inputs`.
            alone: Whether there must be rows, and nothing in order after what was observed.
        """
        out_of_place = not num_inputs and bool(self.args)
        if self.unknown or out_of_place or (alone and (self.more or not self.num_rows)):
            names = [*map(str, range(len(self.args))), *self.kwargs, "y", *(self.unknown or map(str, self.more))]
            came = dict(zip(names, (*self.inputs, self.y, *self.more), strict=False))
            by_name = ", in a mapping, as the net was nested" if out_of_place else ""
            raise ValueError(
                f"{caller}: give {num_inputs or 'named'} inputs{by_name}, tensors with a row for each example, and "
                f"what is observed; got {shapes(came)}"
            )

    def to(self, device: torch.device | str | None) -> "Batch":
        """Move inputs to a device; None leaves them where they are."""
        return self if device is None else self.map_inputs(lambda x: x.to(device))


def take_rows(inputs: Iterable[Any], num_rows: int, which: Any) -> tuple[Any, ...]:
    """Return some of the rows of those inputs that have them, and the others as they are.

    Args:
        inputs: Inputs, tensors and others.
        num_rows: How many rows there are.
        which: An index of rows.

    Example:
        >>> take_rows((torch.arange(3), torch.arange(2), "sum"), 3, slice(1))
        (tensor([0]), tensor([0, 1]), 'sum')
    """
    return tuple(x[which] if isinstance(x, Tensor) and x.shape[:1] == (num_rows,) else x for x in inputs)


def split_inputs(args: Sequence[Any], named: Mapping[str, Any], num_inputs: int = 1) -> Batch:
    """Tell inputs of a net from what was observed.

    Args:
        args: Inputs in order, then what was observed.
        named: The same by name: "y" is what was observed, and "x" the first input. What comes after the inputs is
            observed where there is no such name. A net of several inputs gets the others by their names, in whatever
            order they come; to a net of one input they are in this order.
        num_inputs: How many inputs the net takes in order; 0 if it takes them by name.

    Example:
        >>> split_inputs((1, 2), {})[:3], split_inputs((), {"y": 2, "ids": 1}, num_inputs=0)[:3]
        (((1,), {}, 2), ((), {'ids': 1}, 2))
    """
    named = dict(named)
    y = named.pop("y", None)
    if not num_inputs:
        return Batch(tuple(args), named, y)
    parts = [*args, *([named.pop("x")] if "x" in named else [])]
    by_name = [*named][: max(num_inputs - len(parts), 0)] if num_inputs > 1 else []
    inputs = {name: named.pop(name) for name in by_name}
    names = [None] * len(parts) + [*named]
    parts += named.values()
    count = num_inputs - len(inputs)
    in_order, rest, names = parts[:count], parts[count:], names[count:]
    if y is None and rest:
        y = rest.pop(0)
        del names[0]
    return Batch(tuple(in_order), inputs, y, tuple(rest), tuple(name for name in names if name is not None))


def input_batches(data: Rows, batch_size: int, num_inputs: int = 1) -> Iterator[Batch]:
    """Yield the batches of data as a net takes them.

    Args:
        data: As in `batches_of`.
        batch_size: Rows of a batch, where data do not come in batches.
        num_inputs: As in `split_inputs`.

    Raises:
        ValueError: If tensors have different numbers of rows, or a batch is none.
    """
    for batch in batches_of(data, batch_size):
        args, named = as_arguments(batch)
        _check_batch(args[:1])
        yield split_inputs(args, named, num_inputs)


def _check_batch(tensors: Sequence[Any]) -> None:
    for each in tensors:
        if not isinstance(each, Tensor):
            raise ValueError(
                "argument `data` must be tensors, inputs and labels, or an iterable of batches of them; got "
                f"{type(each).__name__}: make tensors with torch.as_tensor"
            )
        if said := without_values(each) or ("a tensor without rows" if each.dim() == 0 else ""):
            raise ValueError(f"argument `data` must be dense tensors with rows; got {said}")
