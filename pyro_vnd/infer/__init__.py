"""Guides and training."""

from pyro_vnd.infer.auto_nested import AutoNested
from pyro_vnd.infer.fit import NonFiniteLossError, fit
from pyro_vnd.infer.local_params import module_local_params
from pyro_vnd.infer.result import FitResult, LengthCollapseWarning, LengthSummary

__all__ = [
    "AutoNested",
    "FitResult",
    "LengthCollapseWarning",
    "LengthSummary",
    "NonFiniteLossError",
    "fit",
    "module_local_params",
]
