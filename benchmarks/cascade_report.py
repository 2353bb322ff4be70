"""Tables and figure of the benchmark of cascades, made from its committed rows."""

from statistics import mean, stdev
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from benchmarks.cascade import COSTS, WIDTHS
from benchmarks.record import markdown_table
from benchmarks.tables import Rows as SharedRows

LABELS = {"fixed": "one width for all", "cascade": "cascade"}
METRICS = {"accuracy": "accuracy", "nll": "NLL, nats", "ece": "ECE", "auroc": "AUROC of detection, entropy"}
FORMATS: dict[str, Any] = {"accuracy": {"digits": 2, "scale": 100.0}, "nll": {"digits": 4}}
NAMES = {1 / 16: "1/16", 1 / 8: "1/8", 1 / 4: "1/4", 1 / 2: "1/2", 1.0: "1"}


class Rows(SharedRows):
    """The rows of cascades and of the fixed widths beside them."""

    def __init__(self, result: dict[str, Any]) -> None:
        super().__init__(result, "arch", "cost", LABELS)

    def gain(self, arch: str, cost: float, metric: str) -> list[float]:
        """Return by how much the cascade is higher than the fixed width of the same cost, for each seed."""
        pairs = zip(*(self.values[arch, method, cost, metric] for method in ("cascade", "fixed")), strict=True)
        return [cascade - fixed for cascade, fixed in pairs]

    def at_random(self, arch: str, cost: float) -> list[float]:
        """Return the accuracy that a cascade had whose stages sent on as many rows, but any of them, for each seed."""
        seeds = range(len(self.values[arch, "cascade", cost, "accuracy"]))
        shares = [self.values[arch, "cascade", cost, f"share_of_rows/{k}"] for k in range(len(WIDTHS))]
        alone = [self.values[arch, "stage", width, "accuracy"] for width in WIDTHS]
        return [sum(share[i] * right[i] for share, right in zip(shares, alone, strict=True)) for i in seeds]


def markdown(result: dict[str, Any]) -> str:
    """Format the tables of the page: for each net the metrics by cost, gains, and where images stop."""
    rows = Rows(result)
    parts = []
    for arch in rows.fitted:
        parts.append(f"## {arch.upper()}")
        parts += [rows.table(arch, metric, [*COSTS, 1.0], **FORMATS.get(metric, {})) for metric in METRICS]
        parts += [_gains(rows, arch), _stops(rows, arch)]
    return "\n\n".join(parts)


def _gains(rows: Rows, arch: str) -> str:
    lines: dict[str, list[str]] = {}
    for cost in COSTS:
        fixed = rows.values[arch, "fixed", cost, "accuracy"]
        whole = rows.values[arch, "fixed", 1.0, "accuracy"]
        found = {
            "accuracy, points": [100 * gain for gain in rows.gain(arch, cost, "accuracy")],
            "the same of the whole net": [100 * (a - b) for a, b in zip(whole, fixed, strict=True)],
            "the same of rows sent on at random": [
                100 * (a - b) for a, b in zip(rows.at_random(arch, cost), fixed, strict=True)
            ],
            "NLL, nats": rows.gain(arch, cost, "nll"),
            "ECE": rows.gain(arch, cost, "ece"),
            "AUROC": rows.gain(arch, cost, "auroc"),
        }
        for name, values in found.items():
            digits = 2 if "points" in name or "same" in name else 4
            error = f" ± {stdev(values) / len(values) ** 0.5:.{digits}f}" if len(values) > 1 else ""
            lines.setdefault(name, []).append(f"{mean(values):+.{digits}f}{error}")
    head = ["cascade less one width for all", *[NAMES[cost] for cost in COSTS]]
    return markdown_table(head, [[name, *cells] for name, cells in lines.items()])


def _stops(rows: Rows, arch: str) -> str:
    metrics = {f"images that stop at {NAMES[width]}": f"share_of_rows/{k}" for k, width in enumerate(WIDTHS)}
    metrics |= {"multiply-adds, test images": "multiply_adds", "multiply-adds, foreign images": "ood_multiply_adds"}
    body = [
        [name, *[f"{rows.mean(arch, 'cascade', cost, metric):.3f}" for cost in COSTS]]
        for name, metric in metrics.items()
    ]
    return markdown_table(["share", *[NAMES[cost] for cost in COSTS]], body)


def figures(result: dict[str, Any]) -> dict[str, Figure]:
    """Plot accuracy and NLL against the cost, a row of panels for each net."""
    rows = Rows(result)
    drawn, axes = plt.subplots(
        len(rows.fitted), 2, figsize=(8, 3.2 * len(rows.fitted)), layout="constrained", squeeze=False
    )
    for line, arch in zip(axes, rows.fitted, strict=True):
        for ax, metric in zip(line, ("accuracy", "nll"), strict=True):
            for method in rows.methods:
                rows.draw(ax, arch, method, metric, [*COSTS, 1.0])
            ax.set_xscale("log", base=2)
            ax.set_xticks(list(NAMES), list(NAMES.values()))
            ax.minorticks_off()
            ax.set(xlabel="mean multiply-adds, share of the whole net's", title=f"{arch.upper()}: {METRICS[metric]}")
    axes[0, 0].legend(frameon=False)
    return {"cascade": drawn}
