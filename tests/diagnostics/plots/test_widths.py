"""Figures of evaluations show the numbers of their datasets."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import xarray as xr

from pyro_vnd.diagnostics import (
    evaluate_cascade,
    evaluate_learned,
    evaluate_widths,
    plot_ood,
    plot_reliability,
    plot_widths,
)
from pyro_vnd.nn import CascadeNet


@pytest.fixture(scope="module")
def seeds(trained, digits):
    """One net, two seeds of its draws."""
    ood = {"noise": torch.rand(100, 64, generator=torch.Generator().manual_seed(0))}
    results = [evaluate_widths(trained, digits.test, [0.5, 1.0], 4, ood, seed=s, progress=False) for s in (0, 1)]
    return xr.concat(results, "seed")


def band(ax, number=0):
    corners = ax.collections[number].get_paths()[0].vertices
    return corners[:, 1].min(), corners[:, 1].max()


def test_lines_are_means_and_bands_standard_errors_over_seeds(seeds):
    (ax,) = plot_widths({"nested": seeds}, ["nll"])
    np.testing.assert_allclose(ax.lines[0].get_xdata(), [0.5, 1.0])
    np.testing.assert_allclose(ax.lines[0].get_ydata(), seeds["nll"].mean("seed"))
    first, second = seeds["nll"].values
    half = np.abs(first - second) / 2  # the standard error of two values
    assert band(ax) == pytest.approx((min((first + second) / 2 - half), max((first + second) / 2 + half)))
    assert ax.get_ylabel() == "negative log-likelihood (nats)"
    assert ax.get_xlabel() == "width (share of the units)"
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["nested"]


def test_one_seed_has_its_standard_error_over_rows(seeds):
    one = seeds.sel(seed=[0])
    nll, ece = plot_widths(one, ["nll", "ece"])
    mean, error = one["nll"].values[0], one["nll_se"].values[0]
    assert band(nll) == pytest.approx((min(mean - error), max(mean + error)))
    corners = ece.collections[0].get_paths()[0].vertices
    assert set(corners[:, 1]) == set(one["ece"].values[0])  # no error is known: the band has no height
    assert nll.get_legend() is None


def test_a_method_without_widths_is_a_level_line(seeds, trained, digits):
    learned = evaluate_learned(trained, digits.test, 4, progress=False)
    (ax,) = plot_widths({"learned": learned, "nested": seeds}, ["accuracy"], x="multiply_adds")
    assert set(ax.lines[0].get_ydata()) == {learned["accuracy"].item()}
    np.testing.assert_allclose(ax.lines[1].get_xdata(), seeds["multiply_adds"].values[0])
    assert ax.get_xlabel() == "multiply-adds (per row)"
    assert ax.get_xscale() == "log"


def test_a_cascade_is_drawn_against_what_it_costs(seeds, trained, digits):
    cascade = CascadeNet(trained, [0.5, 1.0])
    found = evaluate_cascade(cascade, digits.test, digits.validation, [0.5, 0.75], progress=False)
    (ax,) = plot_widths({"cascade": found, "nested": seeds}, ["nll"], x="multiply_adds")
    np.testing.assert_allclose(ax.lines[0].get_xdata(), found["multiply_adds"].values[0])
    np.testing.assert_allclose(ax.lines[0].get_ydata(), found["nll"].values[0])
    assert ax.get_xlabel() == "multiply-adds (per row)"
    titles = [panel.get_title() for panel in plot_reliability(found)]
    assert [title.partition(",")[0] for title in titles] == ["mean cost 0.5", "mean cost 0.75"]
    with pytest.raises(ValueError, match="dataset 'cascade' has no `x` 'width'; it has mean_cost, multiply_adds"):
        plot_widths({"cascade": found}, ["nll"])


def test_metrics_of_foreign_data_are_selected_first(seeds):
    with pytest.raises(ValueError, match=r"'auroc' has the dimensions \['ood', 'score'\] too; select"):
        plot_widths({"nested": seeds}, ["auroc"])
    (ax,) = plot_widths({"nested": seeds.sel(ood="noise", score="entropy")}, ["auroc"])
    expected = seeds["auroc"].sel(ood="noise", score="entropy").mean("seed")
    np.testing.assert_allclose(ax.lines[0].get_ydata(), expected)


def test_unknown_names_are_refused(seeds):
    with pytest.raises(ValueError, match="dataset 'nested' has no metric 'f1'; it has"):
        plot_widths({"nested": seeds}, ["f1"])
    with pytest.raises(ValueError, match="has no `x` 'seconds'"):
        plot_widths({"nested": seeds}, ["nll"], x="seconds")
    with pytest.raises(ValueError, match=r"`score` must be one of \['doubt', .*got 'energy'"):
        plot_ood(seeds, "energy")
    with pytest.raises(ValueError, match=r"`score` must be one of \[\]"):
        plot_ood(seeds.drop_dims(["source", "ood"]))


def test_reliability_pools_seeds_and_shows_counts(seeds):
    axes = plot_reliability(seeds)
    assert axes.shape == (2,)
    right_bars, count_bars = axes[1].containers  # width 1
    at = seeds.sel(width=1.0)
    counts = at["bin_count"].sum("seed")
    np.testing.assert_allclose([bar.get_height() for bar in count_bars], counts / 718)
    right = (at["bin_count"] * at["bin_accuracy"]).sum("seed") / counts
    np.testing.assert_allclose([bar.get_height() for bar in right_bars], right.fillna(0))
    assert axes[1].get_title() == f"width 1, ECE {at['ece'].mean().item():.3f}"


def test_reliability_without_widths_has_one_panel(trained, digits):
    _, given = plt.subplots()
    (ax,) = plot_reliability(evaluate_learned(trained, digits.test, 2, progress=False), ax=given)
    assert ax is given
    assert ax.get_title().startswith("ECE 0.")


def test_histograms_of_scores_have_shares_and_aurocs(seeds):
    ax = plot_ood(seeds, "entropy")[1]
    shown = ax.patches[0].get_data()
    assert shown.edges[[0, -1]] == pytest.approx([0, np.log(10)])
    assert shown.values.sum() == pytest.approx(1)
    auroc = seeds["auroc"].sel(width=1.0, ood="noise", score="entropy").mean().item()
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["test", f"noise, AUROC {auroc:.3f}"]
    assert (ax.get_title(), ax.get_xlabel()) == ("width 1", "entropy (nats)")


@pytest.mark.parametrize("plot", [plot_widths, plot_reliability, plot_ood])
def test_axes_may_be_given_and_are_counted(seeds, plot):
    panels = 3 if plot is plot_widths else 2  # metrics, or widths
    _, axes = plt.subplots(1, 3)
    assert plot(seeds, ax=axes[:panels]).tolist() == axes[:panels].tolist()
    with pytest.raises(ValueError, match=rf"{plot.__name__}: `ax` must be {panels} axes, one a panel; got 1"):
        plot(seeds, ax=axes[0])
