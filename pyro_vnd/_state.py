"""State of torch that is set for the length of a block and put back after it."""

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

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

    Yields:
        Nothing.

    Raises:
        RuntimeError: If another thread is in such a block.
    """
    if not _LOCK.acquire(blocking=False):
        raise RuntimeError(
            "fit: another thread of this process is fitting; Pyro's handlers, its settings and torch's random numbers "
            "are shared by all threads: wait for it, or fit in processes (multiprocessing, joblib)"
        )
    try:
        yield
    finally:
        _LOCK.release()


@contextmanager
def random_numbers(seed: int | None, devices: list[torch.device]) -> Iterator[None]:
    """Seed torch inside a block and give the caller's random numbers back after it; None leaves them as they are."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield
