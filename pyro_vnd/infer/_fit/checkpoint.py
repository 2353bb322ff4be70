"""The state of a fit on disk."""

import os
import zipfile
from collections.abc import Callable
from copy import copy
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_vnd.infer._fit.fingerprint import skip_steps
from pyro_vnd.infer._fit.optimisation import Step
from pyro_vnd.infer.result import FitResult, LengthSummary

__all__ = ["Checkpoint"]


class Checkpoint:
    """A file from which a fit goes on as if it had never stopped.

    It holds parameters and buffers of model and guide, the optimiser, the learning-rate schedule, the random numbers,
    the arguments, and the result so far; only tensors, numbers and strings, so that reading it runs no code.

    Args:
        path: The file; its folder must exist.
        step: The step whose state it is.
        arguments: Describes, given a number of epochs, what must be the same when the fit goes on.
        num_epochs: Epochs of the fit.
        devices: CUDA devices of the fit.
    """

    def __init__(
        self,
        path: str | Path,
        step: Step,
        arguments: Callable[[int], dict[str, Any]],
        num_epochs: int,
        devices: list[torch.device],
    ) -> None:
        self.path, self.step, self.num_epochs, self.devices = Path(path), step, num_epochs, devices
        self._describe = arguments
        self.arguments = self._arguments(num_epochs)

    def _arguments(self, num_epochs: int) -> dict[str, Any]:
        state = self.step.objective.module.state_dict()
        shapes = {name: list(value.shape) for name, value in state.items() if isinstance(value, Tensor)}
        return {"num_epochs": num_epochs, **self._describe(num_epochs), "parameters": shapes}

    def save(self, result: FitResult) -> None:
        """Write the state; the file is the old one or the new one, whenever the machine stops.

        Raises:
            ValueError: If the state has objects that could not be read again.
        """
        step = self.step
        state = {
            "arguments": self.arguments,
            "modules": step.objective.module.state_dict(),
            "optimizer": step.optimizer.state_dict(),
            "lr_schedule": None if step.lr_schedule is None else step.lr_schedule.state_dict(),
            "random": torch.get_rng_state(),
            "random_cuda": [torch.cuda.get_rng_state(device) for device in self.devices],
            "result": asdict(result),
        }
        unfinished = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        try:
            with unfinished.open("wb") as file:
                torch.save(_plain(state), file)
                file.flush()
                os.fsync(file.fileno())
            if unsafe := torch.serialization.get_unsafe_globals_in_checkpoint(unfinished):
                raise ValueError(
                    f"fit: argument `checkpoint` cannot hold {unsafe}, which are in the state of modules, optimiser or "
                    "`lr_schedule` and would not be read again: keep tensors and numbers there"
                )
            os.replace(unfinished, self.path)
        finally:
            unfinished.unlink(missing_ok=True)
        if os.name == "posix":  # so that the new name outlives a power cut, too
            folder = os.open(self.path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def load(self, extend: bool = False) -> FitResult:
        """Read the state and put it in place.

        Args:
            extend: Whether the file may be of a fit with fewer epochs, whose schedules are then those of this one.

        Returns:
            The result so far; an empty one, and nothing changes, if there is no file.

        Raises:
            ValueError: If the file is no checkpoint, a damaged one, or of a fit with other arguments; the message says
                what differs.
        """
        if not self.path.exists():
            return FitResult()
        state = self._read()
        before = state["arguments"].get("num_epochs", self.num_epochs)
        longer = before < self.num_epochs
        extend = extend and longer
        differences = _differences(state["arguments"], self._arguments(before) if longer else self.arguments)
        if longer and not extend:
            differences.insert(0, f"`num_epochs` was {before}, now {self.num_epochs}")
        if differences:
            more = f"; and {len(differences) - 5} more" if len(differences) > 5 else ""
            hint = '; resume="extend" goes on to more epochs' if longer and not extend and len(differences) == 1 else ""
            raise ValueError(
                f"fit: checkpoint {str(self.path)!r} is of another fit: {'; '.join(differences[:5])}{more}{hint}"
            )
        step = self.step
        step.objective.module.load_state_dict(state["modules"])
        scheduler = step.lr_schedule
        if extend and scheduler is not None:
            skip_steps(scheduler, state["result"]["num_steps"])
        scheduled = [{k: v for k, v in group.items() if k != "params"} for group in step.optimizer.param_groups]
        step.optimizer.load_state_dict(state["optimizer"])
        if extend:  # the learning rate is that of the longer schedule
            for group, options in zip(step.optimizer.param_groups, scheduled, strict=True):
                group.update(options)
        elif scheduler is not None:
            scheduler.load_state_dict(state["lr_schedule"])
        torch.set_rng_state(state["random"])
        for device, random in zip(self.devices, state["random_cuda"], strict=False):
            torch.cuda.set_rng_state(random, device)
        lengths = {name: LengthSummary(**summary) for name, summary in state["result"].pop("lengths").items()}
        return FitResult(**state["result"], lengths=lengths)

    def _read(self) -> dict[str, Any]:
        with self.path.open("rb") as file:
            try:
                damaged = zipfile.ZipFile(file).testzip()  # torch does not look at the sums
                file.seek(0)
                state = None if damaged else torch.load(file, map_location="cpu", weights_only=True)
            except Exception:  # of zip, pickle or torch, whose advice is no good here
                state = None
        keys = {"arguments", "modules", "optimizer", "lr_schedule", "random", "random_cuda", "result"}
        if (
            not isinstance(state, dict)
            or set(state) != keys
            or set(state["result"]) != {each.name for each in fields(FitResult)}
        ):
            raise ValueError(
                f"fit: {str(self.path)!r} is no checkpoint of fit, or a damaged one, or of another version: give "
                "another path, or leave `resume` out to start anew and write over it"
            )
        return state


def _plain(state: Any) -> Any:
    """Return a state with Python's own numbers in place of numpy's, which torch writes and refuses to read."""
    if isinstance(state, np.generic):
        return state.item()
    if isinstance(state, dict):
        made = copy(state)  # with what torch has attached to it
        made.update((key, _plain(value)) for key, value in state.items())
        return made
    return type(state)(map(_plain, state)) if type(state) in (list, tuple) else state


def _differences(old: dict[str, Any], new: dict[str, Any], where: str = "") -> list[str]:
    found = []
    for name in old | new:
        before, now = old.get(name, "absent"), new.get(name, "absent")
        if name == "parameters":
            found += _differences(before, now, "parameter ")
        elif before != now:
            found.append(f"{where}`{name}` was {before}, now {now}")
    return found
