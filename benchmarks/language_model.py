"""A nested language model against GPTs trained alone: perplexity by width, on the help texts of Python.

The net is `models.language.GPT`, nested as it is written: the residual stream, heads and feed-forward layers are cut
together. Every method has the same text, epochs, batches, optimiser and learning-rate schedule:

- independent: one plain GPT for each width, trained by itself at that size;
- fixed_uniform_passes: nested dropout, point weights and a uniform law of the kept share, with ours' sliced passes;
- fixed_log_uniform_passes: the same with ours' law of budgets;
- vnd: ours, with a posterior of the weights, scored by the mean over `num_samples` draws; vnd_mean: the same nets at
  the posterior mean, one pass.

Recipes are compared on the validation part, as in

    python -m benchmarks.language_model --part validation --first-seed 10 --set kl_weight=0.1 --json FILE

and the committed result is of the test part. Each fit is kept in a file of its own as soon as it is done.
"""

import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
import xarray as xr
from matplotlib.figure import Figure

from benchmarks.nested_fits import Data, Recipe, fit_nested, fit_plain, nested
from benchmarks.recipes import kept_rows, read_arguments, write_rows
from benchmarks.record import markdown_table, rounded
from benchmarks.tables import Rows
from models.language import GPT, NUM_SYMBOLS, split_text, topics
from models.ood import Part
from pyro_vnd.diagnostics import evaluate, evaluate_widths, net_cost
from pyro_vnd.infer import MaskSchedule
from pyro_vnd.nn import NestedModel, TokenLabels

RESULTS = Path(__file__).parent / "results" / "language_model.json"
PARTS = Path("results") / "language_model"
LABELS = {
    "vnd": "ours, mean over draws",
    "vnd_mean": "ours, posterior mean",
    "fixed_uniform_passes": "nested dropout, uniform",
    "fixed_log_uniform_passes": "nested dropout, ours' law",
    "independent": "trained alone",
}
TEXTS = {"topics": (), "compound": ("compound",)}  # all topics, or one of them, which is quick
METHODS = tuple(method for method in LABELS if method != "vnd_mean")  # which comes with ours
METRICS = ("perplexity", "accuracy", "ece")
COSTS = {"parameters": "parameters", "multiply_adds": "multiply-adds of a window"}


@dataclass(frozen=True)
class TextRecipe(Recipe):
    """What all methods share, and what only some of them have; `num_blocks` is the number of heads, too.

    Attributes:
        context: Symbols that the net sees.
        head_dim: Channels of a head.
        depth: Blocks of attention and feed-forward layers.
    """

    epochs: int = 10
    batch_size: int = 32
    num_blocks: int = 4
    learned: float = 0.0
    budget: float = 0.9
    full: float = 0.1
    budget_power: float = 1.0
    local_reparam: bool = False
    num_samples: int = 10
    context: int = 128
    head_dim: int = 16
    depth: int = 4

    @property
    def widths(self) -> list[float]:
        """All widths of the net."""
        return [blocks / self.num_blocks for blocks in range(1, self.num_blocks + 1)]

    def net(self, width: float = 1.0) -> GPT:
        """Return a plain net of a width."""
        heads = round(width * self.num_blocks)
        return GPT(NUM_SYMBOLS, self.context, self.head_dim * heads, self.depth, heads)


RECIPE = TextRecipe()


def load(name: str, recipe: TextRecipe, part: Part) -> tuple[Data, str]:
    """Return a text, and its checksum."""
    text = split_text(topics(*TEXTS[name]), recipe.context)
    scored = text.test if part == "test" else text.validation
    return Data(name, text.train, scored, None, {}, TokenLabels()), text.sha256


