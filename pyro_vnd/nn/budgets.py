"""Widths of the groups of a nested net that fit a budget, of multiply-adds, parameters or time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from numbers import Real
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from pyro_vnd._data import Batch, Rows, check_repeatable, input_batches
from pyro_vnd._inputs import explain_inputs
from pyro_vnd._sizes import is_integer, is_one_of
from pyro_vnd._state import module_mode
from pyro_vnd.nn.cost import example_of, net_cost
from pyro_vnd.nn.model import NestedModel, taken_apart
from pyro_vnd.nn.narrow import narrow_to_blocks, recalibrated
from pyro_vnd.nn.net import NestedNet
from pyro_vnd.nn.net_likelihood import NetLikelihood

__all__ = ["Cost", "widths_for"]

Cost = Literal["macs", "parameters", "latency"]

_UNITS = {"macs": "multiply-adds", "parameters": "parameters", "latency": "microseconds"}
_STEPS = (0.25, 0.125, 0.0625, 0.0)  # of a group's blocks; the last is a single block
_PAIRS = 4  # exchanges that are tried, of those that promise most
_WARM_UP, _PASSES = 3, 20

Blocks = dict[str, int]


@torch.no_grad()
def widths_for(
    model: NestedModel | NestedNet,
    budget: float | int,
    cost: Cost = "macs",
    data: Rows | None = None,
    *,
    recalibrate: Rows | None = None,
    max_tries: int = 200,
    batch_size: int = 256,
) -> dict[str, int]:
    r"""Find widths of the groups of a nested net that fit a budget.

    Without data it is the largest fraction f that fits, the same for all groups, each rounded down to its blocks. With
    data these widths are where a search starts, greedy on the log-likelihood at the posterior mean,

    $$\max_w \frac1N \sum_n \log p(y_n \mid f_w(x_n)) \quad \text{with} \quad \mathrm{cost}(w) \le \mathrm{budget},$$

    which widens some groups and pays for it with others, in steps from a quarter of a group to a block. Only what fits
    and is better is taken, so that on these data the result is never worse than the fraction. A search chooses among
    many nets, and fits the rows it sees a little: give it validation data, and score the result on others.

    Every cost is that of the narrowed net itself: its parameters are counted, as are the multiply-adds of a pass, and
    the latency is measured, the least of several passes.

    Args:
        model: The trained nested net with its likelihood, or a nested net alone, whose outputs are logits of classes.
        budget: The most that it may cost: a share of the whole net's cost in (0, 1] as a float, or as an int the number
            of multiply-adds for a row, of parameters, or of microseconds of a pass.
        cost: "macs" (multiply-adds, as `net_cost` counts them), "parameters", or "latency".
        data: Validation data, inputs and what was observed, as of `evaluate_widths`. Costs are those of their first
            row, without them of the example that the net was nested with.
        recalibrate: Training inputs, for nets with BatchNorm: each candidate gets statistics of its own from them.
        max_tries: How many nets are scored on the data at most.
        batch_size: Rows of a batch, where data are tensors.

    Returns:
        Numbers of blocks by group: a width for `narrow`, `net.cut` and `evaluate_widths`.

    Raises:
        ValueError: If an argument is invalid, or the narrowest net costs more than the budget.

    Source: Yang et al., "NetAdapt", ECCV 2018 (greedy, on measured costs).

    Example:
        >>> from pyro_vnd.nn import narrow, nest
        >>> plain = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 3))
        >>> net = nest(plain, torch.zeros(1, 8), num_blocks=16)
        >>> widths_for(net, 0.25)
        {'0': 7, '2': 7}
        >>> net_cost(narrow(net, budget=0.25), torch.zeros(1, 8))
        {'multiply_adds': 658, 'parameters': 703}
    """
    net, likelihood, outputs_of = taken_apart("widths_for", model)
    _check(budget, cost, max_tries)
    check_repeatable("widths_for", data=data, recalibrate=recalibrate)
    with module_mode([net], training=False):
        search = _Search(net, likelihood, outputs_of, cost, data, recalibrate, batch_size)
        limit = float(budget) if is_integer(budget) else float(budget) * search.cost(search.whole)
        start = _uniform(search, limit, budget)
        return start if data is None else _refine(search, start, limit, max_tries)


def _check(budget: Any, cost: Any, max_tries: Any) -> None:
    is_share = isinstance(budget, Real) and not isinstance(budget, bool | int) and 0 < float(budget) <= 1
    if not (is_share or (is_integer(budget) and budget >= 1)):
        raise ValueError(
            "widths_for: argument `budget` must be a share of the whole net's cost in (0.0, 1.0] (a float), or a "
            f"number of {_UNITS.get(cost, 'its units')} (an int); got {budget!r}"
        )
    if not is_one_of(cost, get_args(Cost)):
        raise ValueError(f"widths_for: argument `cost` must be one of {', '.join(get_args(Cost))}; got {cost!r}")
    if not is_integer(max_tries) or max_tries < 1:
        raise ValueError(f"widths_for: argument `max_tries` must be an integer, at least 1; got {max_tries!r}")


class _Search:
    """What candidates cost and are worth, each found out once."""

    def __init__(
        self,
        net: NestedNet,
        likelihood: NetLikelihood,
        outputs_of: Callable[[Any], Tensor],
        cost: Cost,
        data: Rows | None,
        recalibrate: Rows | None,
        batch_size: int,
    ) -> None:
        self.net, self.likelihood, self.outputs_of, self.kind = net, likelihood, outputs_of, cost
        self.device = next(net.parameters()).device
        self.data, self.recalibrate, self.batch_size = data, recalibrate, batch_size
        self.whole = {name: width.num_blocks for name, width in net.widths.items()}
        self.least = {name: width.always_kept for name, width in net.widths.items()}
        self.inputs = self._inputs()
        self._costs: dict[tuple[int, ...], float] = {}
        self._values: dict[tuple[int, ...], float] = {}

    @property
    def tries(self) -> int:
        """How many nets were scored on data."""
        return len(self._values)

    def cost(self, blocks: Blocks) -> float:
        """Return the cost of the narrowed net."""
        key = tuple(blocks.values())
        if key not in self._costs:
            with self._explained(self.inputs.inputs):
                self._costs[key] = _cost(narrow_to_blocks(self.net, blocks), self.inputs, self.kind)
        return self._costs[key]

    def value(self, blocks: Blocks) -> float:
        """Return the mean log-likelihood of the rows at the posterior mean."""
        key = tuple(blocks.values())
        if key not in self._values:
            narrowed = narrow_to_blocks(self.net, blocks)
            if self.recalibrate is not None:
                recalibrated(narrowed, input_batches(self.recalibrate, self.batch_size, self.net.num_inputs))
            terms = [self._log_likelihood(narrowed, batch) for batch in self._batches()]
            self._values[key] = torch.cat(terms).mean().item()
        return self._values[key]

    def _batches(self) -> Iterator[Batch]:
        """Yield the batches of the data; a loader that shuffles leaves the caller's random state as it was."""
        with torch.random.fork_rng():
            for batch in () if self.data is None else input_batches(self.data, self.batch_size, self.net.num_inputs):
                batch.check("widths_for", self.net.num_inputs)
                yield batch

    def _log_likelihood(self, narrowed: nn.Module, batch: Batch) -> Tensor:
        if batch.y is None:
            raise ValueError("widths_for: argument `data` must have inputs and what was observed; got inputs only")
        batch = batch.to(self.device)
        with self._explained(batch.inputs):
            outputs = self.outputs_of(narrowed(*batch.args, **batch.kwargs))
        self.likelihood.check_outputs("widths_for", outputs, batch.num_rows)
        outputs = outputs.cpu().double()
        if bad := int((~outputs.isfinite()).flatten(1).any(1).sum()):
            raise ValueError(
                f"widths_for: outputs of the net have NaN or inf for {bad} of {batch.num_rows} rows of `data`: inputs "
                "must be finite"
            )
        y = self.likelihood.targets("widths_for", batch.y.cpu(), outputs)
        return self.likelihood.law(outputs).log_prob(y)

    def _explained(self, inputs: tuple[Any, ...]) -> AbstractContextManager[None]:
        return explain_inputs("widths_for", inputs, next(self.net.parameters()).dtype, self.net.input_shapes)

    def _inputs(self) -> Batch:
        """Return an example: the first row of the data, or that of the example that was nested."""
        if self.data is not None:
            for batch in self._batches():
                return batch.to(self.device).map_inputs(lambda x: x[:1])
            raise ValueError("widths_for: argument `data` has no rows")
        if self.kind == "parameters":
            return Batch((), {})
        if inputs := example_of(self.net):
            return Batch(inputs, {})
        raise ValueError(
            f"widths_for: argument `data` is needed for cost={self.kind!r}, as the net does not say what its inputs "
            "are like"
        )


