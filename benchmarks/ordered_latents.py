"""Autoencoders whose code can be cut, with a learned law of lengths, a fixed one or none: what is a prefix worth?

Within a model every method has the same architecture, data, epochs, batches, optimiser, learning-rate schedule and
weights of the objective, and they differ in the lengths of the codes:

- plain: all latents always;
- fixed_geometric, fixed_uniform: nested dropout, lengths drawn from a fixed law;
- vnd: ours, a law that is learned for each image, and codes cut by a `MaskSchedule`; a decoder that completes cut
  codes, and has a noise for each length; in the VAE a prior in which each latent depends on those before it, and
  which is fitted on for a while when the rest stands still;
- pca: principal components, of the linear model only.

Of the models, vae_our_parts is there for the others: the VAE with the decoder, the noises and the prior that ours has.

Recipes are compared on the validation part, as in

    python -m benchmarks.ordered_latents --part validation --first-seed 10 --set full=0.5 --json FILE

with other seeds than those of the final run, which alone scores the test part. Each fit is kept in a file of its own
as soon as it is done, so that a run that is interrupted goes on from there.
"""

import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.recipes import kept_rows, read_arguments, write_rows
from benchmarks.record import rounded
from models.datasets import Dataset, load
from models.features import train_features
from models.ood import Part
from pyro_vnd.autoencoders import (
    GaussianLikelihood,
    LinearGaussianVAE,
    OrderedVAE,
    OrderedVQVAE,
    OrderedWAE,
    fit_prior,
    full_length,
    mlp_bodies,
)
from pyro_vnd.autoencoders.base import OrderedAutoencoder
from pyro_vnd.autoencoders.vae import PriorLatents
from pyro_vnd.autoencoders.vqvae import Ordered
from pyro_vnd.diagnostics import evaluate_prefixes
from pyro_vnd.diagnostics.metrics.generative import weights_hash
from pyro_vnd.distributions import OrderedMask
from pyro_vnd.infer import KLWeights, MaskSchedule, OptimizerSettings, cosine_to_zero, fit, linear

RESULTS = Path(__file__).parent / "results" / "ordered_latents.json"
PARTS = Path("results") / "ordered_latents"
PREFIXES = (1, 2, 4, 8, 16, 32)
MODELS = ("vae", "vae_our_parts", "beta_vae", "wae", "vqvae_tokens", "vqvae_dims", "linear")
METHODS = ("plain", "fixed_geometric", "fixed_uniform", "vnd", "pca")
FIXED = ("fixed_geometric", "fixed_uniform")
ONLY = {"beta_vae": ("plain",), "vae_our_parts": ("plain", *FIXED)}  # models that not all methods have


@dataclass(frozen=True)
class Recipe:
    """What all fits share, and what only some of them have.

    Attributes:
        epochs: Passes over the training part.
        batch_size: Rows of a batch.
        lr: Largest learning rate of Adam, which rises for a twentieth of the steps and falls to zero on a cosine.
        num_latents: K.
        kl_warmup: Share of the steps in which the weight of the latents' KL, or of the discrepancy, rises from zero.
        beta: That weight of the beta-VAE in the end.
        mmd_scale: Weight of the WAE's divergence.
        codebook_size: Vectors of the VQ-VAE's codebook.
        token_dim: Numbers of a token where tokens are ordered.
        num_tokens: Tokens where their dimensions are ordered.
        keep: Rate of the fixed geometric law.
        learned: Share of our lengths drawn from q(L | x).
        budget: Share of them drawn from a budget, length k with probability proportional to
            (k + budget_offset)^-budget_power.
        full: Share of them at K.
        budget_offset: Offset of the law of budgets.
        budget_power: Exponent of the law of budgets.
        length_weight: Weight of the KL of the lengths.
        prior_epochs: Passes over the codes by which a learned prior is fitted on.
        num_importance: Draws of the importance-weighted bound.
        num_generated: Samples for the Frechet distance.
    """

    epochs: int = 16
    batch_size: int = 256
    lr: float = 4e-3
    num_latents: int = 32
    kl_warmup: float = 1.0
    beta: float = 2.0
    mmd_scale: float = 100.0
    codebook_size: int = 256
    token_dim: int = 4
    num_tokens: int = 8
    keep: float = 0.88
    learned: float = 0.05
    budget: float = 0.33
    full: float = 0.62
    budget_offset: float = -0.75
    budget_power: float = 0.6
    length_weight: float = 1.0
    prior_epochs: int = 20
    num_importance: int = 20
    num_generated: int = 10_000


