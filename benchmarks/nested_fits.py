"""How the nets of benchmarks are made and fitted: their recipe, data, architectures and likelihood."""

import sys
from bisect import bisect_left
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import pyro
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.distributions import Normal

from models.datasets import load
from models.nets import mlp, vit
from models.ood import Part, ood_sets
from pyro_vnd.diagnostics import net_cost
from pyro_vnd.distributions import OrderedMask
from pyro_vnd.infer import FitResult, KLWeights, MaskSchedule, NestedELBO, OptimizerSettings, cosine_to_zero, fit
from pyro_vnd.nn import CategoricalLabels, NestedModel, NestedNet, NetLikelihood, nest

__all__ = ["RECIPES", "Data", "Ensemble", "Recipe", "build", "fit_nested", "fit_plain", "member_width", "nested"]


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

    def schedule(self, learned: float) -> MaskSchedule:
        """Return ours with a share of masks from the learned law, and the others in the recipe's proportion."""
        law = OrderedMask(probs=torch.arange(1.0, self.num_blocks + 1) ** -self.budget_power)
        others = (1 - learned) / (self.budget + self.full)
        shares = learned, others * self.budget, others * self.full
        return MaskSchedule(*shares, law, self.num_particles, sliced=self.sliced)


# Compared on the validation part, with the test scores of an earlier recipe known.
RECIPES = {
    "mlp": Recipe(kl_weight=0.02, length_weight=0.02, num_samples=100),
    "cnn": Recipe(
        epochs=12, kl_weight=0.01, length_weight=0.01, budget=0.8, full=0.15, budget_power=1.15, num_particles=5
    ),
    # As the guide of nested nets says; the blocks are heads.
    "vit": Recipe(
        epochs=8,
        num_blocks=4,
        learned=0.0,
        budget=0.9,
        full=0.1,
        budget_power=1.0,
        kl_weight=0.01,
        length_weight=0.01,
        init_scale=0.02,
        local_reparam=False,
        num_samples=10,
    ),
}


class Ensemble(nn.ModuleList):
    """Nets whose outputs are stacked, (S, N, C)."""

    def forward(self, x: Tensor) -> Tensor:
        """Run all of them."""
        return torch.stack([net(x) for net in self])


class PlainModel(PyroModule):
    """The same likelihood without anything random, for independent nets, or several of them at once."""

    def __init__(self, net: nn.Module, likelihood: NetLikelihood) -> None:
        super().__init__()
        self.net, self.likelihood = net, likelihood
        self.members = len(net) if isinstance(net, Ensemble) else 1

    def forward(self, x: Tensor, y: Tensor) -> None:
        """Run the model."""
        law = self.likelihood.law(self.net(x), batch_dim=1 if self.members == 1 else 2)
        with pyro.plate("members", self.members, dim=-2), pyro.plate("data", len(x), dim=-1):
            pyro.sample("label", law, obs=y)


class NoLatents(PyroModule):
    """The guide of a model without latents."""

    def forward(self, *_: Tensor) -> None:
        """Draw nothing."""


@dataclass(frozen=True)
class Data:
    """Standardised images and labels, and images from elsewhere; or tokens, and those that come next.

    Attributes:
        name: Name of the data set.
        train: What is fitted.
        scored: What fits are scored on: the test part, or the validation part where recipes are compared.
        calibration: What temperatures are fitted on: the validation part, unless that is scored.
        ood: Foreign images by name, of the part that is scored.
        likelihood: The law of the labels given the outputs of a net.
    """

    name: str
    train: tuple[Tensor, Tensor]
    scored: tuple[Tensor, Tensor]
    calibration: tuple[Tensor, Tensor] | None
    ood: dict[str, Tensor]
    likelihood: NetLikelihood = field(default_factory=CategoricalLabels)

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

    The CNN is a LeNet whose convolutions have strides in place of pooling, for speed. The transformer sees 4x4 patches,
    and its heads have 16 channels at every width, as those of a nested one.
    """
    if arch == "mlp":
        return mlp(image_size**2, hidden=(round(512 * width), round(512 * width)))
    if arch == "vit":
        heads = max(1, round(4 * width))
        return vit(1, 10, image_size, patch=image_size // 4, dim=16 * heads, depth=4, heads=heads, mlp_ratio=2)
    first, second, hidden = (max(1, round(units * width)) for units in (32, 64, 128))
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


def member_width(arch: str, image_size: int, width: float, members: int) -> float | None:
    """Return the width of nets that together cost as much as one of a given width, within a tenth.

    Nets so small may not be there: then it is None.
    """
    image = torch.zeros(1, 1, image_size, image_size)

    def cost(units: float) -> float:
        return net_cost(build(arch, image_size, units / 512), image)["multiply_adds"]

    share = cost(512 * width) / members
    above = bisect_left(range(1, 512), share, key=cost) + 1
    nearest = min((above, max(1, above - 1)), key=lambda units: abs(cost(units) - share))
    return nearest / 512 if abs(cost(nearest) - share) <= 0.1 * share else None


def prior(recipe: Recipe) -> dict[str, Any]:
    """Return N(0, c^2 / fan_in) for the weights, with a wider one in the first layer."""

    def normal(scale: float, name: str, layer: Any) -> Normal:
        weight = layer.weight
        deviation = scale / weight[0].numel() ** 0.5 if name == "weight" else 1.0
        return Normal(weight.new_tensor(0.0), weight.new_tensor(deviation))

    return {"": partial(normal, recipe.prior_scale), "first": partial(normal, recipe.first_prior_scale)}


def fit_plain(net: nn.Module, seed: int, data: Data, recipe: Recipe) -> FitResult:
    """Fit a net without anything random, or several at once."""
    return fit(PlainModel(net, data.likelihood), NoLatents(), data.train, lr=recipe.lr, **_shared(recipe, seed))


def nested(plain: nn.Module, data: Data, recipe: Recipe, *, bayesian: bool = True, **options: Any) -> NestedNet:
    """Nest a net with the recipe's law of the weights, or with points; `options` are those of `nest`."""
    if bayesian:
        priors = prior(recipe)
        first = next(name for name, module in plain.named_modules() if isinstance(module, nn.Linear | nn.Conv2d))
        options |= {"prior": {first: priors["first"], "": priors[""]}, "init_scale": recipe.init_scale}
    else:
        options |= {"prior": None}
    return nest(plain, data.train[0][:1], **{"num_blocks": recipe.num_blocks} | options)


def fit_nested(
    net: NestedNet, seed: int, data: Data, recipe: Recipe, schedule: MaskSchedule | None, *, bayesian: bool = True
) -> FitResult:
    """Fit a nested net, whose laws have a learning rate of their own."""
    arguments = _shared(recipe, seed) | {"schedule": schedule}
    if bayesian:
        arguments |= {
            "elbo": NestedELBO(local_reparam=recipe.local_reparam),
            "weights": KLWeights(latents=recipe.kl_weight, lengths=recipe.length_weight),
        }
    rates = {"laws": recipe.law_lr * recipe.lr, "*": recipe.lr}
    return fit(NestedModel(net, data.likelihood), net.guide, data.train, lr=rates, **arguments)


def _shared(recipe: Recipe, seed: int) -> dict[str, Any]:
    return {
        "num_epochs": recipe.epochs,
        "batch_size": recipe.batch_size,
        "optimizer": OptimizerSettings(lr_schedule=cosine_to_zero()),
        "seed": seed,
        "progress": sys.stderr.isatty(),
    }
