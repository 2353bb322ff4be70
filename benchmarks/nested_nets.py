"""Nested nets against independent nets, fixed rates and a Bayesian net: accuracy, calibration and detection by width.

Every method has the same architecture, data, epochs, batches, optimiser and learning-rate schedule:

- independent: one deterministic net for each width, trained by itself at that size;
- fixed_geometric, fixed_uniform: nested dropout with a fixed law of the kept fraction, deterministic weights;
- bayes_full: a mean-field Bayesian net, at full width only;
- vnd: ours; a step has `num_particles` passes, most of them narrow, where those above have one;
- vnd_probs_as_logits: ours, but masks are drawn as if probabilities were logits, an ablation.

Recipes are compared on the validation part, as in

    python -m benchmarks.nested_nets --part validation --first-seed 10 --set kl_weight=0.02 --json FILE

with other seeds and other foreign images than those of the final run, which alone scores the test part. Each fit is
kept in a file of its own as soon as it is done, so that a run that is interrupted goes on from there.
"""

import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pyro
import pyro.distributions as dist
import torch
import xarray as xr
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.distributions import Normal

from benchmarks.recipes import kept_rows, read_arguments
from benchmarks.record import header, rounded, write_json
from models.datasets import load
from models.nets import mlp
from models.ood import Part, ood_sets
from pyro_vnd.diagnostics import evaluate, evaluate_learned, evaluate_widths, net_cost
from pyro_vnd.distributions import OrderedMask, OrderedMaskStraightThrough
from pyro_vnd.infer import FitResult, MaskSchedule, cosine_to_zero, fit
from pyro_vnd.nn import NestedClassifier, NestedNet, Width, nest

RESULTS = Path(__file__).parent / "results" / "nested_nets.json"
PARTS = Path("results") / "nested_nets"
WIDTHS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1.0)
METHODS = ("independent", "fixed_geometric", "fixed_uniform", "bayes_full", "vnd", "vnd_probs_as_logits")
SCALARS = (
    *("accuracy", "nll", "brier", "ece", "adaptive_ece", "entropy", "mutual_information"),
    *("temperature", "nll_calibrated", "ece_calibrated", "multiply_adds", "parameters"),
)


@dataclass(frozen=True)
class Recipe:
    """What all methods share, and what only some of them have.

    Attributes:
        epochs: Passes over the training part.
        batch_size: Rows of a batch.
        lr: Largest learning rate of Adam, which rises for a twentieth of the steps and falls to zero on a cosine.
        num_blocks: Blocks of a channel group.
        law_lr: Factor on the learning rate of the laws of lengths.
        kl_weight: Weight of the KL of the weights.
        length_weight: Weight of the KL of the lengths.
        prior_scale: Standard deviation of the prior of weights in units of 1 / sqrt(fan_in).
        first_prior_scale: The same for the first layer.
        init_scale: Starting deviation of the posterior, as a share of the prior's.
        learned: Share of masks drawn from the learned law.
        budget: Share of masks at a budget common to all groups, k of 16 blocks with probability proportional to
            k^-budget_power.
        full: Share of masks at full width.
        budget_power: Exponent of the law of budgets.
        num_particles: Evaluations of the ELBO in a step, whose widths are a systematic sample.
        sliced: Whether each of them has one budget for the whole batch and computes only what that keeps.
        keep: Rate of the fixed geometric law.
        local_reparam: What draws its outputs rather than its weights in training.
        num_samples: Draws of the weights in evaluation.
    """

    epochs: int = 20
    batch_size: int = 256
    lr: float = 3e-3
    num_blocks: int = 16
    law_lr: float = 10.0
    kl_weight: float = 0.0125
    length_weight: float = 0.0125
    prior_scale: float = 1.0
    first_prior_scale: float = 2.0
    init_scale: float = 0.1
    learned: float = 0.05
    budget: float = 0.85
    full: float = 0.1
    budget_power: float = 0.9
    num_particles: int = 4
    sliced: bool = True
    keep: float = 0.85
    local_reparam: Literal["linear"] | bool = "linear"
    num_samples: int = 30


