"""One step of stochastic variational inference."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pyro_vnd._data import Data, num_rows
from pyro_vnd.infer._fit.mask_sources import MaskCuts
from pyro_vnd.infer._fit.objective import NonFiniteLossError, Objective
from pyro_vnd.infer._fit.settings import Setting
from pyro_vnd.infer._fit.values import ValueSites
from pyro_vnd.infer.result import ElboParts

__all__ = ["Step"]


class Step:
    """One step of the optimiser.

    Args:
        objective: What is minimised.
        optimizer: The optimiser of its parameters.
        lr_schedule: Scheduler of the learning rate, stepped after each step, or None.
        cuts: Where masks come from, or None for their laws.
        with_temperature: Parts of model and guide whose masks have a temperature.
        handlers: Make more contexts for each evaluation of the objective.
        clip_norm: Largest norm of the gradient, or None.
        values: Lets value heads learn from each evaluation, or None.
    """

    def __init__(
        self,
        objective: Objective,
        optimizer: Optimizer,
        lr_schedule: LRScheduler | None,
        cuts: MaskCuts | None,
        with_temperature: Sequence[Any],
        handlers: Sequence[Callable[[], AbstractContextManager[Any]]],
        clip_norm: float | None,
        values: ValueSites | None = None,
    ) -> None:
        self.objective, self.optimizer, self.lr_schedule = objective, optimizer, lr_schedule
        self.cuts, self.with_temperature, self.handlers, self.clip_norm = cuts, with_temperature, handlers, clip_norm
        self.values = values

    def __call__(self, batch: Data, setting: Setting) -> ElboParts:
        """Take a step.

        Args:
            batch: Rows of the data.
            setting: What holds in this step.

        Returns:
            The parts of the ELBO of the batch, detached.

        Raises:
            NonFiniteLossError: If the loss or a gradient is not finite.
        """
        setting.set_temperature(self.with_temperature)
        self.optimizer.zero_grad(set_to_none=True)
        particles = [nullcontext()] if self.cuts is None else self.cuts.draw(num_rows(batch), setting.t)
        parts = []
        for particle in particles:
            with ExitStack() as stack:
                for context in (particle, *(handler() for handler in self.handlers)):
                    stack.enter_context(context)
                if self.values is not None:
                    stack.enter_context(self.values)  # within: it sees laws before they are cut
                loss = self.objective(batch, setting.weights)
                if self.values is not None and (error := self.values.loss()) is not None:
                    loss = loss + (error - error.detach())  # in the gradient of the heads, which have no other
                # Here, so that memory holds the graph of one at a time.
                (loss if len(particles) == 1 else loss / len(particles)).backward()
                parts.append(self.objective.parts(loss))
        norm = self._clip()
        mean = ElboParts.of_particles(parts)
        # One look at the device a step. A loss that is not finite is found here, too: nothing was updated yet.
        if not (torch.isfinite(mean.elbo) & torch.isfinite(norm)):
            what, value = ("gradient norm", norm) if torch.isfinite(mean.elbo) else ("loss", -mean.elbo)
            raise NonFiniteLossError(f"fit: the {what} is {value.item()}; {self.objective.blame(batch)}")
        self.optimizer.step()
        if self.lr_schedule is not None:
            self.lr_schedule.step()
        return mean

    def _clip(self) -> Tensor:
        parameters = self.objective.parameters
        if self.clip_norm is not None:
            return torch.nn.utils.clip_grad_norm_(parameters, self.clip_norm)
        return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
