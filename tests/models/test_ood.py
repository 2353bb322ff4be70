"""Out-of-domain sets: what each holds, and that choices and final numbers see different ones."""

import numpy as np
import pytest
import torch

from models.ood import ood_sets

NAMES = ["digits", "inverted", "rotated", "noise"]


def as_set(images: torch.Tensor) -> set[tuple[float, ...]]:
    return set(map(tuple, images.flatten(1).tolist()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("size", [8, 28])
def test_layout_and_dtype_are_those_of_the_images(size, dtype):
    images = torch.rand(6, 1, size, size).to(dtype)
    sets = ood_sets(images)
    assert list(sets) == NAMES
    for name, out in sets.items():
        assert out.shape == (899 if name == "digits" else 6, 1, size, size)
        assert out.dtype == dtype
        assert out.is_contiguous()
        assert out.min() >= 0
        assert out.max() <= 1


def test_digits_of_the_two_parts_are_disjoint_and_together_all():
    from sklearn.datasets import load_digits

    pixels, _ = load_digits(return_X_y=True)
    images = torch.rand(1, 1, 8, 8)  # at this size, digits keep their pixels
    parts = [ood_sets(images, split=split)["digits"] for split in ("validation", "test")]
    assert [len(part) for part in parts] == [898, 899]
    assert not as_set(parts[0]) & as_set(parts[1])
    together = np.concatenate([part.flatten(1) * 16 for part in parts])
    assert sorted(map(tuple, together)) == sorted(map(tuple, pixels))


def test_digits_are_enlarged_smoothly():
    small = ood_sets(torch.rand(1, 1, 8, 8))["digits"]
    large = ood_sets(torch.rand(1, 1, 24, 24))["digits"]
    # Every third pixel from the second on is the middle of one that was there before.
    torch.testing.assert_close(large[:, :, 1::3, 1::3], small)
    steps = [images.diff(dim=-1).abs().max() for images in (large, small)]
    assert steps[0] < steps[1] / 2


def test_inverted_and_rotated_are_the_images_changed():
    images = torch.rand(4, 1, 5, 5)
    sets = ood_sets(images)
    torch.testing.assert_close(sets["inverted"] + images, torch.ones_like(images))
    # The top row becomes the left column, read upwards.
    torch.testing.assert_close(sets["rotated"][:, 0, :, 0].flip(-1), images[:, 0, 0])
    torch.testing.assert_close(sets["rotated"].rot90(3, (2, 3)), images)


def test_noise_is_uniform_and_another_for_each_seed_and_part():
    images = torch.rand(50, 1, 28, 28)
    noises = [ood_sets(images, split=s, seed=k)["noise"] for k in range(3) for s in ("validation", "test")]
    for noise in noises:
        counts = torch.histc(noise, 10, 0, 1)
        expected = noise.numel() / 10
        assert ((counts - expected) ** 2 / expected).sum() < 33  # chi-squared, 9 degrees: p = 1e-4
    assert len({noise[0, 0, 0, 0].item() for noise in noises}) == len(noises)


def test_the_same_call_gives_the_same_and_leaves_the_global_random_state_alone():
    images = torch.rand(3, 1, 28, 28)
    before = torch.get_rng_state()
    first, second = ood_sets(images, seed=5), ood_sets(images, seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], second[name]) for name in NAMES)


def test_the_images_stay_as_they_were():
    images = torch.rand(3, 1, 8, 8)
    before = images.clone()
    for out in ood_sets(images).values():
        out.zero_()
    assert torch.equal(images, before)


@pytest.mark.parametrize(
    ("images", "complaint"),
    [
        pytest.param(torch.zeros(3, 28, 28), r"gray and square.*\(3, 28, 28\)", id="no-channel"),
        pytest.param(torch.zeros(3, 3, 32, 32), "gray and square", id="colour"),
        pytest.param(torch.zeros(3, 1, 28, 27), "gray and square", id="not-square"),
        pytest.param(torch.zeros(0, 1, 28, 28), "gray and square", id="empty"),
        pytest.param(torch.zeros(3, 1, 8, 8, dtype=torch.uint8), "must be floats; got torch.uint8", id="bytes"),
        pytest.param(torch.full((3, 1, 8, 8), 255.0), r"in \[0, 1\]; got values from 255", id="255"),
        pytest.param(torch.full((3, 1, 8, 8), -0.1), r"in \[0, 1\]", id="negative"),
        pytest.param(torch.full((3, 1, 8, 8), float("nan")), r"in \[0, 1\]; got values from nan", id="nan"),
    ],
)
def test_wrong_images_are_named(images, complaint):
    with pytest.raises(ValueError, match=complaint):
        ood_sets(images)


def test_an_unknown_part_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match="`split` must be one of validation, test; got 'train'"):
        ood_sets(torch.rand(1, 1, 8, 8), split="train")
