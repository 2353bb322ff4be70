"""What the tests of nested nets share: passes at the posterior mean, and real digits."""

from collections.abc import Iterator
from dataclasses import replace

import pyro
import pytest
import torch
from torch import Tensor

from models import datasets
from pyro_vnd.nn import NestedNet


@pytest.fixture(autouse=True)
def fresh_start() -> Iterator[None]:
    torch.manual_seed(0)
    pyro.clear_param_store()
    yield
    pyro.clear_param_store()


@pytest.fixture
def mean_pass():
    """Outputs of a cut net at the mean of its weights."""

    def run(net: NestedNet, x: Tensor, width, sliced: bool = False) -> Tensor:
        with torch.no_grad(), net.cut(width, sliced=sliced):
            net._draw_masks("posterior", len(x), None)
            try:
                return net.net(x)
            finally:
                net._release()

    return run


@pytest.fixture(scope="session")
def digits() -> datasets.Dataset:
    """Digits as vectors, in float64 as everything else here."""
    data = datasets.load("digits", flatten=True)
    parts = {
        name: (part := getattr(data, name))._replace(images=part.images.double())
        for name in ("train", "validation", "test")
    }
    return replace(data, **parts)
