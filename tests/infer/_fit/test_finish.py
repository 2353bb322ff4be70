"""What a fit finds out at its end, and what it does where nothing was said."""

import math
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

from pyro_vnd.distributions import OrderedMask
from pyro_vnd.infer import AutoNested, KLWeights, MaskSchedule, PoorFitWarning, fit
from pyro_vnd.infer._fit import finish
from pyro_vnd.infer._fit.finish import estimate_khat
from pyro_vnd.infer.result import FitResult, LearnedLaw, LengthSummary

K = 4


def regression(x: Tensor, y: Tensor) -> None:
    mask = pyro.sample("mask", OrderedMask.uniform(K))
    w = pyro.sample("w", dist.Normal(torch.zeros(K), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ (mask * w), 1.0), obs=y)


def local(y: Tensor) -> None:
    pyro.sample("mask", OrderedMask.uniform(K))
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def correlated_data(num_rows: int = 60) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num_rows, 1, generator=generator) + 0.3 * torch.randn(num_rows, K, generator=generator)
    return x, x[:, 0] - x[:, 1] + torch.randn(num_rows, generator=generator)


def exact_law(x: Tensor, y: Tensor) -> Tensor:
    evidence = []
    for k in range(1, K + 1):
        covariance = torch.eye(len(x)) + x[:, :k] @ x[:, :k].T
        evidence.append(dist.MultivariateNormal(torch.zeros(len(x)), covariance).log_prob(y))
    return torch.stack(evidence).softmax(0)


@pytest.mark.parametrize("batch_size", [None, 20, 25])
def test_the_law_is_settled_from_all_rows(batch_size):
    """Also where mini-batches leave some out; total variation to the closed form."""
    x, y = correlated_data()
    guide = AutoNested(regression)
    result = fit(regression, guide, (x, y), num_epochs=300, batch_size=batch_size, progress=False)
    exact = exact_law(x, y)
    assert (guide.laws["mask"].probs - exact).abs().sum() / 2 < (0.01 if batch_size is None else 0.05)
    assert (1 / K - exact).abs().sum() / 2 > 0.2  # power: the prior
    assert result.lengths["mask"].mean == pytest.approx(guide.laws["mask"].mean_length.item())


def test_a_new_fit_of_conditional_latents_has_500_epochs_and_others_100():
    x, y = correlated_data(10)
    assert len(fit(regression, AutoNested(regression), (x, y), progress=False).elbo) == 500
    mean_field = AutoNested(regression, latents="mean_field")
    assert len(fit(regression, mean_field, (x, y), progress=False).elbo) == 100


def test_khat_says_which_guide_is_near_the_posterior(monkeypatch):
    monkeypatch.setattr(finish, "_SECONDS", 60.0)  # the machine may be busy
    x, y = correlated_data()
    with warnings.catch_warnings():
        warnings.simplefilter("error", PoorFitWarning)
        near = fit(regression, AutoNested(regression), (x, y), progress=False)
    assert near.khat < 0.7
    assert "k-hat of the guide" in repr(near)
    with pytest.warns(PoorFitWarning, match=r"k-hat of the guide is .*latents='conditional'"):
        far = fit(regression, AutoNested(regression, latents="mean_field"), (x, y), num_epochs=20, progress=False)
    assert far.khat > 0.7
    with pytest.warns(PoorFitWarning) as caught:
        fit(regression, AutoNested(regression), (x, y), num_epochs=2, progress=False)
    assert "latents='conditional'" not in str(caught[0].message)  # it is so already


@pytest.mark.filterwarnings("error")
def test_khat_is_left_out_where_it_is_not_to_be_had():
    x, y = correlated_data(20)
    for arguments in ({"batch_size": 5}, {"weights": KLWeights(latents=0.5)}):
        guide = AutoNested(regression, latents="mean_field")
        assert fit(regression, guide, (x, y), num_epochs=2, progress=False, **arguments).khat is None
    assert fit(local, AutoNested(local, latents="mean_field"), y, num_epochs=2, progress=False).khat is None


