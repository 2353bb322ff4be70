"""The demo's autoencoder: a VAE whose code may be cut at any length, beside principal components."""

from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure

from models.datasets import Dataset
from models.demo import laws
from models.demo import lengths as lengths_by_image
from models.demo.baselines import principal_component_errors
from models.demo.course import elbo_figure, fit_numbers
from models.demo.settings import Settings
from models.output import print_table
from models.report import Report
from pyro_vnd.autoencoders import GaussianLikelihood, OrderedVAE, mlp_bodies
from pyro_vnd.diagnostics import plot_prefixes, to_arviz
from pyro_vnd.distributions import OrderedMask
from pyro_vnd.infer import FitResult, KLWeights, MaskSchedule, OptimizerSettings, cosine_to_zero, fit, linear


def train(data: Dataset, settings: Settings, seed: int) -> tuple[OrderedVAE, FitResult]:
    """Make the autoencoder, and fit it."""
    num_latents = settings.num_latents
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        num_pixels = data.train.images.shape[-1]
        model = OrderedVAE(
            (num_pixels,),
            num_latents,
            bodies=mlp_bodies((num_pixels,), hidden=(128, 128)),
            likelihood=GaussianLikelihood(num_latents, noise="by_length"),
            prior_lengths=OrderedMask.uniform(num_latents),
            tail="completion",
        )
    return model, fit(
        model,
        model.guide,
        data.train.images,
        num_epochs=settings.vae_epochs,
        batch_size=settings.batch_size,
        lr=0.002,
        optimizer=OptimizerSettings(lr_schedule=cosine_to_zero()),
        weights=KLWeights(local=linear(0.0, 1.0, warmup=0.7)),
        schedule=MaskSchedule(learned=0.1, budget=0.75, full=0.15, law="log-uniform"),
        seed=seed,
    )


def run(data: Dataset, settings: Settings, seed: int, report: Report) -> dict[str, Any]:
    """Train the autoencoder, compute principal components, and report on both.

    Returns:
        What metrics.json has of them.
    """
    num_latents = settings.num_latents
    print(f"\nOrdered-latent VAE on {data.name}: {num_latents} latents")
    model, result = train(data, settings, seed)
    guide, prior = model.guide, OrderedMask.uniform(num_latents)
    print(result)
    images = data.test.images
    lengths = [k for k in (1, 2, 3, 4, 6, 8, 12, 16) if k <= num_latents]
    errors = {k: (model.reconstruct(images, k) - images).square().mean().item() for k in lengths}
    components = principal_component_errors(data.train.images, images, num_latents)
    header = ("code length", "ours", "PCA")
    cells = [[str(k), f"{1000 * error:.1f}", f"{1000 * components[k]:.1f}"] for k, error in errors.items()]
    print("test MSE x 1000")
    print_table(header, cells)

    report.section(
        "A variational autoencoder with an ordered code",
        f"One training; a code has {num_latents} numbers, and a short code is a prefix of the long one. "
        "Reconstructions are the decoder's mean for the mean code, cut to a length.",
    )
    report.terms(
        {
            "code length": "how many numbers of the code the decoder is given, the first ones.",
            "MSE x 1000": "squared difference between a pixel, in [0, 1], of a test image and of its reconstruction, "
            f"mean over pixels and images, times 1000; less is better. The mean training image, a code of no number, "
            f"has {1000 * components[0]:.1f}.",
            "PCA": "the same error with as many principal components of the training images: the best linear code, in "
            "order, too.",
        }
    )
    report.text("MSE x 1000 of test images:")
    report.table(header, cells)
    report.figure(
        _errors_figure(errors, components),
        "errors",
        "MSE x 1000 of test images, with principal components at every length.",
    )
    shown = images[_one_a_class(data)]
    pictures = {k: model.reconstruct(shown, k).reshape(-1, *data.image_shape) for k in lengths}
    report.figure(
        plot_prefixes(shown.reshape(-1, *data.image_shape), pictures).figure,
        "prefixes",
        "Test images, one a class, and what codes of growing length keep of them.",
    )
    posterior = to_arviz(model, guide, images[: settings.num_rows], num_samples=settings.num_draws, progress=True)
    posterior.to_netcdf(str(report.folder / "posterior_vae.nc"))

    report.subsection("What the law of the code length has learned")
    report.text(
        "The length is a latent variable, too, with a uniform prior; its law q(L | x) depends on the image. The "
        "numbers are means over test images."
    )
    with torch.no_grad():
        law = model.encode(images).mask_law
    learned = laws.describe(report, {"code": law}, prior)
    report.text(
        f"From image to image E[L] varies by {learned['code']['stddev_between']:.1f} (standard deviation), around "
        f"{learned['code']['mean']:.1f} of {num_latents}."
    )
    report.figure(
        laws.figure(posterior, {"code": law}, prior),
        "keep_probs_vae",
        "Left: probabilities of the lengths under the learned law, mean over test images, and their prior. Right: the "
        f"probability that each number is kept: how many are worth their cost. Band: 90 % of posterior draws of the "
        f"share of {settings.num_rows} images that keep it.",
    )
    report.subsection("The fit")
    elbo_figure(report, result, "elbo_vae")
    by_image = lengths_by_image.run(model, data, report)
    return {
        "lengths_by_image": by_image,
        "mse": {str(k): error for k, error in errors.items()},
        **fit_numbers(result),
        "laws": learned,
        "baselines": {"PCA": {str(k): error for k, error in components.items()}},
    }


def _errors_figure(errors: dict[int, float], components: dict[int, float]) -> Figure:
    figure, ax = plt.subplots(figsize=(6, 3), layout="constrained")
    for label, values in {"ours": errors, "PCA": {k: error for k, error in components.items() if k}}.items():
        ax.plot(list(values), [1000 * error for error in values.values()], marker=".", label=label)
    ax.set(xlabel="code length", ylabel="test MSE x 1000", ylim=(0, None))
    ax.legend()
    return figure


def _one_a_class(data: Dataset) -> list[int]:
    labels = data.test.labels
    return [int((labels == label).nonzero()[0]) for label in range(len(data.class_names))]
