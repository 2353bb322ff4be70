"""A nested net scored at many widths."""

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from tqdm.auto import tqdm

from pyro_vnd._data import Batch, Rows, check_repeatable, input_batches
from pyro_vnd._inputs import explain_inputs
from pyro_vnd._sizes import is_integer
from pyro_vnd._state import module_mode
from pyro_vnd.diagnostics.metrics.evaluation import evaluate, net_cost, scorer_of
from pyro_vnd.diagnostics.metrics.variables import stacked
from pyro_vnd.diagnostics.posterior import _arviz
from pyro_vnd.nn import NarrowDraws, NestedModel, NestedNet, NetDraws, NetLikelihood
from pyro_vnd.nn.model import taken_apart
from pyro_vnd.nn.width import Rounding

__all__ = ["evaluate_learned", "evaluate_widths", "loo_widths"]


def evaluate_widths(
    model: NestedModel | NestedNet,
    data: Rows,
    widths: Sequence[float] | Sequence[int] | Sequence[Mapping[str, float | int]],
    num_samples: int | None = 20,
    ood: Mapping[str, Rows] | None = None,
    *,
    draws: NetDraws | None = None,
    rounding: Rounding | None = None,
    calibrate: Rows | None = None,
    recalibrate: Rows | None = None,
    seed: int = 0,
    batch_size: int = 256,
    progress: bool = True,
) -> xr.Dataset:
    """Score a nested net at each of several widths, with the same draws of the weights for all of them.

    What is scored are the narrowed nets, one for each draw. Memory holds S of them at a time, and, if there are several
    widths, S sets of the whole weights, too: where these are too many, give `draws` that are not kept.

    Args:
        model: A trained nested net with its likelihood, or a nested net alone, whose outputs are logits of classes.
        data: Test data, as in `evaluate`.
        widths: Fractions in (0, 1] (floats), numbers of blocks (ints), or mappings from group to either, such as
            `widths_for` returns. Widths that are one and the same net are scored once.
        num_samples: Number of draws S of the weights, each of which costs a pass; None is one pass with their posterior
            mean.
        ood: Test data from outside the domain by name, as in `evaluate`.
        draws: Draws of the weights of the net, `net.draws(...)`, in place of new ones.
        rounding: As in `Width.kept_blocks`: without it, a fraction that is no number of blocks is an error.
        calibrate: Validation data, as in `evaluate`; each width gets a temperature of its own.
        recalibrate: Training inputs, for nets with BatchNorm: each draw at each width gets statistics of its own from
            them, as `recalibrate_batchnorm` does, instead of those of all widths together.
        seed: Seed of the draws, and the coordinate of the result: give each fit its own.
        batch_size: Rows of a batch, where data are tensors.
        progress: Whether to show a progress bar.

    Returns:
        The variables of `evaluate`, with dimensions (seed, width, ...), and `multiply_adds` of one pass for a row and
        `parameters` of the narrowed net (seed, width). The coordinate `width` is the fraction in effect, the same in
        all groups or else the kept share of all their units. Beside it, `blocks` has the numbers of blocks, (width,)
        or, if groups differ, (width, group), and `requested` what was asked for: "0.3, 0.26", say, where both are
        rounded to one width. Join fits by `xr.concat(datasets, "seed")`.

    Raises:
        ValueError: If a width is invalid or does not fit a group, in the words of `net.cut`, or fractions and numbers
            of blocks are mixed, if there are no draws, or as in `evaluate`.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from pyro_vnd.nn import nest
        >>> net = nest(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), torch.zeros(1, 4), num_blocks=4)
        >>> data = torch.randn(50, 4), torch.arange(50) % 3
        >>> result = evaluate_widths(net, data, [0.25, 0.5, 1.0], num_samples=3, progress=False)
        >>> result["nll"].dims, result["parameters"].values.tolist(), result["blocks"].values.tolist()
        (('seed', 'width'), [[19, 35, 67]], [1, 2, 4])
    """
    net, likelihood, outputs_of = taken_apart("evaluate_widths", model)
    distinct = _distinct("evaluate_widths", net, widths, rounding, (Mapping, Integral, Real))
    if num_samples is not None and (not is_integer(num_samples) or num_samples < 1):
        raise ValueError(f"evaluate_widths: `num_samples` must be at least 1; got {num_samples}")
    check_repeatable("evaluate_widths", data=data, ood=ood, calibrate=calibrate, recalibrate=recalibrate)
    device = next(net.parameters()).device
    example = _first_input("evaluate_widths", net, data, batch_size).to(device)
    results, costs = [], []
    with module_mode([net], training=False):
        drawn: Iterable[Mapping[str, Tensor] | None] = [None]
        if num_samples is not None or draws is not None:
            drawn = _draws("evaluate_widths", net, draws, num_samples, seed, keep=len(distinct) > 1)
        for _, blocks in tqdm(distinct, desc="widths", disable=not progress):
            narrowed = NarrowDraws(net, blocks, drawn, outputs_of, recalibrate=recalibrate, batch_size=batch_size)
            result = evaluate(
                narrowed,
                data,
                likelihood,
                ood=ood,
                calibrate=calibrate,
                seed=seed,
                batch_size=batch_size,
                device=device,
                progress=progress,
            )
            results.append(result)
            costs.append(net_cost(narrowed.net, *example.args, **example.kwargs))
    by_width = {name: (("seed", "width"), [[cost[name] for cost in costs]], about) for name, about in _LABELS.items()}
    return stacked(results, "width").assign(by_width).assign_coords(_coordinates(net, distinct))


