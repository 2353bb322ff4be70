"""Fits in ArviZ: groups, names, dimensions, laws of draws, scores and the file."""

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from conjugate import MEAN, VARIANCE, Y, conjugate, log_normal, posterior, shifted
from scipy import stats

from pyro_vnd.diagnostics import summary, to_arviz
from pyro_vnd.diagnostics.posterior._arviz import dataset, datasets
from pyro_vnd.distributions import LogUniform, OrderedMask
from pyro_vnd.infer import AutoNested, module_local_params

K, ROWS = 4, 3


def model(y):
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(y)):
        mask = pyro.sample("mask", OrderedMask.geometric(0.5, K))
        pyro.sample("y", dist.Normal(mask.sum(-1) + w.sum(-1), 1.0), obs=y)


@pytest.fixture
def fitted():
    y = torch.randn(ROWS)
    guide = AutoNested(model, latents="mean_field")
    with module_local_params(guide):
        guide(y)
    return guide, y


def test_groups_and_variables(fitted):
    guide, y = fitted
    data = to_arviz(model, guide, y, num_samples=30, num_prior=20, constant_data={"y_twice": 2 * y})
    variables = {
        "posterior": {"w", "mask", "mask_length"},
        "prior": {"w", "mask", "mask_length"},
        "posterior_predictive": {"y"},
        "prior_predictive": {"y"},
        "log_likelihood": {"y"},
        "observed_data": {"y"},
        "constant_data": {"y_twice"},
        "sample_stats": {"log_p", "log_q", "elbo", "weight", "khat"},
    }
    assert {group: set(found) for group, found in datasets(data).items()} == variables
    assert data.prior.sizes["draw"] == data.prior_predictive.sizes["draw"] == 20
    for group in ("posterior", "posterior_predictive", "log_likelihood", "sample_stats"):
        assert dataset(data, group).sizes["chain"] == 1
        assert dataset(data, group).sizes["draw"] == 30
        assert dataset(data, group).attrs["inference_library"] == "pyro"
    for name in ("log_p", "log_q", "elbo"):
        assert data.sample_stats[name].attrs == {"units": "nats"}
    assert data.log_likelihood["y"].attrs == {"units": "nats"}
    np.testing.assert_array_equal(data.observed_data["y"], y)
    np.testing.assert_array_equal(data.constant_data["y_twice"], 2 * y)


def test_sites_dimensions_and_lengths(fitted):
    guide, y = fitted
    data = to_arviz(model, guide, y, num_samples=50)
    for group in (data.posterior, data.prior):
        assert group["mask"].dims == ("chain", "draw", "data", "mask_unit")
        assert group["mask_length"].dims == ("chain", "draw", "data")
        assert group["w"].shape == (1, 50, 2)
        assert group["mask_unit"].values.tolist() == [1, 2, 3, 4]
        np.testing.assert_array_equal(group["mask_length"], group["mask"].sum("mask_unit"))
    for group in (data.log_likelihood, data.posterior_predictive, data.prior_predictive):
        assert group["y"].dims == ("chain", "draw", "data")
    assert data.observed_data["y"].dims == ("data",)


def test_caller_names_dimensions_and_gives_coordinates(fitted):
    guide, y = fitted
    x = torch.randn(ROWS, 2)
    data = to_arviz(
        model,
        guide,
        y,
        num_samples=5,
        dims={"w": ["class"], "mask": ["latent"], "x": ["data", "class"]},
        coords={"class": ["a", "b"], "data": [10, 20, 30]},
        constant_data={"x": x},
    )
    assert data.posterior["w"].dims == ("chain", "draw", "class")
    assert data.prior["mask"].dims == ("chain", "draw", "data", "latent")
    assert data.posterior["mask_length"].dims == ("chain", "draw", "data")
    assert data.posterior["latent"].values.tolist() == [1, 2, 3, 4]
    assert data.log_likelihood["data"].values.tolist() == [10, 20, 30]
    assert data.constant_data["x"].dims == ("data", "class")
    assert float(data.constant_data["x"].sel(data=20, **{"class": "b"})) == x[1, 1]


def test_draws_follow_the_law_of_the_guide(fitted):
    guide, y = fitted
    n = 1000
    lengths = (
        to_arviz(model, guide, y, num_samples=n, num_prior=0, predictive=False).posterior["mask_length"].values.ravel()
    )
    counts = np.bincount(lengths.astype(int), minlength=K + 1)[1:]
    expected = guide.laws["mask"].probs[0].numpy() * n * ROWS
    # Pearson's statistic has mean K - 1 = 3; 16.3 is its 99.9 % quantile.
    assert ((counts - expected) ** 2 / expected).sum() < 16.3
    assert ((counts[::-1] - expected) ** 2 / expected).sum() > 100  # power: the order reversed


