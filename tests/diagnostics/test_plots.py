"""Figures show the numbers they are given."""

import matplotlib.pyplot as plt
import numpy as np
import pyro
import pytest
import torch

from pyro_vnd.diagnostics import plot_keep_probs, plot_prefixes, plot_widths, to_arviz
from pyro_vnd.distributions import OrderedMask

K = 6


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


def test_keep_probs_line_and_band():
    law = OrderedMask.geometric(0.7, K)

    def model():
        with pyro.plate("data", 40):
            pyro.sample("mask", law)

    ax = plot_keep_probs(to_arviz(model, model, num_samples=400), ["mask"])
    shown = ax.lines[0].get_ydata()
    # Mean over 16,000 masks: standard error at most .004.
    np.testing.assert_allclose(shown, law.keep_probs, atol=0.02)
    corners = ax.collections[0].get_paths()[0].vertices
    middle = corners[corners[:, 0] == 3][:, 1]
    # 90 % of shares of 40 images: +- 1.64 sqrt(S (1 - S) / 40).
    half = 1.64 * (law.variance[2].item() / 40) ** 0.5
    assert middle.max() - middle.min() == pytest.approx(2 * half, rel=0.2)


def test_keep_probs_uses_the_given_axes():
    def model():
        pyro.sample("mask", OrderedMask.uniform(K))

    _, ax = plt.subplots()
    assert plot_keep_probs(to_arviz(model, model, num_samples=5), ["mask"], ax=ax) is ax


def test_widths_one_panel_a_metric_with_bands():
    axes = plot_widths([0.5, 1.0], {"accuracy": [0.8, 0.9], "accuracy_se": [0.1, 0.1], "ece": [0.2, 0.1]})
    assert [ax.get_ylabel() for ax in axes] == ["accuracy", "ece"]
    assert axes[0].lines[0].get_ydata().tolist() == [0.8, 0.9]
    assert [len(ax.collections) for ax in axes] == [1, 0]


def test_prefixes_one_row_a_length_in_order():
    images = torch.rand(3, 8, 8)
    figure = plot_prefixes(images, {4: images / 2, 1: images / 4})
    assert len(figure.axes) == 9
    assert [figure.axes[i].get_ylabel() for i in (0, 3, 6)] == ["data", "1", "4"]
    np.testing.assert_array_equal(figure.axes[3].images[0].get_array(), images[0] / 4)
