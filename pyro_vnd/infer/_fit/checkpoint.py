"""The state of a fit on disk, and whether it is that of the same fit."""

import zipfile
from copy import copy
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pyro_vnd._files import replaced
from pyro_vnd.infer.result import FitResult

__all__ = ["State", "check_same_fit", "read_state", "write_state"]

State = dict[str, Any]

_KEYS = {"arguments", "modules", "optimizer", "lr_schedule", "random", "epoch", "callbacks", "result"}


def write_state(path: Path, state: State) -> None:
    """Write the state; the file is the old one or the new one, whenever the machine stops.

    Raises:
        ValueError: If the state has objects that could not be read again.
    """
    with replaced(path) as unfinished:
        torch.save(_plain(state), unfinished)
        if unsafe := torch.serialization.get_unsafe_globals_in_checkpoint(unfinished):
            raise ValueError(
                f"fit: argument `checkpoint` cannot hold {unsafe}, which are in the state of modules, optimiser, "
                "`lr_schedule`, callbacks or loader, and would not be read again: keep tensors and numbers there"
            )


def read_state(path: Path) -> State:
    """Read a state.

    Raises:
        ValueError: If the file is no checkpoint, or a damaged one.
    """
    with path.open("rb") as file:
        try:
            damaged = zipfile.ZipFile(file).testzip()  # torch does not look at the sums
            file.seek(0)
            state = None if damaged else torch.load(file, map_location="cpu", weights_only=True)
        except Exception:  # of zip, pickle or torch, whose advice is no good here
            state = None
    known = {each.name for each in fields(FitResult)}
    if not isinstance(state, dict) or set(state) != _KEYS or set(state["result"]) != known:
        raise ValueError(
            f"fit: {str(path)!r} is no checkpoint of fit, or a damaged one, or of another version: give "
            "another path, or leave `resume` out to start anew and write over it"
        )
    return state


def check_same_fit(path: Path, old: dict[str, Any], new: dict[str, Any], *, extend: bool) -> None:
    """Check that a state is of the fit that is to go on.

    Args:
        path: The file.
        old: Arguments of that fit.
        new: Arguments of this one, for as many epochs as that one where it has more.
        extend: Whether it may have more.

    Raises:
        ValueError: If something differs; the message says what.
    """
    before, now = old.get("num_epochs"), new["num_epochs"]
    longer = isinstance(before, int) and before < now
    found = _differences(old, new | {"num_epochs": before} if longer else new)
    if longer and not extend:
        found.insert(0, f"`num_epochs` was {before}, now {now}")
    if found:
        more = f"; and {len(found) - 5} more" if len(found) > 5 else ""
        hint = '; resume="extend" goes on to more epochs' if longer and not extend and len(found) == 1 else ""
        raise ValueError(f"fit: checkpoint {str(path)!r} is of another fit: {'; '.join(found[:5])}{more}{hint}")


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
