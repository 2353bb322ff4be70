"""Masks below the wrappers that Pyro puts around distributions."""

from typing import Any

from pyro_vnd.distributions.nested_law import NestedLaw
from pyro_vnd.distributions.ordered_mask import OrderedMask

__all__ = ["find_mask", "innermost"]


def innermost(fn: Any) -> Any:
    """Return the law below `to_event`, `mask` and `expand`."""
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return fn


def find_mask(fn: Any) -> OrderedMask | NestedLaw | None:
    """Return the law of a mask below `to_event`, `mask` and `expand`, or None if `fn` is about something else."""
    law = innermost(fn)
    return law if isinstance(law, OrderedMask | NestedLaw) else None
