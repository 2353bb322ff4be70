"""Tables, figure and targets of the benchmark of learned lengths, made from its committed rows."""

import math
from collections.abc import Collection
from statistics import median
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from benchmarks.learned_lengths import LEARNED, METHODS
from benchmarks.record import markdown_table
from benchmarks.tables import Rows

METHOD_NAMES = {
    "fixed_uniform": "nested dropout, uniform",
    "fixed_geometric": "nested dropout, geometric",
    "vnd": "mask schedule",
    "priced": "prices",
}
LAW_NAMES = {
    "fixed": "one length",
    "own": "own law",
    "distilled": "distilled",
    "decoded12": "12 decodes",
    "exact": "exact",
}
FIXED = ("fixed_uniform", "fixed_geometric")
LENGTHS = (2, 4, 8, 12)
# By law, or of which ratio: what is to be reached at the mean lengths above.
SHARES = {("vnd", "distilled"): (0.80, 0.60, 0.40, 0.25), ("priced", "own"): (0.70, 0.40, 0.25, 0.15)}
DECODED = (0.97, 0.90, 0.80, 0.75)
CORRELATIONS = (0.75, 0.65, 0.55, 0.45)
OF_FIXED, GOAL_OF_FIXED = (0.90, 0.97, 1.01, 1.04), (0.85, 0.93, 0.97, 0.98)
OF_DISTILLED, GOAL_OF_DISTILLED = (1.03, 1.05, 1.05, 1.05), (1.0, 1.0, 1.0, 1.0)
WHOLE = 1.03
ASTRAY = 1.5  # times the median error of whole codes: such a fit went astray
COSTS = {
    "encode_at_price": "time of an encode with the law at a price / without",
    "encode_at_mean_length": "time of an encode with the law at a mean length / without",
    "training_step": "time of a training step with prices / with a mask schedule",
}


class Scores(Rows):
    """Means and standard errors over seeds, by method, law, mean length and metric.

    Args:
        result: What the benchmark wrote.
        leave_out: Fits that do not count, as pairs of method and seed.
    """

    def __init__(self, result: dict[str, Any], leave_out: Collection[tuple[str, int]] = ()) -> None:
        kept = [row for row in result["rows"] if (row["method"], row["seed"]) not in leave_out]
        super().__init__({"rows": kept}, "method", "mean_length", LAW_NAMES, method="law")

    def better_fixed(self, law: str, mean_length: int) -> float:
        """Return the error of the better of the two fixed laws."""
        return min(self.mean(method, law, mean_length, "mse") for method in FIXED)

    def by_law(self, metric: str, caption: str, lengths: tuple[int, ...], scale: float, digits: int) -> str:
        """Format a metric: a line a method and law."""
        body = []
        for method in (name for name in METHODS if name in self.fitted):
            for law, name in self.labels.items():
                cells = [self.cell(method, law, m, metric, scale=scale, digits=digits) for m in lengths]
                if set(cells) != {"-"}:
                    body.append([f"{METHOD_NAMES[method]}: {name}", *cells])
        return markdown_table([caption, *map(str, lengths)], body)


def astray(result: dict[str, Any]) -> list[tuple[str, int]]:
    """Return the fits whose error with whole codes is far above that of the other seeds: method and seed."""
    whole = [row for row in result["rows"] if (row["law"], row["mean_length"], row["metric"]) == ("fixed", 32, "mse")]
    usual = {m: median(row["value"] for row in whole if row["method"] == m) for m in {row["method"] for row in whole}}
    return [(row["method"], row["seed"]) for row in whole if row["value"] > ASTRAY * usual[row["method"]]]


def targets(scores: Scores) -> list[dict[str, Any]]:
    """Compare with what was to be reached: a line a target, with values and limits by mean length."""
    found: list[dict[str, Any]] = []

    def add(what: str, values: list[float], limits: tuple[float, ...], *, least: bool = False) -> None:
        met = [value >= limit if least else value <= limit for value, limit in zip(values, limits, strict=True)]
        found.append({"what": what, "values": values, "limits": limits, "least": least, "met": met})

    def ratios(other: Any) -> list[float]:
        return [scores.mean("priced", "distilled", m, "mse") / other(m) for m in LENGTHS]

    for (method, law), limits in SHARES.items():
        what = f"share of the exact gain, {METHOD_NAMES[method]}, {LAW_NAMES[law]}"
        add(what, [scores.mean(method, law, m, "share_of_gain") for m in LENGTHS], limits, least=True)
    for method in LEARNED:
        shares = [scores.mean(method, "decoded12", m, "share_of_gain") for m in LENGTHS]
        add(f"share of the exact gain, {METHOD_NAMES[method]}, 12 decodes", shares, DECODED, least=True)
    correlations = [scores.mean("vnd", "distilled", m, "correlation") for m in LENGTHS]
    add("correlation by image, mask schedule, distilled", correlations, CORRELATIONS, least=True)
    of_fixed = ratios(lambda m: scores.better_fixed("fixed", m))
    add("MSE of prices, distilled / better fixed law's at one length", of_fixed, OF_FIXED)
    add("the same, goal", of_fixed, GOAL_OF_FIXED)
    of_distilled = ratios(lambda m: scores.better_fixed("distilled", m))
    add("MSE of prices, distilled / better fixed law's, distilled", of_distilled, OF_DISTILLED)
    add("the same, goal", of_distilled, GOAL_OF_DISTILLED)
    return found


