"""Distributions over masks that keep a random prefix of ordered units, and over weights between such units."""

import pyro_vnd.distributions.kl  # noqa: F401 - registers the divergences
from pyro_vnd.distributions.autoregressive import NestedAutoregressive
from pyro_vnd.distributions.constraints import TailSum, binary_ordered_mask, nested_vector, ordered_mask
from pyro_vnd.distributions.masks import OrderedMask
from pyro_vnd.distributions.nested import NestedNormal
from pyro_vnd.distributions.relaxed import RelaxedOrderedMask
from pyro_vnd.distributions.straight_through import OrderedMaskStraightThrough
from pyro_vnd.distributions.weights import Gated, LogUniform

__all__ = [
    "Gated",
    "LogUniform",
    "NestedAutoregressive",
    "NestedNormal",
    "OrderedMask",
    "OrderedMaskStraightThrough",
    "RelaxedOrderedMask",
    "TailSum",
    "binary_ordered_mask",
    "nested_vector",
    "ordered_mask",
]
