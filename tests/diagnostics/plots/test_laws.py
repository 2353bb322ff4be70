"""Figures of laws of masks show the numbers they are given."""

import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from matplotlib.patches import Rectangle, StepPatch

from pyro_vnd.diagnostics import plot_keep_probs, plot_laws, plot_length_posterior, to_arviz
from pyro_vnd.diagnostics.posterior._arviz import dataset
from pyro_vnd.distributions import OrderedMask

K = 6


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


@pytest.mark.parametrize("num_fits", [1, 3])
def test_keep_probs_of_one_global_mask_are_its_law(num_fits):
    laws = [OrderedMask.geometric(0.3 * (1 + i), K) for i in range(num_fits)]
    guides = [lambda law=law: pyro.sample("mask", law) for law in laws]
    ax = plot_keep_probs(to_arviz(lambda: pyro.sample("mask", OrderedMask.uniform(K)), guides, num_samples=7), ["mask"])
    mean, *fits = [line.get_ydata() for line in ax.lines]
    expected = torch.stack([law.keep_probs for law in laws])
    np.testing.assert_allclose(mean, expected.mean(0), rtol=1e-6)  # seven draws would be far off
    np.testing.assert_allclose(fits, expected if num_fits > 1 else [], rtol=1e-6)
    assert not ax.collections  # no band, which would go from 0 to 1
    assert ax.get_legend().get_title().get_text() in ("", "None")


def hierarchical():
    """A mask whose law depends on another latent: lengths 1 and K, K with probability .3 or .9."""
    rare = pyro.sample("rare", dist.Bernoulli(0.5))
    last = torch.where(rare > 0, 0.3, 0.9)
    pyro.sample("mask", OrderedMask(probs=torch.stack([1 - last, *[0 * last] * (K - 2), last])))


def test_a_law_that_depends_on_other_latents_is_shown_by_its_draws():
    data = to_arviz(hierarchical, hierarchical, num_samples=400)
    for group in (data.posterior, data.prior):
        assert "law" not in group["mask_length"].attrs
    share = (data.posterior["mask_length"] == K).mean().item()
    assert share == pytest.approx(0.6, abs=4 * (0.24 / 400) ** 0.5)
    np.testing.assert_allclose(plot_keep_probs(data, ["mask"]).lines[0].get_ydata()[1:], share)
    steps = [patch for patch in plot_length_posterior(data, ["mask"]).patches if isinstance(patch, StepPatch)]
    assert steps[0].get_data().values[-1] == (data.prior["mask_length"] == K).mean()


def test_a_law_by_row_is_shown_by_its_draws():
    def model(law):
        with pyro.plate("data", 2):
            pyro.sample("mask", law)

    different = OrderedMask(logits=torch.randn(2, K))
    data = to_arviz(lambda: model(OrderedMask.uniform(K)), lambda: model(different), num_samples=20)
    assert "law" not in data.posterior["mask_length"].attrs
    np.testing.assert_allclose(data.prior["mask_length"].attrs["law"], 1 / K)


def test_a_part_of_the_fits_has_no_law_of_another():
    laws = [OrderedMask.geometric(p, K) for p in (0.1, 0.9)]
    guides = [lambda law=law: pyro.sample("mask", law) for law in laws]
    data = to_arviz(guides[0], guides, num_samples=50)
    part = xr.DataTree.from_dict({"posterior": dataset(data, "posterior").isel(chain=[1])})
    shown = plot_keep_probs(part, ["mask"]).lines[0].get_ydata()
    expected = (part.posterior["mask"] != 0).mean(["chain", "draw"])
    np.testing.assert_allclose(shown, expected)


def test_keep_probs_uses_the_given_axes():
    def model():
        pyro.sample("mask", OrderedMask.uniform(K))

    _, ax = plt.subplots()
    assert plot_keep_probs(to_arviz(model, model, num_samples=5), ["mask"], ax=ax) is ax


def masks(*laws):
    """A model of a mask for each of 40 rows, one law a chain."""

    def model(law):
        def run():
            with pyro.plate("data", 40):
                pyro.sample("mask", law)

        return run

    return [model(law) for law in laws]


def test_length_posterior_has_bars_crosses_and_the_prior():
    short, long, prior = OrderedMask.geometric(0.3, K), OrderedMask.geometric(0.9, K), OrderedMask.uniform(K)
    guides = masks(short, long)
    data = to_arviz(masks(prior)[0], guides, num_samples=200, num_prior=200)
    ax = plot_length_posterior(data, ["mask"])
    # Shares of 8,000 masks have a standard error of at most .006.
    bars = [bar.get_height() for bar in ax.patches if isinstance(bar, Rectangle)]
    np.testing.assert_allclose(bars, (short.probs + long.probs) / 2, atol=0.02)
    crosses = np.stack([line.get_ydata() for line in ax.lines])
    np.testing.assert_allclose(crosses, torch.stack([short.probs, long.probs]), atol=0.03)
    (steps,) = [patch for patch in ax.patches if isinstance(patch, StepPatch)]
    np.testing.assert_allclose(steps.get_data().values, prior.probs, rtol=1e-6)  # the law, no share of draws
    mean = data.posterior["mask_length"].mean().item()
    labels = {text.get_text() for text in ax.get_legend().get_texts()}
    assert labels == {"mask: prior", f"mask: mean {mean:.1f}, 90% in 1-6"}


def test_length_posterior_of_one_fit_and_unknown_sites():
    (model,) = masks(OrderedMask.uniform(K))
    data = to_arviz(model, model, num_samples=50, num_prior=0, dims={"mask": ["component"]})  # another name of units
    _, ax = plt.subplots()
    assert plot_keep_probs(data, ["mask"]).lines[0].get_xdata().tolist() == [1, 2, 3, 4, 5, 6]
    assert plot_length_posterior(data, ["mask"], ax=ax) is ax
    assert not ax.lines  # one fit: no crosses
    with pytest.raises(ValueError, match=r"`var_names` must be mask sites, \['mask'\]; got \['w'\]"):
        plot_length_posterior(data, ["mask", "w"])


def test_data_of_both_lines_of_arviz_give_the_same_figures():
    (model,) = masks(OrderedMask.geometric(0.7, K))
    data = to_arviz(model, model, num_samples=50)
    groups = {name: dataset(data, name) for name in ("posterior", "prior", "sample_stats")}
    tree = xr.DataTree.from_dict(groups)  # what ArviZ 1.x has; 0.x has classes of its own
    for plot in (plot_keep_probs, plot_length_posterior):
        first, second = plot(data, ["mask"]), plot(tree, ["mask"])
        for one, other in zip(first.lines, second.lines, strict=True):
            np.testing.assert_array_equal(one.get_ydata(), other.get_ydata())
        assert len(first.patches) == len(second.patches)
        assert len(first.patches) + len(first.lines) > 0


def test_laws_are_shown_with_their_priors(trained):
    laws = trained.laws
    priors = {f"{name}.mask": width.prior for name, width in trained.widths.items()}
    ax = plot_laws(laws, priors)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == list(laws)
    solid, dashed = ax.lines[:2]
    np.testing.assert_allclose(solid.get_xdata(), np.arange(1, 9) / 8)
    np.testing.assert_allclose(solid.get_ydata(), next(iter(laws.values())).keep_probs)
    np.testing.assert_allclose(dashed.get_ydata(), next(iter(priors.values())).keep_probs)
    assert dashed.get_linestyle() == "--"
