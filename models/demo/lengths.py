"""The demo's codes as long as each image needs, beside one length for all."""

import math
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from models.datasets import Dataset
from models.output import print_table
from models.report import Report
from pyro_vnd.autoencoders import OrderedVAE
from pyro_vnd.diagnostics import evaluate_lengths, plot_sorted_by_length
from pyro_vnd.infer import distil_lengths

MEAN_LENGTHS = (2, 3, 4, 6, 8)
SHOWN = 4  # the mean length at which images are sorted
NAMES = {"fixed": "one length for all", "model": "from the encoder", "exact": "by decoding all lengths"}


def run(model: OrderedVAE, data: Dataset, report: Report) -> dict[str, Any]:
    """Teach a fitted model what lengths are worth, and report on what is gained by it.

    Returns:
        What metrics.json has of it.
    """
    found = distil_lengths(model, data.train.images)
    print(found)
    images, labels = data.test.images, data.test.labels
    means = [m for m in MEAN_LENGTHS if m < model.num_latents]
    scores = evaluate_lengths(model, (images, labels), means)
    errors = {law: dict(zip(means, scores["mse"].sel(law=law).values[0].tolist(), strict=True)) for law in NAMES}
    shares = dict(zip(means, scores["share_of_gain"].sel(law="model").values[0].tolist(), strict=True))
    classes = scores["length_by_class"].sel(law="model", mean_length=SHOWN).values[0].tolist()
    header = ["mean length", *NAMES.values(), "share of the gain"]
    rows = [[str(m), *(f"{1000 * errors[law][m]:.1f}" for law in NAMES), _percent(shares[m])] for m in means]
    print("test MSE x 1000 at equal mean length")
    print_table(header, rows)

    report.section(
        "Codes as long as each image needs",
        f"Some images are told by two numbers, others by many. After the fit, {found.seconds:.0f} seconds of "
        "distillation taught a small net on the encoder's features what each length is worth to an image; at a price "
        "for each number it then says how long the code of an image should be. All columns have the same mean length.",
    )
    report.text("MSE x 1000 of test images:")
    report.table(header, rows)
    report.figure(_errors_figure(errors), "learned_lengths", "Error against the mean length of the code.")
    pictures = images.reshape(-1, *data.image_shape)
    ax = plot_sorted_by_length(scores, pictures, mean_length=SHOWN, figsize=(8, 2.4))
    report.figure(
        ax.figure,
        "sorted_by_length",
        f"Test images from the one with the shortest code to that with the longest, at a mean of {SHOWN} numbers; "
        "above each the length that it got.",
    )
    order = sorted(zip(classes, data.class_names, strict=True))
    report.text(
        f"Mean length by class, at a mean of {SHOWN}: " + ", ".join(f"{name} {m:.1f}" for m, name in order) + "."
    )
    return {
        "mse": {law: {str(m): error for m, error in values.items()} for law, values in errors.items()},
        "share_of_gain": {str(m): None if math.isnan(share) else share for m, share in shares.items()},
        "length_by_class": dict(zip(data.class_names, classes, strict=True)),
        "distil_seconds": round(found.seconds, 1),
    }


def _percent(share: float) -> str:
    """Name a share; there is none where there was nothing to gain, as in fits that are too short."""
    return "-" if math.isnan(share) else f"{100 * share:.0f} %"


def _errors_figure(errors: dict[str, dict[int, float]]) -> Figure:
    figure, ax = plt.subplots(figsize=(6, 3), layout="constrained")
    for (law, values), style in zip(errors.items(), ("--", "-", ":"), strict=True):
        ax.plot(list(values), [1000 * error for error in values.values()], style, marker=".", label=NAMES[law])
    ax.set(xlabel="mean length of the code", ylabel="test MSE x 1000", ylim=(0, None))
    ax.legend()
    return figure
