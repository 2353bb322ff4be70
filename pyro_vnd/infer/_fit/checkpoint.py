"""The state of a fit on disk, and whether it is that of the same fit."""

import io
import os
import shutil
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from copy import copy
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_vnd._files import remove_unfinished, sync, unfinished_name, writing
from pyro_vnd.infer.result import FitResult

try:
    import fcntl
except ImportError:  # on Windows, where two fits that write one file are not told of each other
    fcntl = None  # type: ignore[assignment]

__all__ = ["Folder", "State", "check_same_fit", "not_finite_parameters", "read_state"]

State = dict[str, Any]

_ARGUMENT = "fit: argument `checkpoint`"
_DEPTH = 20  # how far into a state an error looks for what cannot be written
_SEQUENCES = (list, tuple, set)
_KEYS = {"arguments", "modules", "trained", "optimizer", "lr_schedule", "random", "epoch", "callbacks", "result"}


class Folder:
    """Where the states of a fit are kept: the newest in a file, the one before it and the best beside it.

    One fit at a time has it; the system frees it when the process ends, however that is.

    Args:
        path: The file.

    Raises:
        ValueError: If another fit has it, or the folder does not let itself be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.previous, self.best = _beside(path, "previous"), _beside(path, "best")
        self._lock_path = path.with_name(f".{path.name}.lock")
        self._lock = self._take()
        self._ours: set[Path] = set()
        remove_unfinished(path)

    def _take(self) -> int | None:
        while fcntl is not None:
            with writing(_ARGUMENT, self.path):
                lock = os.open(self._lock_path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os.close(lock)
                raise ValueError(
                    f"fit: argument `checkpoint` is {str(self.path)!r}, which another fit writes now: give each fit a "
                    "file of its own, or wait until that one is over"
                ) from None
            with suppress(OSError):
                if os.path.samestat(os.fstat(lock), os.stat(self._lock_path)):
                    return lock
            os.close(lock)  # of a fit that ended in between and took the file away: the name is another file's by now
        return None

    def free(self) -> None:
        """Let others have it."""
        if self._lock is not None:
            self._lock_path.unlink(missing_ok=True)
            os.close(self._lock)

    def files(self) -> list[Path]:
        """Return those of this fit that there are: of the newest state, the one before it and the best."""
        return [path for path in (self.path, self.previous, self.best) if path in self._ours and path.exists()]

    def read(self) -> State | None:
        """Read the newest state, as `read_from`; what there is is of this fit then."""
        state = self.read_from(self.path)
        if state is not None:
            self._ours = {self.path, self.previous, self.best}
        return state

    def write(self, state: State, *, best: bool = False) -> None:
        """Keep a state; the file is the old one or the new one, whenever the machine stops.

        Args:
            state: The state.
            best: Whether it is the best one so far.

        Raises:
            ValueError: If the state has objects that could not be read again, or the disk does not take it.
        """
        with self._written(state) as unfinished:
            if best:  # first: a fit that goes on from an older file comes here again
                self._name_too(unfinished, self.best)
                self._ours.add(self.best)
            if self.path.exists():
                self._name_too(self.path, self.previous)
                if self.path in self._ours:
                    self._ours.add(self.previous)
            os.replace(unfinished, self.path)
            self._ours.add(self.path)
            if os.name == "posix":  # so that new names outlive a power cut, too
                sync(self.path.parent)

    def _name_too(self, file: Path, name: Path) -> None:
        """Give a file a second name in place of another file, so that there is always one of that name."""
        link = unfinished_name(self.path, ".link")
        try:
            try:
                os.link(file, link)
            except OSError:  # of a file system without links
                shutil.copyfile(file, link)
                sync(link)
            os.replace(link, name)
        finally:
            link.unlink(missing_ok=True)

    def rehearse(self, state: State) -> State:
        """Write a state, read it, and remove it: what would fail after the first epoch fails before it.

        Returns:
            What was read.

        Raises:
            ValueError: As `write`, and if what is read is no state of a fit.
        """
        with self._written(state) as unfinished:
            return read_state(unfinished)

    @contextmanager
    def _written(self, state: State) -> Iterator[Path]:
        """Write a state into a file that is removed unless it gets another name."""
        unfinished = unfinished_name(self.path)
        try:
            with writing(_ARGUMENT, self.path):
                with unfinished.open("wb") as file:
                    _save(state, file)
                    file.flush()
                    os.fsync(file.fileno())
                if torch.serialization.get_unsafe_globals_in_checkpoint(unfinished):
                    raise ValueError(_cannot_hold(state))
                yield unfinished
        finally:
            unfinished.unlink(missing_ok=True)

    @staticmethod
    def read_from(path: Path) -> State | None:
        """Read the newest state, or return None if there is none.

        Raises:
            ValueError: If the file is no checkpoint, or a damaged one; the message says which older one is whole.
        """
        previous, best = (_beside(path, which) for which in ("previous", "best"))
        if not path.exists():  # nor has it ever been, or somebody took it away: no crash leaves the previous one alone
            if _is_whole(previous):
                raise ValueError(
                    f"{_ARGUMENT}, {str(path)!r}, is not there, but {str(previous)!r} is: rename that one to go on "
                    "from it, or leave `resume` out to start anew"
                )
            return None
        try:
            return read_state(path)
        except ValueError as error:
            whole = next(filter(_is_whole, (previous, best)), None)
            if whole is None:
                raise
            raise ValueError(f"{error}; or go on from an older state, which is whole: rename {str(whole)!r}") from None


def _beside(path: Path, which: str) -> Path:
    return path.with_name(f"{path.stem}.{which}{path.suffix}")


def _is_whole(path: Path) -> bool:
    try:
        read_state(path)
    except (ValueError, OSError):
        return False
    return True


def _save(state: Any, file: Any) -> None:
    """Write a state.

    Raises:
        OSError: If the disk does not take it.
        ValueError: If it has what cannot be written.
    """
    try:
        torch.save(_plain(state), file)
    except OSError:
        raise
    except Exception as error:  # whatever pickle, torch, and objects in the state think of
        if "PytorchStreamWriter" in str(error):
            raise OSError(str(error).partition("\n")[0]) from error
        raise ValueError(_cannot_hold(state)) from error


def _cannot_hold(state: State) -> str:
    where, part = "", state
    for _ in range(_DEPTH):
        items: Any = part.items() if isinstance(part, dict) else enumerate(part) if type(part) in _SEQUENCES else ()
        inside = next(((key, value) for key, value in items if not _can_hold(value)), None)
        if inside is None:
            break
        where, part = f"{where}[{inside[0]!r}]" if where else str(inside[0]), inside[1]
    kind = type(part)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    return (
        f"fit: argument `checkpoint` cannot hold {where}, of type {name}, which would not be read again: in the state "
        "of modules, optimiser, `lr_schedule`, callbacks and loader keep tensors, numbers and strings, and lists, "
        "tuples, sets and dicts of them (of an array torch.as_tensor(x))"
    )


def _can_hold(part: Any) -> bool:
    file = io.BytesIO()
    try:
        torch.save(_plain(part), file)
        file.seek(0)
        return not torch.serialization.get_unsafe_globals_in_checkpoint(file)
    except Exception:  # as in `_save`
        return False


def read_state(path: Path) -> State:
    """Read a state.

    Raises:
        ValueError: If the file is no checkpoint, or a damaged one, or parameters in it are not finite.
    """
    with path.open("rb") as file:
        try:
            damaged = zipfile.ZipFile(file).testzip()  # torch does not look at the sums
            file.seek(0)
            state = None if damaged else torch.load(file, map_location="cpu", weights_only=True)
            bad = [] if state is None else not_finite_parameters(state)
        except Exception:  # of zip, pickle or torch, whose advice is no good here
            state, bad = None, []
    known = {each.name for each in fields(FitResult)}
    if not isinstance(state, dict) or set(state) != _KEYS or set(state["result"]) != known:
        raise ValueError(
            f"fit: {str(path)!r} is no checkpoint of fit, or a damaged one, or of another version: give "
            "another path, or leave `resume` out to start anew and write over it"
        )
    if bad:
        raise ValueError(
            f"fit: {str(path)!r} has {', '.join(bad[:3])} that are not finite: leave `resume` out to start anew"
        )
    return state


def not_finite_parameters(state: State) -> list[str]:
    """Return names of what is NaN or infinite in a state, of parameters and what the optimiser keeps of them.

    An infinity that has been there from the beginning, as in a mask, is none.
    """
    found = [name for name in state["trained"] if not torch.isfinite(state["modules"][name]).all()]
    kept = state["optimizer"]["state"].items()
    found += [
        f"{key} of parameter {number}"
        for number, values in kept
        for key, value in values.items()
        if isinstance(value, Tensor) and value.is_floating_point() and not torch.isfinite(value).all()
    ]
    return found


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
    if type(state) in (dict, OrderedDict, Counter):
        made = copy(state)  # with what torch has attached to it
        made.clear()
        made.update({_plain(key): _plain(value) for key, value in state.items()})
        return made
    return type(state)(map(_plain, state)) if type(state) in _SEQUENCES else state


def _differences(old: dict[str, Any], new: dict[str, Any], where: str = "") -> list[str]:
    found = []
    for name in old | new:
        before, now = old.get(name, "absent"), new.get(name, "absent")
        if name == "parameters":
            found += _differences(before, now, "parameter ")
        elif before != now:
            found.append(f"{where}`{name}` was {before}, now {now}")
    return found
