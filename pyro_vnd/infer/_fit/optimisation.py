"""One step of stochastic variational inference."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
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
    r"""One step of the optimiser.

    Its gradient is the mean over rows: a batch of b rows counts b / B, where B are the rows of a full step, so that a
    last batch with fewer rows counts less, and every row of an epoch the same.

    Args:
        objective: What is minimised.
        optimizer: The optimiser of its parameters.
        lr_schedule: Scheduler of the learning rate, which the loop steps after each step, or None.
        num_rows: B, rows of a full step on this process.
        cuts: Where masks come from, or None for their laws.
        with_temperature: Parts of model and guide whose masks have a temperature.
        clip_norm: Largest norm of the gradient, or None.
        values: Lets value heads learn from each evaluation, or None.
    """

    def __init__(
        self,
        objective: Objective,
        optimizer: Optimizer,
        lr_schedule: LRScheduler | None,
        num_rows: float,
        cuts: MaskCuts | None = None,
        with_temperature: Sequence[Any] = (),
        clip_norm: float | None = None,
        values: ValueSites | None = None,
    ) -> None:
        self.objective, self.optimizer, self.lr_schedule, self.num_rows = objective, optimizer, lr_schedule, num_rows
        self.cuts, self.with_temperature, self.clip_norm, self.values = cuts, with_temperature, clip_norm, values

    def __call__(self, batches: Sequence[Data], setting: Setting) -> ElboParts:
        """Take a step.

        Args:
            batches: Rows of the data; gradients of several batches are accumulated.
            setting: What holds in this step.

        Returns:
            The parts of the ELBO of the batches, detached.

        Raises:
            NonFiniteLossError: If the loss or a gradient is not finite.
        """
        setting.set_temperature(self.with_temperature)
        self.optimizer.zero_grad(set_to_none=True)
        parts, counts = [], []
        for i, batch in enumerate(batches):
            count = num_rows(batch)
            particles: Sequence[AbstractContextManager[None]] = (
                [nullcontext()] if self.cuts is None else self.cuts.draw(count, setting.t)
            )
            weight = count / self.num_rows
            self.objective.weigh(weight)
            for j, particle in enumerate(particles):
                last = i == len(batches) - 1 and j == len(particles) - 1
                parts.append(self._evaluate(batch, particle, setting, weight / len(particles), last=last))
                counts.append(count)
        self.objective.agree()
        norm = self._clip()
        mean = ElboParts.weighted(parts, counts)
        # One look at the device a step. A loss that is not finite is found here, too: nothing was updated yet.
        if not torch.isfinite(mean.elbo + norm):
            what, value = ("gradient norm", self._norm()) if torch.isfinite(mean.elbo) else ("loss", -mean.elbo)
            raise NonFiniteLossError(f"fit: the {what} is {value.item()}; {self.objective.blame(batches[-1])}")
        self.optimizer.step()
        return mean

    def _evaluate(
        self, batch: Data, particle: AbstractContextManager[None], setting: Setting, weight: float, *, last: bool
    ) -> ElboParts:
        """Add the gradient of one evaluation of the objective; here, so that memory holds the graph of one at a time.

        The last one of a step is that in which processes add up their gradients.
        """
        values = self.values

        def evaluate() -> Tensor:
            with nullcontext() if values is None else values:  # within: it sees laws before they are cut
                loss = self.objective(batch, setting.weights)
                error = None if values is None else values.loss()
            # In the gradient of the heads, which have no other.
            return loss if error is None else loss + (error - error.detach())

        if values is not None:
            values.row_scale = self.objective.row_scale(batch)
        with particle:
            loss = self.objective.averaged(evaluate, last=last)
            (loss if weight == 1 else loss * weight).backward()
        return self.objective.parts(loss)

    def _clip(self) -> Tensor:
        """Shorten the gradient if it is to be, and return a number that is finite if the gradient is."""
        if self.clip_norm is not None:
            groups = self.optimizer.param_groups  # of which those at rate zero stay what they are
            return torch.nn.utils.clip_grad_norm_([p for g in groups if g["lr"] for p in g["params"]], self.clip_norm)
        grads = [p.grad for p in self.objective.parameters if p.grad is not None]
        if len({(grad.dtype, grad.device) for grad in grads}) != 1:
            return self._norm()
        # Sums take half the time of norms, and hide nothing: infinities of both signs have no sum.
        return torch.stack([grad.sum() for grad in grads]).sum()

    def _norm(self) -> Tensor:
        return torch.nn.utils.get_total_norm([p.grad for p in self.objective.parameters if p.grad is not None])
