"""The main job from end to end: two models with learned order, trained on real images by SVI, and a report on them."""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import xarray as xr

from models.datasets import Dataset, load
from models.masked_perceptron import MaskedPerceptron
from models.report import Report, atomic_folder, print_table, versions
from pyro_vnd.autoencoders import GaussianLikelihood, OrderedVAE, mlp_bodies
from pyro_vnd.diagnostics import (
    classification_metrics,
    plot_elbo,
    plot_keep_probs,
    plot_prefixes,
    plot_widths,
    summary,
    to_arviz,
)
from pyro_vnd.distributions import OrderedMask
from pyro_vnd.infer import AutoNested, FitResult, MaskSchedule, cosine_to_zero, fit, linear

WIDTHS = tuple(eighths / 8 for eighths in range(1, 9))


@dataclass(frozen=True)
class Settings:
    """How long and how large, for one data set."""

    batch_size: int
    classifier_epochs: int
    vae_epochs: int
    hidden: tuple[int, int] = (64, 64)
    num_latents: int = 16
    # Mean-field posteriors of whole nets underfit at weight one: on the digits' validation part the NLL at full width
    # was .90 at weight 1, .25 at .2 and .15 at .05.
    kl_weight: float = 0.05
    num_samples: int = 50
    num_draws: int = 200
    num_rows: int = 100

    def quick(self) -> "Settings":
        """The same with next to no training."""
        return Settings(self.batch_size, 1, 1, num_samples=3, num_draws=10, num_rows=12)


SETTINGS = {
    "digits": Settings(batch_size=128, classifier_epochs=150, vae_epochs=400),
    "fashion-mnist": Settings(batch_size=256, classifier_epochs=8, vae_epochs=12),
}