def evaluate_learned(
    model: NestedModel | NestedNet,
    data: Rows,
    num_samples: int = 20,
    ood: Mapping[str, Rows] | None = None,
    *,
    draws: NetDraws | None = None,
    calibrate: Rows | None = None,
    seed: int = 0,
    batch_size: int = 256,
    progress: bool = True,
) -> xr.Dataset:
    """Score the predictive of a nested net that averages over the learned law of the widths, too.

    Weights are drawn once for all data, and memory holds S sets of them. Each comes with draws of the masks from their
    posterior, as the net has it: one for each row, or one for all of them.

    Args:
        model: A trained nested net with its likelihood, or a nested net alone, whose outputs are logits of classes.
        data: Test data, as in `evaluate`.
        num_samples: Number of draws S of weights and masks.
        ood: Test data from outside the domain by name, as in `evaluate`.
        draws: Draws of the net, `net.draws(...)`, in place of new ones.
        calibrate: Validation data, as in `evaluate`.
        seed: Seed of the draws, and the coordinate of the result.
        batch_size: Rows of a batch, where data are tensors.
        progress: Whether to show a progress bar.

    Returns:
        The variables of `evaluate`, with dimensions (seed, ...) and no width.

    Raises:
        ValueError: As in `evaluate`.
    """
    net, likelihood, outputs_of = taken_apart("evaluate_learned", model)
    with module_mode([net], training=False):
        return evaluate(
            _draws("evaluate_learned", net, draws, num_samples, seed, keep=True).picking(outputs_of),
            data,
            likelihood,
            ood=ood,
            calibrate=calibrate,
            seed=seed,
            batch_size=batch_size,
            device=next(net.parameters()).device,
            progress=progress,
        )


_LABELS = {
    "multiply_adds": {"long_name": "multiply-adds", "units": "per row"},
    "parameters": {"long_name": "parameters of the narrowed net", "units": "1"},
}


