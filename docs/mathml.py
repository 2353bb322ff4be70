"""Formulas as MathML, which browsers show without a script or a font from elsewhere."""

import re
from itertools import pairwise
from typing import Any
from xml.etree import ElementTree

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.util import logging

__all__ = ["visit_math"]

Element = ElementTree.Element

_OTHERS, _BARS = ("mo", "mspace", "mtext"), ("|", "\u2016")


def visit_math(translator: Any, node: nodes.math | nodes.math_block) -> None:
    """Write a formula; a command that is not known is a warning."""
    display = "block" if isinstance(node, nodes.math_block) else "inline"
    formula = ElementTree.fromstring(re.sub(r' xmlns="[^"]*"', "", convert(node.astext(), display=display)))
    for row in list(formula.iter("mrow")):
        _join_letters(row)
    for row in list(formula.iter("mrow")):
        _set_names_apart(row)
    markup = ElementTree.tostring(formula, encoding="unicode")
    for command in re.findall(r"\\[a-zA-Z]+", markup):
        logging.getLogger(__name__).warning("latex2mathml does not know %s", command, location=node)
    translator.body.append(f'<div class="math">{markup}</div>' if display == "block" else markup)
    raise nodes.SkipNode


def _join_letters(row: Element) -> None:
    """Make one name of upright letters, which come one by one."""
    last = None
    for child in list(row):
        if child.text == "~":  # \sim, of which latex2mathml makes a variable
            child.tag, child.text = "mo", "\u223c"
        if child.text == "|":  # a bracket, not a relation
            child.set("lspace", "0"), child.set("rspace", "0")
        if child.get("mathvariant") != "normal":
            last = None
        elif last is None:
            last = child
        else:
            last.text = f"{last.text}{child.text}"
            last.attrib.pop("mathvariant", None)  # names of several letters are upright by themselves
            row.remove(child)


def _set_names_apart(row: Element) -> None:
    """Put a thin space between a name, such as log, and what stands beside it, as TeX does: not before a bracket."""
    children = list(row)
    row[:] = children[:1]
    for left, right in pairwise(children):
        closed = left.tag not in _OTHERS or left.text in (*_BARS, ")", "]", "}")
        opened = right.tag not in _OTHERS or right.text in _BARS
        if closed and opened and (_is_name(left) or _is_name(right)):
            row.append(Element("mspace", width="0.167em"))
        row.append(right)


def _is_name(element: Element) -> bool:
    while element.tag in ("mrow", "msub", "msup", "msubsup", "munder", "mover") and len(element):
        element = element[0]
    return element.tag in ("mi", "mo") and len(element.text or "") > 1 and (element.text or "").isalpha()
