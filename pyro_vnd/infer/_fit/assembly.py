"""How a fit is put together from what `fit` was asked for, and what is left to do when it is over."""

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from pyro.infer import TraceEnum_ELBO
from torch import Tensor, nn

from pyro_vnd._compat import keep_own_params
from pyro_vnd._data import is_tensors, named_parts
from pyro_vnd._state import cuda_devices
from pyro_vnd.distributions import OrderedMask
from pyro_vnd.distributions.nested import NestedLaw
from pyro_vnd.infer._fit.checks import (
    Asked,
    LearningRate,
    check_programs,
    check_schedule,
    make_lr_scheduler,
    make_optimizer,
)
from pyro_vnd.infer._fit.fingerprint import describe_data, describe_optimisation, describe_schedules
from pyro_vnd.infer._fit.finish import finish
from pyro_vnd.infer._fit.groups import parameter_groups
from pyro_vnd.infer._fit.handlers import ScaleToDataset
from pyro_vnd.infer._fit.loop import Loop
from pyro_vnd.infer._fit.mask_sources import MaskCuts, conditional_laws, parts_with_temperature
from pyro_vnd.infer._fit.objective import Objective
from pyro_vnd.infer._fit.optimisation import Step
from pyro_vnd.infer._fit.recipe import Recipe, recipe_for
from pyro_vnd.infer._fit.rows import check_laws_by_row
from pyro_vnd.infer._fit.settings import Settings
from pyro_vnd.infer._fit.sources import Source, check_validation
from pyro_vnd.infer._fit.values import NUM_CALIBRATION, calibrate_heads, value_sites
from pyro_vnd.infer.callbacks import Callback, Checkpoint, Validation
from pyro_vnd.infer.elbo import NestedELBO
from pyro_vnd.infer.guides import AutoNested
from pyro_vnd.infer.schedules import KLWeights, MaskSchedule

__all__ = ["devices_of", "make_loop", "move_modules", "settle", "warn"]


def move_modules(objects: Sequence[Any], device: torch.device | None) -> None:
    """Move modules to a device; None leaves them where they are."""
    for part in objects:
        if device is not None and isinstance(part, nn.Module):
            part.to(device)


def devices_of(objects: Sequence[Any], data: Any, device: torch.device | None) -> list[torch.device]:
    """Return the CUDA devices of a fit, whose random numbers it draws."""
    tensors = [*named_parts(data).values()] if is_tensors(data) else []
    return cuda_devices([*objects, *tensors, torch.empty(0, device=device)])


