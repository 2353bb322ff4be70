"""Whenever the machine stops, the checkpoint is the old one or the new one, and always one of them.

What is written is recorded call by call. From the record follow all states in which a power cut may leave the folder:
names change in the order in which they were changed, and of those changes since the folder was last synced any number
of the first ones may be there; a file whose data were not synced may be empty, half there or whole.
"""

import os
import resource
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from pyro_vnd.infer import FitResult
from pyro_vnd.infer._fit import checkpoint
from pyro_vnd.infer._fit.checkpoint import Folder


def state(number):
    """A state that says which one it is."""
    keys = ("arguments", "lr_schedule", "random", "epoch", "callbacks")
    weights = {"w": torch.full((500,), float(number))}
    return {
        **dict.fromkeys(keys),
        "optimizer": {"state": {}},
        "modules": weights,
        "trained": ["w"],
        "result": asdict(FitResult()),
    }


class Record:
    """What happens in a folder, in order; real calls that are written down."""

    def __init__(self, monkeypatch, folder, forget=None):
        self.folder, self.forget, self.events = folder, forget, []
        self.contents, self.synced = {}, set()
        self.names = {path.name: self._look(path, synced=True) for path in folder.iterdir()}
        for name in ("replace", "link", "fsync"):
            real = getattr(os, name)
            monkeypatch.setattr(os, name, lambda *args, name=name, real=real: getattr(self, f"_{name}")(real, *args))
        unlink = Path.unlink
        monkeypatch.setattr(Path, "unlink", lambda path, missing_ok=False: self._unlink(unlink, path, missing_ok))

    def _look(self, path, synced=False):
        inode = os.stat(path).st_ino
        self.contents.setdefault(inode, Path(path).read_bytes())
        if synced:
            self.synced.add(inode)
        return inode

    def _fsync(self, real, file):
        real(file)
        inode = os.fstat(file).st_ino
        if inode == os.stat(self.folder).st_ino:
            self.events += [] if self.forget == "folder" else [("sync",)]
            return
        for path in self.folder.iterdir():
            if os.stat(path).st_ino == inode:
                self._look(path)
        if self.forget != "file":
            self.events.append(("data", inode))

    def _replace(self, real, source, target):
        inode = self._look(source)
        real(source, target)
        self.events += [("name", Path(target).name, inode), ("name", Path(source).name, None)]

    def _link(self, real, source, target):
        inode = self._look(source)
        real(source, target)
        self.events.append(("name", Path(target).name, inode))

    def _unlink(self, real, path, missing_ok):
        real(path, missing_ok=missing_ok)
        self.events.append(("name", path.name, None))

    def folders(self):
        """Yield all that a power cut may leave, as contents by name."""
        for end in range(len(self.events) + 1):
            done, synced = self.events[:end], set(self.synced)
            synced |= {event[1] for event in done if event[0] == "data"}
            changes = [event for event in done if event[0] == "name"]
            ends = [i for i, event in enumerate(done) if event[0] == "sync"]
            sure = sum(event[0] == "name" for event in done[: ends[-1]]) if ends else 0
            for count in range(sure, len(changes) + 1):
                names = dict(self.names)
                for _, name, inode in changes[:count]:
                    names[name] = inode
                for share in (0.0, 0.5, 1.0):
                    yield {
                        name: self.contents[inode][: None if inode in synced or share == 1 else int(share * 1000)]
                        for name, inode in names.items()
                        if inode is not None
                    }


def outcomes(record, path, tmp_path):
    """Which states are found after a power cut; what cannot be read counts as "lost"."""
    return {newest for (newest,) in together(record, [path], tmp_path)}


def together(record, paths, tmp_path):
    """Which states are found beside each other."""
    other = tmp_path / "after"
    other.mkdir()
    found = set()
    for names in record.folders():
        for old in other.iterdir():
            old.unlink()
        for name, content in names.items():
            (other / name).write_bytes(content)
        found.add(tuple(found_in(other / path.name) for path in paths))
    return found


def found_in(path):
    try:
        read = Folder.read_from(path)
    except ValueError:
        return "lost"
    return "none" if read is None else read["modules"]["w"][0].item()


@pytest.fixture
def path(tmp_path):
    (tmp_path / "fit").mkdir()
    return tmp_path / "fit" / "fit.pt"


def written(path, monkeypatch, numbers, forget=None, best=False):
    folder = Folder(path)
    for number in numbers[:-1]:
        folder.write(state(number))
    with monkeypatch.context() as patch:
        record = Record(patch, path.parent, forget)
        folder.write(state(numbers[-1]), best=best)
    folder.free()
    return record


@pytest.mark.parametrize("best", [False, True])
def test_old_or_new_after_a_power_cut(best, path, tmp_path, monkeypatch):
    record = written(path, monkeypatch, [1, 2, 3], best=best)
    assert outcomes(record, path, tmp_path) == {2.0, 3.0}


