"""How the parameters of a fit are moved."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from pyro_vnd._sizes import is_integer, is_within
from pyro_vnd.infer.schedules import LRSchedule

__all__ = ["OptimizerSettings"]


@dataclass(frozen=True)
class OptimizerSettings:
    """The optimiser of `fit`, and what goes with it.

    Args:
        optimizer: Makes a torch optimiser from parameters, or groups of them, and `lr`. By default `torch.optim.Adam`,
            fused; with betas (0.9, 0.95) for an `AutoNested` whose latents know the lengths. `torch.optim.LBFGS` is
            not supported: it needs the same rows and draws in several evaluations of a step.
        lr_schedule: Makes a torch `LRScheduler` from the optimiser and the number of all steps, such as
            `cosine_to_zero()`; it is stepped after every step. By default there is none, or `cosine_to_zero()` for
            such a guide.
        clip_norm: Largest norm of the gradient of all parameters together; a longer one is shortened to it.
        accumulate: Batches of which a step adds up the gradients, as if they were one.

    Raises:
        ValueError: If `clip_norm` or `accumulate` is out of range.

    Example:
        >>> OptimizerSettings(torch.optim.SGD, clip_norm=1.0).accumulate
        1
    """

    optimizer: Callable[..., torch.optim.Optimizer] | None = None
    lr_schedule: LRSchedule | None = None
    clip_norm: float | None = None
    accumulate: int = 1

    def __post_init__(self) -> None:
        norm: Any = self.clip_norm
        if norm is not None and not is_within(norm, above=0):
            raise ValueError(
                f"OptimizerSettings: argument `clip_norm` must be a finite number > 0, or None; got {norm!r}"
            )
        count: Any = self.accumulate
        if not is_integer(count) or not 1 <= count < 2**63:
            raise ValueError(f"OptimizerSettings: argument `accumulate` must be an integer at least 1; got {count!r}")

    @classmethod
    def of(cls, optimizer: Any) -> "OptimizerSettings":
        """Return settings for what `fit` takes as `optimizer`: settings, or what makes an optimiser."""
        return optimizer if isinstance(optimizer, cls) else cls(optimizer)
