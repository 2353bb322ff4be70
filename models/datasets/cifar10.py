"""CIFAR-10 (Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009).

Of its three forms this reads the binary one: the Python form is pickles, and a pickle from the net can run any code.
"""

import io
import tarfile
from pathlib import Path

import numpy as np

from models.datasets.files import Source, read_gzip
from models.datasets.split import Dataset, Split, hold_out, make_split

ARCHIVE = "cifar-10-binary.tar.gz"
SOURCE = Source(
    title="CIFAR-10",
    name="cifar-10",
    variable="CIFAR10_DIR",
    url="https://www.cs.toronto.edu/~kriz/",
    sha256={ARCHIVE: "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"},
    advice=f"set CIFAR10_DIR to a folder with {ARCHIVE}",
)
CIFAR10_CLASSES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
TRAIN_FILES = tuple(f"cifar-10-batches-bin/data_batch_{i}.bin" for i in range(1, 6))
TEST_FILES = ("cifar-10-batches-bin/test_batch.bin",)
IMAGE_SHAPE = (3, 32, 32)
RECORD = 1 + 3 * 32 * 32  # a byte for the label, then the red, the green and the blue pixels, row by row


def load() -> Dataset:
    """Loads the 60,000 images, split 45,000, 5,000 and 10,000."""
    path = SOURCE.folder() / ARCHIVE
    # Never unpacked to disk, so that names in the archive can reach no other file.
    try:
        with tarfile.open(fileobj=io.BytesIO(read_gzip(path)), mode="r:") as archive:
            rest, test = (_read_part(path, archive, files) for files in (TRAIN_FILES, TEST_FILES))
    except tarfile.TarError as error:
        raise ValueError(f"{path} is corrupt: {error}") from error
    train, validation = hold_out(rest, 0.1)
    return Dataset(SOURCE.name, train, validation, test, CIFAR10_CLASSES, IMAGE_SHAPE)


def _read_part(path: Path, archive: tarfile.TarFile, files: tuple[str, ...]) -> Split:
    records = np.concatenate([_read_records(path, archive, name) for name in files])
    labels, pixels = records[:, 0], records[:, 1:]
    return make_split(pixels.reshape(-1, *IMAGE_SHAPE), labels, white=255)


def _read_records(path: Path, archive: tarfile.TarFile, name: str) -> np.ndarray:
    try:
        file = archive.extractfile(name)
    except KeyError:
        file = None
    if file is None:  # as it is for a folder of that name
        raise ValueError(f"{path} has no file {name}")
    content = file.read()
    if not content or len(content) % RECORD:
        raise ValueError(f"{path}: {name} is truncated or padded: {len(content)} bytes are no records of {RECORD}")
    records = np.frombuffer(content, np.uint8).reshape(-1, RECORD)
    if (records[:, 0] >= len(CIFAR10_CLASSES)).any():
        raise ValueError(f"{path}: {name} has labels up to {records[:, 0].max()}; there are {len(CIFAR10_CLASSES)}")
    return records
