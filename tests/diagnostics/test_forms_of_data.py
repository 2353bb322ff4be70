"""Functions that run a model over data take them in every form of `fit`, a batch at a time, or say that they do not."""

import weakref
from copy import deepcopy

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from pyro_vnd.autoencoders import OrderedVAE, fit_prior
from pyro_vnd.diagnostics import (
    evaluate,
    evaluate_cascade,
    evaluate_learned,
    evaluate_lengths,
    evaluate_prefixes,
    evaluate_widths,
    generative_metrics,
    khat_by_row,
    length_posterior,
    loo_widths,
    sbc,
    to_arviz,
)
from pyro_vnd.diagnostics.metrics.generative import nearest_distances
from pyro_vnd.infer import distil_lengths
from pyro_vnd.nn import CascadeNet, nest, recalibrate_batchnorm, widths_for

N, B = 50, 6  # nine batches, of which the last has two rows


class Again:
    """Batches that are made when they are asked for; how many of them were alive at once is counted."""

    def __init__(self, tensors):
        self.tensors, self.alive, self.most = tensors, weakref.WeakSet(), 0

    def __iter__(self):
        for parts in zip(*(part.split(B) for part in self.tensors), strict=True):
            batch = tuple(part.clone() for part in parts)
            self.alive.add(batch[0])
            self.most = max(self.most, len(self.alive))
            yield batch
            del batch


class Stream(IterableDataset):
    def __init__(self, tensors):
        self.tensors = tensors

    def __iter__(self):
        yield from zip(*self.tensors, strict=True)


def mappings(data):
    for x, y in zip(data[0].split(B), data[1].split(B), strict=True):
        yield {"y": y, "x": x}


FORMS = {
    "mapping": lambda data: {"y": data[1], "x": data[0]},
    "data set": lambda data: TensorDataset(*data),
    "stream": Stream,
    "loader": lambda data: DataLoader(TensorDataset(*data), B),
    "list": lambda data: list(mappings(data)),
    "again": Again,
}


@pytest.fixture
def data():
    return torch.rand(N, 6), torch.arange(N) % 3


@pytest.fixture
def net(data):
    layers = (nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    return nest(nn.Sequential(*layers), data[0][:2], num_blocks=4)


@pytest.fixture
def vae():
    return OrderedVAE((6,), num_latents=4, prior_latents="autoregressive", posterior_lengths="priced")


def means(x, y):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x.mean(-1))


def guide(x, y):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x.mean(-1) / 2 + 3.0 * (x[:, 0] > 0.9), 0.5**0.5))  # a few rows are off


def quiet(function, *args, **kwargs):
    return function(*args, progress=False, **kwargs)


class Pixels(nn.Identity):
    num_features = 6

    def forward(self, x):
        return x + 0


def recalibrated(data, net, vae):
    plain = nn.Sequential(nn.BatchNorm1d(6))
    recalibrate_batchnorm(plain, data, batch_size=B)
    return torch.cat([plain[0].running_mean, plain[0].running_var])


def prior_of(data, net, vae):
    return torch.tensor(fit_prior(deepcopy(vae), data, num_epochs=2, batch_size=25, progress=False).elbo)


# Those with the same draws for the same batches give the same for each form.
SAME = {
    "evaluate": lambda data, net, vae: quiet(evaluate, net.eval(), data, batch_size=B),
    "evaluate_widths": lambda data, net, vae: quiet(
        evaluate_widths, net, data, [0.5, 1.0], 2, {"far": data}, calibrate=data, recalibrate=data, batch_size=B
    ),
    "evaluate_learned": lambda data, net, vae: quiet(evaluate_learned, net, data, 2, batch_size=B),
    "evaluate_cascade": lambda data, net, vae: quiet(
        evaluate_cascade, CascadeNet(net, [0.25, 1.0]), data, data, [0.5], batch_size=B
    ),
    "loo_widths": lambda data, net, vae: torch.from_numpy(
        quiet(loo_widths, net, data, [0.5], 30, batch_size=B)[0.5].elpd_i.values
    ),
    "widths_for": lambda data, net, vae: torch.tensor([*widths_for(net, 0.5, data=data, batch_size=B).values()]),
    "recalibrate_batchnorm": recalibrated,
    "evaluate_lengths": lambda data, net, vae: quiet(evaluate_lengths, vae, data, [2], batch_size=B),
    "fit_prior": prior_of,
    "generative_metrics": lambda data, net, vae: torch.tensor(
        [*generative_metrics(data, data, Pixels(), batch_size=B).values()]
    ),
    "nearest_distances": lambda data, net, vae: nearest_distances(torch.zeros(3, 6), data, batch_size=B),
    "khat_by_row": lambda data, net, vae: khat_by_row(means, guide, data, num_samples=200, batch_size=B) > 0.7,
    "evaluate_prefixes": lambda data, net, vae: quiet(
        evaluate_prefixes, vae, data, [2], num_importance=0, num_samples=2, train=data, batch_size=B
    ).drop_vars("probe_accuracy"),
}


