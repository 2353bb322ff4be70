import gzip
import hashlib
import os
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pooch
import pytest
import torch

from models import datasets
from models.datasets import Dataset, Split, load, read_idx

fashion_mnist_folder = Path(os.environ.get("FASHION_MNIST_DIR") or datasets.FASHION_MNIST_FOLDER)
needs_fashion_mnist = pytest.mark.skipif(
    not fashion_mnist_folder.is_dir(), reason=f"no {fashion_mnist_folder}: {datasets.FASHION_MNIST_ADVICE}"
)


def idx(array: np.ndarray) -> bytes:
    sizes = b"".join(size.to_bytes(4) for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.astype(np.uint8).tobytes()


def small_arrays() -> dict[str, np.ndarray]:
    """Random pictures under Fashion-MNIST's names: 60 for training, 20 for testing, the classes evenly."""
    rng = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", 60), ("t10k", 20)):
        arrays[f"{part}-images-idx3-ubyte.gz"] = rng.integers(256, size=(count, 5, 4))
        arrays[f"{part}-labels-idx1-ubyte.gz"] = np.arange(count) % 10
    return arrays


@pytest.fixture
def small_folder(tmp_path: Path) -> Path:
    for name, array in small_arrays().items():
        (tmp_path / name).write_bytes(gzip.compress(idx(array)))
    return tmp_path


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


def test_digits_are_the_known_ones_split_in_the_same_proportion_of_every_class():
    data = load("digits")
    check_contract(data, shares=(0.6, 0.2, 0.2))
    assert sum(len(labels) for _, labels in parts(data)) == 1797
    assert data.class_names == tuple("0123456789")


def test_digits_are_all_there_once():
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    expected = np.column_stack([pixels, labels])
    data = load("digits", flatten=True)
    got = np.concatenate([np.column_stack([images * 16, labels]) for images, labels in parts(data)])
    assert sorted(map(tuple, got)) == sorted(map(tuple, expected))


@needs_fashion_mnist
def test_fashion_mnist_is_the_known_one_split_in_the_same_proportion_of_every_class():
    data = load("fashion-mnist")
    check_contract(data, shares=(5 / 7, 1 / 7, 1 / 7))
    assert [len(labels) for _, labels in parts(data)] == [50_000, 10_000, 10_000]
    assert all((torch.bincount(labels) == len(labels) // 10).all() for _, labels in parts(data))
    assert data.image_shape == (1, 28, 28)
    first_test_labels = [data.class_names[label] for label in data.test.labels[:4]]
    assert first_test_labels == ["Ankle boot", "Pullover", "Trouser", "Trouser"]


def test_loading_twice_gives_the_same_and_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    first = load("digits")
    torch.randn(3)
    second = load("digits")
    torch.randn(3)
    for one, other in zip(parts(first), parts(second), strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)
    after = torch.get_rng_state()
    torch.set_rng_state(before)
    torch.randn(3), torch.randn(3)
    assert torch.equal(after, torch.get_rng_state())


def test_flattening_only_reshapes():
    pictures, vectors = load("digits"), load("digits", flatten=True)
    assert vectors.image_shape == pictures.image_shape
    for picture, vector in zip(parts(pictures), parts(vectors), strict=True):
        assert torch.equal(picture.images.reshape(-1, 64), vector.images)


def test_unknown_name_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match="unknown data set 'mnits'; known are digits, fashion-mnist"):
        load("mnits")


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_round_trip(tmp_path, suffix):
    array = np.random.default_rng(0).integers(256, size=(7, 3, 2))
    path = tmp_path / f"images{suffix}"
    path.write_bytes(gzip.compress(idx(array)) if suffix else idx(array))
    assert np.array_equal(read_idx(path), array)


whole = idx(np.arange(24).reshape(2, 3, 4))


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        pytest.param(b"", "no IDX file", id="empty"),
        pytest.param(b"\x89PNG and more", "no IDX file", id="picture"),
        pytest.param(b"\0\0\x0d" + whole[3:], "no IDX file", id="floats"),
        pytest.param(whole[:10], "truncated or padded", id="cut-in-sizes"),
        pytest.param(whole[:-1], "truncated or padded", id="cut-in-data"),
        pytest.param(whole + b"\0", "truncated or padded", id="byte-too-many"),
    ],
)
def test_broken_idx_is_named(tmp_path, content, complaint):
    path = tmp_path / "broken"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"broken is {complaint}"):
        read_idx(path)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"no gzip at all", id="uncompressed"),
        pytest.param(gzip.compress(whole)[:-12], id="truncated"),
        pytest.param(gzip.compress(whole)[:12] + b"\xff" * 30, id="overwritten"),
    ],
)
def test_broken_gzip_is_named(tmp_path, content):
    path = tmp_path / "broken.gz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"broken\.gz is corrupt"):
        read_idx(path)


