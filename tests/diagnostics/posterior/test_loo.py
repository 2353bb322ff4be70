"""Leave-one-out densities against exact ones, and models compared by them."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from conjugate import MEAN, Y, conjugate, log_normal, posterior, shifted

from pyro_vnd.diagnostics import khat, smallest_width, to_arviz
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


def test_a_guide_far_from_the_posterior_gives_no_ranking():
    def far(y=Y):
        pyro.sample("z", dist.Normal(MEAN + 3.0, 0.1))

    good, bad = (to_arviz(conjugate, guide, num_samples=500, num_prior=0) for guide in (posterior, far))
    of_guide = (
        rf"its guide has a k-hat of {khat(bad).item():.2f}, above 0.7, and is too far from the posterior. Fit for"
    )
    with pytest.raises(ValueError, match=f"loo: argument `data` cannot tell: {of_guide}"):
        loo(bad)
    with pytest.raises(ValueError, match=f"compare: .* cannot be ranked: 'bad': {of_guide}.* `force=True`"):
        compare({"good": good, "bad": bad})
    with pytest.raises(ValueError, match="loo: argument `data` cannot tell"):
        smallest_width({1: good, 2: bad})
    with pytest.warns(UserWarning, match="shape parameter of Pareto distribution"):
        forced = loo(bad, force=True)
    assert forced.warning
    with pytest.raises(ValueError, match=f"'bad': {of_guide}"):  # it is still no estimate to rank by
        compare({"good": loo(good), "bad": forced})
    assert compare({"good": loo(good), "bad": forced}, force=True)["warning"].to_dict() == {"good": False, "bad": True}
    # Draws as those of MCMC are nobody's approximation.
    assert loo(bad, variational=False).elpd < loo(good, variational=False).elpd
    with pytest.raises(ValueError, match="loo: argument `data` must have at least 30 draws a chain"):
        loo(to_arviz(conjugate, posterior, num_samples=29))


def test_rows_with_latents_of_their_own_give_no_estimate():
    y = torch.linspace(-20.0, 20.0, 8)[:, None].expand(8, 20)

    def own(y=y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros(20), 10.0).to_event(1))
            pyro.sample("y", dist.Normal(z, 0.1).to_event(1), obs=y)

    def exact(y=y):
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(y / (1 + 1e-4), 0.1 / (1 + 1e-4) ** 0.5).to_event(1))

    data = to_arviz(own, exact, num_samples=500)
    assert khat(data) < 0.7  # the guide is the posterior
    for variational in (True, False):
        with (
            pytest.warns(UserWarning, match="shape parameter of Pareto distribution"),
            pytest.raises(ValueError, match=r"the k-hats of all rows are above 0.7, from \d.\d\d up.* hold rows out"),
        ):
            loo(data, variational=variational)
