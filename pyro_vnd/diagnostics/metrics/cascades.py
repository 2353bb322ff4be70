"""A cascade scored at several mean costs, beside fixed widths."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import xarray as xr
from tqdm.auto import tqdm

from pyro_vnd._data import Rows, check_repeatable, input_batches
from pyro_vnd.diagnostics.metrics.evaluation import evaluate
from pyro_vnd.diagnostics.metrics.variables import stacked
from pyro_vnd.nn import CascadeNet

__all__ = ["evaluate_cascade"]


def evaluate_cascade(
    cascade: CascadeNet,
    data: Rows,
    validation: Rows,
    mean_costs: Sequence[float] | Sequence[int],
    ood: Mapping[str, Rows] | None = None,
    *,
    calibrate: Rows | None = None,
    seed: int = 0,
    batch_size: int = 256,
    progress: bool = True,
) -> xr.Dataset:
    """Score a cascade at several mean costs, in the format of `evaluate_widths`.

    `plot_widths({"cascade": ..., "fixed": ...}, x="multiply_adds")` draws it beside fixed widths, of which
    `evaluate_widths(net, data, widths, num_samples=None)` has those that cost a single pass, as a cascade does.

    Args:
        cascade: The cascade. Its thresholds are afterwards as they were.
        data: Test data, as in `evaluate`.
        validation: Inputs on which thresholds are fitted, as in `CascadeNet.fit_thresholds`.
        mean_costs: Mean costs of a row, as there.
        ood: Test data from outside the domain by name, as in `evaluate`.
        calibrate: Validation data, as in `evaluate`; each mean cost gets a temperature of its own.
        seed: The coordinate of the result.
        batch_size: Rows of a batch, where data are tensors.
        progress: Whether to show a progress bar.

    Returns:
        The variables of `evaluate`, with dimensions (seed, mean_cost, ...); `multiply_adds`, the mean over the rows of
        the test data (seed, mean_cost), and with `ood` of theirs, `ood_multiply_adds` (seed, mean_cost, ood);
        `share_of_rows` of the test data that stop at each stage (seed, mean_cost, stage); `threshold` between stages
        (seed, mean_cost, boundary). The coordinate `mean_cost` is what was asked for.

    Raises:
        ValueError: If it is no cascade; or as in `CascadeNet.fit_thresholds` and `evaluate`.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from pyro_vnd.nn import CascadeNet, nest
        >>> net = nest(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), torch.zeros(1, 4), num_blocks=4)
        >>> data = torch.randn(50, 4), torch.arange(50) % 3
        >>> cascade = CascadeNet(net, [0.25, 1.0])
        >>> result = evaluate_cascade(cascade, data, torch.randn(50, 4), [0.5, 0.75], progress=False)
        >>> result["nll"].dims, result["multiply_adds"].dims
        (('seed', 'mean_cost'), ('seed', 'mean_cost'))
    """
    if not isinstance(cascade, CascadeNet):
        raise ValueError(
            f"evaluate_cascade: argument `cascade` must be a CascadeNet; got {type(cascade).__name__}: make one, "
            "CascadeNet(net, widths)"
        )
    check_repeatable("evaluate_cascade", data=data, validation=validation, ood=ood, calibrate=calibrate)
    if not len(mean_costs):
        raise ValueError("evaluate_cascade: argument `mean_costs` must have one mean cost at least; got none")
    before, results = (cascade.mean_cost, cascade.thresholds.clone()), []
    try:
        for mean_cost in tqdm(list(mean_costs), desc="mean costs", disable=not progress):
            cascade.fit_thresholds(validation, mean_cost, batch_size=batch_size)
            result = evaluate(
                cascade, data, ood=ood, calibrate=calibrate, seed=seed, batch_size=batch_size, progress=progress
            )
            results.append(result.assign(_costs(cascade, data, ood or {}, batch_size)))
    finally:
        cascade.mean_cost = before[0]
        cascade.thresholds.copy_(before[1])
    about = {"long_name": "mean cost", "units": "multiply-adds, or share of the whole net's"}
    return stacked(results, "mean_cost").assign_coords(mean_cost=("mean_cost", list(mean_costs), about))


def _costs(cascade: CascadeNet, data: Rows, ood: Mapping[str, Rows], batch_size: int) -> dict[str, xr.Variable]:
    """Say where rows stop, and what that costs."""
    cost = {"long_name": "multiply-adds", "units": "per row"}
    threshold = {"long_name": f"threshold of the {cascade.doubt.replace('_', ' ')}", "units": "nats"}
    shares = _share_of_rows(cascade, data, batch_size)
    variables = {
        "multiply_adds": xr.Variable("seed", [shares @ cascade.costs.numpy()], cost),
        "share_of_rows": xr.Variable(("seed", "stage"), [shares], {"long_name": "share of rows", "units": "1"}),
        "threshold": xr.Variable(("seed", "boundary"), [cascade.thresholds.cpu().numpy()], threshold),
    }
    if ood:
        spent = [_share_of_rows(cascade, rows, batch_size) @ cascade.costs.numpy() for rows in ood.values()]
        variables["ood_multiply_adds"] = xr.Variable(("seed", "ood"), [spent], cost)
    return variables


def _share_of_rows(cascade: CascadeNet, data: Rows, batch_size: int) -> np.ndarray:
    """Return the share of rows that stop at each stage."""
    device = cascade.thresholds.device
    stages = torch.cat(
        [
            cascade.run(*batch.args, **batch.kwargs).stage.cpu()
            for batch in (each.to(device) for each in input_batches(data, batch_size, cascade.num_inputs))
        ]
    )
    return np.bincount(stages, minlength=len(cascade.stages)) / len(stages)
