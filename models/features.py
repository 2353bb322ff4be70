"""Features of images from a small classifier, for the distances between generated and real images."""

import hashlib
import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from models.datasets import Dataset, Split
from models.sizes import check_sizes

__all__ = ["FOLDER", "FeatureNet", "FeatureRecipe", "TrainedFeatures", "train_features"]

FOLDER = Path("results") / "features"
_COMMITTED = Path(__file__).parent / "weights"
_SHA256 = {"fashion-mnist-9806ec0a4f5b3ccc.pt": "71866dd689563aec6db6f894e9b4f5a5cc4bd3ea881cfdbcab40ff1e7710d21a"}


@dataclass(frozen=True)
class FeatureRecipe:
    """How the net of the features is made.

    Attributes:
        channels: Channels of the convolutions, each of which halves the image.
        num_features: D.
        num_epochs: Passes over the training part.
        batch_size: Rows of a batch.
        lr: Largest learning rate of Adam, which goes up and then down to zero in one cycle.
        seed: Of the weights and of the order of the rows.
    """

    channels: tuple[int, ...] = (32, 64)
    num_features: int = 64
    num_epochs: int = 8
    batch_size: int = 128
    lr: float = 3e-3
    seed: int = 0


class FeatureNet(nn.Module):
    """Convolutional classifier that returns what its last layer sees.

    Its weights are float32 whatever torch's default dtype is.

    Args:
        image_shape: (C, H, W).
        num_classes: Number of classes.
        channels: As in `FeatureRecipe`.
        num_features: D.

    Raises:
        ValueError: If a size is not positive.

    Example:
        >>> net = FeatureNet((1, 8, 8), num_classes=10, num_features=16)
        >>> net(torch.zeros(5, 1, 8, 8)).shape, net.logits(torch.zeros(5, 64)).shape
        (torch.Size([5, 16]), torch.Size([5, 10]))
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        num_classes: int,
        channels: tuple[int, ...] = (32, 64),
        num_features: int = 64,
    ) -> None:
        super().__init__()
        check_sizes("FeatureNet", image_shape=image_shape, num_classes=num_classes)
        check_sizes("FeatureNet", channels=channels, num_features=num_features)
        self.image_shape, self.num_features = image_shape, num_features
        (depth, height, width), dtype = image_shape, torch.float32
        layers: list[nn.Module] = []
        for number in channels:
            layers += [nn.Conv2d(depth, number, 3, stride=2, padding=1, dtype=dtype), nn.SiLU()]
            depth, height, width = number, (height + 1) // 2, (width + 1) // 2
        last = nn.Linear(depth * height * width, num_features, dtype=dtype)
        self.body = nn.Sequential(*layers, nn.Flatten(), last, nn.SiLU())
        self.head = nn.Linear(num_features, num_classes, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return the features of images, shape (N, C, H, W) or flattened: shape (N, D)."""
        return self.body(x.reshape(len(x), *self.image_shape).to(self.head.weight.dtype))

    def logits(self, x: Tensor) -> Tensor:
        """Return the logits of the classes, shape (N, num_classes)."""
        return self.head(self(x))


class TrainedFeatures(NamedTuple):
    """A net of features and how it came about.

    Attributes:
        net: In evaluation mode, without gradients.
        recipe: How it was made.
        accuracy: On the validation part.
    """

    net: FeatureNet
    recipe: FeatureRecipe
    accuracy: float


def train_features(
    data: Dataset,
    recipe: FeatureRecipe | None = None,
    *,
    folder: Path | None = FOLDER,
    committed: bool = True,
    progress: bool = True,
) -> TrainedFeatures:
    """Train a small classifier, or load it if it was trained before, for its features.

    The test part is not looked at. Fashion-MNIST takes about a minute on one core. Another processor gives other
    weights, and distances are comparable only where the weights are the same. So those for Fashion-MNIST and the
    default recipe come with the code, rounded to float16.

    Args:
        data: Images and labels.
        recipe: How to make it.
        folder: Where weights are kept, by data and recipe; None keeps nothing.
        committed: Whether to take the weights that come with the code, if they are for these data and this recipe.
        progress: Whether to show a progress bar.

    Returns:
        The net, its recipe and its accuracy. The caller's random state is left as it was.

    Raises:
        ValueError: If a number of the recipe is not positive, or the file of the weights has been changed.

    Example:
        >>> from models.datasets import load
        >>> net, recipe, accuracy = train_features(load("digits"), folder=None, progress=False)
        >>> net(torch.zeros(2, 1, 8, 8)).shape, accuracy > 0.8
        (torch.Size([2, 64]), True)
    """
    recipe = FeatureRecipe() if recipe is None else replace(recipe, channels=tuple(recipe.channels))
    check_sizes("train_features", num_epochs=recipe.num_epochs, batch_size=recipe.batch_size)
    if not 0 < recipe.lr < float("inf"):
        raise ValueError(f"train_features: `recipe` must have a finite `lr` > 0; got {recipe.lr}")
    name = f"{data.name}-{_key(data, recipe)}.pt"
    path = None if folder is None else folder / name
    if committed and name in _SHA256:
        path = _COMMITTED / name
        _check_hash(path, _SHA256[name])
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        net = FeatureNet(data.image_shape, len(data.class_names), recipe.channels, recipe.num_features)
        if path is not None and path.exists():
            state = torch.load(path, map_location="cpu", weights_only=True)
            net.load_state_dict(state["weights"])
            accuracy = state["accuracy"]
        else:
            _train(net, data.train, recipe, progress)
            accuracy = _accuracy(net, data.validation, recipe.batch_size)
            if path is not None:
                _save(path, {"recipe": asdict(recipe), "accuracy": accuracy, "weights": net.state_dict()})
    return TrainedFeatures(net.eval().requires_grad_(False), recipe, accuracy)


def _train(net: FeatureNet, data: Split, recipe: FeatureRecipe, progress: bool) -> None:
    optimizer = torch.optim.Adam(net.parameters(), recipe.lr)
    starts = range(0, len(data.labels), recipe.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.lr, total_steps=recipe.num_epochs * len(starts))
    for _ in tqdm(range(recipe.num_epochs), desc="features", unit="epoch", disable=not progress):
        order = torch.randperm(len(data.labels))
        for start in starts:
            rows = order[start : start + recipe.batch_size]
            loss = nn.functional.cross_entropy(net.logits(data.images[rows]), data.labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


@torch.no_grad()
def _accuracy(net: FeatureNet, data: Split, batch_size: int) -> float:
    batches = zip(data.images.split(batch_size), data.labels.split(batch_size), strict=True)
    right = sum((net.logits(x).argmax(-1) == y).sum().item() for x, y in batches)
    return right / len(data.labels)


def _key(data: Dataset, recipe: FeatureRecipe) -> str:
    """Hash what the weights depend on, and the validation part, on which the accuracy depends."""
    digest = hashlib.sha256(json.dumps([asdict(recipe), data.image_shape, len(data.class_names)]).encode())
    for part in (data.train, data.validation):
        for values in part:
            digest.update(values.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _check_hash(path: Path, expected: str) -> None:
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != expected:
        raise ValueError(
            f"train_features: the file of the weights must be as it was committed, with SHA-256 {expected}; {path} has "
            f"{found}. Restore it, or give committed=False to train anew"
        )


def _save(path: Path, state: dict[str, object]) -> None:
    """Write a file that is whole or not there: under another name first, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        torch.save(state, unfinished)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
