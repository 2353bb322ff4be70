"""What the learned law of a nested net is worth: the same net and fits, with more or fewer masks from the law.

Every row is the MLP of benchmarks.nested_nets with its prior, posterior, KL weights, optimiser and epochs; what differs
is where masks come from:

- share_0, share_05, share_50, share_100: that share of masks (in percent) from the learned law, the rest at budgets and
  at full width in the recipe's proportion; four sliced passes a step;
- default: `MaskSchedule()`, one pass a step, widths by row; default_0: the same without masks from the law;
- naive: no schedule, all masks from the law, one pass a step;
- share_50_frozen, naive_frozen: the same with a law that stays uniform, as it starts;
- paper: as published: one mask a batch, all from a law that starts near full width;
- alone: a Bayesian net of 6 of 16 blocks of both layers, never cut, which costs about what the law of `paper` picks.

    python -m benchmarks.net_law

Each fit is kept in a file of its own, as those of benchmarks.nested_nets are.
"""

import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.nested_fits import RECIPES, Data, Recipe, build, fit_nested, nested
from benchmarks.recipes import kept_rows, read_arguments, write_rows
from benchmarks.record import markdown_table, rounded
from benchmarks.tables import Rows
from models.ood import Part
from pyro_vnd.diagnostics import evaluate_learned, evaluate_widths
from pyro_vnd.infer import FitResult, MaskSchedule
from pyro_vnd.nn import NestedNet

RESULTS = Path(__file__).parent / "results" / "net_law.json"
PARTS = Path("results") / "net_law"
WIDTHS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
METRICS = {"accuracy": "accuracy", "nll": "NLL, nats", "ece": "ECE"}
LABELS = {
    "share_0": "no masks from q",
    "share_05": "5 % from q, the recipe",
    "share_50": "50 % from q",
    "share_50_frozen": "the same, q not learned",
    "share_100": "all from q, four passes",
    "default": "`MaskSchedule()`: 50 %, one pass",
    "default_0": "the same without q",
    "naive": "no schedule: all from q, one pass",
    "naive_frozen": "the same, q not learned",
    "paper": "as published: one mask a batch",
    "alone": "6 of 16 blocks, trained alone",
}
TRIES = {"priced": "Laws with a price", "path": "Widths by layer", "by_input": "Widths by input"}
RECIPE = replace(RECIPES["mlp"], epochs=6, num_samples=30)
ALONE = 6 / 16
START = 0.99  # rate of the geometric law that the published recipe starts from: P(L = K) = .99^15


def train(method: str, seed: int, data: Data, recipe: Recipe) -> tuple[NestedNet, FitResult]:
    """Fit the MLP with masks from where the method says."""
    torch.manual_seed(seed)
    if method.endswith("_frozen"):
        recipe = replace(recipe, law_lr=0.0)
    options: dict[str, Any] = {"mask_per": "batch", "width_init": START} if method == "paper" else {}
    net = nested(build("mlp", data.image_size, ALONE if method == "alone" else 1), data, recipe, **options)
    return net, fit_nested(net, seed, data, recipe, mask_schedule(method, recipe))


def mask_schedule(method: str, recipe: Recipe) -> MaskSchedule | None:
    """Return where the masks of a method come from; None for the learned law alone, one pass a step."""
    method = method.removesuffix("_frozen")
    if method in ("naive", "paper"):
        return None
    if method == "alone":
        return MaskSchedule(learned=0, budget=0, full=1, sliced=True)
    if method == "default":
        return MaskSchedule()
    if method == "default_0":
        return MaskSchedule(learned=0, budget=0.8, full=0.2)
    return recipe.schedule(int(method.removeprefix("share_")) / 100)


