"""What is written can be read again as it was, or is refused before the first step, by the place where it is."""

import os
import threading
from collections import Counter, OrderedDict, defaultdict, namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from masked_mean import normal_mean
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule
from torch import nn

from pyro_vnd.infer import Callback, CSVLogger, fit

ARGUMENTS = {"num_epochs": 3, "batch_size": 16, "progress": False}


class Stop(Callback):
    """Counts steps, and raises in one."""

    def __init__(self, at=None):
        self.at, self.num_steps = at, 0

    def on_step(self, run):
        self.num_steps += 1
        if self.num_steps == self.at:
            raise KeyError


class Holder(nn.Module):
    """A module that has something among its state."""

    def __init__(self, state):
        super().__init__()
        self.state, self.found = [state], []

    def get_extra_state(self):
        return {"inside": self.state}

    def set_extra_state(self, state):
        self.found.append(state["inside"][0])


class Giving(nn.Module):
    def get_extra_state(self):
        return 1


class With(PyroModule):
    """A model with such a part."""

    def __init__(self, part):
        super().__init__()
        self.first = nn.Linear(1, 1)
        self.part = part

    def forward(self, y):
        return normal_mean(y)


def train(y, part=None, callbacks=(), **arguments):
    model = With(nn.Identity() if part is None else part)
    return fit(model, AutoNormal(model), y, callbacks=callbacks, **ARGUMENTS | arguments)


Pair = namedtuple("Pair", ["first", "second"])
itself: list = []
itself.append(itself)
KEPT = {
    "float": (np.float32(0.1), float(np.float32(0.1))),
    "boolean": (np.bool_(True), True),
    "text": (np.str_("a"), "a"),
    "set": ({np.int64(1), 2}, {1, 2}),
    "keys": ({np.int64(3): 1, (1, np.int8(2)): None}, {3: 1, (1, 2): None}),
    "counter": (Counter("aab"), Counter("aab")),
    "ordered": (OrderedDict(b=(np.float64(1),), a=b"x"), OrderedDict(b=(1.0,), a=b"x")),
    "of torch": ((torch.float16, torch.Size([2]), torch.device("cpu")),) * 2,
}
REFUSED = {
    "array": (np.arange(3), "numpy.ndarray"),
    "long double": (np.longdouble(1), "numpy.longdouble"),
    "time": (np.datetime64("2020-01-01"), "numpy.datetime64"),
    "path": (Path("a"), "pathlib.*Path"),
    "named tuple": (Pair(1, 2), ".*Pair"),
    "frozen": (frozenset({1}), "frozenset"),
    "default": (defaultdict(int), "collections.defaultdict"),
    "module": (nn.Linear(1, 1), "torch.nn.modules.linear.Linear"),
    "function": (lambda x: x, "function"),
    "lock": (threading.Lock(), "_thread.lock"),
    "generator": (torch.Generator(), "torch._C.Generator"),
    "itself": (itself, "list"),
}


@pytest.mark.parametrize(("state", "kept"), KEPT.values(), ids=KEPT)
def test_what_is_written_is_read_as_it_was(state, kept, y, tmp_path):
    path = tmp_path / "fit.pt"
    with pytest.raises(KeyError):
        train(y, Holder(state), [Stop(5)], checkpoint=path)
    again = Holder(state)
    train(y, again, checkpoint=path, resume=True)
    assert type(again.found[0]) is type(kept)
    assert again.found[0] == kept


@pytest.mark.parametrize(("state", "kind"), REFUSED.values(), ids=REFUSED)
def test_what_would_not_be_read_is_refused_before_the_first_step(state, kind, y, tmp_path):
    where, steps = r"modules\['model.part._extra_state'\]\['inside'\]\[0\]", Stop()
    with pytest.raises(ValueError, match=rf"^fit: argument `checkpoint` cannot hold {where}.*, of type {kind}, which"):
        train(y, Holder(state), [steps], checkpoint=tmp_path / "fit.pt")
    assert steps.num_steps == 0
    assert os.listdir(tmp_path) == []


def test_a_callback_says_which_part_of_it_cannot_be_kept(y, tmp_path):
    class Keeping(Stop):
        def state_dict(self):
            return {"rates": [1.0, np.ones(2)]}

    with pytest.raises(ValueError, match=r"cannot hold callbacks\[0\]\[1\]\['rates'\]\[1\], of type numpy.ndarray"):
        train(y, callbacks=[keeping := Keeping()], checkpoint=tmp_path / "fit.pt")
    assert keeping.num_steps == 0


