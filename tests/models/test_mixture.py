"""The mixture finds how many components the data have, and scores a prefix of them as the smaller mixture."""

import pytest
import torch
from pyro import poutine
from pyro.distributions import Categorical, MixtureSameFamily, Normal
from torch import Tensor

from models.mixture import GaussianMixture, farthest_points
from pyro_vnd.infer import AutoNested, fit

K = 8
CENTRES = torch.tensor([[-5.0, -3.0], [0.0, 4.0], [5.0, -3.0], [-6.0, 4.0], [6.0, 4.0]], dtype=torch.float64)
WEIGHTS = torch.tensor([0.5, 0.3, 0.2, 0.3, 0.3], dtype=torch.float64)


def points(num_components: int, seed: int) -> Tensor:
    """200 points of the plane about the first centres, in shares that differ."""
    generator = torch.Generator().manual_seed(seed)
    component = torch.multinomial(WEIGHTS[:num_components], 200, replacement=True, generator=generator)
    return CENTRES[component] + 0.8 * torch.randn(200, 2, generator=generator, dtype=torch.float64)


def train(x: Tensor, start: int) -> tuple[AutoNested, float]:
    """Return the guide of a fit with the defaults, in 200 epochs, and its ELBO."""
    model = GaussianMixture(K)
    guide = model.guide_from(x, start)
    result = fit(model, guide, x, num_epochs=200, seed=start, progress=False)
    return guide, result.elbo[-1]


def found(guide: AutoNested) -> tuple[int, list[bool]]:
    """The number of components, and for each centre whether one of them is there."""
    count = int(guide.laws["mask"].mode.sum())
    distances = torch.cdist(CENTRES, guide.median()["means"][:count])
    return count, (distances.amin(-1) < 0.6).tolist()


@pytest.mark.parametrize("planted", [3, 5])
def test_finds_the_planted_components(planted: int):
    count, centres = found(train(points(planted, seed=1), start=0)[0])
    assert count == planted
    assert centres == [i < planted for i in range(5)]


@pytest.mark.slow
@pytest.mark.parametrize("planted", [3, 5])
def test_how_often(planted: int):
    """Eight data sets, three starts each: all 24 fits find three components, and all 24 find five."""
    fits = [[train(points(planted, seed), start) for start in range(3)] for seed in range(8)]
    counts = [[found(guide)[0] for guide, _ in starts] for starts in fits]
    kept = [found(max(starts, key=lambda fitted: fitted[1])[0])[0] for starts in fits]
    assert sum(count == planted for row in counts for count in row) >= 22
    assert kept == 8 * [planted]


def smaller_mixture(values: dict[str, Tensor], length: int) -> MixtureSameFamily:
    weights, means, scales = (values[name][:length] for name in ("weights", "means", "scales"))
    return MixtureSameFamily(Categorical(weights), Normal(means, scales).to_event(1))


@pytest.mark.parametrize("length", [1, 3, K])
def test_a_mask_leaves_the_smaller_mixture(length: int):
    x, model = points(3, seed=0), GaussianMixture(K)
    trace = poutine.trace(model).get_trace(x)
    values = {name: trace.nodes[name]["value"] for name in ("weights", "means", "scales")}
    values["mask"] = (torch.arange(K) < length).double()
    trace = poutine.trace(poutine.condition(model, values)).get_trace(x)
    score = trace.nodes["x"]["fn"].log_prob(x)
    torch.testing.assert_close(score, smaller_mixture(values, length).log_prob(x))
    # Power: one component more or less.
    other = smaller_mixture(values, 2 if length == 1 else length - 1)
    assert (score - other.log_prob(x)).abs().max() > 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_are_finite_with_dropped_and_with_empty_components(dtype: torch.dtype):
    """All but the first are dropped, and the second has a weight that underflowed."""
    x = points(3, seed=0).to(dtype)
    weights = torch.tensor([1.0] + [0.0] * (K - 1), dtype=dtype, requires_grad=True)
    means = x[:K].clone().requires_grad_()
    for length in (1, 2):
        values = {"weights": weights, "means": means, "mask": (torch.arange(K) < length).to(dtype)}
        trace = poutine.trace(poutine.condition(GaussianMixture(K), values)).get_trace(x)
        gradients = torch.autograd.grad(trace.nodes["x"]["fn"].log_prob(x).sum(), [weights, means])
        assert all(torch.isfinite(gradient).all() for gradient in gradients)
        assert (gradients[1][0] != 0).all()
        assert (gradients[1][length:] == 0).all()


def test_farthest_points_are_one_of_each_cluster():
    x = points(5, seed=0)
    for start in range(10):
        nearest = torch.cdist(farthest_points(x, 5, start), CENTRES).argmin(-1)
        assert sorted(nearest.tolist()) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: GaussianMixture(0), "`num_units` must be an integer >= 1; got 0"),
        (lambda: GaussianMixture(3, scale=0.0), "GaussianMixture: argument `scale` must be finite and > 0; got 0.0"),
        (lambda: GaussianMixture(3, spread=-1.0), "`spread`"),
        (lambda: GaussianMixture(3, concentration=torch.nan), "`concentration`"),
        (lambda: GaussianMixture(3)(torch.zeros(4)), r"`x` must be finite points of shape \(N, D\); got \(4,\)"),
        (lambda: GaussianMixture(3)(torch.full((4, 2), torch.nan)), r"got \(4, 2\) with NaN or inf"),
        (
            lambda: GaussianMixture(3).guide_from(torch.zeros(4, 2), start=4),
            "`start` must be from 0 to 3, a row of `x`; got 4",
        ),
    ],
)
def test_bad_input(call, message: str):
    with pytest.raises(ValueError, match=message):
        call()
