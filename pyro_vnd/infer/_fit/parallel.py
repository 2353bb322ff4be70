"""The processes that share a fit, as torchrun starts them."""

import atexit
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

__all__ = ["Averaged", "Ranks", "local_device"]


def local_device(device: torch.device) -> torch.device:
    """Return the device of this process where one of several is meant: under torchrun each has a GPU of its own.

    Example:
        >>> local_device(torch.device("cpu"))
        device(type='cpu')
    """
    if device.type != "cuda" or device.index is not None:
        return device
    number = int(os.environ.get("LOCAL_RANK", "-1"))
    return torch.device("cuda", number if 0 <= number < torch.cuda.device_count() else torch.cuda.current_device())


class Ranks:
    """The processes of a fit, and this one's place among them; by default one alone.

    Attributes:
        rank: Number of this process, from 0 on.
        size: How many there are.
        device: Where tensors must be that processes exchange.
    """

    rank = 0
    size = 1
    device = torch.device("cpu")

    @classmethod
    def join(cls, device: torch.device | None) -> "Ranks":
        """Meet the other processes, if torchrun has started any.

        Args:
            device: Where the fit is, which says how processes talk to each other; None is the CPU.
        """
        ranks, distributed = cls(), torch.distributed
        if not distributed.is_available():
            return ranks
        if not distributed.is_initialized():
            if int(os.environ.get("WORLD_SIZE", "1")) == 1:
                return ranks
            on_cuda = device is not None and device.type == "cuda"
            if on_cuda:
                torch.cuda.set_device(device)
            distributed.init_process_group("nccl" if on_cuda else "gloo")
            atexit.register(_leave)
        if distributed.get_backend() == "nccl":
            ranks.device = torch.device("cuda", torch.cuda.current_device())
        ranks.rank, ranks.size = distributed.get_rank(), distributed.get_world_size()
        return ranks

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes files and shows how far the fit is."""
        return self.rank == 0

    def share(self, rows: Tensor) -> Tensor:
        """Return this process's share of the rows of a batch; shares differ by one row at most.

        Example:
            >>> Ranks().share(torch.arange(3))
            tensor([0, 1, 2])
        """
        return rows if self.size == 1 else rows.tensor_split(self.size)[self.rank]

    def same(self, value: Tensor) -> Tensor:
        """Return the first process's value of a tensor, in all of them."""
        if self.size == 1:
            return value
        there = value.to(self.device, torch.uint8 if value.dtype == torch.bool else value.dtype, copy=True)
        torch.distributed.broadcast(there, 0)
        return there.to(value)

    def sum(self, value: Tensor) -> Tensor:
        """Return the sum of a tensor over the processes."""
        if self.size == 1:
            return value
        there = value.to(self.device, copy=True)
        torch.distributed.all_reduce(there)
        return there.to(value.device)

    def all(self, flag: bool) -> bool:
        """Return whether all processes say yes."""
        return flag if self.size == 1 else bool(self.sum(torch.tensor(float(flag))) == self.size)

    def any(self, flag: bool) -> bool:
        """Return whether one of the processes says yes."""
        return not self.all(not flag)

    def gather(self, value: Any) -> list[Any]:
        """Return what each process has of something."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(found, value)
        return found

    @contextmanager
    def alike(self, generator: torch.Generator | None = None) -> Iterator[None]:
        """Let all processes draw the same random numbers, those that the first one would draw alone.

        Args:
            generator: Of which generator; by default torch's own.
        """
        known = torch.default_generator if generator is None else generator
        if self.size > 1:
            own = known.get_state()
            known.set_state(self.same(own))
        yield
        if self.size > 1 and not self.is_first and generator is None:
            known.set_state(own)

    def draw_apart(self) -> None:
        """From here on, let this process draw other random numbers than the first one."""
        if self.rank:
            seed = int(torch.randint(2**62, ()).item())
            torch.manual_seed((seed + self.rank * 0x9E3779B97F4A7C15) % 2**63)


class Averaged:
    """What evaluates a module, such that gradients are averaged over the processes in the backward pass.

    Args:
        module: What has the parameters. From here on all processes have those of the first one.
        ranks: The processes.
    """

    def __init__(self, module: nn.Module, ranks: Ranks) -> None:
        self._shared: Any = (
            None if ranks.size == 1 else DistributedDataParallel(_Evaluation(module), find_unused_parameters=True)
        )

    def __call__(self, evaluate: Callable[[], Tensor], *, last: bool = True) -> Tensor:
        """Return a loss.

        Args:
            evaluate: Evaluates the module.
            last: Whether this is the last evaluation of a step, in which processes wait for each other.
        """
        if self._shared is None:
            return evaluate()
        alone: AbstractContextManager[Any] = nullcontext() if last else self._shared.no_sync()
        with alone:
            loss: Tensor = self._shared(evaluate)
        return loss


class _Evaluation(nn.Module):
    """A module, and a call that evaluates it: a gradient is waited for if its parameter is in the result."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.unused = nn.Parameter(next(module.parameters()).new_zeros(()))  # torch warns where there is none

    def forward(self, evaluate: Callable[[], Tensor]) -> Tensor:
        return evaluate()


def _leave() -> None:
    if torch.distributed.is_initialized():
        time.sleep(0.1)  # threads of gloo may still free what was sent, which aborts once Python is half gone
        torch.distributed.destroy_process_group()
