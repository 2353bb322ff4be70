"""What every benchmark writes down: where its numbers come from, and the numbers."""

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from models.output import versions

__all__ = ["header", "markdown_table", "measured", "rounded", "write_json"]


def header(module: str) -> dict[str, Any]:
    """Return the command, the versions, the revision and the machine of this run.

    Args:
        module: Name of the benchmark's module, `benchmarks.masks` say.
    """
    return {
        "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "revision": {"commit": _git("rev-parse", "HEAD"), "dirty": bool(_git("status", "--porcelain"))},
        "machine": {"cpu": _cpu_model(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
    }


def measured(result: Mapping[str, Any]) -> str:
    """Say when, at which revision and with what a result was measured, as far as its headers know.

    A result whose rows were measured anew in part has the headers of these runs, too, as `later_headers`.
    """
    later = (f"Of `{about['command']}`: {_measured(about)}" for about in result.get("later_headers", []))
    return " ".join([_measured(result["header"]), *later])


def _measured(about: Mapping[str, Any]) -> str:
    versions = "Python {python}, torch {torch}, Pyro {pyro}".format(**about["versions"])
    if "revision" not in about:
        return f"Measured with {versions}; the result names no date, revision or machine."
    (commit, dirty), machine = about["revision"].values(), about["machine"]
    where = f"revision {commit[:7]}" if commit else "an unknown revision"
    threads = "1 thread" if machine["threads"] == 1 else f"{machine['threads']} threads"
    return (
        f"{'Joined' if '--join' in about['command'] else 'Measured'} {about['date'][:10]} at {where}"
        f"{' with changes that are not committed' if dirty else ''}, {machine['cpu']}, {machine['cores']} cores, "
        f"{threads}; {versions}."
    )


def rounded(x: float) -> float:
    """Round to four significant digits, more than any timing is good for."""
    return float(f"{x:.4g}")


def write_json(path: Path, content: dict[str, Any], *, table: str | None = None) -> None:
    """Write a file that is complete or not there: under another name first, then renamed.

    Args:
        path: The file.
        content: What to write.
        table: A key of the content whose value is a list, of which each item gets one line.
    """
    text = json.dumps(content if table is None else {**content, table: []}, indent=1)
    if table is not None:
        lines = ",\n".join(f"  {json.dumps(row)}" for row in content[table])
        text = text.replace(f'"{table}": []', f'"{table}": [\n{lines}\n ]')
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        unfinished.write_text(f"{text}\n")
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def markdown_table(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """Format a table in Markdown: the first column to the left, the others to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _git(*args: str) -> str | None:
    try:
        return subprocess.run(
            ["git", *args], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # an exported tree, or no git
        return None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()
