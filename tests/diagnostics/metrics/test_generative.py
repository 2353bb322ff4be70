"""Distances between sets of images against closed forms and slow oracles."""

import pytest
import torch
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance

from pyro_vnd.diagnostics import generative_metrics
from pyro_vnd.diagnostics.metrics.generative import feature_distances, nearest_distances, weights_hash

D = 16


class Pixels(nn.Flatten):
    num_features = D


@pytest.fixture
def images():
    """Correlated pixels with a mean."""
    return 1 + torch.randn(300, D) @ torch.randn(D, D) / 4


def kernel_distance(x, y):
    """Mean of the kernel within x and within y, without each image's own, less twice that between them."""

    def kernel(a, b):
        return (a @ b.T / D + 1) ** 3

    n = len(x)
    within = sum(k.sum() - k.diagonal().sum() for k in (kernel(x, x), kernel(y, y))) / (n * (n - 1))
    return (within - 2 * kernel(x, y).mean()).item()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("size", [(300, D), (9, D), (2, 1), (200, 64)])
@pytest.mark.parametrize("kind", ["full", "of rank 2", "constant", "float32", "with a large mean"])
def test_a_set_is_at_no_distance_from_itself_in_any_order(size, kind, seed):
    torch.manual_seed(seed)
    x = torch.randn(size, dtype=torch.float32 if kind == "float32" else torch.float64)
    if kind == "of rank 2":
        x = x[:, :2] @ torch.randn(min(2, size[1]), size[1], dtype=x.dtype)
    x = x + 1e6 if kind == "with a large mean" else x
    x = torch.ones_like(x) / 3 if kind == "constant" else x
    assert feature_distances(x, x.clone())["fid"] == 0
    assert feature_distances(x, x[torch.randperm(len(x))])["fid"] == 0


@pytest.mark.parametrize("rank", [1, 3, D])
@pytest.mark.parametrize("size", [1e-10, 1e-6, 1e-2])
def test_a_tiny_difference_counts_as_what_it_is(rank, size):
    x = torch.randn(50, rank).double() @ torch.randn(rank, D).double()
    shift = size * torch.randn(D).double()
    assert feature_distances(x + shift, x)["fid"] == pytest.approx(shift.square().sum().item(), rel=1e-3)
    centred = x - x.mean(0)  # (1 + s)**2 S + S - 2 (1 + s) S = s**2 S
    scaled = size**2 * torch.cov(centred.T).trace().item()
    assert feature_distances((1 + size) * centred, centred)["fid"] == pytest.approx(scaled, rel=1e-3)


@pytest.mark.parametrize("sizes", [(300, 200), (7, 300), (300, 7), (5, 6)])
def test_frechet_distance_of_other_sets_is_that_of_torchmetrics(sizes):
    x, y = torch.randn(sizes[0], D).double(), torch.randn(sizes[1], D).double() @ torch.randn(D, D).double()
    other = FrechetInceptionDistance(Pixels())
    other.update(y.reshape(-1, 1, 4, 4), real=True)
    other.update(x.reshape(-1, 1, 4, 4), real=False)
    found = feature_distances(x, y)["fid"]
    assert found == pytest.approx(other.compute().item(), rel=1e-5)  # the other one has roots of rounded zeros
    assert found == pytest.approx(feature_distances(y, x)["fid"], rel=1e-12)


def test_a_shift_costs_its_square(images):
    shift = torch.randn(D)
    found = generative_metrics(images + shift, images, Pixels())
    assert found["fid"] == pytest.approx(shift.square().sum().item(), rel=1e-6)


def test_twice_the_scale(images):
    # tr(S + 4 S - 2 (4 S^2)^(1/2)) = tr(S)
    expected = images.mean(0).square().sum() + torch.cov(images.T).trace()
    assert generative_metrics(2 * images, images, Pixels())["fid"] == pytest.approx(expected.item(), rel=1e-6)


def test_kernel_distance_of_whole_sets(images):
    other = torch.randn(300, D)
    assert generative_metrics(other, images, Pixels())["kid"] == pytest.approx(kernel_distance(images, other))


def test_kernel_distance_is_unbiased_over_subsets(images):
    same, shifted = torch.randn(2, 2000, D) @ torch.randn(D, D) / 4
    options = {"num_subsets": 10, "subset_size": 500}
    null = [feature_distances(*same.split(1000), seed=seed, **options)["kid"] for seed in range(3)]
    assert len(set(null)) == 3  # the subsets are the seed's
    assert feature_distances(*same.split(1000), num_subsets=1, subset_size=500)["kid"] not in null
    whole = kernel_distance(*same.split(1000))
    assert max(abs(value - whole) for value in null) < 0.05
    assert feature_distances(same[:1000], shifted[1000:] + 0.5, **options)["kid"] > 0.3


