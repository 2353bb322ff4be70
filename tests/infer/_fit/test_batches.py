"""Data that come in batches: every form gives what tensors give, and every row of an epoch counts the same."""

import warnings
from typing import NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from masked_mean import N
from pyro.infer.autoguide import AutoDelta
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.profiler import profile
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    get_worker_info,
)
from torch.utils.data.distributed import DistributedSampler

from pyro_vnd._data import batches_of, check_rows
from pyro_vnd.infer import OptimizerSettings, Validation, cosine_to_zero, fit
from pyro_vnd.infer._fit.parallel import Ranks
from pyro_vnd.infer._fit.sources import as_source

B = 12  # batches of 12, 12, 12 and 4 rows


def regression(x, y):
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)


class Rows(Dataset):
    """Rows by number, which go to workers of every kind, as pickles to some."""

    def __init__(self, x, y, transform=torch.as_tensor):
        self.x, self.y, self.transform = x, y, transform

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.transform(self.x[i]), self.y[i]


class NamedRows(Rows):
    def __getitem__(self, i):
        return {"y": self.y[i], "x": self.x[i]}


class RowsTogether(Rows):
    """Rows of numpy that are read together, as from a file."""

    def __getitems__(self, rows):
        return [*zip(self.x.numpy()[rows], self.y.numpy()[rows], strict=True)]


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


class PairRows(Rows):
    def __getitem__(self, i):
        return Pair(self.x[i], self.y[i])


class Stream(IterableDataset):
    """Rows in order, in any number of processes; told so, each reads all of them."""

    def __init__(self, x, y, careless=False):
        self.x, self.y, self.careless = x, y, careless

    def __iter__(self):
        worker = get_worker_info()
        first, step = (0, 1) if worker is None or self.careless else (worker.id, worker.num_workers)
        yield from zip(self.x[first::step], self.y[first::step], strict=True)


class Again:
    """What begins anew each time that it is iterated."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


def stacked(rows):
    return tuple(torch.stack(parts) for parts in zip(*rows, strict=True))


def split(data):
    return [*zip(*(part.split(B) for part in data), strict=True)]


def by_name(batches):
    return [dict(zip("xy", batch, strict=True)) for batch in batches]


IN_ORDER = {
    "list of named tuples": lambda data: ([Pair(*batch) for batch in split(data)], {}),
    "list of mappings": lambda data: (by_name(split(data)), {}),
    "iterable": lambda data: (Again(split(data)), {"num_data": N}),
    "loader": lambda data: (DataLoader(TensorDataset(*data), B), {}),
    "mappings": lambda data: (DataLoader(NamedRows(*data), B), {}),
    "named tuples": lambda data: (DataLoader(PairRows(*data), B), {}),
    "collate": lambda data: (DataLoader(Rows(*data), B, collate_fn=stacked), {}),
    "rows together": lambda data: (DataLoader(RowsTogether(*data), B), {}),
    "sampler": lambda data: (DataLoader(Rows(*data), B, sampler=range(N)), {}),
    "batch sampler": lambda data: (
        DataLoader(Rows(*data), batch_sampler=BatchSampler(SequentialSampler(range(N)), B, drop_last=False)),
        {},
    ),
    "data set of batches": lambda data: (DataLoader(split(data), batch_size=None), {"num_data": N}),
    "stream": lambda data: (DataLoader(Stream(*data), B), {"num_data": N}),
    "stream without a loader": lambda data: (Stream(*data), {"num_data": N, "batch_size": B}),
    "workers": lambda data: (DataLoader(Rows(*data), B, num_workers=2, persistent_workers=True), {}),
}


class Recorded(torch.optim.SGD):
    """SGD that tells of its gradients."""

    seen: list = []  # noqa: RUF012 (emptied for each test)

    def step(self, closure=None):
        self.seen.append(torch.cat([p.grad.flatten() for group in self.param_groups for p in group["params"]]))
        return super().step(closure)


class Still(Recorded):
    """The same, where parameters stay what they are."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, 0.0)


