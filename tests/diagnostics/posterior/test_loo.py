"""Leave-one-out densities against exact ones, and models compared by them."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
from conjugate import Y, conjugate, log_normal, posterior, shifted

from pyro_vnd.diagnostics import to_arviz
from pyro_vnd.diagnostics.posterior.loo import compare, loo


def test_loo_is_close_to_the_exact_leave_one_out_density():
    n = len(Y)
    exact = log_normal(Y, (Y.sum() - Y) / n, 1 + 1 / n)
    options = {"num_samples": 2000, "num_prior": 0, "predictive": False}
    data = to_arviz(conjugate, posterior, **options)
    np.testing.assert_allclose(loo(data).elpd_i, exact, atol=0.03)
    off = to_arviz(conjugate, [shifted, shifted], **options)
    assert abs(loo(off).elpd - exact.sum()) < 0.15
    assert abs(loo(off, variational=False).elpd - exact.sum()) > 0.3  # power: draws of the guide as they are


def test_comparison_of_models():
    def without_latent(y=Y):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(0.01 * z, 5.0), obs=y)

    right = to_arviz(conjugate, posterior, num_samples=500)
    wrong = to_arviz(without_latent, lambda y=Y: pyro.sample("z", dist.Normal(0.0, 1.0)), num_samples=500)
    table = compare({"wrong": loo(wrong), "right": right})
    assert table.index.tolist() == ["right", "wrong"]
    assert table["elpd"]["wrong"] == pytest.approx(log_normal(Y, 0, 25).sum(), abs=0.01)
    with pytest.raises(ValueError, match=r"`datasets` must have at least two models; got \['right'\]"):
        compare({"right": right})
