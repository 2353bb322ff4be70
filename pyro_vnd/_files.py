"""Files that are replaced as a whole."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["remove_unfinished", "replaced", "resolved", "sync", "unfinished_name", "writing"]


@contextmanager
def writing(what: str, path: Path) -> Iterator[None]:
    """Run a block that writes a file, and say so where the system does not take it.

    Args:
        what: Function and argument, for messages.
        path: The file.

    Raises:
        ValueError: In place of an error of the system.

    Example:
        >>> with writing("CSVLogger: argument `path`", Path("/none/fit.csv")):
        ...     open("/none/fit.csv", "w")
        Traceback (most recent call last):
        ValueError: CSVLogger: argument `path` is '/none/fit.csv', which cannot be written: No such file or directory...
    """
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"{what} is {str(path)!r}, which cannot be written: {error.strerror or error}. Make room, or give a path "
            "where there is some and writing is allowed"
        ) from error


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Give the block another name to write a file under, which then takes the place of an old one.

    The file is the old one or the new one, whenever the machine stops; if the block raises, it is the old one.
    """
    path = resolved(path)
    unfinished = unfinished_name(path)
    try:
        yield unfinished
        sync(unfinished)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    if os.name == "posix":  # so that the new name outlives a power cut, too
        sync(path.parent)


def resolved(path: Path) -> Path:
    """Return the file that a symbolic link stands for, which is to be replaced in the link's place."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path  # a link to itself is its own, and replaced


def unfinished_name(path: Path, kind: str = "") -> Path:
    """Return what a file is called until it is whole, in this process.

    Example:
        >>> unfinished_name(Path("fit.pt")).name.startswith(".fit.pt.")
        True
    """
    return path.with_name(f".{path.name}.{os.getpid()}{kind}.tmp")


def remove_unfinished(path: Path) -> None:
    """Remove what processes that were killed have left of a file that was not whole yet."""
    left = re.compile(rf"\.{re.escape(path.name)}\.\d+(\.\w+)?\.tmp")  # and not of "fit.pt" where it is "fit"
    with suppress(OSError):  # of a folder that is not there or not to be read: the writing will say so
        for file in path.parent.iterdir():
            if left.fullmatch(file.name):
                file.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    opened = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
