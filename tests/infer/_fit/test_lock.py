"""Two fits do not write one checkpoint, whatever happens between them."""

import pytest

from pyro_vnd.infer._fit import checkpoint
from pyro_vnd.infer._fit.checkpoint import Folder


@pytest.fixture
def path(tmp_path):
    return tmp_path / "fit.pt"


def test_a_lock_of_a_fit_that_ends_meanwhile_is_taken_anew(path, monkeypatch):
    """The other fit takes its file away between the opening and the locking of it."""
    real, opened = checkpoint.fcntl.flock, []

    def flock(lock, how):
        opened.append(lock)
        if len(opened) == 1:
            (name,) = path.parent.iterdir()
            name.unlink()
        return real(lock, how)

    monkeypatch.setattr(checkpoint.fcntl, "flock", flock)
    folder = Folder(path)
    assert len(opened) == 2
    with pytest.raises(ValueError, match="which another fit writes now"):
        Folder(path)  # the second file is locked, and has its name
    folder.free()
    Folder(path).free()
    assert [*path.parent.iterdir()] == []


def test_a_system_without_locks_lets_both_write(path, monkeypatch):
    monkeypatch.setattr(checkpoint, "fcntl", None)  # as on Windows
    folders = [Folder(path), Folder(path)]
    assert [*path.parent.iterdir()] == []  # an open file could not be taken away there
    for folder in folders:
        folder.free()
    assert [*path.parent.iterdir()] == []


def test_a_folder_that_is_gone_is_said(path):
    with pytest.raises(ValueError, match=r"`checkpoint` is '.*gone/fit\.pt', which cannot be written: No such file"):
        Folder(path.parent / "gone" / "fit.pt")
