"""What `fit` asks of its arguments, each mistake named before anything is computed."""

import inspect
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from pyro.infer import ELBO, TraceEnum_ELBO
from pyro.optim import PyroOptim
from torch import nn
from torch.optim import LBFGS, Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from pyro_vnd._compat import QuietModule
from pyro_vnd._data import Data, as_arguments, named_parts
from pyro_vnd._inputs import takes
from pyro_vnd._sizes import is_truth, is_within
from pyro_vnd.infer._fit.parallel import local_device
from pyro_vnd.infer.elbo import NestedELBO, conditional_part
from pyro_vnd.infer.guides import AutoNested
from pyro_vnd.infer.optimizer_settings import OptimizerSettings
from pyro_vnd.infer.schedules import KLWeights, LRSchedule, MaskSchedule, PriceSchedule
from pyro_vnd.nn.guide import NetGuide

__all__ = [
    "Asked",
    "LearningRate",
    "check_arguments",
    "check_elbo",
    "check_programs",
    "check_schedule",
    "device_of",
    "make_lr_scheduler",
    "make_optimizer",
    "positive_number",
    "whole_number",
]

Program = Callable[..., Any]
LearningRate = float | Mapping[str, float]


def _refuse(argument: str, expected: str, got: Any) -> None:
    what = f"the class {got.__name__}" if isinstance(got, type) else repr(got)
    what = what if len(what) < 200 else type(got).__name__
    raise ValueError(f"fit: argument `{argument}` must be {expected}; got {what}")


def whole_number(argument: str, value: Any, most: int | None = None) -> int:
    """Return an integer of any library as Python's own, from 1 to `most`.

    Example:
        >>> whole_number("num_epochs", torch.tensor(3))
        3
    """
    try:
        number = 0 if is_truth(value) else operator.index(value)
    except TypeError:
        number = 0
    if not 1 <= number < 2**63 or (most is not None and number > most):
        rest = f"from 1 to {most}, the rows of data" if most else "at least 1" if number < 1 else "below 2**63"
        _refuse(argument, f"an integer {rest}", value)
    return number


def positive_number(argument: str, value: Any, *, or_zero: bool = False) -> float:
    """Return a number of any library as Python's own, finite and > 0, or zero if it may be."""
    if not is_within(value, 0) or (value == 0 and not or_zero):
        _refuse(argument, f"a finite number >{'=' * or_zero} 0", value)
    return float(value)


def check_programs(model: Program, guide: Program, data: Data) -> None:
    """Check that model and guide can be called with the data, and that a guide which belongs to a model has its own.

    Raises:
        ValueError: If not.
    """
    args, kwargs = as_arguments(data)
    for argument, program in (("model", model), ("guide", guide)):
        if not callable(program) or isinstance(program, type):
            _refuse(argument, "a Pyro program that can be called, a function or a module", program)
        try:
            signature = inspect.signature(program.forward if isinstance(program, nn.Module) else program)
        except (TypeError, ValueError):  # it has none that could be read
            continue
        try:
            signature.bind(*args, **kwargs)
        except TypeError as error:
            raise ValueError(
                f"fit: argument `data` must be the arguments of `{argument}`, {_names(signature)}; got "
                f"{[*kwargs] if kwargs else f'{len(args)} by place'}: {error}"
            ) from None
    if isinstance(model, nn.Module) and isinstance(guide, nn.Module):
        _check_owner(model, guide)


def _names(signature: inspect.Signature) -> str:
    return str(signature.replace(return_annotation=inspect.Signature.empty))


def _check_owner(model: nn.Module, guide: nn.Module) -> None:
    """Refuse the guide of another net or autoencoder: each shares parameters with its own model."""
    parts = [guide] if isinstance(guide, QuietModule) else [p for p in guide.modules() if isinstance(p, NetGuide)]
    own = {id(parameter) for parameter in model.parameters()}
    for part in parts:
        shared = [id(parameter) in own for parameter in part.parameters()]
        if own and shared and not any(shared):
            raise ValueError(
                f"fit: argument `guide` is the guide of another model: this {type(part).__name__} shares no parameters "
                f"with `model`, {type(model).__name__}; give `model.guide`, or the `guide` of its net"
            )


