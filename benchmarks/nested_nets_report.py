"""Tables, figures and targets of the benchmark of nested nets, made from its committed rows."""

from fractions import Fraction
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from benchmarks.nested_nets import WIDTHS, is_bayesian
from benchmarks.record import markdown_table
from benchmarks.tables import Rows as SharedRows

LIKE_FOR_LIKE = {
    "vnd": "ours",
    "fixed_geometric_passes": "nested dropout, geometric",
    "fixed_uniform_passes": "nested dropout, uniform",
    "fixed_geometric_bayes": "geometric, Bayesian weights",
    "fixed_uniform_bayes": "uniform, Bayesian weights",
}
LABELS = {
    **LIKE_FOR_LIKE,
    "independent": "independent nets",
    "ensemble": "ensembles of five",
    "bayes_full": "Bayesian, full width",
    "fixed_geometric": "geometric, one pass",
    "fixed_uniform": "uniform, one pass",
    "vnd_probs_as_logits": "ours, probabilities as logits",
}
DRAWN = (*LIKE_FOR_LIKE, "independent", "ensemble", "bayes_full")
PANELS = {"accuracy": "accuracy", "nll": "NLL, nats", "ece": "ECE", "auroc": "AUROC of detection, best score"}
TITLES = {"mlp": "MLP", "cnn": "CNN", "vit": "Vision transformer"}
SIGNS = {"entropy": "H", "mutual_information": "MI"}


class Rows(SharedRows):
    """The rows of nested nets."""

    def __init__(self, result: dict[str, Any]) -> None:
        super().__init__(result, "arch", "width", LABELS)

    def widths(self, arch: str) -> list[float]:
        """Return the widths at which a net was scored."""
        return [width for width in WIDTHS if any(key[:3:2] == (arch, width) for key in self.values)]

    def best_score(self, arch: str, method: str, width: Any) -> str:
        """Return the out-of-domain score whose AUROC, averaged over sets and seeds, is highest."""
        known = [name.partition("/")[2] for *key, name in self.values if name.count("/") == 1 and name[:5] == "auroc"]
        return max(dict.fromkeys(known), key=lambda score: self.mean(arch, method, width, f"auroc/{score}"))

    def scored(self, arch: str, method: str, width: Any) -> str:
        """Return the metric of detection: of the best score, or of the entropy, all that a deterministic net has."""
        drawn = is_bayesian(method) or method == "ensemble"
        return f"auroc/{self.best_score(arch, method, width) if drawn else 'entropy'}"


def targets(rows: Rows, arch: str) -> list[dict[str, Any]]:
    """Compare ours with what it has to reach, at every width: positive margins are met.

    Fixed rates are those with our passes, or those of one pass if these were not run.
    """
    result, like_for_like = [], {key[1] for key in rows.values if key[0] == arch}
    for width in rows.widths(arch):
        usual = ["fixed_geometric", "fixed_uniform"]
        fixed = [f"{name}_passes" for name in usual if f"{name}_passes" in like_for_like] or usual

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
        ["ours, margin over the target", *[f"{width:g}" for width in rows.widths(arch)]],
        [[name, *[cells[name, w] for w in rows.widths(arch)]] for name in names],
    )


def figures(result: dict[str, Any]) -> dict[str, Figure]:
    """Plot the metrics against the width, a figure for each architecture."""
    rows = Rows(result)
    return {f"nested_{arch}": _figure(rows, arch) for arch in rows.fitted}


def _figure(rows: Rows, arch: str) -> Figure:
    widths = rows.widths(arch)
    drawn, axes = plt.subplots(2, 2, figsize=(8, 6.4), layout="constrained")
    for ax, (metric, label) in zip(axes.flat, PANELS.items(), strict=True):
        for method in [method for method in DRAWN if method in rows.methods]:
            rows.draw(ax, arch, method, rows.scored(arch, method, 1.0) if metric == "auroc" else metric, widths)
        ax.set_xscale("log", base=2)
        ax.set_xticks(widths, [str(Fraction(width)) for width in widths])
        ax.minorticks_off()
        ax.set(xlabel="share of the units", title=label)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    return drawn


def markdown(result: dict[str, Any]) -> str:
    """Format the tables of the page: for each architecture accuracy, NLL, ECE and detection by width, and margins."""
    rows = Rows(result)
    parts = []
    for arch in rows.fitted:
        parts.append(f"## {TITLES[arch]}")
        parts += [rows.table(arch, metric, rows.widths(arch)) for metric in PANELS if metric != "auroc"]
        parts += [_detection_table(rows, arch), targets_table(rows, arch)]
    return "\n\n".join(parts)


def _detection_table(rows: Rows, arch: str) -> str:
    body = []
    for method in rows.methods:
        cells = []
        for width in rows.widths(arch):
            if (arch, method, width, "accuracy") not in rows.values:
                cells.append("-")
                continue
            score = rows.scored(arch, method, width)
            key = (arch, method, width, score)
            sign = SIGNS.get(score.partition("/")[2], "max")
            cells.append(f"{rows.cell(*key)} {sign}")
        if set(cells) != {"-"}:
            body.append([LABELS[method], *cells])
    return markdown_table(["AUROC, best score", *[f"{width:g}" for width in rows.widths(arch)]], body)


def summary(result: dict[str, Any]) -> str:
    """Format the table of the README: the MLP's accuracy and NLL."""
    rows = Rows(result)
    body = []
    for metric, name in (("accuracy", "accuracy"), ("nll", "NLL, nats")):
        for method in ("independent", "fixed_geometric_passes", "fixed_uniform_passes", "vnd"):
            cells = [f"{rows.mean('mlp', method, width, metric):.3f}" for width in WIDTHS]
            body.append([f"{name}, {LABELS[method]}", *cells])
    return markdown_table(["share of the units", "1/16", "1/8", "1/4", "1/2", "3/4", "1"], body)
