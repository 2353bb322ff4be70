"""A fit that was interrupted within an epoch goes on from its last checkpoint there, to the last bit."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from pyro_vnd.distributions import OrderedMask, OrderedMaskStraightThrough
from pyro_vnd.infer import Checkpoint, OptimizerSettings, fit

N, B = 40, 6  # seven batches, of which the last has four rows


class Interrupted(Exception):
    pass


class Regression(PyroModule):
    """A Bayesian last layer on a net with dropout; may stop at a call."""

    def __init__(self, stop_at=None):
        super().__init__()
        torch.manual_seed(5)
        self.net = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Dropout(0.2))
        self.calls, self.stop_at = 0, stop_at

    def forward(self, x, y):
        self.calls += 1
        if self.calls == self.stop_at:
            raise Interrupted
        mask = pyro.sample("mask", OrderedMask.uniform(6))
        w = pyro.sample("w", dist.Normal(torch.zeros(6), 1.0).to_event(1))
        mean = self.net(x) @ (mask * w)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


class Guide(PyroModule):
    def __init__(self):
        super().__init__()
        self.loc, self.logits = nn.Parameter(torch.ones(6)), nn.Parameter(torch.linspace(0, 1, 6))

    def forward(self, x, y):
        pyro.sample("mask", OrderedMaskStraightThrough(0.2, logits=self.logits))
        pyro.sample("w", dist.Normal(self.loc, 0.3).to_event(1))


class Noisy(Dataset):
    """Rows with noise that is drawn anew each time that they are read."""

    def __init__(self, data, noise=0.1):
        self.data, self.noise, self.read = data, noise, 0

    def __len__(self):
        return N

    def __getitem__(self, i):
        self.read += 1
        x, y = self.data
        return x[i] + self.noise * torch.randn(3), y[i]


class Stream(IterableDataset):
    def __init__(self, data):
        self.data = data

    def __iter__(self):
        x, y = self.data
        for i in torch.randperm(N).tolist():
            yield x[i], y[i]


class Again:
    def __init__(self, data):
        self.batches = [*zip(*(part.split(B) for part in data), strict=True)]

    def __iter__(self):
        return iter(self.batches)


FORMS = {
    "tensors": lambda data: (data, {"batch_size": B}),
    "list": lambda data: (Again(data).batches, {}),
    "iterable": lambda data: (Again(data), {"num_data": N}),
    "data set": lambda data: (Noisy(data), {"batch_size": B}),
    "loader": lambda data: (DataLoader(Noisy(data), B, shuffle=True), {}),
    "generator": lambda data: (DataLoader(Noisy(data), B, shuffle=True, generator=torch.Generator()), {}),
    "workers": lambda data: (DataLoader(Noisy(data), B, shuffle=True, num_workers=2), {}),
    "stream": lambda data: (DataLoader(Stream(data), B), {"num_data": N}),
}


@pytest.fixture
def data():
    x = torch.randn(N, 3)
    return x, x.sum(-1) + 0.1 * torch.randn(N)


def train(form, data, checkpoint=None, stop_at=None, accumulate=1):
    """Fit anew, with a source made anew; return the state of all modules, the result and the source."""
    model = Regression(stop_at)
    guide = Guide()
    source, more = form(data)
    how = {
        "num_epochs": 3,
        "lr": 0.01,
        "optimizer": OptimizerSettings(accumulate=accumulate),
        "callbacks": [] if checkpoint is None else [checkpoint],
        "progress": False,
    }
    try:
        result = fit(model, guide, source, **how, **more)
    except Interrupted:
        result = None
    return {**model.state_dict(), **{f"guide.{k}": v for k, v in guide.state_dict().items()}}, result, source


def same(found, expected):
    (state, result, _), (expected_state, whole, _) = found, expected
    assert [name for name in state if not torch.equal(state[name], expected_state[name])] == []
    assert result.lengths == whole.lengths
    return [result.elbo, result.kl, result.num_steps] == [whole.elbo, whole.kl, whole.num_steps]


CASES = [
    ({"every_steps": 2}, 1, 5, 3),
    ({"every_steps": 2}, 3, 5, 1),
    ({"every_minutes": 1e-9}, 1, 4, 3),
    ({"every_minutes": 1e-9}, 2, 5, 2),
]


@pytest.mark.parametrize(
    ("name", "when", "accumulate", "stop", "steps"),
    [(name, *case) for name in FORMS for case in (CASES if name in ("tensors", "loader") else CASES[:1])],
)
def test_position_and_order_are_restored(name, when, accumulate, stop, steps, data, tmp_path):
    form, path = FORMS[name], tmp_path / "fit.pt"
    expected = train(form, data, accumulate=accumulate)
    # One call to begin with, seven in the first epoch, and some in the second.
    stopped = train(form, data, Checkpoint(path, **when), stop_at=1 + 7 + stop, accumulate=accumulate)
    assert stopped[1] is None
    assert torch.load(path, weights_only=True)["epoch"]["num_steps"] == steps
    torch.manual_seed(99)
    assert same(train(form, data, Checkpoint(path, resume=True), accumulate=accumulate), expected)


@pytest.mark.parametrize("form", [FORMS["tensors"], FORMS["loader"], FORMS["stream"]])
def test_a_checkpoint_at_the_last_step_of_an_epoch_is_good(form, data, tmp_path):
    expected, path = train(form, data), tmp_path / "fit.pt"

    class Stop(Checkpoint):
        def on_epoch(self, run):
            raise Interrupted

    assert train(form, data, Stop(path, every_steps=7))[1] is None
    assert same(train(form, data, Checkpoint(path, resume=True)), expected)


class Remembering:
    """Batches in a random order, of which a state tells how many were read, in which order."""

    def __init__(self, data):
        self.batches, self.read, self.order, self.skipped = Again(data).batches, 0, [], None

    def __iter__(self):
        self.order, start = self.skipped or (torch.randperm(len(self.batches)).tolist(), 0)
        self.skipped = None
        for place in range(start, len(self.batches)):
            self.read, self.place = self.read + 1, place + 1
            yield self.batches[self.order[place]]

    def state_dict(self):
        return {"order": self.order, "place": self.place}

    def load_state_dict(self, state):
        self.skipped = state["order"], state["place"]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_loader_that_knows_where_it_was_goes_on_from_there(accumulate, data, tmp_path):
    def form(data):
        return Remembering(data), {"num_data": N}

    expected, path = train(form, data, accumulate=accumulate), tmp_path / "fit.pt"
    train(form, data, Checkpoint(path, every_steps=1), stop_at=1 + 7 + 5, accumulate=accumulate)
    torch.manual_seed(99)
    found = train(form, data, Checkpoint(path, resume=True), accumulate=accumulate)
    assert same(found, expected)
    assert found[2].read == 1 + (7 - 4) + 7  # one to begin with, the rest of the second epoch, and the third


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # of torchdata's import
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_state_of_a_loader_is_used(accumulate, num_workers, data, tmp_path):
    """Rows that were read before are not read again."""
    loaders = pytest.importorskip("torchdata.stateful_dataloader")

    def form(data):
        rows = Noisy(data, 0.0 if num_workers else 0.1)  # what workers draw begins anew
        return loaders.StatefulDataLoader(rows, B, shuffle=True, num_workers=num_workers), {}

    torch.manual_seed(7)
    expected, path = train(form, data, accumulate=accumulate), tmp_path / "fit.pt"
    torch.manual_seed(7)
    train(form, data, Checkpoint(path, every_steps=1), stop_at=1 + 7 + 5, accumulate=accumulate)
    torch.manual_seed(99)
    found = train(form, data, Checkpoint(path, resume=True), accumulate=accumulate)
    assert same(found, expected)
    if num_workers == 0:  # which are read in this process
        assert found[2].dataset.read == B + (N - 4 * B) + N
