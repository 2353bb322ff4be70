"""The law of masks that are summed out, against closed forms, sums over all lengths and the marginals of Pyro."""

import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from oracles import all_masks
from pyro import poutine
from pyro.infer import MCMC, NUTS, TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoNormal
from scipy import stats

from pyro_vnd.diagnostics import length_posterior, plot_length_posterior, to_arviz
from pyro_vnd.distributions import OrderedMask
from pyro_vnd.infer import AutoNested, fit

K, N, NOISE = 4, 30, 0.5
X = torch.randn(N, K, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
T = X[:, 0] - 0.25 * X[:, 1] + NOISE * torch.randn(N, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def regression(x, t):
    mask = pyro.sample("mask", OrderedMask.uniform(K), infer={"enumerate": "parallel"})
    w = pyro.sample("w", dist.Normal(torch.zeros(K), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("t", dist.Normal((x * mask * w).sum(-1), NOISE), obs=t)


def exact_law():
    """The weights of a conjugate regression integrated out."""
    evidence = [
        stats.multivariate_normal(np.zeros(N), NOISE**2 * np.eye(N) + X[:, :k].numpy() @ X[:, :k].numpy().T).logpdf(T)
        for k in range(1, K + 1)
    ]
    return np.exp(evidence - np.logaddexp.reduce(evidence))


def given_weights(w):
    """p(L | data, w), a length at a time."""
    log_joint = [dist.Normal((X * mask * w).sum(-1), NOISE).log_prob(T).sum() for mask in all_masks(K)]
    return torch.stack(log_joint).softmax(0)


def exact_posterior(x, t):
    """Draws w from its posterior, a mixture over the lengths."""
    length = int(dist.Categorical(torch.tensor(exact_law())).sample()) + 1
    kept = x * all_masks(K)[length - 1]
    precision = torch.eye(K, dtype=torch.float64) + kept.T @ kept / NOISE**2
    mean = torch.linalg.solve(precision, kept.T @ t / NOISE**2)
    pyro.sample("w", dist.MultivariateNormal(mean, precision_matrix=precision))


def test_law_of_a_conjugate_regression():
    n = 1000
    found = length_posterior(regression, exact_posterior, (X, T), num_samples=n)
    exact = exact_law()
    assert (exact > 0.01).sum() > 2
    error = found["probs_by_draw"].std("draw").values / n**0.5
    assert np.abs((found["probs"].values - exact) / np.maximum(error, 1e-9)).max() < 4
    np.testing.assert_allclose(found["probs"], found["probs_by_draw"].mean("draw"))
    assert found["length"].values.tolist() == found["unit"].values.tolist() == [1, 2, 3, 4]
    np.testing.assert_array_equal(found["masks"].sum("unit"), found["lengths"])
    counts = np.bincount(found["lengths"], minlength=K + 1)[1:]
    common = exact * n > 5
    # Pearson's statistic, of at most 4 lengths: 16.3 is the 99.9 % quantile for 3 degrees of freedom.
    assert ((counts - n * exact)[common] ** 2 / (n * exact)[common]).sum() < 16.3
    assert found.attrs == {"site": "mask"}


def test_draws_of_mcmc():
    mcmc = MCMC(NUTS(regression), num_samples=300, warmup_steps=100, disable_progbar=True)
    mcmc.run(X, T)
    w = mcmc.get_samples()["w"]
    found = length_posterior(regression, mcmc, (X, T))
    np.testing.assert_allclose(found["probs_by_draw"], torch.stack([given_weights(one) for one in w]), atol=1e-9)
    np.testing.assert_allclose(found["probs"], exact_law(), atol=0.1)
    xr.testing.assert_identical(found, length_posterior(regression, mcmc.get_samples(), (X, T)))
    thinned = length_posterior(regression, mcmc, (X, T), num_samples=3)
    np.testing.assert_allclose(thinned["probs_by_draw"], found["probs_by_draw"][[0, 150, 299]])
    with pytest.raises(ValueError, match=r"as many draws of each site, 301 or more; got \{'w': 300\}"):
        length_posterior(regression, mcmc, (X, T), num_samples=301)


def test_a_fit_by_enumeration():
    guide = AutoNormal(poutine.block(regression, hide=["mask"]))
    fit(regression, guide, (X, T), elbo=TraceEnum_ELBO(max_plate_nesting=1), num_epochs=20, progress=False)
    found = length_posterior(regression, guide, (X, T), num_samples=20)
    with pytest.raises(ValueError, match=r"\['mask'\] are marked .* call length_posterior\(model, guide, data\)"):
        to_arviz(regression, guide, (X, T), num_samples=2)
    assert found["probs"].sum() == pytest.approx(1)
    again = length_posterior(regression, guide, {"x": X, "t": T}, num_samples=20)
    xr.testing.assert_allclose(found, again)
    assert not again.equals(length_posterior(regression, guide, (X, T), num_samples=20, seed=1))


def by_row(y):
    """A mask for all rows and one for each, with a latent that is drawn."""
    whole = pyro.sample("whole", OrderedMask.uniform(3))
    shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
    with pyro.plate("a/rows", len(y)):
        own = pyro.sample("own", OrderedMask.geometric(0.3, K))
        kind = pyro.sample("kind", dist.Bernoulli(0.3))  # summed out with them
        pyro.sample("y", dist.Normal(shift + whole.sum(-1) + own.sum(-1) - kind, 1.0), obs=y)


Y = torch.tensor([1.0, 3.0, 5.0], dtype=torch.float64)


def joint_law(shift):
    """p(whole, own of each row | shift, y), shape (3, K, K, K)."""
    whole, own, kind = torch.arange(1.0, 4)[:, None, None, None], torch.arange(1.0, K + 1)[:, None], torch.arange(2.0)
    prior = OrderedMask.geometric(0.3, K).logits[:, None] + dist.Bernoulli(0.3).log_prob(kind)
    rows = (prior + dist.Normal(shift + whole + own - kind, 1.0).log_prob(Y[:, None, None])).logsumexp(-1)
    a, b, c = (rows[:, i] for i in range(3))
    return (a[:, :, None, None] + b[:, None, :, None] + c[:, None, None, :]).flatten().softmax(0).reshape(3, K, K, K)


def test_several_masks_some_in_plates():
    shift = torch.linspace(-1, 1, 5, dtype=torch.float64)
    whole, own = (length_posterior(by_row, {"shift": shift}, Y, site=site) for site in ("whole", "own"))
    assert own["probs_by_draw"].dims == ("draw", "a.rows", "length")
    assert own["masks"].dims == ("draw", "a.rows", "unit")
    for i, value in enumerate(shift):
        law = joint_law(value)
        np.testing.assert_allclose(whole["probs_by_draw"][i], law.sum((1, 2, 3)))
        rows = [law.sum([dim for dim in range(4) if dim != row + 1]) for row in range(3)]
        np.testing.assert_allclose(own["probs_by_draw"][i], torch.stack(rows))
    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    theirs = elbo.compute_marginals(config_enumerate(poutine.condition(by_row, {"shift": shift[0]})), lambda y: None, Y)
    np.testing.assert_allclose(own["probs_by_draw"][0], theirs["own"].probs)


def test_several_masks_are_drawn_jointly():
    def sum_of_two(y):
        first, second = (pyro.sample(name, OrderedMask.uniform(3)) for name in ("first", "second"))
        shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(first.sum(-1) + second.sum(-1) + shift, 0.7), obs=y)

    n, lengths = 400, torch.arange(1.0, 4)
    data = {"shift": torch.zeros(n)}, torch.tensor(4.0)
    drawn = [length_posterior(sum_of_two, *data, site=name)["lengths"].values - 1 for name in ("first", "second")]
    law = dist.Normal(lengths[:, None] + lengths, 0.7).log_prob(data[1]).flatten().softmax(0).reshape(3, 3).numpy()
    counts = np.zeros((3, 3))
    np.add.at(counts, tuple(drawn), 1)
    # Pearson's statistic of 9 cells: 26.1 is the 99.9 % quantile for 8 degrees of freedom.
    assert ((counts - n * law) ** 2 / (n * law)).sum() < 26.1
    independent = n * np.outer(law.sum(1), law.sum(0))
    assert ((counts - independent) ** 2 / independent).sum() > 100  # power


def test_rows_that_a_plate_draws_stay():
    def model(y):
        shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y), subsample_size=2) as rows:
            mask = pyro.sample("mask", OrderedMask.uniform(3))
            pyro.sample("y", dist.Normal(mask.sum(-1) + shift, 0.5), obs=y[rows])

    found = length_posterior(model, {"shift": torch.zeros(5)}, torch.tensor([1.0, 2.0, 3.0, 3.0]))
    assert found["probs_by_draw"].shape == (5, 2, 3)
    assert (found["probs_by_draw"].std("draw") < 1e-6).all()


@pytest.mark.parametrize(
    ("model", "guide", "how", "message"),
    [
        (regression, AutoNested(regression), {}, "must leave a mask to be summed out"),
        (regression, lambda x, t: None, {}, r"must draw all latents that are not summed out; it lacks \['w'\]"),
        (regression, 3, {}, "must be a guide, an MCMC, or draws by site; got int"),
        (regression, {}, {}, "as many draws of each site, 1 or more; got {}"),
        (regression, {"w": torch.zeros(2, K)}, {"num_samples": 0}, "`num_samples` must be at least 1; got 0"),
        (regression, {"w": torch.zeros(2, K)}, {"site": "w"}, r"`site` must be one of the masks \['mask'\]; got 'w'"),
    ],
)
def test_bad_arguments_are_named(model, guide, how, message):
    with pytest.raises(ValueError, match=message):
        length_posterior(model, guide, (X, T), **how)


def test_one_of_several_masks_must_be_named():
    with pytest.raises(ValueError, match=r"`site` must name one of the masks \['whole', 'own'\]"):
        length_posterior(by_row, {"shift": torch.zeros(2)}, Y)


def test_the_figure_and_the_file(tmp_path):
    found = length_posterior(by_row, {"shift": torch.zeros(5)}, Y, site="own")
    found.to_netcdf(str(tmp_path / "lengths.nc"), engine="h5netcdf")
    xr.testing.assert_identical(xr.load_dataset(str(tmp_path / "lengths.nc"), engine="h5netcdf"), found)
    ax = plot_length_posterior(found)
    heights = [bar.get_height() for bar in ax.patches]
    np.testing.assert_allclose(heights, found["probs"].mean("a.rows"))
    assert ax.get_legend_handles_labels()[1][0].startswith("own: mean ")
    plt.close("all")
