"""Training as a whole: posteriors it finds, what it returns and leaves alone, and what it refuses."""

import math
import time

import pyro
import pyro.distributions as dist
import pytest
import torch
from masked_mean import K, MaskedMeanGuide, lengths, masked_mean, normal_mean
from pyro.infer import TraceEnum_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule
from torch import nn

from pyro_vnd.distributions import NestedNormal, OrderedMask
from pyro_vnd.infer import (
    AutoNested,
    KLWeights,
    LengthCollapseWarning,
    MaskSchedule,
    OptimizerSettings,
    cosine_to_zero,
    fit,
)

N = 60


@pytest.fixture
def y():
    return torch.randn(N) + 2


@pytest.mark.parametrize("batch_size", [None, 10])
def test_recovers_the_conjugate_posterior(batch_size, y):
    guide = AutoNormal(normal_mean)
    epochs = 600 if batch_size is None else 100
    arguments = {
        "num_epochs": epochs,
        "batch_size": batch_size,
        "lr": 0.05,
        "optimizer": OptimizerSettings(lr_schedule=cosine_to_zero()),
    }
    fit(normal_mean, guide, y, **arguments, progress=False)
    loc, scale = guide.locs.mu.item(), guide.scales.mu.item()
    exact_sd = (N + 1) ** -0.5
    assert abs(loc - y.sum().item() / (N + 1)) < 0.25 * exact_sd
    # Without the scale of the mini-batch the standard deviation would be 2.4 times as large.
    assert abs(scale / exact_sd - 1) < 0.15


def test_result_has_nats_per_row_and_lengths(y):
    guide = AutoNested(lengths)
    started = time.perf_counter()
    result = fit(lengths, guide, y, num_epochs=30, batch_size=20, lr=0.05, progress=False)
    assert 0.5 < result.seconds / (time.perf_counter() - started) <= 1
    assert result.num_steps == 90
    assert len(result.elbo) == len(result.kl) == len(result.mean_length["mask"]) == 30
    for elbo, log_likelihood, kl in zip(result.elbo, result.log_likelihood, result.kl, strict=True):
        assert elbo == pytest.approx(log_likelihood - kl)
    assert -4 < result.elbo[-1] < -1.5  # about the log-density of N(., 3), a row
    law = guide.laws["mask"]
    assert result.lengths["mask"].entropy == pytest.approx(law.entropy().item(), abs=0.1)
    assert "mask: E[L] =" in str(result)


def test_seed_repeats_a_fit_and_leaves_the_callers_random_numbers_alone(y):
    def train(seed):
        guide = AutoNested(lengths, latents="mean_field")
        fit(lengths, guide, y, num_epochs=5, batch_size=20, lr=0.05, seed=seed, progress=False)
        return guide.laws["mask"].probs

    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    first = train(0)
    assert torch.equal(torch.rand(2), expected)
    assert torch.equal(first, train(0))
    assert not torch.equal(first, train(1))


def test_enumerated_sites_train_exactly(y):
    # Three rows of weak data: the posterior of the length is spread, and enumeration finds it.
    few = y[:3]

    @pyro.infer.config_enumerate
    def guide_fn(rows):
        return pyro.sample("mask", OrderedMask(logits=module.logits))

    class Guide(PyroModule):
        def __init__(self):
            super().__init__()
            self.logits = nn.Parameter(torch.zeros(K))

        def forward(self, rows):
            return guide_fn(rows)

    module = Guide()
    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    result = fit(lengths, module, few, num_epochs=400, lr=0.05, elbo=elbo, progress=False)
    exact = torch.stack([dist.Normal(k, 3.0).log_prob(few).sum() for k in torch.arange(1.0, K + 1)]).softmax(-1)
    assert (module.logits.softmax(-1) - exact).abs().sum().item() / 2 < 0.01
    assert math.isnan(result.kl[-1])  # the parts are expectations that nobody sees


def test_a_second_call_goes_on(y):
    guide = AutoNormal(normal_mean)
    fit(normal_mean, guide, y, num_epochs=100, lr=0.05, progress=False)
    before = guide.locs.mu.item()
    fit(normal_mean, guide, y, num_epochs=1, lr=1e-4, progress=False)
    assert abs(guide.locs.mu.item() - before) < 1e-3


def test_the_global_store_stays_empty(y):
    fit(normal_mean, AutoNormal(normal_mean), y, num_epochs=2, progress=False)
    assert len(pyro.get_param_store()) == 0


def test_progress_shows_the_parts_and_the_length(y, capsys, wide_terminal):
    fit(lengths, AutoNested(lengths), y, num_epochs=2, lr=0.01)
    shown = capsys.readouterr().err
    for part in ("ELBO=", "log-lik=", "KL=", "E[L mask]="):
        assert part in shown


def test_a_law_that_is_given_does_not_collapse(y):
    """Warnings are errors here: a length that is prescribed is none that was learned."""

    class Guide(PyroModule):
        def __init__(self, probs):
            super().__init__()
            self.probs, self.loc = probs, nn.Parameter(torch.zeros(K))

        def forward(self, rows):
            with pyro.plate("data", len(rows)):
                pyro.sample("code", NestedNormal(self.loc, torch.ones(K), probs=self.probs))

    def model(rows):
        with pyro.plate("data", len(rows)):
            code = pyro.sample("code", NestedNormal(torch.zeros(K), torch.ones(K), torch.zeros(K)))
            pyro.sample("y", dist.Normal(code.sum(-1), 1.0), obs=rows)

    last = (torch.arange(K) == K - 1).to(y)
    fit(model, Guide(last), y, num_epochs=1, progress=False)
    with pytest.warns(LengthCollapseWarning, match="site 'code' has collapsed"):
        fit(model, Guide(nn.Parameter(last)), y, num_epochs=1, progress=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": N + 1}, "`batch_size` must be an integer from 1 to 60"),
        ({"num_epochs": 0}, "`num_epochs` must be an integer at least 1; got 0"),
        ({"weights": KLWeights(latents=-1.0)}, "`weights.latents` must be finite and >= 0"),
        ({"plate": "rows", "batch_size": 10}, r"no site of the model is in a plate named 'rows'.*\{'data': 10\}"),
        ({"weights": KLWeights(lengths=math.nan)}, "`weights.lengths` must be finite and >= 0; got nan"),
        ({"weights": KLWeights(latents=lambda t: -t)}, "`weights.latents` must be finite and >= 0; got -0.1"),
        (
            {"schedule": MaskSchedule(1, 0, 0, temperature=lambda t: 0.0)},
            "`schedule.temperature` must be finite",
        ),
        (
            {"schedule": MaskSchedule()},
            r"`schedule` needs a NestedNet in model or guide, or a NestedNormal or an OrderedMask in the plate .data.",
        ),
        (
            {"schedule": MaskSchedule(1, 0, 0, temperature=0.5)},
            "`schedule` has a temperature, which is for masks of AutoNested or a nested net; there are none",
        ),
        ({"resume": True}, "`resume` needs the `checkpoint`"),
        ({"checkpoint": "/nowhere/at/all.pt"}, "`checkpoint` is '/nowhere/at/all.pt', whose folder does not exist"),
    ],
)
def test_bad_arguments(arguments, message, y):
    with pytest.raises(ValueError, match=message):
        fit(masked_mean, MaskedMeanGuide(), y, **{"num_epochs": 11, "progress": False} | arguments)
