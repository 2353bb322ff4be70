"""Nested nets against independent nets, ensembles and fixed rates: accuracy, calibration and detection by width.

Every method has the same architecture, data, epochs, batches, optimiser and learning-rate schedule:

- independent: one deterministic net for each width, trained by itself at that size;
- ensemble: five such nets for each width, which together cost as many multiply-adds as one net of that width;
- fixed_geometric, fixed_uniform: nested dropout with a fixed law of the kept fraction, deterministic weights, as it is
  usual: one pass a step, a width for each row;
- fixed_geometric_passes, fixed_uniform_passes: the same with ours' sliced passes, as many a step and sampled alike;
- fixed_geometric_bayes, fixed_uniform_bayes: these with ours' posterior and prior of the weights and KL weight, too;
- bayes_full: a mean-field Bayesian net, at full width only;
- vnd: ours; a step has `num_particles` passes, most of them narrow;
- vnd_probs_as_logits: ours, but masks are drawn as if probabilities were logits, an ablation.

Recipes are compared on the validation part, as in

    python -m benchmarks.nested_nets --part validation --first-seed 10 --set kl_weight=0.02 --json FILE

with other seeds and other foreign images than those of the final run, which alone scores the test part. Each fit is
kept in a file of its own as soon as it is done, so that a run that is interrupted goes on from there.
"""

import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import xarray as xr
from torch import Tensor

from benchmarks.nested_fits import (
    RECIPES,
    Data,
    Ensemble,
    Recipe,
    build,
    fit_nested,
    fit_plain,
    member_width,
    nested,
)
from benchmarks.recipes import kept_rows, read_arguments, write_rows
from benchmarks.record import rounded
from models.ood import Part
from pyro_vnd.diagnostics import evaluate, evaluate_learned, evaluate_widths, net_cost
from pyro_vnd.distributions import OrderedMask, OrderedMaskStraightThrough
from pyro_vnd.infer import FitResult, MaskSchedule
from pyro_vnd.nn import NestedNet, Width

RESULTS = Path(__file__).parent / "results" / "nested_nets.json"
PARTS = Path("results") / "nested_nets"
MEMBERS = 5
WIDTHS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1.0)
FIXED = tuple(f"fixed_{law}{kind}" for kind in ("", "_passes", "_bayes") for law in ("geometric", "uniform"))
METHODS = ("independent", "ensemble", *FIXED, "bayes_full", "vnd", "vnd_probs_as_logits")
SCALARS = (
    *("accuracy", "nll", "brier", "ece", "adaptive_ece", "entropy", "mutual_information"),
    *("temperature", "nll_calibrated", "ece_calibrated", "multiply_adds", "parameters"),
)


class ProbsAsLogits(OrderedMaskStraightThrough):
    """A mask drawn as the published code draws it: probabilities handed to a sampler that wants logits."""

    def rsample(self, sample_shape: torch.Size | list[int] | tuple[int, ...] = torch.Size()) -> Tensor:
        """Draw from softmax(p) rather than p, with Gumbel noise."""
        return OrderedMaskStraightThrough(self.temperature, logits=self.probs, noise="gumbel").rsample(sample_shape)


class ProbsAsLogitsWidth(Width):
    """A width whose masks are drawn that way; its law, and so its KL, stays right."""

    @property
    def posterior(self) -> OrderedMaskStraightThrough:
        """Posterior law of the mask."""
        return ProbsAsLogits(self.temperature, logits=self.logits)


def is_bayesian(method: str) -> bool:
    """Say whether a method has a posterior of weights."""
    return method.startswith(("bayes", "vnd")) or method.endswith("_bayes")


def widths_of(num_blocks: int) -> list[float]:
    """Return those of the widths that are numbers of blocks."""
    return [width for width in WIDTHS if (width * num_blocks).is_integer()]


def mask_schedule(method: str, recipe: Recipe) -> MaskSchedule:
    """Return where the masks of a nested method come from."""
    if method == "bayes_full":
        return MaskSchedule(learned=0, budget=0, full=1, sliced=recipe.sliced)
    if method.startswith("vnd"):
        return recipe.schedule(recipe.learned)
    law = OrderedMask.geometric(recipe.keep, recipe.num_blocks) if "geometric" in method else "uniform"
    if method in ("fixed_geometric", "fixed_uniform"):  # as it is usual
        return MaskSchedule(learned=0, budget=1, full=0, law=law)
    return MaskSchedule(0, 1, 0, law, recipe.num_particles, sliced=recipe.sliced)


def train(method: str, arch: str, seed: int, data: Data, recipe: Recipe, width: float = 1.0) -> tuple[Any, FitResult]:
    """Fit one method, and return the nested net, or the plain ones of the given width, and the record of the fit."""
    torch.manual_seed(seed)
    plain = build(arch, data.image_size, width)
    if method in ("independent", "ensemble"):
        others = [build(arch, data.image_size, width) for _ in range(MEMBERS - 1)]
        net = plain if method == "independent" else Ensemble([plain, *others])
        return net, fit_plain(net, seed, data, recipe)
    bayesian = is_bayesian(method)
    net = nested(plain, data, recipe, bayesian=bayesian)
    if method == "vnd_probs_as_logits":
        for group in net.widths.values():
            group.__class__ = ProbsAsLogitsWidth
    return net, fit_nested(net, seed, data, recipe, mask_schedule(method, recipe), bayesian=bayesian)


