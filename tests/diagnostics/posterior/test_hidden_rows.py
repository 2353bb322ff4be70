"""Latents that the model hides by a mask, and their scales, count in the guide as they do in the model."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from conjugate import log_normal
from pyro import poutine
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

from pyro_vnd.diagnostics import khat, khat_by_row, resample, to_arviz
from pyro_vnd.distributions import OrderedMask
from pyro_vnd.infer import AutoNested, module_local_params

Y = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)
SHOWN = torch.tensor([True, False, True, False])


def by_poutine(y):
    with pyro.plate("data", len(y)), poutine.mask(mask=SHOWN):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def by_law(y):
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).mask(SHOWN))
        pyro.sample("y", dist.Normal(z, 1.0).mask(SHOWN), obs=y)


def unmasked(y):
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def exact(y):
    """The posterior of the rows that are shown, anything for those that are not."""
    mean = torch.where(SHOWN, y / 2, 7.0)
    with pyro.plate("data", len(y)):
        pyro.sample("z", dist.Normal(mean, torch.where(SHOWN, 0.5**0.5, 20.0)))


def exact_in_no_plate(y):
    mean, scale = torch.where(SHOWN, y / 2, 7.0), torch.where(SHOWN, 0.5**0.5, 20.0)
    pyro.sample("z", dist.Normal(mean, scale).to_event(1))


@pytest.mark.parametrize("model", [by_poutine, by_law])
@pytest.mark.parametrize(("guide", "parallel"), [(exact, False), (exact, True), (exact_in_no_plate, False)])
def test_hidden_rows_count_nothing(model, guide, parallel):
    data = to_arviz(model, guide, Y, num_samples=100, parallel=parallel)
    evidence = log_normal(Y[SHOWN], 0.0, 2.0).sum()  # the exact posterior: the ELBO is the evidence in each draw
    np.testing.assert_allclose(data.sample_stats["elbo"], evidence)
    z = data.posterior["z"].values[0][:, SHOWN]
    np.testing.assert_allclose(data.sample_stats["log_q"][0], log_normal(z, Y[SHOWN] / 2, 0.5).sum(-1))
    assert khat(data) == -np.inf
    assert resample(data).posterior.sizes["draw"] == 100
    # Power: without the mask the guide is far from the posterior.
    assert khat(to_arviz(unmasked, guide, Y, num_samples=100, parallel=parallel)) > 0.7


@pytest.mark.parametrize("model", [by_poutine, by_law])
def test_hidden_rows_have_equal_ratios(model):
    assert (khat_by_row(model, exact, Y, num_samples=100) == -np.inf).all()
    assert (khat_by_row(unmasked, exact, Y, num_samples=100) > 0.7).values.tolist() == [False, True, False, True]


def test_autoguides_and_masks():
    def model(y):
        with pyro.plate("data", len(y)), poutine.mask(mask=SHOWN):
            rate = pyro.sample("rate", dist.LogNormal(0.0, 1.0))
            mask = pyro.sample("mask", OrderedMask.uniform(3))
            pyro.sample("y", dist.Normal(rate + mask.sum(-1), 1.0), obs=y)

    guide = AutoNested(model, base=AutoNormal)
    with module_local_params(guide), torch.no_grad():
        guide(Y)
        for name, value in guide.named_parameters():
            if "loc" in name:
                value[~SHOWN] = 3.0  # never trained
    data = to_arviz(model, guide, Y, num_samples=20)
    rate, length = (torch.tensor(data.posterior[name].values[0])[:, SHOWN] for name in ("rate", "mask_length"))
    with module_local_params(guide):
        locs = guide.median()["rate"].log()[SHOWN]
    log_q = dist.LogNormal(locs, 0.1).log_prob(rate).sum(-1) - 2 * np.log(3.0)
    np.testing.assert_allclose(data.sample_stats["log_q"][0], log_q.detach(), rtol=1e-5)
    by_row = dist.Normal(rate + length, 1.0).log_prob(Y[SHOWN])
    log_p = dist.LogNormal(0.0, 1.0).log_prob(rate).sum(-1) - 2 * np.log(3.0) + by_row.sum(-1)
    np.testing.assert_allclose(data.sample_stats["log_p"][0], log_p)


def test_a_joint_law_of_rows_cannot_be_taken_apart():
    def joint(y):
        pyro.sample("z", dist.MultivariateNormal(torch.zeros(4), torch.eye(4)))

    with pytest.raises(ValueError, match=r"must draw the rows of site 'z' by themselves, .* MultivariateNormal"):
        to_arviz(by_poutine, joint, Y, num_samples=2)
    # Those of autoguides are auxiliary sites, which stay whole.
    guide = AutoMultivariateNormal(by_poutine)
    data = to_arviz(by_poutine, guide, Y, num_samples=20)
    log_q = log_normal(data.posterior["z"].values[0], guide.loc.detach().numpy(), 0.01).sum(-1)
    np.testing.assert_allclose(data.sample_stats["log_q"][0], log_q)


def test_scales_of_the_model_are_those_of_the_guide():
    def model(y):
        with pyro.plate("data", 3 * len(y), subsample_size=len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    def guide(y):  # a plate that does not know of the others
        with pyro.plate("rows", len(y)):
            pyro.sample("z", dist.Normal(y / 2, 0.5**0.5))

    data = to_arviz(model, guide, Y, num_samples=50)
    np.testing.assert_allclose(data.sample_stats["elbo"], 3 * log_normal(Y, 0.0, 2.0).sum())