def _distinct(
    name: str,
    net: NestedNet,
    widths: Sequence[Any],
    rounding: Rounding | None,
    known: tuple[type, ...] = (Integral, Real),
) -> list[tuple[list[Any], dict[str, int]]]:
    """Return the widths that are one and the same net, with the blocks that it keeps of each group, for each net.

    All are looked at before hours go into some of them.
    """
    try:
        widths = list(widths)
    except TypeError:
        raise ValueError(f"{name}: `widths` must be several widths in a list; got {widths!r}") from None
    kinds = {next((kind for kind in known if isinstance(width, kind)), None) for width in widths}
    if len(kinds) != 1 or None in kinds:
        by_group = ", or mappings from group to these" if Mapping in known else ""
        raise ValueError(
            f"{name}: `widths` must be fractions (floats) or numbers of blocks (ints){by_group}; got {widths}"
        )
    whole = {group: width.num_blocks for group, width in net.widths.items()}
    distinct: list[tuple[list[Any], dict[str, int]]] = []
    for width in widths:
        blocks = whole | net.kept_blocks(width, rounding)
        if alike := [asked for asked, others in distinct if blocks == others]:
            alike[0].append(width)
        else:
            distinct.append(([width], blocks))
    return distinct


def _coordinates(net: NestedNet, distinct: Sequence[tuple[Sequence[Any], dict[str, int]]]) -> dict[str, Any]:
    """Say what the widths are: fractions in effect, numbers of blocks, and what was asked for."""
    kept = [blocks for _, blocks in distinct]
    blocks = np.array([list(each.values()) for each in kept])
    shares = [_share(net, each) for each in kept]
    alike = (blocks == blocks[:, :1]).all() and len({width.num_blocks for width in net.widths.values()}) == 1
    coords: dict[str, Any] = {"width": ("width", shares, {"units": "share of the units"})}
    coords |= {"requested": ("width", [", ".join(map(str, asked)) for asked, _ in distinct])}
    if alike:
        return coords | {"blocks": ("width", blocks[:, 0])}
    return coords | {"blocks": (("width", "group"), blocks), "group": list(net.widths)}


def _share(net: NestedNet, kept: Mapping[str, int]) -> float:
    """Return the fraction in effect: that of all groups, or else the share of their units together."""
    common = _common_fraction(net, kept)
    if common is not None:
        return common
    units = {name: width.kept_units(kept[name]) for name, width in net.widths.items()}
    return sum(units.values()) / sum(width.num_units for width in net.widths.values())


def _common_fraction(net: NestedNet, kept: Mapping[str, int]) -> float | None:
    fractions = {kept[name] / width.num_blocks for name, width in net.widths.items()}
    return fractions.pop() if len(fractions) == 1 else None


def _first_input(name: str, net: NestedNet, data: Rows, batch_size: int) -> Batch:
    """Return the first row of the inputs; a loader that shuffles leaves the caller's random state as it was."""
    with torch.random.fork_rng():
        for batch in input_batches(data, batch_size, net.num_inputs):
            batch.check(name, net.num_inputs)
            return batch.map_inputs(lambda x: x[:1])
    raise ValueError(f"{name}: `data` has no rows")


def _draws(
    name: str, net: NestedNet, draws: NetDraws | None, num_samples: int | None, seed: int, *, keep: bool
) -> NetDraws:
    """Return draws of a net that were given, or new ones."""
    if draws is None:
        if num_samples is None or not is_integer(num_samples) or num_samples < 1:
            raise ValueError(f"{name}: `num_samples` must be at least 1; got {num_samples}")
        return net.draws(num_samples, seed, keep=keep)
    if not isinstance(draws, NetDraws) or draws.net is not net:
        got = "those of another net" if isinstance(draws, NetDraws) else type(draws).__name__
        raise ValueError(f"{name}: argument `draws` must be draws of the net that is scored, net.draws(...); got {got}")
    return draws


