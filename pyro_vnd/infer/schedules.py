"""What changes while a fit goes on: weights and temperatures, learning rates, and where masks come from."""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import lru_cache
from itertools import accumulate
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR

from pyro_vnd._inputs import takes
from pyro_vnd._sizes import is_integer, is_number, is_within
from pyro_vnd.distributions import OrderedMask

__all__ = [
    "KLWeights",
    "LRSchedule",
    "MaskSchedule",
    "PriceSchedule",
    "Schedule",
    "cosine",
    "cosine_to_zero",
    "linear",
    "schedule_values",
]

LOWEST, HIGHEST, HOTTEST = 1 / 6500, 1 / 2.2, 1 / 260  # prices and temperature as shares of the spread of values

Schedule = float | Callable[[float], float]
LRSchedule = Callable[[Optimizer, int], LRScheduler]


class KLWeights(NamedTuple):
    """Weights of the parts of the KL in the objective of `fit`: numbers, or functions of how far the fit is, 0 to 1.

    Below one the posterior is colder than Bayes' and the objective no bound. A site of the guide may have a weight of
    its own, `infer={"kl_weight": w}` and `infer={"length_weight": w}`; it is multiplied by the one here.

    Attributes:
        latents: Of latents outside the plate of the data that are no masks, such as the weights of a net.
        local: Of latents inside it that are no masks, such as codes. One that rises from zero,
            `linear(0, 1, warmup=0.3)`, keeps an autoencoder from giving up latents before it can use them.
        lengths: Of all masks, in the plate and outside, and under `NestedELBO` of the lengths of each `NestedNormal`.
            Above one the laws of lengths are held nearer to their prior.

    Example:
        >>> KLWeights(latents=0.02)
        KLWeights(latents=0.02, local=1.0, lengths=1.0)
    """

    latents: Schedule = 1.0
    local: Schedule = 1.0
    lengths: Schedule = 1.0


def linear(start: float, end: float, warmup: float = 1.0) -> Callable[[float], float]:
    r"""Go from `start` to `end` on a straight line, $a + (b - a) \min(t / w, 1)$, and stay there.

    Args:
        start: a, the value at t = 0.
        end: b, the value from t = w on.
        warmup: w, in (0, 1], a share of all steps.

    Returns:
        A schedule for `fit`.

    Raises:
        ValueError: If `start` or `end` is no finite number, or `warmup` not in (0, 1].

    Example:
        >>> weight = linear(0.0, 1.0, warmup=0.5)
        >>> [weight(t) for t in (0.0, 0.25, 0.5, 1.0)]
        [0.0, 0.5, 1.0, 1.0]
        >>> weight
        linear(0.0, 1.0, warmup=0.5)
    """
    return _Transition("linear", start, end, warmup)


def cosine(start: float, end: float, warmup: float = 1.0) -> Callable[[float], float]:
    r"""Go from `start` to `end` on half a cosine, level at both ends, and stay there.

    $$b + (a - b) \, \tfrac12 (1 + \cos(\pi \min(t / w, 1))).$$

    Arguments, result and errors are those of `linear`.

    Example:
        >>> temperature = cosine(1.0, 0.2)
        >>> [round(temperature(t), 3) for t in (0.0, 0.5, 1.0)]
        [1.0, 0.6, 0.2]
    """
    return _Transition("cosine", start, end, warmup)


@dataclass(frozen=True, repr=False)
class _Transition:
    """What `linear` and `cosine` return, by the name of the function: it can be compared, printed and pickled."""

    function: str
    start: float
    end: float
    warmup: float

    def __post_init__(self) -> None:
        for name, value in (("start", self.start), ("end", self.end)):
            if not is_within(value):
                raise ValueError(f"{self.function}: argument `{name}` must be a finite number; got {value!r}")
        if not is_within(self.warmup, 0, 1, above=0):
            raise ValueError(f"{self.function}: argument `warmup` must be in (0, 1]; got {self.warmup!r}")

    def __call__(self, t: float) -> float:
        done = min(t / self.warmup, 1.0)
        if self.function == "linear":
            return self.start + (self.end - self.start) * done
        return self.end + (self.start - self.end) * (1 + math.cos(math.pi * done)) / 2

    def __repr__(self) -> str:
        return f"{self.function}({self.start!r}, {self.end!r}, warmup={self.warmup!r})"