def make_loop(
    model: Any,
    guide: Any,
    source: Source,
    asked: Asked,
    callbacks: Sequence[Callback],
    devices: list[torch.device],
    started: float,
) -> Loop:
    """Put a fit together.

    Args:
        model: The model.
        guide: The guide.
        source: The data.
        asked: How to train.
        callbacks: What is called, in order.
        devices: CUDA devices of the fit.
        started: When it began, by `time.perf_counter`.

    Returns:
        The fit, at its beginning.

    Raises:
        ValueError: If data, programs and arguments do not fit together.
    """
    elbo, plate, schedule, both, ranks = asked.elbo, asked.plate, asked.schedule, (model, guide), source.ranks
    untouched = _buffers(both) if any(isinstance(callback, Checkpoint) for callback in callbacks) else []
    objective = _objective(model, guide, source, asked, callbacks)
    recipe = _recipe(guide, asked)
    num_steps = recipe.num_epochs * -(-source.num_batches // asked.optimizer.accumulate)
    settings = Settings(num_steps, asked.weights, schedule)
    check_schedule(guide, schedule)
    ranks.draw_apart()
    objective.share(ranks)
    cut = schedule is not None and schedule.cuts
    heated = isinstance(schedule, MaskSchedule) and schedule.temperature is not None
    rates: LearningRate = recipe.lr if asked.lr is None else asked.lr
    groups = parameter_groups(objective.module, rates, recipe.lr)
    optimizer = make_optimizer(recipe.optimizer, groups, rates)
    step = Step(
        objective,
        optimizer,
        make_lr_scheduler(recipe.lr_schedule, optimizer, num_steps),
        source.batch_size * asked.optimizer.accumulate / ranks.size,
        MaskCuts(schedule, both, objective.record, plate) if cut and schedule is not None else None,
        parts_with_temperature(both) if heated else [],
        asked.optimizer.clip_norm,
        value_sites(both, elbo, schedule, plate),
    )
    return Loop(
        step=step,
        source=source,
        settings=settings,
        accumulate=asked.optimizer.accumulate,
        callbacks=callbacks,
        untouched=untouched,
        describe=_description(source, asked, recipe, groups, rates, num_steps),
        cuda_devices=devices,
        ranks=ranks,
        model=model,
        guide=guide,
        num_epochs=recipe.num_epochs,
        num_steps=num_steps,
        settled=-(-settings.settled * recipe.num_epochs // num_steps),  # in epochs, rounded up
        plate=plate,
        device=source.device,
        started=started,
    )


def _buffers(objects: Sequence[Any]) -> list[tuple[Tensor, Tensor]]:
    """Return buffers of modules, each with a copy of what is in it."""
    modules = [part for part in objects if isinstance(part, nn.Module)]
    return [(buffer, buffer.clone()) for part in modules for buffer in part.buffers()]


def _objective(model: Any, guide: Any, source: Source, asked: Asked, callbacks: Sequence[Callback]) -> Objective:
    """Return the objective after its first evaluation, in which guides make their parameters."""
    elbo, first = asked.elbo, source.first()
    validations = [callback.data for callback in callbacks if isinstance(callback, Validation)]
    for data in validations:
        check_validation(data, first)
    check_programs(model, guide, first)
    if isinstance(guide, AutoNested) and not isinstance(elbo, NestedELBO | TraceEnum_ELBO):
        guide.leave_lengths_to(type(elbo).__name__)
    scale = partial(ScaleToDataset, asked.plate, source.num_data, mark=isinstance(elbo, NestedELBO))
    objective = Objective(elbo, model, guide, scale, first)
    check_laws_by_row(model, guide, first, asked.plate, source.num_data, validated=bool(validations))
    keep_own_params((model, guide))
    return objective


def _recipe(guide: Any, asked: Asked) -> Recipe:
    """Return what was asked for, and what is the default where nothing was."""
    usual, settings = recipe_for(guide), asked.optimizer
    return usual._replace(
        num_epochs=usual.num_epochs if asked.num_epochs is None else asked.num_epochs,
        lr=asked.lr if isinstance(asked.lr, float) else usual.lr,
        optimizer=usual.optimizer if settings.optimizer is None else settings.optimizer,
        lr_schedule=usual.lr_schedule if settings.lr_schedule is None else settings.lr_schedule,
    )


def _description(
    source: Source, asked: Asked, recipe: Recipe, groups: Sequence[Any], rates: LearningRate, num_steps: int
) -> Callable[[int], dict[str, Any]]:
    """Return what describes a fit of so many epochs."""
    elbo, settings = asked.elbo, asked.optimizer
    arguments: dict[str, Any] = {
        "batch_size": source.batch_size,
        "clip_norm": settings.clip_norm,
        "accumulate": settings.accumulate,
    }
    arguments |= {"plate": asked.plate, "seed": asked.seed, "precision": asked.precision}
    name = f"{type(elbo).__name__} of {elbo.num_particles} particles"
    arguments |= {"elbo": name, "local_reparam": getattr(elbo, "local_reparam", False)}
    arguments |= describe_schedules(asked.weights, asked.schedule) | describe_data(source)
    per_epoch = num_steps // recipe.num_epochs
    described = partial(describe_optimisation, recipe.optimizer, recipe.lr_schedule, groups, rates)
    return cache(lambda epochs: described(per_epoch * epochs) | arguments)


def settle(loop: Loop) -> None:
    """Find out what is known at the end of a fit only: laws in closed form, prices, k-hat, files."""
    objective, source = loop.objective, loop.source
    weights = loop.last_weights
    batches = source.in_order(NUM_CALIBRATION) if source.can_repeat else [source.first()]
    calibrate_heads(loop.model, loop.guide, batches, loop.plate)
    scale: Callable[[int], ScaleToDataset] = partial(objective.scale, weights=weights)  # type: ignore[call-arg]
    finish(loop.result, objective, source, scale, khat=weights == KLWeights() and source.ranks.size == 1)
    with torch.no_grad():  # which a module's extra state may want
        for value in objective.module.state_dict().values() if source.ranks.size > 1 else ():
            if isinstance(value, Tensor):
                value.copy_(source.ranks.same(value))
    loop.result.seconds = loop.seconds()
    loop.save()


def warn(loop: Loop) -> None:
    """Warn, in the first process, of a guide that is far from the posterior, and of laws that have collapsed."""
    if not loop.is_first:
        return
    conditional, record = conditional_laws(loop.guide), loop.objective.record
    loop.result.warn_of_poor_fit(knows_lengths=bool(conditional))
    given = {name for name, (law, _) in record.laws.items() if _is_given(law)} | record.by_values
    loop.result.warn_of_collapse(given | conditional.keys())  # the latter are the best ones there are


def _is_given(law: OrderedMask | NestedLaw) -> bool:
    return not law.length_probs.requires_grad