def rows(method: str, arch: str, seed: int, data: Data, recipe: Recipe) -> Iterator[dict[str, Any]]:
    """Fit a method and score it: one row a width and metric."""
    shared: dict[str, Any] = {
        "ood": data.ood,
        "calibrate": data.calibration,
        "seed": seed,
        "batch_size": 1000,
        "progress": sys.stderr.isatty(),
    }
    base = {"data": data.name, "arch": arch, "method": method, "seed": seed}

    def flat(result: xr.Dataset, width: float | str, seconds: float) -> Iterator[dict[str, Any]]:
        values = {name: result[name].item() for name in SCALARS if name in result} | {"fit_seconds": seconds}
        for metric in ("auroc", "aupr", "fpr95"):
            for score in result["score"].values:
                by_set = result[metric].sel(score=score)
                values[f"{metric}/{score}"] = by_set.mean().item()
                if metric == "auroc":
                    values |= {f"{metric}/{score}/{key}": by_set.sel(ood=key).item() for key in result["ood"].values}
        for metric, value in values.items():
            yield base | {"width": width, "metric": metric, "value": rounded(value)}

    if method in ("independent", "ensemble"):
        for width in widths_of(recipe.num_blocks):
            size = width if method == "independent" else member_width(arch, data.image_size, width, MEMBERS)
            if size is None:
                continue
            net, record = train(method, arch, seed, data, recipe, size)
            result = evaluate(net, data.scored, **shared)
            cost = net_cost(net, data.scored[0][:1])
            yield from flat(result.assign({name: ((), value) for name, value in cost.items()}), width, record.seconds)
        return
    net, record = train(method, arch, seed, data, recipe)
    assert isinstance(net, NestedNet)
    num_samples = recipe.num_samples if is_bayesian(method) else 1
    widths = [1.0] if method == "bayes_full" else widths_of(recipe.num_blocks)
    result = evaluate_widths(net, data.scored, widths, num_samples, **shared)
    for width in widths:
        yield from flat(result.sel(width=width), width, record.seconds)
    if method == "vnd":
        yield from flat(evaluate_learned(net, data.scored, num_samples, **shared), "learned", record.seconds)
        for name, law in net.laws.items():
            group = name.removesuffix(".mask")
            facts = {
                "mean_length": law.mean_length,
                "stddev_length": law.stddev_length,
                "entropy_length": law.entropy(),
            }
            for fact, value in facts.items():
                yield base | {"width": "learned", "metric": f"{fact}/{group}", "value": rounded(value.item())}


def run(
    name: str,
    archs: list[str],
    methods: list[str],
    seeds: range,
    recipes: dict[str, Recipe],
    part: Part = "test",
    join: bool = False,
) -> list[dict[str, Any]]:
    """Run what is not done yet, unless rows are only to be joined, and return all rows."""
    data = Data.load(name, part)
    folder = PARTS if part == "test" else PARTS / part
    result: list[dict[str, Any]] = []
    for arch in archs:
        for seed in seeds:
            for method in methods:
                recipe = recipes[arch]
                used = {field: value for field, value in asdict(recipe).items() if uses(method, field)}
                make = None if join else partial(rows, method, arch, seed, data, recipe)
                result += kept_rows(folder / f"{name}-{arch}-{method}-{seed}.json", used, make)
    return result


def uses(method: str, field: str) -> bool:
    """Say whether a method depends on a field of the recipe."""
    if field in ("epochs", "batch_size", "lr"):
        return True
    if method in ("independent", "ensemble"):
        return False
    if field == "num_blocks":
        return True
    if field == "keep":
        return method.startswith("fixed_geometric")
    if field in ("num_particles", "sliced"):
        return method.startswith("vnd") or method.endswith(("_passes", "_bayes"))
    if field in ("law_lr", "length_weight", "learned", "budget", "full", "budget_power"):
        return method.startswith("vnd")
    return is_bayesian(method)


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark and write its rows."""
    torch.set_flush_denormal(True)  # moments of weights that are long without a gradient
    choices = {"arch": tuple(RECIPES), "methods": METHODS}
    args = read_arguments("benchmarks.nested_nets", __doc__.partition("\n")[0], choices, Recipe, RESULTS, argv)
    recipes = {arch: replace(recipe, **args.changes) for arch, recipe in RECIPES.items()}
    result = run(args.data, args.arch, args.methods, args.seeds, recipes, args.part, args.join)
    write_rows(args, "benchmarks.nested_nets", result, {"recipe": {arch: asdict(recipes[arch]) for arch in args.arch}})


if __name__ == "__main__":
    main()
