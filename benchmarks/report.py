"""The pages of docs/benchmarks, their figures and the table of the README, from results: nothing is measured.

    python -m benchmarks.report                           all of them, from the committed results
    python -m benchmarks.report nested_nets               one page and its figures
    python -m benchmarks.report nested_nets --json FILE   print the tables of another result, and write nothing

The prose of a page is the page's own; what stands between its two marks is replaced.
"""

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from benchmarks import (
    cascade_report,
    demo_report,
    fast_paths,
    language_model,
    learned_lengths_report,
    masks,
    matryoshka,
    nest_cost,
    nested_nets_report,
    nested_speed,
    net_law,
    order_law,
    ordered_latents_report,
    ordered_speed,
    peers,
    scaling,
    soak,
)
from benchmarks.record import measured
from models.nets import coverage

__all__ = ["PAGES", "Page", "fill"]

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
IMAGES = ROOT / "docs" / "images"
BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"


@dataclass(frozen=True)
class Page:
    """A page that quotes results.

    Attributes:
        path: The page.
        results: Names of the committed results that it quotes.
        tables: Makes its tables from them, in Markdown.
        figures: Makes its figures, by name, from the first of them.
        dated: Whether a line on when and with what each was measured stands before the tables.
    """

    path: Path
    results: tuple[str, ...]
    tables: Callable[..., str]
    figures: Callable[[dict[str, Any]], Mapping[str, Figure]] | None = None
    dated: bool = True

    def read_results(self) -> list[dict[str, Any]]:
        """Read the committed results."""
        return [json.loads((RESULTS / f"{name}.json").read_text()) for name in self.results]

    def content(self, *results: dict[str, Any]) -> str:
        """Return what stands between the marks of the page: where each result is from, and the tables."""
        lines = [measured(result) for result in results] if self.dated else []
        return "\n\n".join([*lines, self.tables(*results)])


def _page(name: str, *results: str, **makers: Any) -> Page:
    return Page(ROOT / "docs" / "benchmarks" / f"{name}.md", results or (name,), **makers)


PAGES = {
    "masks": _page("masks", tables=masks.speed_tables),
    "gradient": _page("gradient", "masks", tables=masks.gradient_tables),
    "nested_nets": _page("nested_nets", tables=nested_nets_report.markdown, figures=nested_nets_report.figures),
    "language_model": _page("language_model", tables=language_model.markdown, figures=language_model.figures),
    "cascade": _page("cascade", tables=cascade_report.markdown, figures=cascade_report.figures),
    "net_law": _page("net_law", "net_law", "net_law_tries", tables=net_law.markdown),
    "nested_speed": _page("nested_speed", tables=nested_speed.markdown),
    "nest_cost": _page("nest_cost", tables=nest_cost.markdown),
    "scaling": _page("scaling", "scaling", "nest_cost", tables=scaling.markdown),
    "order_law": _page("order_law", tables=order_law.markdown),
    "ordered_latents": _page(
        "ordered_latents", tables=ordered_latents_report.markdown, figures=ordered_latents_report.figures
    ),
    "learned_lengths": _page(
        "learned_lengths", tables=learned_lengths_report.markdown, figures=learned_lengths_report.figures
    ),
    "ordered_speed": _page(
        "ordered_speed", "ordered_speed", "ordered_speed_two_threads", tables=ordered_speed.markdown
    ),
    "fast_paths": _page("fast_paths", tables=fast_paths.markdown),
    "peers": _page("peers", "peers", "nest_cost", tables=peers.markdown),
    "soak": _page("soak", tables=soak.markdown),
    "matryoshka": _page("matryoshka", tables=matryoshka.markdown),
    "demo": _page("demo", "demo_digits", tables=demo_report.markdown),
    "coverage": _page("coverage", tables=coverage.markdown),
    "README": Page(ROOT / "README.md", ("nested_nets",), nested_nets_report.summary, dated=False),
}


def fill(text: str, tables: str) -> str:
    """Return a page with these tables between its marks.

    Raises:
        ValueError: If the page does not have each mark once, in order.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end) or BEGIN in rest or END in after:
        raise ValueError(f"a page must have {BEGIN} and {END} once each, in this order")
    return f"{before}{begin}\n\n{tables.strip()}\n\n{end}{after}"


def main(argv: list[str] | None = None) -> None:
    """Write pages and figures, or print the tables of another result."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.partition("\n")[0])
    parser.add_argument("pages", nargs="*", metavar="PAGE", help=f"some of {', '.join(PAGES)}; by default all")
    parser.add_argument("--json", type=Path, metavar="FILE", help="print the tables of this result instead")
    args = parser.parse_args(argv)
    if unknown := [name for name in args.pages if name not in PAGES]:
        parser.error(f"unknown page {unknown[0]}: choose from {', '.join(PAGES)}")
    if args.json:
        if len(args.pages) != 1:
            parser.error("--json FILE needs one page, whose tables are printed")
        print(PAGES[args.pages[0]].content(json.loads(args.json.read_text())))
        return
    for name in args.pages or PAGES:
        page = PAGES[name]
        results = page.read_results()
        page.path.write_text(fill(page.path.read_text(), page.content(*results)))
        for stem, figure in (page.figures(results[0]) if page.figures else {}).items():
            figure.savefig(IMAGES / f"{stem}.png", dpi=150)
            plt.close(figure)


if __name__ == "__main__":
    main()
