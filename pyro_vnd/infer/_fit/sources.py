"""Where the batches of a fit come from: tensors, data sets, loaders, or anything that can be iterated again."""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)
from torch.utils.data.distributed import DistributedSampler

from pyro_vnd._data import (
    Data,
    as_arguments,
    as_batch,
    check_rows,
    is_tensors,
    map_parts,
    named_parts,
    shapes,
    split_rows,
    without_wrapper,
)
from pyro_vnd._data import num_rows as rows_in
from pyro_vnd.infer._fit.checks import whole_number
from pyro_vnd.infer._fit.parallel import Ranks
from pyro_vnd.infer._fit.shares import bounds, shared

__all__ = ["Source", "as_source", "check_validation", "move"]


class Source:
    """Data of a fit, batch by batch, on the device of the fit.

    Args:
        ranks: The processes, which share each batch.
        device: Where batches are moved to, or None.

    Attributes:
        num_data: Rows of all data.
        batch_size: Rows of a batch that is full, on all processes together.
        num_batches: Batches of an epoch, as far as is known: an epoch ends when there are no more.
        whole: The data, if they are tensors.
    """

    num_data: int
    batch_size: int
    num_batches: int
    whole: Data | None = None
    can_repeat = True

    def __init__(self, ranks: Ranks, device: torch.device | None) -> None:
        self.ranks, self.device = ranks, device

    def first(self) -> Data:
        """Return a batch to begin with."""
        return self._moved(self._first())

    def epoch(self, number: int) -> Iterator[Data]:
        """Begin an epoch, and yield this process's share of its batches, shuffled if they are to be."""
        return map(self._moved, self._epoch(number))

    def in_order(self, num_rows: int | None = None) -> Iterator[Data]:
        """Yield batches of all rows, or of about so many from all over the data, for what is found out of them."""
        return map(self._moved, self._in_order(num_rows))

    def goes_on(self, batches: Sequence[Data]) -> bool:
        """Return whether there are batches for another step, in all processes."""
        return bool(batches)

    def _moved(self, batch: Data) -> Data:
        # A gradient of the data would add up in them, and nobody asked for it.
        free = any(x.requires_grad for x in named_parts(batch).values())
        return move(map_parts(lambda x: x.detach(), batch) if free else batch, self.device)

    def _first(self) -> Data:
        raise NotImplementedError

    def _epoch(self, number: int) -> Iterator[Data]:
        raise NotImplementedError

    def _in_order(self, num_rows: int | None) -> Iterator[Data]:
        raise NotImplementedError

    @property
    def generators(self) -> list[torch.Generator]:
        """Generators of random numbers that it has beside torch's global one."""
        return []

    def state_dict(self) -> Any:
        """Return where in the epoch the source is, if it can go on from there; else None."""
        return None

    def load_state_dict(self, state: Any) -> None:
        """Go on from there in the next epoch that is asked for."""
        raise NotImplementedError


def move(batch: Data, device: torch.device | None) -> Data:
    """Return a batch on a device; None leaves it where it is."""
    return batch if device is None else map_parts(lambda x: x.to(device, non_blocking=True), batch)


class RowsOfTensors(Source):
    """Tensors in memory, or in a file that is mapped into it; batches are of shuffled rows.

    Args:
        data: Tensors with the same number of rows.
        batch_size: Rows of a batch; all by default.
        ranks: As in `Source`.
        device: The same.
    """

    def __init__(self, data: Data, batch_size: int | None, ranks: Ranks, device: torch.device | None) -> None:
        super().__init__(ranks, device)
        self.whole = data
        self.num_data = rows_in(data)
        self.batch_size = self.num_data if batch_size is None else whole_number("batch_size", batch_size, self.num_data)
        self._bounds = bounds(self.num_data, self.batch_size, ranks)
        self.num_batches = len(self._bounds)

    def _first(self) -> Data:
        share = self.ranks.share(torch.arange(self.batch_size))
        data: Any = self.whole
        return map_parts(lambda x: x[: len(share)], data)

    def _epoch(self, number: int) -> Iterator[Data]:
        if self.batch_size == self.num_data and self.ranks.size == 1:
            data: Any = self.whole
            return iter([data])  # as they are
        with self.ranks.alike():
            return self._batches(torch.randperm(self.num_data))

    def _batches(self, order: Tensor) -> Iterator[Data]:
        data: Any = self.whole
        orders = {x.device: order.to(x.device) for x in named_parts(data).values()}
        for start, stop in self._bounds:
            rows = {device: self.ranks.share(each[start:stop]) for device, each in orders.items()}
            yield map_parts(partial(_rows_of, rows), data)

    def _in_order(self, num_rows: int | None) -> Iterator[Data]:
        data: Any = self.whole
        if num_rows is None or self.batch_size == self.num_data:  # a model that is always given all rows
            yield from split_rows(data, self.batch_size)
        else:
            few = torch.linspace(0, self.num_data - 1, min(self.num_data, num_rows)).round().long()
            yield map_parts(lambda x: x.index_select(0, few.to(x.device)), data)