def cosine_to_zero(warmup: float = 0.05) -> LRSchedule:
    """Raise the learning rate on a line from a hundredth of its value, then lower it to zero on half a cosine.

    Args:
        warmup: Share of all steps in which it rises, in [0, 1).

    Returns:
        A learning-rate schedule for `fit`: a function of an optimiser and the number of all steps.

    Raises:
        ValueError: If `warmup` is not in [0, 1).

    Example:
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        >>> scheduler, rates = cosine_to_zero(warmup=0.25)(optimizer, 8), []
        >>> for _ in range(8):
        ...     rates += scheduler.get_last_lr(); optimizer.step(); scheduler.step()
        >>> [round(rate, 2) for rate in rates]
        [0.01, 0.51, 1.0, 0.93, 0.75, 0.5, 0.25, 0.07]
    """
    if not is_within(warmup, 0, 1) or warmup == 1:
        raise ValueError(f"cosine_to_zero: argument `warmup` must be in [0, 1); got {warmup!r}")

    def make(optimizer: Optimizer, total_steps: int) -> LRScheduler:
        rising = math.floor(warmup * total_steps)
        falling = CosineAnnealingLR(optimizer, T_max=total_steps - rising)
        if rising == 0:
            return falling
        return SequentialLR(optimizer, [LinearLR(optimizer, 0.01, total_iters=rising), falling], milestones=[rising])

    return make


