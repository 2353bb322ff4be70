"""Draws that are written batch by batch: those of all rows together, in memory that does not grow with them."""

import json
import os
import resource
import subprocess
import sys
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from conjugate import Y, conjugate, posterior
from torch.utils.data import DataLoader, TensorDataset

from pyro_vnd.diagnostics import khat, loo, summary, to_arviz
from pyro_vnd.diagnostics.posterior._arviz import datasets, psis
from pyro_vnd.distributions import NestedNormal, OrderedMask

K, N = 4, 10


def model(y):
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.deterministic("twice", 2 * w)
    with pyro.plate("data", len(y)):
        mask = pyro.sample("mask", OrderedMask.geometric(0.5, K))
        pyro.sample("y", dist.Normal(mask.sum(-1) + w.sum(-1), 1.0), obs=y)


def guide(y):
    pyro.sample("w", dist.Normal(torch.ones(2), 0.1).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("mask", OrderedMask.geometric(0.7, K))


def subsampled(y):
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", 100 * N, subsample=torch.arange(len(y))):
        mask = pyro.sample("mask", OrderedMask.geometric(0.5, K))
        pyro.sample("y", dist.Normal(mask.sum(-1) + w.sum(-1), 1.0), obs=y)


@pytest.fixture
def y():
    return torch.randn(N)


def scores(draws, y):
    """Return log p, log q and the log-likelihood of each row, by the laws above."""
    w, mask = (torch.from_numpy(draws.posterior[name].values) for name in ("w", "mask"))
    rows = dist.Normal(mask.sum(-1) + w.sum(-1, keepdim=True), 1.0).log_prob(y)
    log_p = dist.Normal(0.0, 1.0).log_prob(w).sum(-1) + OrderedMask.geometric(0.5, K).log_prob(mask).sum(-1)
    log_q = dist.Normal(1.0, 0.1).log_prob(w).sum(-1) + OrderedMask.geometric(0.7, K).log_prob(mask).sum(-1)
    return log_p + rows.sum(-1), log_q, rows


FORMS = {
    "tensor": lambda y: y,
    "mapping": lambda y: {"y": y},
    "loader": lambda y: DataLoader(TensorDataset(y), 4),
    "data set": lambda y: TensorDataset(y),
    "list": lambda y: [(rows,) for rows in y.split(3)],
    "generator": lambda y: ({"y": rows} for rows in y.split(9)),
}


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_scores_are_those_of_all_rows(form, parallel, y, tmp_path):
    how = {"num_samples": 30, "batch_size": 4, "parallel": parallel}
    draws = to_arviz(model, [guide, guide], form(y), path=tmp_path / "draws.nc", **how)
    log_p, log_q, rows = scores(draws, y)
    stats = draws.sample_stats
    assert stats["log_p"].values == pytest.approx(log_p.numpy(), rel=1e-10)
    assert stats["log_q"].values == pytest.approx(log_q.numpy(), rel=1e-10)
    assert draws.log_likelihood["y"].values == pytest.approx(rows.numpy(), rel=1e-10)
    log_weights, khats = psis(stats["elbo"].values)
    assert stats["weight"].values == pytest.approx(np.exp(log_weights))
    assert stats["khat"].values == pytest.approx(khats)
    assert draws.observed_data["y"].values == pytest.approx(y.numpy())
    assert draws.posterior["twice"].values == pytest.approx(2 * draws.posterior["w"].values)
    assert os.listdir(tmp_path) == ["draws.nc"]


def test_the_file_has_what_memory_has(y, tmp_path):
    """Names, dimensions, sizes, coordinates, attributes and types of all groups."""
    how = {"num_samples": 5, "num_prior": 3, "coords": {"data": [f"row {i}" for i in range(N)], "w_dim_0": [3, 4]}}
    memory = to_arviz(model, guide, y, **how)
    file = to_arviz(model, guide, y, path=str(tmp_path / "draws.nc"), batch_size=4, **how)
    expected, found = datasets(memory), datasets(file)
    assert set(found) == set(expected)
    for group, data in expected.items():
        assert set(found[group].data_vars) == set(data.data_vars)
        assert found[group].attrs == data.attrs
        for name, variable in data.variables.items():
            other = found[group].variables[name]
            assert other.dims == variable.dims, name
            assert other.shape == variable.shape, name
            assert other.dtype.kind == variable.dtype.kind, name
            assert set(other.attrs) == set(variable.attrs) - ({"law"} if "data" in variable.dims else set()), name
        for name, coordinate in data.coords.items():
            assert found[group].coords[name].values.tolist() == coordinate.values.tolist()


def test_laws_are_those_that_memory_has(y, tmp_path):
    """The mean of what is drawn for a row, over many draws; and weights are drawn once for all rows."""
    draws = to_arviz(model, guide, y, num_samples=4000, parallel=True, path=tmp_path / "draws.nc", batch_size=4)
    predicted = draws.posterior_predictive["y"]
    mean = 2.0 + OrderedMask.geometric(0.7, K).mean.sum().item()
    assert predicted.values.mean((0, 1)) == pytest.approx(np.full(N, mean), abs=5 * 1.6 / 4000**0.5)
    shared = np.corrcoef(predicted.values[0].T)[0, 1:]
    w_variance, row_variance = 0.02, OrderedMask.geometric(0.7, K).sample((4000,)).sum(-1).var().item() + 1
    assert shared == pytest.approx(np.full(N - 1, w_variance / (w_variance + row_variance)), abs=5 / 4000**0.5)
    prior = draws.prior_predictive["y"].values[0]
    between = np.corrcoef(prior.T)[0, 1:]  # two numbers with variance 1 are shared, in other batches as well
    assert between == pytest.approx(np.full(N - 1, 2 / prior.var(0).mean()), abs=5 / 4000**0.5)


def test_a_plate_for_more_rows_scales_nothing(y, tmp_path):
    draws = to_arviz(subsampled, guide, y, num_samples=5, num_prior=0, path=tmp_path / "draws.nc", batch_size=4)
    log_p, _, _ = scores(draws, y)
    assert draws.sample_stats["log_p"].values == pytest.approx(log_p.numpy(), rel=1e-10)


@pytest.mark.filterwarnings("ignore:Estimated shape parameter")  # of five rows
def test_diagnostics_take_the_file(tmp_path):
    """A posterior that is exact has k-hat at most zero, and as many effective parameters as memory says."""
    how = {"num_samples": 400, "num_prior": 0, "predictive": False}
    whole = to_arviz(conjugate, posterior, Y, **how)
    exact = partial(posterior, Y)
    file = to_arviz(conjugate, lambda y: exact(), Y, path=tmp_path / "draws.nc", batch_size=2, **how)
    assert khat(file).values == pytest.approx(khat(whole).values, abs=0.3)
    assert float(loo(file).elpd) == pytest.approx(float(loo(whole).elpd), abs=0.1)
    assert list(summary(file).index) == list(summary(whole).index)


def test_what_is_returned_is_read_where_it_is_used(y, tmp_path):
    draws = to_arviz(model, guide, y, num_samples=5, path=tmp_path / "draws.nc", batch_size=4)
    for data in datasets(draws).values():
        assert all(not variable._in_memory for name, variable in data.variables.items() if name in data.data_vars)
    assert isinstance(xr.open_datatree(tmp_path / "draws.nc", engine="h5netcdf"), xr.DataTree)


def test_a_latent_of_each_row_may_be_nested(tmp_path):
    law = NestedNormal(torch.zeros(3), torch.ones(3), torch.zeros(3))

    def coded(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", law)
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)

    def its_guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", law)

    draws = to_arviz(coded, its_guide, torch.zeros(7), num_samples=5, path=tmp_path / "draws.nc", batch_size=3)
    assert dict(draws.posterior.sizes) == {"chain": 1, "draw": 5, "data": 7, "z_unit": 3}
    assert (draws.posterior["z_length"].values == (draws.posterior["z"].values != 0).sum(-1)).all()


def loose(y):
    pyro.deterministic("mean", y.mean())
    model(y)


ERRORS = {
    "plate": (model, {"plate": "rows"}, r"`plate` must name the plate over the rows .*\['chain', 'data', 'draw'"),
    "outside": (loose, {}, r"'mean' in group 'posterior' has no dimension 'data' .* but differs from batch to batch"),
    "zarr": (model, {"path": "draws.zarr"}, "`path` must be a file of netCDF, 'draws.nc' say"),
    "folder": (model, {"path": "none/draws.nc"}, "in a folder that exists"),
    "constants": (model, {"constant_data": {"x": torch.ones(N)}}, "`constant_data` must be left out"),
    "few coords": (model, {"coords": {"data": range(7)}}, "`coords` must have a value of 'data' for each row; got 7"),
    "many coords": (
        model,
        {"coords": {"data": range(11)}},
        "`coords` must have a value of 'data' for each row; got 11",
    ),
    "unknown": (model, {"coords": {"none": range(7)}}, "`coords` names 'none'"),
}


@pytest.mark.parametrize(("program", "how", "message"), ERRORS.values(), ids=ERRORS)
def test_mistakes_are_said_and_leave_the_old_file(program, how, message, y, tmp_path):
    path = tmp_path / "draws.nc"
    path.write_bytes(b"old")
    how = {"num_samples": 3, "batch_size": 4, "path": path} | how
    if how["path"] != path:
        how["path"] = tmp_path / how["path"]
    with pytest.raises(ValueError, match=f"^to_arviz: .*{message}"):
        to_arviz(program, guide, y, **how)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["draws.nc"]


def test_data_without_batches_are_refused(tmp_path):
    with pytest.raises(ValueError, match="to_arviz: argument `data` must have batches; got none"):
        to_arviz(model, guide, [], num_samples=3, path=tmp_path / "draws.nc")
    assert os.listdir(tmp_path) == []


def test_batches_need_a_file(y):
    for data in (DataLoader(TensorDataset(y), 4), TensorDataset(y), iter([y])):
        with pytest.raises(
            ValueError, match=r"^to_arviz: argument `data` must be tensors, all rows at once, or `path`"
        ):
            to_arviz(model, guide, data)


def peak(path, batches):
    """Write draws of many rows, and return the largest resident memory in megabytes."""
    rows = (torch.randn(500) for _ in range(batches))
    to_arviz(model, guide, rows, num_samples=100, num_prior=0, parallel=True, path=path)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def test_memory_does_not_grow_with_the_rows(tmp_path):
    found = []
    for batches in (10, 100):  # 100 of them fill a file of 140 MB
        run = subprocess.run(
            [sys.executable, __file__, str(tmp_path / "draws.nc"), str(batches)],
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        found.append(json.loads(run.stdout))
    assert os.path.getsize(tmp_path / "draws.nc") > 100 * 2**20
    assert found[1] < 1.1 * found[0]


if __name__ == "__main__":
    print(json.dumps(peak(sys.argv[1], int(sys.argv[2]))))  # noqa: T201