def _rows_of(rows: Mapping[torch.device, Tensor], x: Tensor) -> Tensor:
    return x.index_select(0, rows[x.device])


class Batches(Source):
    """Batches that come ready made: a `DataLoader`, or another thing that can be iterated again.

    Args:
        data: The batches.
        num_data: Rows of all data; None if the loader knows.
        ranks: The processes. A loader whose sampler is torch's own is made anew so that they share each batch.
        device: As in `Source`.
    """

    def __init__(self, data: Iterable[Any], num_data: int | None, ranks: Ranks, device: torch.device | None) -> None:
        super().__init__(ranks, device)
        self.data, split, self._is_even = shared(data, ranks)
        self.can_repeat, self._ended = not isinstance(data, Iterator), False
        self._begin = self._peek()
        self.num_data, self._is_sure = _all_rows(data, num_data)
        full: Any = getattr(data, "batch_size", None)
        begun = torch.tensor(rows_in(self._begin))
        self.batch_size = int(ranks.sum(begun)) if full is None else full * (1 if split else ranks.size)
        if isinstance(data, tuple | list):  # in whatever order they come, the largest is a full one
            self.batch_size = max(rows_in(as_batch(batch)) for batch in data) * (1 if split else ranks.size)
        sized: Any = self.data
        length = len(sized) if _has_length(sized) else None
        self.num_batches = -(-self.num_data // self.batch_size) if length is None else max(length, 1)

    def _peek(self) -> Data:
        with torch.random.fork_rng([]):  # so that what is drawn next is the same for all forms of data
            batches = iter(self.data)
            first = next(batches, None)
        if first is None:
            raise ValueError("fit: argument `data` must have at least one batch; got none")
        if not self.can_repeat:
            self.data = chain([first], batches)
        return next(self._checked(iter([first])))

    def _first(self) -> Data:
        return self._begin

    def _epoch(self, number: int) -> Iterator[Data]:
        batch_sampler = getattr(self.data, "batch_sampler", None)
        parts: list[Any] = [batch_sampler, getattr(batch_sampler, "sampler", None)]
        for each in [*parts, *(getattr(self.data, name, None) for name in ("sampler", "dataset"))]:
            if hasattr(each, "set_epoch"):
                each.set_epoch(number)
        return self._in_order(None)

    def _in_order(self, num_rows: int | None) -> Iterator[Data]:
        if self._ended:
            raise ValueError(
                "fit: argument `data` is an iterator that has ended, and each epoch needs the batches anew: give a "
                "DataLoader, a list, or an object whose __iter__ begins again; or num_epochs=1"
            )
        self._ended = not self.can_repeat
        return self._checked(iter(self.data), num_rows)

    def _checked(self, batches: Iterator[Any], num_rows: int | None = None) -> Iterator[Data]:
        """Yield batches, up to a number of rows, each looked at where that does not wait for a device."""
        seen = 0
        for number, each in enumerate(batches):
            batch = as_batch(each)
            try:
                check_rows("fit", batch, values="cpu")
            except ValueError as error:
                error.add_note(f"fit: in batch {number} of an epoch, counted from 0")
                raise
            yield batch
            seen += rows_in(batch)
            if num_rows is not None and seen >= num_rows:
                return
            if num_rows is None and not self._is_sure and seen > self.num_data and self.ranks.size == 1:
                self._is_sure = True  # enough said
                warnings.warn(
                    f"fit: an epoch has {seen} rows so far, but argument `num_data` is {self.num_data}, to which "
                    "likelihoods of batches are scaled; it ends when there are no more batches. Of an IterableDataset "
                    "each worker reads all rows, unless its __iter__ asks torch.utils.data.get_worker_info() which are "
                    "its own",
                    stacklevel=2,
                )

    @property
    def generators(self) -> list[torch.Generator]:
        """Those of a loader and its sampler."""
        sampler = _sampler_of(self.data)
        found = [getattr(each, "generator", None) for each in (self.data, sampler)]
        return [*{id(each): each for each in found if isinstance(each, torch.Generator)}.values()]

    def goes_on(self, batches: Sequence[Data]) -> bool:
        """Return whether there are batches for another step, in all processes: none takes a step alone."""
        return bool(batches) if self._is_even else self.ranks.all(bool(batches))

    def state_dict(self) -> Any:
        """Return the state of a loader that has one, such as torchdata's StatefulDataLoader."""
        return self.data.state_dict() if hasattr(self.data, "state_dict") else None

    def load_state_dict(self, state: Any) -> None:
        """Give it back to the loader."""
        self.data.load_state_dict(state)  # type: ignore[attr-defined]


def _has_length(data: Any) -> bool:
    try:
        len(data)
    except TypeError:  # a loader of an iterable data set
        return False
    return True


def _sampler_of(data: Any) -> Any:
    """Return what says in which order a loader takes the rows of its data set."""
    sampler = getattr(data, "sampler", None)
    return getattr(getattr(data, "batch_sampler", None), "sampler", sampler)


def _all_rows(data: Any, num_data: int | None) -> tuple[int, bool]:
    """Return how many rows all data have that come in batches, and whether that is beyond doubt.

    Batches may be a part of all data, and a sampler of one's own may draw some rows more than once: `num_data` has the
    last word.

    Raises:
        ValueError: If nobody knows, or if `num_data` is wrong.
    """
    known, is_sure = _known_rows(data)
    if num_data is None and known is None:
        raise ValueError(
            "fit: argument `num_data` must say how many rows there are in all, where `data` does not know it; got "
            f"None with {type(data).__name__}. Likelihoods of batches are scaled to it"
        )
    count = whole_number("num_data", known if num_data is None else num_data)
    if is_sure and known is not None and count < known:
        raise ValueError(
            f"fit: argument `num_data` is {count}, but `data` has {known} rows: it is how many there are in all, of "
            "which `data` may be a part; leave it out if they are all"
        )
    return count, is_sure


def _known_rows(data: Any) -> tuple[int | None, bool]:
    """Return how many rows all data have, as far as they know it, and whether that is beyond doubt."""
    if isinstance(data, tuple | list):
        for i, batch in enumerate(data):
            check_rows("fit", as_batch(batch), f"data[{i}]")
        return sum(rows_in(as_batch(batch)) for batch in data), True
    if not isinstance(data, DataLoader) or data.batch_sampler is None:  # whose data set has batches itself
        return None, False
    dataset: Any = data.dataset
    is_stream, sampler = isinstance(dataset, IterableDataset), _sampler_of(data)
    if not is_stream and isinstance(data.batch_sampler, BatchSampler):
        if isinstance(sampler, RandomSampler | SequentialSampler):
            return len(sampler.data_source), True  # as a rule the data set
        if isinstance(sampler, DistributedSampler):
            return len(dataset), True
        return (len(sampler), False) if _has_length(sampler) else (None, False)
    # Which rows batches of one's own have, they alone know.
    return (len(dataset), False) if is_stream and _has_length(dataset) else (None, False)


def as_source(
    data: Any, batch_size: int | None, num_data: int | None, ranks: Ranks, device: torch.device | None
) -> Source:
    """Return the source of the batches of a fit.

    Args:
        data: A tensor, a tuple, list or mapping of tensors; a data set of torch; a `DataLoader`; or an iterable of
            batches, each such data.
        batch_size: Rows of a batch, where data do not come in batches.
        num_data: Rows of all data, where they do not know it.
        ranks: The processes of the fit.
        device: Where batches are moved to, or None.

    Raises:
        ValueError: If data are none of these, or arguments do not fit them.
    """
    data = without_wrapper(data)
    if is_tensors(data):
        check_rows("fit", data)
        if num_data is not None and whole_number("num_data", num_data) != rows_in(data):
            raise ValueError(
                f"fit: argument `num_data` is for data in batches; these are tensors with {rows_in(data)} rows "
                "(batches of one tensor each are tuples, [(x,), ...])"
            )
        return RowsOfTensors(data, batch_size, ranks, device)
    if isinstance(data, Dataset) and not isinstance(data, DataLoader):
        if batch_size is None:
            raise ValueError(
                "fit: argument `batch_size` must be given where `data` is a Dataset of rows; got None. Of one that has "
                "batches make a loader, DataLoader(dataset, batch_size=None)"
            )
        size, shuffle = whole_number("batch_size", batch_size), not isinstance(data, IterableDataset)
        loader: DataLoader[Any] = DataLoader(data, batch_size=size, shuffle=shuffle)
        return Batches(loader, num_data, ranks, device)
    if not _may_be_batches(data):
        check_rows("fit", data)
    if batch_size is not None:
        raise ValueError(
            f"fit: argument `batch_size` is for data that do not come in batches; {type(data).__name__} has its own"
        )
    return Batches(data, num_data, ranks, device)


def check_validation(validation: Any, first: Data) -> None:
    """Check that tensors that were held back are like a batch of the data.

    Raises:
        ValueError: If they are not.
    """
    if is_tensors(validation) or not (isinstance(validation, Dataset) or _may_be_batches(validation)):
        check_rows("fit", validation, "validation")
        if _shapes_of_a_row(validation) != _shapes_of_a_row(first):
            raise ValueError(
                f"fit: argument `validation` must be like `data`, in batches of shapes {shapes(first)}; got "
                f"{shapes(validation)}"
            )
        given = named_parts(validation, "validation").items()
        for (name, part), like in zip(given, named_parts(first).values(), strict=True):
            if like.is_floating_point() and part.dtype != like.dtype:
                raise ValueError(
                    f"fit: argument `{name}` must be of the dtype of `data`, {like.dtype}; got {part.dtype}"
                )


def _may_be_batches(data: Any) -> bool:
    """Say whether data that are no tensors may be batches: a text, an array or a table is none, though it has items."""
    return isinstance(data, Iterable) and not isinstance(data, str | bytes) and not hasattr(data, "__array__")


def _shapes_of_a_row(data: Data) -> Any:
    args, kwargs = as_arguments(data)
    return [x.shape[1:] for x in args], {name: x.shape[1:] for name, x in kwargs.items()}
