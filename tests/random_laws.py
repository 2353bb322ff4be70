"""Laws of lengths of every type, shape and size for Hypothesis to choose from, and how far from exact they may be.

What is allowed is rounding: a few steps of the type for each operation, the square root of their number for a sum, and
for a probability, which is the exponential of a rounded number, as many steps as that number is large.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import oracles
import torch
from cases import Case
from hypothesis import strategies as st
from torch import Tensor

HALF = [torch.bfloat16, torch.float16]
DTYPES = [torch.float64, torch.float32]
SHAPES = [(), (1,), (3,), (2, 2), (0,), (2, 0), (1, 2)]
MANY = 100_000  # numbers in a law at most, but for those in examples


@dataclass
class Lengths:
    """Parameters of a law of lengths, `logits` or `probs`, and what follows from them."""

    name: str
    values: Tensor

    def of(self, case: Case, **given: Any) -> Any:
        """A law of a case with these lengths."""
        shape, k = self.values.shape[:-1], self.values.shape[-1]
        rest = {name: x for name, x in case.arguments(shape, k, self.dtype).items() if name not in ("logits", "probs")}
        return case.of(**rest | {self.name: self.values} | given)

    @property
    def log_probs(self) -> np.ndarray:
        return oracles.log_probs_of(self.values, self.name == "logits")

    @property
    def probs(self) -> np.ndarray:
        return np.exp(self.log_probs)

    @property
    def dtype(self) -> torch.dtype:
        """What the law computes in."""
        return torch.float32 if self.values.dtype in HALF else self.values.dtype

    @property
    def rounding(self) -> float:
        """A few steps of the type, and those of a sum over all lengths."""
        return (8 + math.sqrt(self.values.shape[-1])) * torch.finfo(self.dtype).eps

    @property
    def steps(self) -> np.ndarray:
        """How many steps a log-probability is off: those of what it is the difference of."""
        log_probs, largest = self.log_probs, 0.0
        if self.name == "probs":
            with np.errstate(divide="ignore"):
                largest = np.abs(np.log(oracles.wide(self.values).max(-1, keepdims=True)))
        return 1 + np.where(log_probs == -np.inf, 0, np.abs(log_probs)) + largest

    @property
    def off(self) -> np.ndarray:
        """By how much a probability may be off."""
        return self.rounding * self.probs * self.steps

    @property
    def tiny(self) -> float:
        """What a sum may lack where some lengths are less probable than numbers are small."""
        return self.values.shape[-1] * torch.finfo(self.dtype).tiny


def number(name: str, dtype: torch.dtype) -> st.SearchStrategy[float]:
    """A logit or a weight, also an extreme one."""
    width: Any = {torch.float64: 64, torch.float32: 32}.get(dtype, 16)
    if name == "logits":
        return st.one_of(st.floats(-4, 4, width=width), st.floats(-1e4, 1e4, width=width))
    limits = torch.finfo(dtype)
    largest = {64: 1e300, 32: 2.0**120, 16: 2.0**15}[width]
    some = [0.0, 1.0, limits.tiny, limits.tiny * limits.eps]
    return st.one_of(
        st.floats(0, 1, width=width), st.floats(0, largest, width=width), st.sampled_from(some)
    )  # the last one is the smallest number there is


@st.composite
def lengths(
    draw: st.DrawFn,
    name: str | None = None,
    dtypes: list[torch.dtype] = DTYPES + HALF,
    shapes: list[tuple[int, ...]] = SHAPES,
    num_units: int | None = None,
    most: int = MANY,
) -> Lengths:
    """Lengths of a kind, type, batch shape and number of units, or of any."""
    name = draw(st.sampled_from(["logits", "probs"])) if name is None else name
    dtype, shape = draw(st.sampled_from(dtypes)), draw(st.sampled_from(shapes))
    sizes = [size for size in (40, 3000, MANY) if size <= most]
    if num_units is None:
        num_units = draw(st.one_of(st.integers(1, min(6, most)), *[st.sampled_from(sizes)] * bool(sizes)))
        num_units = min(num_units, MANY // max(1, math.prod(shape)))
    count = math.prod(shape) * num_units
    if count <= 30:
        found = draw(st.lists(number(name, dtype), min_size=count, max_size=count))
        values = torch.tensor(found, dtype=torch.float64)
    else:  # too many to choose: noise about a slope
        spread, slope = draw(st.sampled_from([0.0, 1.0, 50.0, 5e3])), draw(st.sampled_from([0.0, 5.0, -5.0, 5e3, -5e3]))
        generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
        noise = 2 * torch.rand(*shape, num_units, generator=generator, dtype=torch.float64) - 1
        values = spread * noise + slope * torch.linspace(-1, 1, num_units, dtype=torch.float64)
        values = values if name == "logits" else (values / 100).clamp(-100, 10 if dtype in HALF else 80).exp()
    values = values.reshape(*shape, num_units).to(dtype)
    if name == "probs":  # one length at least is possible
        values[..., -1] = torch.where((values > 0).any(-1), values[..., -1], 1)
    return Lengths(name, values)


def assert_near(got: Tensor, wanted: np.ndarray, allowed: np.ndarray | float) -> None:
    """Compare numbers, of which each may be off by what is allowed; infinities must be equal."""
    found = oracles.wide(got)
    assert found.shape == np.shape(wanted), (found.shape, np.shape(wanted))
    with np.errstate(invalid="ignore"):  # of inf - inf
        alike = (found == wanted) | (np.abs(found - wanted) <= np.where(np.isinf(wanted), 0, allowed))
    if not alike.all():
        where = np.unravel_index(np.argmin(alike), alike.shape)
        raise AssertionError(
            f"got {found[where]}, wanted {wanted[where]}, allowed {np.broadcast_to(allowed, alike.shape)[where]}, at "
            f"{tuple(map(int, where))} of {alike.shape}"
        )
