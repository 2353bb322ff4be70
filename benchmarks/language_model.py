"""A nested language model against GPTs trained alone: perplexity by width and by depth, on the help texts of Python.

The net is `models.language.GPT`, nested as it is written. Cut by "width", the residual stream, heads and feed-forward
layers keep a share of their units; cut by "depth", the net keeps the first of its blocks, whole. Every method has the
same text, epochs, batches, optimiser and learning-rate schedule:

- independent: one plain GPT for each width or depth, trained by itself at that size;
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
from pyro_vnd.nn import NestedModel, TokenLabels, nest

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
CUTS = ("width", "depth")
DEPTH = "blocks.depth"  # the group of the blocks
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

    epochs: int = 5
    batch_size: int = 8
    num_blocks: int = 4
    learned: float = 0.0
    budget: float = 0.9
    full: float = 0.1
    budget_power: float = 1.0
    init_scale: float = 0.02
    local_reparam: bool = False
    num_samples: int = 10
    context: int = 128
    head_dim: int = 16
    depth: int = 4

    def shares(self, cut: str) -> list[float]:
        """Return the shares that a net can keep of its units, or of its blocks."""
        whole = self.num_blocks if cut == "width" else self.depth
        return [kept / whole for kept in range(1, whole + 1)]

    def net(self, width: float = 1.0, depth: float = 1.0) -> GPT:
        """Return a plain net that has shares of the units and blocks."""
        heads = round(width * self.num_blocks)
        return GPT(NUM_SYMBOLS, self.context, self.head_dim * heads, round(depth * self.depth), heads)


RECIPE = TextRecipe()


def load(name: str, recipe: TextRecipe, part: Part) -> tuple[Data, str]:
    """Return a text, and its checksum."""
    text = split_text(topics(*TEXTS[name]), recipe.context)
    scored = text.test if part == "test" else text.validation
    return Data(name, text.train, scored, None, {}, TokenLabels()), text.sha256


def rows(method: str, cut: str, seed: int, data: Data, recipe: TextRecipe) -> Iterator[dict[str, Any]]:
    """Fit a method and score it: one row a kept share and metric."""
    shared: dict[str, Any] = {"seed": seed, "batch_size": 64, "progress": sys.stderr.isatty()}
    shares = recipe.shares(cut)

    def flat(result: xr.Dataset, kept: float, seconds: float, method: str = method) -> Iterator[dict[str, Any]]:
        base = {"data": data.name, "cut": cut, "method": method, "kept": kept, "seed": seed}
        values = {name: result[name].item() for name in ("nll", *METRICS, *COSTS)} | {"fit_seconds": seconds}
        for metric, value in values.items():
            yield base | {"metric": metric, "value": value if metric in COSTS else rounded(value)}

    if method == "independent":
        for kept in shares:
            torch.manual_seed(seed)
            plain = recipe.net(**{cut: kept})
            seconds = fit_plain(plain, seed, data, recipe).seconds
            result = evaluate(plain, data.scored, data.likelihood, **shared)
            cost = {name: ((), value) for name, value in net_cost(plain, data.scored[0][:1]).items()}
            yield from flat(result.assign(cost), kept, seconds)
        return
    torch.manual_seed(seed)
    bayesian = method == "vnd"
    schedule = recipe.schedule(recipe.learned)
    if method == "fixed_uniform_passes":
        schedule = MaskSchedule(0, 1, 0, "uniform", recipe.num_particles, sliced=recipe.sliced)
    plain, options, widths = recipe.net(), dict[str, Any](), list[Any](shares)
    if cut == "depth":  # one block of units a group, which is always kept
        options = {"depth": True, "num_blocks": dict.fromkeys(nest(plain, data.train[0][:1]).widths, 1)}
        widths = [{DEPTH: kept} for kept in shares]
    net = nested(plain, data, recipe, bayesian=bayesian, **options)
    seconds = fit_nested(net, seed, data, recipe, schedule, bayesian=bayesian).seconds
    scored = {method: recipe.num_samples, "vnd_mean": None} if bayesian else {method: None}
    for name, num_samples in scored.items():
        result = evaluate_widths(NestedModel(net, data.likelihood), data.scored, widths, num_samples, **shared)
        for i, kept in enumerate(shares):
            yield from flat(result.isel(width=i), kept, seconds, name)


def run(
    name: str,
    cuts: list[str],
    methods: list[str],
    seeds: range,
    recipe: TextRecipe,
    part: Part = "test",
    join: bool = False,
) -> tuple[list[dict[str, Any]], str]:
    """Run what is not done yet, unless rows are only to be joined; return all rows, and the checksum of the text."""
    data, sha256 = load(name, recipe, part)
    folder = PARTS if part == "test" else PARTS / part
    used = asdict(recipe) | {"sha256": sha256}
    result: list[dict[str, Any]] = []
    for seed in seeds:
        for cut in cuts:
            for method in methods:
                make = None if join else partial(rows, method, cut, seed, data, recipe)
                result += kept_rows(folder / f"{name}-{cut}-{method}-{seed}.json", used, make)
    return result, sha256


def sizes(result: Mapping[str, Any], cut: str) -> dict[float, list[float]]:
    """Return the costs by the share that is kept, which are those of a net trained alone at it."""
    found = {(row["kept"], row["metric"]): row["value"] for row in result["rows"] if row["cut"] == cut}
    return {kept: [found[kept, metric] for metric in COSTS] for kept in dict.fromkeys(kept for kept, _ in found)}


def markdown(result: Mapping[str, Any]) -> str:
    """Format the tables of the page: for each cut the metrics by what is kept, and what that costs."""
    found, parts = Rows(result, "cut", "kept", LABELS), []
    for cut in found.fitted:
        cost = sizes(result, cut)
        heads = ["narrowed net", *(f"{kept:g}" for kept in cost)]
        body = [[name, *(f"{each[i]:,.0f}" for each in cost.values())] for i, name in enumerate(COSTS.values())]
        parts += [f"## By {cut}", *(found.table(cut, metric, list(cost)) for metric in METRICS)]
        parts.append(markdown_table(heads, body))
    return "\n\n".join(parts)


def figures(result: Mapping[str, Any]) -> dict[str, Figure]:
    """Plot the perplexity against the parameters of a narrowed net, a panel for each cut."""
    cuts = list(dict.fromkeys(row["cut"] for row in result["rows"]))
    drawn, axes = plt.subplots(
        1, len(cuts), figsize=(4 * len(cuts), 3.8), sharey=True, squeeze=False, layout="constrained"
    )
    for ax, cut in zip(axes.flat, cuts, strict=True):
        parameters = {kept: cost[0] for kept, cost in sizes(result, cut).items()}
        by_size = [row | {"size": parameters[row["kept"]]} for row in result["rows"] if row["cut"] == cut]
        found = Rows({"rows": by_size}, "cut", "size", LABELS)
        for method in found.methods:
            color = f"C{list(LABELS).index(method)}"
            found.draw(ax, cut, method, "perplexity", list(parameters.values()), color=color)
        ax.set_xscale("log", base=2)
        ax.set_xticks(list(parameters.values()), [f"{number / 1000:.0f} k" for number in parameters.values()])
        ax.minorticks_off()
        ax.set(xlabel="parameters", ylabel="perplexity of a symbol", title=f"cut by {cut}")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    return {"language_model": drawn}


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark and write its rows."""
    torch.set_flush_denormal(True)
    about = __doc__.partition("\n")[0]
    choices = {"cuts": CUTS, "methods": METHODS}
    args = read_arguments("benchmarks.language_model", about, choices, TextRecipe, RESULTS, argv, data=tuple(TEXTS))
    recipe = replace(RECIPE, **args.changes)
    result, sha256 = run(args.data, args.cuts, args.methods, args.seeds, recipe, args.part, args.join)
    write_rows(args, "benchmarks.language_model", result, {"recipe": asdict(recipe), "text_sha256": sha256})


if __name__ == "__main__":
    main()
