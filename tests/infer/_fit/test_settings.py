"""Weights of KLs, temperature and learning rate, and their schedules, in the steps of a fit."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from masked_mean import K, MaskedMeanGuide, N, make_net, masked_mean, still
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from pyro.nn import PyroModule
from torch.distributions import kl_divergence

from pyro_vnd.distributions import NestedNormal, OrderedMask
from pyro_vnd.infer import AutoNested, KLWeights, MaskSchedule, fit, linear
from pyro_vnd.nn import NestedClassifier


@pytest.mark.parametrize("batch_size", [None, 10])
def test_parts_are_exact_and_weights_are_in_the_objective_only(batch_size, y):
    guide = MaskedMeanGuide()
    arguments = {"batch_size": batch_size, "weights": KLWeights(latents=0.25, lengths=3.0), "optimizer": still}
    result = fit(masked_mean, guide, y, num_epochs=3, progress=False, **arguments)
    latents = kl_divergence(dist.Normal(guide.loc, 0.3), dist.Normal(0.0, 1.0)).sum().item() / N
    lengths = kl_divergence(OrderedMask(logits=guide.logits), OrderedMask.geometric(0.5, K)).item() / N
    assert result.kl_latents == pytest.approx([latents] * 3)
    assert result.kl_lengths == pytest.approx([lengths] * 3)
    assert result.kl == pytest.approx([0.25 * latents + 3 * lengths] * 3)
    assert [a - b for a, b in zip(result.log_likelihood, result.kl, strict=True)] == pytest.approx(result.elbo)
    assert f"KL of latents {latents:.4g}, of lengths {lengths:.4g}" in str(result)


def test_a_schedule_runs_from_the_first_step_to_the_last(y):
    result = fit(
        masked_mean,
        MaskedMeanGuide(),
        y,
        num_epochs=5,
        weights=KLWeights(latents=linear(0, 1)),
        optimizer=still,
        progress=False,
    )
    weights = [0, 0.25, 0.5, 0.75, 1]
    expected = [w * a + b for w, a, b in zip(weights, result.kl_latents, result.kl_lengths, strict=True)]
    assert result.kl == pytest.approx(expected)
    assert result.kl_latents[0] > 0  # also where its weight is zero


@pytest.mark.parametrize(
    "elbo", [TraceMeanField_ELBO, lambda: Trace_ELBO(num_particles=300, vectorize_particles=True, max_plate_nesting=1)]
)
def test_other_elbos_have_the_same_weights(elbo, y):
    arguments = {
        "num_epochs": 5,
        "weights": KLWeights(latents=0.25, lengths=3.0),
        "optimizer": still,
        "progress": False,
    }
    exact = fit(masked_mean, MaskedMeanGuide(), y, **arguments)
    other = fit(masked_mean, MaskedMeanGuide(), y, elbo=elbo(), **arguments)
    mean_kl = sum(other.kl) / 5
    if elbo is TraceMeanField_ELBO:
        assert other.elbo == pytest.approx(exact.elbo)
        assert other.log_likelihood == pytest.approx(exact.log_likelihood)
    assert mean_kl == pytest.approx(exact.kl[0], rel=0.05)
    assert math.isnan(other.kl_latents[-1])
    assert math.isnan(other.kl_lengths[-1])
    assert "KL of latents" not in str(other)


def test_the_weight_of_local_latents_is_one_of_its_own(y):
    class Guide(PyroModule):
        def __init__(self):
            super().__init__()
            self.loc = torch.nn.Parameter(torch.ones(K))

        def forward(self, rows):
            with pyro.plate("data", len(rows)):
                pyro.sample("code", NestedNormal(self.loc, torch.full((K,), 0.5), torch.arange(1.0, K + 1)))

    def model(rows):
        with pyro.plate("data", len(rows)):
            code = pyro.sample("code", NestedNormal(torch.zeros(K), torch.ones(K), torch.zeros(K)))
            pyro.sample("y", dist.Normal(code.sum(-1), 1.0), obs=rows)

    arguments = {"num_epochs": 5, "optimizer": still, "progress": False}
    rising = fit(model, Guide(), y, weights=KLWeights(local=linear(0, 1), lengths=3.0), **arguments)
    weights = [0, 0.25, 0.5, 0.75, 1]
    expected = [w * a + 3 * b for w, a, b in zip(weights, rising.kl_latents, rising.kl_lengths, strict=True)]
    assert rising.kl == pytest.approx(expected)
    assert min(rising.kl_latents[0], rising.kl_lengths[0]) > 0.1
    assert fit(model, Guide(), y, weights=KLWeights(latents=0.0), **arguments).kl == pytest.approx(
        [a + b for a, b in zip(rising.kl_latents, rising.kl_lengths, strict=True)]
    )


def test_a_large_length_weight_holds_the_law_at_the_prior(y):
    distances = []
    for weight in (1.0, 100.0):
        guide = AutoNested(masked_mean)
        fit(masked_mean, guide, y + 3, num_epochs=80, lr=0.1, weights=KLWeights(lengths=weight), progress=False)
        distances.append((guide.laws["mask"].probs - OrderedMask.geometric(0.5, K).probs).abs().max().item())
    assert distances[1] < 0.1 < distances[0]


def test_temperature_reaches_every_mask_and_stays(y, labelled):
    guide = AutoNested(masked_mean, latents="mean_field")
    fit(
        masked_mean,
        guide,
        y,
        num_epochs=5,
        schedule=MaskSchedule(1, 0, 0, temperature=linear(1.0, 0.5)),
        progress=False,
    )
    assert guide[0].temperature == 0.5
    net = make_net()
    fit(
        NestedClassifier(net), net.guide, labelled, num_epochs=5, schedule=MaskSchedule(temperature=0.7), progress=False
    )
    assert net.widths["hidden"].temperature == 0.7
