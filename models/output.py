"""What every command leaves behind: a folder that is complete or untouched, printed tables, versions."""

import os
import platform
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyro
import torch

import pyro_vnd


def is_first_process() -> bool:
    """Say whether this is the process that prints and writes files, of those that torchrun has started."""
    return int(os.environ.get("RANK", "0")) == 0


@contextmanager
def atomic_folder(out: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `out`, whose files move there at the end, or vanish if anything fails."""
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.exists() and not (out.is_dir() and os.access(out, os.W_OK)):
        raise OSError(f"cannot write results to {out}: not a writable folder")
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        yield temporary
        out.mkdir(exist_ok=True)
        for path in temporary.iterdir():
            path.replace(out / path.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print cells that are formatted already, aligned to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


def versions() -> dict[str, str]:
    """Return the versions that results depend on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pyro": pyro.__version__,
        "pyro_vnd": pyro_vnd.__version__,
    }
