"""Importing the library changes nothing for anybody else, and loads nothing heavy."""

import json
import subprocess
import sys

import pytest

SCRIPT = """
import json, os, pkgutil, random, sys, warnings
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
for package in pkgutil.iter_modules(pyro_vnd.__path__):
    if package.name != "diagnostics":  # the one that plots
        __import__(f"pyro_vnd.{package.name}")
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


@pytest.mark.parametrize("heavy", ["arviz", "matplotlib", "sklearn", "xarray", "pooch", "torchvision", "IPython"])
def test_heavy_modules_stay_unloaded(report, heavy):
    assert "pyro_vnd.distributions" in report["modules"]
    assert heavy not in {name.partition(".")[0] for name in report["modules"]}