# Compared on the validation part, with the test scores of an earlier recipe known.
RECIPES = {
    "mlp": Recipe(kl_weight=0.02, length_weight=0.02, num_samples=100),
    "cnn": Recipe(
        epochs=12, kl_weight=0.01, length_weight=0.01, budget=0.8, full=0.15, budget_power=1.15, num_particles=5
    ),
}


class ProbsAsLogits(OrderedMaskStraightThrough):
    """A mask drawn as the published code draws it: probabilities handed to a sampler that wants logits."""

    def rsample(self, sample_shape: torch.Size | list[int] | tuple[int, ...] = torch.Size()) -> Tensor:
        """Draw from softmax(p) rather than p, with Gumbel noise."""
        return OrderedMaskStraightThrough(self.temperature, logits=self.probs, noise="gumbel").rsample(sample_shape)


class ProbsAsLogitsWidth(Width):
    """A width whose masks are drawn that way; its law, and so its KL, stays right."""

    @property
    def posterior(self) -> OrderedMaskStraightThrough:
        """Posterior law of the mask."""
        return ProbsAsLogits(self.temperature, logits=self.logits)


class Classifier(PyroModule):
    """The same likelihood without anything random, for independent nets."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, y: Tensor) -> None:
        """Run the model."""
        logits = self.net(x)
        with pyro.plate("data", len(x)):
            pyro.sample("label", dist.Categorical(logits=logits), obs=y)


class NoLatents(PyroModule):
    """The guide of a model without latents."""

    def forward(self, *_: Tensor) -> None:
        """Draw nothing."""


@dataclass(frozen=True)
class Data:
    """Standardised images and labels, and images from elsewhere.

    Attributes:
        name: Name of the data set.
        train: What is fitted.
        scored: What fits are scored on: the test part, or the validation part where recipes are compared.
        calibration: What temperatures are fitted on: the validation part, unless that is scored.
        ood: Foreign images by name, of the part that is scored.
    """

    name: str
    train: tuple[Tensor, Tensor]
    scored: tuple[Tensor, Tensor]
    calibration: tuple[Tensor, Tensor] | None
    ood: dict[str, Tensor]

    @classmethod
    def load(cls, name: str, part: Part = "test") -> "Data":
        """Load a data set; pixels are centred and scaled by the mean and deviation of the training images."""
        data = load(name)
        mean, deviation = data.train.images.mean(), data.train.images.std()

        def scaled(x: Tensor) -> Tensor:
            return (x - mean) / deviation

        train, validation, test = (
            (scaled(split.images), split.labels) for split in (data.train, data.validation, data.test)
        )
        images = (data.test if part == "test" else data.validation).images
        foreign = {key: scaled(x) for key, x in ood_sets(images, split=part).items() if key != name}
        if part == "test":
            return cls(name, train, test, validation, foreign)
        return cls(name, train, validation, None, foreign)

    @property
    def image_size(self) -> int:
        """Height and width of an image."""
        return self.train[0].shape[-1]


def build(arch: str, image_size: int, width: float = 1.0) -> nn.Module:
    """Return a plain net whose hidden layers have a share of their units.

    The CNN is a LeNet whose convolutions have strides in place of pooling, for speed.
    """
    if arch == "mlp":
        return mlp(image_size**2, hidden=(round(512 * width), round(512 * width)))
    first, second, hidden = round(32 * width), round(64 * width), round(128 * width)
    side = ((image_size - 3) // 3 + 2) // 2  # strides of three and of two
    return nn.Sequential(
        nn.Conv2d(1, first, 5, stride=3, padding=1),
        nn.ReLU(),
        nn.Conv2d(first, second, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(second * side**2, hidden),
        nn.ReLU(),
        nn.Linear(hidden, 10),
    )


def prior(recipe: Recipe) -> dict[str, Any]:
    """Return N(0, c^2 / fan_in) for the weights, with a wider one in the first layer."""

    def normal(scale: float, name: str, layer: Any) -> Normal:
        weight = layer.weight
        deviation = scale / weight[0].numel() ** 0.5 if name == "weight" else 1.0
        return Normal(weight.new_tensor(0.0), weight.new_tensor(deviation))

    return {"": partial(normal, recipe.prior_scale), "first": partial(normal, recipe.first_prior_scale)}


def train(method: str, arch: str, seed: int, data: Data, recipe: Recipe, width: float = 1.0) -> tuple[Any, FitResult]:
    """Fit one method, and return the nested net, or the plain one of the given width, and the record of the fit."""
    torch.manual_seed(seed)
    plain = build(arch, data.image_size, width if method == "independent" else 1.0)
    arguments: dict[str, Any] = {
        "num_epochs": recipe.epochs,
        "batch_size": recipe.batch_size,
        "lr": recipe.lr,
        "lr_schedule": cosine_to_zero(),
        "optimizer": partial(torch.optim.Adam, fused=True),
        "seed": seed,
        "progress": sys.stderr.isatty(),
    }
    if method == "independent":
        return plain, fit(Classifier(plain), NoLatents(), data.train, **arguments)
    example = data.train[0][:1]
    if method.startswith("fixed"):
        net = nest(plain, example, num_blocks=recipe.num_blocks, prior=None)
        law = "uniform" if method == "fixed_uniform" else OrderedMask.geometric(recipe.keep, recipe.num_blocks)
        arguments["schedule"] = MaskSchedule(learned=0, budget=1, full=0, law=law)
    else:
        priors = prior(recipe)
        first = next(name for name, module in plain.named_modules() if isinstance(module, nn.Linear | nn.Conv2d))
        net = nest(
            plain,
            example,
            num_blocks=recipe.num_blocks,
            prior={first: priors["first"], "": priors[""]},
            init_scale=recipe.init_scale,
        )
        budgets = torch.arange(1.0, recipe.num_blocks + 1) ** -recipe.budget_power
        law, sliced = OrderedMask(probs=budgets), recipe.sliced
        schedule = MaskSchedule(recipe.learned, recipe.budget, recipe.full, law, recipe.num_particles, sliced=sliced)
        if method == "bayes_full":
            schedule = MaskSchedule(learned=0, budget=0, full=1, sliced=sliced)
        if method == "vnd_probs_as_logits":
            for group in net.widths.values():
                group.__class__ = ProbsAsLogitsWidth
        arguments |= {
            "schedule": schedule,
            "local_reparam": recipe.local_reparam,
            "kl_weight": recipe.kl_weight,
            "length_weight": recipe.length_weight,
        }
    laws = {id(group.logits) for group in net.widths.values()}

    def adam(parameters: list[Tensor], lr: float) -> torch.optim.Adam:
        groups: list[dict[str, Any]] = [
            {"params": [p for p in parameters if id(p) not in laws]},
            {"params": [p for p in parameters if id(p) in laws], "lr": recipe.law_lr * lr},
        ]
        return torch.optim.Adam([group for group in groups if group["params"]], lr=lr, fused=True)

    return net, fit(NestedClassifier(net), net.guide, data.train, **arguments | {"optimizer": adam})


def rows(method: str, arch: str, seed: int, data: Data, recipe: Recipe) -> Iterator[dict[str, Any]]:
    """Fit a method and score it: one row a width and metric."""
    shared: dict[str, Any] = {
        "ood": data.ood,
        "calibrate": data.calibration,
        "seed": seed,
        "batch_size": 1000,
        "progress": sys.stderr.isatty(),
    }
    base = {"data": data.name, "arch": arch, "method": method, "seed": seed}

    def flat(result: xr.Dataset, width: float | str, seconds: float) -> Iterator[dict[str, Any]]:
        values = {name: result[name].item() for name in SCALARS if name in result} | {"fit_seconds": seconds}
        for metric in ("auroc", "aupr", "fpr95"):
            for score in result["score"].values:
                by_set = result[metric].sel(score=score)
                values[f"{metric}/{score}"] = by_set.mean().item()
                if metric == "auroc":
                    values |= {f"{metric}/{score}/{key}": by_set.sel(ood=key).item() for key in result["ood"].values}
        for metric, value in values.items():
            yield base | {"width": width, "metric": metric, "value": rounded(value)}

    if method == "independent":
        for width in WIDTHS:
            net, record = train(method, arch, seed, data, recipe, width)
            result = evaluate(net, data.scored, **shared)
            cost = net_cost(net, data.scored[0][:1])
            yield from flat(result.assign({name: ((), value) for name, value in cost.items()}), width, record.seconds)
        return
    net, record = train(method, arch, seed, data, recipe)
    assert isinstance(net, NestedNet)
    num_samples = 1 if method.startswith("fixed") else recipe.num_samples
    widths = (1.0,) if method == "bayes_full" else WIDTHS
    result = evaluate_widths(net, data.scored, widths, num_samples, **shared)
    for width in widths:
        yield from flat(result.sel(width=width), width, record.seconds)
    if method == "vnd":
        yield from flat(evaluate_learned(net, data.scored, num_samples, **shared), "learned", record.seconds)
        for name, law in net.laws.items():
            group = name.removesuffix(".mask")
            facts = {
                "mean_length": law.mean_length,
                "stddev_length": law.stddev_length,
                "entropy_length": law.entropy(),
            }
            for fact, value in facts.items():
                yield base | {"width": "learned", "metric": f"{fact}/{group}", "value": rounded(value.item())}


def run(
    name: str,
    archs: list[str],
    methods: list[str],
    seeds: range,
    recipes: dict[str, Recipe],
    part: Part = "test",
    join: bool = False,
) -> list[dict[str, Any]]:
    """Run what is not done yet, unless rows are only to be joined, and return all rows."""
    data = Data.load(name, part)
    folder = PARTS if part == "test" else PARTS / part
    result: list[dict[str, Any]] = []
    for arch in archs:
        for seed in seeds:
            for method in methods:
                recipe = recipes[arch]
                used = {field: value for field, value in asdict(recipe).items() if uses(method, field)}
                make = None if join else partial(rows, method, arch, seed, data, recipe)
                result += kept_rows(folder / f"{name}-{arch}-{method}-{seed}.json", used, make)
    return result


def uses(method: str, field: str) -> bool:
    """Say whether a method depends on a field of the recipe."""
    shared = {"epochs", "batch_size", "lr"}
    fixed = shared | {"num_blocks", "keep"}
    of_masks = {"law_lr", "length_weight", "learned", "budget", "full", "budget_power", "num_particles", "sliced"}
    if method == "independent":
        return field in shared
    if method.startswith("fixed"):
        return field in fixed
    return field != "keep" and (method != "bayes_full" or field not in of_masks)


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark and write its rows."""
    torch.set_flush_denormal(True)  # moments of weights that are long without a gradient
    choices = {"arch": tuple(RECIPES), "methods": METHODS}
    args = read_arguments("benchmarks.nested_nets", __doc__.partition("\n")[0], choices, Recipe, RESULTS, argv)
    recipes = {arch: replace(recipe, **args.changes) for arch, recipe in RECIPES.items()}
    result = run(args.data, args.arch, args.methods, args.seeds, recipes, args.part, args.join)
    recipe = {arch: asdict(recipes[arch]) for arch in args.arch}
    content = {"header": header("benchmarks.nested_nets") | {"part": args.part, "recipe": recipe}, "rows": result}
    write_json(args.json, content, table="rows")


if __name__ == "__main__":
    main()
