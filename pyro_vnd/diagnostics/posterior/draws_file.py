"""Draws of all rows of the data, written into a file of netCDF batch by batch."""

import hashlib
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import h5netcdf
import numpy as np

from pyro_vnd._files import replaced, writing
from pyro_vnd.diagnostics.posterior._arviz import Groups, group_dataset, read_groups, weights_and_khat

__all__ = ["DrawsFile"]

_ARGUMENT = "to_arviz: argument `path`"
_CHUNK = 2**22  # numbers in a part of a variable that is read as one


class DrawsFile:
    """A file that grows along the rows of the data; a context, at whose end it takes the place of an old one.

    Variables without rows are those of the first batch, and the same in all others. Scores are added up.

    Args:
        path: The file.
        rows: Name of the dimension of the rows.
        coords: Coordinates by dimension, those of all rows among them.
        attrs: Attributes of all groups.

    Raises:
        ValueError: If it is no path of a file of netCDF.
    """

    def __init__(self, path: Path, rows: str, coords: Mapping[str, Any], attrs: Mapping[str, Any]) -> None:
        with writing(_ARGUMENT, path):  # looking may be forbidden, too
            is_possible = path.suffix != ".zarr" and not path.is_dir() and path.parent.is_dir()
        if not is_possible:
            raise ValueError(
                f"to_arviz: argument `path` must be a file of netCDF, 'draws.nc' say, in a folder that exists; got "
                f"{str(path)!r}. What is returned can be written as zarr afterwards"
            )
        self.path, self.rows, self.coords, self.attrs = path, rows, coords, attrs
        self.num_rows = 0
        self._groups: list[str] = []
        self._scores: dict[str, Any] = {}
        self._shared: dict[tuple[str, str], bytes] = {}
        self._stack = ExitStack()

    def __enter__(self) -> "DrawsFile":
        self._file = self._stack.enter_context(replaced(self.path))
        return self

    def __exit__(self, *error: Any) -> None:
        if error[0] is not None:
            self._stack.__exit__(*error)
            return
        with writing(_ARGUMENT, self.path), self._stack:
            self._finish()

    def add(self, groups: Groups, coords: Mapping[str, Any]) -> None:
        """Add a batch.

        Args:
            groups: Its variables, (dims, values, attrs) each, by group.
            coords: Coordinates by dimension, but for those of the rows.

        Raises:
            ValueError: If a variable without rows differs between batches, or none has rows.
        """
        sizes = {
            len(np.moveaxis(values, dims.index(self.rows), 0))
            for variables in groups.values()
            for dims, values, _ in variables.values()
            if self.rows in dims
        }
        if len(sizes) != 1:
            known = sorted({dim for variables in groups.values() for dims, *_ in variables.values() for dim in dims})
            raise ValueError(
                f"to_arviz: argument `plate` must name the plate over the rows of the data; {self.rows!r} has sizes "
                f"{sorted(sizes)} among the dimensions {known}"
            )
        stop = self.num_rows + sizes.pop()
        for name, values in groups["sample_stats"].items():
            dims, drawn, attrs = self._scores.get(name, (values[0], 0.0, values[2]))
            self._scores[name] = dims, drawn + values[1], attrs
        for group, variables in groups.items():
            if group != "sample_stats":
                self._check_shared(group, variables)
                with writing(_ARGUMENT, self.path):
                    self._write(group, variables, coords, stop)
        self.num_rows = stop

    def read(self) -> Any:
        """Return what was written, which is read from the file where it is used."""
        return read_groups(self.path, self._groups)

    def _check_shared(self, group: str, variables: Mapping[str, tuple[Any, ...]]) -> None:
        for name, (dims, values, _) in variables.items():
            if self.rows not in dims:
                digest = hashlib.sha256(f"{values.shape}".encode() + np.ascontiguousarray(values).tobytes()).digest()
                if self._shared.setdefault((group, name), digest) != digest:
                    raise ValueError(
                        f"to_arviz: {name!r} in group {group!r} has no dimension {self.rows!r} for the rows of the "
                        "data, but differs from batch to batch: put the site into the plate, or leave it out by "
                        "`sites`, or leave out `path`, so that all rows are there at once"
                    )

    def _write(
        self, group: str, variables: Mapping[str, tuple[Any, ...]], coords: Mapping[str, Any], stop: int
    ) -> None:
        by_row = {name: (dims, values) for name, (dims, values, _) in variables.items() if self.rows in dims}
        index = self._of_rows(stop)
        if self.num_rows == 0:
            laws = {name: {k: v for k, v in each[2].items() if k != "law"} for name, each in variables.items()}
            plain = {n: (d, v, laws[n] if n in by_row else attrs) for n, (d, v, attrs) in variables.items()}
            self._begin(group, plain, {**coords, **self.coords, self.rows: index}, by_row)
            return
        if not by_row:
            return
        with h5netcdf.File(self._file, "a") as file:
            found = file[group]
            found.resize_dimension(self.rows, stop)
            for name, (dims, values) in {**by_row, self.rows: ([self.rows], index)}.items():
                where = tuple(slice(self.num_rows, stop) if dim == self.rows else slice(None) for dim in dims)
                variable = found[name]
                is_number = np.dtype(variable.dtype).kind not in "OU"
                variable[where] = values.astype(variable.dtype) if is_number else values.astype(object)

    def _begin(
        self, group: str, variables: Mapping[str, Any], coords: Mapping[str, Any], by_row: Mapping[str, Any] = {}
    ) -> None:
        data = group_dataset(variables, coords, self.attrs)
        data.to_netcdf(
            self._file,
            mode="a" if self._groups else "w",
            group=group,
            engine="h5netcdf",
            unlimited_dims=[self.rows] if by_row else None,
            encoding={name: {"chunksizes": _chunks(dims, data[name].shape)} for name, (dims, _) in by_row.items()},
        )
        self._groups.append(group)

    def _of_rows(self, stop: int) -> np.ndarray:
        """Return the coordinates of the rows of a batch."""
        if self.rows not in self.coords:
            return np.arange(self.num_rows, stop)
        self._check_coords(stop <= len(self.coords[self.rows]))
        return np.asarray(self.coords[self.rows][self.num_rows : stop])

    def _check_coords(self, is_right: bool) -> None:
        if not is_right:
            raise ValueError(
                f"to_arviz: argument `coords` must have a value of {self.rows!r} for each row; got "
                f"{len(self.coords[self.rows])}"
            )

    def _finish(self) -> None:
        if not self.num_rows:
            raise ValueError("to_arviz: argument `data` must have batches; got none")
        self._check_coords(len(self.coords.get(self.rows, range(self.num_rows))) == self.num_rows)
        self._begin("sample_stats", self._scores | weights_and_khat(self._scores), {})


def _chunks(dims: list[str], shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of the parts in which a variable is stored: that of a batch, or of fewer draws of it."""
    of_draw = max(
        int(np.prod([size for dim, size in zip(dims, shape, strict=True) if dim not in ("chain", "draw")])), 1
    )
    most = {"chain": 1, "draw": max(_CHUNK // of_draw, 1)}
    return tuple(max(min(size, most.get(dim, size)), 1) for dim, size in zip(dims, shape, strict=True))
