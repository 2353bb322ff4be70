"""Temperatures and Gumbel noise of the relaxed laws."""

import math
from numbers import Real

import torch
from torch import Tensor

from pyro_vnd.distributions.length_law import LengthLaw

__all__ = ["as_temperature", "gumbel_like"]


def as_temperature(law: LengthLaw, temperature: float | Tensor) -> tuple[float | Tensor, torch.Size]:
    """Check a temperature, and broadcast it with the batch shape of a law.

    Returns:
        The temperature, as a number or as a tensor of the law's dtype and device, and the common batch shape.

    Raises:
        ValueError: If the temperature is not positive and finite or does not broadcast with the batch shape.
    """
    name = f"{type(law).__name__}: argument `temperature`"
    if not isinstance(temperature, Tensor):
        if not (isinstance(temperature, Real) and 0 < temperature < math.inf):
            raise ValueError(f"{name} must be a positive, finite number or tensor; got {temperature!r}")
        return float(temperature), law.batch_shape
    value = temperature.to(law._param)
    if law._validate_args and not ((value > 0) & torch.isfinite(value)).all():
        raise ValueError(
            f"{name} of shape {tuple(value.shape)} must be positive and finite; got {value.min().item():.4g}"
        )
    try:
        return value, torch.broadcast_shapes(value.shape, law.batch_shape)
    except RuntimeError:
        raise ValueError(
            f"{name} of shape {tuple(value.shape)} must broadcast with the batch shape {tuple(law.batch_shape)} of "
            "the parameters"
        ) from None


def gumbel_like(param: Tensor, shape: torch.Size) -> Tensor:
    """Draw standard Gumbel noise of a shape, with the dtype and device of a parameter."""
    uniform = torch.rand(shape, dtype=param.dtype, device=param.device)  # works under vmap, unlike exponential_
    exponential = -torch.log1p(-uniform)
    return -exponential.clamp_min(torch.finfo(param.dtype).tiny).log()
