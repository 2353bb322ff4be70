"""Tables, figure and targets of the benchmark of nested nets, made from its committed rows."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from benchmarks.nested_nets import RESULTS, WIDTHS
from benchmarks.record import markdown_table
from benchmarks.tables import Rows as SharedRows

FIGURE = Path(__file__).parents[1] / "docs" / "images" / "nested_nets.png"
LABELS = {
    "independent": "independent nets",
    "fixed_geometric": "nested dropout, geometric",
    "fixed_uniform": "nested dropout, uniform",
    "bayes_full": "Bayesian, full width",
    "vnd": "ours",
    "vnd_probs_as_logits": "ours, probabilities as logits",
}
PANELS = {
    "accuracy": "accuracy",
    "nll": "NLL, nats",
    "ece": "ECE",
    "auroc/mutual_information": "AUROC, mutual information",
    "auroc/entropy": "AUROC, entropy",
}


class Rows(SharedRows):
    """The rows of nested nets."""

    def __init__(self, result: dict[str, Any]) -> None:
        super().__init__(result, "arch", "width", LABELS)

    def best_score(self, arch: str, method: str, width: Any) -> str:
        """Return the out-of-domain score whose AUROC, averaged over sets and seeds, is highest."""
        known = [name.partition("/")[2] for *key, name in self.values if name.count("/") == 1 and name[:5] == "auroc"]
        return max(dict.fromkeys(known), key=lambda score: self.mean(arch, method, width, f"auroc/{score}"))


def targets(rows: Rows, arch: str) -> list[dict[str, Any]]:
    """Compare ours with what it has to reach, at every width: positive margins are met."""
    result = []
    for width in WIDTHS:
        fixed = ("fixed_geometric", "fixed_uniform")

        def ours(metric: str, width: float = width) -> float:
            return rows.mean(arch, "vnd", width, metric)

        better = max(fixed, key=lambda method: rows.mean(arch, method, width, "accuracy"))
        error = rows.error(arch, better, width, "accuracy")
        slack = 0.015 if width == WIDTHS[0] else 0.01
        best = rows.best_score(arch, "vnd", width)
        margins = {
            "accuracy, fixed rate": ours("accuracy") - (rows.mean(arch, better, width, "accuracy") - error),
            "accuracy, independent": ours("accuracy") - (rows.mean(arch, "independent", width, "accuracy") - slack),
            "NLL, fixed rate": min(rows.mean(arch, method, width, "nll") for method in fixed) - ours("nll"),
            "ECE": 0.02 - ours("ece"),
            "ECE, calibrated": 0.02 - ours("ece_calibrated"),
            "AUROC, fixed rate": ours(f"auroc/{best}")
            - max(rows.mean(arch, method, width, "auroc/entropy") for method in fixed)
            - 0.02,
        }
        result += [{"width": width, "what": what, "margin": margin, "score": best} for what, margin in margins.items()]
    return result


def targets_table(rows: Rows, arch: str) -> str:
    """Format the margins: a line a target, a column a width."""
    found = targets(rows, arch)
    names = list(dict.fromkeys(row["what"] for row in found))
    cells = {(row["what"], row["width"]): f"{row['margin']:+.4f}" for row in found}
    return markdown_table(
        ["margin", *[f"{width:g}" for width in WIDTHS]], [[name, *[cells[name, w] for w in WIDTHS]] for name in names]
    )


def figure(rows: Rows) -> Figure:
    """Plot the metrics against the width, a row of panels for each architecture."""
    drawn, axes = plt.subplots(
        len(rows.fitted),
        len(PANELS),
        figsize=(3.1 * len(PANELS), 2.7 * len(rows.fitted)),
        layout="constrained",
        squeeze=False,
    )
    for line, arch in zip(axes, rows.fitted, strict=True):
        for ax, (metric, label) in zip(line, PANELS.items(), strict=True):
            for method in rows.methods:
                if not metric.endswith("mutual_information") or method.startswith(("vnd", "bayes")):
                    rows.draw(ax, arch, method, metric, WIDTHS)
            ax.set_xscale("log", base=2)
            ax.set(xlabel="width kept", title=f"{arch.upper()}: {label}")
    handles, labels = axes[0][0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    return drawn


def markdown(result: dict[str, Any], metrics: Sequence[str] = ("accuracy", "nll", "ece", "auroc")) -> str:
    """Format the tables of the README: for each architecture accuracy, NLL, ECE and detection by width."""
    rows = Rows(result)
    parts = []
    for arch in rows.fitted:
        parts.append(f"**{arch.upper()}**")
        for metric in metrics:
            if metric != "auroc":
                parts.append(rows.table(arch, metric, WIDTHS))
                continue
            # Deterministic nets have no mutual information: their best score is one of the other two.
            body = []
            for method in rows.methods:
                cells = []
                for width in WIDTHS:
                    if (arch, method, width, "accuracy") not in rows.values:
                        cells.append("-")
                        continue
                    score = (
                        "entropy" if not method.startswith(("vnd", "bayes")) else rows.best_score(arch, method, width)
                    )
                    key = (arch, method, width, f"auroc/{score}")
                    sign = {"entropy": "H", "mutual_information": "MI"}.get(score, "max")
                    cells.append(f"{rows.mean(*key):.3f} ± {rows.error(*key):.3f} {sign}")
                body.append([LABELS[method], *cells])
            parts.append(markdown_table(["AUROC, best score", *[f"{width:g}" for width in WIDTHS]], body))
    return "\n\n".join(parts)


def main(argv: list[str] | None = None) -> None:
    """Print tables and margins, and draw the figure."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.nested_nets_report", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--json", type=Path, default=RESULTS, metavar="FILE", help="rows to read")
    parser.add_argument("--figure", type=Path, default=FIGURE, metavar="FILE", help="figure to write")
    args = parser.parse_args(argv)
    result = json.loads(args.json.read_text())
    rows = Rows(result)
    print(markdown(result))
    for arch in rows.fitted:
        print(f"\n{arch.upper()}: margins over the targets, positive is met\n\n{targets_table(rows, arch)}")
    drawn = figure(rows)
    drawn.savefig(args.figure, dpi=110)
    plt.close(drawn)


if __name__ == "__main__":
    sys.exit(main())
