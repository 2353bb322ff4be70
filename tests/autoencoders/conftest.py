"""Real images for all tests of autoencoders."""

import pytest
import torch
from torch import Tensor

from models.datasets import Dataset, load


@pytest.fixture(scope="session")
def digits() -> Dataset:
    """Real digits in three parts, pixels in float32."""
    return load("digits")


@pytest.fixture
def images(digits: Dataset) -> Tensor:
    """Their training images in float64, shape (1079, 1, 8, 8)."""
    return digits.train.images.to(torch.float64)
