"""State of torch that is set for the length of a block and put back after it."""

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from pyro.poutine.block_messenger import BlockMessenger
from pyro.poutine.indep_messenger import IndepMessenger
from pyro.poutine.trace_messenger import TraceMessenger
from torch import Tensor, nn

from pyro_vnd._compat import outermost_handlers

__all__ = ["cuda_devices", "module_mode", "one_at_a_time", "random_numbers"]

_LOCK = threading.RLock()


@contextmanager
def module_mode(objects: Iterable[Any], training: bool) -> Iterator[None]:
    """Put modules into training or evaluation mode inside a block, and each part of them back into its own after it.

    Args:
        objects: Modules; anything else is left alone.
        training: Which of the two.

    Yields:
        Nothing.
    """
    roots = [thing for thing in objects if isinstance(thing, nn.Module)]
    before = [(part, part.training) for root in roots for part in root.modules()]
    for root in roots:
        root.train(training)
    try:
        yield
    finally:
        for part, was_training in before:
            part.training = was_training


def cuda_devices(objects: Iterable[Any]) -> list[torch.device]:
    """Return the CUDA devices of tensors and of the parameters of modules."""
    devices: set[torch.device] = set()
    for thing in objects:
        tensors = thing.parameters() if isinstance(thing, nn.Module) else [thing] if isinstance(thing, Tensor) else []
        devices.update(tensor.device for tensor in tensors)
    return sorted((device for device in devices if device.type == "cuda"), key=str)


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """Run a block in which Pyro's handlers, its settings and the random numbers are this thread's.

    A block within a block, as of a fit that a model starts, has the handlers of the outer one only.

    Yields:
        Nothing.

    Raises:
        RuntimeError: If another thread is in such a block.
        ValueError: If it is in a plate or a trace, of which all sites of all evaluations would be a part.
    """
    if not _LOCK.acquire(blocking=False):
        raise RuntimeError(
            "fit: another thread of this process is fitting; Pyro's handlers, its settings and torch's random numbers "
            "are shared by all threads: wait for it, or fit in processes (multiprocessing, joblib)"
        )
    try:
        with outermost_handlers() as handlers:
            _check_free(handlers)
            yield
    finally:
        _LOCK.release()


def _check_free(handlers: Sequence[Any]) -> None:
    plate = next((each.name for each in handlers if isinstance(each, IndepMessenger)), None)
    is_traced = any(isinstance(each, TraceMessenger) and not each.param_only for each in handlers)
    is_hidden = any(isinstance(each, BlockMessenger) for each in handlers)  # from traces, but plates have dimensions
    if plate is not None or (is_traced and not is_hidden):
        where = f"the plate {plate!r}" if plate is not None else "poutine.trace"
        raise ValueError(f"fit: called inside {where}, of which all its evaluations would be a part: call it outside")


@contextmanager
def random_numbers(seed: int | None, devices: list[torch.device]) -> Iterator[None]:
    """Seed torch inside a block and give the caller's random numbers back after it; None leaves them as they are."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield
