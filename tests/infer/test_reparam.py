"""Models under Pyro's reparameterisers: the latents are the new sites, and the old ones points that cost nothing."""

from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.reparam import AutoReparam, LocScaleReparam

from pyro_vnd.distributions import OrderedMask
from pyro_vnd.infer import AutoNested, NestedELBO, fit

mean_field = partial(AutoNested, latents="mean_field")

Y = torch.linspace(0, 3, 10, dtype=torch.float64)


def hierarchy(y):
    mask = pyro.sample("mask", OrderedMask.uniform(3))
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    tau = pyro.sample("tau", dist.LogNormal(0.0, 0.3))
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(mask.sum(-1) + z, 1.0), obs=y)


@pytest.mark.parametrize("elbo", [NestedELBO, TraceMeanField_ELBO, Trace_ELBO])
@pytest.mark.parametrize("config", [AutoReparam(centered=0.0), {"z": LocScaleReparam(0.0)}], ids=["auto", "one"])
def test_a_model_under_reparam_is_fitted(config, elbo):
    model = poutine.reparam(hierarchy, config)
    guide = mean_field(model)
    result = fit(model, guide, Y, num_epochs=200, lr=0.05, elbo=elbo(), progress=False)
    names = set(guide(Y))
    assert "z_decentered" in names
    assert "z" not in names
    assert -2.2 < result.elbo[-1] < -1.2
    assert result.elbo[-1] > result.elbo[0] + 0.3
