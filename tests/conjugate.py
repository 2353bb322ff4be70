"""A Normal mean with a Normal prior: posterior, predictions and evidence are known."""

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from scipy import stats

Y = torch.tensor([0.3, -1.2, 0.8, 2.0, 0.1], dtype=torch.float64)
VARIANCE = 1 / (len(Y) + 1)
MEAN = Y.sum() * VARIANCE


def conjugate(y=Y):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        return pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def posterior(y=Y):
    pyro.sample("z", dist.Normal(MEAN, VARIANCE**0.5))


def shifted(y=Y):
    pyro.sample("z", dist.Normal(MEAN + VARIANCE**0.5, VARIANCE**0.5))


def log_normal(x, mean, variance):
    return stats.norm.logpdf(x, mean, np.sqrt(variance))
