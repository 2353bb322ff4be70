"""Docstrings, which are Google's style with Markdown in it, for Sphinx, which reads reStructuredText."""

import importlib
import re
import textwrap
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx

__all__ = ["convert_docstring", "remove_object", "skip_fields"]

_PAGES = [f"pyro_vnd.{floor}" for floor in ("distributions", "nn", "infer", "autoencoders", "diagnostics")]
_PUBLIC = {name: f"{page}.{name}" for page in _PAGES for name in importlib.import_module(page).__all__}

_MARKUP = re.compile(
    r"""(?P<kept>^\ *>>>.*(?:\n\ *\S.*)* | \*\w[^*\n]*\w\* | ^\ *\*+\w+:)  # doctests, emphasis, *args:
      | ^(?P<pad>\ *)(?P<lead>\S.*:)(?P<block>\n\n(?P=pad)\ {4}\S.*(?:\n(?:(?P=pad)\ {4}.*)?$)*)
      | ^(?P<indent>\ *)\$\$(?P<display>[^$]+)\$\$(?P<stop>[.,;]?)
      | ^(?P<margin>\ *)(?P<table>\|.*\|(?:\n\ *\|.*\|)*)
      | `(?P<code>[^`]+)`
      | \$(?P<math>[^$\n]+(?:\n[^$\n]+)?)\$
      | (?P<special>[\\|*] | (?<=\w)_(?!\w) | (?<=:\ [A-Z])\.$)  # the last: "K." would begin a numbered list
    """,
    re.MULTILINE | re.VERBOSE,
)


def convert_docstring(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Convert a docstring in place, before napoleon reads its sections."""
    lines[:] = _to_rst("\n".join(lines)).split("\n")
    if what in ("attribute", "property"):
        lines[:0] = ["..", ""]  # an empty comment: napoleon takes what precedes a colon in the first line for a type


def _to_rst(markdown: str) -> str:
    """Rewrite code blocks, formulas and code; names that have an entry become links to it."""

    def replace(match: re.Match[str]) -> str:
        found = match.groupdict()
        if found["kept"]:
            return match[0]
        if found["block"]:
            return f"{found['pad']}{_to_rst(found['lead'])}:{found['block']}"
        if found["display"]:
            return f"\n{found['indent']}.. math:: {' '.join(found['display'].split())}{found['stop']}\n"
        if found["table"]:
            return textwrap.indent(_to_list_table(found["table"]), found["margin"])
        if found["special"]:
            return "\\" + found["special"]
        if found["math"]:
            text = f":math:`{' '.join(found['math'].split())}`"
        elif found["code"] in _PUBLIC:
            text = f":py:obj:`~{_PUBLIC[found['code']]}`"
        else:
            text = f"``{' '.join(found['code'].split())}``"
        # Markup has to stand apart from letters: "`Normal`s".
        before, after = markdown[: match.start()][-1:], markdown[match.end() :][:1]
        return ("\\ " if before.isalnum() else "") + text + ("\\ " if after.isalnum() else "")

    return _MARKUP.sub(replace, markdown)


def _to_list_table(table: str) -> str:
    rows = [[cell.strip() for cell in row.strip(" |").split("|")] for row in table.split("\n")]
    rows = [row for row in rows if not set("".join(row)) <= set("-:")]
    lines = ["   * - " + "\n     - ".join(map(_to_rst, row)) for row in rows]
    return "\n".join(["", ".. list-table::", "   :header-rows: 1", "", *lines, ""])


def skip_fields(app: Sphinx, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    """Leave out the fields of named tuples: the section "Attributes" of the docstring has them."""
    return True if type(obj).__name__ == "_tuplegetter" else None


def remove_object(app: Sphinx, doctree: nodes.document) -> None:
    """Remove the lines that name `object` as the only base of a class."""
    for paragraph in list(doctree.findall(nodes.paragraph)):
        if paragraph.astext() == "Bases: object":
            paragraph.parent.remove(paragraph)
