"""Ways to draw and to score ordered masks, under one signature, and what they cost in time and memory."""

from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Categorical, Distribution

from benchmarks.record import rounded
from benchmarks.timing import interleaved_medians, peak_bytes
from pyro_vnd.distributions import OrderedMask, OrderedMaskStraightThrough, RelaxedOrderedMask

__all__ = ["DRAWS", "LABELS", "LOG_PROB_REFERENCE", "REFERENCE", "memory_rows", "timing_rows"]

Draw = Callable[[Tensor, torch.Size], Tensor]
Row = dict[str, Any]

TEMPERATURE = 0.2
REFERENCE, LOG_PROB_REFERENCE = "gumbel_softmax", "categorical"
LABELS = {
    "gumbel_softmax": "`F.gumbel_softmax(hard=True)`, tail sum by hand",
    "pyro_straight_through": "Pyro's `RelaxedOneHotCategoricalStraightThrough`",
    "categorical": "torch's `Categorical` on the lengths",
    "ordered_mask": "`OrderedMask`",
    "relaxed_ordered_mask": "`RelaxedOrderedMask`",
    "straight_through_gumbel": '`OrderedMaskStraightThrough`, `noise="gumbel"`',
    "straight_through_logistic": "`OrderedMaskStraightThrough`",
}


def tail_sum(one_hot: Tensor) -> Tensor:
    """Turn one-hot lengths into masks."""
    return one_hot.flip(-1).cumsum(-1).flip(-1)


def gumbel_softmax(scores: Tensor, sample_shape: torch.Size, temperature: float) -> Tensor:
    """Draw masks the way one writes it by hand; the scores should be log-probabilities."""
    if sample_shape:
        scores = scores.expand(sample_shape + scores.shape)
    return tail_sum(F.gumbel_softmax(scores, tau=temperature, hard=True))


_PYRO_TEMPERATURE = torch.tensor(TEMPERATURE)

# Each builds its law from the logits, as a training step does.
DRAWS: dict[str, Draw] = {
    "gumbel_softmax": lambda logits, shape: gumbel_softmax(logits.log_softmax(-1), shape, TEMPERATURE),
    "pyro_straight_through": lambda logits, shape: tail_sum(
        dist.RelaxedOneHotCategoricalStraightThrough(_PYRO_TEMPERATURE, logits=logits).rsample(shape)
    ),
    "ordered_mask": lambda logits, shape: OrderedMask(logits=logits).sample(shape),
    "relaxed_ordered_mask": lambda logits, shape: RelaxedOrderedMask(TEMPERATURE, logits=logits).rsample(shape),
    "straight_through_gumbel": lambda logits, shape: OrderedMaskStraightThrough(
        TEMPERATURE, logits=logits, noise="gumbel"
    ).rsample(shape),
    "straight_through_logistic": lambda logits, shape: OrderedMaskStraightThrough(TEMPERATURE, logits=logits).rsample(
        shape
    ),
}
WITHOUT_GRADIENT = ("ordered_mask",)
WITH_SHARED_LAW = ("gumbel_softmax", "straight_through_gumbel", "straight_through_logistic")

LAWS: dict[str, Callable[[Tensor], Distribution]] = {
    "categorical": lambda logits: Categorical(logits=logits),
    "pyro_straight_through": lambda logits: dist.RelaxedOneHotCategoricalStraightThrough(
        _PYRO_TEMPERATURE, logits=logits
    ),
    "ordered_mask": lambda logits: OrderedMask(logits=logits),
    "relaxed_ordered_mask": lambda logits: RelaxedOrderedMask(TEMPERATURE, logits=logits),
    "straight_through_logistic": lambda logits: OrderedMaskStraightThrough(TEMPERATURE, logits=logits),
}


