"""A report as one self-contained HTML page, and the folder, tables and versions of all commands."""

import base64
import html
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pyro
import torch
from matplotlib.figure import Figure

import pyro_vnd

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ddd; padding-bottom: .3rem; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem 1rem; text-align: right; border-bottom: 1px solid #eee; }
th { border-bottom: 2px solid #888; }
figure { margin: 1.5rem 0; } img { max-width: 100%; } figcaption { color: #555; font-size: .9rem; }
pre { background: #f6f6f6; padding: .8rem; overflow-x: auto; font-size: .85rem; }
"""


class Report:
    """Sections, tables and figures, in the order in which they are added.

    Args:
        title: Title of the page.
        folder: Where each figure is kept as a PNG file, too.
    """

    def __init__(self, title: str, folder: Path) -> None:
        self.title, self.folder = title, folder
        self.parts: list[str] = []

    def section(self, title: str, text: str) -> None:
        """Start a section."""
        self.parts.append(f"<h2>{html.escape(title)}</h2>")
        self.text(text)

    def text(self, text: str) -> None:
        """Add a paragraph."""
        self.parts.append(f"<p>{html.escape(text)}</p>")

    def pre(self, text: str) -> None:
        """Add text whose line breaks and spaces stay."""
        self.parts.append(f"<pre>{html.escape(text)}</pre>")

    def table(self, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """Add a table of cells that are formatted already."""
        lines = [_row("th", header), *(_row("td", row) for row in rows)]
        self.parts.append("<table>" + "\n".join(lines) + "</table>")

    def figure(self, figure: Figure, name: str, caption: str) -> None:
        """Add a figure, embedded and as the file `name`.png, with its caption for eyes and screen readers."""
        path = self.folder / f"{name}.png"
        figure.savefig(path, dpi=150)
        plt.close(figure)
        data = base64.b64encode(path.read_bytes()).decode()
        width = round(figure.get_size_inches()[0] * 100)
        text = html.escape(caption)
        self.parts.append(
            f'<figure><img width="{width}" alt="{text}" src="data:image/png;base64,{data}">'
            f"<figcaption>{text}</figcaption></figure>"
        )

    def footer(self, header: dict[str, Any]) -> None:
        """Say how the page was made."""
        self.section("How this page was made", "The numbers are in metrics.json beside it.")
        self.pre(json.dumps(header, indent=1))

    def html(self) -> str:
        """Return the page."""
        title = html.escape(self.title)
        return (
            f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
            f"<style>{STYLE}</style></head>\n<body><h1>{title}</h1>\n" + "\n".join(self.parts) + "\n</body></html>\n"
        )


def _row(tag: str, cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"


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
