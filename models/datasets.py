"""Real images, with a fixed split into training, validation and test parts.

The test part is the publisher's own where there is one, and serves final numbers only. The validation part is drawn
from the rest, every class in the same proportion; whatever is chosen (widths, steps, models) is chosen on it.
"""

import gzip
import math
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

FASHION_MNIST_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # where Debian's package puts it
FASHION_MNIST_URL = (
    "https://github.com/zalandoresearch/fashion-mnist/raw/b2617bb6d3ffa2e429640350f613e3291e10b141/data/fashion/"
)
# Of the files at that address. Debian compresses the same contents anew, so its files have other sums.
FASHION_MNIST_SHA256 = {
    "train-images-idx3-ubyte.gz": "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
    "train-labels-idx1-ubyte.gz": "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
    "t10k-images-idx3-ubyte.gz": "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
    "t10k-labels-idx1-ubyte.gz": "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
}
FASHION_MNIST_ADVICE = "install Debian's dataset-fashion-mnist or set FASHION_MNIST_DIR to a folder with its four files"
FASHION_MNIST_CLASSES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)


class Split(NamedTuple):
    """Images and their labels; `TensorDataset(*split)` makes them a torch data set.

    Attributes:
        images: float32 in [0, 1], shape (N, C, H, W), or (N, C * H * W) if flattened.
        labels: int64, shape (N,), indices into the class names.
    """

    images: torch.Tensor
    labels: torch.Tensor

    def flatten(self) -> "Split":
        """The same with each image as one vector."""
        return Split(self.images.flatten(1), self.labels)


@dataclass(frozen=True)
class Dataset:
    """The three parts of a data set.

    Attributes:
        name: What `load` knows it by.
        train: For fitting.
        validation: For every choice.
        test: For final numbers.
        class_names: One name per label.
        image_shape: (C, H, W), also where the images are flattened.
    """

    name: str
    train: Split
    validation: Split
    test: Split
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]


def load(name: str, *, flatten: bool = False) -> Dataset:
    """Loads a data set by its name, split the same way each time.

    Args:
        name: "digits" (1,797 images of 8x8, which scikit-learn brings) or "fashion-mnist" (70,000 of 28x28).
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


def read_idx(path: Path) -> np.ndarray:
    """Reads an array of bytes in the IDX format of MNIST, gzip-compressed or not.

    Args:
        path: The file; a name that ends in .gz means compressed.

    Returns:
        The array, uint8.

    Raises:
        ValueError: If the file is not a whole IDX file of bytes.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is corrupt: {error}") from error
    # Two zero bytes, the type (8 is uint8), the number of dimensions, and each dimension as a big-endian uint32.
    if len(content) < 4 or content[:3] != b"\0\0\x08":
        raise ValueError(f"{path} is no IDX file of bytes: it starts with {content[:4]!r}")
    start = 4 + 4 * content[3]
    shape = [int.from_bytes(content[i : i + 4]) for i in range(4, start, 4)]
    if len(content) != start + math.prod(shape):
        raise ValueError(f"{path} is truncated or padded: an array of shape {shape} does not take {len(content)} bytes")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _digits() -> Dataset:
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    rest, test = _hold_out(_split(pixels.reshape(-1, 1, 8, 8), labels, white=16), 0.2)
    train, validation = _hold_out(rest, 0.25)
    return Dataset("digits", train, validation, test, tuple("0123456789"), (1, 8, 8))


def _fashion_mnist() -> Dataset:
    folder = _fashion_mnist_folder()
    rest, test = _read_part(folder, "train"), _read_part(folder, "t10k")
    train, validation = _hold_out(rest, 1 / 6)
    _, _, height, width = rest.images.shape
    return Dataset("fashion-mnist", train, validation, test, FASHION_MNIST_CLASSES, (1, height, width))


def _fashion_mnist_folder() -> Path:
    chosen = os.environ.get("FASHION_MNIST_DIR")
    if not chosen and not FASHION_MNIST_FOLDER.is_dir():
        return _download_fashion_mnist()
    folder = Path(chosen) if chosen else FASHION_MNIST_FOLDER
    missing = [name for name in FASHION_MNIST_SHA256 if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"no Fashion-MNIST in {folder} ({', '.join(missing)} missing); {FASHION_MNIST_ADVICE}")
    return folder


def _download_fashion_mnist() -> Path:
    try:
        import pooch

        folder = Path(pooch.os_cache("pyro_vnd")) / "fashion-mnist"
        for name, sha256 in FASHION_MNIST_SHA256.items():
            pooch.retrieve(FASHION_MNIST_URL + name, f"sha256:{sha256}", name, folder, progressbar=True)
    except (ImportError, OSError) as error:
        raise FileNotFoundError(
            f"no Fashion-MNIST in {FASHION_MNIST_FOLDER}, and downloading it failed ({error}); {FASHION_MNIST_ADVICE}"
        ) from error
    return folder


def _read_part(folder: Path, part: str) -> Split:
    images = read_idx(folder / f"{part}-images-idx3-ubyte.gz")
    labels = read_idx(folder / f"{part}-labels-idx1-ubyte.gz")
    if images.ndim != 3 or labels.shape != images.shape[:1] or (labels >= len(FASHION_MNIST_CLASSES)).any():
        raise ValueError(
            f"{folder}: the {part} files do not belong together: images of shape {images.shape}, "
            f"labels of shape {labels.shape} up to {labels.max(initial=0)}"
        )
    return _split(images[:, None], labels, white=255)


def _split(images: np.ndarray, labels: np.ndarray, white: int) -> Split:
    return Split(torch.from_numpy(images.astype(np.float32) / white), torch.from_numpy(labels.astype(np.int64)))


def _hold_out(split: Split, fraction: float) -> tuple[Split, Split]:
    """Returns the rest and a part that has `fraction` of each class, always the same."""
    images, labels = split
    generator = torch.Generator().manual_seed(0)  # of its own: the global one stays as it was
    held = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        members = (labels == label).nonzero().squeeze(-1)
        order = torch.randperm(len(members), generator=generator)
        held[members[order[: round(fraction * len(members))]]] = True
    return Split(images[~held], labels[~held]), Split(images[held], labels[held])


_LOADERS: dict[str, Callable[[], Dataset]] = {"digits": _digits, "fashion-mnist": _fashion_mnist}
NAMES = tuple(_LOADERS)