def rows(method: str, seed: int, data: Data, recipe: Recipe) -> Iterator[dict[str, Any]]:
    """Fit and score: one row a width and metric, then what was learned, by group."""
    net, record = train(method, seed, data, recipe)
    base = {"data": data.name, "arch": "mlp", "method": method, "seed": seed}
    shared: dict[str, Any] = {"seed": seed, "batch_size": 1000, "progress": sys.stderr.isatty()}
    if method == "alone":
        scored: dict[float | str, Any] = {"own": evaluate_widths(net, data.scored, [1.0], recipe.num_samples, **shared)}
        facts = {"cost": cost(16 * ALONE, 16 * ALONE, data.image_size)}
    else:
        result = evaluate_widths(net, data.scored, WIDTHS, recipe.num_samples, **shared)
        scored = {width: result.sel(width=width) for width in WIDTHS}
        scored["own"] = evaluate_learned(net, data.scored, recipe.num_samples, **shared)
        laws = list(net.laws.values())
        first, second = (law.mean_length.item() for law in laws)
        facts = {"cost": cost(first, second, data.image_size)}  # and its mean: they are independent
        for i, law in enumerate(laws, 1):
            facts |= {f"mean_length/{i}": law.mean_length.item(), f"stddev_length/{i}": law.stddev_length.item()}
    for width, scores in scored.items():
        for metric in METRICS:
            yield base | {"width": width, "metric": metric, "value": rounded(scores[metric].item())}
    for metric, value in (facts | {"fit_seconds": record.seconds}).items():
        yield base | {"width": "own", "metric": metric, "value": rounded(value)}


def cost(first: Any, second: Any, size: int) -> Any:
    """Return the multiply-adds of the MLP with so many of the 16 blocks of each layer, as a share of the whole's."""

    def multiply_adds(a: Any, b: Any) -> Any:
        return size**2 * a + a * b + 10 * b

    return multiply_adds(32 * first, 32 * second) / multiply_adds(512, 512)


def run(
    name: str, methods: list[str], seeds: range, recipe: Recipe, part: Part = "test", join: bool = False
) -> list[dict[str, Any]]:
    """Run what is not done yet, unless rows are only to be joined, and return all rows."""
    data = Data.load(name, part)
    folder = PARTS if part == "test" else PARTS / part
    result: list[dict[str, Any]] = []
    for seed in seeds:
        for method in methods:
            make = None if join else partial(rows, method, seed, data, recipe)
            result += kept_rows(folder / f"{name}-{method}-{seed}.json", asdict(recipe), make)
    return result


def markdown(result: Mapping[str, Any], tries: Mapping[str, Any]) -> str:
    """Format the tables: each metric by width and the learned laws; then the tries, by cost."""
    found = Rows(result, "arch", "width", LABELS)
    tables = ["## Where masks come from"]
    tables += [found.table("mlp", metric, [*WIDTHS, "own"]) for metric in METRICS]
    facts = [f"{fact}_length/{layer}" for layer in (1, 2) for fact in ("mean", "stddev")]
    body = [
        [
            LABELS[method],
            *(found.cell("mlp", method, "own", fact, digits=1) for fact in facts),
            found.cell("mlp", method, "own", "cost", digits=2),
        ]
        for method in found.methods
    ]
    heads = [f"{fact}, {layer} layer" for layer in ("first", "second") for fact in ("E[L]", "sd[L]")]
    tables.append(markdown_table(["own widths", *heads, "share of multiply-adds"], body))
    for name, label in TRIES.items():
        rows = [row for row in tries["rows"] if row["try"] == name]
        by_cost = Rows({"rows": rows}, "try", "cost", {row["method"]: row["method"] for row in rows})
        costs = list(dict.fromkeys(row["cost"] for row in rows))
        tables += [f"## {label}", *(by_cost.table(name, metric, costs, 4) for metric in ("nll", "accuracy"))]
    return "\n\n".join(tables)


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark and write its rows."""
    torch.set_flush_denormal(True)
    about = __doc__.partition("\n")[0]
    args = read_arguments("benchmarks.net_law", about, {"methods": tuple(LABELS)}, Recipe, RESULTS, argv)
    recipe = replace(RECIPE, **args.changes)
    result = run(args.data, args.methods, args.seeds, recipe, args.part, args.join)
    write_rows(args, "benchmarks.net_law", result, {"recipe": asdict(recipe)})


if __name__ == "__main__":
    main()
