"""Figures of lengths show the numbers of their datasets, and images from the shortest code to the longest."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import xarray as xr

from pyro_vnd.diagnostics import evaluate_lengths, plot_lengths, plot_sorted_by_length
from pyro_vnd.diagnostics.metrics.lengths import LAWS

MEANS = [3.0, 1.5, 2.5]


@pytest.fixture(scope="module")
def seeds(linear_model, digits):
    """One model, two seeds of its draws; mean lengths are not in order."""
    data = digits.test.images.double(), digits.test.labels
    options = {"num_decoded": 3, "progress": False}
    return xr.concat([evaluate_lengths(linear_model, data, MEANS, seed=seed, **options) for seed in (0, 1)], "seed")


def test_each_law_has_a_line_of_errors_and_one_of_rates(seeds):
    error, rate = plot_lengths(seeds)
    ordered = seeds.sortby("mean_length")
    assert len(error.containers) == len(rate.containers) == len(LAWS)
    for law, line, other in zip(LAWS, error.containers, rate.containers, strict=True):
        at = ordered.sel(law=law)
        np.testing.assert_allclose(line[0].get_xdata(), [1.5, 2.5, 3.0])
        np.testing.assert_allclose(line[0].get_ydata(), at["mse"].mean("seed"))
        np.testing.assert_allclose(other[0].get_xdata(), at["rate"].mean("seed"))
        np.testing.assert_allclose(other[0].get_ydata(), at["distortion"].mean("seed"))
        half = abs(np.diff(at["distortion"].values, axis=0)[0]) / 2  # a standard error of two values
        bars = [segment for bar in other[2] for segment in bar.get_segments()]
        vertical = [bar for bar in bars if bar[0, 0] == bar[1, 0]]
        assert [(bar[1, 1] - bar[0, 1]) / 2 for bar in vertical][-3:] == pytest.approx(half.tolist(), abs=1e-9)
    texts = [text.get_text() for text in error.get_legend().get_texts()]
    assert texts == ["one length for all", "lengths from the encoder", "from 3 decodes", "exact"]
    assert error.get_ylim()[0] == 0
    assert (error.get_xlabel(), rate.get_ylabel()) == ("mean length (latents)", "distortion (nats)")


def test_images_come_above_if_there_are_any(seeds, digits):
    images, error, rate = plot_lengths(seeds, digits.test.images, mean_length=1.5)
    assert len(images.images) == 1
    assert len(images.texts) == 20
    assert "mean length 1.5" in images.get_title()
    assert len(error.containers) == len(rate.containers) == len(LAWS)
    assert len(plot_lengths(seeds.sel(seed=[0]).drop_vars(["rate", "distortion"]))) == 1


@pytest.fixture
def known():
    """A dataset whose lengths are known, out of order, and images that are all of one grey."""
    order = np.random.default_rng(0).permutation(30)
    lengths = np.broadcast_to(1 + order / 10, (2, 1, 2, 30)) + np.array([0, 100])[:, None, None, None]
    coords = {"seed": [0, 1], "law": ["model"], "mean_length": [2.0, 4.0]}
    dataset = xr.Dataset({"length": (("seed", "law", "mean_length", "image"), lengths)}, coords)
    return dataset, torch.as_tensor(order / 30).reshape(30, 1, 1).expand(30, 6, 6)


@pytest.mark.parametrize("num_images", [1, 7, 20, 30, 50])
def test_images_go_from_the_shortest_code_to_the_longest(known, num_images: int):
    dataset, images = known
    ax = plot_sorted_by_length(dataset, images, num_images=num_images)
    shown = min(num_images, 30)
    labels = [float(text.get_text()) for text in ax.texts]
    assert len(labels) == shown
    assert labels == sorted(labels)
    if shown > 1:
        assert (labels[0], labels[-1]) == (1.0, 3.9)  # of the first seed
    if shown == 30:
        assert labels == pytest.approx([1 + i / 10 for i in range(30)])
    # Below each label is the image that has this length.
    canvas = ax.images[0].get_array()
    for text, label in zip(ax.texts, labels, strict=True):
        x, y = text.get_position()
        patch = canvas[round(y) + 1 : round(y) + 7, round(x) - 3 : round(x) + 3]
        np.testing.assert_allclose(patch, round((label - 1) * 10) / 30)


def test_colours_given_axes_and_other_kinds_of_arrays(known):
    dataset, images = known
    _, ax = plt.subplots()
    colour = images.unsqueeze(1).expand(30, 3, 6, 6)
    assert plot_sorted_by_length(dataset, colour, ax=ax, mean_length=4.0, num_images=5) is ax
    assert ax.images[0].get_array().shape[-1] == 3
    plot_sorted_by_length(dataset, images.numpy())
    plot_sorted_by_length(dataset, images.clone().requires_grad_())


def test_arguments_are_checked(seeds, known, digits):
    with pytest.raises(ValueError, match="plot_lengths: argument `dataset` must be what evaluate_lengths returned; it"):
        plot_lengths(seeds.drop_vars("mse"))
    with pytest.raises(ValueError, match="plot_sorted_by_length: argument `dataset` must be what evaluate_lengths"):
        plot_sorted_by_length(xr.Dataset(), torch.rand(3, 6, 6))
    dataset, images = known
    with pytest.raises(ValueError, match="`num_images` must be an integer >= 1; got 0"):
        plot_sorted_by_length(dataset, images, num_images=0)
    for wrong in ({"mean_length": 3.0}, {"law": "exact"}):
        with pytest.raises(ValueError, match=r"`law` and `mean_length` must be of .*model.* and \[2.0, 4.0\]; got"):
            plot_sorted_by_length(dataset, images, **wrong)
    with pytest.raises(ValueError, match="`images` must be the 30 that were evaluated; got 29"):
        plot_sorted_by_length(dataset, images[1:])
    with pytest.raises(ValueError, match="plot_sorted_by_length: `images` must have shape"):
        plot_sorted_by_length(dataset, torch.rand(30, 7))
