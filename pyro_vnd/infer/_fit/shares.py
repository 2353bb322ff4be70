"""How the processes of a fit share batches that come ready made."""

from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, Sampler, SequentialSampler
from torch.utils.data.distributed import DistributedSampler

from pyro_vnd._data import Data, map_parts, num_rows
from pyro_vnd.infer._fit.parallel import Ranks

__all__ = ["bounds", "shared"]


def bounds(num_rows: int, batch_size: int, ranks: Ranks) -> list[tuple[int, int]]:
    """Return where batches begin and end; a last one in which some process would have no row is left out.

    A last one with fewer than two rows for each process, of which a batch norm has no statistics, gets rows of the one
    before, if that has enough.

    Raises:
        ValueError: If batches have fewer rows than there are processes.

    Example:
        >>> bounds(5, 2, Ranks())
        [(0, 2), (2, 4), (4, 5)]
        >>> bounds(9, 4, Ranks())
        [(0, 4), (4, 7), (7, 9)]
    """
    if batch_size < ranks.size:
        raise ValueError(
            f"fit: argument `batch_size` must be at least {ranks.size}, a row for each process; got {batch_size}"
        )
    pairs = [(start, min(start + batch_size, num_rows)) for start in range(0, num_rows, batch_size)]
    few = 2 * ranks.size
    if len(pairs) > 1 and pairs[-1][1] - pairs[-1][0] < few and batch_size >= 2 * few:
        pairs[-2:] = (pairs[-2][0], num_rows - few), (num_rows - few, num_rows)
    return [(start, stop) for start, stop in pairs if stop - start >= ranks.size]


def shared(data: Iterable[Any], ranks: Ranks) -> tuple[Iterable[Any], bool, bool]:
    """Return batches for this process.

    Args:
        data: The batches. The rows of each are shared among the processes if they are a list, or a loader whose sampler
            is torch's own. Of anything else each process reads its own.
        ranks: The processes.

    Returns:
        The batches; whether their size before was for all processes together; and whether these are certain to have
        equally many.

    Raises:
        ValueError: If a loader has a sampler that would give each process the same rows, or none that is known of.
    """
    if ranks.size == 1:
        return data, True, True
    if isinstance(data, tuple | list):
        return _SharedList(data, ranks), True, True
    if not isinstance(data, DataLoader) or isinstance(data.dataset, IterableDataset):
        return data, False, False
    sampler: Any = getattr(data.batch_sampler, "sampler", data.sampler)
    if isinstance(sampler, DistributedSampler):
        return data, False, True
    if type(data.batch_sampler) is not BatchSampler or type(sampler) not in (RandomSampler, SequentialSampler):
        own = [each for each in (data.batch_sampler, sampler) if type(each) not in _OF_TORCH]
        got = type(own[0]).__name__ if own else "batch_size=None"
        raise ValueError(
            "fit: argument `data` must be a DataLoader that several processes can share, with `batch_size` and "
            f"`shuffle`, or torch's DistributedSampler; got {got}"
        )
    names = ("num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn", "prefetch_factor", "generator")
    kept: dict[str, Any] = {name: getattr(data, name) for name in (*names, "persistent_workers")}
    size: Any = data.batch_size
    rows = _SharedBatches(sampler, size, data.drop_last, ranks)
    return DataLoader(data.dataset, batch_sampler=rows, **kept), True, True


_OF_TORCH = (BatchSampler, RandomSampler, SequentialSampler, type(None))


class _SharedBatches(Sampler[list[int]]):
    """The batches of rows of a data set, of which each process takes its share."""

    def __init__(self, sampler: Any, batch_size: int, drop_last: bool, ranks: Ranks) -> None:
        self.sampler, self.ranks = sampler, ranks
        kept = len(sampler) - len(sampler) % batch_size if drop_last else len(sampler)
        self.bounds = bounds(kept, batch_size, ranks)

    def __len__(self) -> int:
        return len(self.bounds)

    def __iter__(self) -> Iterator[list[int]]:
        generator, rows = getattr(self.sampler, "generator", None), iter(self.sampler)
        with self.ranks.alike(generator):
            order = torch.tensor([*islice(rows, len(self.sampler))])
        for start, stop in self.bounds:
            yield self.ranks.share(order[start:stop]).tolist()
        with self.ranks.alike(generator):  # what a sampler draws at its end, it draws when all rows were taken
            deque(rows, maxlen=0)


class _SharedList:
    """A list of batches that all processes have, of whose rows each takes its share."""

    def __init__(self, batches: Iterable[Any], ranks: Ranks) -> None:
        self.batches = [each for each in batches if _rows(each) >= ranks.size]
        self.ranks = ranks

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Data]:
        for batch in self.batches:
            yield map_parts(self.ranks.share, batch)


def _rows(batch: Any) -> int:
    return num_rows(tuple(batch) if isinstance(batch, list) else batch)
