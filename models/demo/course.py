"""The course of a fit, in numbers and in a figure."""

from dataclasses import asdict
from typing import Any

from models.report import Report
from pyro_vnd.diagnostics import plot_elbo
from pyro_vnd.infer import FitResult


def fit_numbers(result: FitResult) -> dict[str, Any]:
    """Return what metrics.json has of a fit."""
    return {
        "elbo": result.elbo[-1],
        "log_likelihood": result.log_likelihood[-1],
        "kl": result.kl[-1],
        "num_steps": result.num_steps,
        "seconds": round(result.seconds, 1),
        "lengths": {name: asdict(length) for name, length in result.lengths.items()},
    }


def elbo_figure(report: Report, result: FitResult, name: str) -> None:
    """Add the figure `name` of the course of a fit."""
    ax = plot_elbo(result, figsize=(6, 2.8))
    ax.set_xscale("linear")
    caption = "The ELBO, what training maximises: the log-likelihood less the weighted KL, in nats per image."
    report.figure(ax.figure, name, caption)
