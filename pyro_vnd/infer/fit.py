"""Stochastic variational inference with mini-batches, progress and a record of the ELBO's parts."""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from pyro.infer import ELBO, TraceEnum_ELBO
from tqdm.auto import tqdm

from pyro_vnd._compat import keep_own_params, quiet_lookups
from pyro_vnd._data import Data, named_parts, num_rows
from pyro_vnd._state import cuda_devices, module_mode, random_numbers
from pyro_vnd.distributions import OrderedMask
from pyro_vnd.distributions.nested import NestedLaw
from pyro_vnd.infer._fit.checkpoint import Checkpoint
from pyro_vnd.infer._fit.checks import (
    check_arguments,
    check_programs,
    check_schedules,
    make_lr_scheduler,
    make_optimizer,
    positive_number,
    whole_number,
)
from pyro_vnd.infer._fit.data import check_data, first_rows, shuffled_batches
from pyro_vnd.infer._fit.fingerprint import describe_data, describe_optimisation, describe_schedules
from pyro_vnd.infer._fit.finish import finish
from pyro_vnd.infer._fit.handlers import ScaleToDataset
from pyro_vnd.infer._fit.held_out import mean_log_likelihood
from pyro_vnd.infer._fit.mask_sources import MaskCuts, conditional_laws, nested_laws, parts_with_temperature
from pyro_vnd.infer._fit.objective import NonFiniteLossError, Objective
from pyro_vnd.infer._fit.optimisation import Step
from pyro_vnd.infer._fit.recipe import recipe_for
from pyro_vnd.infer._fit.rows import check_laws_by_row
from pyro_vnd.infer._fit.settings import KLWeights, Settings
from pyro_vnd.infer._fit.values import calibrate_heads, value_sites
from pyro_vnd.infer.callbacks import StoppingRule
from pyro_vnd.infer.elbo import NestedELBO
from pyro_vnd.infer.guides import AutoNested, module_local_params
from pyro_vnd.infer.local_reparam import LocalReparameterization
from pyro_vnd.infer.result import ElboParts, FitResult
from pyro_vnd.infer.schedules import LRSchedule, MaskSchedule, PriceSchedule, Schedule

__all__ = ["NonFiniteLossError", "fit"]