RECIPE = Recipe()
# Tokens are compared at short codes, too, where whole ones may cost a little: chosen on the validation part.
OWN: dict[str, dict[str, Any]] = {
    "vqvae_tokens": {"budget": 0.66, "full": 0.29, "budget_offset": 0.5, "budget_power": 0.9}
}


def build(
    model: str, method: str, image_size: int, recipe: Recipe, prior_latents: PriorLatents | None = None
) -> OrderedAutoencoder:
    """Return an untrained model, a VAE with the method's own prior of the latents if none is given."""
    shape, num_latents = (1, image_size, image_size), recipe.num_latents
    ours = method == "vnd"
    laws = {
        "plain": full_length(num_latents),
        "fixed_geometric": OrderedMask.geometric(recipe.keep, num_latents),
        "fixed_uniform": OrderedMask.uniform(num_latents),
        "vnd": OrderedMask.uniform(num_latents),
    }
    lengths: dict[str, Any] = {"prior_lengths": laws[method], "posterior_lengths": "amortised" if ours else "prior"}
    if model == "linear":
        return LinearGaussianVAE(shape, num_latents, **lengths | ({"posterior_lengths": "global"} if ours else {}))
    our_parts = ours or model == "vae_our_parts"
    lengths |= {
        "bodies": mlp_bodies(shape, hidden=(512, 256)),
        "tail": "completion" if our_parts else "zeros",
        "likelihood": GaussianLikelihood(num_latents, noise="by_length" if our_parts else "shared"),
    }
    if model.startswith("vqvae"):
        ordered: Ordered = "tokens" if model == "vqvae_tokens" else "dims"
        num_tokens, dim = (num_latents, recipe.token_dim) if ordered == "tokens" else (recipe.num_tokens, num_latents)
        return OrderedVQVAE(shape, num_tokens, dim, recipe.codebook_size, ordered=ordered, **lengths)
    if model == "wae":
        return OrderedWAE(shape, num_latents, **lengths)
    if prior_latents is None:
        prior_latents = "autoregressive" if our_parts else "independent"
    return OrderedVAE(shape, num_latents, prior_latents=prior_latents, **lengths)


def fit_arguments(model: str, method: str, recipe: Recipe) -> dict[str, Any]:
    """Return what `fit` is given."""
    arguments: dict[str, Any] = {
        "num_epochs": recipe.epochs,
        "batch_size": recipe.batch_size,
        "lr": recipe.lr,
        "optimizer": OptimizerSettings(lr_schedule=cosine_to_zero()),
        "weights": KLWeights(
            local=linear(0.0, recipe.beta if model == "beta_vae" else 1.0, warmup=recipe.kl_warmup),
            lengths=recipe.length_weight,
        ),
    }
    if method == "vnd":
        budgets = (torch.arange(1.0, recipe.num_latents + 1) + recipe.budget_offset) ** -recipe.budget_power
        arguments["schedule"] = MaskSchedule(recipe.learned, recipe.budget, recipe.full, OrderedMask(probs=budgets))
    return arguments


class PrincipalComponents:
    """Principal components with the interface of an autoencoder.

    Args:
        images: Training images, shape (N, ...).
        num_latents: Number of components.
    """

    def __init__(self, images: torch.Tensor, num_latents: int) -> None:
        x = images.flatten(1)
        self.shape, self.num_latents, self.mean = images.shape[1:], num_latents, x.mean(0)
        variance, vectors = torch.linalg.eigh((x - self.mean).T.double().cov())
        self.components = vectors.flip(-1)[:, :num_latents].to(x)
        self.deviations = variance.flip(-1)[:num_latents].sqrt().to(x)

    def embed(self, x: torch.Tensor, length: int) -> torch.Tensor:
        """Return the first coordinates, zeros after them."""
        codes = (x.flatten(1) - self.mean) @ self.components
        return codes * (torch.arange(self.num_latents) < length)

    def reconstruct(self, x: torch.Tensor, length: int) -> torch.Tensor:
        """Project images onto the first components."""
        return self._image(self.embed(x, length))

    def sample(self, num_samples: int, length: int | None) -> torch.Tensor:
        """Draw coordinates with the variances of the data."""
        codes = torch.randn(num_samples, self.num_latents) * self.deviations
        return self._image(codes * (torch.arange(self.num_latents) < (self.num_latents if length is None else length)))

    def _image(self, codes: torch.Tensor) -> torch.Tensor:
        return (self.mean + codes @ self.components.T).unflatten(-1, self.shape)


