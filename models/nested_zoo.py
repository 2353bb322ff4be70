"""Any net of `models.nets`, nested, trained on real images, scored by width, and narrowed."""

import json
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
import xarray as xr
from matplotlib.figure import Figure, SubFigure
from torch import Tensor, nn

from models.datasets import Dataset, Split, load
from models.nets import build
from models.nets.build import Size
from models.ood import ood_sets
from models.output import atomic_folder, is_first_process, print_table, versions
from pyro_vnd.diagnostics import (
    evaluate,
    evaluate_learned,
    evaluate_widths,
    plot_elbo,
    plot_laws,
    plot_ood,
    plot_reliability,
    plot_widths,
)
from pyro_vnd.infer import FitResult, KLWeights, MaskSchedule, NestedELBO, OptimizerSettings, cosine_to_zero, fit
from pyro_vnd.nn import NestedClassifier, NestedNet, narrow, nest, recalibrate_batchnorm

WIDTHS = (0.125, 0.25, 0.5, 1.0)


@dataclass(frozen=True)
class Recipe:
    """How a net is trained on one data set.

    Attributes:
        epochs: Passes over the training part.
        batch_size: Rows of a batch.
        lr: Largest learning rate; it falls to zero on a cosine.
        num_blocks: Blocks of a group of channels, at most.
        kl_weight: Weight of the KL of weights and of lengths; at one, mean-field posteriors of whole nets underfit, and
            the laws of lengths hardly leave their prior.
        num_samples: Draws of the weights in evaluation.
        num_recalibrate: Training images that give BatchNorm the statistics of a width.
    """

    epochs: int
    batch_size: int
    lr: float = 0.005
    num_blocks: int = 16
    kl_weight: float = 0.05
    num_samples: int = 10
    num_recalibrate: int = 1000


RECIPES = {
    "digits": Recipe(epochs=30, batch_size=64, lr=0.01),
    "fashion-mnist": Recipe(epochs=8, batch_size=256),
    "cifar-10": Recipe(epochs=60, batch_size=256),
    "svhn": Recipe(epochs=20, batch_size=256),
}