def test_scores_are_the_log_densities_of_the_draws(fitted):
    guide, y = fitted
    data = to_arviz(model, guide, y, num_samples=5)
    w, lengths = (torch.tensor(data.posterior[name].values[0]) for name in ("w", "mask_length"))
    log_mask = OrderedMask.geometric(0.5, K).logits[lengths.long() - 1].sum(-1)
    by_row = dist.Normal(lengths + w.sum(-1, keepdim=True), 1.0).log_prob(y)
    log_p = dist.Normal(0.0, 1.0).log_prob(w).sum(-1) + log_mask + by_row.sum(-1)
    # The guide starts at the law of the model for the masks.
    log_q = dist.Normal(guide[0].locs.w, guide[0].scales.w).log_prob(w).sum(-1) + log_mask
    np.testing.assert_allclose(data.sample_stats["log_p"].values[0], log_p.detach(), rtol=1e-10)
    np.testing.assert_allclose(data.sample_stats["log_q"].values[0], log_q.detach(), rtol=1e-10)
    np.testing.assert_allclose(data.sample_stats["elbo"].values[0], (log_p - log_q).detach(), rtol=1e-10)
    np.testing.assert_allclose(data.log_likelihood["y"].values[0], by_row, rtol=1e-10)


def test_laws_of_a_conjugate_model():
    n = 1000
    data = to_arviz(conjugate, posterior, num_samples=n)
    draws = {
        "posterior": data.posterior["z"].values[0],
        "prior": data.prior["z"].values[0],
        "posterior predictive": data.posterior_predictive["y"].values[0, :, 2],
        "prior predictive": data.prior_predictive["y"].values[0, :, 2],
    }
    laws = {
        "posterior": stats.norm(MEAN, VARIANCE**0.5),
        "prior": stats.norm(0, 1),
        "posterior predictive": stats.norm(MEAN, (1 + VARIANCE) ** 0.5),
        "prior predictive": stats.norm(0, 2**0.5),
    }
    for name, x in draws.items():
        assert stats.kstest(x, laws[name].cdf).pvalue > 0.001, name
    # Power: the observed values, the predictive without the latent's variance, and the prior's without the noise's.
    assert stats.kstest(draws["posterior predictive"], stats.norm(MEAN, 2**0.5).cdf).pvalue < 1e-3
    assert stats.kstest(draws["prior predictive"], laws["prior"].cdf).pvalue < 1e-3
    # Rows share the latent: their covariance is its variance, with a standard error of some 1.2 / sqrt(n).
    covariance = np.cov(data.posterior_predictive["y"].values[0].T)[0, 1]
    assert abs(covariance - VARIANCE) < 4 * 1.2 / n**0.5


def test_elbo_of_the_exact_posterior_is_the_evidence():
    exact = to_arviz(conjugate, posterior, num_samples=100).sample_stats
    covariance = np.eye(len(Y)) + 1
    evidence = stats.multivariate_normal(np.zeros(len(Y)), covariance).logpdf(Y)
    np.testing.assert_allclose(exact["elbo"], evidence)
    np.testing.assert_allclose(exact["weight"], 0.01)
    assert exact["khat"].values == -np.inf  # all weights are equal
    # KL of the shifted guide: a shift of one standard deviation costs 1/2; the ELBO's standard error is 1 / sqrt(n).
    elbo = to_arviz(conjugate, shifted, num_samples=1000, num_prior=0, predictive=False).sample_stats["elbo"]
    assert abs(float(elbo.mean()) - (evidence - 0.5)) < 4 / 1000**0.5


def test_weights_turn_draws_of_the_guide_into_draws_of_the_posterior():
    options = {"num_samples": 1000, "num_prior": 0, "predictive": False}
    data = to_arviz(conjugate, [shifted, shifted], **options)
    weight, z = data.sample_stats["weight"], data.posterior["z"]
    np.testing.assert_allclose(weight.sum("draw"), [1, 1])
    # Weights exp(-u), u normal, leave 1000 / e draws in effect.
    z_score = ((weight * z).sum("draw") - float(MEAN)) / (VARIANCE * np.e / 1000) ** 0.5
    assert abs(z_score).max() < 4
    assert (z.mean("draw") - float(MEAN)).min() > 0.9 * VARIANCE**0.5  # power: without weights
    assert data.sample_stats["khat"].dims == ("chain",)
    assert (data.sample_stats["khat"] < 0.7).all()

    def narrow(y=Y):
        pyro.sample("z", dist.Normal(MEAN, 0.1 * VARIANCE**0.5))

    assert (to_arviz(conjugate, narrow, **options).sample_stats["khat"] > 0.7).all()