@pytest.fixture
def rows():
    torch.manual_seed(4)
    x = torch.randn(N, 3)
    return x, x.sum(-1) + torch.randn(N)


def train(data, **arguments):
    """Fit the point estimate; return it, the ELBO by epoch, and the gradient of each step."""
    Recorded.seen.clear()
    guide = AutoDelta(regression)
    how = {"num_epochs": 3, "lr": 0.001, "optimizer": Recorded, "progress": False} | arguments
    result = fit(regression, guide, data, **how)
    return guide.median()["w"].detach(), result.elbo, torch.stack(Recorded.seen)


@pytest.mark.parametrize("form", IN_ORDER.values(), ids=IN_ORDER)
def test_forms_in_the_same_order_give_the_same(form, rows):
    data, more = form(rows)
    w, elbo, gradients = train(data, **more)
    expected, elbo_of_list, gradients_of_list = train(split(rows))
    assert len(gradients) == 3 * 4
    assert torch.equal(gradients, gradients_of_list)
    assert torch.equal(w, expected)
    assert elbo == elbo_of_list


def test_one_batch_of_all_rows_is_what_tensors_are(rows):
    for data in ([rows], DataLoader(TensorDataset(*rows), N), TensorDataset(*rows)):
        w, elbo, gradients = train(data)
        expected, elbo_of_tensors, gradients_of_tensors = train(rows)
        assert torch.equal(w, expected)
        assert torch.equal(gradients, gradients_of_tensors)
        assert elbo == elbo_of_tensors


SHUFFLED = {
    "tensors": lambda data: (data, {"batch_size": B}),
    "data set of tensors": lambda data: (TensorDataset(*data), {"batch_size": B}),
    "data set": lambda data: (NamedRows(*data), {"batch_size": B}),
    "loader": lambda data: (DataLoader(Rows(*data), B, shuffle=True), {}),
    "generator": lambda data: (DataLoader(Rows(*data), B, shuffle=True, generator=torch.Generator()), {}),
    "workers": lambda data: (DataLoader(Rows(*data), B, shuffle=True, num_workers=2), {}),
    "sampler": lambda data: (DataLoader(Rows(*data), B, sampler=SubsetRandomSampler(range(N))), {}),
}


@pytest.mark.parametrize("accumulate", [1, 2, 4])
@pytest.mark.parametrize("form", SHUFFLED.values(), ids=SHUFFLED)
def test_every_row_of_an_epoch_counts_the_same(form, accumulate, rows):
    """The last batch has four rows; were it to count as much as the others, gradients would be other ones."""
    data, more = form(rows)
    _, _, gradients = train(data, num_epochs=1, optimizer=OptimizerSettings(Still, accumulate=accumulate), **more)
    _, _, (whole,) = train(rows, num_epochs=1, optimizer=Still)
    assert len(gradients) == 4 // accumulate
    assert gradients.sum(0) * B * accumulate == pytest.approx(whole * N, rel=1e-10)


@pytest.mark.parametrize("form", [form for name, form in SHUFFLED.items() if name != "workers"])
def test_shuffled_forms_end_at_the_same_estimate(form, rows):
    data, more = form(rows)
    x, y = rows
    exact = torch.linalg.solve(x.T @ x + torch.eye(3), x.T @ y)
    optimizer = OptimizerSettings(Recorded, lr_schedule=cosine_to_zero())
    w, _, gradients = train(data, num_epochs=60, lr=0.005, optimizer=optimizer, **more)
    assert w == pytest.approx(exact, abs=0.02)
    assert not torch.equal(gradients[:4], gradients[4:8])


def test_a_sampler_says_how_many_rows_there_are(rows):
    """Likelihoods are scaled to what it draws from."""
    few = range(30)
    _, _, (gradient,) = train(
        DataLoader(Rows(*rows), 30, sampler=SubsetRandomSampler(few)), num_epochs=1, optimizer=Still
    )
    _, _, (expected,) = train(tuple(part[:30] for part in rows), num_epochs=1, optimizer=Still)
    assert gradient == pytest.approx(expected, rel=1e-10)


