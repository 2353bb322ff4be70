"""The processes that share a fit, as torchrun starts them."""

import atexit
import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

__all__ = ["Ranks", "touched"]


class Ranks:
    """The processes of a fit, and this one's place among them; one alone where torchrun started none.

    Args:
        device: Where tensors of the fit are, which says how processes talk to each other.

    Attributes:
        rank: Number of this process, from 0 on.
        size: How many there are.
        device: Where tensors must be that processes exchange.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        together = torch.distributed.is_available()
        if together and not torch.distributed.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            torch.distributed.init_process_group("nccl" if device is not None and device.type == "cuda" else "gloo")
            atexit.register(_leave)
        together = together and torch.distributed.is_initialized()
        # What is summed must be where the processes' way of talking can take it.
        on_cuda = together and torch.distributed.get_backend() == "nccl"
        self.device = torch.device("cuda", torch.cuda.current_device()) if on_cuda else torch.device("cpu")
        self.rank: int = torch.distributed.get_rank() if together else 0
        self.size: int = torch.distributed.get_world_size() if together else 1

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
        there = value.to(self.device)
        torch.distributed.broadcast(there, 0)
        return there.to(value.device)

    def sum(self, value: Tensor) -> Tensor:
        """Return the sum of a tensor over the processes."""
        if self.size == 1:
            return value
        there = value.to(self.device)
        torch.distributed.all_reduce(there)
        return there.to(value.device)

    def gather(self, value: Any) -> list[Any]:
        """Return what each process has of something."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(found, value)
        return found

    def wrap(self, module: nn.Module, device: torch.device | None) -> nn.Module:
        """Return a module whose gradients are averaged over the processes in each backward pass that is told to."""
        if self.size == 1:
            return module
        ids = [device.index] if device is not None and device.type == "cuda" and device.index is not None else None
        return DistributedDataParallel(module, device_ids=ids)

    def draw_apart(self) -> None:
        """From here on, let this process draw other random numbers than the first one."""
        if self.rank:
            seed = int(torch.randint(2**62, ()).item())
            torch.manual_seed((seed + self.rank * 0x9E3779B97F4A7C15) % 2**63)


def touched(loss: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """Return a loss with zero times each parameter in it, so that a process waits for the gradient of none."""
    return loss + sum(parameter.flatten()[:1].sum() * 0 for parameter in parameters)


def _leave() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
