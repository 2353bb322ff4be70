"""Stochastic variational inference with mini-batches, progress and a record of the ELBO's parts."""

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pyro.infer import ELBO
from torch import Tensor
from tqdm.auto import tqdm

from pyro_vnd._state import cuda_devices, module_mode, random_numbers
from pyro_vnd.infer._fit.checkpoint import Checkpoint
from pyro_vnd.infer._fit.data import check_data, minibatches
from pyro_vnd.infer._fit.handlers import ScaleToDataset
from pyro_vnd.infer._fit.held_out import mean_log_likelihood
from pyro_vnd.infer._fit.mask_sources import MaskCuts, find_masks, nested_laws
from pyro_vnd.infer._fit.optimisation import Handler, NonFiniteLossError, Step
from pyro_vnd.infer.callbacks import StoppingRule
from pyro_vnd.infer.elbo import NestedELBO
from pyro_vnd.infer.guides import module_local_params, quiet_nets
from pyro_vnd.infer.local_reparam import LocalReparameterization
from pyro_vnd.infer.result import FitResult
from pyro_vnd.infer.schedules import LRSchedule, MaskSchedule, Schedule, schedule_values

__all__ = ["NonFiniteLossError", "fit"]


def fit(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    data: Tensor | Sequence[Tensor],
    *,
    num_epochs: int = 100,
    batch_size: int | None = None,
    lr: float = 0.01,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam,
    lr_schedule: LRSchedule | None = None,
    clip_norm: float | None = None,
    elbo: ELBO | None = None,
    kl_weight: Schedule = 1.0,
    local_kl_weight: Schedule = 1.0,
    length_weight: Schedule = 1.0,
    temperature: Schedule | None = None,
    schedule: MaskSchedule | None = None,
    local_reparam: bool | Literal["linear"] = False,
    validation: Tensor | Sequence[Tensor] | None = None,
    stop: StoppingRule | None = None,
    plate: str = "data",
    checkpoint: str | Path | None = None,
    resume: bool = False,
    seed: int | None = 0,
    progress: bool = True,
) -> FitResult:
    r"""Fit a guide, and the parameters of the model, by maximising the ELBO on mini-batches.

    A step draws B of the N rows and ascends

    $$\frac{N}{B} \sum_{n \in \mathrm{batch}} E_q \left[\log p(x_n, z_n \mid w) - \log q(z_n)\right]
      - \mathrm{KL}(q(w) \| p(w)),$$

    where the first sum is over all sites in the plate of the data, whose scale is set here: write the model for whole
    data, `with pyro.plate("data", len(x))`. Model and guide are called as `model(*batch)` and `guide(*batch)`, under
    module-local parameters and in training mode; their `nn.Module` parameters are trained, not Pyro's global store.
    Handlers meet those of plain nets in the first evaluation only. A second call goes on from where the first one
    ended, with a fresh optimiser.

    A schedule is a number or a function of t, which goes from 0 in the first step to 1 in the last one: `linear`,
    `cosine`, or your own.

    The random numbers of a fit with a seed do not disturb those of the caller.

    Args:
        model: A Pyro model; an `nn.Module` if it has parameters.
        guide: Its guide, an `nn.Module` such as `AutoNested` or the `guide` of a nested net.
        data: A tensor, or several with the same number of rows.
        num_epochs: Passes over the data; with `stop` at most.
        batch_size: Rows of a mini-batch; the rows that do not fill a last one wait for the next epoch's shuffle. By
            default all rows.
        lr: Learning rate, handed to the optimiser.
        optimizer: Makes a torch optimiser from parameters and `lr`.
        lr_schedule: Makes a torch `LRScheduler` from the optimiser and the number of all steps, such as
            `cosine_to_zero()`; it is stepped after every step.
        clip_norm: Largest norm of the gradient of all parameters together; a longer one is shortened to it.
        elbo: The objective, `NestedELBO()` by default.
        kl_weight: Weight, or schedule of it, of the KL of the latents outside the plate of the data that are no masks,
            such as the weights of a net. Below one the posterior is colder than Bayes' and the objective no bound. The
            result has the KL in the objective, and beside it the parts without weights.
        local_kl_weight: The same for the latents in the plate that are no masks, such as codes. A schedule that rises
            from zero, `linear(0, 1, warmup=0.3)`, keeps an autoencoder from giving up latents before it can use them.
        length_weight: The same for the KL of all masks, in the plate and outside, and under `NestedELBO` for the
            lengths of each `NestedNormal`. Above one the laws of lengths are held nearer to their prior.
        temperature: Temperature, or schedule of it, of all straight-through masks of `AutoNested` and nested nets;
            None leaves theirs alone. The last one stays after the fit.
        schedule: Where the masks of nested nets and the lengths of codes (a `NestedNormal` or `OrderedMask` in the
            plate of the data) come from: part from q, part at a budget, part at full width. The cure against lengths
            that collapse; see `MaskSchedule`. None draws all of them from q.
        local_reparam: Whether to draw the outputs of layers rather than weights, `LocalReparameterization`: gradients
            have less noise; "linear" leaves convolutions out. It needs an objective that scores no value, `NestedELBO`.
        validation: Data like `data`, whose log-likelihood at draws of the guide is reported after every epoch. For
            choosing between fits: a part of the training data that was held back, never the test data.
        stop: Ends training early: `Plateau()`, or a function of the ELBO by epoch. It sees the epochs in which weights
            of KLs, temperature and the shares of masks have the values that they keep. Schedules are made for all of
            `num_epochs`, the learning rate's too, which may be stopped while it is still high.
        plate: Name of the plate over the rows of the data.
        checkpoint: File in which the state of the fit is kept, written anew after every epoch.
        resume: Whether to go on from that file, with the very result of a fit that was never interrupted; an epoch
            that was not finished is done again. Starts from scratch if there is no file. Arguments that are no part of
            the file, such as schedules, must be those of the first call.
        seed: Seed of shuffling, initialisation and draws; None goes on with the caller's random numbers.
        progress: Whether to show a progress bar.

    Returns:
        The ELBO and its parts by epoch, in nats per row, and the learned laws of lengths.

    Raises:
        ValueError: If an argument is invalid, or data, plate, parameters or checkpoint do not fit together.
        NonFiniteLossError: If the loss or a gradient is not finite; the message names the site.

    Warns:
        LengthCollapseWarning: If a learned law has all its mass on one length.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> from pyro_vnd.distributions import OrderedMask
        >>> from pyro_vnd.infer import AutoNested
        >>> def model(y):
        ...     mask = pyro.sample("mask", OrderedMask.uniform(4))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("y", dist.Normal(mask.sum(-1), 1.0), obs=y)
        >>> guide = AutoNested(model)
        >>> result = fit(model, guide, torch.tensor([1.5, 2.0, 3.5]), num_epochs=200, lr=0.1, progress=False)
        >>> int(guide.laws["mask"].mode.sum())
        2
    """
    tensors = check_data(data)
    num_data = len(tensors[0])
    batch_size = num_data if batch_size is None else batch_size
    if not 1 <= batch_size <= num_data:
        raise ValueError(f"fit: argument `batch_size` must be from 1 to {num_data}, the rows of data; got {batch_size}")
    if num_epochs < 1:
        raise ValueError(f"fit: argument `num_epochs` must be at least 1; got {num_epochs}")
    if clip_norm is not None and not 0 < clip_norm < torch.inf:
        raise ValueError(f"fit: argument `clip_norm` must be finite and > 0, or None; got {clip_norm}")
    if resume and checkpoint is None:
        raise ValueError("fit: argument `resume` needs the `checkpoint` to go on from")
    held_back = None if validation is None else check_data(validation, "validation")
    if held_back is not None and [x.shape[1:] for x in held_back] != [x.shape[1:] for x in tensors]:
        shapes = [[tuple(x.shape) for x in some] for some in (tensors, held_back)]
        raise ValueError(f"fit: argument `validation` must be like `data` of shapes {shapes[0]}; got {shapes[1]}")
    elbo = NestedELBO() if elbo is None else elbo
    keeps_parts = isinstance(elbo, NestedELBO)
    if local_reparam and not keeps_parts:
        raise ValueError(f"fit: argument `local_reparam` needs a NestedELBO; {type(elbo).__name__} scores weights")
    num_steps = num_epochs * (num_data // batch_size)
    handlers: list[Handler] = []
    cuts = None if schedule is None else MaskCuts(schedule, (model, guide), plate)
    particles = None if cuts is None else cuts.draw
    schedules = _Schedules(num_steps, kl_weight, local_kl_weight, length_weight, temperature, cuts)
    if local_reparam:
        layers: Any = "all" if local_reparam is True else local_reparam
        handlers.append(lambda: LocalReparameterization(layers))

    started, devices = time.perf_counter(), cuda_devices([model, guide, *tensors])
    with module_local_params(model, guide), random_numbers(seed, devices), module_mode([model, guide], training=True):
        scale = ScaleToDataset(plate, num_data, batch_size, mark=keeps_parts)
        schedules.set(0, scale, [])
        objective: Any = elbo(model, guide)  # type: ignore[arg-type]
        step = Step(objective, scale, [rows[:batch_size] for rows in tensors], particles, handlers, clip_norm)
        if cuts is not None:
            cuts.find_codes(step.monitor)
        with_temperature = find_masks([model, guide])
        if temperature is not None and not with_temperature:
            raise ValueError("fit: argument `temperature` is for masks of AutoNested or a nested net; there are none")
        step.optimizer = optimizer(step.parameters, lr=lr)
        step.lr_schedule = None if lr_schedule is None else lr_schedule(step.optimizer, num_steps)
        result, state = FitResult(), None
        if checkpoint is not None:
            arguments = {"num_epochs": num_epochs, "batch_size": batch_size, "optimizer": type(step.optimizer).__name__}
            arguments["data"] = [list(rows.shape) for rows in tensors]
            state = Checkpoint(checkpoint, step, arguments, devices)
            result = state.load() if resume else result
        done, before = len(result.elbo), result.seconds
        schedules.set(max(result.num_steps - 1, 0), scale, with_temperature)  # a finished fit, too, has its last one
        settled = 0 if stop is None else -(-schedules.settled * num_epochs // num_steps)  # in epochs, rounded up
        result.converged = _holds(stop, result.elbo[settled:])
        rest = range(num_epochs if result.converged else done, num_epochs)
        epochs = tqdm(rest, desc="fit", unit="epoch", initial=done, total=num_epochs, disable=not progress)
        for _ in epochs:
            parts = []
            with quiet_nets(model, guide):
                for batch in minibatches(tensors, batch_size):
                    schedules.set(result.num_steps, scale, with_temperature)
                    parts.append(step(batch))
                    result.num_steps += 1
            means = torch.stack(parts).cpu().double().mean(0) / num_data
            result.add_epoch(means.tolist(), step.monitor.laws | nested_laws([model, guide]))
            if held_back is not None:
                result.validation_log_likelihood.append(mean_log_likelihood(model, guide, held_back, batch_size, plate))
            result.seconds = before + time.perf_counter() - started
            epochs.set_postfix_str(result.progress())
            result.converged = _holds(stop, result.elbo[settled:])
            if state is not None:
                state.save(result)
            if result.converged:
                break
    result.warn_of_collapse({name for name, law in step.monitor.laws.items() if not law.length_probs.requires_grad})
    return result


def _holds(stop: StoppingRule | None, elbo: list[float]) -> bool:
    return stop is not None and len(elbo) > 0 and bool(stop(elbo))


class _Schedules:
    """The weights of KLs, the temperature of masks and where they come from, at every step."""

    def __init__(
        self,
        num_steps: int,
        kl_weight: Schedule,
        local_kl_weight: Schedule,
        length_weight: Schedule,
        temperature: Schedule | None,
        cuts: MaskCuts | None,
    ) -> None:
        self.num_steps, self.cuts = num_steps, cuts
        self.kl_weight = schedule_values("kl_weight", kl_weight, num_steps)
        self.local_kl_weight = schedule_values("local_kl_weight", local_kl_weight, num_steps)
        self.length_weight = schedule_values("length_weight", length_weight, num_steps)
        self.temperature = None
        if temperature is not None:
            self.temperature = schedule_values("temperature", temperature, num_steps, positive=True)

    @property
    def settled(self) -> int:
        """The first step from which all of them stay what they are."""
        scheduled = [self.kl_weight, self.local_kl_weight, self.length_weight, self.temperature or [0.0]]
        changes = [i for values in scheduled for i in range(1, len(values)) if values[i] != values[i - 1]]
        annealed = 0 if self.cuts is None else math.ceil(self.cuts.schedule.anneal * (self.num_steps - 1))
        return max(annealed, *changes, 0)

    def set(self, step: int, scale: ScaleToDataset, masks: list[Any]) -> None:
        """Set what holds in a step."""
        scale.kl_weight, scale.length_weight = self.kl_weight[step], self.length_weight[step]
        scale.local_kl_weight = self.local_kl_weight[step]
        if self.cuts is not None:
            self.cuts.t = step / max(self.num_steps - 1, 1)
        if self.temperature is not None:
            for mask in masks:
                mask.temperature = self.temperature[step]
