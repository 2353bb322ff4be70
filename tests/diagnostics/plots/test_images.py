"""Pictures show the images of their model."""

import numpy as np
import pytest
import torch

from pyro_vnd.diagnostics import plot_prefixes, plot_samples, plot_traversals

K = 4


def tile(ax, row, column, side=8):
    picture = np.asarray(ax.images[0].get_array())
    return picture[row * (side + 1) :, column * (side + 1) :][:side, :side]


def test_prefixes_one_row_a_length_in_order():
    images = torch.rand(3, 8, 8)
    ax = plot_prefixes(images, {4: images / 2, 1: images / 4})
    assert [text.get_text() for text in ax.get_yticklabels()] == ["data", "1", "4"]
    for row, shown in enumerate((images, images / 4, images / 2)):
        for column in range(3):
            np.testing.assert_array_equal(tile(ax, row, column), shown[column])
    assert plot_prefixes(images, {1: images}, ax=ax) is ax


def test_prefixes_of_colour_images_with_channels_last():
    images = np.random.default_rng(0).random((2, 8, 8, 3))
    np.testing.assert_array_equal(tile(plot_prefixes(images, {1: images / 2}), 1, 1), images[1] / 2)


def test_prefixes_are_checked():
    images = torch.rand(3, 8, 8)
    with pytest.raises(ValueError, match=r"shape of `images`, \(3, 8, 8\); got \(2, 8, 8\) for length 2"):
        plot_prefixes(images, {1: images, 2: images[:2]})
    with pytest.raises(ValueError, match=r"plot_prefixes: `images` must have shape .* got \(3, 24\)"):
        plot_prefixes(torch.rand(3, 24), {})


def test_traversals_change_one_latent_a_row(linear_model, digits):
    x = digits.test.images[0].double()
    ax = plot_traversals(linear_model, x, [3, 1], span=2, num_steps=5)
    with torch.no_grad():
        code = linear_model.embed(x[None])[0]
        for row, unit in enumerate((3, 1)):
            for column, value in enumerate((-2, -1, 0, 1, 2)):
                changed = code.clone()
                changed[unit - 1] = value
                np.testing.assert_allclose(tile(ax, row, column), linear_model.decode(changed).reshape(8, 8))
    assert [text.get_text() for text in ax.get_yticklabels()] == ["3", "1"]
    assert [text.get_text() for text in ax.get_xticklabels()] == ["-2.0", "-1.0", "0.0", "1.0", "2.0"]
    assert len(plot_traversals(linear_model, x).get_yticks()) == K


def test_traversals_are_checked(linear_model, digits):
    x = digits.test.images[0].double()
    with pytest.raises(ValueError, match=r"`units` must be integers from 1 to 4; got \[5\]"):
        plot_traversals(linear_model, x, [5])
    with pytest.raises(ValueError, match="got 0 and 9"):
        plot_traversals(linear_model, x, span=0)
    pairs = Images(8, 8)
    pairs.embed = lambda x, length: torch.zeros(len(x), 4)
    with pytest.raises(ValueError, match=r"codes of shape \(1, 2\), one number a latent; got \(1, 4\)"):
        plot_traversals(pairs, x)


def test_samples_of_a_column_share_their_latents(linear_model):
    torch.manual_seed(5)
    ax = plot_samples(linear_model, [1, 4, None], 6, seed=3)
    after = torch.rand(2)
    torch.manual_seed(5)
    torch.testing.assert_close(torch.rand(2), after)
    for row, length in enumerate((1, 4, None)):
        torch.manual_seed(3)
        expected = linear_model.sample(6, length).reshape(6, 8, 8)
        np.testing.assert_allclose(tile(ax, row, 5), expected[5])
    # The first component is orthogonal to the others: its share of both is the same.
    component = linear_model.decoder.entry.weight[:, 0].detach().numpy()
    mean = linear_model.decoder.entry.bias.detach().numpy()
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
    with pytest.raises(ValueError, match="plot_samples: images of `model` must have shape"):
        plot_samples(Images(*shape), [1])


def test_samples_are_checked(linear_model):
    with pytest.raises(ValueError, match=r"got \[\] and 10"):
        plot_samples(linear_model, [])
    with pytest.raises(ValueError, match=r"got \[1\] and 0"):
        plot_samples(linear_model, [1], 0)
