"""Fixtures for the tests proper; doctests keep torch's default dtype, as users have it."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def double_precision() -> Iterator[None]:
    """Compare against oracles in float64, so that tolerances speak of mathematics and not of rounding."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)
