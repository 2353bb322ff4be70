"""What a law of lengths is worth that knows the image: error and bound at equal mean length of the code.

All methods have the same VAE, of `benchmarks.ordered_latents` with all its parts, and the same data, epochs, batches,
optimiser and learning-rate schedule; they differ in where lengths come from in training:

- fixed_uniform, fixed_geometric: nested dropout, from a fixed law;
- vnd: a `MaskSchedule`, with some lengths from a law that is learned by gradients of the bound;
- priced: a `PriceSchedule`, lengths at random prices from what the encoder predicts that they are worth.

Each is then scored with several laws of the lengths of codes, at the price of the same mean length:

- fixed: one length for all images;
- own: the law that training has left;
- distilled: the same encoder after `distil_lengths`, which takes seconds;
- decoded12: no prediction; 12 lengths of each image are decoded;
- exact: all of them.

Recipes are compared on the validation part, as in

    python -m benchmarks.learned_lengths --part validation --first-seed 10 --set full=0.4 --json FILE

with other seeds than those of the final run, which alone scores the test part. Each fit is kept in a file of its own.
"""

import math
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import xarray as xr

from benchmarks import ordered_latents
from benchmarks.recipes import kept_rows, read_arguments, write_rows
from benchmarks.record import rounded
from benchmarks.timing import interleaved_medians
from models.datasets import Dataset, load
from models.ood import Part
from pyro_vnd.autoencoders import GaussianLikelihood, OrderedVAE, mlp_bodies
from pyro_vnd.autoencoders.base import OrderedAutoencoder
from pyro_vnd.diagnostics import evaluate_lengths
from pyro_vnd.distributions import OrderedMask
from pyro_vnd.infer import PriceSchedule, distil_lengths, fit

RESULTS = Path(__file__).parent / "results" / "learned_lengths.json"
PARTS = Path("results") / "learned_lengths"
METHODS = ("fixed_uniform", "fixed_geometric", "vnd", "priced")
LEARNED = ("vnd", "priced")
PRICES = ("low", "high", "full", "explore", "temperature")
MEAN_LENGTHS = (2, 4, 8, 12, 32)
LAWS = {"fixed": "fixed", "own": "own", "model": "distilled", "decoded": "decoded12", "exact": "exact"}
METRICS = {"mse": "mse", "elbo": "elbo_length_paid", "rate": "rate", "share_of_gain": "share_of_gain"}


@dataclass(frozen=True)
class Recipe:
    """What all fits share, and the prices of one of them.

    Attributes:
        epochs: Passes over the training part: with these batches 4,680 steps.
        batch_size: Rows of a batch.
        low: Lowest price, nats a latent.
        high: Highest price.
        full: Share of rows at full length.
        explore: Share of the others at a uniform length.
        temperature: Of the law that lengths are drawn from.
        distil_steps: Steps of `distil_lengths`.
        cost_seconds: Time to spend on what the law costs.
        cost_steps: Steps of a fit whose time is taken, many beside what it does once.
    """

    epochs: int = 12
    batch_size: int = 128
    low: float = 0.2
    high: float = 600.0
    full: float = 0.3
    explore: float = 0.15
    temperature: float = 5.0
    distil_steps: int = 4000
    cost_seconds: float = 30.0
    cost_steps: int = 1000


def build(method: str, image_size: int, recipe: Recipe) -> OrderedAutoencoder:
    """Return an untrained VAE."""
    shared = _shared(recipe)
    if method != "priced":
        return ordered_latents.build("vae" if method == "vnd" else "vae_our_parts", method, image_size, shared)
    shape, num_latents = (1, image_size, image_size), shared.num_latents
    return OrderedVAE(
        shape,
        num_latents,
        prior_latents="autoregressive",
        posterior_lengths="priced",
        bodies=mlp_bodies(shape, hidden=(512, 256)),
        tail="completion",
        likelihood=GaussianLikelihood(num_latents, noise="by_length"),
    )


def fit_arguments(method: str, recipe: Recipe) -> dict[str, Any]:
    """Return what `fit` is given."""
    model = "vae" if method == "vnd" else "vae_our_parts"
    arguments = ordered_latents.fit_arguments(model, method, _shared(recipe))
    if method == "priced":
        arguments["schedule"] = PriceSchedule(recipe.low, recipe.high, recipe.full, recipe.explore, recipe.temperature)
    return arguments


def _shared(recipe: Recipe) -> ordered_latents.Recipe:
    return replace(ordered_latents.RECIPE, epochs=recipe.epochs, batch_size=recipe.batch_size)


def train(method: str, seed: int, data: Dataset, recipe: Recipe) -> OrderedAutoencoder:
    """Fit one method."""
    images = data.train.images
    torch.manual_seed(seed)
    vae = build(method, images.shape[-1], recipe)
    fit(vae, vae.guide, images, **fit_arguments(method, recipe), seed=seed, progress=sys.stderr.isatty())
    return vae.eval()


