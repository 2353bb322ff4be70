"""The three forms of data are one to a fit, and each is named in errors as it was given."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from masked_mean import N, make_net
from torch import nn

from models import datasets
from pyro_vnd.distributions import OrderedMask
from pyro_vnd.infer import AutoNested, MaskSchedule, fit
from pyro_vnd.infer._fit.parallel import Ranks
from pyro_vnd.infer._fit.sources import as_source
from pyro_vnd.nn import NestedClassifier, nest


def regression(x, y):
    mask = pyro.sample("mask", OrderedMask.uniform(3))
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ (mask * w), 1.0), obs=y)


@pytest.fixture
def rows():
    x = torch.randn(N, 3)
    return x, x.sum(-1) + torch.randn(N)


def by_name(data):
    return {"y": data[1], "x": data[0]}  # in another order than that of the arguments


@pytest.mark.parametrize("form", [list, by_name], ids=["list", "mapping"])
@pytest.mark.parametrize("batch_size", [None, 16])
def test_the_form_of_the_data_changes_nothing(form, batch_size, rows):
    results = []
    for data in (rows, form(rows)):
        guide = AutoNested(regression)
        arguments = {"num_epochs": 4, "batch_size": batch_size, "validation": data, "progress": False}
        result = fit(regression, guide, data, **arguments)
        results.append((result.elbo, result.validation_log_likelihood, guide.laws["mask"].logits.tolist()))
    assert results[0] == results[1]
    assert len(set(results[0][1])) == 4


def test_one_tensor_is_one_argument(y):
    def model(rows):
        mu = pyro.sample("mu", OrderedMask.uniform(3))
        with pyro.plate("data", len(rows)):
            pyro.sample("y", dist.Normal(mu.sum(-1), 1.0), obs=rows)

    forms = (y, (y,), {"rows": y})
    elbos = [fit(model, AutoNested(model), data, num_epochs=3, batch_size=8, progress=False).elbo for data in forms]
    assert elbos[0] == elbos[1] == elbos[2]


@pytest.mark.parametrize("schedule", [None, MaskSchedule(), MaskSchedule(sliced=True)], ids=["none", "rows", "sliced"])
def test_a_net_takes_names_where_its_guide_takes_inputs_by_place(schedule, labelled):
    """Widths are drawn for the rows of a mapping, too."""

    class ByName(NestedClassifier):
        def forward(self, images, labels=None):
            return super().forward(images, labels)

    elbos = []
    for names in (None, ("images", "labels")):
        net = make_net()
        data = labelled if names is None else dict(zip(names, labelled, strict=True))
        model = NestedClassifier(net) if names is None else ByName(net)
        guide = net.guide if names is None else (guide_of_images := GuideOfImages(net.guide))
        elbos.append(fit(model, guide, data, num_epochs=3, batch_size=10, schedule=schedule, progress=False).elbo)
    assert guide_of_images.calls == 1 + 3 * 4
    assert elbos[0] == elbos[1]


class GuideOfImages(nn.Module):
    def __init__(self, guide):
        super().__init__()
        self.guide, self.calls = guide, 0

    def forward(self, images, labels=None):
        self.calls += 1
        return self.guide(images)


def test_a_split_of_the_data_sets_is_data():
    train = datasets.load("digits", flatten=True).train
    small = type(train)(train.images[:64].double(), train.labels[:64])
    net = nest(nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10)), small.images[:1])
    result = fit(NestedClassifier(net), net.guide, small, num_epochs=2, batch_size=32, validation=small, progress=False)
    assert len(result.elbo) == len(result.validation_log_likelihood) == 2


@pytest.mark.parametrize("form", [tuple, by_name], ids=["tuple", "mapping"])
def test_batches_are_a_shuffled_partition(form, rows):
    data = form((torch.arange(N), torch.arange(N) + 100))
    source = as_source(data, 12, None, Ranks(), None)
    batches = [batch.values() if isinstance(batch, dict) else batch for batch in source.epoch(0)]
    assert [len(next(iter(batch))) for batch in batches] == [12, 12, 12, 4]
    first, second = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert (first - second).abs().unique().tolist() == [100]  # rows stay together
    assert len(first) == len(first.unique()) == N
    assert not torch.equal(first, first.sort().values)
    (whole,) = as_source(data, N, None, Ranks(), None).epoch(0)
    assert whole is data


@pytest.mark.parametrize(("num_rows", "sizes"), [(33, [16, 15, 2]), (34, [16, 16, 2]), (17, [15, 2]), (16, [16])])
def test_no_row_is_alone_in_its_batch(num_rows, sizes):
    """A batch norm has no statistics of one row."""
    x = torch.randn(num_rows, 4)
    net = nest(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)), x[:8], num_blocks=4)
    data = x, (x[:, 0] > 0).long()
    assert [len(rows) for rows, _ in as_source(data, 16, None, Ranks(), None).epoch(0)] == sizes
    result = fit(NestedClassifier(net), net.guide, data, num_epochs=2, batch_size=16, progress=False)
    assert result.num_steps == 2 * len(sizes)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([torch.ones(3), torch.ones(4)], r"same number of rows, at least 1; got \[\(3,\), \(4,\)\]"),
        (torch.ones(0), "at least 1"),
        (torch.tensor([1.0, math.nan]), r"`data` of shape \(2,\) must be finite"),
        ([torch.tensor([1.0, math.nan])], r"`data\[0\]` of shape \(2,\) must be finite"),
        ({"y": torch.tensor([1.0, math.nan])}, r"`data\['y'\]` of shape \(2,\) must be finite"),
        ([1.0], r"`data\[0\]` must be a tensor"),
    ],
)
def test_bad_data(data, message):
    with pytest.raises(ValueError, match=f"fit: .*{message}"):
        fit(regression, AutoNested(regression), data, progress=False)


TWO = (torch.ones(N, 3), torch.ones(N))


@pytest.mark.parametrize(
    ("data", "validation", "message"),
    [
        (TWO[1], torch.ones(3, 2), r"must be like `data`, in batches of shapes \[\(40,\)\]; got \[\(3, 2\)\]"),
        (TWO[1], torch.tensor([math.nan]), r"`validation` of shape \(1,\) must be finite"),
        (TWO[1], [torch.tensor([math.nan])], r"`validation\[0\]` of shape \(1,\) must be finite"),
        (TWO, TWO[:1], r"of shapes \[\(40, 3\), \(40,\)\]; got \[\(40, 3\)\]"),
        (TWO, {"x": TWO[0], "y": TWO[1]}, r"got \{'x': \(40, 3\), 'y': \(40,\)\}"),
        ({"x": TWO[0]}, {"z": TWO[0]}, r"of shapes \{'x': \(40, 3\)\}; got \{'z': \(40, 3\)\}"),
    ],
)
def test_validation_data_are_like_the_data(data, validation, message):
    with pytest.raises(ValueError, match=f"fit: argument .*{message}"):
        fit(regression, AutoNested(regression), data, validation=validation, progress=False)
