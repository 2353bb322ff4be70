"""Distributions over masks that keep a random prefix of ordered units, and over weights between such units."""

import pyro_vnd.distributions.kl  # noqa: F401 - registers the divergences
from pyro_vnd.distributions.constraints import binary_ordered_mask, nested_vector, ordered_mask
from pyro_vnd.distributions.gated import Gated
from pyro_vnd.distributions.log_scale_normal import LogScaleNormal
from pyro_vnd.distributions.log_uniform import LogUniform
from pyro_vnd.distributions.nested_autoregressive import NestedAutoregressive
from pyro_vnd.distributions.nested_law import NestedLaw
from pyro_vnd.distributions.nested_normal import NestedNormal
from pyro_vnd.distributions.ordered_mask import OrderedMask
from pyro_vnd.distributions.relaxed import RelaxedOrderedMask
from pyro_vnd.distributions.straight_through import OrderedMaskStraightThrough
from pyro_vnd.distributions.tail_sum import TailSum

__all__ = [
    "Gated",
    "LogScaleNormal",
    "LogUniform",
    "NestedAutoregressive",
    "NestedLaw",
    "NestedNormal",
    "OrderedMask",
    "OrderedMaskStraightThrough",
    "RelaxedOrderedMask",
    "TailSum",
    "binary_ordered_mask",
    "nested_vector",
    "ordered_mask",
]