@torch.no_grad()
def loo_widths(
    model: NestedModel | NestedNet,
    data: Rows,
    widths: Sequence[float] | Sequence[int],
    num_samples: int = 200,
    *,
    rounding: Rounding | None = None,
    seed: int = 0,
    batch_size: int = 256,
    progress: bool = True,
) -> dict[float, Any]:
    r"""Estimate how well a nested net predicts each row from all others, at each of several widths.

    Pareto-smoothed importance sampling, as `loo` without its correction for the guide: the draws of the weights are
    taken for those of the posterior. The correction would need weights $p(w, y) / q(w)$ of a whole net, whose k-hat
    is hopeless. A net that was trained with a smaller weight of the KL answers for that objective.

    Args:
        model: A trained nested net with its likelihood, or a nested net alone, whose outputs are logits of classes.
        data: The rows it was trained on, inputs and labels.
        widths: Fractions or numbers of blocks, as in `evaluate_widths`.
        num_samples: Number of draws S of the weights; memory holds S numbers a row, and nets as in `evaluate_widths`.
        rounding: As in `evaluate_widths`.
        seed: Seed of the draws, which are the same for all widths.
        batch_size: Rows of a batch, where data are tensors.
        progress: Whether to show a progress bar.

    Returns:
        What `loo` returns by width, for `compare` and `smallest_width`: by numbers of blocks if these were asked for,
        else by the fraction in effect, or, where groups round to different ones, by the first that was asked for. Each
        is a width for `narrow`, with the same rounding.

    Raises:
        ValueError: If a width is invalid or does not fit a group, in the words of `net.cut`, or there are too few draws
            or no labels.

    Warns:
        UserWarning: If a k-hat is too large for the estimate to be trusted.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from pyro_vnd.nn import nest
        >>> net = nest(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), torch.zeros(1, 4), num_blocks=4)
        >>> data = torch.randn(50, 4), torch.arange(50) % 3
        >>> scores = loo_widths(net, data, [0.25, 1.0], progress=False)
        >>> list(scores), scores[1.0].elpd_i.sizes["row"]
        ([0.25, 1.0], 50)
    """
    net, likelihood, outputs_of = taken_apart("loo_widths", model)
    distinct = _distinct("loo_widths", net, widths, rounding)
    check_repeatable("loo_widths", data=data)
    if not is_integer(num_samples) or num_samples < _arviz.MIN_DRAWS:
        raise ValueError(f"loo_widths: `num_samples` must be at least {_arviz.MIN_DRAWS}; got {num_samples}")
    device = next(net.parameters()).device
    scores: dict[float, Any] = {}
    with module_mode([net], training=False):
        draws = net.draws(num_samples, seed, keep=len(distinct) > 1)
        for (asked, *_), blocks in tqdm(distinct, desc="widths", disable=not progress):
            narrowed = NarrowDraws(net, blocks, draws, outputs_of)
            terms = [
                _log_likelihoods(narrowed, likelihood, batch, device)
                for batch in input_batches(data, batch_size, net.num_inputs)
            ]
            if not terms:
                raise ValueError("loo_widths: `data` has no rows")
            values = torch.cat(terms, -1)[None].numpy()
            found = _arviz.from_groups({"log_likelihood": {likelihood.site: (["chain", "draw", "row"], values)}}, {})
            common = None if isinstance(asked, Integral) else _common_fraction(net, blocks)
            scores[asked if common is None else common] = _arviz.loo(found)
    return scores


def _log_likelihoods(nets: NarrowDraws, likelihood: NetLikelihood, batch: Batch, device: torch.device) -> Tensor:
    """Return the log-likelihood of each row under each net, shape (S, N), on the CPU."""
    batch.check("loo_widths", nets.num_inputs)
    if batch.y is None:
        raise ValueError("loo_widths: argument `data` must have inputs and labels; got inputs only")
    batch = batch.to(device)
    with explain_inputs("loo_widths", batch.inputs, nets.dtype, nets.input_shapes):
        outputs = nets(*batch.args, **batch.kwargs).double().cpu()
    y = scorer_of(likelihood).targets("loo_widths", outputs, batch.y)
    return likelihood.law(outputs, batch_dim=2).log_prob(y)