def timing_rows(what: str, law: str, batch: int, units: int, *, seconds: float, min_rounds: int) -> list[Row]:
    """Time one operation of every method against the reference.

    Args:
        what: "draw", "draw_backward", "log_prob" (the law is built in the timed part) or "log_prob_prebuilt" (it was
            built and used before).
        law: "per_row", logits of shape (batch, units), or "shared", logits of shape (units,) for all rows.
        batch: Number of masks.
        units: Number of units, K.
        seconds: Time to spend, about.
        min_rounds: Rounds to run even if that takes longer.
    """
    logits, shape = _parameters(law, batch, units)
    if what.startswith("log_prob"):
        reference, functions = LOG_PROB_REFERENCE, _log_probs(logits, prebuilt=what == "log_prob_prebuilt")
    else:
        draws = _draws(law, with_gradient=what == "draw_backward")
        step = _draw_backward if what == "draw_backward" else _draw
        reference, functions = REFERENCE, {name: step(draw, logits, shape) for name, draw in draws.items()}
    medians = interleaved_medians(functions, seconds=seconds, min_rounds=min_rounds)
    rows: list[Row] = [
        {
            "what": what,
            "shape": [batch, units],
            "law": law,
            "method": name,
            "median_seconds": rounded(value),
            "ratio": rounded(value / medians[reference]),
        }
        for name, value in medians.items()
    ]
    if what == "draw_backward":
        for row in rows:
            row["finite"] = _is_finite(DRAWS[row["method"]], logits, shape)
    return rows


def memory_rows(law: str, batch: int, units: int) -> list[Row]:
    """Count the memory that a draw and its backward pass hold at their peak, the gradient included."""
    logits, shape = _parameters(law, batch, units)
    peaks = {}
    for name, draw in _draws(law, with_gradient=True).items():
        step = _draw_backward(draw, logits, shape)
        step()  # what is set up once does not count
        logits.grad = None
        peaks[name] = peak_bytes(step)
    mask_bytes = batch * units * logits.element_size()
    return [
        {
            "shape": [batch, units],
            "law": law,
            "method": name,
            "bytes": peak,
            "masks": rounded(peak / mask_bytes),
            "ratio": rounded(peak / peaks[REFERENCE]),
        }
        for name, peak in peaks.items()
    ]


def _parameters(law: str, batch: int, units: int) -> tuple[Tensor, torch.Size]:
    """Return the logits, a leaf as in a training step, and the sample shape."""
    per_row = law == "per_row"
    logits = torch.randn((batch, units) if per_row else (units,), dtype=torch.float32).requires_grad_()
    return logits, torch.Size([] if per_row else [batch])


def _draws(law: str, *, with_gradient: bool) -> dict[str, Draw]:
    return {
        name: draw
        for name, draw in DRAWS.items()
        if (law == "per_row" or name in WITH_SHARED_LAW) and not (with_gradient and name in WITHOUT_GRADIENT)
    }


def _draw(draw: Draw, logits: Tensor, shape: torch.Size) -> Callable[[], object]:
    return lambda: draw(logits, shape)


def _draw_backward(draw: Draw, logits: Tensor, shape: torch.Size) -> Callable[[], object]:
    mask_gradient = torch.randn(shape + logits.shape, dtype=logits.dtype)

    def step() -> None:
        logits.grad = None
        draw(logits, shape).backward(mask_gradient)

    return step


def _log_probs(logits: Tensor, *, prebuilt: bool) -> dict[str, Callable[[], object]]:
    with torch.no_grad():
        mask = OrderedMask(logits=logits).sample()
        values = dict.fromkeys(LAWS, mask)
        values["categorical"] = mask.sum(-1).long() - 1
        for name in ("pyro_straight_through", "relaxed_ordered_mask"):  # score the soft sample, so it must be theirs
            values[name] = LAWS[name](logits).rsample()

    def function(build: Callable[[Tensor], Distribution], value: Tensor) -> Callable[[], object]:
        if not prebuilt:
            return lambda: build(logits).log_prob(value)
        law = build(logits)
        law.log_prob(value)  # computes what laws compute once, on demand
        return lambda: law.log_prob(value)

    return {name: function(build, values[name]) for name, build in LAWS.items()}


def _is_finite(draw: Draw, logits: Tensor, shape: torch.Size) -> bool:
    """Tell whether masks and gradients are finite, at the given logits and at logits of +-100."""
    for value in (logits.detach(), logits.detach().sign() * 100):
        leaf = value.clone().requires_grad_()
        mask = draw(leaf, shape)
        mask.backward(torch.randn_like(mask))
        assert leaf.grad is not None
        if not (mask.isfinite().all() and leaf.grad.isfinite().all()):
            return False
    return True
