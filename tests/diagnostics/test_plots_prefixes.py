"""Figures of ordered codes show the numbers and the images of their model."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import xarray as xr
from linear_vae import linear_vae

from pyro_vnd.diagnostics import (
    evaluate_prefixes,
    plot_class_lengths,
    plot_rate_distortion,
    plot_samples,
    plot_traversals,
)

K = 4


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def model(digits):
    return linear_vae(digits.test.images.double(), K).model


@pytest.fixture(scope="module")
def seeds(model, digits):
    """One model, two seeds of its draws; the lengths are not in order."""
    data = digits.test.images.double(), digits.test.labels
    options = {"num_samples": 1, "num_importance": 0, "progress": False}
    return xr.concat([evaluate_prefixes(model, data, [4, 1, 2], seed=seed, **options) for seed in (0, 1)], "seed")


def tile(ax, row, column, side=8):
    picture = np.asarray(ax.images[0].get_array())
    return picture[row * (side + 1) :, column * (side + 1) :][:side, :side]


def test_rate_distortion_has_a_labelled_point_a_length(seeds):
    ax = plot_rate_distortion({"linear": seeds})
    line, star = ax.containers
    ordered = seeds.sortby("prefix")
    np.testing.assert_allclose(line[0].get_xdata(), ordered["rate"].mean("seed"))
    np.testing.assert_allclose(line[0].get_ydata(), ordered["distortion"].mean("seed"))
    assert [text.get_text() for text in ax.texts] == ["1", "2", "4"]
    assert [text.xy[0] for text in ax.texts] == ordered["rate"].mean("seed").values.tolist()
    assert star[0].get_xdata() == pytest.approx(seeds["rate_learned"].mean().item())
    # Bars of one standard error, that of two values, over seeds.
    bars = line[2][1].get_segments()
    half = abs(np.diff(ordered["distortion"].values, axis=0)[0]) / 2
    assert [(bar[1, 1] - bar[0, 1]) / 2 for bar in bars] == pytest.approx(half.tolist())
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["learned lengths", "linear"]


def test_rate_distortion_of_one_seed_and_given_axes(seeds):
    _, ax = plt.subplots()
    assert plot_rate_distortion(seeds.sel(seed=[0]).drop_vars("rate_learned"), ax=ax) is ax
    (line,) = ax.containers
    assert all(np.ptp(bar[:, 1]) == 0 for bar in line[2][1].get_segments())
    assert ax.get_legend() is None


def test_rate_distortion_needs_both(seeds):
    with pytest.raises(ValueError, match="must have rate and distortion; 'a' has"):
        plot_rate_distortion({"a": seeds.drop_vars("rate")})


def test_class_lengths_go_from_short_to_long(seeds):
    changed = seeds.copy()
    changed["keep_probs"] = seeds["keep_probs"] * (1 - 0.05 * seeds["class"])  # the ninth has the shortest codes
    ax = plot_class_lengths(changed, [f"digit {number}" for number in range(10)])
    texts = [text.get_text() for text in ax.get_legend().get_texts()]
    mean = changed["keep_probs"].mean("seed")
    assert texts[0] == f"digit 9: {mean.sel({'class': 9}).sum().item():.1f}"
    assert texts[-1] == f"digit 0: {2.5:.1f}"
    np.testing.assert_allclose(ax.lines[0].get_ydata(), mean.sel({"class": 9}))
    assert ax.lines[0].get_xdata().tolist() == [1, 2, 3, 4]


def test_class_lengths_are_checked(seeds):
    with pytest.raises(ValueError, match="must have keep_probs"):
        plot_class_lengths(seeds.drop_vars("keep_probs"))
    with pytest.raises(ValueError, match="must be 10 names; got 2"):
        plot_class_lengths(seeds, ["a", "b"])


def test_traversals_change_one_latent_a_row(model, digits):
    x = digits.test.images[0].double()
    ax = plot_traversals(model, x, [3, 1], span=2, num_steps=5)
    with torch.no_grad():
        code = model.embed(x[None])[0]
        for row, unit in enumerate((3, 1)):
            for column, value in enumerate((-2, -1, 0, 1, 2)):
                changed = code.clone()
                changed[unit - 1] = value
                np.testing.assert_allclose(tile(ax, row, column), model.decode(changed).reshape(8, 8))
    assert [text.get_text() for text in ax.get_yticklabels()] == ["3", "1"]
    assert [text.get_text() for text in ax.get_xticklabels()] == ["-2.0", "-1.0", "0.0", "1.0", "2.0"]
    assert len(plot_traversals(model, x).get_yticks()) == K


def test_traversals_are_checked(model, digits):
    x = digits.test.images[0].double()
    with pytest.raises(ValueError, match=r"`units` must be integers from 1 to 4; got \[5\]"):
        plot_traversals(model, x, [5])
    with pytest.raises(ValueError, match="got 0 and 9"):
        plot_traversals(model, x, span=0)
    pairs = Images(8, 8)
    pairs.embed = lambda x, length: torch.zeros(len(x), 4)
    with pytest.raises(ValueError, match=r"codes of shape \(1, 2\), one number a latent; got \(1, 4\)"):
        plot_traversals(pairs, x)


def test_samples_of_a_column_share_their_latents(model):
    torch.manual_seed(5)
    ax = plot_samples(model, [1, 4, None], 6, seed=3)
    after = torch.rand(2)
    torch.manual_seed(5)
    torch.testing.assert_close(torch.rand(2), after)
    for row, length in enumerate((1, 4, None)):
        torch.manual_seed(3)
        expected = model.sample(6, length).reshape(6, 8, 8)
        np.testing.assert_allclose(tile(ax, row, 5), expected[5])
    # The first component is orthogonal to the others: its share of both is the same.
    component = model.decoder.entry.weight[:, 0].detach().numpy()
    mean = model.decoder.entry.bias.detach().numpy()
    shares = [(tile(ax, row, 2).ravel() - mean) @ component for row in (0, 1)]
    assert shares[0] == pytest.approx(shares[1])
    assert abs(shares[0]) > 0.01
    assert [text.get_text() for text in ax.get_yticklabels()] == ["1", "4", "prior"]


class Images:
    """Gives images of a shape."""

    num_latents = 2

    def __init__(self, *shape):
        self.shape = shape

    def sample(self, num_samples, length):
        return torch.rand(num_samples, *self.shape)


@pytest.mark.parametrize("shape", [(25,), (5, 5), (1, 5, 5)], ids=str)
def test_gray_images(shape):
    assert plot_samples(Images(*shape), [1, 2], 3).images[0].get_array().shape == (12, 18)


def test_colour_images():
    assert plot_samples(Images(3, 5, 5), [1, 2], 3).images[0].get_array().shape == (12, 18, 3)


@pytest.mark.parametrize("shape", [(24,), (2, 5, 5)], ids=str)
def test_images_that_cannot_be_shown(shape):
    with pytest.raises(ValueError, match="`model` must give images of shape"):
        plot_samples(Images(*shape), [1])


def test_samples_are_checked(model):
    with pytest.raises(ValueError, match=r"got \[\] and 10"):
        plot_samples(model, [])
    with pytest.raises(ValueError, match=r"got \[1\] and 0"):
        plot_samples(model, [1], 0)
