"""Small files in place of the real data sets."""

from collections.abc import Callable
from pathlib import Path

import pytest
from small_datasets import FILES


@pytest.fixture
def small_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Write small files of a data set, have them used in place of the real ones, and return their folder."""

    def write_and_use(name: str) -> Path:
        module, write = FILES[name]
        write(tmp_path)
        monkeypatch.setenv(module.SOURCE.variable, str(tmp_path))
        return tmp_path

    return write_and_use
