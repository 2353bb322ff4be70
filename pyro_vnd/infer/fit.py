"""Stochastic variational inference with mini-batches, progress and a record of the ELBO's parts."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from pyro import poutine
from pyro.infer import ELBO, TraceMeanField_ELBO
from torch import Tensor
from tqdm.auto import tqdm

from pyro_vnd.infer.local_params import module_local_params
from pyro_vnd.infer.monitor import ElboMonitor, ScaleToDataset
from pyro_vnd.infer.result import FitResult

__all__ = ["NonFiniteLossError", "fit"]


class NonFiniteLossError(ArithmeticError):
    """The ELBO or its gradient became infinite or NaN; parameters are those of the last finite step."""


def fit(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    data: Tensor | Sequence[Tensor],
    *,
    num_epochs: int = 100,
    batch_size: int | None = None,
    lr: float = 0.01,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam,
    elbo: ELBO | None = None,
    kl_weight: float = 1.0,
    plate: str = "data",
    seed: int | None = 0,
    progress: bool = True,
) -> FitResult:
    r"""Fit a guide, and the parameters of the model, by maximising the ELBO on mini-batches.

    A step draws B of the N rows and ascends

    $$\frac{N}{B} \sum_{n \in \mathrm{batch}} E_q \left[\log p(x_n, z_n \mid w) - \log q(z_n)\right]
      - \mathrm{KL}(q(w) \| p(w)),$$

    where the first sum is over all sites in the plate of the data, whose scale is set here: write the model for whole
    data, `with pyro.plate("data", len(x))`. Model and guide are called as `model(*batch)` and `guide(*batch)`, under
    module-local parameters; their `nn.Module` parameters are trained, not Pyro's global store. A second call goes on
    from where the first one ended.

    The random numbers of a fit with a seed do not disturb those of the caller.

    Args:
        model: A Pyro model; an `nn.Module` if it has parameters.
        guide: Its guide, an `nn.Module` such as `AutoNested`.
        data: A tensor, or several with the same number of rows.
        num_epochs: Passes over the data.
        batch_size: Rows of a mini-batch; the rows that do not fill a last one wait for the next epoch's shuffle. By
            default all rows.
        lr: Learning rate, handed to the optimiser.
        optimizer: Makes a torch optimiser from parameters and `lr`.
        elbo: The objective, `TraceMeanField_ELBO()` by default.
        kl_weight: Weight of the KL of the latents outside the plate of the data, such as the weights of a net. Below
            one the posterior is colder than Bayes' and the objective no bound; the reported KL is the weighted one.
        plate: Name of the plate over the rows of the data.
        seed: Seed of shuffling, initialisation and draws; None goes on with the caller's random numbers.
        progress: Whether to show a progress bar.

    Returns:
        The ELBO and its parts by epoch, in nats per row, and the learned laws of lengths.

    Raises:
        ValueError: If the data, the plate or the parameters do not fit together.
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
    tensors = _check_data(data)
    num_data = len(tensors[0])
    batch_size = num_data if batch_size is None else batch_size
    if not 1 <= batch_size <= num_data:
        raise ValueError(f"fit: argument `batch_size` must be from 1 to {num_data}, the rows of data; got {batch_size}")
    if not (kl_weight >= 0 and kl_weight < torch.inf):
        raise ValueError(f"fit: argument `kl_weight` must be finite and >= 0; got {kl_weight}")
    if num_epochs < 1:
        raise ValueError(f"fit: argument `num_epochs` must be at least 1; got {num_epochs}")

    result, started = FitResult(), time.perf_counter()
    with module_local_params(model, guide), _random_numbers(seed):
        objective: Any = (TraceMeanField_ELBO() if elbo is None else elbo)(model, guide)  # type: ignore[arg-type]
        scale = ScaleToDataset(plate, num_data, batch_size, kl_weight)
        step = _Step(objective, scale, [rows[:batch_size] for rows in tensors])
        step.optimizer = optimizer(step.parameters, lr=lr)
        epochs = tqdm(range(num_epochs), desc="fit", unit="epoch", disable=not progress)
        for _ in epochs:
            totals, num_steps = {"elbo": 0.0, "log_likelihood": 0.0}, 0
            for batch in _batches(tensors, batch_size):
                for name, value in step(batch).items():
                    totals[name] += value
                num_steps += 1
                result.num_steps += 1
            result.add_epoch(totals, num_steps * num_data, step.monitor.laws)
            epochs.set_postfix_str(result.progress())
    result.seconds = time.perf_counter() - started
    result.warn_of_collapse()
    return result


