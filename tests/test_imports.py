"""Importing the library changes nothing for anybody else, and loads nothing heavy."""

import json
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pyro_vnd

SCRIPT = """
import json, os, pathlib, random, sys, warnings
import numpy, torch, pyro, pyro.distributions, pyro.infer, pyro.infer.autoguide, pyro.settings

def state():
    return {
        "torch validation": torch.distributions.Distribution._validate_args,
        "pyro settings, validation among them": repr(pyro.settings.get()),
        "parameter store": sorted(pyro.get_param_store().keys()),
        "default dtype": str(torch.get_default_dtype()),
        "default device": str(torch.get_default_device()),
        "gradients": torch.is_grad_enabled(),
        "anomaly detection": torch.is_anomaly_enabled(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "threads": torch.get_num_threads(),
        "matmul precision": torch.get_float32_matmul_precision(),
        "torch random state": torch.get_rng_state().tolist(),
        "numpy random state": repr(numpy.random.get_state()),  # noqa: NPY002
        "python random state": repr(random.getstate()),
        "environment": dict(os.environ),
        "warning filters": len(warnings.filters),
        "recursion limit": sys.getrecursionlimit(),
    }

def differences(before, after):
    return sorted(name for name in before if before[name] != after[name])

before = state()
import pyro_vnd
root = pathlib.Path(pyro_vnd.__path__[0])
for path in sorted(root.rglob("*.py")):
    parts = path.relative_to(root.parent).with_suffix("").parts
    if "diagnostics" not in parts:  # what plots
        __import__(".".join(parts).removesuffix(".__init__"))
changed, modules = differences(before, state()), sorted(sys.modules)

# The comparison itself would see a change.
torch.rand(1), numpy.random.rand(), random.random()
torch.set_default_dtype(torch.float64)
pyro.enable_validation(False)
os.environ["MPLBACKEND"] = "other"
pyro.param("p", torch.zeros(1))
print(json.dumps({"changed": changed, "modules": modules, "seen": differences(before, state())}))
"""


@pytest.fixture(scope="module")
def report():
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", SCRIPT], capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_global_state_stays_as_it_was(report):
    assert report["changed"] == []
    assert {  # what the comparison was then shown
        "default dtype",
        "environment",
        "numpy random state",
        "parameter store",
        "pyro settings, validation among them",
        "python random state",
        "torch random state",
        "torch validation",
    } <= set(report["seen"])


HEAVY = {
    "IPython",
    "arviz",
    "h5netcdf",
    "h5py",
    "matplotlib",
    "pandas",
    "pooch",
    "scipy",
    "sklearn",
    "torchmetrics",
    "torchvision",
    "xarray",
}


def test_heavy_modules_stay_unloaded(report):
    assert {"pyro_vnd.autoencoders.vae", "pyro_vnd.infer.fit"} <= set(report["modules"])
    assert HEAVY & {name.partition(".")[0] for name in report["modules"]} == set()


def test_packages_are_imported_when_they_are_used():
    code = """
import sys
import pyro_vnd
assert not {"torch", "pyro"} & set(sys.modules)
assert set(pyro_vnd.__all__) <= set(dir(pyro_vnd))
assert pyro_vnd.nn.narrow.__module__ == "pyro_vnd.nn.narrow"
assert "pyro_vnd.autoencoders" not in sys.modules
assert pyro_vnd.autoencoders.OrderedVAE
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=120)


def test_every_package_has_a_name_and_only_those():
    assert set(pyro_vnd.__all__) == {entry.name for entry in pkgutil.iter_modules(pyro_vnd.__path__) if entry.ispkg}
    with pytest.raises(AttributeError, match="module 'pyro_vnd' has no attribute 'models'"):
        _ = pyro_vnd.models


def test_version_is_that_of_the_newest_entry_of_the_changelog_and_of_the_citation():
    root = Path(__file__).parents[1]
    version, date = re.search(r"^## \[(\d[^]]*)\] - (.+)$", (root / "CHANGELOG.md").read_text(), re.MULTILINE).groups()
    assert version == pyro_vnd.__version__
    citation = (root / "CITATION.cff").read_text()
    assert f"\nversion: {version}\n" in citation
    assert f"\ndate-released: {date}\n" in citation
