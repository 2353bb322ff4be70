"""Models and notebooks are written as a user would write them: with the public names of the library alone."""

import re
from importlib import import_module
from pathlib import Path

import pytest

import pyro_vnd

ROOT = Path(__file__).parents[2]
FILES = [*sorted((ROOT / "models").rglob("*.py")), *sorted((ROOT / "notebooks").glob("*.py"))]
FROM = re.compile(r"^[ >]*from (pyro_vnd[\w.]*) import (?:\(([^)]*)\)|(.+))", re.MULTILINE)  # doctests have ">>> "
MODULE = re.compile(r"^[ >]*import (pyro_vnd\.[\w.]+)", re.MULTILINE)
PUBLIC = {f"pyro_vnd.{name}": set(import_module(f"pyro_vnd.{name}").__all__) for name in pyro_vnd.__all__}
PUBLIC["pyro_vnd"] = set(pyro_vnd.__all__)


def not_public(text):
    """Return what a text imports of the library that is in no package's `__all__`."""
    found = [module for module in MODULE.findall(text) if module not in PUBLIC]
    for module, several, one in FROM.findall(text):
        names = [part.split("#")[0].split(" as ")[0].strip() for part in re.split(r"[,\n]", several or one)]
        found += [f"{module}.{name}" for name in names if name and name not in PUBLIC.get(module, ())]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_public_names_are_imported(path):
    assert not_public(path.read_text()) == []


def test_other_names_are_found():
    text = """
from pyro_vnd.nn import Axis, nest  # comment
from pyro_vnd.diagnostics import (
    loo,
    weights_hash as hashed,
)
    >>> from pyro_vnd.nn.narrow import narrow
    import pyro_vnd.infer, pyro_vnd
import pyro_vnd._compat
from pyro_vnd import nn, _sizes
"""
    assert not_public(text) == [
        "pyro_vnd._compat",
        "pyro_vnd.nn.Axis",
        "pyro_vnd.diagnostics.weights_hash",
        "pyro_vnd.nn.narrow.narrow",
        "pyro_vnd._sizes",
    ]