class _Step:
    """One step of the optimiser, and what it takes to explain a failure."""

    optimizer: torch.optim.Optimizer

    def __init__(self, objective: Any, scale: ScaleToDataset, first_batch: list[Tensor]) -> None:
        self.objective, self.scale, self.monitor = objective, scale, ElboMonitor()
        # Lazy guides make their parameters on the first call.
        with poutine.trace(param_only=True) as trace:
            self._loss(first_batch)
        self.scale.check()
        self.parameters = list(objective.parameters())
        known = {id(parameter) for parameter in self.parameters}
        for name, site in trace.trace.nodes.items():
            value: Any = site.get("value")
            unconstrained = value.unconstrained() if hasattr(value, "unconstrained") else value
            if site["type"] == "param" and id(unconstrained) not in known:
                raise ValueError(
                    f"fit: parameter {name!r} belongs to no nn.Module: make model and guide PyroModules, or train "
                    "with pyro.infer.SVI and Pyro's global parameter store"
                )
        if not self.parameters:
            raise ValueError("fit: neither model nor guide has parameters; is the guide an nn.Module?")

    def _loss(self, batch: list[Tensor]) -> Tensor:
        with self.scale, self.monitor:
            return self.objective(*batch)

    def __call__(self, batch: list[Tensor]) -> dict[str, float]:
        self.optimizer.zero_grad(set_to_none=True)
        try:
            loss = self._loss(batch)
        except ValueError as error:
            raise NonFiniteLossError(
                f"fit: evaluating the ELBO failed after site {self.monitor.last_site!r}: {error}"
            ) from error
        if not torch.isfinite(loss):
            raise NonFiniteLossError(f"fit: the loss is {loss.item()}; {self._blame(batch)}")
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        if not torch.isfinite(norm):
            raise NonFiniteLossError(f"fit: the gradient norm is {norm.item()}; {self._blame(batch)}")
        self.optimizer.step()
        likelihood = torch.nan if self.monitor.enumerated else self.monitor.log_likelihood
        return {"elbo": -loss.item(), "log_likelihood": likelihood / self.objective.elbo.num_particles}

    def _blame(self, batch: list[Tensor]) -> str:
        """Name the first site whose value or score is not finite, or the parameters whose gradient is not."""
        with torch.no_grad(), self.scale:
            guide = poutine.trace(self.objective.guide).get_trace(*batch)
            model = poutine.trace(poutine.replay(self.objective.model, trace=guide)).get_trace(*batch)
        for where, trace in (("guide", guide), ("model", model)):
            for name, site in trace.nodes.items():
                if site["type"] != "sample" or poutine.util.site_is_subsample(site):
                    continue
                score = site["fn"].log_prob(site["value"])
                for what, value in (("value", site["value"]), ("log-probability", score)):
                    if not torch.isfinite(value).all():
                        return f"the {what} of site {name!r} of the {where} is not finite"
        last = f"last site {self.monitor.last_site!r}"
        gradients = {name: p.grad for name, p in self.objective.named_parameters() if p.grad is not None}
        bad = [name for name, gradient in gradients.items() if not torch.isfinite(gradient).all()]
        return f"the gradient of {bad} is not finite; {last}" if bad else f"on a new draw each site is finite; {last}"


def _check_data(data: Tensor | Sequence[Tensor]) -> list[Tensor]:
    tensors = [data] if isinstance(data, Tensor) else list(data)
    for i, rows in enumerate(tensors):
        if not isinstance(rows, Tensor) or rows.dim() == 0:
            raise ValueError(f"fit: argument `data[{i}]` must be a tensor with rows; got {type(rows).__name__}")
        if rows.is_floating_point() and not torch.isfinite(rows).all():
            raise ValueError(f"fit: argument `data[{i}]` of shape {tuple(rows.shape)} must be finite; got NaN or inf")
    shapes = [tuple(rows.shape) for rows in tensors]
    if not tensors or len({shape[0] for shape in shapes}) > 1 or shapes[0][0] == 0:
        raise ValueError(f"fit: argument `data` must be tensors with the same number of rows, at least 1; got {shapes}")
    return tensors


def _batches(tensors: list[Tensor], batch_size: int) -> Iterator[list[Tensor]]:
    num_data = len(tensors[0])
    if batch_size == num_data:
        yield tensors
        return
    order = torch.randperm(num_data)
    for start in range(0, num_data - batch_size + 1, batch_size):
        rows = order[start : start + batch_size]
        yield [x[rows.to(x.device)] for x in tensors]


@contextmanager
def _random_numbers(seed: int | None) -> Iterator[None]:
    """Seed torch inside a block and give the caller's random numbers back after it."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