_IN_FIT = "NestedELBO(), Trace_ELBO(), TraceMeanField_ELBO() or TraceEnum_ELBO()"


class Asked(NamedTuple):
    """Arguments of `fit` that say how to train."""

    num_epochs: int | None
    lr: LearningRate | None
    optimizer: OptimizerSettings
    elbo: ELBO
    weights: KLWeights
    schedule: MaskSchedule | PriceSchedule | None
    plate: str
    precision: str
    seed: int | None


def check_arguments(
    *,
    num_epochs: Any,
    lr: Any,
    optimizer: OptimizerSettings,
    elbo: Any,
    weights: Any,
    schedule: Any,
    plate: Any,
    precision: Any,
    seed: Any,
) -> Asked:
    """Check what kind of thing each argument is, and return all of them.

    Raises:
        ValueError: If one is no such thing; the message says what would be.
    """
    num_epochs = None if num_epochs is None else whole_number("num_epochs", num_epochs)
    if optimizer.optimizer is not None:
        expected = "a class of torch.optim, a function of parameters and `lr`, or OptimizerSettings"
        _check_maker("optimizer", optimizer.optimizer, Optimizer, expected)
        if not takes(optimizer.optimizer, [], lr=0.1):
            _refuse("optimizer", expected, optimizer.optimizer)
    if optimizer.lr_schedule is not None:
        expected = "a function of an optimiser and the number of steps, such as cosine_to_zero(), or None"
        _check_maker("lr_schedule", optimizer.lr_schedule, LRScheduler, expected)
        if not takes(optimizer.lr_schedule, None, 1):
            _refuse("lr_schedule", expected, optimizer.lr_schedule)
    if not isinstance(elbo, ELBO):
        _refuse("elbo", f"an objective, {_IN_FIT}", elbo)
    if not hasattr(elbo, "differentiable_loss") or type(elbo).__name__.startswith("Jit"):
        name = type(elbo).__name__
        raise ValueError(f"fit: argument `elbo` must be {_IN_FIT}; got {name}, which goes with pyro.infer.SVI")
    if not isinstance(weights, KLWeights):
        _refuse("weights", "KLWeights(latents=, local=, lengths=)", weights)
    if not (schedule is None or isinstance(schedule, MaskSchedule | PriceSchedule)):
        _refuse("schedule", "a MaskSchedule(), a PriceSchedule() or None; weights of KLs go to `weights`", schedule)
    if not isinstance(plate, str):
        _refuse("plate", "the name of a plate", plate)
    if not isinstance(precision, str) or precision not in ("32", "bf16"):
        _refuse("precision", "'32' or 'bf16'", precision)
    if seed is not None:
        try:
            in_range = not is_truth(seed) and 0 <= operator.index(seed) < 2**63
        except TypeError:
            in_range = False
        if not in_range:
            _refuse("seed", "an integer from 0 to 2**63 - 1, or None", seed)
        seed = operator.index(seed)
    return Asked(num_epochs, _learning_rate(lr), optimizer, elbo, weights, schedule, plate, precision, seed)


def _learning_rate(lr: Any) -> LearningRate | None:
    """Return a rate, or rates by group, as numbers of Python's own; None stays None."""
    if isinstance(lr, Mapping) and lr:
        return {str(key): positive_number(f"lr[{key!r}]", rate, or_zero=True) for key, rate in lr.items()}
    return None if lr is None else positive_number("lr", lr)


def device_of(device: Any) -> torch.device | None:
    """Return a device that there is, or None if none was asked for.

    Raises:
        ValueError: If it cannot be used here.
    """
    if device is None:
        return None
    try:
        found = local_device(torch.device(device))
        torch.ones(1, device=found).item()
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:  # the last is a torch without CUDA
        said = str(error).partition("\n")[0]
        raise ValueError(
            f"fit: argument `device` must be a device that torch has here; got {device!r}: {said}"
        ) from None
    return found


