"""Fits of every kind of model in ArviZ: parameters, plates, masks, missing data, events, nested nets."""

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from conjugate import VARIANCE, Y, conjugate, log_normal, posterior
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from scipy import stats
from torch import nn

from pyro_vnd.diagnostics import to_arviz
from pyro_vnd.diagnostics.posterior._arviz import datasets
from pyro_vnd.diagnostics.posterior.loo import loo
from pyro_vnd.distributions import NestedNormal, OrderedMask
from pyro_vnd.infer import AutoNested, fit, module_local_params
from pyro_vnd.nn import NestedClassifier, nest

K = 4


class Scaled(nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(scale).log())

    def forward(self, y):
        pyro.module("scaled", self)
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(z, self.log_scale.exp()), obs=y)


def test_each_fit_can_have_a_model_with_parameters_of_its_own():
    data = to_arviz([Scaled(1.0), Scaled(3.0)], (posterior, posterior), Y, num_samples=400)
    z = data.posterior["z"].values[..., None]
    np.testing.assert_allclose(data.log_likelihood["y"].values[0], log_normal(Y, z[0], 1.0))
    np.testing.assert_allclose(data.log_likelihood["y"].values[1], log_normal(Y, z[1], 9.0))
    assert data.posterior_predictive["y"].std(["draw", "data"]).values[1] == pytest.approx(3, rel=0.1)


def test_parameters_of_the_global_store_are_used():
    def guide(y):
        loc = pyro.param("loc", torch.tensor(0.0))
        pyro.sample("z", dist.Normal(loc, VARIANCE**0.5))

    svi = SVI(conjugate, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    for _ in range(100):
        svi.step(Y)
    loc = pyro.param("loc").item()
    assert abs(loc) > 0.05
    data = to_arviz(conjugate, guide, Y, num_samples=400)
    np.testing.assert_allclose(data.sample_stats["log_q"][0], log_normal(data.posterior["z"][0], loc, VARIANCE))


def test_scale_counts_in_the_joint_but_not_by_row():
    def subsampling(y):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 5 * len(y), subsample_size=len(y)), poutine.scale(scale=0.5):
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    data = to_arviz(subsampling, posterior, Y, num_samples=20)
    z = data.posterior["z"].values[0]
    by_row = log_normal(Y, z[:, None], 1.0)
    np.testing.assert_allclose(data.log_likelihood["y"][0], by_row)
    np.testing.assert_allclose(data.sample_stats["log_p"][0], log_normal(z, 0, 1) + 2.5 * by_row.sum(-1))


@pytest.mark.parametrize("parallel", [False, True])
def test_a_plate_that_subsamples_keeps_its_rows(parallel: bool):
    def subsampling(y):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y), subsample_size=3) as rows:
            local = pyro.sample("local", dist.Normal(z, 1.0))
            pyro.sample("y", dist.Normal(local, 1.0), obs=y[rows])

    def guide(y):
        pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y), subsample_size=3) as rows:
            pyro.sample("local", dist.Normal(y[rows], 1e-3))

    y = torch.arange(100.0)
    data = to_arviz(subsampling, [guide, guide], y, num_samples=20, parallel=parallel)
    rows = data.observed_data["y"].values
    assert len(set(rows)) == 3
    np.testing.assert_allclose(data.posterior["local"], np.broadcast_to(rows, (2, 20, 3)), atol=0.01)
    np.testing.assert_allclose(data.log_likelihood["y"], log_normal(rows, data.posterior["local"], 1.0))


@pytest.mark.parametrize("how", ["poutine", "distribution"])
def test_masked_rows_have_no_likelihood(how):
    shown = torch.tensor([True, False, True, True, False])

    def masked(y=Y):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        law = dist.Normal(z, 1.0).expand([len(y)])
        with pyro.plate("data", len(y)):
            if how == "distribution":
                pyro.sample("y", law.mask(shown), obs=y)
            else:
                with poutine.mask(mask=shown):
                    pyro.sample("y", law, obs=y)

    def guide(y=Y):
        pyro.sample("z", dist.Normal(Y[shown].sum() / 4, 0.5))

    data = to_arviz(masked, guide, num_samples=400, num_prior=0)
    z, by_row = data.posterior["z"].values[0], data.log_likelihood["y"].values[0]
    assert np.isnan(by_row[:, ~shown.numpy()]).all()
    np.testing.assert_allclose(by_row[:, shown], log_normal(Y[shown], z[:, None], 1.0))
    np.testing.assert_allclose(data.sample_stats["log_p"][0], log_normal(z, 0, 1) + np.nansum(by_row, -1))
    assert loo(data).n_data_points == 3
    assert np.unique(data.posterior_predictive["y"].values[..., 1]).size == 400  # masked rows are predicted, too


