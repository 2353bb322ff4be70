"""What may be done while a fit goes on: measure, keep the best epoch, stop, and write checkpoints."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from pyro_vnd._files import resolved, writing
from pyro_vnd._sizes import is_integer, is_within
from pyro_vnd.infer._fit.checkpoint import Folder, State, not_finite_parameters
from pyro_vnd.infer._fit.objective import NonFiniteLossError
from pyro_vnd.infer.result import FitResult
from pyro_vnd.infer.run import Run

__all__ = ["BestEpoch", "Callback", "Checkpoint", "EarlyStopping", "Validation"]

_RESULT = FitResult()


class Callback:
    """What is called while a fit goes on: derive from it, and override what you need.

    What it keeps is written into checkpoints, and given back when the fit goes on.

    Example:
        >>> class Rates(Callback):
        ...     def on_epoch(self, run):
        ...         run.log("lr", run.optimizer.param_groups[0]["lr"])
    """

    def on_fit_start(self, run: Run) -> None:
        """Before the first step, when what a checkpoint has is in place."""

    def on_step(self, run: Run) -> None:
        """After a step of the optimiser."""

    def on_epoch(self, run: Run) -> None:
        """After an epoch, when `run.result` has its entry."""

    def on_fit_end(self, run: Run) -> None:
        """After the last epoch, before laws of lengths that have a closed form are settled."""

    def close(self) -> None:
        """Free what is held, however the fit ended."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint is to keep: tensors, numbers, strings, and lists and dicts of them."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what a checkpoint kept."""


class Validation(Callback):
    """Measure held-out data after every epoch.

    The log-likelihood at draws of the guide is `FitResult.validation_log_likelihood`, and each metric is in
    `FitResult.metrics`. For choosing between epochs and fits: a part of the training data, never the test data.

    Args:
        data: Data like those of the fit, in any of their forms; they must bear being read again in every epoch.
        metrics: Functions of `data` that return a number, by name, such as
            `{"accuracy": lambda data: evaluate_learned(net, data, progress=False).accuracy}`. They are called in
            evaluation mode, and the random numbers that they take are given back. Of several processes each calls them
            with all data, and the metric is the mean over processes, which have drawn other random numbers.

    Raises:
        ValueError: If a metric is no function.

    Example:
        >>> Validation(torch.zeros(3), metrics={"rows": len}).metrics["rows"](torch.zeros(3))
        3
    """

    def __init__(self, data: Any, metrics: Mapping[str, Callable[[Any], Any]] | None = None) -> None:
        if not (metrics is None or isinstance(metrics, Mapping)):
            raise ValueError(f"Validation: argument `metrics` must be functions of the data by name; got {metrics!r}")
        self.data, self.metrics = data, dict(metrics or {})
        for name, metric in self.metrics.items():
            if not callable(metric) or not isinstance(name, str) or hasattr(_RESULT, name):
                raise ValueError(
                    f"Validation: argument `metrics` must be functions of the data by name, none of them a name that "
                    f"`FitResult` has; got {name!r}: {metric!r}"
                )

    def on_epoch(self, run: Run) -> None:
        """Measure."""
        run.result.validation_log_likelihood.append(run.log_likelihood(self.data))
        for name, metric in self.metrics.items():
            with run.evaluating():
                value = metric(self.data)
            try:
                number = value.item() if hasattr(value, "item") else float(value)
            except (TypeError, ValueError, RuntimeError) as error:
                raise ValueError(
                    f"Validation: argument `metrics` must be functions that return one number; {name!r} returned "
                    f"{type(value).__name__}: {error}"
                ) from error
            run.log(name, run.mean(number))


class _Monitor(Callback):
    """Base of what looks at one metric by epoch.

    Args:
        monitor: Its name, as of `Run.history`.
        mode: Whether "max" or "min" is best.
    """

    def __init__(self, monitor: str, mode: Literal["max", "min"]) -> None:
        if not isinstance(monitor, str):
            raise ValueError(f"{type(self).__name__}: argument `monitor` must be the name of a metric; got {monitor!r}")
        if not isinstance(mode, str) or mode not in ("max", "min"):
            raise ValueError(f"{type(self).__name__}: argument `mode` must be 'max' or 'min'; got {mode!r}")
        self.monitor, self.mode, self._unmeasured = monitor, mode, 0

    def on_fit_start(self, run: Run) -> None:
        """See that what is asked for is measured."""
        validated = any(isinstance(callback, Validation) for callback in run.callbacks)
        if self.monitor == "validation_log_likelihood" and not validated:
            raise ValueError(
                f"{type(self).__name__}: argument `monitor` is 'validation_log_likelihood', by default, and there "
                "are no validation data: give `validation` to fit, or another metric"
            )
        self._unmeasured = run.epoch - len(run.measured(self.monitor))  # of a fit that was begun without the metric

    def _best(self, run: Run, min_change: float = 0.0) -> int:
        """Return the epoch, from 0 on, after which nothing was better by more than this."""
        history = run.history(self.monitor)
        if self._unmeasured + len(history) != run.epoch:
            raise ValueError(
                f"{type(self).__name__}: argument `monitor` must be measured after every epoch; {self.monitor!r} has "
                f"{len(history)} values after {run.epoch} epochs"
            )
        sign, best, at = (1 if self.mode == "max" else -1), -math.inf, 0
        for epoch, value in enumerate(history):
            if sign * value > best + min_change:
                best, at = sign * value, epoch
        return self._unmeasured + at


class EarlyStopping(_Monitor):
    """Stop once a metric has not become better for some epochs.

    `Plateau` asks whether the ELBO still rises, and knows its noise; this asks what you measure, by default on
    held-out data. With `BestEpoch` the weights are then those of the best epoch, not of the last.

    Args:
        monitor: Name of the metric, as of `Run.history`.
        patience: Epochs without improvement after which to stop.
        min_change: An improvement by no more than this does not count.
        mode: Whether "max" or "min" is best.

    Raises:
        ValueError: If `patience` or `min_change` is out of range, or `mode` is neither.

    Example:
        >>> EarlyStopping(patience=3).patience
        3
    """

    def __init__(
        self,
        monitor: str = "validation_log_likelihood",
        *,
        patience: int = 10,
        min_change: float = 0.0,
        mode: Literal["max", "min"] = "max",
    ) -> None:
        super().__init__(monitor, mode)
        if not is_integer(patience) or patience < 1:
            raise ValueError(f"EarlyStopping: argument `patience` must be an integer at least 1; got {patience!r}")
        if not is_within(min_change, 0):
            raise ValueError(f"EarlyStopping: argument `min_change` must be finite and >= 0; got {min_change!r}")
        self.patience, self.min_change = patience, min_change

    def on_fit_start(self, run: Run) -> None:
        """Stop a fit that is resumed where it was stopped."""
        super().on_fit_start(run)
        if run.measured(self.monitor):
            self.on_epoch(run)

    def on_epoch(self, run: Run) -> None:
        """Stop if it is time to."""
        if run.epoch - 1 - self._best(run, self.min_change) >= self.patience:
            run.stop()


class BestEpoch(_Monitor):
    """Keep the weights of the epoch that was best, and put them back at the end of the fit.

    Args:
        monitor: Name of the metric, as of `Run.history`.
        mode: Whether "max" or "min" is best.

    Attributes:
        epoch: The best epoch so far, from 1 on; 0 before the first.

    Example:
        >>> BestEpoch().epoch
        0
    """

    def __init__(self, monitor: str = "validation_log_likelihood", *, mode: Literal["max", "min"] = "max") -> None:
        super().__init__(monitor, mode)
        self.epoch = 0
        self._weights: list[dict[str, Any]] = []
        self._last: list[dict[str, Any]] = []

    def on_fit_start(self, run: Run) -> None:
        """Forget an earlier fit, or go on from the last weights of one that was over."""
        super().on_fit_start(run)
        if run.epoch == 0:
            self.epoch, self._weights = 0, []
        elif self._last and not run.stopped and run.epoch < run.num_epochs:
            _put(run, self._last)
        self._last = []

    def on_epoch(self, run: Run) -> None:
        """Keep the weights if they are the best."""
        if self._best(run) == run.epoch - 1:
            self.epoch = run.epoch
            self._weights = _weights(run)

    def on_fit_end(self, run: Run) -> None:
        """Put them back."""
        if self._weights:
            self._last = _weights(run)
            _put(run, self._weights)

    def state_dict(self) -> dict[str, Any]:
        """Return the epoch, its weights, and at the end those of the last epoch, from which more epochs go on."""
        return {"epoch": self.epoch, "weights": self._weights, "last": self._last}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take them back."""
        self.epoch, self._weights, self._last = state["epoch"], state["weights"], state["last"]


