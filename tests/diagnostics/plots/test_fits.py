"""Figures of ELBOs and ranks show the numbers they are given, and the band has the coverage that it states."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import xarray as xr

from pyro_vnd.diagnostics.plots.fits import _binomial_interval, _simultaneous_band, plot_elbo, plot_ranks
from pyro_vnd.infer import FitResult, Plateau

N, L = 200, 39


def result(num_epochs, converged=False, kl=0.5):
    elbo = [-2.0 - 1 / epoch for epoch in range(1, num_epochs + 1)]
    return FitResult(elbo=elbo, log_likelihood=[e + kl for e in elbo], kl=[kl] * num_epochs, converged=converged)


def labels(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def test_elbo_and_its_parts_by_epoch():
    fit = result(30)
    ax = plot_elbo(fit)
    elbo, log_likelihood = ax.lines
    np.testing.assert_array_equal(elbo.get_xdata(), np.arange(1, 31))
    np.testing.assert_array_equal(elbo.get_ydata(), fit.elbo)
    np.testing.assert_array_equal(log_likelihood.get_ydata(), fit.log_likelihood)
    band = ax.collections[0].get_paths()[0].vertices
    at_end = band[band[:, 0] == 30][:, 1]
    assert np.ptp(at_end) == pytest.approx(0.5)  # the KL
    assert labels(ax) == ["ELBO"]
    assert (ax.get_xscale(), ax.get_xlabel(), ax.get_ylabel()) == ("log", "epoch", "nats per row")


def test_a_dot_is_where_the_rule_held():
    stopped, long, rule = result(70, converged=True), result(100), Plateau(window=10)
    ax = plot_elbo({"stopped": stopped, "long": long}, rule=rule, parts=False)
    dots = [(line.get_xdata()[0], line.get_ydata()[0]) for line in ax.lines if line.get_marker() == "o"]
    # A trace of -1 / epoch is at rest after 70 epochs by this rule.
    assert dots == [(70, stopped.elbo[-1]), (rule.first(long.elbo), long.elbo[69])]
    assert labels(ax) == ["stopped", "stopped: at rest after 70 epochs", "long", "long: at rest after 70 epochs"]
    assert [line.get_marker() for line in plot_elbo([long, long], parts=False).lines] == ["None", "None"]
    assert len(plot_elbo(result(30), rule=rule, parts=False).lines) == 1  # the rule never held


def test_parts_that_nobody_knows_are_left_out():
    _, given = plt.subplots()
    ax = plot_elbo(result(10, kl=np.nan), ax=given)
    assert ax is given
    assert len(ax.lines) == 1
    assert not ax.collections
    assert ax.get_legend().get_title().get_text() == ""


@pytest.fixture
def ranks():
    rng = np.random.default_rng(0)
    uniform = rng.integers(0, L + 1, size=(N, 3))
    high = np.minimum(uniform[:, 0], rng.integers(0, L + 1, size=N))  # a guide whose draws are above the truth
    return xr.Dataset({"mu": (("simulation", "d"), uniform), "w": ("simulation", high)}, attrs={"num_posterior": L})


def test_distribution_functions_and_their_band(ranks):
    ax = plot_ranks(ranks)
    curves = [line for line in ax.lines if len(line.get_xdata()) > 2]
    assert len(curves) == 4
    assert labels(ax) == ["95% band", "mu", "w"]
    ends = np.arange(1, L + 1) / (L + 1)
    np.testing.assert_allclose(curves[0].get_xdata(), ends)
    expected = [(ranks["mu"].values[:, 0] <= r).mean() - (r + 1) / (L + 1) for r in range(L)]
    np.testing.assert_allclose(curves[0].get_ydata(), expected, atol=1e-12)
    low, high = _simultaneous_band(ends, N, 0.95)
    outside = [((c.get_ydata() + ends < low / N - 1e-9) | (c.get_ydata() + ends > high / N + 1e-9)) for c in curves]
    assert not np.any(outside[:3])
    assert np.mean(outside[3]) > 0.5
    assert curves[3].get_ydata().max() > 0.15  # above: the guide is too high
    assert next(line for line in plot_ranks(ranks, ["w"]).lines if len(line.get_xdata()) > 2).get_color() == "C0"


@pytest.mark.parametrize("prob", [0.5, 0.95])
def test_the_band_holds_all_of_a_uniform_function_at_the_stated_rate(prob):
    ends, n = np.arange(1, L + 1) / (L + 1), 20_000
    low, high = _simultaneous_band(ends, N, prob)
    counts = np.random.default_rng(1).multinomial(N, np.full(L + 1, 1 / (L + 1)), n).cumsum(-1)[:, :-1]
    share = ((low <= counts) & (counts <= high)).all(-1).mean()
    # Errors of .0015 here and .0035 of the level, from 4,000 sets, at .95; and counts are whole.
    assert share == pytest.approx(prob, abs=0.03)
    pointwise = _binomial_interval(ends, N, 1 - prob)
    alone = ((pointwise[0] <= counts) & (counts <= pointwise[1])).all(-1).mean()
    assert alone < prob - 0.2  # power: a band for one rank at a time is too narrow for all


def test_histograms_and_their_band(ranks):
    ax = plot_ranks(ranks, ["w"], kind="hist", prob=0.9)
    band, level, bars = (patch.get_data() for patch in ax.patches)
    assert bars.values.tolist() == np.bincount(ranks["w"] // 2, minlength=20).tolist()
    np.testing.assert_allclose(bars.edges, np.arange(21) / 20)
    np.testing.assert_allclose(level.values, 10)
    # Binomial(200, 1/20): P(X <= 5) = .062, P(X <= 4) = .026; P(X <= 15) = .956, P(X <= 14) = .922.
    assert (band.baseline[0], band.values[0]) == (5, 15)
    assert labels(ax) == ["90% of each bin", "w"]


def test_bins_that_cannot_be_even_have_a_level_of_their_own(ranks):
    few = ranks.isel(simulation=slice(70))
    ax = plot_ranks(few, ["w"], kind="hist")
    _, level, bars = (patch.get_data() for patch in ax.patches)
    assert len(level.values) == 7
    np.testing.assert_allclose(level.values, 70 * np.diff(bars.edges))
    assert bars.values.sum() == 70


def test_unknown_arguments_are_refused(ranks):
    with pytest.raises(ValueError, match=r"`var_names` must be among \['mu', 'w'\]; got \['z'\]"):
        plot_ranks(ranks, ["z"])
    with pytest.raises(ValueError, match="`kind` must be 'ecdf' or 'hist'; got 'bars'"):
        plot_ranks(ranks, kind="bars")
    with pytest.raises(ValueError, match=r"`prob` must be in \(0, 1\); got 1"):
        plot_ranks(ranks, prob=1)