def _cost(plain: nn.Module, inputs: Batch, kind: Cost) -> float:
    if kind == "parameters":
        return sum(parameter.numel() for parameter in plain.parameters())
    if kind == "macs":
        return net_cost(plain, *inputs.args, **inputs.kwargs)["multiply_adds"]
    return _latency(plain, inputs)


def _latency(plain: nn.Module, inputs: Batch) -> float:
    """Return the microseconds of a pass: the least of several, which other work on the machine does not lengthen."""

    def timed() -> float:
        start = time.perf_counter()
        plain(*inputs.args, **inputs.kwargs)
        for x in inputs.inputs[:1]:
            if x.device.type != "cpu":
                torch.accelerator.synchronize(x.device)
        return 1e6 * (time.perf_counter() - start)

    for _ in range(_WARM_UP):
        timed()
    return min(timed() for _ in range(_PASSES))


def _uniform(search: _Search, limit: float, budget: float | int) -> Blocks:
    """Return the widths of the largest fraction that fits."""
    fractions = sorted({k / total for total in search.whole.values() for k in range(1, total + 1)})
    candidates = [
        {name: width.kept_blocks(fraction, "down") for name, width in search.net.widths.items()}
        for fraction in fractions
    ]
    if search.cost(candidates[0]) > limit:
        least, whole = search.cost(candidates[0]), search.cost(search.whole)
        raise ValueError(
            f"widths_for: argument `budget` must be at least what the narrowest net costs, {least:,.0f} "
            f"{_UNITS[search.kind]} or {least / whole:.3g} of the whole net's {whole:,.0f}; got {budget!r}"
        )
    low, high = 0, len(candidates)  # the first fits, and what is not there does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if search.cost(candidates[middle]) <= limit else (low, middle)
    return candidates[low]


