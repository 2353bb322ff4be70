"""Benchmarks of many fits: their command line, with recipes that can be changed, and each fit in a file of its own."""

import argparse
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

from benchmarks.record import header, write_json
from models.ood import Part

__all__ = ["kept_rows", "read_arguments", "setting", "write_rows"]

Row = dict[str, Any]


def read_arguments(
    module: str,
    about: str,
    choices: Mapping[str, Sequence[str]],
    recipe: type,
    results: Path,
    argv: Sequence[str] | None,
    part: Part = "test",
    data: Sequence[str] = ("fashion-mnist", "digits"),
) -> argparse.Namespace:
    """Read the command line of a benchmark.

    Args:
        module: Name of the benchmark, after `python -m`.
        about: What it does, in one line.
        choices: Names that can be run, by option; by default all of them.
        recipe: Dataclass of the recipe.
        results: Where the committed results are.
        argv: Arguments, or None for those of the process.
        part: What the committed results are of.
        data: Names of the data sets; by default the first of them.

    Returns:
        `data`, the options of `choices`, `seeds` as a range, `part`, `changes` of the recipe, `join`, and `json`, a
        file whose folder exists.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=about)
    parser.add_argument("--data", default=data[0], choices=data)
    for option, names in choices.items():
        parser.add_argument(f"--{option}", nargs="+", default=list(names), choices=names, metavar="NAME")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--first-seed", type=int, default=0, help="the first of them")
    parser.add_argument("--part", default=part, choices=get_args(Part), help="what is scored")
    parser.add_argument(
        "--set",
        type=setting(recipe),
        nargs="+",
        default=[],
        metavar="FIELD=NUMBER",
        help="change the recipe, for instance epochs=2",
    )
    parser.add_argument("--join", action="store_true", help="fit nothing: add rows of fits that are done to FILE's")
    parser.add_argument("--json", type=Path, default=results, metavar="FILE", help="where the rows go")
    args = parser.parse_args(argv)
    if args.part != part and args.json == results:
        parser.error(f"--part {args.part} needs --json FILE: the committed results are of the {part} part")
    args.seeds = range(args.first_seed, args.first_seed + args.seeds)
    args.changes = dict(args.set)
    args.json.parent.mkdir(parents=True, exist_ok=True)
    return args


def kept_rows(file: Path, recipe: dict[str, Any], make: Callable[[], Iterable[Row]] | None) -> list[Row]:
    """Return the rows of one fit: from its file if it was done under the same recipe, else made now and kept.

    Args:
        file: Where the rows are or go, written as soon as they are there: an interrupted run goes on from there.
        recipe: What the rows depend on.
        make: Fits and scores; None leaves out what is not done.

    Returns:
        The rows.
    """
    found = json.loads(file.read_text())["recipe"] if file.exists() else {}
    if not all(name in found and found[name] == value for name, value in recipe.items()):
        if make is None:
            return []
        print(file.stem, flush=True)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, {"recipe": recipe, "rows": list(make())})
    return json.loads(file.read_text())["rows"]


def write_rows(
    args: argparse.Namespace, module: str, rows: list[Row], about: Mapping[str, Any], **others: Any
) -> dict[str, Any]:
    """Write the rows of a run, or add them to those that the file has already.

    Args:
        args: What `read_arguments` returned. With `join` rows of other fits stay, and so does their header: that of
            this run is one of the `later_headers`.
        module: Name of the benchmark.
        rows: Its rows, of which "value" is measured, and the rest says of what.
        about: What the header says beside part, command and versions.
        **others: What else the result has.

    Returns:
        What was written.
    """
    content = {"header": header(module) | {"part": args.part, **about}, **others, "rows": rows}
    if args.join and args.json.exists():
        old = json.loads(args.json.read_text())
        later = [*old.get("later_headers", []), content["header"]]
        found = {_what(row): row for row in [*old["rows"], *rows]}
        content = old | {"later_headers": later, **others, "rows": [*found.values()]}
    write_json(args.json, content, table="rows")
    return content


def _what(row: Row) -> tuple[Any, ...]:
    return tuple(value for key, value in row.items() if key != "value")


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
