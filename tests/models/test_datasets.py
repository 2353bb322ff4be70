import gzip
import hashlib
import io
import os
import tarfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pooch
import pytest
import torch
from scipy.io import savemat

from models.datasets import Dataset, Split, cifar10, fashion_mnist, load, read_idx, svhn

fashion_mnist_folder = Path(os.environ.get("FASHION_MNIST_DIR") or fashion_mnist.SOURCE.installed)
needs_fashion_mnist = pytest.mark.skipif(
    not fashion_mnist_folder.is_dir(), reason=f"no {fashion_mnist_folder}: {fashion_mnist.SOURCE.advice}"
)


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


def small_files(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Writes them, and has them used in place of the real ones."""
    module, write = FILES[name]
    write(folder)
    monkeypatch.setenv(module.SOURCE.variable, str(folder))
    return folder


@pytest.fixture
def small_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return small_files("fashion-mnist", tmp_path, monkeypatch)


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
    with pytest.raises(ValueError, match="unknown data set 'mnits'; known are digits, fashion-mnist, cifar-10, svhn"):
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


def test_fashion_mnist_is_read_from_the_chosen_folder(small_folder):
    data = load("fashion-mnist")
    arrays = small_arrays()
    assert [len(labels) for _, labels in parts(data)] == [50, 10, 20]
    assert all((torch.bincount(labels) == len(labels) // 10).all() for _, labels in parts(data))
    assert data.image_shape == (1, 5, 4)
    np.testing.assert_array_equal(data.test.images[:, 0] * 255, arrays["t10k-images-idx3-ubyte.gz"])
    np.testing.assert_array_equal(data.test.labels, arrays["t10k-labels-idx1-ubyte.gz"])


@by_name
def test_small_files_keep_the_contract(name, tmp_path, monkeypatch):
    small_files(name, tmp_path, monkeypatch)
    data = load(name)
    assert data.name == name
    total = sum(len(labels) for _, labels in parts(data))
    check_contract(data, shares=tuple(len(labels) / total for _, labels in parts(data)))
    assert all(images.is_contiguous() for images, _ in parts(data))
    assert load(name, flatten=True).train.images.shape == (len(data.train.labels), np.prod(data.image_shape))


def test_cifar10_records_become_labels_and_planes_of_red_green_and_blue(tmp_path, monkeypatch):
    small_files("cifar-10", tmp_path, monkeypatch)
    data = load("cifar-10")
    assert [len(labels) for _, labels in parts(data)] == [90, 10, 20]
    assert data.class_names[3] == "cat"
    records = small_records()[cifar10.TEST_FILES[0]]
    np.testing.assert_array_equal(data.test.labels, records[:, 0])
    for channel, row, column in ((0, 0, 0), (0, 0, 5), (1, 2, 3), (2, 31, 31)):
        byte = records[:, 1 + 1024 * channel + 32 * row + column]
        np.testing.assert_allclose(data.test.images[:, channel, row, column] * 255, byte, rtol=1e-6)


def test_all_five_training_files_of_cifar10_are_read(tmp_path, monkeypatch):
    small_files("cifar-10", tmp_path, monkeypatch)
    data = load("cifar-10")
    got = torch.cat([data.train.images, data.validation.images]).flatten(1).mul(255).round()
    records = small_records()
    expected = np.concatenate([records[name][:, 1:] for name in cifar10.TRAIN_FILES])
    assert sorted(map(tuple, got.tolist())) == sorted(map(tuple, expected.tolist()))


def test_svhn_matrices_become_images_and_label_ten_means_zero(tmp_path, monkeypatch):
    small_files("svhn", tmp_path, monkeypatch)
    data = load("svhn")
    assert [len(labels) for _, labels in parts(data)] == [90, 10, 20]
    arrays = small_matrices()["test_32x32.mat"]
    np.testing.assert_array_equal(data.test.labels, arrays["y"][:, 0] % 10)
    assert data.test.labels[5] == 0
    assert arrays["y"][5] == 10
    for channel, row, column in ((0, 0, 5), (1, 2, 3), (2, 31, 30)):
        byte = arrays["X"][row, column, channel]
        np.testing.assert_allclose(data.test.images[:, channel, row, column] * 255, byte, rtol=1e-6)


@by_name
def test_missing_files_are_named_with_a_way_out(name, tmp_path, monkeypatch):
    source = FILES[name][0].SOURCE
    small_files(name, tmp_path, monkeypatch)
    missing = list(source.sha256)[-1]
    (tmp_path / missing).unlink()
    with pytest.raises(FileNotFoundError) as caught:
        load(name)
    message = str(caught.value)
    assert message == f"no {source.title} in {tmp_path} ({missing} missing); {source.advice}"
    assert f"set {source.variable} to a folder with" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "labels",
    [
        pytest.param(np.arange(61) % 10, id="one-too-many"),
        pytest.param(np.arange(60) % 11, id="eleventh-class"),
        pytest.param(np.zeros((60, 1)), id="matrix"),
    ],
)
def test_files_that_do_not_belong_together_are_refused(small_folder, labels):
    (small_folder / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
    with pytest.raises(ValueError, match="train files do not belong together"):
        load("fashion-mnist")


@by_name
@pytest.mark.parametrize(
    "harm",
    [
        pytest.param(lambda content: b"", id="empty"),
        pytest.param(lambda content: b"<html>not found</html>" * 100, id="web-page"),
        pytest.param(lambda content: content[: len(content) // 2], id="truncated"),
        pytest.param(lambda content: content[:-200] + bytes(200), id="end-overwritten"),
        pytest.param(lambda content: content[:1000] + b"\xff" * 30 + content[1030:], id="overwritten"),
    ],
)
def test_a_damaged_file_is_named(name, harm, tmp_path, monkeypatch):
    damaged = small_files(name, tmp_path, monkeypatch) / next(iter(FILES[name][0].SOURCE.sha256))
    damaged.write_bytes(harm(damaged.read_bytes()))
    with pytest.raises(ValueError, match=f"{damaged.name} is corrupt"):
        load(name)


test_file = cifar10.TEST_FILES[0]
last_label = 19 * cifar10.RECORD


@pytest.mark.parametrize(
    ("harm", "complaint"),
    [
        pytest.param(lambda content: content[:-1], "61459 bytes are no records of 3073", id="byte-missing"),
        pytest.param(lambda content: content + b"\0", "61461 bytes are no records of 3073", id="byte-too-many"),
        pytest.param(lambda content: b"", "0 bytes are no records", id="empty"),
        pytest.param(
            lambda content: content[:last_label] + b"\x0a" + content[last_label + 1 :],
            "labels up to 10; there are 10",
            id="eleventh-class",
        ),
    ],
)
def test_broken_cifar10_records_are_named(harm, complaint, tmp_path, monkeypatch):
    small_files("cifar-10", tmp_path, monkeypatch)
    contents = {name: records.tobytes() for name, records in small_records().items()}
    write_cifar10(tmp_path, contents | {test_file: harm(contents[test_file])})
    with pytest.raises(ValueError, match=rf"cifar-10-binary\.tar\.gz: .*test_batch\.bin .*{complaint}"):
        load("cifar-10")


def test_another_archive_in_place_of_cifar10_is_refused(tmp_path, monkeypatch):
    small_files("cifar-10", tmp_path, monkeypatch)
    write_cifar10(tmp_path, {"cifar-10-batches-py/data_batch_1": b"a pickle"})
    with pytest.raises(ValueError, match=r"has no file cifar-10-batches-bin/data_batch_1\.bin"):
        load("cifar-10")


def test_a_folder_in_place_of_cifar10_records_is_refused(tmp_path, monkeypatch):
    small_files("cifar-10", tmp_path, monkeypatch)
    with tarfile.open(tmp_path / cifar10.ARCHIVE, "w:gz") as archive:
        member = tarfile.TarInfo(cifar10.TRAIN_FILES[0])
        member.type = tarfile.DIRTYPE
        archive.addfile(member)
    with pytest.raises(ValueError, match="has no file"):
        load("cifar-10")


def test_an_archive_without_a_tar_file_in_it_is_corrupt(tmp_path, monkeypatch):
    small_files("cifar-10", tmp_path, monkeypatch)
    (tmp_path / cifar10.ARCHIVE).write_bytes(gzip.compress(b"no tar file" * 100))
    with pytest.raises(ValueError, match=r"cifar-10-binary\.tar\.gz is corrupt"):
        load("cifar-10")


def test_reading_cifar10_writes_no_files(tmp_path, monkeypatch):
    small_files("cifar-10", tmp_path, monkeypatch)
    load("cifar-10")
    assert [path.name for path in tmp_path.iterdir()] == [cifar10.ARCHIVE]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        pytest.param({"X": np.zeros((32, 32, 3, 9), np.uint8)}, r"X is uint8 .*3, 9\) and y .*20, 1\)", id="too-few"),
        pytest.param({"X": np.zeros((20, 3, 32, 32), np.uint8)}, r"expected uint8 .*32, 32, 3, N", id="other-order"),
        pytest.param({"X": np.zeros((32, 32, 3, 20))}, "X is float64", id="floats"),
        pytest.param({"X": None}, "X is object", id="no-images"),
        pytest.param({"y": None}, r"y of shape \(\)", id="no-labels"),
        pytest.param({"y": np.arange(20)[:, None] % 10}, "y goes from 0 to 9", id="from-zero"),
        pytest.param({"y": np.arange(20)[:, None] % 11 + 1}, "y goes from 1 to 11", id="eleventh-class"),
        pytest.param({"y": np.full((20, 1), 1.5)}, "expected whole numbers", id="halves"),
    ],
)
def test_matrices_that_are_not_svhn_are_refused(change, complaint, tmp_path, monkeypatch):
    small_files("svhn", tmp_path, monkeypatch)
    arrays = small_matrices()["test_32x32.mat"] | change
    savemat(tmp_path / "test_32x32.mat", {key: array for key, array in arrays.items() if array is not None})
    with pytest.raises(ValueError, match=rf"test_32x32\.mat: .*{complaint}"):
        load("svhn")


@pytest.fixture
def publish(tmp_path_factory: pytest.TempPathFactory, monkeypatch) -> Iterator[Callable[..., None]]:
    """Serves small files of a data set in place of its address, on a machine that does not have it."""
    folder = tmp_path_factory.mktemp("site")
    handler = partial(SimpleHTTPRequestHandler, directory=folder)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:

        def start(name: str, **changes: object) -> None:
            module, write = FILES[name]
            if not any(folder.iterdir()):  # the formats keep the time of writing, which would change the sums
                write(folder)
            sums = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
            assert sums.keys() == module.SOURCE.sha256.keys()
            here = {"url": f"http://127.0.0.1:{server.server_port}/", "sha256": sums, "installed": folder / "nowhere"}
            monkeypatch.setattr(module, "SOURCE", replace(module.SOURCE, **(here | changes)))
            monkeypatch.delenv(module.SOURCE.variable, raising=False)

        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        cache = tmp_path_factory.mktemp("cache")
        monkeypatch.setattr(pooch, "os_cache", lambda project: cache / project)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield start
        server.shutdown()
        thread.join()


@by_name
def test_a_data_set_is_downloaded_once_where_it_is_not_installed(name, publish, tmp_path, monkeypatch):
    publish(name)
    downloaded = load(name)
    publish(name, url="http://127.0.0.1:9/")  # nobody answers there, and nobody is asked
    again = load(name)
    small_files(name, tmp_path, monkeypatch)
    for one, two, three in zip(parts(downloaded), parts(again), parts(load(name)), strict=True):
        assert torch.equal(one.images, two.images)
        assert torch.equal(one.images, three.images)
        assert torch.equal(one.labels, three.labels)


@by_name
def test_a_download_with_another_checksum_is_refused(name, publish):
    wrong = dict.fromkeys(FILES[name][0].SOURCE.sha256, "0" * 64)
    publish(name, sha256=wrong)
    first = next(iter(wrong))
    with pytest.raises(ValueError, match=rf"hash of downloaded file \({first}\) does not match"):
        load(name)


@by_name
def test_a_failed_download_is_told_with_a_way_out(name, publish):
    publish(name, url="http://127.0.0.1:9/")
    variable = FILES[name][0].SOURCE.variable
    with pytest.raises(FileNotFoundError, match=rf"nowhere, and downloading it failed.*set {variable} to") as caught:
        load(name)
    assert "\n" not in str(caught.value)


def test_where_no_package_has_the_data_set_the_variable_is_named(publish):
    publish("svhn", url="http://127.0.0.1:9/", installed=None)
    with pytest.raises(FileNotFoundError, match=r"no SVHN in \$SVHN_DIR, which is not set, and downloading it failed"):
        load("svhn")
