"""Data sets by name: the known images, split the same way each time."""

import numpy as np
import pytest
import torch
from small_datasets import by_name, check_contract, needs_fashion_mnist, parts

from models.datasets import load


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


@by_name
def test_small_files_keep_the_contract(name, small_files):
    small_files(name)
    data = load(name)
    assert data.name == name
    total = sum(len(labels) for _, labels in parts(data))
    check_contract(data, shares=tuple(len(labels) / total for _, labels in parts(data)))
    assert all(images.is_contiguous() for images, _ in parts(data))
    assert load(name, flatten=True).train.images.shape == (len(data.train.labels), np.prod(data.image_shape))
