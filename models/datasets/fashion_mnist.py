"""Fashion-MNIST (Xiao, Rasul & Vollgraf, arXiv 1708.07747), and the IDX format that it has from MNIST."""

import math
from pathlib import Path

import numpy as np

from models.datasets.files import Source, read_gzip
from models.datasets.split import Dataset, Split, hold_out, make_split

SOURCE = Source(
    title="Fashion-MNIST",
    name="fashion-mnist",
    variable="FASHION_MNIST_DIR",
    url="https://github.com/zalandoresearch/fashion-mnist/raw/b2617bb6d3ffa2e429640350f613e3291e10b141/data/fashion/",
    sha256={
        "train-images-idx3-ubyte.gz": "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
        "train-labels-idx1-ubyte.gz": "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
        "t10k-images-idx3-ubyte.gz": "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
        "t10k-labels-idx1-ubyte.gz": "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
    },
    advice="install Debian's dataset-fashion-mnist or set FASHION_MNIST_DIR to a folder with its four files",
    installed=Path("/usr/share/datasets/fashion-mnist"),  # by Debian's package
)
FASHION_MNIST_CLASSES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)


def load() -> Dataset:
    """Loads the 70,000 images; the validation part is as large as the test part, 10,000."""
    folder = SOURCE.folder()
    rest, test = _read_part(folder, "train"), _read_part(folder, "t10k")
    train, validation = hold_out(rest, 1 / 6)
    _, _, height, width = rest.images.shape
    return Dataset(SOURCE.name, train, validation, test, FASHION_MNIST_CLASSES, (1, height, width))


def read_idx(path: Path) -> np.ndarray:
    """Reads an array of bytes in the IDX format of MNIST, gzip-compressed or not.

    Args:
        path: The file; a name that ends in .gz means compressed.

    Returns:
        The array, uint8.

    Raises:
        ValueError: If the file is not a whole IDX file of bytes.
    """
    content = read_gzip(path) if path.suffix == ".gz" else path.read_bytes()
    # Two zero bytes, the type (8 is uint8), the number of dimensions, and each dimension as a big-endian uint32.
    if len(content) < 4 or content[:3] != b"\0\0\x08":
        raise ValueError(f"{path} is no IDX file of bytes: it starts with {content[:4]!r}")
    start = 4 + 4 * content[3]
    shape = [int.from_bytes(content[i : i + 4]) for i in range(4, start, 4)]
    if len(content) != start + math.prod(shape):
        raise ValueError(f"{path} is truncated or padded: an array of shape {shape} does not take {len(content)} bytes")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _read_part(folder: Path, part: str) -> Split:
    images = read_idx(folder / f"{part}-images-idx3-ubyte.gz")
    labels = read_idx(folder / f"{part}-labels-idx1-ubyte.gz")
    if images.ndim != 3 or labels.shape != images.shape[:1] or (labels >= len(FASHION_MNIST_CLASSES)).any():
        raise ValueError(
            f"{folder}: the {part} files do not belong together: images of shape {images.shape}, "
            f"labels of shape {labels.shape} up to {labels.max(initial=0)}"
        )
    return make_split(images[:, None], labels, white=255)