def test_each_fit_is_a_chain():
    data = to_arviz(conjugate, [posterior, posterior, shifted], num_samples=400, num_prior=50)
    assert data.posterior["z"].shape == (3, 400)
    assert data.prior["z"].shape == (3, 50)
    means = data.posterior["z"].mean("draw").values - float(MEAN)
    np.testing.assert_allclose(means, [0, 0, VARIANCE**0.5], atol=4 * (VARIANCE / 400) ** 0.5)
    z = data.posterior["z"].values
    np.testing.assert_allclose(data.sample_stats["log_q"].values[0], log_normal(z[0], MEAN, VARIANCE))
    np.testing.assert_allclose(data.sample_stats["log_q"].values[2], log_normal(z[2], MEAN + VARIANCE**0.5, VARIANCE))
    assert summary(data)["r_hat"]["z"] > 1.05
    agreed = to_arviz(conjugate, [posterior] * 3, num_samples=400, num_prior=0, predictive=False)
    assert summary(agreed)["r_hat"]["z"] < 1.02


def test_data_are_a_tensor_a_tuple_or_a_mapping(fitted):
    guide, y = fitted
    first = to_arviz(model, guide, y, num_samples=5)
    for data in ((y,), [y], {"y": y}):
        again = to_arviz(model, guide, data, num_samples=5)
        for group in ("posterior", "prior", "posterior_predictive", "log_likelihood", "sample_stats"):
            assert dataset(again, group).identical(dataset(first, group)), group


def test_seed(fitted):
    guide, y = fitted

    def lengths(seed):
        return to_arviz(model, guide, y, num_samples=20, seed=seed).posterior["w"].values

    state = torch.random.get_rng_state()
    np.testing.assert_array_equal(lengths(0), lengths(0))
    assert (lengths(0) != lengths(1)).any()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert (lengths(None) != lengths(None)).any()


def test_parts_can_be_left_out(fitted):
    guide, y = fitted
    data = to_arviz(model, guide, y, num_samples=5, num_prior=0, predictive=False)
    assert set(datasets(data)) == {"posterior", "sample_stats", "log_likelihood", "observed_data"}
    only = to_arviz(model, guide, y, num_samples=5, num_prior=5, predictive=False)
    assert not hasattr(only, "prior_predictive")
    assert set(only.prior.data_vars) == {"w", "mask", "mask_length"}


@pytest.mark.parametrize("parallel", [False, True])
def test_an_improper_prior_has_no_draws(parallel: bool):
    def improper():
        w = pyro.sample("w", LogUniform())
        pyro.sample("y", dist.Normal(w, 1.0), obs=torch.tensor(2.0))

    def guide():
        pyro.sample("w", dist.Normal(2.0, 0.1))

    data = to_arviz(improper, guide, num_samples=5, parallel=parallel)
    assert not hasattr(data, "prior")
    assert data.posterior_predictive["y"].shape == (1, 5)
    with pytest.raises(ValueError, match="`num_prior` must be 0"):
        to_arviz(improper, guide, num_samples=5, num_prior=5, parallel=parallel)


def test_data_without_a_sampler_are_not_predicted():
    def without():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor(1.0))
        pyro.sample("w", LogUniform(), obs=torch.tensor(2.0))

    def guide():
        pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="`predictive` must be False: an observed site has no draws"):
        to_arviz(without, guide, num_samples=3)
    data = to_arviz(without, guide, num_samples=3, num_prior=0, predictive=False)
    assert set(data.log_likelihood.data_vars) == {"y", "w"}


def test_netcdf_round_trip_of_all_groups(fitted, tmp_path):
    guide, y = fitted
    data = to_arviz(model, [guide, guide], y, num_samples=30, constant_data={"index": torch.arange(ROWS)})
    path = tmp_path / "posterior.nc"
    data.to_netcdf(str(path))
    back = az.from_netcdf(str(path))
    assert len(datasets(data)) == 8
    for group, found in datasets(data).items():
        assert dataset(back, group).load().identical(found), group


