"""A fit while it goes on, as callbacks see it."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from pyro_vnd._state import cuda_devices, module_mode
from pyro_vnd.infer._fit.held_out import mean_log_likelihood
from pyro_vnd.infer._fit.parallel import Ranks
from pyro_vnd.infer.result import ElboParts, FitResult

__all__ = ["Run"]


class Run:
    """What a callback of `fit` is given.

    Attributes:
        model: The model.
        guide: The guide.
        optimizer: The optimiser.
        result: What is known so far; its lists have an entry for each epoch that is over.
        num_epochs: Epochs of the whole fit.
        num_steps: Steps of the whole fit, as far as is known.
        settled: Epochs after which weights of KLs, temperatures and shares of masks have the values that they keep.
        plate: Name of the plate of the data.
        batch_size: Rows of a full batch.
        callbacks: All callbacks of the fit, in their order.
        device: Where batches are moved to, or None.
    """

    def __init__(
        self,
        *,
        model: Any,
        guide: Any,
        optimizer: torch.optim.Optimizer,
        num_epochs: int,
        num_steps: int,
        settled: int,
        plate: str,
        batch_size: int,
        device: torch.device | None,
        ranks: Ranks,
        started: float,
    ) -> None:
        self.model, self.guide, self.optimizer, self.result = model, guide, optimizer, FitResult()
        self.num_epochs, self.num_steps, self.settled = num_epochs, num_steps, settled
        self.plate, self.batch_size, self.device = plate, batch_size, device
        self._ranks, self._started, self._seconds_before = ranks, started, 0.0
        self.stopped = False
        self.callbacks: Sequence[Any] = ()
        self._parts: ElboParts | None = None

    @property
    def epoch(self) -> int:
        """Epochs that are over."""
        return len(self.result.elbo)

    @property
    def step(self) -> int:
        """Steps that are over."""
        return self.result.num_steps

    @property
    def is_first(self) -> bool:
        """Whether this is the first of the processes of the fit, which writes files and shows how far it is."""
        return self._ranks.is_first

    def seconds(self) -> float:
        """Return the wall-clock time so far, that before an interruption with it."""
        return self._seconds_before + time.perf_counter() - self._started

    def agreed(self, flag: bool) -> bool:
        """Return what the first process says, in all of them."""
        return bool(self._ranks.same(torch.tensor(flag)))

    def mean(self, value: float) -> float:
        """Return the mean of a number over the processes of the fit, which must all ask for it."""
        return float(self._ranks.sum(torch.tensor(float(value), dtype=torch.float64))) / self._ranks.size

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Put modules into evaluation mode, without gradients, and give the random numbers back that are drawn."""
        both = [self.model, self.guide]
        with torch.no_grad(), torch.random.fork_rng(cuda_devices(both)), module_mode(both, training=False):
            yield

    def log_likelihood(self, data: Any) -> float:
        """Return the log-likelihood of data at draws of the guide, in nats per row."""
        with self.evaluating():
            return mean_log_likelihood(
                self.model, self.guide, data, self.batch_size, self.plate, device=self.device, ranks=self._ranks
            )

    def state_dict(self) -> dict[str, Any]:
        """Return all that a fit needs to go on from here; every process must ask for it."""
        raise NotImplementedError

    def put_back(self, modules: Mapping[str, Any], path: Path) -> None:
        """Give model and guide what a state has of them; if that fails, they stay what they are.

        Args:
            modules: What the state has.
            path: The file that it is from, or is to go into.

        Raises:
            ValueError: If modules do not take it.
        """
        raise NotImplementedError

    @property
    def metrics(self) -> list[str]:
        """Names of what is known by epoch, as of `history`."""
        return [*(key for key, value in vars(self.result).items() if isinstance(value, list)), *self.result.metrics]

    def history(self, name: str) -> list[float]:
        """Return a metric after each epoch.

        Args:
            name: "elbo", another attribute of `FitResult` that is by epoch, or what a callback has logged.

        Raises:
            ValueError: If there is none of this name.
        """
        if name not in self.metrics:
            raise ValueError(f"fit: there is no metric {name!r} by epoch; there are {self.metrics}")
        found: Any = self.result.metrics.get(name, getattr(self.result, name, None))
        return list(found)

    def measured(self, name: str) -> list[float]:
        """Return a metric after each epoch, as `history` does; nothing where there is none of this name yet."""
        return self.history(name) if name in self.metrics else []

    def log(self, name: str, value: float) -> None:
        """Add a number to a metric, once an epoch; loggers and `history` find it.

        Args:
            name: Name of the metric.
            value: The number.
        """
        self.result.metrics.setdefault(name, []).append(float(value))

    def stop(self) -> None:
        """End training after this epoch; of several processes one is enough to ask for it.

        A fit that goes on from a checkpoint asks its callbacks anew.
        """
        self.stopped = True

    def last_step(self) -> dict[str, float]:
        """Return the parts of the objective in the last step, in nats per row."""
        return {} if self._parts is None else {name: float(part) for name, part in self._parts._asdict().items()}