def test_the_best_state_is_never_behind_the_newest(path, tmp_path, monkeypatch):
    """A fit goes on from the newest, and comes to none before it again."""
    record = written(path, monkeypatch, [1, 2, 3], best=True)
    assert together(record, [path, path.with_name("fit.best.pt")], tmp_path) == {(2.0, "none"), (2.0, 3.0), (3.0, 3.0)}


def test_none_or_new_at_first(path, tmp_path, monkeypatch):
    record = written(path, monkeypatch, [1])
    assert outcomes(record, path, tmp_path) == {"none", 1.0}


def test_the_state_before_is_kept(path, monkeypatch):
    written(path, monkeypatch, [1, 2, 3], best=True)
    found = {each.name: Folder.read_from(each)["modules"]["w"][0].item() for each in path.parent.iterdir()}
    assert found == {"fit.pt": 3.0, "fit.previous.pt": 2.0, "fit.best.pt": 3.0}


def test_power_data_that_are_not_synced_are_lost(path, tmp_path, monkeypatch):
    assert "lost" in outcomes(written(path, monkeypatch, [1, 2], forget="file"), path, tmp_path)


@pytest.mark.parametrize("forget", [None, "folder"])
def test_power_the_folder_is_synced_when_a_write_is_over(forget, path, tmp_path, monkeypatch):
    record = written(path, monkeypatch, [1, 2], forget)
    names = [event[:2] for event in record.events]
    is_sure = ("sync",) in names and names.index(("sync",)) > names.index(("name", "fit.pt"))
    assert is_sure == (forget is None)
    assert ("none" in outcomes(record, path, tmp_path)) is False  # there was one


NUM_CALLS = {"replace": 2, "link": 0, "fsync": 2}  # a link that fails is a copy


@pytest.mark.parametrize("name", NUM_CALLS)
@pytest.mark.parametrize("which", range(4))
def test_old_or_new_after_an_error_of_the_system(name, which, path, monkeypatch):
    folder = Folder(path)
    for number in (1, 2):
        folder.write(state(number))
    calls, real = [], getattr(os, name)

    def failing(*args):
        calls.append(args)
        if len(calls) == which + 1:
            raise OSError(28, "No space left on device")
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, name, failing)
        expected = pytest.raises(ValueError, match=r"fit\.pt', which cannot be written: No space left on device")
        with expected if which < NUM_CALLS[name] else nullcontext():
            folder.write(state(3))
    folder.free()
    assert Folder.read_from(path)["modules"]["w"][0].item() in (2.0, 3.0)
    assert not [*path.parent.glob(".*")]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.99])
def test_a_disk_that_is_full_says_so_and_loses_nothing(share, path):
    """The system refuses to write more than so much."""
    folder = Folder(path)
    for number in (1, 2):
        folder.write(state(number))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(share * path.stat().st_size), limits[1]))
    try:
        with pytest.raises(ValueError, match=r"fit: argument `checkpoint` is '.*fit\.pt', which cannot be written: "):
            folder.write(state(3))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    folder.free()
    assert Folder.read_from(path)["modules"]["w"][0].item() == 2.0
    assert not [*path.parent.glob(".*")]


def test_each_flipped_bit_is_found_or_changes_nothing(path):
    folder = Folder(path)
    folder.write(state(1))
    folder.free()
    good = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    found = 0
    for place in torch.randint(8 * len(good), (400,), generator=generator).tolist():
        bad = bytearray(good)
        bad[place // 8] ^= 1 << place % 8
        path.write_bytes(bytes(bad))
        try:
            read = Folder.read_from(path)
        except ValueError:
            found += 1
        else:
            assert torch.equal(read["modules"]["w"], torch.full((500,), 1.0))
            assert read["trained"] == ["w"]
    assert found > 200  # the rest are in what zip does not use


@pytest.mark.parametrize("content", [b"", b"hello", "half"])
def test_a_damaged_file_is_named_with_the_one_before(content, path):
    folder = Folder(path)
    folder.write(state(1))
    folder.free()
    whole = path.read_bytes()
    damage = whole[: len(whole) // 2] if content == "half" else content
    path.write_bytes(damage)
    with pytest.raises(ValueError, match=r"'.*fit\.pt' is no checkpoint of fit, or a damaged one.*leave `resume` out"):
        Folder.read_from(path)
    path.write_bytes(whole)
    folder = Folder(path)
    folder.write(state(2))
    folder.free()
    path.write_bytes(damage)
    with pytest.raises(ValueError, match=r"go on from an older state, which is whole: rename '.*fit\.previous\.pt'"):
        Folder.read_from(path)


def test_one_writer_at_a_time(path):
    folder = Folder(path)
    with pytest.raises(ValueError, match="which another fit writes now"):
        Folder(path)
    folder.free()
    Folder(path).free()
    assert not [*path.parent.iterdir()]


def test_what_killed_fits_left_is_taken_away(path):
    (path.parent / ".fit.pt.123.tmp").write_bytes(b"half")
    (path.parent / ".other.pt.123.tmp").write_bytes(b"half")
    Folder(path).free()
    assert [each.name for each in path.parent.iterdir()] == [".other.pt.123.tmp"]