def test_missing_values_of_a_partly_observed_site_are_predicted():
    shown = torch.tensor([True, False, True, True, False])

    def partly(y=Y):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(z, 1.0), obs=y, obs_mask=shown)

    data = to_arviz(partly, posterior, num_samples=1000)
    assert set(data.posterior.data_vars) == {"z", "y"}
    np.testing.assert_allclose(data.posterior["y"].values[0, :, shown], np.broadcast_to(Y[shown][:, None], (3, 1000)))
    z = data.posterior["z"].values[0]
    residual = data.posterior["y"].values[0, :, ~shown.numpy()] - z
    assert stats.kstest(residual.ravel(), stats.norm.cdf).pvalue > 0.001
    assert set(data.posterior_predictive.data_vars) == {"y_observed", "y_unobserved"}
    log_p = log_normal(z, 0, 1) + log_normal(Y[shown], z[:, None], 1.0).sum(-1)
    np.testing.assert_allclose(data.sample_stats["log_p"][0], log_p)


def test_several_observed_sites_events_factors_and_deterministic_sites():
    images, counts = torch.randn(3, 2, 4), torch.tensor([0, 2, 5])

    def several():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("image", 3):
            twice = pyro.deterministic("twice", 2 * z.expand(3), event_dim=0)
            pyro.sample("pixels", dist.Normal(twice[:, None, None].expand(3, 2, 4), 1.0).to_event(2), obs=images)
            pyro.sample("count", dist.Poisson(z.exp()), obs=counts)
        pyro.factor("penalty", -(z**2))

    data = to_arviz(several, posterior, num_samples=20, dims={"pixels": ["row", "column"]})
    z = data.posterior["z"].values[0]
    assert set(data.observed_data.data_vars) == set(data.prior_predictive.data_vars) == {"pixels", "count"}
    assert data.observed_data["pixels"].dims == ("image", "row", "column")
    assert data.posterior_predictive["pixels"].dims == ("chain", "draw", "image", "row", "column")
    pixels = log_normal(images, 2 * z[:, None, None, None], 1.0).sum((-1, -2))
    count = stats.poisson.logpmf(counts, np.exp(z)[:, None])
    assert data.log_likelihood["pixels"].dims == ("chain", "draw", "image")
    np.testing.assert_allclose(data.log_likelihood["pixels"][0], pixels)
    np.testing.assert_allclose(data.log_likelihood["count"][0], count)
    log_p = log_normal(z, 0, 1) + pixels.sum(-1) + count.sum(-1) - z**2
    np.testing.assert_allclose(data.sample_stats["log_p"][0], log_p)
    assert data.posterior["twice"].dims == ("chain", "draw", "image")
    np.testing.assert_allclose(data.prior["twice"][0, :, 1], 2 * data.prior["z"][0])
    with pytest.raises(ValueError, match="`var_name` must name one of"):
        loo(data)


def test_later_data_are_predicted_from_predicted_data():
    def walk():
        z = pyro.sample("z", dist.Normal(0.0, 1e-3))
        first = pyro.sample("first", dist.Normal(z, 1.0), obs=torch.tensor(50.0))
        pyro.sample("second", dist.Normal(first, 1e-3), obs=torch.tensor(50.0))

    predicted = to_arviz(walk, lambda: pyro.sample("z", dist.Normal(0.0, 1e-3)), num_samples=20).posterior_predictive
    np.testing.assert_allclose(predicted["second"], predicted["first"], atol=0.01)
    assert abs(predicted["first"]).max() < 5


@pytest.mark.parametrize("auto", [AutoNormal, AutoMultivariateNormal])
def test_auxiliary_sites_of_autoguides_count_in_the_density_only(auto):
    def positive(y=Y):
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(0.0, scale), obs=y)

    guide = auto(positive, init_scale=0.3)
    data = to_arviz(positive, guide, num_samples=30)
    assert set(data.posterior.data_vars) == {"scale"}
    log_scale = np.log(data.posterior["scale"].values[0])
    with module_local_params(guide):
        loc = guide.median()["scale"].log().item()
    # The density of the scale, not of its logarithm.
    np.testing.assert_allclose(data.sample_stats["log_q"][0], log_normal(log_scale, loc, 0.09) - log_scale)