def _modules(run: Run) -> list[nn.Module]:
    return [part for part in (run.model, run.guide) if isinstance(part, nn.Module)]


def _weights(run: Run) -> list[dict[str, Any]]:
    return [
        {name: x.detach().cpu().clone() if isinstance(x, torch.Tensor) else x for name, x in state.items()}
        for state in (part.state_dict() for part in _modules(run))
    ]


def _put(run: Run, weights: Sequence[Mapping[str, Any]]) -> None:
    for part, state in zip(_modules(run), weights, strict=True):
        part.load_state_dict(state)


class Checkpoint(Callback):
    """Write the state of a fit into a file after every epoch, and within it if asked to.

    The file is replaced as a whole: it is the old one or the new one, whenever the machine stops. It holds parameters
    and buffers of model and guide, the optimiser, the learning rate, the random numbers, the arguments, what other
    callbacks keep, and the result so far: only tensors, numbers and strings, so that reading it runs no code.

    Beside "fit.pt" are "fit.previous.pt", the state before it, and "fit.best.pt", that of the best epoch if `best` is
    measured; any of them can be given as `path` to go on from. A state that is not finite is not written. Before the
    first step a state is written, read, put back and removed, so that what cannot be kept is known then.

    Args:
        path: The file; its folder must exist.
        every_steps: Steps after which it is written within an epoch, too.
        every_minutes: Minutes after which it is.
        best: Name of a metric, as of `Run.history`, whose best epoch is kept, too; the larger the better.
        resume: As in `fit`; where there is no file yet, the fit begins anew.

    Raises:
        ValueError: If an argument is invalid.

    Example:
        >>> Checkpoint("fit.pt", every_minutes=10).path.name
        'fit.pt'
    """

    def __init__(
        self,
        path: str | Path,
        *,
        every_steps: int | None = None,
        every_minutes: float | None = None,
        best: str = "validation_log_likelihood",
        resume: bool | Literal["extend"] = False,
    ) -> None:
        if not isinstance(path, str | Path) or str(path) in ("", ".") or "\0" in str(path):
            raise ValueError(f"fit: argument `checkpoint` must be the path of a file; got {path!r}")
        self.path = Path(path)
        with writing("fit: argument `checkpoint`", self.path):  # looking may be forbidden, too
            self.path = resolved(self.path)
            is_folder, is_other = self.path.is_dir(), self.path.exists() and not self.path.is_file()
            has_folder = self.path.parent.is_dir()
        if is_folder:
            raise ValueError(f"fit: argument `checkpoint` is {str(path)!r}, a folder; give the path of a file in it")
        if is_other:
            raise ValueError(f"fit: argument `checkpoint` is {str(path)!r}, which is no file but a device or a pipe")
        if not has_folder:
            raise ValueError(f"fit: argument `checkpoint` is {str(path)!r}, whose folder does not exist")
        if not isinstance(resume, str | bool | np.bool_) or resume not in (False, True, "extend"):
            raise ValueError(f"fit: argument `resume` must be True, False or 'extend'; got {resume!r}")
        if not isinstance(best, str):
            raise ValueError(f"Checkpoint: argument `best` must be the name of a metric; got {best!r}")
        if every_steps is not None and (not is_integer(every_steps) or every_steps < 1):
            raise ValueError(f"Checkpoint: argument `every_steps` must be an integer at least 1; got {every_steps!r}")
        if every_minutes is not None and not is_within(every_minutes, above=0):
            raise ValueError(f"Checkpoint: argument `every_minutes` must be finite and > 0; got {every_minutes!r}")
        self.every_steps, self.every_minutes, self.best, self.resume = every_steps, every_minutes, best, resume
        self._folder: Folder | None = None
        self._written = time.monotonic()

    def read(self, run: Run) -> State | None:
        """Take the file for this fit, and return the state that is to go on, or None if there is none.

        Raises:
            ValueError: If another fit has the file, or it is no checkpoint, or a damaged one.
        """
        if run.is_first:
            self._folder = Folder(self.path)
        if not self.resume:
            return None
        return Folder.read_from(self.path) if self._folder is None else self._folder.read()

    def files(self) -> list[Path]:
        """Return the files of this fit that there are, the newest state first."""
        return [] if self._folder is None else self._folder.files()

    def on_fit_start(self, run: Run) -> None:
        """Write a state, read it and put it back, to see that it can be done, and begin to count the minutes."""
        if run.epoch < run.num_epochs and not run.stopped:
            state = run.state_dict()
            if self._folder is not None:
                run.put_back(self._folder.rehearse(state)["modules"], self.path)
        self._written = time.monotonic()

    def on_step(self, run: Run) -> None:
        """Write if it is time to."""
        due = self.every_steps is not None and run.step % self.every_steps == 0
        if self.every_minutes is not None:
            due |= run.agreed(time.monotonic() - self._written >= 60 * self.every_minutes)
        if due:
            self._write(run)

    def on_epoch(self, run: Run) -> None:
        """Write."""
        measured = run.measured(self.best)
        is_best = len(measured) == run.epoch and measured[-1] == max(measured)
        self._write(run, best=is_best)

    def on_fit_end(self, run: Run) -> None:
        """Write, when laws are settled: other than for other callbacks, this comes at the very end."""
        self._write(run)

    def close(self) -> None:
        """Let other fits have the file."""
        if self._folder is not None:
            self._folder.free()
            self._folder = None

    def _write(self, run: Run, *, best: bool = False) -> None:
        state = run.state_dict()
        if bad := not_finite_parameters(state):
            raise NonFiniteLossError(
                f"fit: after step {run.step} {', '.join(bad[:3])} are not finite, though the loss was; the checkpoint "
                f"{str(self.path)!r} keeps the state before"
            )
        if self._folder is not None:
            self._folder.write(state, best=best)
        self._written = time.monotonic()
