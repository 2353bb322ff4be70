"""The demo's classifier: a Bayesian net that runs at any width, beside plain nets."""

from collections.abc import Mapping
from math import log
from typing import Any

import torch
import xarray as xr

from models.datasets import Dataset
from models.demo import baselines, laws
from models.demo.course import elbo_figure, fit_numbers
from models.demo.settings import WIDTHS, Settings
from models.masked_perceptron import MaskedPerceptron
from models.output import print_table
from models.report import Report
from pyro_vnd.diagnostics import classification_metrics, plot_widths, summary, to_arviz
from pyro_vnd.distributions import OrderedMask
from pyro_vnd.infer import FitResult, KLWeights, fit

Methods = Mapping[str, list[dict[str, float]]]  # rows by width, of each method
MEASURES = {"accuracy": "accuracy", "nll": "NLL", "ece": "ECE"}


def train(data: Dataset, settings: Settings, seed: int) -> tuple[MaskedPerceptron, FitResult]:
    """Make the classifier, and fit it."""
    model = MaskedPerceptron(data.train.images.shape[-1], len(data.class_names), settings.hidden)
    return model, fit(
        model,
        model.guide,
        data.train,
        num_epochs=settings.classifier_epochs,
        batch_size=settings.batch_size,
        weights=KLWeights(latents=settings.kl_weight),
        seed=seed,
    )


def run(data: Dataset, settings: Settings, seed: int, report: Report) -> dict[str, Any]:
    """Train the classifier and its baselines, and report on them.

    Returns:
        What metrics.json has of them.
    """
    print(f"Bayesian nested classifier on {data.name}: {len(data.train.labels)} images, hidden units {settings.hidden}")
    model, result = train(data, settings, seed)
    guide = model.guide
    print(result)
    torch.manual_seed(seed)
    probs = model.predict(data.test.images, WIDTHS, settings.num_samples).mean(1)
    rows = [{"width": w, **classification_metrics(p, data.test.labels)} for w, p in zip(WIDTHS, probs, strict=True)]
    header = ("width", *MEASURES.values())
    print_table(header, [[f"{row['width']:.3f}", *(f"{row[name]:.3f}" for name in MEASURES)] for row in rows])

    posterior = to_arviz(
        model, guide, data.test.images[: settings.num_rows], num_samples=settings.num_draws, progress=True
    )
    for name in model.mask_names:
        posterior.posterior[f"{name}_mean_length"] = posterior.posterior[f"{name}_length"].mean("data")
    posterior.to_netcdf(str(report.folder / "posterior.nc"))
    table = summary(posterior, [*(f"{name}_mean_length" for name in model.mask_names), "bias3"])
    print(table)

    prior = OrderedMask.geometric(model.keep, settings.hidden[0])
    others = baselines.classifiers(data, settings, prior, seed)
    methods = {"ours": rows, **others}
    print_table(("width", *(f"{width:.3f}" for width in WIDTHS)), _by_method(methods))

    _report_scores(report, data, settings, methods, seed)
    report.subsection("What the laws of the widths have learned")
    report.text(
        "Each image is seen through a random number of units of each layer (mask1, mask2); a priori the next unit is "
        f"kept with probability {model.keep}. For given weights the best law is the prior times exp(-NLL at that "
        "length), normalised: it leaves the prior only as far as the NLL of one image differs from length to length."
    )
    report.terms(laws.MEANINGS)
    learned = laws.describe(report, guide.laws, prior)
    quarter, whole = rows[1]["nll"], rows[-1]["nll"]
    report.text(
        f"For comparison: the test NLL is {quarter:.3f} with {WIDTHS[1]:.3f} of the units and {whole:.3f} with all, "
        f"a difference of {abs(quarter - whole):.3f} nats."
    )
    report.figure(
        laws.figure(posterior, guide.laws, prior),
        "keep_probs_classifier",
        "Left: learned probabilities of the number of units kept, and their prior. Right: the probability that each "
        f"unit is kept; bands: 90 % of posterior draws of the share of {settings.num_rows} images that keep it.",
    )
    report.subsection("The fit")
    elbo_figure(report, result, "elbo_classifier")
    report.text(
        "Posterior summary (ArviZ): mean lengths over images, and biases of the classes. The draws are in posterior.nc."
    )
    report.pre(str(table))
    return {
        "widths": rows,
        **fit_numbers(result),
        "keep_probs": {
            name: [round(p, 5) for p in law.keep_probs.flatten().tolist()] for name, law in guide.laws.items()
        },
        "laws": learned,
        "baselines": others,
    }


