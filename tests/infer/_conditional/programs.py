"""Small models of every kind that a conditional guide takes, each with its data."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_vnd.distributions import NestedAutoregressive, NestedNormal, OrderedMask

__all__ = ["PROGRAMS", "Program"]

K = 3


class Program(NamedTuple):
    model: Callable[..., Any]

    @property
    def data(self) -> tuple[Tensor, Tensor]:
        return _data()


def _data(num_rows: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num_rows, K, generator=generator)
    return x, x[:, 0] - x[:, 1] + 0.5 * torch.randn(num_rows, generator=generator)


def regression(x: Tensor, y: Tensor) -> None:
    mask = pyro.sample("mask", OrderedMask(probs=torch.tensor([0.2, 0.3, 0.5])))
    w = pyro.sample("w", dist.Normal(torch.zeros(K), 1.0).to_event(1))
    sigma = pyro.sample("sigma", dist.LogNormal(0.0, 0.5))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ (mask * w), sigma), obs=y)


def features(x: Tensor, y: Tensor) -> None:
    """Weights in a plate of their own, and a simplex."""
    mask = pyro.sample("mask", OrderedMask.uniform(K))
    with pyro.plate("features", K):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
    shares = pyro.sample("shares", dist.Dirichlet(torch.ones(K)))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal((x * (mask * w * shares)).sum(-1), 0.5), obs=y)


def two_masks(x: Tensor, y: Tensor) -> None:
    """Whose lengths explain each other away."""
    first = pyro.sample("first", OrderedMask.uniform(K))
    w = pyro.sample("w", dist.Normal(1.0, 0.3))
    second = pyro.sample("second", OrderedMask.uniform(2))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(w * (first.sum(-1) + second.sum(-1) - 4), 0.7), obs=y)


def nested(x: Tensor, y: Tensor) -> None:
    w = pyro.sample("w", NestedNormal(torch.zeros(K), torch.ones(K), torch.zeros(K)))
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal((x * w).sum(-1), scale), obs=y)


def _previous(x: Tensor) -> tuple[Tensor, Tensor]:
    return 0.5 * torch.nn.functional.pad(x[..., :-1], (1, 0)), torch.ones_like(x)


def autoregressive(x: Tensor, y: Tensor) -> None:
    w = pyro.sample("w", NestedAutoregressive(_previous, torch.zeros(K)))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal((x * w).sum(-1), 0.5), obs=y)


def by_row(x: Tensor, y: Tensor) -> None:
    """A length and a latent of each row, beside a mask and a latent of all."""
    outer = pyro.sample("outer", OrderedMask.uniform(2))
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        mask = pyro.sample("mask", OrderedMask.uniform(K))
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mean + z * outer.sum(-1) + mask.sum(-1) - 2, 0.5), obs=y)


def nested_by_row(x: Tensor, y: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", NestedNormal(torch.zeros(K), torch.ones(K), torch.zeros(K)))
        pyro.sample("y", dist.Normal((x * z).sum(-1), 0.5), obs=y)


def local(x: Tensor, y: Tensor) -> None:
    """A latent of each row that knows the one length, of two dimensions, one of them a plate inside."""
    mask = pyro.sample("mask", OrderedMask.uniform(K))
    rows = pyro.plate("data", len(x), dim=-2)
    with rows, pyro.plate("units", K, dim=-1):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with rows:
        pyro.sample("y", dist.Normal((z * mask).sum(-1, keepdim=True), 0.5), obs=y.unsqueeze(-1))


def hidden(x: Tensor, y: Tensor) -> None:
    """Every second row is hidden, and a latent is scaled."""
    with pyro.poutine.scale(scale=0.5):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)), pyro.poutine.mask(mask=torch.arange(len(y)) % 2 == 0):
        mask = pyro.sample("mask", OrderedMask.uniform(K))
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mean + z + mask.sum(-1), 0.5), obs=y)


def separate(x: Tensor, y: Tensor) -> None:
    """So many masks that their lengths have no joint law."""
    total = torch.zeros(())
    for i in range(6):
        total = total + pyro.sample(f"mask{i}", OrderedMask.uniform(K)).sum(-1)
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(w[..., 0] + w[..., 1] * (total - 12) / 3, 0.7), obs=y)


PROGRAMS = {
    program.__name__: Program(program)
    for program in (
        regression,
        features,
        two_masks,
        nested,
        autoregressive,
        by_row,
        nested_by_row,
        local,
        hidden,
        separate,
    )
}
