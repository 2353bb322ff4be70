"""Benchmarks of many fits: each kept in a file of its own, and recipes changed from the command line."""

import argparse
import json
from collections.abc import Callable, Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

from benchmarks.record import write_json

__all__ = ["kept_rows", "setting"]

Row = dict[str, Any]


def kept_rows(file: Path, recipe: dict[str, Any], make: Callable[[], Iterable[Row]]) -> list[Row]:
    """Return the rows of one fit: from its file if it was done under the same recipe, else made now and kept.

    Args:
        file: Where the rows are or go, written as soon as they are there: an interrupted run goes on from there.
        recipe: What the rows depend on.
        make: Fits and scores.

    Returns:
        The rows.
    """
    found = json.loads(file.read_text())["recipe"] if file.exists() else {}
    if not all(name in found and found[name] == value for name, value in recipe.items()):
        print(file.stem, flush=True)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, {"recipe": recipe, "rows": list(make())})
    return json.loads(file.read_text())["rows"]


def setting(recipe: type) -> Callable[[str], tuple[str, Any]]:
    """Return a reader of `field=value` for the numeric and boolean fields of a recipe, a type for argparse.

    Args:
        recipe: A dataclass whose fields have defaults.
    """
    types = {field.name: type(field.default) for field in fields(recipe) if isinstance(field.default, int | float)}

    def read(text: str) -> tuple[str, Any]:
        name, _, value = text.partition("=")
        try:
            number = float(value)
            if name not in types or types[name](number) != number:
                raise ValueError
        except ValueError:
            known = ", ".join(f"{name} ({kind.__name__})" for name, kind in types.items())
            raise argparse.ArgumentTypeError(f"{text!r} is not FIELD=NUMBER with a field of {known}") from None
        return name, types[name](number)

    return read
