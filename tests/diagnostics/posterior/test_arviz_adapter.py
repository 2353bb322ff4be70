"""The adapter under both lines of ArviZ: in this Python, and without torch in every newer one that is found."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import arviz as az
import arviz_stats
import numpy as np
import pytest
import xarray as xr

ROOT = Path(__file__).parents[3]
ADAPTER = ROOT / "pyro_vnd" / "diagnostics" / "posterior" / "_arviz.py"
PACKAGES = ("arviz>=1", "h5netcdf", "h5py", "pytest")
PINNED = ("arviz", "h5", "numpy", "pandas", "pytest", "scipy", "xarray")  # pins whose change makes the environment anew


def load():
    """By path, as importing pyro_vnd takes torch."""
    spec = importlib.util.spec_from_file_location("adapter", ADAPTER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


adapter = load()
SAMPLE = ("chain", "draw")


def draws(values, **groups):
    """ArviZ data with a variable `x` of the posterior, shape (chain, draw)."""
    return adapter.from_groups({"posterior": {"x": (SAMPLE, values)}, **groups}, {})


def normal_data(num_rows=40, num_chains=2, num_draws=2000, *, bias=0.0, dims=("data",), shape=None):
    """Draws for y_n ~ N(z, 1), z ~ N(0, 1), from N(posterior mean + bias, posterior variance), with their scores."""
    rng = np.random.default_rng(0)
    y = rng.normal(0.5, 1.0, num_rows)
    mean, variance = y.sum() / (num_rows + 1), 1 / (num_rows + 1)
    z = rng.normal(mean + bias, variance**0.5, (num_chains, num_draws))
    terms = log_normal(y, z[..., None], 1.0)
    log_p, log_q = terms.sum(-1) + log_normal(z, 0.0, 1.0), log_normal(z, mean + bias, variance)
    others = y.sum() - y
    exact = log_normal(y, others / num_rows, 1 + 1 / num_rows)  # p(y_n | others): N - 1 rows and the prior
    groups = {
        "log_likelihood": {"y": ((*SAMPLE, *dims), terms.reshape(*z.shape, *(shape or (num_rows,))))},
        "sample_stats": {"log_p": (SAMPLE, log_p), "log_q": (SAMPLE, log_q)},
    }
    return draws(z, **groups), terms, exact


def log_normal(x, mean, variance):
    return -0.5 * ((x - mean) ** 2 / variance + np.log(2 * np.pi * variance))


def test_groups_have_dimensions_coordinates_and_attributes():
    values = np.arange(24.0).reshape(2, 3, 4)
    groups = {
        "posterior": {"mask": ((*SAMPLE, "unit"), values, {"units": "nats"})},
        "observed_data": {"y": (("data",), np.arange(5))},
    }
    data = adapter.from_groups(groups, {"unit": [1, 2, 3, 4]}, {"inference_library": "pyro"})
    assert type(data).__name__ == ("InferenceData" if az.__version__.startswith("0.") else "DataTree")
    mask = data.posterior["mask"]
    assert mask.dims == ("chain", "draw", "unit")
    assert mask.attrs == {"units": "nats"}
    assert data.posterior["unit"].values.tolist() == [1, 2, 3, 4]
    assert data.posterior["draw"].values.tolist() == [0, 1, 2]
    assert data.posterior.attrs["inference_library"] == "pyro"
    np.testing.assert_array_equal(adapter.dataset(data, "posterior")["mask"], values)
    assert isinstance(adapter.dataset(data, "observed_data"), xr.Dataset)
    with pytest.raises(ValueError, match=r"group 'prior'; its groups: \['posterior', 'observed_data'\]"):
        adapter.dataset(data, "prior")


def test_netcdf_round_trip(tmp_path):
    data, terms, _ = normal_data(num_draws=50)
    data.to_netcdf(str(tmp_path / "data.nc"))
    back = az.from_netcdf(str(tmp_path / "data.nc"))
    for group in ("posterior", "log_likelihood", "sample_stats"):
        assert adapter.dataset(back, group).load().identical(adapter.dataset(data, group))
    np.testing.assert_array_equal(back.log_likelihood["y"], terms)
    assert adapter.loo(back).elpd == adapter.loo(data).elpd


def test_summary_of_one_chain_has_no_convergence_statistics():
    x = np.random.default_rng(0).normal(3.0, 2.0, (1, 4000))
    table = adapter.summary(draws(x))
    assert list(table.columns) == ["mean", "sd", "eti89_lb", "eti89_ub"]
    expected = [x.mean(), x.std(), *np.quantile(x, [0.055, 0.945])]
    np.testing.assert_allclose(table.loc["x"].astype(float), expected, atol=0.005)


def test_summary_of_several_fits_tells_whether_they_agree():
    rng = np.random.default_rng(0)
    same = rng.normal(size=(3, 1000))
    variables = {
        "agree": (SAMPLE, same),
        "shifted": (SAMPLE, same + np.array([[0.0], [0.0], [1.0]])),
        "mask": ((*SAMPLE, "unit"), np.stack([np.ones((3, 1000)), same > 0], -1).astype(int)),
        "settled": (SAMPLE, np.repeat([[2], [2], [5]], 1000, 1)),
    }
    data = adapter.from_groups({"posterior": variables}, {})
    assert adapter.summary(data).index.tolist() == ["agree", "shifted", "mask[1]", "settled"]
    table = adapter.summary(data, constant=True)
    assert list(table.columns) == ["mean", "sd", "eti89_lb", "eti89_ub", "r_hat"]
    assert not table.isna().any(axis=None)
    r_hat = table["r_hat"]
    assert r_hat["mask[0]"] == 1
    assert r_hat[["agree", "mask[1]"]].max() < 1.01
    assert r_hat["shifted"] > 1.1  # power: one of three fits is off by a standard deviation
    assert r_hat["settled"] > 100
    assert adapter.summary(data, ["agree"]).index.tolist() == ["agree"]


def test_summary_of_few_draws_of_several_fits_has_no_r_hat():
    assert "r_hat" not in adapter.summary(draws(np.zeros((2, 3))))


@pytest.mark.parametrize("k", [0.3, 0.9])
def test_khat_is_the_index_of_a_pareto_tail(k):
    # Weights U^-k have a Pareto tail of index k. The fit is to 3 sqrt(20,000) = 424 draws: a standard error of about
    # (1 + k) / sqrt(424) = .06 to .09.
    uniform = np.random.default_rng(0).uniform(size=20_000)
    smoothed, khat = adapter.psis(-k * np.log(uniform))
    assert abs(khat - k) < 0.2
    assert abs(adapter.psis(-(k + 0.5) * np.log(uniform))[1] - k) > 0.3  # power
    np.testing.assert_allclose(np.exp(smoothed).sum(), 1)
    kept = np.argsort(uniform)[1000:]  # beyond the tail weights are only normalised
    np.testing.assert_allclose(np.diff(smoothed[kept]), np.diff(-k * np.log(uniform[kept])), atol=1e-12)


def test_weights_without_a_tail_are_only_normalised():
    few, equal, steep = np.log([1.0, 2.0, 5.0]), np.zeros(400), np.arange(400) * 1e3
    ties = np.repeat(np.log([1.0, 3.0]), 200)
    discrete = np.repeat(np.log([0.1, 1.0, 50.0]), [120, 260, 20])  # as of a guide of nothing but a mask
    rounding = 1e-7 * np.arange(400)  # a guide that is the posterior, in float32
    single = np.repeat(np.log([1.0, 1e6]), [399, 1])
    cases = {-np.inf: (equal, ties, discrete, rounding), np.inf: (steep, single), np.nan: (few,)}
    for weights, expected in ((weights, khat) for khat, several in cases.items() for weights in several):
        smoothed, khat = adapter.psis(weights)
        np.testing.assert_equal(float(khat), expected)
        np.testing.assert_allclose(smoothed, weights - np.logaddexp.reduce(weights), atol=1e-12)
    smoothed, khat = adapter.psis(np.where(equal == 0, np.nan, 0.0))
    assert np.isnan(smoothed).all()
    assert khat == np.inf
    both, khats = adapter.psis(np.stack([equal, steep]))
    assert both.shape == (2, 400)
    assert khats.tolist() == [-np.inf, np.inf]


def test_loo_is_close_to_the_exact_leave_one_out_density():
    data, terms, exact = normal_data()
    result = adapter.loo(data)
    np.testing.assert_allclose(result.elpd_i, exact, atol=0.01)
    assert abs(result.elpd - exact.sum()) < 0.05
    assert result.elpd == pytest.approx(float(result.elpd_i.sum()))
    lppd = np.logaddexp.reduce(terms, (0, 1)) - np.log(terms.shape[0] * terms.shape[1])
    assert result.p == pytest.approx(lppd.sum() - result.elpd)
    assert abs(lppd.sum() - exact.sum()) > 0.5  # power: the rows' own densities are not left-one-out ones
    assert result.se == pytest.approx((len(exact) * exact.var()) ** 0.5, rel=0.05)
    assert result.elpd_i.dims == result.pareto_k.dims == ("data",)
    assert float(result.pareto_k.max()) < result.good_k
    assert not result.warning


def test_correction_for_an_approximate_posterior():
    data, _, exact = normal_data(bias=0.15)  # a standard deviation of the posterior
    corrected = adapter.loo(data, variational=True)
    assert abs(corrected.elpd - exact.sum()) < 0.1
    assert abs(adapter.loo(data).elpd - exact.sum()) > 0.3  # power: without the correction
    stats = adapter.dataset(data, "sample_stats")
    tree = xr.DataTree.from_dict({name: adapter.dataset(data, name) for name in ("posterior", "log_likelihood")})
    theirs = arviz_stats.loo_approximate_posterior(tree, stats["log_p"], stats["log_q"], pointwise=True)
    np.testing.assert_allclose(corrected.elpd_i, theirs.elpd_i)
    np.testing.assert_allclose(corrected.pareto_k, theirs.pareto_k)
    # Theirs takes the density of rows that were seen from draws of the guide as they are.
    unbiased = adapter.loo(normal_data(bias=0.0)[0]).p
    assert abs(corrected.p - unbiased) < 0.15
    assert abs(theirs.p - unbiased) > 0.3


def test_loo_keeps_dimensions_and_leaves_out_rows_without_a_likelihood():
    data, _, exact = normal_data(dims=("user", "item"), shape=(8, 5))
    whole = adapter.loo(data)
    assert whole.elpd_i.dims == ("user", "item")
    adapter.dataset(data, "log_likelihood")["y"][:, :, 2, 3] = np.nan
    part = adapter.loo(data)
    assert part.n_data_points == 39
    assert part.elpd == pytest.approx(whole.elpd - float(whole.elpd_i[2, 3]))
    assert abs(part.elpd - (exact.sum() - exact[13])) < 0.05
    gap = set(zip(part.elpd_i["user"].values.tolist(), part.elpd_i["item"].values.tolist(), strict=True))
    assert (2, 3) not in gap


def test_loo_of_draws_that_take_few_values():
    z = np.random.default_rng(0).integers(0, 2, (1, 1000))
    y = np.array([0.0, 0.5, 1.0])
    terms = log_normal(y, z[..., None], 1.0)
    data = draws(z, log_likelihood={"y": ((*SAMPLE, "data"), terms)})
    expected = -np.log(np.exp(-terms).mean((0, 1)))
    np.testing.assert_allclose(adapter.loo(data).elpd_i, expected)


def test_loo_refuses_what_it_cannot_use():
    data, terms, _ = normal_data(num_draws=50)
    with pytest.raises(ValueError, match=r"`var_name` must be one of the observed sites \['y'\]; got 'x'"):
        adapter.loo(data, "x")
    two = draws(np.zeros((2, 50)), log_likelihood=dict.fromkeys(("a", "b"), ((*SAMPLE, "data"), terms)))
    with pytest.raises(ValueError, match=r"`var_name` must name one of the observed sites \['a', 'b'\]"):
        adapter.loo(two)
    with pytest.raises(ValueError, match="group 'sample_stats'"):
        adapter.loo(two, "a", variational=True)
    with pytest.raises(ValueError, match="group 'log_likelihood'"):
        adapter.loo(draws(np.zeros((2, 50))))
    unscored = draws(
        np.zeros((2, 50)), log_likelihood={"a": ((*SAMPLE, "data"), terms)}, sample_stats={"x": (SAMPLE, terms[..., 0])}
    )
    with pytest.raises(ValueError, match="`variational` needs `log_p` and `log_q`"):
        adapter.loo(unscored, variational=True)


def test_comparison():
    good, terms, _ = normal_data()
    bad = draws(np.zeros((2, 2000)), log_likelihood={"y": ((*SAMPLE, "data"), 1.1 * terms - 0.1)})
    elpds = {"bad": adapter.loo(bad), "good": adapter.loo(good)}
    table = adapter.compare(elpds)
    assert list(table.columns) == ["rank", "elpd", "se", "p", "elpd_diff", "dse", "weight", "warning"]
    assert table.index.tolist() == ["good", "bad"]
    assert table["rank"].tolist() == [0, 1]
    by_row = elpds["bad"].elpd_i.to_numpy() - elpds["good"].elpd_i.to_numpy()
    np.testing.assert_allclose(table["elpd"], [elpds["good"].elpd, elpds["bad"].elpd])
    np.testing.assert_allclose(table["elpd_diff"], [0, by_row.sum()])
    np.testing.assert_allclose(table["dse"], [0, (len(by_row) * by_row.var()) ** 0.5], rtol=0.02)
    assert table["weight"].sum() == pytest.approx(1)
    assert table["weight"]["good"] > 0.9
    assert table["warning"].tolist() == [False, False]


def test_comparison_flags_what_cannot_be_trusted():
    data, terms, _ = normal_data(num_draws=200)
    with pytest.warns(UserWarning, match="shape parameter of Pareto distribution"):
        wild = adapter.loo(draws(np.zeros((2, 200)), log_likelihood={"y": ((*SAMPLE, "data"), 40 * terms)}))
    assert adapter.compare({"wild": wild, "tame": adapter.loo(data)})["warning"].to_dict() == {
        "tame": False,
        "wild": True,
    }


@pytest.mark.parametrize("version", ["3.12", "3.13", "3.14", "3.15"])
def test_another_python_passes_all_of_the_above(version):
    python = environment(version)
    command = [python, "-m", "pytest", __file__, "-q", "-W", "error", "-k", "not another_python"]
    # Neither the settings of the project nor its fixtures, which need torch.
    command += ["--noconftest", "--config-file", os.devnull, "--rootdir", str(ROOT), "-p", "no:cacheprovider"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


def environment(version):
    """A virtual environment with ArviZ 1.x, made once for all test processes."""
    from filelock import FileLock

    folder, constraints = ROOT / ".venv" / f"arviz-{version}", ROOT / "constraints.txt"
    pins = [line for line in constraints.read_text().splitlines() if line.startswith(PINNED)]
    stamp, wanted = folder / "installed", "\n".join([*PACKAGES, *pins])
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    base = interpreter(version)
    if base is None:
        pytest.skip(f"no Python {version} with the venv module on this machine")
    folder.parent.mkdir(exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not stamp.exists() or stamp.read_text() != wanted:
            # Without a pip of its own, and with only what is imported compiled: half of the time.
            pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check"]
            install = [*pip, "install", "--quiet", "--no-compile", "-c", constraints, *PACKAGES]
            for command in ([base, "-m", "venv", "--clear", "--without-pip", folder], install):
                done = subprocess.run(command, capture_output=True, text=True, timeout=600)
                if done.returncode != 0:
                    pytest.skip(f"ArviZ 1.x cannot be installed for Python {version}: {done.stderr.strip()[-200:]}")
            stamp.write_text(wanted)
    return python


def interpreter(version):
    """An interpreter of that version that runs: some found by name are only pointers to what is not there."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    found = [shutil.which(f"python{version}"), *sorted(pyenv.glob(f"versions/{version}.*/bin/python"))]
    check = f"import sys, venv; assert sys.version.startswith('{version}.')"
    for path in filter(None, found):
        if subprocess.run([path, "-c", check], capture_output=True, timeout=60).returncode == 0:
            return path
    return None