def targets_table(scores: Scores) -> str:
    """Format the targets; what is missed is in bold."""
    body = []
    for row in targets(scores):
        cells = [
            "-" if math.isnan(value) else f"{value:.3f} ({limit:g})" if met else f"**{value:.3f}** ({limit:g})"
            for value, limit, met in zip(row["values"], row["limits"], row["met"], strict=True)
        ]
        body.append([row["what"], "at least" if row["least"] else "at most", *cells])
    return markdown_table(["value (target)", "", *map(str, LENGTHS)], body)


def others_table(result: dict[str, Any], scores: Scores) -> str:
    """Format the targets that are one number."""
    whole = scores.mean("priced", "fixed", 32, "mse") / scores.better_fixed("fixed", 32)
    rows = [("MSE of whole codes, prices / better fixed law's", whole, WHOLE)]
    rows += [(label, result["header"]["cost"][key], 1.1) for key, label in COSTS.items()]
    body = [
        [what, f"{value:.3f}" if value <= limit else f"**{value:.3f}**", f"at most {limit:g}"]
        for what, value, limit in rows
    ]
    return markdown_table(["", "value", "target"], body)


def markdown(result: dict[str, Any]) -> str:
    """Format the tables of the page."""
    scores, lost = Scores(result), astray(result)
    fair = Scores(result, lost)
    named = ", ".join(f"{METHOD_NAMES[method]}, seed {seed}" for method, seed in lost)
    left_out = [f"Of fits that went astray none counts here: {named}."] if lost else []
    return "\n\n".join(
        [
            "## Error at equal mean length",
            scores.by_law("mse", "MSE x 1000", (*LENGTHS, 32), 1000.0, 2),
            "## Share of the exact gain, and correlation with the exact lengths",
            scores.by_law("share_of_gain", "share of gain", LENGTHS, 1.0, 2),
            scores.by_law("correlation", "correlation", LENGTHS, 1.0, 2),
            "## Bound and rate, the length paid",
            scores.by_law("elbo_length_paid", "ELBO, nats", (*LENGTHS, 32), 1.0, 0),
            scores.by_law("rate", "rate, nats", (*LENGTHS, 32), 1.0, 1),
            "## Targets",
            *left_out,
            targets_table(fair),
            others_table(result, fair),
        ]
    )


def figures(result: dict[str, Any]) -> dict[str, Figure]:
    """Plot the error against the mean length, over that of the better fixed law at one length for all images."""
    scores = Scores(result, astray(result))
    drawn, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    lines = {
        "nested dropout, uniform": ("fixed_uniform", "fixed", "0.6", "--"),
        "nested dropout, geometric": ("fixed_geometric", "fixed", "0.3", "--"),
        "uniform, distilled": ("fixed_uniform", "distilled", "C1", "-"),
        "geometric, distilled": ("fixed_geometric", "distilled", "C3", "-"),
        "mask schedule, distilled": ("vnd", "distilled", "C2", "-"),
        "prices, distilled": ("priced", "distilled", "C0", "-"),
        "prices, exact": ("priced", "exact", "C0", ":"),
    }
    for label, (method, law, color, style) in lines.items():
        means = [scores.mean(method, law, m, "mse") for m in (*LENGTHS, 32)]
        if law != "fixed":  # of whole codes there is nothing to choose
            means[-1] = scores.mean(method, "fixed", 32, "mse")
        relative = [value / scores.better_fixed("fixed", m) for value, m in zip(means, (*LENGTHS, 32), strict=True)]
        width = 2.2 if method == "priced" else 1.2
        for ax, values in zip(axes, ([1000 * value for value in means], relative), strict=True):
            ax.plot((*LENGTHS, 32), values, marker=".", color=color, linestyle=style, linewidth=width, label=label)
    for ax in axes:
        ax.set_xscale("log", base=2)
        ax.set_xticks((*LENGTHS, 32), [str(m) for m in (*LENGTHS, 32)])
        ax.set(xlabel="mean length of the code")
    axes[0].set(ylabel="MSE x 1000", ylim=(0, None))
    axes[1].set(ylabel="MSE / better fixed law's at one length", ylim=(None, 1.35))
    axes[1].axhline(1, color="0.8", linewidth=0.8, zorder=0)
    handles, labels = axes[0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside right upper", frameon=False)
    return {"learned_lengths": drawn}