def rows(method: str, seed: int, data: Dataset, part: Part, recipe: Recipe) -> Iterator[dict[str, Any]]:
    """Fit a method and score it: one row a law, mean length and metric."""
    vae, progress = train(method, seed, data, recipe), sys.stderr.isatty()
    scored = data.test if part == "test" else data.validation
    own: dict[str, OrderedMask] = {}
    if method in LEARNED:
        own["own"] = OrderedMask(logits=torch.cat([vae.lengths(x).logits for x in scored.images.split(1000)]))
    distil_lengths(vae, data.train.images, num_steps=recipe.distil_steps, seed=seed, progress=progress)
    mean_lengths = [m for m in MEAN_LENGTHS if m <= vae.num_latents]
    scores = evaluate_lengths(vae, (scored.images, scored.labels), mean_lengths, laws=own, seed=seed, progress=progress)
    base = {"data": data.name, "model": "vae", "method": method}
    yield from _rows(scores, base, seed)


def _rows(scores: xr.Dataset, base: dict[str, Any], seed: int) -> Iterator[dict[str, Any]]:
    for law, name in LAWS.items():
        if law not in scores["law"].values:
            continue
        for mean_length in scores["mean_length"].values:
            point = scores.sel(seed=seed, law=law, mean_length=mean_length)
            whole = mean_length == scores.attrs["num_latents"]
            wanted = ["mse", "elbo", "rate"] if whole or law == "fixed" else [*METRICS, "correlation"]
            for metric in wanted:
                place = {"law": name, "mean_length": int(mean_length), "seed": seed}
                value = point[metric].item()
                if not math.isnan(value):  # as a share is where nothing is gained
                    yield base | place | {"metric": METRICS.get(metric, metric), "value": rounded(value)}


def run(
    data: Dataset, methods: list[str], seeds: range, recipe: Recipe, part: Part, join: bool = False
) -> list[dict[str, Any]]:
    """Run what is not done yet, unless rows are only to be joined, and return all rows."""
    folder = PARTS if part == "test" else PARTS / part
    result: list[dict[str, Any]] = []
    for seed in seeds:
        for method in methods:
            fields = ("epochs", "batch_size", "distil_steps") + (PRICES if method == "priced" else ())
            used = {field: value for field, value in asdict(recipe).items() if field in fields}
            make = None if join else partial(rows, method, seed, data, part, recipe)
            result += kept_rows(folder / f"{data.name}-{method}-{seed}.json", used, make)
    return result


def cost(image_size: int, recipe: Recipe) -> dict[str, float]:
    """Return the time of an encode with the law of lengths at a price, and of a step that trains it, as ratios.

    The encode is beside that of the same encoder without the law, the step beside one of `vnd`.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        x = torch.rand(recipe.cost_steps * recipe.batch_size, 1, image_size, image_size)
        vaes = {method: build(method, image_size, recipe) for method in ("fixed_uniform", "vnd", "priced")}

        def steps(method: str) -> None:
            arguments = fit_arguments(method, recipe) | {"num_epochs": 1, "optimizer": None}
            fit(vaes[method], vaes[method].guide, x, **arguments, progress=False)

        def encode(method: str, **price: Any) -> None:
            with torch.no_grad():
                vaes[method].eval().encode(x[:1000], **price)

        steps("priced")  # which calibrates it
        encodes = interleaved_medians(
            {
                "plain": partial(encode, "fixed_uniform"),
                "price": partial(encode, "priced", price=5.0),
                "mean": partial(encode, "priced", mean_length=8.0),
            },
            seconds=recipe.cost_seconds,
            min_rounds=5,
        )
        taken = interleaved_medians(
            {method: partial(steps, method) for method in ("vnd", "priced")}, seconds=recipe.cost_seconds, min_rounds=5
        )
    return {
        "encode_at_price": rounded(encodes["price"] / encodes["plain"]),
        "encode_at_mean_length": rounded(encodes["mean"] / encodes["plain"]),
        "training_step": rounded(taken["priced"] / taken["vnd"]),
    }


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark and write its rows."""
    torch.set_flush_denormal(True)
    args = read_arguments(
        "benchmarks.learned_lengths", __doc__.partition("\n")[0], {"methods": METHODS}, Recipe, RESULTS, argv
    )
    recipe = replace(Recipe(), **args.changes)
    data = load(args.data)
    result = run(data, args.methods, args.seeds, recipe, args.part, args.join)
    about = {"recipe": asdict(recipe), "cost": cost(data.train.images.shape[-1], recipe)}
    write_rows(args, "benchmarks.learned_lengths", result, about)


if __name__ == "__main__":
    main()
