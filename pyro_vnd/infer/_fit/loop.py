"""The loop over epochs and steps, with what goes on from a checkpoint."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyro_vnd._compat import quiet_lookups
from pyro_vnd._data import Data, num_rows
from pyro_vnd.infer._fit.checkpoint import State, check_same_fit
from pyro_vnd.infer._fit.fingerprint import skip_steps
from pyro_vnd.infer._fit.mask_sources import conditional_laws, nested_laws
from pyro_vnd.infer._fit.objective import NonFiniteLossError, Objective
from pyro_vnd.infer._fit.optimisation import Step
from pyro_vnd.infer._fit.parallel import Ranks
from pyro_vnd.infer._fit.settings import KLWeights, Settings
from pyro_vnd.infer._fit.sources import Source
from pyro_vnd.infer.callbacks import Callback, Checkpoint
from pyro_vnd.infer.result import ElboParts, FitResult, LearnedLaw, LengthSummary, summaries
from pyro_vnd.infer.run import Run

__all__ = ["Loop"]

_KEPT = 512  # steps whose parts are kept before they are added up


class Loop(Run):
    """A fit that can be run.

    Args:
        step: A step of the optimiser.
        source: The data.
        settings: What holds in each step.
        accumulate: Batches of a step.
        callbacks: What is called, in order.
        untouched: Buffers of model and guide, with what was in them before the first evaluation, if there are files.
        describe: Describes, given a number of epochs, what must be the same when the fit goes on.
        cuda_devices: CUDA devices of the fit.
        ranks: The processes.
        **known: As of `Run`.
    """

    def __init__(
        self,
        *,
        step: Step,
        source: Source,
        settings: Settings,
        accumulate: int,
        callbacks: Sequence[Callback],
        untouched: Sequence[tuple[Tensor, Tensor]],
        describe: Callable[[int], dict[str, Any]],
        cuda_devices: list[torch.device],
        ranks: Ranks,
        **known: Any,
    ) -> None:
        super().__init__(optimizer=step.optimizer, batch_size=source.batch_size, ranks=ranks, **known)
        self._step, self.source, self._settings, self._accumulate = step, source, settings, accumulate
        self.callbacks, self._describe, self._cuda_devices = callbacks, describe, cuda_devices
        self._untouched = untouched
        self._place, self._over = _Place(), False
        self._stale: dict[str, LearnedLaw] = {}  # laws that were seen before a state was put in place

    @cached_property
    def _finite(self) -> list[str]:
        """Parameters that are finite before the first step, when a checkpoint asks first."""
        named = self.objective.module.named_parameters()
        return [name for name, parameter in named if torch.isfinite(parameter).all()]

    @property
    def objective(self) -> Objective:
        """What is minimised."""
        return self._step.objective

    @property
    def last_weights(self) -> KLWeights:
        """Weights of KLs in the last step."""
        return self._settings[max(self.step - 1, 0)].weights

    def train(self) -> bool:
        """Train, and return whether there was anything to do.

        Raises:
            NonFiniteLossError: If the loss or a gradient is not finite.
        """
        try:
            for callback in self.callbacks:
                if isinstance(callback, Checkpoint) and (state := callback.read(self)) is not None:
                    self._go_on(state, callback.path, extend=callback.resume == "extend")
        except Exception:
            for buffer, before in self._untouched:
                buffer.copy_(before)
            raise
        self._check_together()
        self._settings[max(self.step - 1, 0)].set_temperature(self._step.with_temperature)
        for callback in self.callbacks:
            callback.on_fit_start(self)
        self.stopped = self._ranks.any(self.stopped)
        if self._over and (self.stopped or self.epoch >= self.num_epochs):
            return False
        self._over = False
        try:
            while self.epoch < self.num_epochs and not self.stopped:
                self._epoch()
        except NonFiniteLossError as error:
            # Finite numbers in a file may be too large to go on from.
            kept = [str(file) for each in self.callbacks if isinstance(each, Checkpoint) for file in each.files()]
            if kept:
                error.add_note(
                    f"fit: states from before this step, the newest first: {', '.join(kept)}. Where one fails again, "
                    "an older one may not"
                )
            raise
        for callback in self.callbacks:
            if not isinstance(callback, Checkpoint):
                callback.on_fit_end(self)
        return True

    def close(self) -> None:
        """Close callbacks, however the fit ended."""
        with ExitStack() as stack:
            for callback in self.callbacks:
                stack.callback(callback.close)

    def _check_together(self) -> None:
        steps = self._ranks.gather(self.step)
        if len(set(steps)) > 1:
            raise ValueError(
                "fit: argument `checkpoint` must be a file that all processes read, on a disk that their machines "
                f"share; they go on from steps {steps}"
            )

    def save(self) -> None:
        """Write checkpoints at the very end."""
        self._over = True
        for callback in self.callbacks:
            if isinstance(callback, Checkpoint):
                callback.on_fit_end(self)

    def _epoch(self) -> None:
        with quiet_lookups():
            for batches in self._batches():
                parts = self._step(batches, self._settings[self.step])
                self.result.num_steps += 1
                if self._step.lr_schedule is not None and self.step <= self.num_steps:
                    self._step.lr_schedule.step()
                self._parts = parts
                self._place.add(parts, sum(map(num_rows, batches)))
                for callback in self.callbacks:
                    callback.on_step(self)
        self.objective.share_buffers()
        means = self._place.means(self._ranks, self.source.num_data)
        both = self.model, self.guide
        self.result.lengths = self.result.lengths | self._place.lengths
        laws = self._seen() | nested_laws(both) | conditional_laws(self.guide)
        self.result.add_epoch(means, laws, self.objective.record.visible)
        self._place = _Place()
        self.result.seconds = self.seconds()
        for callback in self.callbacks:
            callback.on_epoch(self)
            self.result.seconds = self.seconds()
        self.stopped = self._ranks.any(self.stopped)

    def _seen(self) -> dict[str, LearnedLaw]:
        """Return the laws of masks that steps of this process have drawn."""
        return {name: law for name, law in self.objective.record.laws.items() if law is not self._stale.get(name)}

    def _batches(self) -> Iterator[list[Data]]:
        """Yield the batches of each step of an epoch, or of its rest where a checkpoint was written within it."""
        place, now = self._place, self._random()
        if place.num_steps:
            self._set_random(place.random)
        else:
            place.random = now
        if place.loader is not None:
            self.source.load_state_dict(place.loader)
        batches = self.source.epoch(self.epoch)
        if place.num_steps:
            skipped = 0 if place.loader is not None else place.num_steps * self._accumulate
            deque(islice(batches, skipped), maxlen=0)
            self._set_random(now)
        while self.source.goes_on(group := [*islice(batches, self._accumulate)]):
            yield group

    def _random(self) -> dict[str, Any]:
        cuda = [torch.cuda.get_rng_state(device) for device in self._cuda_devices]
        own = [generator.get_state() for generator in self.source.generators]
        return {"cpu": torch.get_rng_state(), "cuda": cuda, "loader": own}

    def _set_random(self, state: dict[str, Any]) -> None:
        torch.set_rng_state(state["cpu"])
        for device, random in zip(self._cuda_devices, state["cuda"], strict=False):
            torch.cuda.set_rng_state(random, device)
        for generator, random in zip(self.source.generators, state["loader"], strict=False):
            generator.set_state(random)

    def state_dict(self) -> State:
        """Return all that the fit needs to go on from here."""
        step, place = self._step, self._place
        self.result.seconds = self.seconds()
        within, visible = place.num_steps > 0, self.objective.record.visible
        lengths = place.lengths | summaries(self._seen(), visible) if within else {}
        return {
            "arguments": self._arguments(self.num_epochs),
            "modules": step.objective.module.state_dict(),
            "trained": self._finite,
            "optimizer": step.optimizer.state_dict(),
            "lr_schedule": None if step.lr_schedule is None else step.lr_schedule.state_dict(),
            "random": self._ranks.gather(self._random()),
            "epoch": {
                "num_steps": place.num_steps,
                "random": self._ranks.gather(place.random) if within else None,
                "loader": self.source.state_dict() if within else None,
                "sums": self._ranks.gather(place.sums().tolist()) if within else None,
                "lengths": {name: asdict(summary) for name, summary in lengths.items()},
                "over": self._over,
            },
            "callbacks": [[type(each).__name__, each.state_dict()] for each in self.callbacks],
            "result": asdict(self.result),
        }

    @torch.no_grad()
    def put_back(self, modules: Mapping[str, Any], path: Path) -> None:
        """Give model and guide what a state has of them; if that fails, they stay what they are."""
        module = self.objective.module
        before = {name: x.clone() for name, x in module.state_dict().items() if isinstance(x, Tensor)}
        try:
            module.load_state_dict(modules)
        except Exception as error:
            for name, x in module.state_dict().items():
                if name in before:
                    x.copy_(before[name])
            if not isinstance(error, RuntimeError):
                raise
            said = " ".join(str(error).split()).rstrip(". ")
            raise ValueError(
                f"fit: argument `checkpoint`, {str(path)!r}, has or would have a state that model and guide do not "
                f"take back: {said}. What has a get_extra_state needs a set_extra_state, and the same modules as before"
            ) from error

    def _arguments(self, num_epochs: int) -> dict[str, Any]:
        state = self._step.objective.module.state_dict()
        kinds = {
            name: f"{value.dtype} of shape {tuple(value.shape)}"
            for name, value in state.items()
            if isinstance(value, Tensor) and not value.is_nested
        }
        return {"num_epochs": num_epochs, **self._describe(num_epochs), "parameters": kinds}

    def _go_on(self, state: State, path: Path, *, extend: bool) -> None:
        """Put a state in place."""
        before, step = state["arguments"].get("num_epochs"), self._step
        longer = isinstance(before, int) and before < self.num_epochs
        new = self._arguments(before if longer else self.num_epochs) | {"num_epochs": self.num_epochs}
        check_same_fit(path, state["arguments"], new, extend=extend)
        extend, scheduler = extend and longer, step.lr_schedule
        if extend and scheduler is not None:
            skip_steps(scheduler, state["result"]["num_steps"])
        scheduled = [{k: v for k, v in group.items() if k != "params"} for group in step.optimizer.param_groups]
        try:
            step.optimizer.load_state_dict(state["optimizer"])
        except (KeyError, RuntimeError, ValueError) as error:
            raise ValueError(f"fit: checkpoint {str(path)!r} has the state of another optimiser: {error}") from error
        if extend:  # the learning rate is that of the longer schedule
            for group, options in zip(step.optimizer.param_groups, scheduled, strict=True):
                group.update(options)
        elif scheduler is not None:
            scheduler.load_state_dict(state["lr_schedule"])
        self.put_back(state["modules"], path)  # after what else could fail
        kept = list(state["callbacks"])
        for callback in self.callbacks:  # of several of a kind each has its own
            mine = next((each for each in kept if each[0] == type(callback).__name__), None)
            if mine is not None:
                kept.remove(mine)
                callback.load_state_dict(mine[1])
        lengths = _summaries(state["result"].pop("lengths"))
        self.result = FitResult(**state["result"] | {"converged": False}, lengths=lengths)  # which a rule says anew
        self._seconds_before = self.result.seconds
        rank = self._ranks.rank
        if rank < len(state["random"]):  # another process draws what it would in a new fit
            self._set_random(state["random"][rank])
        within = state["epoch"]
        self._over, self._stale = within["over"], dict(self.objective.record.laws)
        if within["num_steps"]:
            random, sums = within["random"], within["sums"]
            if len(sums) != self._ranks.size:
                sums = [torch.tensor(sums, dtype=torch.float64).sum(0).tolist()] + [None] * (self._ranks.size - 1)
            random = random[min(rank, len(random) - 1)]
            lengths = _summaries(within["lengths"])
            self._place = _Place(within["num_steps"], random, within["loader"], sums[rank], lengths)


def _summaries(kept: Mapping[str, dict[str, Any]]) -> dict[str, LengthSummary]:
    return {name: LengthSummary(**summary) for name, summary in kept.items()}


class _Place:
    """How far an epoch is: steps, the random numbers at its beginning, the state of the loader, sums and laws so far.

    The laws are those of masks that were drawn before a checkpoint, and may not be drawn again in this epoch.
    """

    def __init__(
        self,
        num_steps: int = 0,
        random: Any = None,
        loader: Any = None,
        sums: list[float] | None = None,
        lengths: Mapping[str, LengthSummary] | None = None,
    ) -> None:
        self.num_steps, self.random, self.loader, self.lengths = num_steps, random, loader, dict(lengths or {})
        self._sums = torch.tensor(sums or [0.0] * 5, dtype=torch.float64)
        self._parts: list[Tensor] = []
        self._counts: list[int] = []

    def add(self, parts: ElboParts, count: int) -> None:
        """Add a step."""
        self.num_steps += 1
        self._parts.append(torch.stack(parts))
        self._counts.append(count)
        if len(self._parts) >= _KEPT:
            self.sums()

    def sums(self) -> Tensor:
        """Return the parts times rows, and the rows, added up."""
        if self._parts:
            counts = torch.tensor(self._counts, dtype=torch.float64).unsqueeze(1)
            parts = torch.stack(self._parts).cpu().double()
            for terms in torch.cat([counts * parts, counts], 1):  # in order: the same however often it is asked for
                # What is not known in one step is not known of the epoch.
                self._sums = self._sums + terms
            self._parts, self._counts = [], []
        return self._sums

    def means(self, ranks: Ranks, num_data: int) -> ElboParts:
        """Return the means over the rows of all processes, in nats per row."""
        *parts, rows = ranks.sum(self.sums()).tolist()
        if rows == 0:
            raise ValueError("fit: argument `data` must have batches in every epoch; got none: is it an iterator?")
        return ElboParts(*(part / rows / num_data for part in parts))
