"""Guides and training."""

from pyro_vnd.infer.callbacks import Plateau
from pyro_vnd.infer.distil import DistilReport, distil_lengths
from pyro_vnd.infer.elbo import NestedELBO
from pyro_vnd.infer.fit import NonFiniteLossError, fit
from pyro_vnd.infer.guides import AutoNested, module_local_params
from pyro_vnd.infer.local_reparam import LocalReparameterization
from pyro_vnd.infer.result import FitResult, LengthCollapseWarning, PoorFitWarning
from pyro_vnd.infer.schedules import MaskSchedule, PriceSchedule, cosine, cosine_to_zero, linear

__all__ = [
    "AutoNested",
    "DistilReport",
    "FitResult",
    "LengthCollapseWarning",
    "LocalReparameterization",
    "MaskSchedule",
    "NestedELBO",
    "NonFiniteLossError",
    "Plateau",
    "PoorFitWarning",
    "PriceSchedule",
    "cosine",
    "cosine_to_zero",
    "distil_lengths",
    "fit",
    "linear",
    "module_local_params",
]
