"""What holds in each step of a fit: weights of KLs, the temperature of masks, and how far the fit is."""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

from pyro_vnd.infer.schedules import KLWeights, MaskSchedule, PriceSchedule, schedule_values

__all__ = ["KLWeights", "Setting", "Settings"]


class Setting(NamedTuple):
    """What holds in one step.

    Attributes:
        weights: Weights of KLs, numbers.
        temperature: Temperature of masks, or None to leave it alone.
        t: How far the fit is, from 0 to 1.
    """

    weights: KLWeights
    temperature: float | None
    t: float

    def set_temperature(self, parts: Iterable[Any]) -> None:
        """Set the temperature of parts whose masks have one, unless it is None."""
        if self.temperature is not None:
            for part in parts:
                part.temperature = self.temperature


class Settings:
    """What holds in each step, by its number; after the last one that was planned, what holds there.

    Args:
        num_steps: Steps of the whole fit, as far as is known.
        weights: As in `fit`.
        schedule: As in `fit`.

    Raises:
        ValueError: If a value of a schedule is invalid.
    """

    def __init__(
        self,
        num_steps: int,
        weights: KLWeights | None = None,
        schedule: MaskSchedule | PriceSchedule | None = None,
    ) -> None:
        self._last = num_steps - 1
        self._anneal = 0.0 if schedule is None else schedule.anneal
        named = (weights or KLWeights())._asdict()
        self._weights = [schedule_values(f"weights.{name}", weight, num_steps) for name, weight in named.items()]
        temperature = schedule.temperature if isinstance(schedule, MaskSchedule) else None
        self._temperature = None
        if temperature is not None:
            self._temperature = schedule_values("schedule.temperature", temperature, num_steps, positive=True)

    def __getitem__(self, step: int) -> Setting:
        step = min(step, self._last)
        temperature = None if self._temperature is None else self._temperature[step]
        weights = KLWeights(*(values[step] for values in self._weights))
        return Setting(weights, temperature, t=step / max(self._last, 1))

    @property
    def settled(self) -> int:
        """The first step from which all of them stay what they are."""
        scheduled = [*self._weights, self._temperature or [0.0]]
        changes = [i for values in scheduled for i in range(1, len(values)) if values[i] != values[i - 1]]
        return max(math.ceil(self._anneal * self._last), *changes, 0)
