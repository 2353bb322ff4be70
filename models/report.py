"""A report as one self-contained HTML page."""

import base64
import html
import json
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure, SubFigure

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2, h3 { line-height: 1.2; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ddd; padding-bottom: .3rem; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .8rem; text-align: right; border-bottom: 1px solid #eee; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
th { border-bottom: 2px solid #888; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .3rem 1rem; }
dt { font-weight: 600; } dd { margin: 0; }
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

    def subsection(self, title: str) -> None:
        """Start a part of a section."""
        self.parts.append(f"<h3>{html.escape(title)}</h3>")

    def text(self, text: str) -> None:
        """Add a paragraph."""
        self.parts.append(f"<p>{html.escape(text)}</p>")

    def terms(self, meanings: Mapping[str, str]) -> None:
        """Say what each of some words means."""
        lines = (f"<dt>{html.escape(term)}</dt><dd>{html.escape(text)}</dd>" for term, text in meanings.items())
        self.parts.append("<dl>" + "\n".join(lines) + "</dl>")

    def pre(self, text: str) -> None:
        """Add text whose line breaks and spaces stay."""
        self.parts.append(f"<pre>{html.escape(text)}</pre>")

    def table(self, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """Add a table of cells that are formatted already."""
        lines = [_row("th", header), *(_row("td", row) for row in rows)]
        self.parts.append("<table>" + "\n".join(lines) + "</table>")

    def figure(self, figure: Figure | SubFigure, name: str, caption: str) -> None:
        """Add a figure, embedded and as the file `name`.png, with its caption for eyes and screen readers."""
        path, root = self.folder / f"{name}.png", figure.figure
        root.savefig(path, dpi=150)
        plt.close(root)
        data = base64.b64encode(path.read_bytes()).decode()
        width = round(root.get_size_inches()[0] * 100)
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
        title, digest = html.escape(self.title), base64.b64encode(sha256(STYLE.encode()).digest()).decode()
        # The page loads nothing, runs nothing, and has no style but this one, whatever a text in it may hold.
        policy = f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            f'<meta http-equiv="Content-Security-Policy" content="{policy}"><title>{title}</title>'
            f"<style>{STYLE}</style></head>\n<body><h1>{title}</h1>\n" + "\n".join(self.parts) + "\n</body></html>\n"
        )


def _row(tag: str, cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"
