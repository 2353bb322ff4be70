"""Posterior draws in ArviZ: names, dimensions, lengths, scores and the file."""

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_vnd.diagnostics import summary, to_arviz
from pyro_vnd.distributions import NestedNormal, OrderedMask
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
    guide = AutoNested(model)
    with module_local_params(guide):
        guide(y)
    return guide, y


def test_sites_dimensions_and_lengths(fitted):
    guide, y = fitted
    data = to_arviz(model, guide, y, num_samples=50)
    posterior = data.posterior
    assert set(posterior.data_vars) == {"w", "mask", "mask_length"}
    assert posterior["mask"].dims == ("chain", "draw", "data", "mask_unit")
    assert posterior["mask_length"].dims == ("chain", "draw", "data")
    assert posterior["w"].shape == (1, 50, 2)
    assert posterior["mask_unit"].values.tolist() == [1, 2, 3, 4]
    np.testing.assert_array_equal(posterior["mask_length"], posterior["mask"].sum("mask_unit"))


def test_draws_follow_the_law_of_the_guide(fitted):
    guide, y = fitted
    n = 2000
    lengths = to_arviz(model, guide, y, num_samples=n).posterior["mask_length"].values.ravel()
    counts = np.bincount(lengths.astype(int), minlength=K + 1)[1:]
    expected = guide.laws["mask"].probs[0].numpy() * n * ROWS
    # Pearson's statistic has mean K - 1 = 3; 16.3 is its 99.9 % quantile.
    assert ((counts - expected) ** 2 / expected).sum() < 16.3
    assert ((counts[::-1] - expected) ** 2 / expected).sum() > 100  # power: the order reversed


def test_scores_are_the_log_densities_of_the_draws(fitted):
    guide, y = fitted
    data = to_arviz(model, guide, y, num_samples=5)
    posterior = data.posterior
    w, lengths = torch.tensor(posterior["w"].values[0]), torch.tensor(posterior["mask_length"].values[0])
    log_mask = OrderedMask.geometric(0.5, K).logits[lengths.long() - 1].sum(-1)
    log_p = dist.Normal(0.0, 1.0).log_prob(w).sum(-1) + log_mask
    log_p = log_p + dist.Normal(lengths + w.sum(-1, keepdim=True), 1.0).log_prob(y).sum(-1)
    # The guide starts at the law of the model for the masks.
    log_q = dist.Normal(guide[0].locs.w, guide[0].scales.w).log_prob(w).sum(-1) + log_mask
    np.testing.assert_allclose(data.sample_stats["log_p"].values[0], log_p.detach(), rtol=1e-10)
    np.testing.assert_allclose(data.sample_stats["log_q"].values[0], log_q.detach(), rtol=1e-10)


def test_nested_normal_has_its_length_too():
    def site():
        with pyro.plate("data", 6):
            pyro.sample("code", NestedNormal(torch.zeros(K), torch.ones(K), torch.zeros(K)))

    posterior = to_arviz(site, site, num_samples=20).posterior
    code, length = posterior["code"].values, posterior["code_length"].values
    assert ((code != 0).sum(-1) == length).all()
    assert set(np.unique(length)) == {1, 2, 3, 4}


def test_netcdf_round_trip(fitted, tmp_path):
    guide, y = fitted
    data = to_arviz(model, guide, y, num_samples=5)
    path = tmp_path / "posterior.nc"
    data.to_netcdf(str(path))
    back = az.from_netcdf(str(path))
    np.testing.assert_array_equal(back.posterior["mask"], data.posterior["mask"])
    np.testing.assert_array_equal(back.sample_stats["log_q"], data.sample_stats["log_q"])


def test_summary_shows_no_convergence_statistics_of_a_single_fit(fitted):
    guide, y = fitted
    table = summary(to_arviz(model, guide, y, num_samples=50), ["mask_length"])
    assert len(table) == ROWS
    assert {"mean", "sd"} <= set(table.columns)
    assert not {"r_hat", "ess_bulk", "ess_tail"} & set(table.columns)


def test_number_of_samples_is_checked(fitted):
    guide, y = fitted
    with pytest.raises(ValueError, match="`num_samples` must be at least 1; got 0"):
        to_arviz(model, guide, y, num_samples=0)
