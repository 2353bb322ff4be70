"""Figures of ordered codes show the numbers of their datasets."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import xarray as xr

from pyro_vnd.diagnostics import evaluate_prefixes, plot_class_lengths, plot_rate_distortion

K = 4


@pytest.fixture(scope="module")
def seeds(linear_model, digits):
    """One model, two seeds of its draws; the lengths are not in order."""
    data = digits.test.images.double(), digits.test.labels
    options = {"num_samples": 1, "num_importance": 0, "progress": False}
    return xr.concat(
        [evaluate_prefixes(linear_model, data, [4, 1, 2], seed=seed, **options) for seed in (0, 1)], "seed"
    )


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