def test_small_sets_have_smaller_subsets(images):
    found = feature_distances(images[:40], images[40:])["kid"]
    assert found == pytest.approx(kernel_distance(images[:40], images[40:80]), abs=3)
    assert found != kernel_distance(images[:40], images[40:80])  # the larger set has several subsets


def test_single_precision_is_enough_for_images(images):
    class Features(nn.Linear):
        num_features = D

    net = Features(D, D)
    found = generative_metrics(images.float() + 1, images.float(), net.float())
    shift = net(torch.ones(D).float()) - net.bias
    assert found["fid"] == pytest.approx(shift.square().sum().item(), rel=1e-3)


def test_features_are_run_in_evaluation_mode_without_gradients(images):
    class Features(nn.Sequential):
        num_features = D

    net = Features(nn.Linear(D, D), nn.Dropout(0.9)).train()
    found = generative_metrics(images, images, net)
    assert found["fid"] == pytest.approx(0, abs=1e-6)
    assert net.training
    assert net[1].training
    assert all(parameter.grad is None for parameter in net.parameters())


def test_random_numbers_are_the_callers(images):
    torch.manual_seed(5)
    first = feature_distances(images[:100], images[100:])
    after = torch.rand(2)
    torch.manual_seed(5)
    torch.testing.assert_close(torch.rand(2), after)
    assert feature_distances(images[:100], images[100:]) == first


def test_nearest_distances_are_those_of_all_pairs(images):
    train, others = images[:200], images[200:]
    expected = (others[:, None] - train).norm(dim=-1).min(1).values
    found = nearest_distances(others.reshape(-1, 1, 4, 4), train.reshape(-1, 1, 4, 4))
    torch.testing.assert_close(found, expected)


def test_copies_of_training_images_are_at_no_distance_even_far_from_zero(images):
    train = images.float() + 1000
    assert nearest_distances(train[50:60], train).eq(0).all()
    moved = train[50:60].clone()
    moved[:, 0] += 0.25
    torch.testing.assert_close(nearest_distances(moved, train), torch.full((10,), 0.25).float())


def test_chunks_do_not_matter(images, monkeypatch):
    whole = nearest_distances(images[:90], images[90:])
    monkeypatch.setattr("pyro_vnd.diagnostics.metrics.generative._DISTANCES_AT_ONCE", 1000)
    torch.testing.assert_close(nearest_distances(images[:90], images[90:]), whole)


def test_the_hash_is_of_weights_names_and_types():
    net = nn.Linear(2, 3)
    before = weights_hash(net)
    twin = nn.Linear(2, 3)
    assert weights_hash(twin) != before
    twin.load_state_dict(net.state_dict())
    assert weights_hash(twin) == before
    assert weights_hash(nn.Sequential(net)) != before
    assert weights_hash(twin.bfloat16()) != before
    assert len(weights_hash(nn.BatchNorm1d(3))) == 64  # has a buffer without dimensions


@pytest.mark.parametrize("rows", [0, 1])
def test_sets_need_two_images(rows, images):
    with pytest.raises(ValueError, match=r"features of at least 2 images each"):
        generative_metrics(images[:rows], images, Pixels())


def test_features_are_checked(images):
    with pytest.raises(ValueError, match="integer attribute `num_features`; got Flatten with None"):
        generative_metrics(images, images, nn.Flatten())
    with pytest.raises(ValueError, match=r"finite numbers of shape \(256, 16\); got shape \(256, 8\)"):
        generative_metrics(images[:, :8], images, Pixels())
    with pytest.raises(ValueError, match="with NaN or inf"):
        generative_metrics(images / 0, images, Pixels())
    with pytest.raises(ValueError, match=r"`subset_size` at least 2; got 20 and 1"):
        generative_metrics(images, images, Pixels(), subset_size=1)


def test_training_images_are_checked(images):
    with pytest.raises(ValueError, match=r"shape \(16,\) of those in `images`; got shape \(300, 1, 4, 4\)"):
        nearest_distances(images, images.reshape(300, 1, 4, 4))
    with pytest.raises(ValueError, match=r"got shape \(0, 16\)"):
        nearest_distances(images, images[:0])
