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


_GENERAL = Recipe(num_epochs=100, lr=0.01, optimizer=torch.optim.Adam, lr_schedule=None)

# Its parameters are in units of the prior, so that one rate is for all. Adam has to forget the large gradients of the
# first steps, at which its usual memory of 1,000 steps would stand still for the rest of the fit.
_CONDITIONAL = Recipe(
    num_epochs=500,
    lr=0.1,
    optimizer=partial(torch.optim.Adam, betas=(0.9, 0.95)),
    lr_schedule=cosine_to_zero(),
)


def recipe_for(guide: Any) -> Recipe:
    """Return the settings for a guide that has been called."""
    return _GENERAL if conditional_part(guide) is None else _CONDITIONAL
