"""Small files of the formats of the data sets, with random content, and what every data set promises."""

import gzip
import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.io import savemat

from models.datasets import Dataset, Split, cifar10, fashion_mnist, svhn

_folder = Path(os.environ.get("FASHION_MNIST_DIR") or fashion_mnist.SOURCE.installed)


needs_fashion_mnist = pytest.mark.skipif(not _folder.is_dir(), reason=f"no {_folder}: {fashion_mnist.SOURCE.advice}")


def idx(array: np.ndarray) -> bytes:
    sizes = b"".join(size.to_bytes(4) for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.astype(np.uint8).tobytes()


def small_arrays() -> dict[str, np.ndarray]:
    """Random pictures under Fashion-MNIST's names: 60 for training, 20 for testing, the classes evenly."""
    rng = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", 60), ("t10k", 20)):
        images = rng.integers(256, size=(count, 5, 4))
        images[:, 0, :2] = 0, 255
        arrays[f"{part}-images-idx3-ubyte.gz"] = images
        arrays[f"{part}-labels-idx1-ubyte.gz"] = np.arange(count) % 10
    return arrays


def small_records() -> dict[str, np.ndarray]:
    """Random records under the names in CIFAR-10's archive: 20 in each file, the classes evenly."""
    rng = np.random.default_rng(0)
    records = {}
    for name in (*cifar10.TRAIN_FILES, *cifar10.TEST_FILES):
        records[name] = rng.integers(256, size=(20, cifar10.RECORD), dtype=np.uint8)
        records[name][:, 0] = np.arange(20) % 10
    return records


def small_matrices() -> dict[str, dict[str, np.ndarray]]:
    """Random pictures as in SVHN's files: 100 for training, 20 for testing, labelled from 1 to 10."""
    rng = np.random.default_rng(0)
    return {
        name: {
            "X": rng.integers(256, size=(32, 32, 3, count), dtype=np.uint8),
            "y": (np.arange(count, dtype=np.uint8)[:, None] + 4) % 10 + 1,
        }
        for name, count in (("train_32x32.mat", 100), ("test_32x32.mat", 20))
    }


def write_fashion_mnist(folder: Path) -> None:
    for name, array in small_arrays().items():
        (folder / name).write_bytes(gzip.compress(idx(array)))


def write_cifar10(folder: Path, contents: dict[str, bytes] | None = None) -> None:
    contents = contents or {name: records.tobytes() for name, records in small_records().items()}
    with tarfile.open(folder / cifar10.ARCHIVE, "w:gz") as archive:
        for name, content in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def write_svhn(folder: Path) -> None:
    for name, arrays in small_matrices().items():
        savemat(folder / name, arrays, do_compression=True)


# The data sets that come as files: their modules, and what writes small files of the same format.
FILES = {
    "fashion-mnist": (fashion_mnist, write_fashion_mnist),
    "cifar-10": (cifar10, write_cifar10),
    "svhn": (svhn, write_svhn),
}


by_name = pytest.mark.parametrize("name", FILES)


def parts(data: Dataset) -> list[Split]:
    return [data.train, data.validation, data.test]


def check_contract(data: Dataset, shares: tuple[float, float, float]) -> None:
    counts = torch.stack([torch.bincount(labels, minlength=len(data.class_names)) for _, labels in parts(data)])
    expected = torch.tensor(shares)[:, None] * counts.sum(0)
    assert (counts - expected).abs().max() <= 1  # stratified: each class in each part, but for rounding
    for images, labels in parts(data):
        assert images.shape == (len(labels), *data.image_shape)
        assert images.dtype == torch.float32
        assert labels.dtype == torch.int64
        assert images.min() == 0
        assert images.max() == 1
