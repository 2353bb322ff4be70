"""What is found out at the end of a fit: the law of lengths from all data, and whether the guide fits the posterior."""

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from pyro.ops.stats import fit_generalized_pareto
from torch import Tensor

from pyro_vnd._data import Data, as_arguments, num_rows
from pyro_vnd._state import cuda_devices, module_mode
from pyro_vnd.infer._conditional.evaluation import Evaluation, evaluate
from pyro_vnd.infer._conditional.guide import AutoConditional
from pyro_vnd.infer._fit.handlers import ScaleToDataset
from pyro_vnd.infer._fit.mask_sources import conditional_laws
from pyro_vnd.infer._fit.objective import Objective
from pyro_vnd.infer._fit.sources import Source
from pyro_vnd.infer.elbo import conditional_part
from pyro_vnd.infer.result import FitResult

__all__ = ["estimate_khat", "finish", "settle_laws"]

_NUM_DRAWS = 256
_ROUND = 16
_ACCURATE = 0.005  # nats of standard error
_SECONDS = 1.0  # for draws of a guide one by one


def finish(
    result: FitResult,
    objective: Objective,
    source: Source,
    scale: Callable[[int], ScaleToDataset],
    *,
    khat: bool,
) -> None:
    """Settle the laws of lengths that have a closed form, and say how far the guide is from the posterior.

    The random numbers that this takes are given back.

    Args:
        result: What is known of the fit, to which it is added.
        objective: The objective, with model and guide.
        source: The data.
        scale: Makes the handler that scales a number of rows to the data.
        khat: Whether to estimate k-hat.
    """
    model, guide, record = objective.module.model, objective.module.guide, objective.record
    conditional, ratios = conditional_part(guide), None
    with torch.random.fork_rng(cuda_devices([model, guide])):
        # Another objective may sum out what a draw is needed of here: its running mean is kept.
        if conditional is not None and objective.keeps_parts and source.can_repeat:
            ratios = settle_laws(conditional, model, source, scale)
            objective.agree()
            result.describe_laws(conditional_laws(guide), record.visible)
        if (
            khat
            and ratios is None
            and (conditional is None or conditional.plan.separate)
            and source.batch_size == source.num_data
            and source.whole is not None
            and isinstance(guide, AutoGuide)
        ):
            plate = scale(source.batch_size).plate
            ratios = None if _is_by_row(guide, plate) else _draw_ratios(guide, model, source.first(), result.seconds)
        if khat and ratios is not None:
            result.khat = estimate_khat(ratios)