KNOWN = {
    "drop_last": (lambda data: DataLoader(Rows(*data), B, drop_last=True), N),
    "some at random": (lambda data: DataLoader(Rows(*data), B, sampler=RandomSampler(range(N), num_samples=20)), N),
    "batch sampler": (
        lambda data: DataLoader(Rows(*data), batch_sampler=BatchSampler(SubsetRandomSampler(range(9)), 3, False)),
        9,
    ),
    "weighted": (lambda data: DataLoader(Rows(*data), B, sampler=WeightedRandomSampler(torch.ones(N), 24)), 24),
    "distributed": (lambda data: DataLoader(Rows(*data), B, sampler=DistributedSampler(Rows(*data), 1, 0)), N),
    "list": (split, N),
}


@pytest.mark.parametrize(("make", "count"), KNOWN.values(), ids=KNOWN)
def test_what_is_known_of_the_number_of_rows(make, count, rows):
    source = as_source(make(rows), None, None, Ranks(), None)
    assert source.num_data == count
    assert source.num_batches == len(make(rows))


def test_what_shuffles_by_epoch_is_told_which_it_is(rows):
    class Epochs(DistributedSampler):
        def set_epoch(self, epoch):
            epochs.append(epoch)
            super().set_epoch(epoch)

    epochs = []
    train(DataLoader(Rows(*rows), B, sampler=Epochs(Rows(*rows), 1, 0)), num_epochs=3)
    assert list(dict.fromkeys(epochs)) == [0, 1, 2]


@pytest.mark.parametrize(("num_rows", "sizes"), [(None, [12, 12, 12, 4]), (20, [12, 12]), (24, [12, 12]), (1, [12])])
def test_the_first_batches_have_so_many_rows(num_rows, sizes, rows):
    source = as_source(split(rows), None, None, Ranks(), None)
    found = [*source.in_order(num_rows)]
    assert [len(x) for x, _ in found] == sizes
    assert all(torch.equal(x, batch[0]) for (x, _), batch in zip(found, split(rows), strict=False))


def test_an_epoch_without_batches_is_refused(rows):
    class Vanishing(Again):
        def __iter__(self):
            self.batches, batches = [], self.batches
            return iter(batches)

    with pytest.raises(ValueError, match="fit: argument `data` must have batches in every epoch; got none: is it an"):
        train(Vanishing(split(rows)), num_data=N)


def test_batches_may_be_a_part_of_all_data(rows):
    _, _, gradients = train(split(rows), num_epochs=1, num_data=2 * N, optimizer=Still)
    _, _, (whole,) = train(tuple(torch.cat([part, part]) for part in rows), num_epochs=1, optimizer=Still)
    assert gradients.sum(0) * B == pytest.approx(whole * N, rel=1e-10)  # as of half an epoch of twice the rows


def test_drop_last_leaves_out_the_last_batch(rows):
    _, _, gradients = train(DataLoader(Rows(*rows), B, drop_last=True), num_epochs=1, optimizer=Still)
    _, _, expected = train(split(rows), num_epochs=1, optimizer=Still)
    assert torch.equal(gradients, expected[:3])


def test_a_transform_is_the_users(rows):
    """Each epoch sees other values of the same rows."""
    shifts = []

    def shift(x):
        shifts.append(torch.rand(()).item())
        return x + shifts[-1]

    _, _, gradients = train(DataLoader(Rows(*rows, shift), N), optimizer=Still)
    assert not torch.equal(gradients[0], gradients[1])
    assert len(set(shifts)) == len(shifts) == 4 * N  # one batch to begin with
    again = len(shifts)
    _, _, same = train(DataLoader(Rows(*rows, shift), N), optimizer=Still)
    assert torch.equal(gradients, same)  # drawn under the seed of the fit
    assert shifts[:again] == shifts[again:]


def test_a_generator_is_for_one_epoch(rows):
    w, elbo, _ = train((batch for batch in split(rows)), num_epochs=1, num_data=N)
    expected, elbo_of_list, _ = train(split(rows), num_epochs=1)
    assert torch.equal(w, expected)
    assert elbo == elbo_of_list
    with pytest.raises(ValueError, match=r"`data` is an iterator that has ended, .* give a DataLoader, a list, or"):
        train((batch for batch in split(rows)), num_data=N)


