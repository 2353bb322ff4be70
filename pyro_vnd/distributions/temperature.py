"""Temperatures and Gumbel noise of the relaxed laws."""

import math

import torch
from torch import Tensor

from pyro_vnd.distributions.length_law import LengthLaw

__all__ = ["as_temperature", "gumbel_like"]


def as_temperature(law: LengthLaw, temperature: float | Tensor) -> float | Tensor:
    """Return a temperature that was checked: a number, or a tensor of the law's dtype, device and batch shape.

    Raises:
        ValueError: If the temperature is not positive and finite or does not broadcast to the batch shape.
    """
    name = f"{type(law).__name__}: argument `temperature`"
    if not isinstance(temperature, Tensor):
        if not (isinstance(temperature, int | float) and 0 < temperature < math.inf):
            raise ValueError(f"{name} must be a positive, finite number or tensor; got {temperature!r}")
        return float(temperature)
    value = temperature.to(law._param)
    if law._validate_args and not ((value > 0) & torch.isfinite(value)).all():
        raise ValueError(
            f"{name} of shape {tuple(value.shape)} must be positive and finite; got {value.min().item():.4g}"
        )
    try:
        return value.expand(law.batch_shape) if value.dim() else value
    except RuntimeError:
        raise ValueError(
            f"{name} of shape {tuple(value.shape)} must broadcast to the batch shape {tuple(law.batch_shape)} of the "
            "parameters"
        ) from None


def gumbel_like(param: Tensor, shape: torch.Size) -> Tensor:
    """Draw standard Gumbel noise of a shape, with the dtype and device of a parameter."""
    exponential = torch.empty(shape, dtype=param.dtype, device=param.device).exponential_()
    return -exponential.clamp_min_(torch.finfo(param.dtype).tiny).log()
