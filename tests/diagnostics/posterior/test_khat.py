"""k-hat tells good guides from bad ones, as a whole and row by row, and resampled draws have the exact posterior."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal
from scipy import stats

from pyro_vnd.diagnostics import to_arviz
from pyro_vnd.diagnostics.posterior._arviz import dataset, from_groups, psis
from pyro_vnd.diagnostics.posterior.khat import khat, khat_by_row, resample
from pyro_vnd.distributions import OrderedMask
from pyro_vnd.infer import AutoNested, OptimizerSettings, cosine_to_zero, fit, module_local_params

D, N = 5, 20
Y = torch.linspace(-1, 1, N * D, dtype=torch.float64).sin().reshape(N, D)
POSTERIOR = dist.Normal(Y.sum(0) / (N + 1), (N + 1) ** -0.5)  # of each mean


def means(y):
    """Conjugate: D means ~ N(0, 1), of which each row is a noisy look."""
    mu = pyro.sample("mu", dist.Normal(torch.zeros(D), 1.0).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0).to_event(1), obs=y)


def guide_at(shift=0.0, scale=1.0):
    """A guide that is off by so many standard deviations in each mean, and so many times as wide."""
    law = dist.Normal(POSTERIOR.mean + shift * POSTERIOR.stddev, scale * POSTERIOR.stddev)
    return lambda y: pyro.sample("mu", law.to_event(1))


def drawn(guide, num_samples=1000):
    return to_arviz(means, guide, Y, num_samples=num_samples, num_prior=0, predictive=False)


def drawn_at_once(num_samples, shift=0.0, scale=1.0):
    """What `drawn(guide_at(shift, scale))` has, of many draws in short time; log p is known up to a constant.

    Several shifts, or scales, are as many guides.
    """
    rng = np.random.default_rng(0)
    shift, scale = (np.atleast_1d(value)[:, None, None] for value in (shift, scale))
    deviations = shift + scale * rng.normal(size=(max(len(shift), len(scale)), num_samples, D))
    log_q = stats.norm(shift, scale).logpdf(deviations).sum(-1)
    log_p = stats.norm().logpdf(deviations).sum(-1)
    draws = POSTERIOR.mean.numpy() + POSTERIOR.stddev.numpy() * deviations
    dims = ["chain", "draw"]
    sample_stats = {"log_p": (dims, log_p), "log_q": (dims, log_q)}
    return from_groups({"posterior": {"mu": ([*dims, "mu_dim_0"], draws)}, "sample_stats": sample_stats}, {})


def as_tree(data):
    """The container of ArviZ 1.x, whichever is installed."""
    if isinstance(data, xr.DataTree):
        return data
    return xr.DataTree.from_dict({group: dataset(data, group) for group in data.groups()})


def test_a_fit_is_good_and_broken_ones_are_not():
    guide = AutoNormal(means)
    fit(
        means,
        guide,
        Y,
        num_epochs=300,
        lr=0.1,
        optimizer=OptimizerSettings(lr_schedule=cosine_to_zero()),
        progress=False,
    )
    values = khat(drawn([guide, guide_at(shift=2.0)]))
    assert values.dims == ("chain",)
    assert values[0] < 0.5
    assert values[1] > 0.7
    assert (khat(drawn_at_once(1000, shift=[0.0, 2.0, 1.0], scale=[1 / 3, 1.0, 1 / 3])) > 0.7).all()


def test_a_wide_guide_is_safe():
    # Its ratios are bounded, by 2^5, whatever their variance.
    assert khat(drawn_at_once(1000, scale=2.0)) < 0.5


def test_the_posterior_itself_has_no_tail():
    assert khat(drawn(guide_at(), num_samples=200)).item() == -np.inf


def test_few_draws_give_no_khat():
    data = drawn(guide_at(shift=0.2), num_samples=29)
    assert np.isnan(data.sample_stats["khat"].item())
    for function, name in ((khat, "khat"), (resample, "resample")):
        with pytest.raises(ValueError, match=f"{name}: argument `data` must have at least 30 draws a chain, .* got 29"):
            function(data)
    assert khat(drawn(guide_at(shift=0.2), num_samples=30)) < 2


def test_it_is_the_khat_of_to_arviz_and_needs_its_scores():
    data = drawn([guide_at(shift=0.2), guide_at(scale=0.5)], num_samples=200)
    np.testing.assert_allclose(khat(data), data.sample_stats["khat"])
    tree = as_tree(data).copy()  # under ArviZ 1.x it is the data themselves
    np.testing.assert_array_equal(khat(tree), khat(data))
    tree["sample_stats"] = xr.DataTree(tree["sample_stats"].to_dataset().drop_vars("log_q"))
    with pytest.raises(ValueError, match=r"must have log_p and log_q; it lacks \['log_q'\]"):
        khat(tree)
    del tree["sample_stats"]
    with pytest.raises(ValueError, match="must have the group 'sample_stats'"):
        khat(tree)
    data.sample_stats["log_p"][0, 3] = np.nan
    with pytest.raises(ValueError, match="must be numbers; 1 are NaN"):
        resample(data)


def z_scores(data):
    """Of means and variances of D independent normals, by the errors of as many draws as their weights are worth."""
    draws = data.posterior["mu"].values
    deviations = (draws - POSTERIOR.mean.numpy()) / POSTERIOR.stddev.numpy()
    n = np.prod(draws.shape[:2])
    return np.concatenate([deviations.mean((0, 1)) * n**0.5, (np.square(deviations).mean((0, 1)) - 1) * (n / 2) ** 0.5])


@pytest.mark.parametrize("container", ["as drawn", "tree"])
def test_resampled_draws_have_the_moments_of_the_posterior(container):
    n = 20_000
    data = drawn_at_once(n, shift=0.3, scale=1.15)
    data = as_tree(data) if container == "tree" else data
    again = resample(data)
    assert type(again) is type(data)
    assert again.posterior["mu"].shape == (1, n, D)
    weights = np.exp(data.sample_stats["log_p"] - data.sample_stats["log_q"]).values
    inflation = (n * np.square(weights).sum() / weights.sum() ** 2) ** 0.5  # of errors, as draws are there twice
    assert 1 < inflation < 2
    assert np.abs(z_scores(again) / inflation).max() < 3.3  # ten z-scores: p = .01
    assert np.abs(z_scores(data) / inflation).min() > 10  # power: draws of the guide


def test_resampling_keeps_what_belongs_to_a_draw():
    data = to_arviz(means, [guide_at(shift=0.3), guide_at(shift=-0.3)], Y, num_samples=400)
    again = resample(data, 1000, seed=1)
    posterior, likelihood = again.posterior["mu"], again.log_likelihood["y"]
    assert posterior.sizes["draw"] == 1000
    assert posterior["draw"].values.tolist() == list(range(1000))
    expected = dist.Normal(torch.tensor(posterior.values)[..., None, :], 1.0).log_prob(Y).sum(-1)
    np.testing.assert_allclose(likelihood.values, expected)
    assert again.posterior_predictive.sizes["draw"] == 1000
    assert set(again.sample_stats.data_vars) == {"log_p"}
    for group in ("prior", "observed_data"):
        xr.testing.assert_identical(dataset(again, group), dataset(data, group))
    for chain in range(2):  # each is resampled from its own
        assert np.isin(posterior.values[chain], data.posterior["mu"].values[chain]).all()
        assert not (np.diff(posterior.values[chain], axis=0) == 0).all(-1).mean() > 0.1  # in random order
    xr.testing.assert_identical(dataset(resample(data, 1000, seed=1), "posterior"), dataset(again, "posterior"))
    assert not dataset(resample(data, 1000, seed=2), "posterior").identical(dataset(again, "posterior"))


def test_systematic_resampling_repeats_each_draw_as_often_as_its_weight_says():
    data = drawn_at_once(500, shift=0.3)
    values = data.posterior["mu"].values[0, :, 0]
    taken, counts = np.unique(resample(data, 5000).posterior["mu"].values[0, :, 0], return_counts=True)
    times = dict(zip(taken, counts, strict=True))
    log_ratios = (data.sample_stats["log_p"] - data.sample_stats["log_q"]).values[0]
    expected = 5000 * np.exp(psis(log_ratios)[0])
    assert (np.abs([times.get(value, 0) - mean for value, mean in zip(values, expected, strict=True)]) < 1).all()


def test_resampling_a_bad_guide_is_refused():
    data = drawn_at_once(1000, shift=[0.2, 3.0])
    with pytest.raises(
        ValueError, match=r"k-hat must be at most 0.7 in each chain; got \d.\d\d, \d.\d\d. The guide misses"
    ):
        resample(data)
    with pytest.raises(ValueError, match="`num_samples` must be at least 1; got 0"):
        resample(drawn_at_once(100, shift=0.2), 0)
    assert resample(data, threshold=10).posterior.sizes["draw"] == 1000


ROWS = 6
X = torch.linspace(-2, 2, ROWS, dtype=torch.float64)


def local(x):
    """A length and a location for each row; given the length the location is conjugate."""
    with pyro.plate("data", len(x)):
        mask = pyro.sample("mask", OrderedMask.uniform(3))
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5 + 0.5 * mask.sum(-1)), obs=x)


class ExactLocal(pyro.nn.PyroModule):
    """Its posterior: the length by its evidence, the location given the length; some rows can be off."""

    def __init__(self, shift):
        super().__init__()
        self.shift = shift

    def forward(self, x):
        noise = 0.5 + 0.5 * torch.arange(1.0, 4)
        evidence = dist.Normal(0.0, (1 + noise**2).sqrt()).log_prob(x[:, None])
        with pyro.plate("data", len(x)):
            length = pyro.sample("mask", OrderedMask(logits=evidence)).sum(-1)
            precision = 1 + (0.5 + 0.5 * length) ** -2
            mean = (1 - 1 / precision) * x
            pyro.sample("z", dist.Normal(mean + self.shift * precision**-0.5, precision**-0.5))


def test_rows_are_told_apart():
    shift = torch.zeros(ROWS)
    shift[2], shift[4] = 0.2, 3.0
    values = khat_by_row(local, ExactLocal(shift), X, num_samples=400)
    assert values.dims == ("data",)
    exact = [0, 1, 3, 5]
    assert (values[exact] == -np.inf).all()  # their ratios are the evidence of the row, all equal
    assert -np.inf < values[2] < 0.5
    assert values[4] > 0.7
    # All in one: the worst row decides.
    whole = to_arviz(local, ExactLocal(shift), X, num_samples=400, num_prior=0, predictive=False)
    assert khat(whole) > 0.7


def test_scales_masks_and_other_plates_are_in_the_ratio_of_their_row():
    seen = []

    def model(x):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        data = pyro.plate("data", len(x), dim=-1)
        with pyro.plate("components", 2, dim=-2), data:
            z = pyro.sample("z", dist.Normal(w, 1.0))
        seen.append((w, z))
        with data, pyro.poutine.scale(scale=7.0), pyro.poutine.mask(mask=x > 0):
            pyro.sample("x", dist.Normal(z.sum(0), 1.0), obs=x)

    def guide(x):
        pyro.sample("w", dist.Normal(0.0, 0.1))
        with pyro.plate("components", 2, dim=-2), pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.StudentT(3.0, 0.0, 1.0))

    values = khat_by_row(model, guide, X, num_samples=400)
    w, z = (torch.stack(parts) for parts in zip(*seen, strict=True))
    prior = dist.Normal(w[:, None, None], 1.0).log_prob(z) - dist.StudentT(3.0, 0.0, 1.0).log_prob(z)
    likelihood = torch.where(X > 0, dist.Normal(z.sum(1), 1.0).log_prob(X), 0.0)
    np.testing.assert_allclose(values, psis((prior.sum(1) + likelihood).T.numpy())[1], rtol=1e-6)


def test_rows_of_an_autoguide_with_a_constrained_latent():
    # Good after a fit: the Jacobian of the transform is in the ratio, without which it would have a tail.
    def model(x):
        with pyro.plate("data", len(x)):
            rate = pyro.sample("rate", dist.LogNormal(0.0, 1.0))
            pyro.sample("x", dist.Poisson(rate), obs=x)

    counts = torch.tensor([0.0, 3.0, 10.0])
    guide = AutoNormal(model)
    fit(
        model,
        guide,
        counts,
        num_epochs=300,
        lr=0.1,
        optimizer=OptimizerSettings(lr_schedule=cosine_to_zero()),
        progress=False,
    )
    assert (khat_by_row(model, guide, counts) < 0.7).all()
    with module_local_params(guide), torch.no_grad():
        guide.locs.rate += torch.tensor([0.0, 2.0, 0.0])
    np.testing.assert_array_equal(khat_by_row(model, guide, counts) < 0.7, [True, False, True])


def test_a_plate_that_subsamples_keeps_its_rows():
    shift = torch.zeros(ROWS)
    shift[:3] = 3.0

    def model(x):
        with pyro.plate("data", len(x), subsample_size=3) as rows:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows])

    def guide(x):
        with pyro.plate("data", len(x), subsample_size=3) as rows:
            pyro.sample("z", dist.Normal(x[rows] / 2 + shift[rows], 0.5**0.5))

    values = {tuple(np.sort(khat_by_row(model, guide, X, num_samples=200, seed=seed) > 0.7)) for seed in range(4)}
    assert len(values) > 1  # which rows there are depends on the seed; within a call they stay


@pytest.mark.parametrize("make", [AutoMultivariateNormal, AutoDelta])
def test_rows_without_ratios_of_their_own_are_refused(make):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(ValueError, match=r"the latents \['z'\] in the plate 'data', row by row"):
        khat_by_row(model, make(model), X)
    with pytest.raises(ValueError, match=r"must draw all latents; it does not draw \['z'\]"):
        khat_by_row(model, lambda x: None, X)
    with pytest.raises(
        ValueError, match=r"no site of the model is in a vectorised plate 'rows'; its plates: \['data'\]"
    ):
        khat_by_row(model, AutoNormal(model), X, plate="rows")
    with pytest.raises(ValueError, match="`num_samples` must be at least 30; got 29"):
        khat_by_row(model, AutoNormal(model), X, num_samples=29)
    with pytest.raises(ValueError, match="khat_by_row: argument `data` has no rows"):
        khat_by_row(model, AutoNormal(model), [])


def test_seeds_and_the_callers_random_numbers():
    guide = AutoNested(local)
    guide(X)
    state = torch.get_rng_state()
    first = khat_by_row(local, guide, X, num_samples=50)
    assert torch.equal(torch.get_rng_state(), state)
    for data in ((X,), [X], {"x": X}):  # as a tuple, a list or a mapping they are the same
        xr.testing.assert_identical(first, khat_by_row(local, guide, data, num_samples=50))
    assert not first.equals(khat_by_row(local, guide, X, num_samples=50, seed=1))