def run(
    net_name: str,
    data_name: str,
    out: Path,
    *,
    widths: Sequence[float] = WIDTHS,
    epochs: int | None = None,
    size: Size = "small",
    device: str = "cpu",
    seed: int = 0,
) -> dict[str, Any]:
    """Nest a net, fit it, print how good it is at each width, and write metrics.json, the figures and state.pt.

    Widths are scored on the test part. The one that is narrowed is chosen on the validation part: the least whose
    accuracy there is within a standard error of the best.

    Args:
        net_name: A name in `models.nets.NETS`.
        data_name: A data set that `models.datasets.load` knows.
        out: Folder for the results; it is made, and changed only once everything is there.
        widths: Shares of the units at which the net is scored, in (0, 1].
        epochs: Passes over the training part; by default those of the recipe.
        size: "small", or "full" for the published sizes.
        device: Where the net is trained and scored, "cpu" or "cuda".
        seed: Seed of the initial weights, the training and the draws.

    Returns:
        The content of metrics.json; of other processes than the first, which only train with it, nothing.

    Raises:
        ValueError: If the net, the data set or a width is unknown, data are corrupt, or there is no GPU.
        OSError: If data are missing or the folder cannot be written.
        NonFiniteLossError: If training diverges.
    """
    if device != "cpu" and not torch.cuda.is_available():
        raise ValueError(f"torch finds no GPU here; got device {device!r}")
    started = time.perf_counter()
    data = load(data_name)
    recipe = RECIPES[data_name] if epochs is None else replace(RECIPES[data_name], epochs=epochs)
    net = make(net_name, data.image_shape, len(data.class_names), size, recipe.num_blocks, seed).to(device)
    data = replace(data, train=Split(*(rows.to(device) for rows in data.train)))
    for width in widths:  # before an hour goes into the fit
        with net.cut(width, rounding="nearest"):
            pass
    if not is_first_process():
        train(net, data, recipe, seed)
        return {}
    with atomic_folder(out) as folder:
        groups = ", ".join(f"{name} ({width.num_units})" for name, width in net.widths.items())
        print(f"{net_name}, {size}, on {data.name}: {len(data.train.labels)} images; groups (units): {groups}")
        result = train(net, data, recipe, seed)
        print(result)
        scores, learned = score(net, data, widths, recipe, seed)
        print_table(*_table(scores, learned))
        chosen, narrowed = choose(net, data, sorted(widths), recipe)
        print(f"narrowed to {chosen:g}, which validation cannot tell from the best width: {out / 'state.pt'}")
        save_state(folder / "state.pt", net, narrowed, chosen, net_name, data, size, recipe.num_blocks)
        _write_figures(folder, net, result, scores)
        metrics = {
            "header": {
                "command": f"python -m models nest {net_name} --data {data.name} --epochs {recipe.epochs} --seed {seed}"
                f" --widths {' '.join(f'{width:g}' for width in widths)}" + (" --full" if size == "full" else ""),
                "recipe": asdict(recipe),
                "device": device,
                "versions": versions(),
                "seconds": round(time.perf_counter() - started, 1),
            },
            "widths": [{"width": width, **_numbers(scores.sel(width=width))} for width in scores["width"].values],
            "learned": _numbers(learned),
            "narrowed": chosen,
            "fit": {"elbo": result.elbo[-1], "log_likelihood": result.log_likelihood[-1], "kl": result.kl[-1]},
            "keep_probs": {name: [round(p, 5) for p in law.keep_probs.tolist()] for name, law in net.laws.items()},
        }
        (folder / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    return metrics


class Standardize(nn.Module):
    """Centres and scales pixels; a part of the net, so that a narrowed net takes the same images.

    Args:
        num_channels: Channels of an image.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(num_channels, 1, 1))
        self.register_buffer("deviation", torch.ones(num_channels, 1, 1))

    def measure(self, images: Tensor) -> None:
        """Take mean and deviation of each channel from training images."""
        self.mean.copy_(images.mean((0, 2, 3))[:, None, None])
        self.deviation.copy_(images.std((0, 2, 3))[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        """Return the images, shape (N, C, H, W), with every channel centred and scaled."""
        return (x - self.mean) / self.deviation


def make(
    net_name: str, image_shape: tuple[int, int, int], num_classes: int, size: Size, num_blocks: int, seed: int = 0
) -> NestedNet:
    """Build a net behind `Standardize`, and nest both."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = {"pixels": Standardize(image_shape[0]), "net": build(net_name, image_shape, num_classes, size)}
        return nest(nn.Sequential(OrderedDict(layers)), torch.zeros(2, *image_shape), num_blocks=num_blocks)


def train(net: NestedNet, data: Dataset, recipe: Recipe, seed: int = 0) -> FitResult:
    """Fit a nested net so that every width is trained, whatever law of widths it learns."""
    pixels = net.get_submodule("net.pixels")
    assert isinstance(pixels, Standardize)
    pixels.measure(data.train.images)
    return fit(
        NestedClassifier(net),
        net.guide,
        data.train,
        num_epochs=recipe.epochs,
        batch_size=recipe.batch_size,
        lr=recipe.lr,
        optimizer=OptimizerSettings(lr_schedule=cosine_to_zero()),
        weights=KLWeights(latents=recipe.kl_weight, lengths=recipe.kl_weight),
        schedule=MaskSchedule(),
        elbo=NestedELBO(local_reparam=True),
        seed=seed,
    )


def score(
    net: NestedNet, data: Dataset, widths: Sequence[float], recipe: Recipe, seed: int = 0
) -> tuple[xr.Dataset, xr.Dataset]:
    """Score a net on the test part, by width and at its learned law of widths."""
    ood: dict[str, Tensor] = {}
    if data.image_shape[0] == 1:
        ood = ood_sets(data.test.images)
        if data.name == "digits":
            del ood["digits"]  # they are at home here
    shared: dict[str, Any] = {"num_samples": recipe.num_samples, "ood": ood, "calibrate": data.validation, "seed": seed}
    by_width = evaluate_widths(net, data.test, widths, rounding="nearest", recalibrate=_inputs(data, recipe), **shared)
    return by_width, evaluate_learned(net, data.test, **shared)


def choose(net: NestedNet, data: Dataset, widths: Sequence[float], recipe: Recipe) -> tuple[float, nn.Module]:
    """Return the least of the ascending widths that validation cannot tell from the best one, and the net cut to it."""
    nets, accuracy = {}, {}
    for width in widths:
        narrowed = narrow(net, width, rounding="nearest").eval()
        nets[width] = recalibrate_batchnorm(narrowed, _inputs(data, recipe))
        accuracy[width] = evaluate(nets[width], data.validation, progress=False)["accuracy"].item()
    best = max(accuracy.values())
    error = (best * (1 - best) / len(data.validation.labels)) ** 0.5
    chosen = next(width for width in widths if accuracy[width] >= best - error)
    return chosen, nets[chosen]


def save_state(
    path: Path,
    net: NestedNet,
    narrowed: nn.Module,
    width: float,
    net_name: str,
    data: Dataset,
    size: Size,
    num_blocks: int,
) -> None:
    """Write the tensors of a nested net and of the net cut to a width, and the arguments of `make` for both."""
    state = {
        "make": {
            "net_name": net_name,
            "image_shape": data.image_shape,
            "num_classes": len(data.class_names),
            "size": size,
            "num_blocks": num_blocks,
        },
        "nested": net.state_dict(),
        "width": width,
        "narrowed": narrowed.state_dict(),
    }
    torch.save(state, path)


def load_state(path: Path) -> tuple[NestedNet, nn.Module]:
    """Read what `save_state` wrote: the nested net and the narrowed one, in evaluation mode.

    The file has tensors only, so that reading it runs no code of whoever wrote it.
    """
    state = torch.load(path, map_location="cpu", weights_only=True)
    net = make(**state["make"]).eval()
    net.load_state_dict(state["nested"])
    narrowed = narrow(net, state["width"], rounding="nearest")
    narrowed.load_state_dict(state["narrowed"])
    return net, narrowed


def _inputs(data: Dataset, recipe: Recipe) -> Tensor:
    return data.train.images[: recipe.num_recalibrate]


def _table(scores: xr.Dataset, learned: xr.Dataset) -> tuple[list[str], list[list[str]]]:
    header = ["width", "accuracy", "NLL", "ECE", *(["AUROC"] if "auroc" in scores else []), "parameters"]
    parts = [(f"{width:.3f}", scores.sel(width=width)) for width in scores["width"].values] + [("learned", learned)]
    rows = []
    for label, result in parts:
        cells = [f"{result[name].item():.3f}" for name in ("accuracy", "nll", "ece")]
        if "auroc" in result:
            cells.append(f"{result['auroc'].sel(score='entropy').mean().item():.3f}")
        rows.append([label, *cells, f"{result['parameters'].item():,}" if "parameters" in result else ""])
    return header, rows


def _numbers(result: xr.Dataset) -> dict[str, Any]:
    """Return the scalars of one width, and the AUROC of the entropy by foreign set."""
    numbers = {str(name): values.item() for name, values in result.data_vars.items() if values.size == 1}
    if "auroc" in result:
        auroc = result["auroc"].sel(score="entropy").squeeze("seed")
        numbers["auroc"] = {str(name): auroc.sel(ood=name).item() for name in auroc["ood"].values}
    return numbers


def _write_figures(folder: Path, net: NestedNet, result: FitResult, scores: xr.Dataset) -> None:
    figures: dict[str, Figure | SubFigure] = {
        "metrics": plot_widths(scores)[0].figure,
        "reliability": plot_reliability(scores)[0].figure,
        "laws": plot_laws(net.laws, figsize=(7, 4)).figure,
        "elbo": plot_elbo(result, figsize=(6, 2.8)).figure,
    }
    if "auroc" in scores:
        figures["ood"] = plot_ood(scores)[0].figure
    for name, figure in figures.items():
        assert isinstance(figure, Figure)
        figure.savefig(folder / f"{name}.png", dpi=150)
        plt.close(figure)