def test_one_mask_for_each_group():
    def grouped():
        with pyro.plate("group", 3):
            mask = pyro.sample("mask", OrderedMask.uniform(K))
            with pyro.plate("data", 5):
                pyro.sample("y", dist.Normal(mask.sum(-1), 1.0), obs=torch.zeros(5, 3))

    data = to_arviz(grouped, AutoNested(grouped), num_samples=40)
    assert data.posterior["mask"].dims == ("chain", "draw", "group", "mask_unit")
    assert data.log_likelihood["y"].dims == ("chain", "draw", "data", "group")
    lengths = data.posterior["mask_length"].values
    assert (lengths.std(-1) > 0).any()
    by_row = log_normal(0.0, lengths[:, :, None], 1.0)
    np.testing.assert_allclose(data.log_likelihood["y"], np.broadcast_to(by_row, (1, 40, 5, 3)))


def test_nested_normal_has_its_length_too():
    def site():
        with pyro.plate("data", 6):
            pyro.sample("code", NestedNormal(torch.zeros(K), torch.ones(K), torch.zeros(K)))

    data = to_arviz(site, site, num_samples=20, dims={"code": ["latent"]})
    for group in (data.posterior, data.prior):
        code, length = group["code"].values, group["code_length"].values
        assert group["code"].dims == ("chain", "draw", "data", "latent")
        assert ((code != 0).sum(-1) == length).all()
        assert set(np.unique(length)) == {1, 2, 3, 4}
    assert "posterior_predictive" not in datasets(data)


def classifier(mask_per):
    torch.manual_seed(0)
    x = torch.randn(24, 4)
    labels = (x[:, 0] > 0).long() + (x[:, 1] > 1).long()
    net = nest(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), x[:1], num_blocks=4, mask_per=mask_per)
    fit(NestedClassifier(net), net.guide, (x, labels), num_epochs=5, progress=False)
    return NestedClassifier(net), net.guide, x, labels


@pytest.mark.parametrize("mask_per", ["example", "batch"])
def test_nested_classifier(mask_per, tmp_path):
    net, guide, x, labels = classifier(mask_per)
    data = to_arviz(net, guide, (x, labels), num_samples=40, coords={"data": np.arange(100, 124)})
    (mask,) = (name for name in data.posterior.data_vars if name.endswith("mask"))
    rows = ("data",) if mask_per == "example" else ()
    assert data.posterior[mask].dims == ("chain", "draw", *rows, f"{mask}_unit")
    assert data.posterior[f"{mask}_length"].dims == ("chain", "draw", *rows)
    weights = [name for name in data.posterior.data_vars if name.endswith("weight")]
    assert [data.posterior[name].shape[2:] for name in weights] == [(8, 4), (3, 8)]
    assert data.log_likelihood["label"].dims == ("chain", "draw", "data")
    np.testing.assert_array_equal(data.observed_data["label"], labels)
    # A label is predicted as often as its likelihood says: mean and variance of a sum of Bernoulli draws.
    p = np.exp(data.log_likelihood["label"].values)
    right = (data.posterior_predictive["label"].values == labels.numpy()).sum()
    assert abs(right - p.sum()) < 4 * (p * (1 - p)).sum() ** 0.5
    assert np.isfinite(data.sample_stats["elbo"]).all()
    data.to_netcdf(str(tmp_path / "net.nc"))
    back = az.from_netcdf(str(tmp_path / "net.nc"))
    np.testing.assert_array_equal(back.posterior[mask], data.posterior[mask])


def test_labels_that_are_not_given_are_predictions():
    net, guide, x, labels = classifier("example")
    with_labels = to_arviz(net, guide, (x, labels), num_samples=30)
    without = to_arviz(net, guide, x, num_samples=30)
    assert "observed_data" not in datasets(without)
    assert set(without.posterior.data_vars) == set(with_labels.posterior.data_vars)
    assert without.posterior_predictive["label"].dims == ("chain", "draw", "data")
    assert without.prior_predictive["label"].dims == ("chain", "draw", "data")
    # Without data the evidence is 1, and the ELBO minus a divergence.
    assert float(without.sample_stats["elbo"].mean()) < 0


def test_modules_are_evaluated_as_they_are_used_and_left_as_they_were():
    norm = nn.BatchNorm1d(1)

    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = norm

        def forward(self, y=Y):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("data", len(y)):
                pyro.sample("y", dist.Normal(z + self.norm(y[:, None])[:, 0], 1.0), obs=y)

    module = Normed()
    to_arviz(module, posterior, num_samples=3)
    assert norm.running_mean.item() == 0
    assert module.training
    assert norm.training
