"""Tables of the demo, from its committed numbers."""

from typing import Any

from benchmarks.record import markdown_table

__all__ = ["markdown"]


def markdown(result: dict[str, Any]) -> str:
    """Format the classifier's scores by width and the autoencoder's error by length of the code."""
    widths = [
        [f"{row['width']:g}", *[f"{row[metric]:.3f}" for metric in ("accuracy", "nll", "ece")]]
        for row in result["classifier"]["widths"]
    ]
    errors = result["vae"]["mse"]
    return "\n\n".join(
        [
            markdown_table(["share of the hidden units", "accuracy", "NLL, nats", "ECE"], widths),
            markdown_table(["code length", *errors], [["MSE x 1000", *[f"{1000 * e:.1f}" for e in errors.values()]]]),
        ]
    )
