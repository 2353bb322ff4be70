"""What a fit was asked for, in words and numbers that can be kept in a file and compared."""

import hashlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pyro_vnd._data import named_parts
from pyro_vnd.distributions import OrderedMask
from pyro_vnd.infer._fit.checks import LearningRate, make_lr_scheduler, make_optimizer
from pyro_vnd.infer._fit.sources import Source
from pyro_vnd.infer.schedules import KLWeights, LRSchedule, MaskSchedule, PriceSchedule

__all__ = ["describe_data", "describe_optimisation", "describe_schedules", "skip_steps"]

_ROWS = 64  # of the data that are hashed
_STEPS = 1000  # in which learning rates are compared


def describe_data(source: Source) -> dict[str, str]:
    """Describe data: of tensors the dtype, the shape, and a hash of the first row, the last, and some between."""
    described = {}
    if source.whole is None:
        parts = [f"{part.dtype} of shape {tuple(part.shape[1:])}" for part in named_parts(source.first()).values()]
        return {"data": f"{source.num_data} rows in batches of {source.batch_size}, {', '.join(parts)}"}
    for name, part in named_parts(source.whole).items():
        rows = torch.linspace(0, len(part) - 1, min(_ROWS, len(part)), dtype=torch.float64).round().long()
        sample = part.detach()[rows.to(part.device)].cpu().contiguous()
        described[name] = f"{part.dtype} of shape {tuple(part.shape)}, {_hash(sample)}"
    return described


def describe_schedules(weights: KLWeights, masks: MaskSchedule | PriceSchedule | None) -> dict[str, Any]:
    """Describe schedules by their values at times t that do not depend on the number of steps.

    Example:
        >>> describe_schedules(KLWeights(0.5), MaskSchedule())["weights.latents"]
        0.5
        >>> describe_schedules(KLWeights(), MaskSchedule())["schedule"]
        'MaskSchedule(learned=0.5, budget=0.4, full=0.1)'
    """
    temperature = masks.temperature if isinstance(masks, MaskSchedule) else None
    described: dict[str, Any] = {}
    named = {f"weights.{name}": weight for name, weight in weights._asdict().items()}
    for name, schedule in (named | {"schedule.temperature": temperature}).items():
        if callable(schedule):
            values = [float(schedule(i / 64)) for i in range(65)]
            described[name] = f"{values[0]:g} to {values[-1]:g}, {_hash(values)}"
        else:
            described[name] = schedule if schedule is None else float(schedule)
    if isinstance(masks, MaskSchedule):
        masks = replace(masks, temperature=None)
    law = getattr(masks, "law", None)
    hashed = f", {_hash(law.probs.tolist())}" if isinstance(law, OrderedMask) else ""
    return described | {"schedule": None if masks is None else f"{masks!r}{hashed}"}


def describe_optimisation(
    optimizer: Callable[..., Any], lr_schedule: LRSchedule | None, groups: Sequence[Any], lr: LearningRate, steps: int
) -> dict[str, Any]:
    """Describe an optimiser and its learning rates, of optimisers that take no step."""
    made = make_optimizer(optimizer, groups, lr)
    groups = [_options(group, lr) for group in made.param_groups]
    described = {
        "lr": dict(lr) if isinstance(lr, Mapping) else lr,
        "optimizer": f"{type(made).__name__}({'; '.join(dict.fromkeys(groups))})",
    }
    scheduler = make_lr_scheduler(lr_schedule, made, steps)
    if scheduler is None:
        return described | {"lr_schedule": None}
    rates = [_rates(made)]
    for _ in range(min(steps, _STEPS) - 1):
        skip_steps(scheduler, 1)
        rates.append(_rates(made))
    return described | {"lr_schedule": f"{type(scheduler).__name__}, {rates[0][0]:g} at first, {_hash(rates)}"}


def skip_steps(scheduler: LRScheduler, num_steps: int) -> None:
    """Put a scheduler of the learning rate where it is after so many steps."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the optimiser took none
        for _ in range(num_steps):
            scheduler.step()


def _options(group: Mapping[str, Any], lr: LearningRate) -> str:
    return ", ".join(
        f"{name}={value}"
        for name, value in group.items()
        if name != "params" and value is not None and (name, value) != ("lr", lr)
    )


def _rates(optimizer: Optimizer) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]


def _hash(values: Tensor | list[Any]) -> str:
    raw = bytes(values.view(torch.uint8).numpy()) if isinstance(values, Tensor) else repr(values).encode()
    return f"hash {hashlib.sha256(raw).hexdigest()[:8]}"
