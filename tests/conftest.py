"""Fixtures for the tests proper; doctests keep torch's default dtype, as users have it. And profiles of Hypothesis."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

# What Hypothesis keeps for itself goes where pytest keeps its own; examples are not kept but written into the tests.
os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", str(Path(__file__).parents[1] / ".pytest_cache" / "hypothesis"))
# A time a case says nothing where several processes share a machine.
_always = settings(
    database=None,
    deadline=None,
    phases=(Phase.explicit, Phase.generate, Phase.shrink),
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
settings.register_profile("suite", _always, derandomize=True, max_examples=50)
settings.register_profile("long", _always, derandomize=False, max_examples=1000)  # of `make properties`
settings.load_profile("suite")


@pytest.fixture(autouse=True)
def double_precision() -> Iterator[None]:
    """Compare against oracles in float64, so that tolerances speak of mathematics and not of rounding."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)