def test_workers_that_all_read_everything_are_found(rows):
    loader = DataLoader(Stream(*rows, careless=True), B, num_workers=2)
    with pytest.warns(UserWarning, match=r"has 48 rows so far, but argument `num_data` is 40, .*get_worker_info"):
        train(loader, num_data=N, num_epochs=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(DataLoader(Stream(*rows), B, num_workers=2), num_data=N, num_epochs=1)


def test_validation_takes_all_forms(rows):
    expected = None
    for make, _ in [(lambda rows: rows, 0), *KNOWN.values()][::5]:
        guide, held_out = AutoDelta(regression), make(rows)
        how = {"num_epochs": 2, "lr": 0.01, "progress": False}
        found = fit(regression, guide, rows, validation=held_out, **how).validation_log_likelihood
        expected = found if expected is None else expected
        assert found == pytest.approx(expected, rel=1e-12)
    held_out = Validation(DataLoader(NamedRows(*rows), 7))
    assert fit(
        regression, AutoDelta(regression), by_name(split(rows)), callbacks=[held_out], **how
    ).validation_log_likelihood == pytest.approx(
        fit(regression, AutoDelta(regression), split(rows), validation=rows, **how).validation_log_likelihood
    )


X = torch.ones(N, 3)
Y = torch.ones(N)
BAD = {
    "a string": ("data.csv", {}, r"`data` must be a tensor, .*; got str$"),
    "strings": ([("a", "b")], {}, r"`data\[0\]` must be a tensor with rows; got str"),
    "numpy": (
        Again([(np.ones(3),)]),
        {"num_data": 3},
        r"`data\[0\]` must be .*; got ndarray: give tensors, torch.as_tensor",
    ),
    "a number": (3, {}, "`data` must be a tensor, .*; got int$"),
    "nothing": (DataLoader([], 3), {}, "`data` must have at least one batch; got none"),
    "an empty batch": ([(X[:0], Y[:0])], {}, r"`data` must be .* at least 1; got \[\(0, 3\), \(0,\)\]"),
    "ragged": ([(X, Y), (X[:3], Y)], {}, r"`data\[1\]` must be tensors with the same number .*\(3, 3\), \(40,\)\]"),
    "no number": (Again([(X, Y)]), {}, "`num_data` must say how many rows there are .*; got None with Again"),
    "a stream": (Stream(X, Y), {"batch_size": 3}, "`num_data` must say how many rows there are"),
    "batches": (DataLoader([(X, Y)] * 3, batch_size=None), {}, "`num_data` must say how many rows there are"),
    "no integer": (Again([(X, Y)]), {"num_data": 40.5}, "`num_data` must be an integer at least 1; got 40.5"),
    "zero": (Again([(X, Y)]), {"num_data": 0}, "`num_data` must be an integer at least 1; got 0"),
    "too few": (
        [(X, Y)],
        {"num_data": 30},
        "`num_data` is 30, but `data` has 40 rows: it is how many there are in all",
    ),
    "of a loader": (DataLoader(Rows(X, Y), 3), {"num_data": 14}, "`num_data` is 14, but `data` has 40 rows"),
    "of tensors": ((X, Y), {"num_data": 41}, "`num_data` is for data in batches; these are tensors with 40 rows"),
    "size": (DataLoader(Rows(X, Y), 3), {"batch_size": 3}, "`batch_size` is for data that do not come in batches"),
    "no size": (Rows(X, Y), {}, "`batch_size` must be given where `data` is a Dataset of rows; got None"),
}


@pytest.mark.parametrize(("data", "more", "message"), BAD.values(), ids=BAD)
def test_what_is_no_data_is_said(data, more, message):
    with pytest.raises(ValueError, match=f"^fit: argument {message}"):
        fit(regression, AutoDelta(regression), data, progress=False, **more)


def test_nan_in_a_later_batch_is_said_of_the_data(rows):
    rows[0][30, 1] = torch.nan
    for data in (DataLoader(Rows(*rows), B), Again(split(rows))):
        with pytest.raises(ValueError, match=r"^fit: argument `data\[0\]` of shape \(12, 3\) must be finite") as found:
            train(data, num_data=N)
        assert found.value.__notes__ == ["fit: in batch 2 of an epoch, counted from 0"]


class Normalised(PyroModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1))

    def forward(self, x, y):
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        loc = self.net(x).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(loc, scale), obs=y)