@dataclass(frozen=True, repr=False)
class MaskSchedule:
    r"""Where masks and code lengths come from in training: the default cure against collapsed lengths.

    For each row of a batch, or for the whole batch where a net has one mask, the masks are

    - drawn from the learned law q with probability `learned`, and their KL is paid;
    - cut to a budget with probability `budget`: one fraction of the blocks, the same in all groups, drawn from `law`;
    - at full width with probability `full`.

    The lengths of a `NestedNormal` or an `OrderedMask` in the plate of the data, the codes of an autoencoder say, come
    from the same draws.

    Left alone, q puts its mass on the lengths that do best now, the others are no longer trained, and so they never do
    better. Here every width is trained as long as the fit lasts.

    Nets want other shares than the default's, which are for codes. In a benchmark masks from q made narrow nets worse
    and wide ones hardly better: `MaskSchedule(0, 0.9, 0.1, "log-uniform", num_particles=4, sliced=True)` has none.

    The objective is still an exact ELBO. Add to the model an indicator c with the three fixed probabilities above that
    says where the masks come from, and let the guide share its law. Then KL(q(c) || p(c)) = 0, given a budget or full
    width the law of the masks is the same in both, again at no cost, and

    $$\mathrm{ELBO} = E_c \, E_{q(z \mid c)} [\log p(x \mid z, w)]
      - P(c = \mathrm{learned}) \, \mathrm{KL}(q(z) \| p(z)) - \mathrm{KL}(q(w) \| p(w)),$$

    of which each step takes an unbiased estimate: the mean over `num_particles` evaluations, each with weights of its
    own. Their masks are a systematic sample: with the sources in order, masks from q first, then budgets from narrow to
    full, one uniform offset places all particles at equal distances in probability, so that one of several is narrow
    and another one wide, and the estimate has less variance than with masks drawn independently. In sliced passes a
    weight that is not kept follows its prior, and KL(q(w) || p(w)) counts it in the passes that keep it only.

    Args:
        learned: Share of masks from q.
        budget: Share of masks at a budget.
        full: Share of masks at full width. The three are >= 0 and sum to one.
        law: "uniform" over the numbers of blocks 1..K; "log-uniform", $P(k) \propto 1/k$, which favours narrow nets;
            or an `OrderedMask` over any number of units, read once, whose length k of K stands for the fraction k / K.
        num_particles: Evaluations of the ELBO in a step; one step takes as many times longer.
        anneal: Share of the fit in which the share of masks at full width falls on a line from one to `full`, so that
            the whole model is there before it is cut; in [0, 1].
        sliced: Whether budgets are drawn for the whole batch and only what is kept is computed. For nets with
            mask_per="example", too, whose budgets are otherwise drawn for each row; several particles then see to it
            that a step trains several widths, and a weight costs in proportion to the passes that keep it.
        temperature: Temperature, a number or a function of how far the fit is, of all straight-through masks of
            `AutoNested` and nested nets; None leaves theirs alone. The last one stays after the fit.

    Raises:
        ValueError: If the shares, the law, the number of particles, `anneal` or `temperature` are invalid.

    Example:
        >>> MaskSchedule().draw(num_blocks=4, shape=(1000,)).unique()  # 0 is a mask from q
        tensor([0.0000, 0.2500, 0.5000, 0.7500, 1.0000])
        >>> MaskSchedule(0, 1, 0, num_particles=4).draw(num_blocks=4)
        tensor([0.2500, 0.5000, 0.7500, 1.0000])
    """

    learned: float = 0.5
    budget: float = 0.4
    full: float = 0.1
    law: str | OrderedMask = "uniform"
    num_particles: int = 1
    anneal: float = 0.0
    sliced: bool = False
    temperature: Schedule | None = None

    def __post_init__(self) -> None:
        shares = (self.learned, self.budget, self.full)
        if not (all(is_within(share, 0, 1) for share in shares) and math.isclose(sum(shares), 1, abs_tol=1e-6)):
            raise ValueError(
                f"MaskSchedule: arguments `learned`, `budget` and `full` must be shares that sum to 1; got {shares}"
            )
        if isinstance(self.law, OrderedMask):
            if self.law.batch_shape:
                raise ValueError(
                    f"MaskSchedule: argument `law` must be a single law; got batch shape {tuple(self.law.batch_shape)}"
                )
        elif not isinstance(self.law, str) or self.law not in ("uniform", "log-uniform"):
            raise ValueError(
                f"MaskSchedule: argument `law` must be 'uniform', 'log-uniform' or an OrderedMask; got {self.law!r}"
            )
        if not is_integer(self.num_particles) or self.num_particles < 1:
            raise ValueError(
                f"MaskSchedule: argument `num_particles` must be an integer at least 1; got {self.num_particles!r}"
            )
        if not is_within(self.anneal, 0, 1):
            raise ValueError(f"MaskSchedule: argument `anneal` must be in [0, 1]; got {self.anneal!r}")
        if not (self.temperature is None or callable(self.temperature) or is_within(self.temperature, above=0)):
            raise ValueError(
                "MaskSchedule: argument `temperature` must be a number or a function of t, finite and > 0; got "
                f"{self.temperature!r}"
            )
        if not isinstance(self.sliced, bool | np.bool_):
            raise ValueError(f"MaskSchedule: argument `sliced` must be True or False; got {self.sliced!r}")

    def __repr__(self) -> str:
        shares = f"learned={self.learned:g}, budget={self.budget:g}, full={self.full:g}"
        changed = [
            f"{each.name}={getattr(self, each.name)!r}"
            for each in fields(self)[3:]
            if getattr(self, each.name) is not each.default and getattr(self, each.name) != each.default
        ]
        return f"MaskSchedule({', '.join([shares, *changed])})"

    @property
    def cuts(self) -> bool:
        """Whether some masks do not come from q."""
        return self.learned < 1 or self.anneal > 0

    def draw(self, num_blocks: int, shape: tuple[int, ...] = (), t: float = 1.0) -> Tensor:
        """Draw where masks come from, systematically over the particles and the rows.

        Args:
            num_blocks: K, blocks of a group of the net.
            shape: Shape of draws that go together, the rows of a batch say. Each has the law of the schedule; together
                they are a systematic sample in random order, so that a batch has of each source what is its share.
            t: Where the fit stands, from 0 to 1.

        Returns:
            Fractions of the blocks to keep, on the CPU, shape (num_particles,) + shape; 0 stands for a mask from q.
        """
        bounds, fractions = _bounds(self, num_blocks)
        if t < self.anneal:  # the shares of all but the last, the full width, are smaller
            bounds = bounds * (t / self.anneal)
        num_rows = math.prod(shape)
        # numpy, in which so little arithmetic takes less time than a single call of torch
        places = ((torch.randperm(num_rows).numpy() + torch.rand(()).item()) / num_rows).reshape(1, *shape)
        if self.num_particles > 1:
            places = np.add.outer(np.arange(self.num_particles), places[0]) / self.num_particles
        # Right of the bounds, so that what has no probability is never drawn; rounding may leave the last one below 1.
        return torch.from_numpy(fractions[np.searchsorted(bounds, places, side="right")])

    def _law(self, num_blocks: int) -> OrderedMask:
        if isinstance(self.law, OrderedMask):
            return self.law
        if self.law == "uniform":
            return OrderedMask.uniform(num_blocks)
        return OrderedMask(probs=1 / torch.arange(1.0, num_blocks + 1))