@torch.no_grad()
def settle_laws(
    guide: AutoConditional, model: Any, source: Source, scale: Callable[[int], ScaleToDataset]
) -> Tensor | None:
    """Give a guide the laws of lengths that are best for its other latents, from all rows and many draws.

    Args:
        guide: The guide.
        model: The model.
        source: The data.
        scale: Makes the handler that scales a number of rows to the data.

    Returns:
        Logarithms of importance weights of draws of the guide, or None if there are none to be had in passing.
    """
    shared: list[Any] = []
    rows: list[Any] = []
    weights: list[Tensor] = []
    with module_mode([guide, model], training=False):
        for _ in range(_NUM_DRAWS // _ROUND):
            found = [(num_rows(batch), _evaluate(guide, model, batch, scale)) for batch in source.in_order()]
            total = sum(n for n, _ in found)
            shared.append(sum(n / total * each.logits for n, each in found))
            if guide.plan.by_row:
                by_row: list[Any] = [each.logits_by_row for _, each in found]
                rows.append(sum(n / total * logits for (n, _), logits in zip(found, by_row, strict=True)))
            weights.append(found[0][1].log_weights)
            if len(shared) >= 4:
                accurate = _is_accurate(shared) and (not rows or _is_accurate(rows))
                if source.ranks.all(accurate):  # as processes may have rows of their own
                    break
    mean: Any = torch.stack(shared).mean(0)
    if guide.plan.separate:  # each is the best for the others as they are: they go there together, step by step
        for logits in shared:
            guide.learn(logits, None)
        return None
    guide.learn(mean, torch.stack(rows).mean(0) if rows else None, share=1.0)
    if len(found) > 1 or guide.plan.by_row or any(block.rows for block in guide.plan.blocks):
        return None  # for latents by row, whose number grows with the data, the weights of all together say little
    return _ratios(mean, guide.logits, torch.cat(weights))


def _evaluate(guide: AutoConditional, model: Any, batch: Data, scale: Callable[[int], ScaleToDataset]) -> Evaluation:
    args, kwargs = as_arguments(batch)
    with scale(num_rows(batch)):
        return evaluate(guide, model, args, kwargs, _ROUND, release=True)


def _is_accurate(rounds: Any) -> bool:
    """Say whether the means of rounds are accurate, each length counting by its probability."""
    stacked = torch.stack(rounds)
    law = stacked.mean(0).softmax(-1)
    stacked = stacked - (law * stacked).sum(-1, keepdim=True)
    error = stacked.std(0) / math.sqrt(len(rounds))
    return bool(((law * error).sum(-1) < _ACCURATE).all())


def _ratios(logits: Tensor, log_q: Tensor, log_weights: Tensor) -> Tensor:
    """Return log p - log q of draws, each of a length of its own, which is a systematic sample of their law."""
    places = (torch.arange(len(log_weights), device=log_q.device) + 0.5) / len(log_weights)
    length = torch.searchsorted(log_q.exp().cumsum(0)[:-1].contiguous(), places)
    length = length[torch.randperm(len(length))]
    of_length = logits - log_weights.mean(0) - log_q  # what the lengths add
    return log_weights.gather(1, length.unsqueeze(1)).squeeze(1) + of_length[length]


def estimate_khat(log_ratios: Tensor) -> float:
    """Return k-hat of importance weights, given their logarithms; at most zero where none is twice the average."""
    log_ratios = log_ratios.double()
    log_ratios = log_ratios - log_ratios.logsumexp(0) + math.log(len(log_ratios))
    if not torch.isfinite(log_ratios).all():
        return math.inf
    num_tail = min(len(log_ratios) // 5, int(3 * len(log_ratios) ** 0.5))
    ordered = log_ratios.sort().values.exp()
    tail = ordered[-num_tail:] - ordered[-num_tail - 1]
    if ordered[-1] < 2 or tail[0] <= 0:
        return 0.0
    khat, _ = fit_generalized_pareto(tail)
    return float(khat)


def _is_by_row(guide: AutoGuide, plate: str) -> bool:
    prototype: Any = guide.prototype_trace
    sites = [site for _, site in prototype.iter_stochastic_nodes()]
    return any(frame.name == plate for site in sites for frame in site["cond_indep_stack"])


@torch.no_grad()
def _draw_ratios(guide: Any, model: Any, data: Data, seconds: float) -> Tensor | None:
    """Return log p - log q of draws one by one, or None if a second, or a tenth of the fit, is not enough for 100."""
    args, kwargs = as_arguments(data)
    ratios, end = [], time.perf_counter() + max(_SECONDS, seconds / 10)
    with module_mode([guide, model], training=False):
        for i in range(_NUM_DRAWS):
            drawn = poutine.trace(guide).get_trace(*args, **kwargs)
            trace = poutine.trace(poutine.replay(model, trace=drawn)).get_trace(*args, **kwargs)
            free = [name for name, _ in trace.iter_stochastic_nodes() if name not in drawn.nodes]
            trace.compute_log_prob(lambda name, _, free=tuple(free): name not in free)
            log_p: Any = sum(site.get("log_prob_sum", 0) for site in trace.nodes.values())
            ratios.append(torch.as_tensor(log_p - drawn.log_prob_sum()))
            if time.perf_counter() > end:
                return torch.stack(ratios) if i >= 99 else None
    return torch.stack(ratios)