def check_elbo(elbo: ELBO, guide: Any) -> None:
    """Check that an objective can train an `AutoNested` whose latents know the lengths.

    Raises:
        ValueError: If it cannot.
    """
    part = guide.conditional if isinstance(guide, AutoNested) else None
    if part is None or isinstance(elbo, NestedELBO):
        return
    if part.plan.separate or not isinstance(elbo, TraceEnum_ELBO):
        other = "" if part.plan.separate else ", or TraceEnum_ELBO,"
        raise ValueError(
            f"fit: argument `elbo` must be NestedELBO(), the default{other} for an AutoNested whose latents know the "
            f"lengths; got {type(elbo).__name__}. AutoNested(model, latents='mean_field') takes it"
        )


def check_schedule(guide: Any, schedule: Any) -> None:
    """Check that a guide whose latents know the lengths is not told where to take its masks from.

    Raises:
        ValueError: If it is.
    """
    if schedule is not None and conditional_part(guide) is not None:
        other = "AutoNested(model, latents='mean_field')"
        if isinstance(schedule, PriceSchedule):
            other = "AutoNested(model, amortise=network), whose lengths are by row and at any price"
        raise ValueError(
            "fit: argument `schedule` is for masks that are drawn; the latents of this AutoNested know the lengths, "
            f"and each step trains all of these alike. Leave it out, or use {other}"
        )


def _check_maker(argument: str, maker: Any, kind: type, expected: str) -> None:
    if isinstance(maker, type) and issubclass(maker, LBFGS):
        raise ValueError(
            f"fit: argument `{argument}` is LBFGS, which needs a closure, and the same rows and draws in each of its "
            "evaluations; `fit` has neither: take another"
        )
    from_pyro = isinstance(maker, PyroOptim) or getattr(maker, "__module__", "").startswith("pyro.optim")
    if from_pyro and not (isinstance(maker, type) and issubclass(maker, kind)):
        _refuse(argument, f"{expected}, not one of pyro.optim, which is for pyro.infer.SVI", maker)
    is_other = isinstance(maker, nn.Module) or (isinstance(maker, type) and not issubclass(maker, kind))
    if isinstance(maker, kind) or is_other or not callable(maker):
        _refuse(
            argument,
            f"{expected}: what makes one, not one that is made" if isinstance(maker, kind) else expected,
            maker,
        )


def make_optimizer(make: Callable[..., Any], groups: Sequence[Any], lr: LearningRate) -> Optimizer:
    """Make the optimiser, and see that it is one.

    Raises:
        ValueError: If it is none that `fit` can step.
    """
    # Copies, since an optimiser keeps the groups that it is given, and its scheduler writes into them.
    own = [dict(group) if isinstance(group, dict) else group for group in groups]
    made = make(own, lr=max(lr.values()) if isinstance(lr, Mapping) else lr)
    if not isinstance(made, Optimizer) or isinstance(made, LBFGS):
        _refuse("optimizer", "what makes a torch optimiser whose step needs no closure", type(made))
    return made


def make_lr_scheduler(make: LRSchedule | None, optimizer: Optimizer, num_steps: int) -> LRScheduler | None:
    """Make the scheduler of the learning rate, if there is one, and see that it is one.

    Raises:
        ValueError: If it is none that can be stepped after every step.
    """
    made: Any = None if make is None else make(optimizer, num_steps)
    if made is not None and (not isinstance(made, LRScheduler) or isinstance(made, ReduceLROnPlateau)):
        _refuse("lr_schedule", "what makes a torch LRScheduler whose step needs no value", type(made))
    return made


def foreign_dtype(data: Data, module: nn.Module) -> str | None:
    """Say which part of the data has another dtype than the parameters, and what to do; None if none has.

    Integers of one dimension are labels.
    """
    dtypes = {p.dtype for p in module.parameters() if p.is_floating_point()} or {torch.get_default_dtype()}
    for name, part in named_parts(data).items():
        if part.dtype not in dtypes and (part.is_floating_point() or part.dim() > 1):
            wanted = " or ".join(sorted(str(dtype) for dtype in dtypes))
            hint = ", images as x.float() / 255" if part.dtype == torch.uint8 else ""
            return f"argument `{name}` must be of the dtype of the parameters, {wanted}{hint}; got {part.dtype}"
    return None
