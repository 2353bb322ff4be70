"""The documentation has every public name and every page; `make docs` builds it, with warnings as errors."""

import importlib
import inspect
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = ("distributions", "nn", "infer", "autoencoders", "diagnostics")


@pytest.mark.parametrize("floor", FLOORS)
def test_reference_has_every_public_name(floor):
    page = (ROOT / "docs" / "reference" / f"{floor}.md").read_text()
    module = importlib.import_module(f"pyro_vnd.{floor}")
    # autodoc takes all of `__all__` that has a docstring; a constant has none, and an entry of its own.
    assert re.search(rf"^\.\. automodule:: pyro_vnd\.{floor}$\n```", page, re.MULTILINE)
    for name in module.__all__:
        obj = getattr(module, name)
        if inspect.isclass(obj) or inspect.isfunction(obj):
            assert (obj.__doc__ or "").strip(), f"{name} has no docstring"
        else:
            assert re.search(rf"^\.\. autodata:: pyro_vnd\.{floor}\.\w+\.{name}$", page, re.MULTILINE), name


def test_contents_have_every_page():
    contents = (ROOT / "docs" / "contents.md").read_text().split()
    pages = {path.relative_to(ROOT).with_suffix("").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    pages -= {"docs/contents"}
    assert {"docs/gotchas", "docs/reference/nn"} <= pages
    assert pages == {entry for entry in contents if entry.startswith("docs/")}
