"""What holds in each step of a fit: weights of KLs, the temperature of masks, and how far the fit is."""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

from pyro_vnd.infer.schedules import Schedule, schedule_values

__all__ = ["KLWeights", "Setting", "Settings"]


class KLWeights(NamedTuple):
    """Weights of KLs in the objective.

    Attributes:
        outside: Of latents outside the plate of the data that are no masks.
        inside: Of latents inside it that are no masks.
        lengths: Of masks, and of the lengths of codes.
    """

    outside: float = 1.0
    inside: float = 1.0
    lengths: float = 1.0


class Setting(NamedTuple):
    """What holds in one step.

    Attributes:
        weights: Weights of KLs.
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
    """What holds in each step, by its number.

    Args:
        num_steps: Steps of the whole fit.
        kl_weight: As in `fit`.
        local_kl_weight: As in `fit`.
        length_weight: As in `fit`.
        temperature: As in `fit`.
        anneal: Share of the fit in which the shares of a `MaskSchedule` still change.

    Raises:
        ValueError: If a value of a schedule is invalid.
    """

    def __init__(
        self,
        num_steps: int,
        kl_weight: Schedule = 1.0,
        local_kl_weight: Schedule = 1.0,
        length_weight: Schedule = 1.0,
        temperature: Schedule | None = None,
        anneal: float = 0.0,
    ) -> None:
        self._last, self._anneal = num_steps - 1, anneal
        self._weights = [
            schedule_values("kl_weight", kl_weight, num_steps),
            schedule_values("local_kl_weight", local_kl_weight, num_steps),
            schedule_values("length_weight", length_weight, num_steps),
        ]
        self._temperature = None
        if temperature is not None:
            self._temperature = schedule_values("temperature", temperature, num_steps, positive=True)

    def __getitem__(self, step: int) -> Setting:
        temperature = None if self._temperature is None else self._temperature[step]
        weights = KLWeights(*(values[step] for values in self._weights))
        return Setting(weights, temperature, t=step / max(self._last, 1))

    @property
    def settled(self) -> int:
        """The first step from which all of them stay what they are."""
        scheduled = [*self._weights, self._temperature or [0.0]]
        changes = [i for values in scheduled for i in range(1, len(values)) if values[i] != values[i - 1]]
        return max(math.ceil(self._anneal * self._last), *changes, 0)
