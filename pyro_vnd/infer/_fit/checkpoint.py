"""The state of a fit on disk."""

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyro_vnd.infer._fit.optimisation import Step
from pyro_vnd.infer.result import FitResult, LengthSummary

__all__ = ["Checkpoint"]


class Checkpoint:
    """A file from which a fit goes on as if it had never stopped.

    It holds parameters and buffers of model and guide, the optimiser, the learning-rate schedule, the random numbers,
    and the result so far; only tensors, numbers and strings, so that reading it runs no code.

    Args:
        path: The file; its folder must exist.
        step: The step whose state it is.
        arguments: What must be the same when the fit goes on.
        devices: CUDA devices of the fit.

    Raises:
        ValueError: If the folder does not exist.
    """

    def __init__(self, path: str | Path, step: Step, arguments: dict[str, Any], devices: list[torch.device]) -> None:
        self.path, self.step, self.devices = Path(path), step, devices
        if not self.path.parent.is_dir():
            raise ValueError(f"fit: argument `checkpoint` is {str(path)!r}, whose folder does not exist")
        state = step.objective.module.state_dict()
        shapes = {name: list(value.shape) for name, value in state.items() if isinstance(value, Tensor)}
        self.fingerprint = {**arguments, "parameters": shapes}

    def save(self, result: FitResult) -> None:
        """Write the state; the file is the old one or the new one, whenever the machine stops."""
        step = self.step
        state = {
            "fingerprint": self.fingerprint,
            "modules": step.objective.module.state_dict(),
            "optimizer": step.optimizer.state_dict(),
            "lr_schedule": None if step.lr_schedule is None else step.lr_schedule.state_dict(),
            "random": torch.get_rng_state(),
            "random_cuda": [torch.cuda.get_rng_state(device) for device in self.devices],
            "result": asdict(result),
        }
        unfinished = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        try:
            torch.save(state, unfinished)
            os.replace(unfinished, self.path)
        finally:
            unfinished.unlink(missing_ok=True)

    def load(self) -> FitResult:
        """Read the state and put it in place.

        Returns:
            The result so far; an empty one, and nothing changes, if there is no file.

        Raises:
            ValueError: If the file is of a fit with other arguments; the message says what differs.
        """
        if not self.path.exists():
            return FitResult()
        state = torch.load(self.path, map_location="cpu", weights_only=True)
        differences = _differences(state["fingerprint"], self.fingerprint)
        if (state["lr_schedule"] is None) != (self.step.lr_schedule is None):
            differences.append("`lr_schedule` was given in one of the two only")
        if differences:
            more = f"; and {len(differences) - 5} more" if len(differences) > 5 else ""
            raise ValueError(
                f"fit: checkpoint {str(self.path)!r} is of another fit: {'; '.join(differences[:5])}{more}"
            )
        self.step.objective.module.load_state_dict(state["modules"])
        self.step.optimizer.load_state_dict(state["optimizer"])
        if self.step.lr_schedule is not None:
            self.step.lr_schedule.load_state_dict(state["lr_schedule"])
        torch.set_rng_state(state["random"])
        for device, random in zip(self.devices, state["random_cuda"], strict=False):
            torch.cuda.set_rng_state(random, device)
        lengths = {name: LengthSummary(**summary) for name, summary in state["result"].pop("lengths").items()}
        return FitResult(**state["result"], lengths=lengths)


def _differences(old: dict[str, Any], new: dict[str, Any], where: str = "") -> list[str]:
    found = []
    for name in old | new:
        before, now = old.get(name, "absent"), new.get(name, "absent")
        if name == "parameters":
            found += _differences(before, now, "parameter ")
        elif before != now:
            found.append(f"{where}`{name}` was {before}, now {now}")
    return found
