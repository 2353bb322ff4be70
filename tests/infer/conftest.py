"""Data of the fits in these tests."""

import pytest
import torch
from masked_mean import N


@pytest.fixture
def y():
    return torch.randn(N) + 1


@pytest.fixture
def labelled():
    x = torch.randn(N, 3)
    return x, (x.sum(-1) > 0).long()
