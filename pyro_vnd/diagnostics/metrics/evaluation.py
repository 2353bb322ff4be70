"""Predictions of a net scored on test data and on data from elsewhere, as an xarray Dataset."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn
from tqdm.auto import tqdm

from pyro_vnd._data import Rows, input_batches
from pyro_vnd._inputs import explain_inputs, not_finite
from pyro_vnd._state import module_mode
from pyro_vnd.diagnostics.metrics.calibration import NUM_BINS
from pyro_vnd.diagnostics.metrics.classification import BitScorer, ClassScorer, LevelScorer
from pyro_vnd.diagnostics.metrics.dense import PixelScorer, TokenScorer
from pyro_vnd.diagnostics.metrics.ood import ood_metrics
from pyro_vnd.diagnostics.metrics.regression import LEVELS, CountScorer, NumberScorer
from pyro_vnd.diagnostics.metrics.scorer import Columns, Scorer, join, named_variable
from pyro_vnd.nn import (
    BernoulliLabels,
    CategoricalLabels,
    NarrowDraws,
    NetDraws,
    NetLikelihood,
    NormalTargets,
    OrdinalLabels,
    PixelLabels,
    PoissonCounts,
    TokenLabels,
)
from pyro_vnd.nn.cost import net_cost
from pyro_vnd.nn.outputs import picked

__all__ = ["Predict", "evaluate", "net_cost", "scorer_of"]

Predict = Callable[..., Tensor]

_NUM_SCORE_BINS = 50
_SCORERS: Mapping[type[NetLikelihood], type[Scorer]] = {
    CategoricalLabels: ClassScorer,
    BernoulliLabels: BitScorer,
    OrdinalLabels: LevelScorer,
    NormalTargets: NumberScorer,
    PoissonCounts: CountScorer,
    PixelLabels: PixelScorer,
    TokenLabels: TokenScorer,
}


def scorer_of(likelihood: NetLikelihood) -> Scorer:
    """Return how predictions under a likelihood are scored: as those of its own class, or of the nearest base."""
    for kind in type(likelihood).__mro__:
        if kind in _SCORERS:
            return _SCORERS[kind](likelihood)
    raise ValueError(
        f"evaluate: `likelihood` must be one of {', '.join(kind.__name__ for kind in _SCORERS)}, or derived from it; "
        f"got {type(likelihood).__name__}: score its log-likelihoods by `to_arviz` and `loo`"
    )


def evaluate(
    predict: Predict,
    data: Rows,
    likelihood: NetLikelihood | None = None,
    *,
    ood: Mapping[str, Rows] | None = None,
    calibrate: Rows | None = None,
    seed: int = 0,
    batch_size: int = 256,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> xr.Dataset:
    """Score predictions by what is usual for their likelihood: how good, how sure, and how doubtful about foreign data.

    Draws are mixed, entry by entry (label, number, token or pixel), before anything is computed from them. Batches are
    reduced one by one, so that memory holds the S draws of the outputs of a single batch. Before each batch torch's
    random state is set to `seed`: the weights that `predict` draws are the same for all batches, sets and widths. Where
    it is `net.draws(S)`, which has its weights, this is done before each set only. The caller's random state is left as
    it was.

    | likelihood | metrics |
    |---|---|
    | `CategoricalLabels` | those of `classification_metrics` |
    | `BernoulliLabels` | the same, of all labels |
    | `OrdinalLabels` | the same, and `mae` of the predictive median, in levels |
    | `NormalTargets` | `rmse`, `nll`, `crps`, `coverage` (level) of central intervals |
    | `PoissonCounts` | `rmse`, `nll`, `deviance`, `coverage` (level) |
    | `TokenLabels` | `nll`, `perplexity`, `accuracy`, `brier`, `ece` |
    | `PixelLabels` | `miou`, `iou` (class), `nll`, `accuracy`, `brier`, `ece` |

    Of arrays of numbers, tokens and pixels `nll` is the mean over entries.

    Args:
        predict: Returns outputs of draws for a batch of inputs, shape (S, N, ...), as `net.draws(S)` does, or
            `net.draws(S).narrow(width)`. An `nn.Module` is one draw, whose outputs have the shape (N, ...), and is run
            in evaluation mode and then put back, as the net of draws is. Of classes, outputs of the shape (N, C) are
            one draw, too.
        data: Test data, inputs x and y: a pair (x, y), a mapping of the two, a `Dataset`, or an iterable of batches
            (x, y, ...) such as a `DataLoader`. In a mapping they are called "x" and "y", or are in this order. For nets
            of several inputs, or of inputs by name, that `evaluate_widths` is given, they are those of `NestedModel`.
        likelihood: Of y given the outputs; classes by default. With parameters of its own it is `model.likelihood`.
        ood: Test data from outside the domain, by name: as `data`, or inputs alone. Only these are used, and of labels
            of tokens and pixels which of them are to be ignored.
        calibrate: Validation data, as `data`, for labels: finds the temperature of the averaged probabilities that
            minimises their NLL, and adds `temperature` and, with it, `nll_calibrated`, `brier_calibrated`,
            `ece_calibrated` and, but for tokens and pixels, `adaptive_ece_calibrated`. Memory holds the averaged
            probabilities of all of its labels that count.
        seed: Seed of the draws, and the coordinate of the result: give each fit its own.
        batch_size: Rows of a batch, where data are tensors.
        device: Where batches go before `predict`. By default the device of a module, and nowhere else.
        progress: Whether to show a progress bar.

    Returns:
        A Dataset in which all variables have the dimension `seed`, so that `xr.concat(datasets, "seed")` joins fits:
        the metrics, with standard errors over rows, `nll_se` say, of those that are means; `entropy` and
        `mutual_information`, means over rows in nats (of numbers and counts those of a Normal with the mixture's
        variance); of labels `bin_count`, `bin_confidence` and `bin_accuracy` (seed, bin) for `plot_reliability`; with
        `ood` also `auroc`, `aupr` and `fpr95` (seed, ood, score) of `ood_metrics`, `prevalence` (seed, ood), and of
        labels histograms `score_count` (seed, source, score, score_bin) for `plot_ood`, whose bins divide 0 to
        `score_limit` (seed, score). Attributes: num_samples, num_rows, and of labels num_classes and num_bins.

    Raises:
        ValueError: If there are no rows or nothing observed, if outputs or y do not fit or have NaN, or if there is no
            temperature to calibrate.

    Example:
        >>> import torch
        >>> net = torch.nn.Linear(2, 3)
        >>> x, y = torch.randn(50, 2), torch.arange(50) % 3
        >>> result = evaluate(net, (x, y), ood={"far": 10 + torch.randn(20, 2)}, progress=False)
        >>> result["auroc"].dims, result.sizes["ood"], result["mutual_information"].item()
        (('seed', 'ood', 'score'), 1, 0.0)
        >>> numbers = evaluate(net, (x, torch.randn(50, 3)), NormalTargets(), progress=False)
        >>> numbers["rmse"].dims, numbers["coverage"].dims
        (('seed',), ('seed', 'level'))
    """
    if "test" in (ood or {}):
        raise ValueError("evaluate: `ood` has a set named 'test', which is the name of the test data; rename it")
    scorer = scorer_of(CategoricalLabels() if likelihood is None else likelihood)
    if calibrate is not None and not scorer.calibrates:
        raise ValueError(
            "evaluate: `calibrate` finds a temperature, for classes, bits, levels, tokens and pixels; got "
            f"{type(scorer.likelihood).__name__}: leave it out"
        )
    sets = ({} if calibrate is None else {"validation": calibrate}) | {"test": data}
    sets |= {f"foreign {name}": data for name, data in (ood or {}).items()}
    rows: dict[str, Columns] = {}
    num_samples = 0
    with tqdm(sets.items(), desc="evaluate", unit="set", disable=not progress, leave=False) as bar:
        for name, data in bar:
            bar.set_postfix_str(name)
            options: dict[str, Any] = {"seed": seed, "batch_size": batch_size, "device": device}
            observed = None if name.startswith("foreign ") else {"test": "data"}.get(name, "calibrate")
            try:
                rows[name], num_samples = _reduce(predict, scorer, data, observed, **options)
                if name == "validation":
                    scorer.calibrate(rows.pop(name))
            except (ValueError, RuntimeError) as error:
                error.add_note(f"evaluate: in the {name} data")
                raise

    test = rows["test"]
    variables = scorer.variables(test)
    if calibrate is not None:
        variables |= scorer.calibrated(test)
    coords: dict[str, Any] = {"seed": [seed]}
    sizes = {dim: size for each in variables.values() for dim, size in each.sizes.items()}
    known = {"bin": np.arange(NUM_BINS), "level": list(LEVELS), "class": np.arange(sizes.get("class", 0))}
    coords |= {dim: values for dim, values in known.items() if dim in sizes}
    if ood:
        variables |= _foreign(scorer, test, [rows[f"foreign {name}"] for name in ood])
        coords |= {"ood": list(ood), "score": list(scorer.scores)}
        if "score_count" in variables:
            centres = (np.arange(_NUM_SCORE_BINS) + 0.5) / _NUM_SCORE_BINS
            coords |= {"source": ["test", *ood], "score_bin": centres}
    return xr.Dataset(variables, coords, {"num_samples": num_samples} | scorer.attrs(test))


@torch.no_grad()
def _reduce(
    predict: Predict,
    scorer: Scorer,
    data: Rows,
    observed: str | None,
    *,
    seed: int,
    batch_size: int,
    device: torch.device | str | None,
) -> tuple[Columns, int]:
    """Reduce a data set batch by batch; say how many draws there were.

    Args:
        predict: As for `evaluate`.
        scorer: What reduces batches.
        data: As for `evaluate`.
        observed: The argument that the data are, if they must have something observed; None of foreign ones.
        seed: Torch's random state before each batch.
        batch_size: Rows of a batch, where data are tensors.
        device: Where batches go before `predict`.
    """
    parts: list[Columns] = []
    num_samples = 0
    modules = predict.nets if isinstance(predict, NetDraws | NarrowDraws) else [predict]
    own = next(modules[0].parameters(), None) if isinstance(modules[0], nn.Module) else None
    device = own.device if device is None and own is not None else device
    with torch.random.fork_rng(), module_mode(modules, training=False):
        num_inputs = getattr(predict, "num_inputs", 1)
        for given in input_batches(data, batch_size, num_inputs):
            given.check("evaluate", num_inputs)
            if not (parts and isinstance(predict, NetDraws | NarrowDraws)):
                torch.manual_seed(seed)
            batch = given.to(device)
            dtype, shapes = None if own is None else own.dtype, getattr(predict, "input_shapes", ())
            with explain_inputs("evaluate", batch.inputs, dtype, shapes):
                returned = predict(*batch.args, **batch.kwargs)
            outputs = scorer.with_draws(picked("evaluate", returned), isinstance(predict, nn.Module))
            if outputs.dim() < 2 or outputs.shape[1] != batch.num_rows or not len(outputs):
                raise ValueError(
                    f"evaluate: `predict` must return outputs of draws, shape (S, N, ...); got {tuple(outputs.shape)} "
                    f"for {batch.num_rows} rows"
                )
            if observed is not None and batch.y is None:
                raise ValueError(
                    f"evaluate: `{observed}` must give labels: a pair of tensors (x, y), or batches (x, y)"
                )
            try:
                y = None if observed is None else scorer.targets("evaluate", outputs, batch.y)
                if observed == "calibrate" and y is not None:
                    parts.append(scorer.validation(outputs, y))
                else:
                    parts.append(scorer.columns(outputs, y, hidden=batch.y))
            except ValueError as error:
                by_row = [x.reshape(len(x), -1) for x in batch.inputs if isinstance(x, Tensor) and x.dim()]
                bad_rows = [not_finite(x).any(1) for x in by_row if len(x) == batch.num_rows]
                if bad := int(torch.stack(bad_rows).any(0).sum()):
                    raise ValueError(
                        f"evaluate: inputs must be finite; {bad} of {batch.num_rows} rows have NaN or inf"
                    ) from error
                raise
            num_samples = len(outputs)
    if not parts:
        raise ValueError("evaluate: `data` has no rows")
    return join(parts), num_samples


def _foreign(scorer: Scorer, inside: Columns, outside: list[Columns]) -> dict[str, xr.Variable]:
    """Compare scores by set and kind: metrics of detection, and histograms of the scores that have a limit."""
    home, foreign = scorer.row_scores(inside), [scorer.row_scores(rows) for rows in outside]
    metrics = [[ood_metrics(home[score], scores[score]) for score in scorer.scores] for scores in foreign]
    variables = {
        name: named_variable(name, ("ood", "score"), [[cell[name] for cell in row] for row in metrics])
        for name in ("auroc", "aupr", "fpr95")
    }
    variables["prevalence"] = named_variable("prevalence", ("ood",), [row[0]["prevalence"] for row in metrics])
    limits = scorer.limits(inside)
    if not limits:
        return variables
    counts = [
        [scores[score].histc(_NUM_SCORE_BINS, 0, limits[score]).numpy() for score in scorer.scores]
        for scores in (home, *foreign)
    ]
    return variables | {
        "score_count": named_variable("score_count", ("source", "score", "score_bin"), counts),
        "score_limit": named_variable("score_limit", ("score",), [limits[score] for score in scorer.scores]),
    }