@pytest.mark.parametrize(("shape", "scale"), [(0.2, 1.0), (0.5, 1.0), (1.0, 1.0)])
def test_khat_is_the_shape_of_a_pareto_tail(shape: float, scale: float):
    """Of 20,000 draws; .1 is three times its spread over seeds."""
    generator = np.random.default_rng(0)
    weights = 0.01 + scale * ((1 - generator.random(20_000)) ** -shape - 1) / shape
    assert estimate_khat(torch.as_tensor(weights).log()) == pytest.approx(shape, abs=0.1)


def test_khat_of_weights_that_say_nothing():
    assert estimate_khat(torch.zeros(100)) == 0
    assert estimate_khat(1e-3 * torch.randn(100)) == 0
    assert estimate_khat(torch.tensor([math.nan] + [0.0] * 99)) == math.inf


def law_at(mean: float) -> LearnedLaw:
    return LearnedLaw(OrderedMask(logits=-0.5 * (torch.arange(1.0, 9.0) - mean) ** 2))


def test_a_result_names_laws_that_still_move():
    result = FitResult(elbo=[0.0] * 40, log_likelihood=[0.0] * 40, kl=[0.0] * 40, kl_latents=[0.0] * 40)
    result.kl_lengths = [0.0] * 40
    result.lengths = {name: LengthSummary.of(*law_at(4.0)) for name in ("rests", "shakes", "moves")}
    generator = np.random.default_rng(0)
    result.mean_length = {
        "rests": [4.0] * 40,
        "shakes": (4 + 0.3 * generator.standard_normal(40)).tolist(),
        "moves": (2 + 0.05 * np.arange(40)).tolist(),
    }
    assert [name for name in result.lengths if result.still_moves(name)] == ["moves"]
    assert "still moving in the last tenth of the epochs: the mean length of moves; train for longer" in repr(result)


@pytest.mark.parametrize("elbo", [Trace_ELBO(), TraceMeanField_ELBO()])
@pytest.mark.filterwarnings("ignore:.*enumerat")
def test_objectives_that_cannot_train_conditional_latents(elbo):
    x, y = correlated_data(10)
    message = f"`elbo` must be NestedELBO.*or TraceEnum_ELBO.*got {type(elbo).__name__}.*latents='mean_field'"
    with pytest.raises(ValueError, match=message):
        fit(regression, AutoNested(regression, latents="conditional"), (x, y), num_epochs=1, elbo=elbo, progress=False)
    open_guide = AutoNested(regression)
    with pytest.warns(UserWarning, match=f"mean field, as {type(elbo).__name__} draws lengths"):
        fit(regression, open_guide, (x, y), num_epochs=1, elbo=elbo, progress=False)
    assert open_guide.conditional is None
    mean_field = AutoNested(regression, latents="mean_field")
    fit(regression, mean_field, (x, y), num_epochs=1, elbo=elbo, progress=False)


@pytest.mark.parametrize("schedule", [MaskSchedule(), MaskSchedule(1, 0, 0, temperature=0.5)])
def test_masks_that_are_not_drawn_have_neither_a_schedule_nor_a_temperature(schedule):
    x, y = correlated_data(10)
    with pytest.raises(ValueError, match="argument `schedule` is for masks that are drawn"):
        fit(regression, AutoNested(regression), (x, y), num_epochs=1, schedule=schedule, progress=False)


@pytest.mark.filterwarnings("error")
def test_a_conditional_law_on_one_length_is_no_collapse():
    y = torch.full((200,), 3.0)

    def model(y: Tensor) -> None:
        mask = pyro.sample("mask", OrderedMask.uniform(K))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mask.sum(-1), 0.5), obs=y)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = fit(model, AutoNested(model), y, num_epochs=2, progress=False)
    assert result.lengths["mask"].entropy < 1e-3


def test_other_autoguides_are_checked_too():
    def model(y: Tensor) -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(a, 1.0), obs=y)

    y = torch.zeros(1)
    with pytest.warns(PoorFitWarning):  # 0.1 where the posterior has 0.7
        result = fit(model, AutoNormal(model, init_scale=0.1), y, num_epochs=1, progress=False)
    assert result.khat > 0.7
    assert fit(model, AutoNormal(model, init_scale=0.7), y, num_epochs=300, progress=False).khat < 0.7
