"""All draws in one run have the groups, scores and laws of draws one by one, or an error where they would not."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from conjugate import MEAN, VARIANCE, Y, conjugate, log_normal, posterior
from pyro import poutine
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from pyro.infer.reparam import LocScaleReparam
from scipy import stats
from torch import nn

from pyro_vnd.diagnostics import to_arviz
from pyro_vnd.diagnostics.posterior._arviz import dataset, datasets
from pyro_vnd.distributions import NestedNormal, OrderedMask
from pyro_vnd.infer import AutoNested
from pyro_vnd.nn import NestedClassifier, nest

X, T = torch.linspace(-2, 2, 12, dtype=torch.float64).cos().reshape(3, 4), torch.zeros(2, 3, dtype=torch.float64)
SHOWN = torch.tensor([True, False, True])


def model(x, t=None):
    """Masks, vectors, deterministic sites of all kinds, nested plates, hidden rows and a factor."""
    mask = pyro.sample("mask", OrderedMask.uniform(4))
    w = pyro.sample("w", dist.Normal(torch.zeros(4), 1.0).to_event(1))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    pyro.deterministic("twice", 2 * scale)
    pyro.deterministic("kept", mask * w, event_dim=1)
    with pyro.plate("group", 2, dim=-2):
        shift = pyro.sample("shift", dist.Normal(0.0, scale))
        with pyro.plate("row", len(x), dim=-1), poutine.mask(mask=SHOWN):
            own = pyro.sample("own", OrderedMask.uniform(3))
            pyro.sample("t", dist.Normal((x * mask * w).sum(-1) + shift + own.sum(-1), scale), obs=t)
    pyro.factor("penalty", -(scale**2))


@pytest.mark.parametrize("reparam", [False, True])
@pytest.mark.parametrize("base", [None, AutoMultivariateNormal])
@pytest.mark.parametrize("labels", [T, None])
def test_the_same_groups_and_laws(base, reparam, labels):
    program = poutine.reparam(model, {"shift": LocScaleReparam(0.0)}) if reparam else model
    guide = AutoNested(program, base=base)
    guide(X, T)
    n = 200
    one, many = (
        to_arviz(program, guide, (X, labels), num_samples=n, num_prior=20, parallel=parallel)
        for parallel in (False, True)
    )
    assert list(datasets(one)) == list(datasets(many))
    for group, found in datasets(one).items():
        for name, variable in found.variables.items():
            other = dataset(many, group)[name]
            assert (variable.dims, variable.shape, variable.dtype) == (other.dims, other.shape, other.dtype), name
            if group == "log_likelihood":
                np.testing.assert_array_equal(np.isnan(variable), np.isnan(other))
    tests = {name: (one.sample_stats[name], many.sample_stats[name]) for name in ("log_p", "log_q", "elbo")}
    tests |= {name: (one.posterior[name], many.posterior[name]) for name in ("scale", "mask_length")}
    # A two-sample test for each; of five the smallest p-value is below .001 in one of 200 seeds.
    assert min(stats.ks_2samp(*(x.values.ravel() for x in pair)).pvalue for pair in tests.values()) > 0.001


def test_laws_of_a_conjugate_model():
    n = 2000
    data = to_arviz(conjugate, posterior, num_samples=n, parallel=True)
    z = data.posterior["z"].values[0]
    np.testing.assert_allclose(data.sample_stats["log_q"][0], log_normal(z, MEAN, VARIANCE))
    np.testing.assert_allclose(data.log_likelihood["y"][0], log_normal(Y, z[:, None], 1.0))
    evidence = stats.multivariate_normal(np.zeros(len(Y)), np.eye(len(Y)) + 1).logpdf(Y)
    np.testing.assert_allclose(data.sample_stats["elbo"], evidence)
    assert stats.kstest(z, stats.norm(MEAN, VARIANCE**0.5).cdf).pvalue > 0.001
    assert (
        stats.kstest(data.posterior_predictive["y"][0, :, 2], stats.norm(MEAN, (1 + VARIANCE) ** 0.5).cdf).pvalue
        > 0.001
    )
    covariance = np.cov(data.posterior_predictive["y"].values[0].T)[0, 1]  # rows share the latent of their draw
    assert abs(covariance - VARIANCE) < 4 * 1.2 / n**0.5
    assert stats.kstest(data.prior["z"][0], stats.norm.cdf).pvalue > 0.001


def test_chains_nested_normals_and_seeds():
    def coded():
        with pyro.plate("data", 3):
            code = pyro.sample("code", NestedNormal(torch.zeros(4), torch.ones(4), torch.zeros(4)))
            pyro.sample("y", dist.Normal(code.sum(-1), 1.0), obs=torch.ones(3))

    guide = poutine.block(coded, hide=["y"])
    data = to_arviz(coded, [guide, guide], num_samples=30, parallel=True)
    assert data.posterior["code"].shape == (2, 30, 3, 4)
    assert (data.posterior["code"].values[0] != data.posterior["code"].values[1]).any()
    np.testing.assert_array_equal((data.posterior["code"] != 0).sum("code_unit"), data.posterior["code_length"])
    again = to_arviz(coded, [guide, guide], num_samples=30, parallel=True)
    assert again.posterior.identical(data.posterior)
    assert to_arviz(coded, guide, num_samples=1, num_prior=0, parallel=True).posterior.sizes["draw"] == 1


def test_laws_of_lengths_are_those_of_each_draw():
    def mixed():
        rare = pyro.sample("rare", dist.Bernoulli(0.5))
        last = torch.where(rare > 0, 0.3, 0.9).unsqueeze(-1)
        pyro.sample("mask", OrderedMask(probs=torch.cat([1 - last, last], -1)))

    def single():
        with pyro.plate("data", 3):
            pyro.sample("mask", OrderedMask(probs=torch.tensor([0.25, 0.75])))

    assert "law" not in to_arviz(mixed, mixed, num_samples=20, parallel=True).posterior["mask_length"].attrs
    for parallel in (False, True):
        attrs = to_arviz(single, [single, single], num_samples=5, parallel=parallel).posterior["mask_length"].attrs
        np.testing.assert_allclose(attrs["law"], [0.25, 0.75] * 2)


def multiplied(x):
    w = pyro.sample("w", dist.Normal(torch.zeros(4), 1.0).to_event(1))
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("y", dist.Normal(x @ w, 1.0), obs=x[:, 0])


def summed_over_draws(x):
    w = pyro.sample("w", dist.Normal(torch.zeros(4), 1.0).to_event(1))
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("y", dist.Normal(w.sum(), 1.0), obs=x[:, 0])


def mixed_in_a_deterministic_site(x):
    w = pyro.sample("w", dist.Normal(torch.zeros(4), 1.0).to_event(1))
    pyro.deterministic("share", w / w.sum(), event_dim=1)


def mixed_in_the_prediction(x):
    w = pyro.sample("w", dist.Normal(torch.zeros(4), 1.0).to_event(1))
    with pyro.plate("data", len(x), dim=-1):
        y = pyro.sample("y", dist.Normal(w.sum(-1), 1.0), obs=x[:, 0])
    pyro.sample("total", dist.Normal(y.sum(), 1.0), obs=x.sum())


@pytest.mark.parametrize(
    "program", [multiplied, summed_over_draws, mixed_in_a_deterministic_site, mixed_in_the_prediction]
)
@pytest.mark.parametrize("num_samples", [3, 50])  # as many as rows, too
def test_what_does_not_broadcast_is_refused(program, num_samples):
    guide = AutoNormal(program)
    guide(X)
    to_arviz(program, guide, X, num_samples=num_samples)
    with pytest.raises(ValueError, match="`parallel` must be False, as model or guide do not broadcast over draws"):
        to_arviz(program, guide, X, num_samples=num_samples, parallel=True)


def test_rows_outside_of_plates():
    def independent(x):
        w = pyro.sample("w", dist.Normal(torch.zeros(4), 1.0))
        pyro.sample("y", dist.Normal((w * x).sum(-1, keepdim=True), 1.0), obs=x[:, :1])

    guide = poutine.block(independent, hide=["y"])
    data = to_arviz(independent, guide, X, num_samples=4, parallel=True)
    w, x = data.posterior["w"].values[0], X.numpy()
    by_row = log_normal(x[:, 0], w @ x.T, 1.0)
    np.testing.assert_allclose(data.log_likelihood["y"][0, :, :, 0], by_row)
    np.testing.assert_allclose(data.sample_stats["log_p"][0], log_normal(w, 0, 1).sum(-1) + by_row.sum(-1))


def test_a_net_is_refused():
    net = nest(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), X[:1], num_blocks=4)
    with pytest.raises(ValueError, match="do not broadcast"):
        to_arviz(NestedClassifier(net), net.guide, (X, torch.tensor([0, 1, 2])), num_samples=4, parallel=True)


def test_errors_of_the_model_are_its_own():
    def broken():
        pyro.sample("z", dist.Normal(0.0, 1.0))
        raise RuntimeError("of the model")

    with pytest.raises(RuntimeError, match="of the model"):
        to_arviz(broken, lambda: pyro.sample("z", dist.Normal(0.0, 1.0)), num_samples=5, parallel=True)
