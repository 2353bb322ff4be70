"""Guides and training."""

from pyro_vnd.infer.callbacks import BestEpoch, Callback, Checkpoint, EarlyStopping, Validation
from pyro_vnd.infer.distil import DistilReport, distil_lengths
from pyro_vnd.infer.elbo import NestedELBO
from pyro_vnd.infer.fit import NonFiniteLossError, fit
from pyro_vnd.infer.guides import AutoNested, module_local_params
from pyro_vnd.infer.local_reparam import LocalReparameterization
from pyro_vnd.infer.loggers import CSVLogger, LivePlot, ProgressBar, TensorBoardLogger
from pyro_vnd.infer.minibatch import MiniBatchELBO
from pyro_vnd.infer.optimizer_settings import OptimizerSettings
from pyro_vnd.infer.plateau import Plateau
from pyro_vnd.infer.result import FitResult, LengthCollapseWarning, PoorFitWarning
from pyro_vnd.infer.run import Run
from pyro_vnd.infer.schedules import KLWeights, MaskSchedule, PriceSchedule, cosine, cosine_to_zero, linear

__all__ = [
    "AutoNested",
    "BestEpoch",
    "CSVLogger",
    "Callback",
    "Checkpoint",
    "DistilReport",
    "EarlyStopping",
    "FitResult",
    "KLWeights",
    "LengthCollapseWarning",
    "LivePlot",
    "LocalReparameterization",
    "MaskSchedule",
    "MiniBatchELBO",
    "NestedELBO",
    "NonFiniteLossError",
    "OptimizerSettings",
    "Plateau",
    "PoorFitWarning",
    "PriceSchedule",
    "ProgressBar",
    "Run",
    "TensorBoardLogger",
    "Validation",
    "cosine",
    "cosine_to_zero",
    "distil_lengths",
    "fit",
    "linear",
    "module_local_params",
]
