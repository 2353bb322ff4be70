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


@pytest.fixture
def wide_terminal(monkeypatch):
    """Some versions of tqdm cut a bar at 80 columns where nobody says how wide the terminal is."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("LINES", "40")
