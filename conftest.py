"""Fixtures for every test, the doctests of pyro_vnd and README.md among them."""

import os
from collections.abc import Iterator

import pyro
import pytest
import torch

# An environment variable, as importing matplotlib here would hide that pyro_vnd must not import it.
os.environ["MPLBACKEND"] = "Agg"


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips what needs a GPU where there is none."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(autouse=True)
def clean_state() -> Iterator[None]:
    """Same random numbers, an empty parameter store, denormal numbers and Pyro's validation for each test."""
    pyro.set_rng_seed(0)  # seeds torch, numpy and random
    pyro.clear_param_store()
    torch.set_flush_denormal(False)  # benchmarks, whose commands are tested, turn it on for the whole process
    with pyro.validation_enabled(True):
        yield
