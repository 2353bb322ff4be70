"""Where the files of a data set are found, and how they are opened."""

import gzip
import os
import zlib
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Source:
    """The files of a data set: in a folder that the user names, where a package put them, or at an address.

    Attributes:
        title: The data set's name for people.
        name: What `load` knows it by, and the name of its folder in the cache.
        variable: The environment variable that names the user's folder.
        url: The address of the files, up to their names.
        sha256: The checksum of each file at that address. Those in a folder may differ: packages compress anew.
        advice: How to come by the files where all else fails.
        installed: Where a package puts them.
    """

    title: str
    name: str
    variable: str
    url: str
    sha256: dict[str, str]
    advice: str
    installed: Path | None = None

    def folder(self) -> Path:
        """Returns a folder that has all the files, downloading them if need be.

        Raises:
            ValueError: If a downloaded file has another checksum.
            FileNotFoundError: If the folder lacks files, or the download fails; says what to do.
        """
        chosen = os.environ.get(self.variable)
        if chosen:
            folder = Path(chosen)
        elif self.installed and self.installed.is_dir():
            folder = self.installed
        else:
            return self._download()
        missing = [name for name in self.sha256 if not (folder / name).is_file()]
        if missing:
            raise FileNotFoundError(f"no {self.title} in {folder} ({', '.join(missing)} missing); {self.advice}")
        return folder

    def _download(self) -> Path:
        try:
            import pooch  # type: ignore[import-untyped]

            folder = Path(pooch.os_cache("pyro_vnd")) / self.name
            for name, sha256 in self.sha256.items():
                pooch.retrieve(self.url + name, f"sha256:{sha256}", name, folder, progressbar=True)
        except (ImportError, OSError) as error:
            place = self.installed or f"${self.variable}, which is not set"
            raise FileNotFoundError(
                f"no {self.title} in {place}, and downloading it failed ({error}); {self.advice}"
            ) from error
        return folder


def read_gzip(path: Path, most: int = 2**29) -> bytes:
    """Returns what a gzip-compressed file contains.

    Args:
        path: The file.
        most: Bytes that it may contain; a file of a few kilobytes can be made that would fill all memory.

    Raises:
        ValueError: If it is not one, or not a whole one, or contains more.
    """
    if not path.stat().st_size:  # which gzip takes for a file of no parts
        raise ValueError(f"{path} is corrupt: it is empty")
    try:
        with gzip.open(path) as file:
            content = file.read(most + 1)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is corrupt: {error}") from error
    if len(content) > most:
        raise ValueError(f"{path} is corrupt, or no file of this data set: it contains more than {most:,} bytes")
    return content