def test_fashion_mnist_is_read_from_the_chosen_folder(small_folder, monkeypatch):
    monkeypatch.setenv("FASHION_MNIST_DIR", str(small_folder))
    data = load("fashion-mnist")
    arrays = small_arrays()
    assert [len(labels) for _, labels in parts(data)] == [50, 10, 20]
    assert all((torch.bincount(labels) == len(labels) // 10).all() for _, labels in parts(data))
    assert data.image_shape == (1, 5, 4)
    np.testing.assert_array_equal(data.test.images[:, 0] * 255, arrays["t10k-images-idx3-ubyte.gz"])
    np.testing.assert_array_equal(data.test.labels, arrays["t10k-labels-idx1-ubyte.gz"])


def test_missing_files_are_named_with_a_way_out(small_folder, monkeypatch):
    monkeypatch.setenv("FASHION_MNIST_DIR", str(small_folder))
    (small_folder / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"t10k-labels-idx1-ubyte\.gz missing.*dataset-fashion-mnist") as caught:
        load("fashion-mnist")
    assert str(small_folder) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "labels",
    [
        pytest.param(np.arange(61) % 10, id="one-too-many"),
        pytest.param(np.arange(60) % 11, id="eleventh-class"),
        pytest.param(np.zeros((60, 1)), id="matrix"),
    ],
)
def test_files_that_do_not_belong_together_are_refused(small_folder, monkeypatch, labels):
    monkeypatch.setenv("FASHION_MNIST_DIR", str(small_folder))
    (small_folder / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
    with pytest.raises(ValueError, match="train files do not belong together"):
        load("fashion-mnist")


@pytest.fixture
def server(small_folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch) -> Iterator[ThreadingHTTPServer]:
    """Serves the small files in place of the real address, on a machine without Debian's package."""
    handler = partial(SimpleHTTPRequestHandler, directory=small_folder)
    sums = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in small_folder.iterdir()}
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        monkeypatch.delenv("FASHION_MNIST_DIR", raising=False)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr(datasets, "FASHION_MNIST_FOLDER", small_folder / "nowhere")
        monkeypatch.setattr(datasets, "FASHION_MNIST_URL", f"http://127.0.0.1:{server.server_port}/")
        monkeypatch.setattr(datasets, "FASHION_MNIST_SHA256", sums)
        monkeypatch.setattr(pooch, "os_cache", lambda project: tmp_path_factory.mktemp("cache") / project)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_fashion_mnist_is_downloaded_where_it_is_not_installed(server):
    images = small_arrays()["t10k-images-idx3-ubyte.gz"]
    np.testing.assert_array_equal(load("fashion-mnist").test.images[:, 0] * 255, images)


def test_a_download_with_another_checksum_is_refused(server, monkeypatch):
    monkeypatch.setitem(datasets.FASHION_MNIST_SHA256, "t10k-labels-idx1-ubyte.gz", "0" * 64)
    with pytest.raises(ValueError, match=r"hash of downloaded file \(t10k-labels-idx1-ubyte\.gz\) does not match"):
        load("fashion-mnist")


def test_a_failed_download_is_told_with_a_way_out(server, monkeypatch):
    monkeypatch.setattr(datasets, "FASHION_MNIST_URL", "http://127.0.0.1:9/")
    with pytest.raises(FileNotFoundError, match=r"nowhere, and downloading it failed.*set FASHION_MNIST_DIR") as caught:
        load("fashion-mnist")
    assert "\n" not in str(caught.value)
