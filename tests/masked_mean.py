"""A conjugate mean, a law of lengths, a mean of masked weights with its guide, and a small nested net to fit."""

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import nn

from pyro_vnd.distributions import OrderedMask, OrderedMaskStraightThrough
from pyro_vnd.nn import NestedLayer, NestedNet, Width

N, K = 40, 4


def normal_mean(y):
    """Conjugate: mu ~ N(0, 1), y_n ~ N(mu, 1), so mu | y ~ N(sum y / (N + 1), 1 / (N + 1))."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def lengths(y):
    """The length is all that is latent: length ~ U{1, ..., K}, y_n ~ N(length, 3)."""
    mask = pyro.sample("mask", OrderedMask.uniform(K))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mask.sum(-1), 3.0), obs=y)


def masked_mean(y):
    mask = pyro.sample("mask", OrderedMask.geometric(0.5, K))
    w = pyro.sample("w", dist.Normal(torch.zeros(K), 1.0).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal((mask * w).sum(-1).unsqueeze(-1), 1.0), obs=y)


class MaskedMeanGuide(PyroModule):
    """A guide with exact KLs."""

    def __init__(self):
        super().__init__()
        self.loc, self.logits = nn.Parameter(torch.ones(K)), nn.Parameter(torch.linspace(0, 1, K))

    def forward(self, y):
        pyro.sample("mask", OrderedMaskStraightThrough(0.2, logits=self.logits))
        pyro.sample("w", dist.Normal(self.loc, 0.3).to_event(1))


def make_net(mask_per="example", seed=0):
    torch.manual_seed(seed)
    hidden = Width("hidden", 8, num_blocks=4, init=OrderedMask(logits=torch.tensor([1.0, 0.0, -1.0, 0.5])))
    first = NestedLayer(nn.Linear(3, 8), outputs=hidden)
    last = NestedLayer(nn.Linear(8, 2), inputs=hidden)
    return NestedNet(nn.Sequential(first, nn.ReLU(), last), mask_per=mask_per)


def still(parameters, lr):
    """An optimiser that does not move."""
    return torch.optim.SGD(parameters, lr=0.0)
