"""Tables of the demo, from its committed numbers."""

from typing import Any

from benchmarks.record import markdown_table

__all__ = ["markdown"]

MEASURES = {"accuracy": "accuracy", "nll": "NLL, nats", "ece": "ECE"}


def markdown(result: dict[str, Any]) -> str:
    """Format scores by width and errors by length of the code, ours first and then what it is compared with."""
    nets = {"ours": result["classifier"]["widths"], **result["classifier"].get("baselines", {})}
    scores = [
        [f"{label}, {method}", *[f"{row[measure]:.3f}" for row in rows]]
        for measure, label in MEASURES.items()
        for method, rows in nets.items()
    ]
    codes = {"ours": result["vae"]["mse"], **result["vae"].get("baselines", {})}
    lengths = list(codes["ours"])
    errors = [[f"MSE x 1000, {name}", *[f"{1000 * of[k]:.1f}" for k in lengths]] for name, of in codes.items()]
    return "\n\n".join(
        [
            markdown_table(["share of the hidden units", *[f"{row['width']:g}" for row in nets["ours"]]], scores),
            markdown_table(["numbers of the code", *lengths], errors),
        ]
    )
