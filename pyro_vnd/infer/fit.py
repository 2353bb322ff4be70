"""Stochastic variational inference with mini-batches, callbacks and a record of the ELBO's parts."""

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any, Literal, Unpack

import torch
from pyro.infer import ELBO

from pyro_vnd._state import module_mode, one_at_a_time, random_numbers
from pyro_vnd.infer._fit.assembly import devices_of, make_loop, move_modules, settle, warn
from pyro_vnd.infer._fit.checks import LearningRate, check_arguments, device_of
from pyro_vnd.infer._fit.objective import NonFiniteLossError
from pyro_vnd.infer._fit.parallel import Ranks
from pyro_vnd.infer._fit.precision import computing_in
from pyro_vnd.infer._fit.short_forms import ShortForms, all_callbacks
from pyro_vnd.infer._fit.sources import as_source
from pyro_vnd.infer.callbacks import Callback
from pyro_vnd.infer.elbo import NestedELBO
from pyro_vnd.infer.guides import module_local_params
from pyro_vnd.infer.optimizer_settings import OptimizerSettings
from pyro_vnd.infer.result import FitResult
from pyro_vnd.infer.schedules import KLWeights, MaskSchedule, PriceSchedule

__all__ = ["NonFiniteLossError", "fit"]


def fit(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    data: Any,
    *,
    num_epochs: int | None = None,
    batch_size: int | None = None,
    num_data: int | None = None,
    lr: LearningRate | None = None,
    optimizer: Callable[..., torch.optim.Optimizer] | OptimizerSettings | None = None,
    elbo: ELBO | None = None,
    weights: KLWeights | None = None,
    schedule: MaskSchedule | PriceSchedule | None = None,
    callbacks: Sequence[Callback] = (),
    plate: str = "data",
    device: torch.device | str | None = None,
    precision: Literal["32", "bf16"] = "32",
    seed: int | None = 0,
    **short_forms: Unpack[ShortForms],
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
    them further. Pyro's handlers see the parameters of plain nets inside a model of this library in the first
    evaluation only. A second call goes on from where the first one ended, with a fresh optimiser.

    Weights and temperatures are numbers or functions of t, which goes from 0 in the first step to 1 in the last one:
    `linear`, `cosine`, or your own.

    Processes that torchrun has started share each batch, and end with the same parameters: see docs/scaling.md.

    The random numbers of a fit with a seed do not disturb those of the caller.

    Args:
        model: A Pyro model; an `nn.Module` if it has parameters.
        guide: Its guide, an `nn.Module` such as `AutoNested` or the `guide` of a nested net.
        data: A tensor, a tuple of tensors, or a mapping from names of arguments to tensors; a torch `Dataset`; or what
            comes in batches, each such data: a `DataLoader`, or anything else that can be iterated again. All parts of
            a batch have the same number of rows, and are finite. Where values are missing, one of them says so,
            `{"y": y.nan_to_num(), "observed": ~y.isnan()}`, and the model hides the rest,
            `poutine.mask(mask=observed)`.
        num_epochs: Passes over the data, at most. By default 100, or 500 for an `AutoNested` whose latents know the
            lengths.
        batch_size: Rows of a mini-batch, on all processes together; a last one may have fewer, and counts less. By
            default all rows; batches that come ready made keep their size. An autoguide with laws by row needs to know
            the rows: number them, `i` among the data and `pyro.plate("data", N, subsample=i)` in the model.
        num_data: N, rows of all data, where batches come from something that does not know it.
        lr: Learning rate, or rates by group of parameters: `{"laws": 0.1, "model.encoder.*": 1e-4, "*": 0.001}`, where
            "laws" are laws of lengths, which move slowly at the rate of weights, "*" is the rest, and other keys are
            patterns of names, as in `model.net.net.0.plain.weight`; the first that fits holds, and a group at rate 0
            stays what it is. By default, and for what is in no group, 0.01, or 0.1 for an `AutoNested` whose latents
            know the lengths: its parameters are in units of the prior.
        optimizer: Makes a torch optimiser from parameters and `lr`; or `OptimizerSettings`, with a schedule of the
            learning rate, the largest norm of the gradient, and accumulation.
        elbo: The objective, `NestedELBO()` by default.
        weights: Weights of the parts of the KL, `KLWeights`. The result has the KL in the objective, and beside it the
            parts without weights.
        schedule: Where the masks of nested nets and the lengths of codes (a `NestedNormal` or `OrderedMask` in the
            plate of the data) come from: part from q, part at a budget, part at full width. The cure against lengths
            that collapse; see `MaskSchedule`, which also has the temperature of masks. None draws all of them from q.
        callbacks: What is called while the fit goes on: `Validation`, `BestEpoch`, `EarlyStopping`, `Plateau`,
            `Checkpoint`, `CSVLogger`, `TensorBoardLogger`, `LivePlot`, or your own `Callback`. They are called in their
            order, but `Validation` first and `Checkpoint` last.
        plate: Name of the plate over the rows of the data.
        device: Where model and guide are moved to, and each batch; None leaves all where they are.
        precision: "32", or "bf16": torch modules inside model and guide, such as what was nested or the bodies of an
            autoencoder, run under torch's autocast to bfloat16, and what they return is float32 again. Parameters,
            gradients, laws and divergences are float32. Modules of Pyro's own kind stay as they are.
        seed: Seed of shuffling, initialisation and draws; None goes on with the caller's random numbers.
        **short_forms: Short forms of callbacks. `validation`, data like `data`, whose log-likelihood is reported after
            every epoch: `Validation(validation)`. `checkpoint` and `resume`, a file and whether to go on from it:
            `Checkpoint(checkpoint, resume=resume)`; where there is no file the fit begins anew. The result is that of
            a fit that was never interrupted, and data and arguments must be those of the first call, but for model,
            guide, `callbacks` and `validation`, which are not looked at; resume="extend" goes on to a larger
            `num_epochs`, too, with schedules stretched over the new number, from where they then stand. `progress`,
            whether to show a bar, as is the default: `ProgressBar()`.

    Returns:
        The ELBO and its parts by epoch, in nats per row, and the learned laws of lengths.

    Raises:
        ValueError: If an argument is invalid, or data, plate, parameters or checkpoint do not fit together.
        RuntimeError: If another thread of the process is fitting: Pyro's handlers and settings are the process's.
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
    called = all_callbacks(callbacks, short_forms)
    asked = check_arguments(
        num_epochs=num_epochs,
        lr=lr,
        optimizer=OptimizerSettings.of(optimizer),
        elbo=NestedELBO() if elbo is None else elbo,
        weights=KLWeights() if weights is None else weights,
        schedule=schedule,
        plate=plate,
        precision=precision,
        seed=seed,
    )
    target, started, both = device_of(device), time.perf_counter(), (model, guide)
    move_modules(both, target)
    devices = devices_of(both, data, target)
    with (
        one_at_a_time(),
        torch.inference_mode(False),
        torch.enable_grad(),
        module_local_params(*both),
        random_numbers(asked.seed, devices),
        module_mode(both, training=True),
    ):
        ranks = Ranks.join(target if target is not None or not devices else devices[0])
        source = as_source(data, batch_size, num_data, ranks, target)
        loop = make_loop(model, guide, source, asked, called, devices, started)
        with closing(loop), computing_in(asked.precision, both):
            if loop.train():
                settle(loop)
    warn(loop)
    return loop.result
