"""Callbacks of a fit, of which the common ones have short forms among its arguments."""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict

import numpy as np

from pyro_vnd.infer.callbacks import BestEpoch, Callback, Checkpoint, Validation
from pyro_vnd.infer.loggers import ProgressBar

__all__ = ["ShortForms", "all_callbacks"]


class ShortForms(TypedDict, total=False):
    """Arguments of `fit` that stand for callbacks; see there."""

    validation: Any
    checkpoint: str | Path | None
    resume: bool | Literal["extend"]
    progress: bool


_MOVED = {
    "kl_weight": "weights=KLWeights(latents=...)",
    "local_kl_weight": "weights=KLWeights(local=...)",
    "length_weight": "weights=KLWeights(lengths=...)",
    "temperature": "schedule=MaskSchedule(1, 0, 0, temperature=...)",
    "local_reparam": "elbo=NestedELBO(local_reparam=...)",
    "lr_schedule": "optimizer=OptimizerSettings(lr_schedule=...)",
    "clip_norm": "optimizer=OptimizerSettings(clip_norm=...)",
    "stop": "callbacks=[Plateau()], or a Callback that calls run.stop()",
    "khat": "always estimated where it is cheap; warnings.simplefilter('ignore', PoorFitWarning) hides its warning",
}
_KNOWN = ("num_epochs", "batch_size", "num_data", "lr", "optimizer", "elbo", "weights", "schedule", "callbacks")


def all_callbacks(callbacks: Sequence[Callback], short: Mapping[str, Any]) -> list[Callback]:
    """Return all callbacks in the order in which they are called.

    Args:
        callbacks: Those that were given as such.
        short: Those that were given in a short form.

    Raises:
        ValueError: If one is none, or two are given where there can be one.
        TypeError: If there is no such argument.
    """
    for name in short.keys() - ShortForms.__annotations__.keys():
        known = [*_KNOWN, "plate", "device", "precision", "seed", *ShortForms.__annotations__]
        close = difflib.get_close_matches(name, known, 1)
        hint = f"; it is now {_MOVED[name]}" if name in _MOVED else f"; did you mean {close[0]!r}?" if close else ""
        raise TypeError(f"fit() got an unexpected keyword argument {name!r}{hint}")
    if not isinstance(callbacks, tuple | list) or not all(isinstance(each, Callback) for each in callbacks):
        raise ValueError(f"fit: argument `callbacks` must be a list of Callback objects; got {callbacks!r}")
    path, resume, progress = short.get("checkpoint"), short.get("resume", False), short.get("progress", True)
    if not isinstance(progress, bool | np.bool_):
        raise ValueError(f"fit: argument `progress` must be True or False; got {progress!r}")
    if isinstance(resume, str | bool | np.bool_) and resume and path is None:  # of other kinds `Checkpoint` speaks
        raise ValueError("fit: argument `resume` needs the `checkpoint` to go on from")
    made: list[Callback] = [] if short.get("validation") is None else [Validation(short["validation"])]
    made += [ProgressBar()] if progress and not any(isinstance(each, ProgressBar) for each in callbacks) else []
    made += [] if path is None else [Checkpoint(path, resume=resume)]
    found = [*callbacks, *made]
    for kind, name in ((Validation, "validation"), (Checkpoint, "checkpoint")):
        if sum(isinstance(each, kind) for each in found) > 1:
            raise ValueError(f"fit: arguments `callbacks` and `{name}` have {kind.__name__} twice; one is enough")
    return sorted(found, key=_place)


def _place(callback: Callback) -> int:
    """Return when a callback is called: `BestEpoch` must know who stops, and `Checkpoint` what the others keep."""
    kinds = (Validation, BestEpoch, Checkpoint)
    return next((place for place, kind in zip((0, 2, 3), kinds, strict=True) if isinstance(callback, kind)), 1)
