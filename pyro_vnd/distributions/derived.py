"""What follows from the parameters of a law: computed on demand, once, and left out of copies and pickles."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_vnd._compat import num_changes

__all__ = ["KeepsDerived", "derived", "keep"]

_KEPT = "_kept"  # where in its __dict__ a law keeps all of it
_CHANGES = ""  # where in that are the changes of the parameters it was computed after


class derived:
    """Attribute of a law that is computed once, with its gradient even where none is recorded at the time."""

    def __init__(self, compute: Callable[[Any], Any]) -> None:
        self._compute, self._name, self.__doc__ = compute, compute.__name__, compute.__doc__

    def __get__(self, law: Any, owner: type | None = None) -> Any:
        if law is None:
            return self
        kept = _kept(law)
        if self._name not in kept:
            if torch.is_grad_enabled():
                kept[self._name] = self._compute(law)
            else:
                with torch.inference_mode(False), torch.enable_grad():
                    kept[self._name] = self._compute(law)
        return kept[self._name]


def keep(law: Any, name: str, value: Any) -> None:
    """Keep what was computed beside something else, as the value of an attribute that is `derived`."""
    _kept(law).setdefault(name, value)


def _kept(law: Any) -> dict[str, Any]:
    """Return what is kept of a law; nothing if its parameters have changed in place, as by the step of an optimiser."""
    kept: dict[str, Any] = law.__dict__.setdefault(_KEPT, {})
    changes = num_changes(law._derived_from)
    if kept.get(_CHANGES) != changes:
        kept.clear()
        kept[_CHANGES] = changes
    return kept


class KeepsDerived:
    """Base of laws with attributes that are `derived`."""

    @property
    def _derived_from(self) -> tuple[Tensor, ...]:
        """The parameters that they are derived from."""
        raise NotImplementedError

    def _share_derived(self, other: Any) -> None:
        """Keep what is derived in common with a law of the same parameters, whichever computes it first."""
        self.__dict__[_KEPT] = other.__dict__.setdefault(_KEPT, {})

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != _KEPT}
