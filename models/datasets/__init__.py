"""Real images, with a fixed split into training, validation and test parts.

The test part is the publisher's own where there is one, and serves final numbers only. The validation part is drawn
from the rest, every class in the same proportion; whatever is chosen (widths, steps, models) is chosen on it.
"""

from collections.abc import Callable
from dataclasses import replace

from models.datasets import cifar10, digits, fashion_mnist, svhn
from models.datasets.cifar10 import CIFAR10_CLASSES
from models.datasets.fashion_mnist import FASHION_MNIST_CLASSES, read_idx
from models.datasets.split import Dataset, Split

__all__ = ["CIFAR10_CLASSES", "FASHION_MNIST_CLASSES", "NAMES", "Dataset", "Split", "load", "read_idx"]

_LOADERS: dict[str, Callable[[], Dataset]] = {
    "digits": digits.load,
    "fashion-mnist": fashion_mnist.load,
    "cifar-10": cifar10.load,
    "svhn": svhn.load,
}
NAMES = tuple(_LOADERS)


def load(name: str, *, flatten: bool = False) -> Dataset:
    """Loads a data set by its name, split the same way each time.

    Args:
        name: "digits" (1,797 images of 1x8x8, which scikit-learn brings), "fashion-mnist" (70,000 of 1x28x28),
            "cifar-10" (60,000 of 3x32x32) or "svhn" (99,289 of 3x32x32).
        flatten: Whether each image becomes one vector.

    Returns:
        The data set; its images are float32 whatever torch's default dtype is.

    Raises:
        ValueError: If no data set has that name, or its files are corrupt.
        FileNotFoundError: If its files are neither here nor to be had.

    Example:
        >>> digits = load("digits", flatten=True)
        >>> [len(part.labels) for part in (digits.train, digits.validation, digits.test)]
        [1079, 359, 359]
        >>> digits.image_shape, digits.train.images.shape
        ((1, 8, 8), torch.Size([1079, 64]))
    """
    if name not in _LOADERS:
        raise ValueError(f"unknown data set {name!r}; known are {', '.join(NAMES)}")
    data = _LOADERS[name]()
    if not flatten:
        return data
    return replace(data, train=data.train.flatten(), validation=data.validation.flatten(), test=data.test.flatten())