def fit(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    data: Data,
    *,
    num_epochs: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    optimizer: Callable[..., torch.optim.Optimizer] | None = None,
    lr_schedule: LRSchedule | None = None,
    clip_norm: float | None = None,
    elbo: ELBO | None = None,
    kl_weight: Schedule = 1.0,
    local_kl_weight: Schedule = 1.0,
    length_weight: Schedule = 1.0,
    temperature: Schedule | None = None,
    schedule: MaskSchedule | PriceSchedule | None = None,
    local_reparam: bool | Literal["linear"] = False,
    validation: Data | None = None,
    stop: StoppingRule | None = None,
    plate: str = "data",
    checkpoint: str | Path | None = None,
    resume: bool | Literal["extend"] = False,
    khat: bool = True,
    seed: int | None = 0,
    progress: bool = True,
) -> FitResult:
    r"""Fit a guide, and the parameters of the model, by maximising the ELBO on mini-batches.

    A step draws B of the N rows and ascends

    $$\frac{N}{B} \sum_{n \in \mathrm{batch}} E_q \left[\log p(x_n, z_n \mid w) - \log q(z_n)\right]
      - \mathrm{KL}(q(w) \| p(w)),$$

    where the first sum is over all sites in the plate of the data, whose scale is set here: write the model for whole
    data, `with pyro.plate("data", len(x))`. Model and guide are called as `model(*batch)` and `guide(*batch)`, or with
    `**batch` if the data are a mapping, under module-local parameters and in training mode; their `nn.Module`
    parameters are trained, not Pyro's global store. What was fitted, and copies of it, keep to their own parameters
    when they are called afterwards, whatever their names are and whatever the store has; `pyro.infer.SVI` may train
    them further. Handlers meet the parameters of plain nets inside a model of this library in the first evaluation
    only. A second call goes on from where the first one ended, with a fresh optimiser.

    A schedule is a number or a function of t, which goes from 0 in the first step to 1 in the last one: `linear`,
    `cosine`, or your own.

    The random numbers of a fit with a seed do not disturb those of the caller.

    Args:
        model: A Pyro model; an `nn.Module` if it has parameters.
        guide: Its guide, an `nn.Module` such as `AutoNested` or the `guide` of a nested net.
        data: A tensor, a tuple of tensors, or a mapping from names of arguments to tensors; all have the same number of
            rows, and are finite. Where values are missing, one of them says so, `{"y": y.nan_to_num(), "observed":
            ~y.isnan()}`, and the model hides the rest, `poutine.mask(mask=observed)`.
        num_epochs: Passes over the data; with `stop` at most. By default 100, or 500 for an `AutoNested` whose latents
            know the lengths.
        batch_size: Rows of a mini-batch; the rows that do not fill a last one wait for the next epoch's shuffle. By
            default all rows. An autoguide with laws by row needs to know the rows: number them, `i` among the data and
            `pyro.plate("data", N, subsample=i)` in the model.
        lr: Learning rate, handed to the optimiser. By default 0.01, or 0.1 for an `AutoNested` whose latents know the
            lengths: its parameters are in units of the prior.
        optimizer: Makes a torch optimiser from parameters and `lr`. By default `torch.optim.Adam`, with betas
            (0.9, 0.95) for such a guide.
        lr_schedule: Makes a torch `LRScheduler` from the optimiser and the number of all steps, such as
            `cosine_to_zero()`; it is stepped after every step. By default there is none, or `cosine_to_zero()` for
            such a guide.
        clip_norm: Largest norm of the gradient of all parameters together; a longer one is shortened to it.
        elbo: The objective, `NestedELBO()` by default.
        kl_weight: Weight, or schedule of it, of the KL of the latents outside the plate of the data that are no masks,
            such as the weights of a net. Below one the posterior is colder than Bayes' and the objective no bound. The
            result has the KL in the objective, and beside it the parts without weights. A site of the guide may have
            another weight than the rest, `infer={"kl_weight": w}`: it is multiplied by this one, and the same holds for
            `local_kl_weight`, and for `length_weight` and `infer={"length_weight": w}`.
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
        validation: Data like `data`, in the same form, whose log-likelihood at draws of the guide is reported after
            every epoch. For choosing between fits: a part of the training data that was held back, never the test data.
        stop: Ends training early: `Plateau()`, or a function of the ELBO by epoch. It sees the epochs in which weights
            of KLs, temperature and the shares of masks have the values that they keep. Schedules are made for all of
            `num_epochs`, the learning rate's too, which may be stopped while it is still high.
        plate: Name of the plate over the rows of the data.
        checkpoint: File in which the state of the fit is kept, written anew after every epoch.
        resume: Whether to go on from that file, with the very result of a fit that was never interrupted; an epoch
            that was not finished is done again. Starts from scratch if there is no file. Data and arguments must be
            those of the first call, and what differs is named; what is no part of the file, model, guide, `stop` and
            `validation`, is not looked at. "extend" goes on to a larger `num_epochs`, too, with schedules stretched
            over the new number, from where they then stand.
        khat: Whether to estimate at the end how far a Pyro autoguide is from the posterior, from 256 draws, and to warn
            if it is far. Guides with latents in the plate of the data, other guides and mini-batches are passed over,
            and so are weights of KLs other than one.
        seed: Seed of shuffling, initialisation and draws; None goes on with the caller's random numbers.
        progress: Whether to show a progress bar.

    Returns:
        The ELBO and its parts by epoch, in nats per row, and the learned laws of lengths.

    Raises:
        ValueError: If an argument is invalid, or data, plate, parameters or checkpoint do not fit together.
        NonFiniteLossError: If the loss or a gradient is not finite, or Pyro refuses a law or value that is not; the
            message names the site. What model and guide raise themselves stays what it is.

    Warns:
        LengthCollapseWarning: If a law that was learned by gradients has all its mass on one length.
        PoorFitWarning: If k-hat of the guide is above 0.7.

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
    check_data(data, validation)
    elbo = NestedELBO() if elbo is None else elbo
    check_arguments(
        optimizer=optimizer,
        lr_schedule=lr_schedule,
        elbo=elbo,
        schedule=schedule,
        local_reparam=local_reparam,
        stop=stop,
        plate=plate,
        seed=seed,
        resume=resume,
        checkpoint=checkpoint,
    )
    check_programs(model, guide, data)
    num_data = num_rows(data)
    num_epochs = None if num_epochs is None else whole_number("num_epochs", num_epochs)
    lr = None if lr is None else positive_number("lr", lr)
    batch_size = num_data if batch_size is None else whole_number("batch_size", batch_size, num_data)
    clip_norm = None if clip_norm is None else positive_number("clip_norm", clip_norm, ", or None")
    layers: Any = "all" if local_reparam is True else local_reparam
    handlers = [partial(LocalReparameterization, layers)] if layers else []

    both = (model, guide)
    started, devices = time.perf_counter(), cuda_devices([*both, *named_parts(data).values()])
    with module_local_params(*both), random_numbers(seed, devices), module_mode(both, training=True):
        scale = partial(ScaleToDataset, plate, num_data, mark=isinstance(elbo, NestedELBO))
        if isinstance(guide, AutoNested) and not isinstance(elbo, NestedELBO | TraceEnum_ELBO):
            guide.leave_lengths_to(type(elbo).__name__)
        objective = Objective(elbo, model, guide, partial(scale, batch_size), first_rows(data, batch_size))
        recipe = recipe_for(guide)
        num_epochs = recipe.num_epochs if num_epochs is None else num_epochs
        lr = recipe.lr if lr is None else lr
        optimizer = recipe.optimizer if optimizer is None else optimizer
        lr_schedule = recipe.lr_schedule if lr_schedule is None else lr_schedule
        num_steps = num_epochs * (num_data // batch_size)
        anneal = 0.0 if schedule is None else schedule.anneal
        settings = Settings(num_steps, kl_weight, local_kl_weight, length_weight, temperature, anneal)
        validated = validation is not None
        check_laws_by_row(model, guide, first_rows(data, batch_size), plate, num_data, validated=validated)
        keep_own_params(both)
        check_schedules(guide, schedule, temperature)
        cuts = None if schedule is None else MaskCuts(schedule, both, objective.record, plate)
        with_temperature = [] if temperature is None else parts_with_temperature(both)
        made = make_optimizer(optimizer, objective.parameters, lr)
        lr_scheduler = make_lr_scheduler(lr_schedule, made, num_steps)
        values = value_sites(both, elbo, schedule, plate, num_data / batch_size)
        step = Step(objective, made, lr_scheduler, cuts, with_temperature, handlers, clip_norm, values)
        result, file = FitResult(), None
        if checkpoint is not None:
            weights = {"kl_weight": kl_weight, "local_kl_weight": local_kl_weight, "length_weight": length_weight}
            arguments = {"batch_size": batch_size, "clip_norm": clip_norm, "plate": plate, "seed": seed}
            arguments |= {"elbo": f"{type(elbo).__name__} of {elbo.num_particles} particles", "local_reparam": layers}
            arguments |= describe_schedules({**weights, "temperature": temperature}, schedule) | describe_data(data)
            optimisation = partial(describe_optimisation, optimizer, lr_schedule, objective.parameters, lr)
            file = Checkpoint(
                checkpoint,
                step,
                lambda epochs: optimisation(num_steps // num_epochs * epochs) | arguments,
                num_epochs,
                devices,
            )
            result = file.load(extend=resume == "extend") if resume else result
        started -= result.seconds
        settings[max(result.num_steps - 1, 0)].set_temperature(with_temperature)  # a finished fit has its last one
        stops = _Stops(stop, settled=-(-settings.settled * num_epochs // num_steps))  # in epochs, rounded up
        result.converged = stops(result)
        rest = range(num_epochs if result.converged else len(result.elbo), num_epochs)
        epochs = tqdm(rest, "fit", unit="epoch", initial=len(result.elbo), total=num_epochs, disable=not progress)
        for _ in epochs:
            parts = []
            with quiet_lookups():
                for batch in shuffled_batches(data, batch_size):
                    parts.append(step(batch, settings[result.num_steps]))
                    result.num_steps += 1
            record = objective.record
            laws = record.laws | nested_laws(both) | conditional_laws(guide)
            result.add_epoch(ElboParts.mean(parts, num_data), laws, record.visible)
            if validation is not None:
                log_likelihood = mean_log_likelihood(model, guide, validation, batch_size, plate)
                result.validation_log_likelihood.append(log_likelihood)
            result.seconds, result.converged = time.perf_counter() - started, stops(result)
            epochs.set_postfix_str(result.progress())
            if file is not None:
                file.save(result)
            if result.converged:
                break
        if rest:
            last = settings[max(result.num_steps - 1, 0)].weights
            calibrate_heads(model, guide, data, plate, batch_size)
            finish(result, objective, data, batch_size, partial(scale, weights=last), khat=khat and last == KLWeights())
            if file is not None:
                file.save(result)
    conditional = conditional_laws(guide)
    result.warn_of_poor_fit(knows_lengths=bool(conditional))
    given = {name for name, (law, _) in objective.record.laws.items() if _is_given(law)} | objective.record.by_values
    result.warn_of_collapse(given | conditional.keys())  # the latter are the best ones there are
    return result


def _is_given(law: OrderedMask | NestedLaw) -> bool:
    return not law.length_probs.requires_grad


class _Stops:
    """Say whether a rule, if there is one, ends a fit; it sees the epochs from `settled` on."""

    def __init__(self, rule: StoppingRule | None, settled: int) -> None:
        self.rule, self.settled = rule, settled

    def __call__(self, result: FitResult) -> bool:
        elbo = result.elbo[self.settled :]
        return self.rule is not None and len(elbo) > 0 and bool(self.rule(elbo))
