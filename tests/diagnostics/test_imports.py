"""Diagnostics load what they need when it is needed, and say what to install where it is missing."""

import ast
import importlib
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import pyro_vnd.diagnostics as diagnostics

ROOT = Path(__file__).parents[2]
EXTRA = ["arviz", "arviz_stats", "h5netcdf", "h5py", "matplotlib", "pandas", "torchmetrics", "xarray"]
NAMES = {  # in this order, and what each may add to what is loaded
    "classification_metrics": set(),
    "fit_temperature": set(),
    "plot_laws": {"matplotlib"},
    "plot_samples": set(),
    "sbc": {"xarray", "pandas"},
    "plot_elbo": set(),
    "plot_widths": set(),
    "ood_metrics": {"torchmetrics"},
    "evaluate": set(),
    "to_arviz": {"arviz", "arviz_stats", "h5netcdf", "h5py"},
}
LOADED = """
import json, sys
report = []
for name in ["__doc__", *{names}]:
    getattr(__import__("pyro_vnd.diagnostics", fromlist=["__doc__"]), name)
    report.append([name, sorted({{module.partition(".")[0] for module in sys.modules}} & set({extra}))])
print(json.dumps(report))
"""
REFUSED = """
import json, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name in refused:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

def attempt(statement):
    try:
        exec(statement, {{}})
    except Exception as error:
        return [type(error).__name__, str(error), getattr(error, "name", None)]

sys.meta_path.insert(0, Refuse())
refused = set({extra})
report = {{name: attempt(f"from pyro_vnd.diagnostics import {{name}}") for name in ["*", *{names}]}}
refused = {{"sklearn", "torch.utils.flop_counter"}}
report["probe"] = attempt(
    "import torch, pyro_vnd.diagnostics.metrics.prefix_scores as scores; scores.LinearProbe(*[torch.ones(2, 2)] * 4)"
)
report["other"] = attempt("from pyro_vnd.diagnostics import net_cost")
print(json.dumps(report))
"""


def run(script):
    """Run a script in a fresh interpreter; return what it prints, read as JSON."""
    script = script.format(names=list(NAMES), extra=EXTRA)
    command = [sys.executable, "-W", "ignore", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def refused():
    """What names raise where packages are missing: type, message and name of the error."""
    return run(REFUSED)


def test_every_name_is_that_of_its_module():
    source = Path(diagnostics.__file__).read_text()
    block = next(node for node in ast.parse(source).body if isinstance(node, ast.If))
    typed = {alias.name: node.module for node in block.body for alias in node.names}
    assert typed == diagnostics._MODULES  # what checkers see
    assert sorted(typed) == diagnostics.__all__
    for name, module in typed.items():
        assert getattr(diagnostics, name) is getattr(importlib.import_module(module), name)
    assert set(diagnostics.__all__) <= set(dir(diagnostics))


def test_all_names_come_with_a_star():
    names = {}
    exec("from pyro_vnd.diagnostics import *", names)
    assert set(diagnostics.__all__) <= set(names)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match=r"module 'pyro_vnd\.diagnostics' has no attribute 'plot_nothing'"):
        _ = diagnostics.plot_nothing
    with pytest.raises(ImportError, match="cannot import name 'plot_nothing'"):
        exec("from pyro_vnd.diagnostics import plot_nothing")


def test_a_name_loads_no_more_than_it_needs():
    (_, first), *others = run(LOADED)
    assert first == []
    allowed = set()
    for (name, packages), (expected, more) in zip(others, NAMES.items(), strict=True):
        allowed |= more
        assert name == expected
        assert set(packages) <= allowed, name
    assert {"arviz", "matplotlib", "torchmetrics", "xarray"} <= set(packages)  # power: all are loaded in the end


@pytest.mark.parametrize(
    ("name", "package"),
    [("plot_laws", "matplotlib"), ("sbc", "xarray"), ("ood_metrics", "torchmetrics"), ("to_arviz", "arviz")],
)
def test_a_missing_package_is_named_with_what_brings_it(refused, name, package):
    advice = 'pip install "pyro-vnd[diagnostics]"'
    message = f"pyro_vnd.diagnostics.{name} needs the package {package!r}: {advice}"
    assert refused[name] == ["ImportError", message, package]


def test_what_needs_nothing_works_without_the_extra(refused):
    assert refused["classification_metrics"] is refused["fit_temperature"] is None
    assert refused["*"][0] == "ImportError"


def test_other_missing_packages_are_not_taken_for_the_extra(refused):
    assert refused["other"] == [
        "ModuleNotFoundError",
        "No module named 'torch.utils.flop_counter'",
        "torch.utils.flop_counter",
    ]


def test_a_probe_says_how_to_get_scikit_learn(refused):
    kind, message, package = refused["probe"]
    assert (kind, package) == ("ImportError", "sklearn")
    assert 'pip install "pyro-vnd[diagnostics]"' in message
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert any(line.startswith("scikit-learn") for line in extras["diagnostics"])
