"""The factor model finds the rank of data, and the space they lie in."""

import pytest
import torch
from pyro import poutine
from pyro.distributions import MultivariateNormal
from torch import Tensor

from models.datasets import load
from models.factor_model import FactorModel
from pyro_vnd.infer import AutoNested, fit

K, NUM_DATA, NUM_FEATURES, NOISE = 8, 100, 15, 0.5


def simulate(rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """Data of a rank, and their loadings."""
    generator = torch.Generator().manual_seed(seed)
    loadings = torch.randn(NUM_FEATURES, rank, generator=generator)
    x = torch.randn(NUM_DATA, rank, generator=generator) @ loadings.T
    x += NOISE * torch.randn(NUM_DATA, NUM_FEATURES, generator=generator)
    return x - x.mean(0), loadings


def learned(x: Tensor, model: FactorModel, num_epochs: int = 200, **kwargs) -> AutoNested:
    guide = AutoNested(model)
    fit(model, guide, x, num_epochs=num_epochs, progress=False, **kwargs)
    return guide


def rank_of(guide: AutoNested) -> int:
    return int(guide.laws["mask"].mode.sum())


@pytest.mark.parametrize("rank", [3, 5])
def test_finds_the_planted_rank(rank: int):
    x, loadings = simulate(rank, seed=0)
    guide = learned(x, FactorModel(K))
    median = guide.median()
    assert rank_of(guide) == rank
    assert median["noise"] == pytest.approx(NOISE, rel=0.15)
    # The kept columns span the space of the planted ones, up to some degrees.
    kept, planted = (torch.linalg.qr(columns)[0] for columns in (median["loadings"][:, :rank], loadings))
    assert torch.linalg.svdvals(kept.T @ planted).min() > 0.97


@pytest.mark.slow
@pytest.mark.parametrize("rank", [3, 5])
def test_how_often(rank: int):
    """Eight data sets and starts: all of them find the rank."""
    ranks = [rank_of(learned(simulate(rank, seed)[0], FactorModel(K), seed=seed)) for seed in range(8)]
    assert ranks.count(rank) >= 7


@pytest.mark.slow
def test_digits():
    """Real digits want every component they may have; made of their first six and noise, they want six."""
    x = load("digits", flatten=True).train.images.double()
    x = x - x.mean(0)
    axes = torch.linalg.eigh(x.T @ x)[1][:, -6:]
    six = x @ axes @ axes.T + 0.15 * torch.randn(x.shape)
    model = FactorModel(16, keep=0.9, loading_scale=0.3)
    settings = {"num_epochs": 40, "batch_size": 128}
    assert rank_of(learned(x, model, **settings)) == 16
    assert rank_of(learned(six, model, **settings)) == 6


@pytest.mark.parametrize("length", [1, 2, 4])
def test_a_mask_leaves_the_model_of_a_lower_rank(length: int):
    x = simulate(3, seed=0)[0]
    loadings = torch.randn(NUM_FEATURES, 4)
    values = {"mask": (torch.arange(4) < length).double(), "loadings": loadings, "noise": torch.tensor(0.7)}
    site = poutine.trace(poutine.condition(FactorModel(4), values)).get_trace(x).nodes["x"]
    covariance = loadings[:, :length] @ loadings[:, :length].T + 0.49 * torch.eye(NUM_FEATURES)
    torch.testing.assert_close(
        site["fn"].log_prob(x), MultivariateNormal(torch.zeros(NUM_FEATURES), covariance).log_prob(x)
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: FactorModel(-1), "`num_units` must be an integer >= 1; got -1"),
        (lambda: FactorModel(3, keep=0.0), "`p` must be strictly between 0 and 1"),
        (lambda: FactorModel(3, loading_scale=0.0), "`loading_scale` must be finite and > 0; got 0.0"),
        (lambda: FactorModel(3)(torch.zeros(4)), r"`x` must be finite, of shape \(N, D\); got \(4,\)"),
        (lambda: FactorModel(3)(torch.full((4, 2), torch.inf)), r"got \(4, 2\) with NaN or inf"),
    ],
)
def test_bad_input(call, message: str):
    with pytest.raises(ValueError, match=message):
        call()