def _by_method(methods: Methods) -> list[list[str]]:
    """Format a row for each measure and method, a cell for each width."""
    return [
        [f"{label}, {method}", *(f"{row[measure]:.3f}" for row in rows)]
        for measure, label in MEASURES.items()
        for method, rows in methods.items()
    ]


def _report_scores(report: Report, data: Dataset, settings: Settings, methods: Methods, seed: int) -> None:
    chance = len(data.class_names)
    report.section(
        "A Bayesian net, cut to any width",
        f"One training gives a net of every width, as a narrow net is a prefix of the wide one. Two hidden layers of "
        f"{settings.hidden[0]} and {settings.hidden[1]} units, {len(data.train.labels)} images to train on, "
        f"{len(data.test.labels)} to test.",
    )
    report.terms(
        {
            "width": "share of the units of each hidden layer that is kept, the first ones.",
            "accuracy": "share of test images whose most probable class is the right one; more is better. Its "
            f"standard error is about {methods['ours'][-1]['accuracy_se']:.2f}.",
            "NLL": "negative log-likelihood: minus the logarithm of the probability given to the right class, mean "
            f"over test images, in nats; less is better. Guessing among {chance} classes has {log(chance):.2f}.",
            "ECE": "expected calibration error: by how much confidence, the probability of the most probable class, "
            "and the share of right answers differ; mean over 15 bins of confidence, each weighted by its images. "
            "Less is better; zero says that of the answers given with 80 % confidence 80 % are right.",
        }
    )
    report.terms(
        {
            "ours": f"Bayesian net with learned laws of the width; probabilities are averaged over "
            f"{settings.num_samples} draws of the weights. Weight of the weights' KL: {settings.kl_weight}.",
            "nested dropout": "the same net with plain weights, trained at widths drawn from the prior of ours for "
            "each image: the order without the posterior.",
            "plain net, cut": "the same net with plain weights, trained at full width and cut afterwards: no order.",
            "plain nets, one a width": f"{len(WIDTHS)} such nets, each trained at its width.",
        }
    )
    report.text("Every net is trained in as many steps of the same optimiser, learning rate and batch size.")
    report.table(("width", *(f"{width:.3f}" for width in WIDTHS)), _by_method(methods))
    report.text(_verdict(methods))
    figures = {}
    for method, rows in methods.items():
        columns = {name: (("seed", "width"), [[row[name] for row in rows]]) for name in rows[0] if name != "width"}
        figures[method] = xr.Dataset(columns, {"seed": [seed], "width": list(WIDTHS)})
    axes = plot_widths(figures)
    ordered = [row["accuracy"] for method, rows in methods.items() if method != "plain net, cut" for row in rows]
    axes[0].set_ylim(min(ordered) - 0.02, 1)
    for ax in axes[1:]:
        ax.set_yscale("log")
    report.figure(
        axes[0].figure,
        "widths",
        "The same as curves, NLL and ECE on a logarithmic scale; the plain net that was cut leaves the first panel. "
        "Bands: one standard error over test images.",
    )


def _verdict(methods: Methods) -> str:
    """Say what one net for all widths costs, or gains, against nets for one width each."""
    sentences = []
    for place in (0, -1):
        nll = {method: rows[place]["nll"] for method, rows in methods.items()}
        differences = {
            other: f"{abs(nll['ours'] - nll[method]):.3f} {'higher' if nll['ours'] > nll[method] else 'lower'}"
            for method, other in {"plain nets, one a width": "alone", "nested dropout": "nested"}.items()
        }
        sentences.append(
            f"At width {WIDTHS[place]:.3f} the NLL of ours, in nats, is {differences['alone']} than that of a "
            f"plain net trained for this width alone, and {differences['nested']} than that of nested dropout."
        )
    return " ".join(sentences)
