"""Street View House Numbers (Netzer et al., "Reading Digits in Natural Images", 2011), the cropped digits."""

import io
from pathlib import Path

import numpy as np

from models.datasets.files import Source
from models.datasets.split import Dataset, Split, hold_out, make_split

SOURCE = Source(
    title="SVHN",
    name="svhn",
    variable="SVHN_DIR",
    url="http://ufldl.stanford.edu/housenumbers/",
    sha256={
        "train_32x32.mat": "435e94d69a87fde4fd4d7f3dd208dfc32cb6ae8af2240d066de1df7508d083b8",
        "test_32x32.mat": "cdce80dfb2a2c4c6160906d0bd7c68ec5a99d7ca4831afa54f09182025b6a75b",
    },
    advice="set SVHN_DIR to a folder with train_32x32.mat and test_32x32.mat",
)
IMAGE_SHAPE = (3, 32, 32)


def load() -> Dataset:
    """Loads the 99,289 images: 73,257 less a tenth of each class for validation, and 26,032 for testing."""
    folder = SOURCE.folder()
    rest, test = (_read_part(folder / f"{part}_32x32.mat") for part in ("train", "test"))
    train, validation = hold_out(rest, 0.1)
    return Dataset(SOURCE.name, train, validation, test, tuple("0123456789"), IMAGE_SHAPE)


def _read_part(path: Path) -> Split:
    from scipy.io import loadmat  # type: ignore[import-untyped]

    content = io.BytesIO(path.read_bytes())
    try:
        arrays = loadmat(content, variable_names=("X", "y"))
    # For a broken file it raises whatever its parser stumbles over: zlib.error, OSError, TypeError, IndexError...
    except Exception as error:
        raise ValueError(f"{path} is corrupt: {error}") from error
    images, labels = (np.asarray(arrays.get(name)) for name in ("X", "y"))
    if images.dtype != np.uint8 or images.shape[:-1] != (32, 32, 3) or labels.shape != (images.shape[-1], 1):
        raise ValueError(
            f"{path}: X is {images.dtype} of shape {images.shape} and y of shape {labels.shape}; "
            "expected uint8 of shape (32, 32, 3, N), and (N, 1)"
        )
    if not np.isin(labels, range(1, 11)).all():
        raise ValueError(f"{path}: y goes from {labels.min()} to {labels.max()}; expected whole numbers from 1 to 10")
    return make_split(images.transpose(3, 2, 0, 1), labels[:, 0] % 10, white=255)  # the digit 0 has label 10