def run(data_name: str, out: Path, *, seed: int = 0, quick: bool = False) -> dict[str, Any]:
    """Train both models, print their tables, and write report.html, metrics.json, posterior.nc and the figures.

    Args:
        data_name: A data set that `SETTINGS` has.
        out: Folder for the results; it is made, and changed only once everything is there.
        seed: Seed of both trainings.
        quick: Whether to train for a few steps only.

    Returns:
        The content of metrics.json.

    Raises:
        ValueError: If the demo has no settings for the data set, or it is corrupt.
        OSError: If data are missing or the folder cannot be written.
    """
    if data_name not in SETTINGS:
        raise ValueError(f"no settings for data set {data_name!r}; the demo runs on {', '.join(SETTINGS)}")
    started = time.perf_counter()
    data = load(data_name, flatten=True)
    settings = SETTINGS[data_name].quick() if quick else SETTINGS[data_name]
    with atomic_folder(out) as folder:
        report = Report(f"Learned order on {data.name}", folder)
        classifier = _classifier(data, settings, seed, report, folder)
        vae = _vae(data, settings, seed, report, folder)
        metrics = {
            "header": {
                "command": f"python -m models demo --data {data.name} --seed {seed}" + (" --quick" if quick else ""),
                "settings": asdict(settings),
                "versions": versions(),
                "seconds": round(time.perf_counter() - started, 1),
            },
            "classifier": classifier,
            "vae": vae,
        }
        report.footer(metrics["header"])
        (folder / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
        (folder / "report.html").write_text(report.html())
    print(f"\nreport: {out / 'report.html'} ({metrics['header']['seconds']:.0f} s)")
    return metrics


def _classifier(data: Dataset, settings: Settings, seed: int, report: Report, folder: Path) -> dict[str, Any]:
    num_classes = len(data.class_names)
    print(f"Bayesian nested classifier on {data.name}: {len(data.train.labels)} images, hidden units {settings.hidden}")
    model = MaskedPerceptron(data.train.images.shape[-1], num_classes, settings.hidden)
    guide = model.guide
    result = fit(
        model,
        guide,
        data.train,
        num_epochs=settings.classifier_epochs,
        batch_size=settings.batch_size,
        kl_weight=settings.kl_weight,
        seed=seed,
    )
    print(result)
    torch.manual_seed(seed)
    probs = model.predict(guide, data.test.images, WIDTHS, settings.num_samples).mean(1)
    rows = [{"width": w, **classification_metrics(p, data.test.labels)} for w, p in zip(WIDTHS, probs, strict=True)]
    header = ("width", "accuracy", "NLL", "ECE")
    cells = [[f"{r['width']:.3f}", f"{r['accuracy']:.3f}", f"{r['nll']:.3f}", f"{r['ece']:.3f}"] for r in rows]
    print_table(header, cells)

    posterior = to_arviz(
        model, guide, data.test.images[: settings.num_rows], num_samples=settings.num_draws, progress=True
    )
    for name in model.mask_names:
        posterior.posterior[f"{name}_mean_length"] = posterior.posterior[f"{name}_length"].mean("data")
    posterior.to_netcdf(str(folder / "posterior.nc"))
    table = summary(posterior, [*(f"{name}_mean_length" for name in model.mask_names), "bias3"])
    print(table)

    report.section(
        "A Bayesian net, cut to any width",
        f"One training; every width is a prefix of the same units. Test part, {len(data.test.labels)} images, "
        f"probabilities averaged over {settings.num_samples} draws of the weights. Weight of the weights' KL: "
        f"{settings.kl_weight}.",
    )
    report.table(header, cells)
    columns = {name: (("seed", "width"), [[row[name] for row in rows]]) for name in rows[0] if name != "width"}
    axes = plot_widths(xr.Dataset(columns, {"seed": [seed], "width": list(WIDTHS)}))
    report.figure(
        axes[0].figure,
        "widths",
        "Accuracy, negative log-likelihood (nats) and expected calibration error against the share of hidden units "
        "that is kept. Bands: one standard error over test images.",
    )
    ax = plot_keep_probs(posterior, model.mask_names, figsize=(6, 3.2))
    prior = OrderedMask.geometric(model.keep, settings.hidden[0])
    ax.plot(range(1, prior.num_units + 1), prior.keep_probs, "k--", linewidth=1, label="prior")
    ax.legend(title=ax.get_legend().get_title().get_text())
    report.figure(
        ax.figure,
        "keep_probs_classifier",
        "Learned keep probabilities of the hidden units of each layer, and their prior. Bands: 90 % of posterior draws "
        f"of the share of {settings.num_rows} images that keep a unit.",
    )
    _elbo_figure(report, result, "elbo_classifier")
    report.text("Posterior summary (ArviZ); the draws are in posterior.nc.")
    report.pre(str(table))
    return {"widths": rows, **_fit_numbers(result, guide)}


def _vae(data: Dataset, settings: Settings, seed: int, report: Report, folder: Path) -> dict[str, Any]:
    num_latents = settings.num_latents
    print(f"\nOrdered-latent VAE on {data.name}: {num_latents} latents")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        num_pixels = data.train.images.shape[-1]
        model = OrderedVAE(
            (num_pixels,),
            num_latents,
            bodies=mlp_bodies((num_pixels,), hidden=(128, 128)),
            likelihood=GaussianLikelihood(num_latents, noise="by_length"),
            tail="completion",
        )
    guide = model.guide
    result = fit(
        model,
        guide,
        data.train.images,
        num_epochs=settings.vae_epochs,
        batch_size=settings.batch_size,
        lr=0.002,
        lr_schedule=cosine_to_zero(),
        local_kl_weight=linear(0.0, 1.0, warmup=0.7),
        schedule=MaskSchedule(learned=0.1, budget=0.75, full=0.15, law="log-uniform"),
        seed=seed,
    )
    print(result)
    images = data.test.images
    lengths = [k for k in (1, 2, 3, 4, 6, 8, 12, 16) if k <= num_latents]
    errors = {k: (model.reconstruct(images, k) - images).square().mean().item() for k in lengths}
    header = ("code length", "test MSE x 1000")
    cells = [[str(k), f"{1000 * error:.1f}"] for k, error in errors.items()]
    print_table(header, cells)

    report.section(
        "A variational autoencoder with an ordered code",
        "One training; a short code is a prefix of the long one. Reconstructions are the decoder's mean for the mean "
        "code, cut to a length.",
    )
    report.table(header, cells)
    shown = images[_one_a_class(data)]
    pictures = {k: model.reconstruct(shown, k).reshape(-1, *data.image_shape) for k in lengths}
    report.figure(
        plot_prefixes(shown.reshape(-1, *data.image_shape), pictures).figure,
        "prefixes",
        "Test images, one a class, and what codes of growing length keep of them.",
    )
    posterior = to_arviz(model, guide, images[: settings.num_rows], num_samples=settings.num_draws, progress=True)
    posterior.to_netcdf(str(folder / "posterior_vae.nc"))
    ax = plot_keep_probs(posterior, ["code"], figsize=(6, 3.2))
    report.figure(
        ax.figure,
        "keep_probs_vae",
        "Keep probabilities of the latents under the learned law q(L | x), averaged over test images: how many are "
        f"worth their cost. Band: 90 % of posterior draws of the share of {settings.num_rows} images.",
    )
    _elbo_figure(report, result, "elbo_vae")
    return {"mse": {str(k): error for k, error in errors.items()}, **_fit_numbers(result, None)}


def _elbo_figure(report: Report, result: FitResult, name: str) -> None:
    figure = plot_elbo(result, figsize=(6, 2.8)).figure
    report.figure(figure, name, "ELBO and its parts during training, in nats per image.")


def _fit_numbers(result: FitResult, guide: AutoNested | None) -> dict[str, Any]:
    numbers: dict[str, Any] = {
        "elbo": result.elbo[-1],
        "log_likelihood": result.log_likelihood[-1],
        "kl": result.kl[-1],
        "num_steps": result.num_steps,
        "seconds": round(result.seconds, 1),
        "lengths": {name: asdict(length) for name, length in result.lengths.items()},
    }
    if guide is not None:
        laws = guide.laws.items()
        numbers["keep_probs"] = {name: [round(p, 5) for p in law.keep_probs.flatten().tolist()] for name, law in laws}
    return numbers


def _one_a_class(data: Dataset) -> list[int]:
    labels = data.test.labels
    return [int((labels == label).nonzero()[0]) for label in range(len(data.class_names))]
