"""A nested net that is as wide as each image needs: accuracy, calibration and detection at equal multiply-adds.

The nets are those of `benchmarks.nested_nets`, method "vnd". Both ways of using one cost a single pass, with the
posterior mean of the weights:

- cascade: `CascadeNet` of widths that double from 1/16 on, whose thresholds are fitted without labels on the
  validation part, for each mean cost. Costs count all stages that an image went through;
- fixed: one width for all images, at the cost that the cascade had on the images that are scored. Between two widths
  the metrics are interpolated: for accuracy and NLL that is what a coin that chooses between the two scores.

The widths, and all else, were chosen on the validation part, half of which then fits thresholds and half is scored:

    python -m benchmarks.cascade --part validation --first-seed 10 --json FILE

Each fit is kept in a file of its own as soon as it is done, so that a run that is interrupted goes on from there.
"""

import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr

from benchmarks.nested_fits import RECIPES, Data, Recipe
from benchmarks.nested_nets import train, uses
from benchmarks.recipes import kept_rows, read_arguments, write_rows
from benchmarks.record import rounded
from pyro_vnd.diagnostics import evaluate_cascade, evaluate_widths
from pyro_vnd.nn import CascadeNet, NestedNet

RESULTS = Path(__file__).parent / "results" / "cascade.json"
PARTS = Path("results") / "cascade"
WIDTHS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
COSTS = (1 / 16, 1 / 8, 1 / 4, 1 / 2)
SCALARS = ("accuracy", "nll", "brier", "ece", "temperature", "nll_calibrated", "ece_calibrated", "multiply_adds")


def halves(data: Data) -> Data:
    """Fit thresholds on every other row, and score the rest, where the validation part is all there is."""
    if data.calibration is not None:
        return data
    x, y = data.scored
    return replace(data, scored=(x[1::2], y[1::2]), calibration=(x[::2], y[::2]))


def metrics(result: xr.Dataset, whole: int) -> dict[str, float]:
    """Return the metrics of one width or mean cost, by name; costs as shares of the whole net's."""
    values = {name: result[name].item() for name in SCALARS} | {
        f"auroc/{key}": result["auroc"].sel(score="entropy", ood=key).item() for key in result["ood"].values
    }
    values["auroc"] = result["auroc"].sel(score="entropy").mean().item()
    if "stage" in result.dims:
        values |= {f"share_of_rows/{k}": share for k, share in enumerate(result["share_of_rows"].values.flat)}
        values["ood_multiply_adds"] = result["ood_multiply_adds"].mean().item()
    return {name: value / whole if name.endswith("multiply_adds") else value for name, value in values.items()}


def rows(arch: str, seed: int, data: Data, recipe: Recipe) -> Iterator[dict[str, Any]]:
    """Fit a net and score it at fixed widths and as a cascade: one row a cost and metric."""
    net, record = train("vnd", arch, seed, data, recipe)
    assert isinstance(net, NestedNet)
    data = halves(data)
    assert data.calibration is not None
    shared: dict[str, Any] = {"calibrate": data.calibration, "batch_size": 1000, "progress": sys.stderr.isatty()}
    cascade = CascadeNet(net, WIDTHS)
    base = {"data": data.name, "arch": arch, "seed": seed}

    def flat(method: str, cost: float, values: dict[str, float]) -> Iterator[dict[str, Any]]:
        for metric, value in values.items():
            yield base | {"method": method, "cost": cost, "metric": metric, "value": rounded(value)}

    widths = evaluate_widths(net, data.scored, range(1, recipe.num_blocks + 1), None, data.ood, **shared)
    by_width = [metrics(widths.isel(width=k), cascade.whole_cost) for k in range(widths.sizes["width"])]
    by_cost = {name: np.array([values[name] for values in by_width]) for name in by_width[0]}
    for width in WIDTHS:
        yield from flat("stage", width, by_width[round(width * recipe.num_blocks) - 1])
    costs = [cost for cost in COSTS if cost * cascade.whole_cost >= cascade.multiply_adds[0]]
    result = evaluate_cascade(cascade, data.scored, data.calibration, costs, data.ood, **shared)
    spent = {1.0: 1.0}
    for cost in costs:
        values = metrics(result.sel(mean_cost=cost), cascade.whole_cost)
        yield from flat("cascade", cost, values)
        spent[cost] = values["multiply_adds"]  # on images that are not those of the fit
    for cost, share in spent.items():
        between = {name: np.interp(share, by_cost["multiply_adds"], values) for name, values in by_cost.items()}
        yield from flat("fixed", cost, between)
    yield from flat("fixed", 1.0, {"fit_seconds": record.seconds})


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark and write its rows."""
    torch.set_flush_denormal(True)  # moments of weights that are long without a gradient
    choices = {"arch": tuple(RECIPES)}
    args = read_arguments("benchmarks.cascade", __doc__.partition("\n")[0], choices, Recipe, RESULTS, argv)
    recipes = {arch: replace(RECIPES[arch], **args.changes) for arch in args.arch}
    data = Data.load(args.data, args.part)
    folder = PARTS if args.part == "test" else PARTS / args.part
    result: list[dict[str, Any]] = []
    for arch, recipe in recipes.items():
        used = {field: value for field, value in asdict(recipe).items() if uses("vnd", field)}
        for seed in args.seeds:
            make = None if args.join else partial(rows, arch, seed, data, recipe)
            result += kept_rows(folder / f"{args.data}-{arch}-{seed}.json", used, make)
    about = {"widths": WIDTHS, "recipe": {arch: asdict(recipe) for arch, recipe in recipes.items()}}
    write_rows(args, "benchmarks.cascade", result, about)


if __name__ == "__main__":
    main()
