"""Fixtures for tests that run Pyro's inference."""

from collections.abc import Iterator

import pyro
import pytest


@pytest.fixture(autouse=True)
def fresh_pyro() -> Iterator[None]:
    """Start from a fixed seed and an empty parameter store, with Pyro's checks of sites and shapes on."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    with pyro.validation_enabled():
        yield
    pyro.clear_param_store()