@dataclass(frozen=True)
class PriceSchedule:
    r"""Lengths of codes from random prices: what trains `posterior_lengths="priced"`, one law for every budget.

    Each row has a price $\lambda$ for a unit, log-uniform between two bounds, and its length is

    - drawn from the law that was learned, at that price, $q(L \mid x, \lambda) \propto p(L)^{1/T}
      \exp((v_L(x) - \lambda L) / T)$, where v are the values that its head predicts;
    - at full length with probability `full`, as long codes would be starved otherwise;
    - or uniform, with probability `explore` of the rest in the end, and one at first: what was never seen is not known.

    The head is trained by regression on what each row turned out to be worth at its length, which takes no further
    evaluation; see `ValueHead`. The objective is an exact ELBO. Add to the model the price, observed, with $p(L \mid
    \lambda) \propto p(L) e^{-\lambda L}$, and where the length comes from, as in `MaskSchedule`: the KL of the lengths
    from that law is paid. It has the price in it, so that the bound is that of the images together with the cost of
    their codes, and falls as prices rise. At temperature one, with the values known exactly, q is the best law of
    lengths; at a higher one it is flatter, so that neighbours of the best length are seen, too, and the bound is a
    bound still, but not the tightest. The law that is used afterwards has temperature one.

    Bounds and temperature are by default in proportion to the *spread* s of values: how many nats the best length is
    worth more than the worst, by the head, on average over the rows of a step. So they suit data of any size.

    Args:
        low: Lowest price, in nats a unit, > 0; s / 6,500 by default.
        high: Highest price, > `low`; s / 2.2 by default.
        full: Share of rows at full length.
        explore: Share of the others with a uniform length once `warmup` is over.
        temperature: T, > 0; s / 260 by default, but one at least.
        warmup: Share of the fit in which that share falls from one, on a line.

    Raises:
        ValueError: If an argument is invalid.

    Example:
        >>> schedule = PriceSchedule(full=0.25, explore=0.0)
        >>> (schedule.draw(num_blocks=4, shape=(1000,)) == 0).float().mean()  # from the learned law
        tensor(0.7500)
    """

    low: float | None = None
    high: float | None = None
    full: float = 0.3
    explore: float = 0.15
    temperature: float | None = None
    warmup: float = 0.15
    cuts: ClassVar[bool] = True
    num_particles: ClassVar[int] = 1
    sliced: ClassVar[bool] = False

    def __post_init__(self) -> None:
        low, high = (price if price is None or is_within(price) else math.nan for price in (self.low, self.high))
        bounds = 0.0 if low is None else low, math.inf if high is None else high
        if not 0 <= bounds[0] < bounds[1] or low == 0 or high == math.inf:
            raise ValueError(
                f"PriceSchedule: arguments `low` and `high` must be prices 0 < low < high; got {self.low!r}, "
                f"{self.high!r}"
            )
        for name in ("full", "explore", "warmup"):
            share = getattr(self, name)
            if not is_within(share, 0, 1):
                raise ValueError(f"PriceSchedule: argument `{name}` must be a share from 0 to 1; got {share!r}")
        hot = self.temperature
        if hot is not None and not is_within(hot, above=0):
            raise ValueError(f"PriceSchedule: argument `temperature` must be finite and > 0; got {hot!r}")

    @property
    def anneal(self) -> float:
        """Share of the fit in which shares change."""
        return self.warmup

    def draw(self, num_blocks: int, shape: tuple[int, ...] = (), t: float = 1.0) -> Tensor:
        """Draw where lengths come from, as `MaskSchedule.draw` does: 0 stands for the learned law at a price."""
        explore = self.explore
        if t < self.warmup:
            explore += (1 - explore) * (1 - t / self.warmup)
        priced, uniform = (1 - self.full) * (1 - explore), (1 - self.full) * explore
        return MaskSchedule(priced, uniform, self.full).draw(num_blocks, shape, t)

    def draw_prices(self, shape: tuple[int, ...], values: Tensor) -> tuple[Tensor, Tensor]:
        """Draw a price for each row, and return the temperature, too, given the values of rows, shape (..., K)."""
        spread = _spread(values) if None in (self.low, self.high, self.temperature) else values
        low = spread * LOWEST if self.low is None else values.new_tensor(self.low)
        high = spread * HIGHEST if self.high is None else values.new_tensor(self.high)
        hot = (spread * HOTTEST).clamp_min(1) if self.temperature is None else values.new_tensor(self.temperature)
        return low * (high.maximum(low) / low) ** torch.rand(shape).to(low), hot


