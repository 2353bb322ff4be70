"""Laws by row in mini-batches: refused where they would be by position, right where rows are numbered."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import TraceEnum_ELBO, TraceMeanField_ELBO, config_enumerate
from pyro.infer.autoguide import AutoDelta, AutoDiagonalNormal, AutoNormal

from pyro_vnd.distributions import NestedNormal, OrderedMask
from pyro_vnd.infer import AutoNested, OptimizerSettings, cosine_to_zero, fit

N = 40
Y = torch.tensor([1.0, 4.0], dtype=torch.float64).repeat(N // 2)
QUICK = {"num_epochs": 2, "batch_size": 10, "progress": False}


def by_row(y):
    with pyro.plate("data", len(y)):
        mask = pyro.sample("mask", OrderedMask.uniform(4))
        pyro.sample("y", dist.Normal(mask.sum(-1), 0.3), obs=y)


def codes_by_row(y):
    with pyro.plate("data", len(y)):
        code = pyro.sample("code", NestedNormal(torch.zeros(2), torch.ones(2), torch.zeros(2)))
        pyro.sample("y", dist.Normal(code.sum(-1), 0.3), obs=y)


def number_by_row(y):
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 0.3), obs=y)


def numbered(i):
    with pyro.plate("data", N, subsample=i, dim=-1):
        mask = pyro.sample("mask", OrderedMask.uniform(4))
        pyro.sample("y", dist.Normal(mask.sum(-1), 0.3), obs=Y[i])


def numbered_number(i):
    with pyro.plate("data", N, subsample=i, dim=-1):
        pyro.sample("y", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 0.3), obs=Y[i])


@pytest.mark.parametrize(
    ("model", "guide"),
    [
        (by_row, AutoNested),
        (codes_by_row, AutoNested),
        (codes_by_row, lambda model: AutoNested(model, shared_plates=["data"])),
        (number_by_row, AutoNormal),
        (number_by_row, AutoDelta),
        (number_by_row, AutoDiagonalNormal),
    ],
)
def test_laws_by_position_are_refused(model, guide):
    with pytest.raises(ValueError, match=r"has a law for each row of plate 'data' at \['\w+'\].*shared_plates="):
        fit(model, guide(model), Y, **QUICK)
    fit(model, guide(model), Y, num_epochs=1, progress=False)


def test_a_law_that_rows_share_is_not():
    assert len(fit(by_row, AutoNested(by_row, shared_plates=["data"]), Y, **QUICK).elbo) == 2


@pytest.mark.parametrize(("model", "guide"), [(by_row, AutoNested), (number_by_row, AutoNormal)])
def test_rows_that_were_held_back_have_no_laws(model, guide):
    with pytest.raises(ValueError, match=r"`validation` is for guides that know .* a law for each row of the data at"):
        fit(model, guide(model), Y, validation=Y, num_epochs=1, progress=False)
    fit(numbered, AutoNested(numbered), torch.arange(N), validation=torch.arange(4), **QUICK)


@pytest.mark.parametrize("elbo", [None, TraceMeanField_ELBO()])
@pytest.mark.parametrize("create_plates", [None, lambda i: pyro.plate("data", N, subsample=i, dim=-1)])
def test_laws_of_numbered_rows_are_about_these_rows(create_plates, elbo):
    guide = AutoNested(numbered, create_plates=create_plates)
    fit(numbered, guide, torch.arange(N), num_epochs=150, batch_size=10, lr=0.1, elbo=elbo, progress=False)
    assert (guide.laws["mask"].mean_length - Y).abs().max() < 0.3


@pytest.mark.filterwarnings("ignore:the law of lengths at site 'mask' has collapsed")  # each row knows its own
def test_whole_data_first_and_then_batches():
    model, elbo = config_enumerate(numbered), TraceEnum_ELBO(max_plate_nesting=1)
    guide = AutoNested(model)
    order = torch.randperm(N)
    fit(model, guide, order, num_epochs=20, lr=0.1, elbo=elbo, progress=False)
    fit(model, guide, order, num_epochs=60, batch_size=10, lr=0.2, elbo=elbo, progress=False)
    assert (guide.laws["mask"].mean_length - Y).abs().max() < 0.1
    assert guide(torch.tensor([3, 5, 8]))["mask"].shape == (3, 4)


def test_numbers_beside_them_are_about_these_rows_too():
    def model(i):
        with pyro.plate("data", N, subsample=i, dim=-1):
            pyro.sample("mask", OrderedMask.uniform(4))
            pyro.sample("y", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 0.3), obs=Y[i])

    guide = AutoNested(model, latents="mean_field")
    how = {
        "num_epochs": 200,
        "batch_size": 10,
        "lr": 0.05,
        "optimizer": OptimizerSettings(lr_schedule=cosine_to_zero()),
        "progress": False,
    }
    fit(model, guide, torch.arange(N), **how)
    assert (guide[1].locs.z - Y / 1.09).abs().max() < 0.15


def test_a_guide_that_draws_rows_of_its_own_is_refused():
    with pytest.raises(ValueError, match="the model says which rows are in plate 'data', by `subsample=`, but the gui"):
        fit(numbered_number, AutoNormal(numbered_number), torch.arange(N), **QUICK)
    guide = AutoNormal(numbered_number, create_plates=lambda i: pyro.plate("data", N, subsample=i, dim=-1))
    assert len(fit(numbered_number, guide, torch.arange(N), **QUICK).elbo) == 2
