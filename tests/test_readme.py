"""The README is short, and what it shows can be had from an installed package; tests/benchmarks has its table."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
INSTALLED = {"pyro", "pyro_vnd", "sklearn", "torch"}


def test_it_is_short():
    assert len(README.splitlines()) <= 150


@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_are_short(example):
    lines = [line for line in example.splitlines() if line.strip()]
    assert lines
    assert all(line.startswith(">>> ") for line in lines[:1])
    assert len(lines) <= 12


def test_examples_need_no_checkout():
    modules = re.findall(r"^>>> from ([\w.]+) import ", README, re.MULTILINE)
    for names in re.findall(r"^>>> import (.+)$", README, re.MULTILINE):
        modules += [name.strip().split()[0] for name in names.split(",")]
    assert {module.partition(".")[0] for module in modules} == INSTALLED


def test_images_and_links_exist():
    paths = re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", README)
    found = [path for path in paths if not path.startswith("https://")]
    assert any(path.endswith(".png") for path in found)
    assert [path for path in found if not (ROOT / path).is_file()] == []
