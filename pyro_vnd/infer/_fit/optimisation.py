"""One step of stochastic variational inference, and what it takes to explain a failure."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from pyro import poutine
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from pyro_vnd.distributions import OrderedMask
from pyro_vnd.infer._fit.handlers import ElboMonitor, ScaleToDataset
from pyro_vnd.infer.elbo import NestedELBO

__all__ = ["NonFiniteLossError", "Step"]

Particles = Callable[[int], Sequence[AbstractContextManager[Any]]]
Handler = Callable[[], AbstractContextManager[Any]]


class NonFiniteLossError(ArithmeticError):
    """The ELBO or its gradient became infinite or NaN; parameters are those of the last finite step."""


class Step:
    """One step of the optimiser.

    Args:
        objective: ELBO module of model and guide.
        scale: Scales the batch to the data.
        first_batch: Rows for the first call, in which lazy guides make their parameters.
        particles: Makes a context for each evaluation of the ELBO in a step, from the number of rows; None is one.
        handlers: Make more contexts for each evaluation.
        clip_norm: Largest norm of the gradient, or None.

    Raises:
        ValueError: If the plate or the parameters do not fit what `fit` trains.
    """

    optimizer: torch.optim.Optimizer
    lr_schedule: LRScheduler | None = None

    def __init__(
        self,
        objective: Any,
        scale: ScaleToDataset,
        first_batch: list[Tensor],
        particles: Particles | None,
        handlers: list[Handler],
        clip_norm: float | None,
    ) -> None:
        self.objective, self.scale, self.clip_norm = objective, scale, clip_norm
        self.particles = particles
        self.keeps_parts = isinstance(objective.elbo, NestedELBO)
        self.monitor = ElboMonitor(score=not self.keeps_parts)
        with poutine.trace(param_only=True) as trace:
            self._loss(first_batch)
        self.handlers = handlers  # not for the first call, where a guide may look for sites that these hide
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

    def __call__(self, batch: list[Tensor]) -> Tensor:
        """Take a step.

        Args:
            batch: Rows of the data.

        Returns:
            The parts of the ELBO, detached, shape (4,), in the order of `FitResult.add_epoch`.

        Raises:
            NonFiniteLossError: If the loss or a gradient is not finite.
        """
        self.optimizer.zero_grad(set_to_none=True)
        particles = [nullcontext()] if self.particles is None else self.particles(len(batch[0]))
        parts = []
        for particle in particles:
            with ExitStack() as stack:
                for context in (particle, *(handler() for handler in self.handlers)):
                    stack.enter_context(context)
                try:
                    loss = self._loss(batch)
                except ValueError as error:
                    raise NonFiniteLossError(
                        f"fit: evaluating the ELBO failed after site {self.monitor.last_site!r}: {error}"
                    ) from error
                # Here, so that memory holds the graph of one at a time.
                (loss if len(particles) == 1 else loss / len(particles)).backward()
                parts.append(self._parts(loss.detach()))
        norm = self._clip()
        mean = torch.stack(parts).mean(0)
        # One look at the device a step. A loss that is not finite is found here, too: nothing was updated yet.
        if not (torch.isfinite(mean[0]) & torch.isfinite(norm)):
            what = "gradient norm" if torch.isfinite(mean[0]) else "loss"
            value = norm if torch.isfinite(mean[0]) else -mean[0]
            raise NonFiniteLossError(f"fit: the {what} is {value.item()}; {self._blame(batch)}")
        self.optimizer.step()
        if self.lr_schedule is not None:
            self.lr_schedule.step()
        return mean

    def _clip(self) -> Tensor:
        if self.clip_norm is not None:
            return torch.nn.utils.clip_grad_norm_(self.parameters, self.clip_norm)
        return torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])

    def _parts(self, loss: Tensor) -> Tensor:
        elbo, likelihood, latents, lengths = self.objective.elbo, torch.nan, torch.nan, torch.nan
        if self.keeps_parts:
            masks = {name for name, law in self.monitor.laws.items() if isinstance(law, OrderedMask)}
            likelihood = elbo.log_likelihood
            lengths = sum(kl for name, kl in elbo.kl.items() if name in masks) + sum(elbo.kl_lengths.values())
            latents = sum(elbo.kl.values()) - lengths
        elif not self.monitor.enumerated:
            likelihood = self.monitor.log_likelihood / elbo.num_particles
        return torch.stack([torch.as_tensor(part).to(loss) for part in (-loss, likelihood, latents, lengths)])

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
