"""Files of data sets: what is in them is read as it is, and what is wrong with them is named."""

import gzip
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.io import savemat
from small_datasets import (
    FILES,
    by_name,
    idx,
    parts,
    small_arrays,
    small_matrices,
    small_records,
    write_cifar10,
)

from models.datasets import cifar10, load, read_idx
from models.datasets.files import read_gzip


@pytest.fixture
def small_folder(small_files) -> Path:
    return small_files("fashion-mnist")


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


def test_a_file_that_would_fill_memory_is_refused(tmp_path):
    path = tmp_path / "bomb.gz"
    path.write_bytes(gzip.compress(bytes(10**6)))
    assert path.stat().st_size < 2000
    assert len(read_gzip(path)) == 10**6
    with pytest.raises(ValueError, match=r"bomb.gz is corrupt, or no file of this data set: .* more than 1,000 bytes"):
        read_gzip(path, most=1000)


def test_fashion_mnist_is_read_from_the_chosen_folder(small_folder):
    data = load("fashion-mnist")
    arrays = small_arrays()
    assert [len(labels) for _, labels in parts(data)] == [50, 10, 20]
    assert all((torch.bincount(labels) == len(labels) // 10).all() for _, labels in parts(data))
    assert data.image_shape == (1, 5, 4)
    np.testing.assert_array_equal(data.test.images[:, 0] * 255, arrays["t10k-images-idx3-ubyte.gz"])
    np.testing.assert_array_equal(data.test.labels, arrays["t10k-labels-idx1-ubyte.gz"])


def test_cifar10_records_become_labels_and_planes_of_red_green_and_blue(small_files):
    small_files("cifar-10")
    data = load("cifar-10")
    assert [len(labels) for _, labels in parts(data)] == [90, 10, 20]
    assert data.class_names[3] == "cat"
    records = small_records()[cifar10.TEST_FILES[0]]
    np.testing.assert_array_equal(data.test.labels, records[:, 0])
    for channel, row, column in ((0, 0, 0), (0, 0, 5), (1, 2, 3), (2, 31, 31)):
        byte = records[:, 1 + 1024 * channel + 32 * row + column]
        np.testing.assert_allclose(data.test.images[:, channel, row, column] * 255, byte, rtol=1e-6)


def test_all_five_training_files_of_cifar10_are_read(small_files):
    small_files("cifar-10")
    data = load("cifar-10")
    got = torch.cat([data.train.images, data.validation.images]).flatten(1).mul(255).round()
    records = small_records()
    expected = np.concatenate([records[name][:, 1:] for name in cifar10.TRAIN_FILES])
    assert sorted(map(tuple, got.tolist())) == sorted(map(tuple, expected.tolist()))


def test_svhn_matrices_become_images_and_label_ten_means_zero(small_files):
    small_files("svhn")
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
def test_missing_files_are_named_with_a_way_out(name, tmp_path, small_files):
    source = FILES[name][0].SOURCE
    small_files(name)
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
def test_a_damaged_file_is_named(name, harm, small_files):
    damaged = small_files(name) / next(iter(FILES[name][0].SOURCE.sha256))
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
def test_broken_cifar10_records_are_named(harm, complaint, tmp_path, small_files):
    small_files("cifar-10")
    contents = {name: records.tobytes() for name, records in small_records().items()}
    write_cifar10(tmp_path, contents | {test_file: harm(contents[test_file])})
    with pytest.raises(ValueError, match=rf"cifar-10-binary\.tar\.gz: .*test_batch\.bin .*{complaint}"):
        load("cifar-10")


def test_another_archive_in_place_of_cifar10_is_refused(tmp_path, small_files):
    small_files("cifar-10")
    write_cifar10(tmp_path, {"cifar-10-batches-py/data_batch_1": b"a pickle"})
    with pytest.raises(ValueError, match=r"has no file cifar-10-batches-bin/data_batch_1\.bin"):
        load("cifar-10")


def test_a_folder_in_place_of_cifar10_records_is_refused(tmp_path, small_files):
    small_files("cifar-10")
    with tarfile.open(tmp_path / cifar10.ARCHIVE, "w:gz") as archive:
        member = tarfile.TarInfo(cifar10.TRAIN_FILES[0])
        member.type = tarfile.DIRTYPE
        archive.addfile(member)
    with pytest.raises(ValueError, match="has no file"):
        load("cifar-10")


def test_an_archive_without_a_tar_file_in_it_is_corrupt(tmp_path, small_files):
    small_files("cifar-10")
    (tmp_path / cifar10.ARCHIVE).write_bytes(gzip.compress(b"no tar file" * 100))
    with pytest.raises(ValueError, match=r"cifar-10-binary\.tar\.gz is corrupt"):
        load("cifar-10")


def test_reading_cifar10_writes_no_files(tmp_path, small_files):
    small_files("cifar-10")
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
def test_matrices_that_are_not_svhn_are_refused(change, complaint, tmp_path, small_files):
    small_files("svhn")
    arrays = small_matrices()["test_32x32.mat"] | change
    savemat(tmp_path / "test_32x32.mat", {key: array for key, array in arrays.items() if array is not None})
    with pytest.raises(ValueError, match=rf"test_32x32\.mat: .*{complaint}"):
        load("svhn")
