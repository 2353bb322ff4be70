"""What a fit does where the caller leaves it open: by the kind of the guide."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch

from pyro_vnd.infer.elbo import conditional_part
from pyro_vnd.infer.schedules import LRSchedule, cosine_to_zero

__all__ = ["Recipe", "recipe_for"]


class Recipe(NamedTuple):
    """Settings of a fit, as in `fit`."""

    num_epochs: int
    lr: float
    optimizer: Callable[..., torch.optim.Optimizer]
    lr_schedule: LRSchedule | None


def adam(parameters: Any, lr: float, **options: Any) -> torch.optim.Adam:
    """Make an Adam that goes over the parameters once a step, where torch has one for them."""
    groups = parameters if parameters and isinstance(parameters[0], dict) else [{"params": parameters}]
    tensors = [p for group in groups for p in group["params"]]
    fused = all(p.is_floating_point() and p.device.type in ("cpu", "cuda", "mps") for p in tensors)
    return torch.optim.Adam(parameters, lr=lr, fused=fused or None, **options)


_GENERAL = Recipe(num_epochs=100, lr=0.01, optimizer=adam, lr_schedule=None)

# Its parameters are in units of the prior, so that one rate is for all. Adam has to forget the large gradients of the
# first steps, at which its usual memory of 1,000 steps would stand still for the rest of the fit.
_CONDITIONAL = Recipe(
    num_epochs=500,
    lr=0.1,
    optimizer=partial(adam, betas=(0.9, 0.95)),
    lr_schedule=cosine_to_zero(),
)


def recipe_for(guide: Any) -> Recipe:
    """Return the settings for a guide that has been called."""
    return _GENERAL if conditional_part(guide) is None else _CONDITIONAL