def test_a_last_batch_of_one_row_is_said_where_a_norm_wants_more(rows):
    model = Normalised()
    with pytest.raises(ValueError, match="Expected more than 1 value per channel") as found:
        fit(model, AutoDelta(model), DataLoader(TensorDataset(*rows), 13), num_epochs=1, progress=False)
    assert any("a batch of 1 row: BatchNorm" in note and "drop_last=True" in note for note in found.value.__notes__)


def test_a_mapped_file_is_looked_at_in_parts(tmp_path):
    """Neither a look at all numbers nor a batch copies more than a little of it."""
    whole = np.memmap(tmp_path / "x.bin", np.float32, "w+", shape=(2**16, 256))  # 64 MB
    x = torch.from_numpy(whole)
    with profile(profile_memory=True) as measured:
        check_rows("fit", (x,))
        source = as_source((x,), 32, None, Ranks(), None)
        (batch,) = next(source.epoch(0))
    assert batch.shape == (32, 256)
    largest = max(event.self_cpu_memory_usage for event in measured.events())
    assert 0 < largest <= 8 * 2**16  # the order of the rows
    whole[-1, -1] = np.inf
    with pytest.raises(ValueError, match="must be finite"):
        check_rows("fit", x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_sums_that_are_too_large_are_no_mistake(dtype):
    most = torch.finfo(dtype).max
    check_rows("fit", torch.full((5, 2), most, dtype=dtype))
    mask = torch.tensor([[0.0, -torch.inf]], dtype=dtype).expand(5, 2)
    check_rows("fit", mask)
    for bad in (torch.inf, torch.nan):
        x = torch.full((5, 2), most, dtype=dtype)
        x[3, 1] = bad
        with pytest.raises(ValueError, match="must be finite"):
            check_rows("fit", x)


def test_a_data_set_with_a_transform_keeps_it(rows):
    class Doubled(TensorDataset):
        def __getitem__(self, index):
            x, y = super().__getitem__(index)
            return 2 * x, y

    data = Doubled(*rows)
    for (x, _), *_ in (as_source(data, N, None, Ranks(), None).in_order(), batches_of(data, N)):
        torch.testing.assert_close(x.sum(0), 2 * rows[0].sum(0))


def test_batches_of_ones_own_must_say_how_many_rows_there_are(rows):
    class Few:
        def __iter__(self):
            return iter([[0, 1, 2, 3], [4, 5, 6, 7]])

        def __len__(self):
            return 2

    loader = DataLoader(TensorDataset(*rows), batch_sampler=Few())
    with pytest.raises(ValueError, match="argument `num_data` must say how many rows there are in all"):
        fit(regression, AutoDelta(regression), loader, num_epochs=1, progress=False)
    fit(regression, AutoDelta(regression), loader, num_data=8, num_epochs=1, progress=False)
    subset = DataLoader(TensorDataset(*rows), 4, sampler=torch.utils.data.RandomSampler(range(8)))
    fit(regression, AutoDelta(regression), subset, num_data=8, num_epochs=1, progress=False)


def test_the_order_of_uneven_batches_does_not_set_the_step(rows):
    """In plain gradient steps, each row counts by its share of the largest batch."""

    def end(*sizes):
        guide = AutoDelta(regression)
        batches = [tuple(part) for part in zip(*(x.split(sizes) for x in rows), strict=True)]
        settings = OptimizerSettings(torch.optim.SGD, accumulate=2)
        fit(regression, guide, batches, num_epochs=1, lr=1e-4, optimizer=settings, progress=False)
        return guide.median()["w"]

    torch.testing.assert_close(end(30, 10), end(10, 30))