@pytest.mark.filterwarnings("ignore:Estimated shape parameter")
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("function", SAME.values(), ids=SAME)
def test_each_form_gives_what_tensors_give(function, form, data, net, vae):
    expected, given = function(data, net, vae), form(data)
    found = function(given, net, vae)
    if isinstance(expected, xr.Dataset):
        xr.testing.assert_allclose(found, expected)
    else:
        assert np.asarray(found) == pytest.approx(np.asarray(expected), rel=1e-9)
    if isinstance(given, Again) and function is not SAME["evaluate_prefixes"]:
        assert given.most <= 4  # that which is made, that which is in use, and the like of another loop


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_lengths_are_distilled_from_each_form(form, vae):
    data = torch.rand(100, 6), torch.arange(100)
    given = form(data) if form is not FORMS["mapping"] else {"x": data[0]}

    class OfPairs(OrderedVAE):
        def value_inputs(self, x, y=None):
            return super().value_inputs(x)

        def value_curve(self, x, y=None, lengths=(), **how):
            return super().value_curve(x, lengths, **how)

    model = OfPairs((6,), num_latents=4, posterior_lengths="priced")
    how = {"num_steps": 10, "batch_size": 16, "progress": False}
    report = distil_lengths(model, given, **how)
    assert (report.num_rows, report.num_held_out) == (90, 10)
    report = distil_lengths(model, form(data) if form is not FORMS["mapping"] else given, num_rows_used=50, **how)
    assert (report.num_rows, report.num_held_out) == (45, 5)
    assert model.encode(data[0], mean_length=2.0).batch_shape == (100,)
    if isinstance(given, Again):
        assert given.most <= 4
    with pytest.raises(ValueError, match=r"`data` and `num_rows_used` must have 20 rows at least; got 6 and 20000"):
        distil_lengths(model, iter([(torch.rand(6, 6),)]), **how)


GENERATORS = {
    "evaluate_widths": lambda net, once, data: evaluate_widths(net, once, [0.5]),
    "ood": lambda net, once, data: evaluate_widths(net, data, [0.5], ood={"far": once}),
    "recalibrate": lambda net, once, data: evaluate_widths(net, data, [0.5], recalibrate=once),
    "loo_widths": lambda net, once, data: loo_widths(net, once, [0.5]),
    "widths_for": lambda net, once, data: widths_for(net, 0.5, data=once),
    "evaluate_cascade": lambda net, once, data: evaluate_cascade(CascadeNet(net, [0.5, 1.0]), data, once, [0.6]),
}


@pytest.mark.parametrize("function", GENERATORS.values(), ids=GENERATORS)
def test_what_reads_data_again_refuses_a_generator(function, data, net):
    with pytest.raises(ValueError, match=r"is read more than once, and a generator ends: give tensors, a Dataset"):
        function(net, mappings(data), data)


def test_one_pass_takes_a_generator(data, net):
    found, expected = (quiet(evaluate_learned, net, rows, 2, batch_size=B) for rows in (mappings(data), data))
    xr.testing.assert_allclose(found, expected)


def summed_out(x, y):
    raise AssertionError("called")


WHOLE = {
    "length_posterior": lambda data: length_posterior(summed_out, summed_out, data),
    "sbc": lambda data: sbc(summed_out, summed_out, data, observed="y"),
    "to_arviz": lambda data: to_arviz(summed_out, summed_out, data),
}


@pytest.mark.parametrize("form", [FORMS["data set"], FORMS["loader"], FORMS["stream"], mappings])
@pytest.mark.parametrize("function", WHOLE.values(), ids=WHOLE)
def test_what_needs_all_rows_at_once_says_so(function, form, data):
    with pytest.raises(ValueError, match=r"^\w+: argument `data` must be tensors, all rows at once, .*; got [A-Za-z]+"):
        function(form(data))