def test_a_state_that_nobody_takes_back_is_refused_before_the_first_step(y, tmp_path):
    with pytest.raises(ValueError, match=r"`checkpoint`, .*do not take back.*get_extra_state needs a set_extra_state"):
        train(y, Giving(), [steps := Stop()], checkpoint=tmp_path / "fit.pt")
    assert steps.num_steps == 0


def test_what_fails_while_a_state_is_taken_back_stays_what_it_is_and_changes_nothing(y, tmp_path):
    class Failing(Holder):
        def set_extra_state(self, state):
            if self.state == ["fails"]:
                raise KeyError("of the user")

    path = tmp_path / "fit.pt"
    train(y, Failing(1.0), checkpoint=path)
    model = With(Failing("fails"))
    before = model.first.weight.detach().clone()
    with pytest.raises(KeyError, match="of the user"):
        fit(model, AutoNormal(model), y, **ARGUMENTS, checkpoint=path, resume=True)
    assert torch.equal(model.first.weight, before)


def test_a_folder_that_may_not_be_written_says_so(y, tmp_path):
    folder = tmp_path / "locked"
    folder.mkdir()
    os.chmod(folder, 0o500)
    others = [path for path in tmp_path.parents if path.stat().st_uid == os.geteuid()]
    modes = [(path, path.stat().st_mode) for path in (tmp_path, *others[:3])]
    for path, mode in modes:
        os.chmod(path, mode | 0o055)
    is_root = os.geteuid() == 0
    try:
        if is_root:  # who may write everywhere
            os.chmod(folder, 0o555)
            os.seteuid(65534)
        with pytest.raises(ValueError, match=r"`checkpoint` is '.*fit.pt', which cannot be written: Permission denied"):
            train(y, checkpoint=folder / "fit.pt")
    finally:
        if is_root:
            os.seteuid(0)
        for path, mode in modes:
            os.chmod(path, mode)


def test_a_link_stays_a_link_to_the_newest_file(y, tmp_path):
    (tmp_path / "far").mkdir()
    for name in ("fit.pt", "fit.csv"):
        (tmp_path / name).symlink_to(tmp_path / "far" / name)
    train(y, checkpoint=tmp_path / "fit.pt", callbacks=[CSVLogger(tmp_path / "fit.csv")])
    assert all((tmp_path / name).is_symlink() for name in ("fit.pt", "fit.csv"))
    assert sorted(os.listdir(tmp_path / "far")) == ["fit.csv", "fit.previous.pt", "fit.pt"]
    going_on = {"num_epochs": 5, "resume": "extend"}
    assert len(train(y, checkpoint=tmp_path / "far" / "fit.pt", **going_on).elbo) == 5
    assert len(train(y, checkpoint=tmp_path / "fit.pt", **going_on).elbo) == 5


def test_a_log_that_cannot_be_written_says_so(y, tmp_path):
    folder = tmp_path / "log"
    folder.mkdir()
    logger = CSVLogger(folder / "fit.csv")
    folder.rmdir()
    with pytest.raises(ValueError, match=r"^CSVLogger: argument `path` is '.*fit.csv', which cannot be written: "):
        train(y, callbacks=[logger])


def test_a_line_that_was_cut_short_is_no_line(y, tmp_path):
    log, path = tmp_path / "fit.csv", tmp_path / "fit.pt"
    with pytest.raises(KeyError):
        train(y, callbacks=[CSVLogger(log), Stop(7)], checkpoint=path)
    whole = log.read_text()
    log.write_text(whole + "1")  # of epoch 10, say
    train(y, callbacks=[CSVLogger(log)], checkpoint=path, resume=True)
    epochs = [line.partition(",")[0] for line in log.read_text().splitlines()]
    assert epochs == ["epoch", "1", "2", "3"]


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/dev/null", "no file but a device or a pipe"),
        ("/proc/self/mem/fit.pt", "whose folder does not exist"),
        ("/tmp/" + "n" * 300, "which cannot be written: File name too long"),
        ("/tmp/" + "n" * 250, "which cannot be written: File name too long"),
        ("fit\0.pt", "must be the path of a file"),
        (".", "must be the path of a file"),
    ],
)
def test_a_path_that_can_be_no_file(path, said, y):
    with pytest.raises(ValueError, match=rf"^fit: argument `checkpoint` .*{said}"):
        train(y, checkpoint=path)