def _spread(values: Tensor) -> Tensor:
    mean = values.detach().flatten(0, -2).mean(0)
    return (mean.max() - mean.min()).clamp_min(1)


@lru_cache(maxsize=16)
def _bounds(schedule: MaskSchedule, num_blocks: int) -> tuple[np.ndarray, np.ndarray]:
    """Return where the shares of masks from q and of those with 1 to K - 1 of K blocks end, and the K + 1 fractions."""
    law = schedule._law(num_blocks)
    shares = accumulate([schedule.learned, *(schedule.budget * p for p in law.probs.tolist())])
    return np.array([*shares][:-1]), np.arange(law.num_units + 1, dtype=np.float32) / law.num_units


def schedule_values(name: str, schedule: Schedule, num_steps: int, *, positive: bool = False) -> list[float]:
    """Evaluate a schedule at every step, at t = 0 in the first and t = 1 in the last one.

    All at once, so that a mistake shows before the fit and not in its last hour.

    Args:
        name: What the schedule is among the arguments of `fit`.
        schedule: A number, or a function of t.
        num_steps: Steps of the whole fit.
        positive: Whether zero is refused.

    Returns:
        One number a step.

    Raises:
        ValueError: If a value is no finite number >= 0, or > 0.
    """
    last = max(num_steps - 1, 1)
    function = schedule if callable(schedule) and not isinstance(schedule, type) else None
    if function is not None and not takes(function, 0.0):
        raise ValueError(f"fit: argument `{name}` must be a number or a function of t alone; got {function!r}")
    found: list[Any] = [schedule] if function is None else [function(step / last) for step in range(num_steps)]
    values = [float(value) if is_within(value) else math.nan for value in found]
    for step, value in enumerate(values):
        if not (0 <= value < math.inf) or (positive and value == 0):
            bound, when = "> 0" if positive else ">= 0", f" at t = {step / last:.3g}" if function else ""
            expected = "finite and" if is_number(found[step]) else "a number or a function of t, finite and"
            raise ValueError(f"fit: argument `{name}` must be {expected} {bound}; got {found[step]!r}{when}")
    return values if function else values * num_steps