def _refine(search: _Search, start: Blocks, limit: float, max_tries: int) -> Blocks:
    """Exchange blocks between groups, as long as the log-likelihood gains by it."""
    best, tried = start, dict.fromkeys(start, 0)
    for share in _STEPS:
        steps = {name: max(1, round(share * total)) for name, total in search.whole.items()}
        if steps == tried:
            continue
        tried = steps
        while search.tries < max_tries:
            better = next(_improvements(search, best, steps, limit, max_tries), None)
            if better is None:
                break
            best = better
    return best


def _improvements(
    search: _Search, best: Blocks, steps: Mapping[str, int], limit: float, max_tries: int
) -> Iterator[Blocks]:
    """Yield widths that fit and are better, the most promising first.

    What a group gains by a step up, and loses by one down, is found for each by itself; an exchange promises the sum.
    """
    value, gains = search.value(best), {}
    for name, step in steps.items():
        for sign in (1, -1):
            moved = _moved(search, best, name, sign * step)
            if moved != best and search.tries < max_tries:
                gains[name, sign] = search.value(moved) - value
    ups = {name: gain for (name, sign), gain in gains.items() if sign > 0}
    downs = {name: gain for (name, sign), gain in gains.items() if sign < 0}
    single = [
        (gain, _moved(search, best, name, sign * steps[name])) for (name, sign), gain in gains.items() if gain > 0
    ]
    for _, moved in sorted(single, key=lambda each: -each[0]):
        if search.cost(moved) <= limit:
            yield moved
    pairs = sorted((-(ups[up] + downs[down]), up, down) for up in ups for down in downs if up != down)
    for _, up, down in [pair for pair in pairs if pair[0] < 0][:_PAIRS]:
        paid = _paid(search, _moved(search, best, up, steps[up]), down, steps[down], limit)
        if paid is not None and search.tries < max_tries and search.value(paid) > value:
            yield paid


def _moved(search: _Search, blocks: Blocks, name: str, by: int) -> Blocks:
    return blocks | {name: min(search.whole[name], max(search.least[name], blocks[name] + by))}


def _paid(search: _Search, blocks: Blocks, name: str, step: int, limit: float) -> Blocks | None:
    """Narrow a group until it fits; return None if it never does."""
    while search.cost(blocks) > limit:
        narrower = _moved(search, blocks, name, -step)
        if narrower == blocks:
            return None
        blocks = narrower
    return blocks
