"""Fits that are killed two thousand times, one fit of ten thousand steps, and hundreds of fits in one process.

    python -m benchmarks.soak [--kills N] [--steps N] [--fits N] [--seed N] [--only NAME ...] [--json FILE]

Linux; one thread, OMP_NUM_THREADS=1; needs tensorboard.

Killed fits: 24 combinations of model, training and callbacks. Each is fitted once, unbroken, in a process of its own.
Then it is fitted again and again, in processes that are killed, SIGKILL, at random moments, half of them within the
writing of a checkpoint, and go on where they were, until the fit ends. Parameters, optimiser, histories, random
numbers, draws, checkpoints and logs must be those of the unbroken fit, to the last bit.
"""

import argparse
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.record import header, markdown_table, rounded, write_json
from benchmarks.soak_fits import COMBINATIONS
from benchmarks.soak_held import BOUNDS, COUNTS, Held, grown, slope
from benchmarks.soak_kills import PLACES, ROOT, kill_and_resume

__all__ = ["markdown"]

RESULTS = Path(__file__).parent / "results" / "soak.json"


def held_by(kind: str, number: int) -> list[dict[str, Any]]:
    """Count what a new process holds that fits, its bar being on a pipe."""
    if not number:
        return []
    command = [sys.executable, "-m", "benchmarks.soak_held", kind, str(number)]
    ran = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, check=True)
    rows: list[dict[str, Any]] = json.loads(ran.stdout)
    return rows


def markdown(result: Mapping[str, Any]) -> str:
    """Format the result as tables."""
    rows = result["kills"]
    places = [Counter[str]() for _ in rows]
    for row, count in zip(rows, places, strict=True):
        for each in row["kills"].values():
            count.update(each)
    body = [_line(row["fit"], [row], count) for row, count in zip(rows, places, strict=True)]
    body.append(_line("all", rows, sum(places, Counter())))
    head = ["fit", "seconds", "kills", *PLACES, "resumes", "finished", "differ", "faults"]
    aimed = [
        [aim, *(f"{sum(row['kills'][aim].get(place, 0) for row in rows):,}" for place in PLACES)]
        for aim in (rows[0]["kills"] if rows else [])
    ]
    differ = sum((Counter(row["differ"]) for row in rows), Counter[str]())
    faults = Counter(fault for row in rows for fault in row["faults"])
    lines = [f"- Not as in the unbroken fit: {_list(differ)}.", f"- Faults: {_list(faults)}."]
    most = max((row["most_unfinished"] for row in rows), default=0)
    lines.append(f"- Unfinished files after a kill, at most: {most}; at the end of a fit none, or it is a fault.")
    parts = [markdown_table(head, body), markdown_table(["aimed at", *PLACES], aimed), "\n".join(lines)]
    for kind in ("steps", "fits"):
        if found := [Held(**row) for row in result[kind]]:
            cells = [
                [f"{row.at:,}", f"{row.memory:,.0f}", *(f"{getattr(row, name)}" for name in COUNTS)] for row in found
            ]
            parts.append(markdown_table([kind, "memory, KB", *COUNTS], cells))
            more = ", ".join(grown(found, BOUNDS[kind])) or "nothing"
            parts.append(
                f"- Memory grows by {rounded(slope(found)):g} KB with each of the {kind}; at most {BOUNDS[kind]:g} is "
                f"the bar. Grown: {more}."
            )
    return "\n\n".join(parts)


def _line(name: str, rows: Sequence[Mapping[str, Any]], places: Mapping[str, int]) -> list[str]:
    differ = sum(sum(row["differ"].values()) for row in rows)
    counts = [
        sum(places.values()),
        *(places.get(place, 0) for place in PLACES),
        sum(row["resumes"] for row in rows),
        sum(row["finished"] for row in rows),
        differ,
        sum(len(row["faults"]) for row in rows),
    ]
    return [name, f"{sum(row['seconds'] for row in rows):.2f}", *(f"{count:,}" for count in counts)]


def _list(counts: Mapping[str, int]) -> str:
    return "; ".join(f"{name} ({count})" for name, count in counts.items()) or "none"


def main(argv: list[str] | None = None) -> None:
    """Run the soak and write its result, after each fit that ended what there is."""
    names = [str(which) for which in COMBINATIONS]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=2000, help="of all together; with 0 those of FILE are kept")
    parser.add_argument("--steps", type=int, default=10_000, help="steps of the long fit")
    parser.add_argument("--fits", type=int, default=216, help="fits in one process, at least")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments of kills")
    parser.add_argument("--only", nargs="+", default=names, choices=names, metavar="NAME", help=f"such as {names[0]}")
    parser.add_argument("--folder", type=Path, help="where fits write; the usual folder for temporary files by default")
    parser.add_argument("--json", type=Path, default=RESULTS, metavar="FILE", help="where the result goes")
    args = parser.parse_args(argv)
    result: dict[str, Any] = {"header": header("benchmarks.soak"), "kills": [], "steps": [], "fits": []}
    if not args.kills and args.json.exists():
        old = json.loads(args.json.read_text())
        result = old | {"later_headers": [*old.get("later_headers", []), result["header"]]}
    chosen = [which for which in COMBINATIONS if str(which) in args.only]
    for rows in kill_and_resume(chosen, args.kills, args.seed, args.folder) if args.kills else ():
        result["kills"] = rows
        write_json(args.json, result, table="kills")
    for kind in ("steps", "fits"):
        result[kind] = held_by(kind, getattr(args, kind)) or result[kind]
        write_json(args.json, result, table="kills")
    print(markdown(json.loads(args.json.read_text())))


if __name__ == "__main__":
    main()