def train(model: str, method: str, seed: int, data: Dataset, recipe: Recipe) -> tuple[Any, float]:
    """Fit one method; return the model and the seconds it took."""
    images = data.train.images
    if method == "pca":
        return PrincipalComponents(images, recipe.num_latents), 0.0
    torch.manual_seed(seed)
    net = build(model, method, images.shape[-1], recipe)
    arguments = fit_arguments(model, method, recipe)
    if isinstance(net, OrderedWAE):
        arguments["elbo"] = net.objective(recipe.mmd_scale, recipe.length_weight)
    seconds = fit(net, net.guide, images, **arguments, seed=seed, progress=sys.stderr.isatty()).seconds
    if isinstance(net, OrderedVAE) and net.conditioner is not None:
        progress = sys.stderr.isatty()
        seconds += fit_prior(net, images, num_epochs=recipe.prior_epochs, seed=seed, progress=progress).seconds
    return net, seconds


def rows(
    model: str, method: str, seed: int, data: Dataset, part: Part, features: nn.Module, recipe: Recipe
) -> Iterator[dict[str, Any]]:
    """Fit a method and score it: one row a prefix and metric."""
    net, seconds = train(model, method, seed, data, recipe)
    result = evaluate_prefixes(
        net,
        data.test if part == "test" else data.validation,
        [k for k in PREFIXES if k <= recipe.num_latents],
        num_importance=recipe.num_importance,
        train=data.train,
        features=features,
        num_generated=recipe.num_generated,
        seed=seed,
        progress=sys.stderr.isatty(),
    )
    base = {"data": data.name, "model": model, "method": method, "seed": seed}
    for name, values in result.sel(seed=seed).data_vars.items():
        if values.dims == ("prefix",):
            for prefix in values["prefix"].values:
                value = values.sel(prefix=prefix).item()
                yield base | {"prefix": int(prefix), "metric": name, "value": rounded(value)}
        elif not values.dims:
            yield base | {"prefix": "law", "metric": name, "value": rounded(values.item())}
    yield base | {"prefix": "law", "metric": "fit_seconds", "value": rounded(seconds)}


def uses(model: str, method: str, field: str) -> bool:
    """Say whether a fit and its scores depend on a field of the recipe."""
    if method == "pca":
        return field in ("num_latents", "num_generated")
    only = {
        "beta": model == "beta_vae",
        "mmd_scale": model == "wae",
        "codebook_size": model.startswith("vqvae"),
        "token_dim": model == "vqvae_tokens",
        "num_tokens": model == "vqvae_dims",
        "keep": method == "fixed_geometric",
        "prior_epochs": model == "vae_our_parts" or (model, method) == ("vae", "vnd"),
        **dict.fromkeys(
            ("learned", "budget", "full", "budget_offset", "budget_power", "length_weight"), method == "vnd"
        ),
    }
    return only.get(field, True)


def run(
    data: Dataset,
    features: nn.Module,
    models: list[str],
    methods: list[str],
    seeds: range,
    recipes: Mapping[str, Recipe],
    part: Part,
    join: bool = False,
) -> list[dict[str, Any]]:
    """Run what is not done yet, unless rows are only to be joined, and return all rows."""
    folder = PARTS if part == "test" else PARTS / part
    result: list[dict[str, Any]] = []
    for seed in seeds:
        for model in models:
            for method in methods:
                if method == "pca" and (model != "linear" or seed != seeds[0]):  # it has no seed
                    continue
                if method not in ONLY.get(model, METHODS):
                    continue
                recipe = recipes[model]
                used = {field: value for field, value in asdict(recipe).items() if uses(model, method, field)}
                make = None if join else partial(rows, model, method, seed, data, part, features, recipe)
                result += kept_rows(folder / f"{data.name}-{model}-{method}-{seed}.json", used, make)
    return result


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark and write its rows."""
    torch.set_flush_denormal(True)
    choices = {"models": MODELS, "methods": METHODS}
    args = read_arguments("benchmarks.ordered_latents", __doc__.partition("\n")[0], choices, Recipe, RESULTS, argv)
    recipes = {model: replace(RECIPE, **OWN.get(model, {}) | args.changes) for model in args.models}
    data = load(args.data)
    features = train_features(data, progress=sys.stderr.isatty())
    result = run(data, features.net, args.models, args.methods, args.seeds, recipes, args.part, args.join)
    used = {
        "recipe": asdict(features.recipe),
        "accuracy": features.accuracy,
        "hash": weights_hash(features.net),
    }
    about = {"recipe": {model: asdict(recipe) for model, recipe in recipes.items()}, "features": used}
    write_rows(args, "benchmarks.ordered_latents", result, about)


if __name__ == "__main__":
    main()