def test_summary_shows_no_convergence_statistics_of_a_single_fit(fitted):
    guide, y = fitted
    table = summary(to_arviz(model, guide, y, num_samples=50), ["mask_length"])
    assert len(table) == ROWS
    assert {"mean", "sd"} <= set(table.columns)
    assert not {"r_hat", "ess_bulk", "ess_tail"} & set(table.columns)


def test_summary_of_several_fits_has_no_nan(fitted):
    guide, y = fitted
    data = to_arviz(model, [guide, guide], y, num_samples=200, num_prior=0)
    assert not {f"mask[{i}, 1]" for i in range(ROWS)} & set(summary(data).index)
    table = summary(data, constant=True)
    assert not table.isna().any(axis=None)
    assert table["r_hat"].max() < 1.05
    assert (table["r_hat"][[f"mask[{i}, 1]" for i in range(ROWS)]] == 1).all()


def test_enumerated_sites_must_be_drawn_by_the_guide():
    @pyro.infer.config_enumerate
    def mixture():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(Y)):
            which = pyro.sample("which", dist.Categorical(torch.ones(2)))
            pyro.sample("y", dist.Normal(z + which, 1.0), obs=Y)

    with pytest.raises(ValueError, match=r"\['which'\] are marked for enumeration .* Add them to the guide"):
        to_arviz(mixture, lambda: pyro.sample("z", dist.Normal(0.0, 1.0)), num_samples=2)

    def full():
        pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(Y)):
            pyro.sample("which", dist.Categorical(torch.ones(2)), infer={"enumerate": "parallel"})

    data = to_arviz(mixture, full, num_samples=20)
    assert data.posterior["which"].dims == ("chain", "draw", "data")
    assert set(np.unique(data.posterior["which"])) == {0, 1}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_samples": 0}, r"`num_samples` must be an integer,? at least 1; got 0"),
        ({"num_prior": -1}, "`num_prior` must be an integer at least 0, or None; got -1"),
        ({"dims": {"mask": ["a", "b", "c"]}}, r"`dims` names 3 dimensions \['a', 'b', 'c'\] of 'mask'; it has 2"),
        ({"dims": {"nothing": ["a"]}}, r"`dims` names \['nothing'\]; variables: "),
        ({"dims": {"mask": ["data"]}}, "`dims` must name dimensions of 'mask' apart"),
        ({"dims": {"w": ["data"]}}, "dimension 'data' must have one size"),
        ({"coords": {"nothing": [1]}}, "`coords` names 'nothing'; dimensions: "),
        ({"coords": {"data": [1]}}, "`coords` must have 3 values for 'data'; got 1"),
        ({"guide": []}, "got 0 models and 0 guides"),
        ({"model": [model, model]}, "got 2 models and 1 guides"),
        ({"guide": "guide"}, "`guide` must be callable; got str"),
        ({"model": None}, "`model` must be callable; got NoneType"),
        ({"guide": lambda y: None}, r"`guide` must draw sites of the model, \['w', 'mask'\]; it draws \[\]"),
    ],
)
def test_bad_arguments_are_named(fitted, arguments, message):
    guide, y = fitted
    arguments = {"model": model, "guide": guide, "num_samples": 3, **arguments}
    model_, guide_ = arguments.pop("model"), arguments.pop("guide")
    with pytest.raises(ValueError, match=message):
        to_arviz(model_, guide_, y, **arguments)


def test_sites_with_a_wrong_name_or_shape_are_named():
    def misspelt(y=Y):
        pyro.sample("zz", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match=r"`guide` must draw sites of the model, \['z'\]; it draws \['zz'\]"):
        to_arviz(conjugate, misspelt, num_samples=3)

    def growing():
        pyro.sample("z", dist.Normal(torch.zeros(len(size)), 1.0).to_event(1))

    def growing_guide():
        size.append(1)
        growing()

    size = []
    with pytest.raises(ValueError, match=r"'z' must have one shape in all draws and fits; got \(1,\) and \(2,\)"):
        to_arviz(growing, growing_guide, num_samples=3, num_prior=0)

    def sometimes():
        calls.append(1)
        pyro.sample("z", dist.Normal(0.0, 1.0))
        if len(calls) > 4:
            pyro.sample("rare", dist.Normal(0.0, 1.0))

    calls = []
    with pytest.raises(ValueError, match="'rare' must be in all draws and fits; it is in"):
        to_arviz(sometimes, sometimes, num_samples=5, num_prior=0)
