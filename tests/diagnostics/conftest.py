"""What tests of diagnostics share: a nested net and an autoencoder of real digits, and closed figures."""

import matplotlib.pyplot as plt
import pytest
import torch
from linear_vae import linear_vae
from torch import nn

from models.datasets import load
from pyro_vnd.infer import KLWeights, fit
from pyro_vnd.nn import NestedClassifier, nest


@pytest.fixture(scope="session")
def digits():
    return load("digits", flatten=True)


@pytest.fixture(scope="session")
def trained(digits):
    """In float32, as users have it: fixtures of a session come before the one that sets float64."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        plain = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10))
        net = nest(plain, torch.zeros(1, 64), num_blocks=8)
        options = {
            "num_epochs": 40,
            "batch_size": 256,
            "lr": 0.03,
            "weights": KLWeights(latents=0.05),
            "progress": False,
        }
        fit(NestedClassifier(net), net.guide, digits.train, **options)
    return net


@pytest.fixture(scope="session")
def linear_model(digits):
    """An autoencoder whose code is the first four principal components, in order."""
    return linear_vae(digits.test.images.double(), 4).model


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")