def rows(method: str, seed: int, data: Data, recipe: TextRecipe) -> Iterator[dict[str, Any]]:
    """Fit a method and score it: one row a width and metric."""
    shared: dict[str, Any] = {"seed": seed, "batch_size": 64, "progress": sys.stderr.isatty()}

    def flat(result: xr.Dataset, width: float, seconds: float, method: str = method) -> Iterator[dict[str, Any]]:
        base = {"data": data.name, "method": method, "width": width, "seed": seed}
        values = {name: result[name].item() for name in ("nll", *METRICS, *COSTS)} | {"fit_seconds": seconds}
        for metric, value in values.items():
            yield base | {"metric": metric, "value": rounded(value)}

    torch.manual_seed(seed)
    if method == "independent":
        for width in recipe.widths:
            plain = recipe.net(width)
            seconds = fit_plain(plain, seed, data, recipe).seconds
            result = evaluate(plain, data.scored, data.likelihood, **shared)
            cost = {name: ((), value) for name, value in net_cost(plain, data.scored[0][:1]).items()}
            yield from flat(result.assign(cost), width, seconds)
        return
    bayesian = method == "vnd"
    schedule = recipe.schedule(recipe.learned)
    if method == "fixed_uniform_passes":
        schedule = MaskSchedule(0, 1, 0, "uniform", recipe.num_particles, sliced=recipe.sliced)
    net = nested(recipe.net(), data, recipe, bayesian=bayesian)
    seconds = fit_nested(net, seed, data, recipe, schedule, bayesian=bayesian).seconds
    scored = {method: recipe.num_samples, "vnd_mean": None} if bayesian else {method: None}
    for name, num_samples in scored.items():
        result = evaluate_widths(NestedModel(net, data.likelihood), data.scored, recipe.widths, num_samples, **shared)
        for width in recipe.widths:
            yield from flat(result.sel(width=width), width, seconds, name)


def run(
    name: str, methods: list[str], seeds: range, recipe: TextRecipe, part: Part = "test", join: bool = False
) -> tuple[list[dict[str, Any]], str]:
    """Run what is not done yet, unless rows are only to be joined; return all rows, and the checksum of the text."""
    data, sha256 = load(name, recipe, part)
    folder = PARTS if part == "test" else PARTS / part
    result: list[dict[str, Any]] = []
    for seed in seeds:
        for method in methods:
            make = None if join else partial(rows, method, seed, data, recipe)
            used = asdict(recipe) | {"sha256": sha256}
            result += kept_rows(folder / f"{name}-{method}-{seed}.json", used, make)
    return result, sha256


def markdown(result: Mapping[str, Any]) -> str:
    """Format the tables of the page: each metric by width, and what a width costs."""
    found, cost = Rows(result, "data", "width", LABELS), sizes(result)
    tables = [found.table(found.fitted[0], metric, list(cost)) for metric in METRICS]
    heads = ["narrowed net", *(f"{width:g}" for width in cost)]
    body = [[name, *(f"{each[i]:,.0f}" for each in cost.values())] for i, name in enumerate(COSTS.values())]
    return "\n\n".join([*tables, markdown_table(heads, body)])


def sizes(result: Mapping[str, Any]) -> dict[float, list[float]]:
    """Return the costs of each width, which are those of a net trained alone at it."""
    rows = {(row["width"], row["metric"]): row["value"] for row in result["rows"] if row["metric"] in COSTS}
    return {width: [rows[width, metric] for metric in COSTS] for width in dict.fromkeys(width for width, _ in rows)}


def figures(result: Mapping[str, Any]) -> dict[str, Figure]:
    """Plot the perplexity against the parameters of a narrowed net."""
    parameters = {width: cost[0] for width, cost in sizes(result).items()}
    by_size = [row | {"parameters": parameters[row["width"]]} for row in result["rows"]]
    found = Rows({"rows": by_size}, "data", "parameters", LABELS)
    drawn, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    for method in found.methods:
        found.draw(ax, found.fitted[0], method, "perplexity", list(parameters.values()))
    ax.set_xscale("log", base=2)
    ax.set_xticks(list(parameters.values()), [f"{number / 1000:.0f} k" for number in parameters.values()])
    ax.minorticks_off()
    ax.set(xlabel="parameters", ylabel="perplexity of a symbol")
    ax.legend(frameon=False)
    return {"language_model": drawn}


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark and write its rows."""
    torch.set_flush_denormal(True)
    about = __doc__.partition("\n")[0]
    choices = {"methods": METHODS}
    args = read_arguments("benchmarks.language_model", about, choices, TextRecipe, RESULTS, argv, data=tuple(TEXTS))
    recipe = replace(RECIPE, **args.changes)
    result, sha256 = run(args.data, args.methods, args.seeds, recipe, args.part, args.join)
    write_rows(args, "benchmarks.language_model", result, {"recipe": asdict(recipe), "text_sha256": sha256})


if __name__ == "__main__":
    main()
