"""Training: the scale of mini-batches, what is recorded, seeds, and what happens when something is wrong."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceEnum_ELBO
from pyro.infer.autoguide import AutoNormal

from pyro_vnd.distributions import OrderedMask
from pyro_vnd.infer import AutoNested, LengthCollapseWarning, NonFiniteLossError, fit, module_local_params
from pyro_vnd.infer._fit.handlers import ElboMonitor, ScaleToDataset

N, K = 60, 4


def normal_mean(y):
    """Conjugate: mu ~ N(0, 1), y_n ~ N(mu, 1), so mu | y ~ N(sum y / (N + 1), 1 / (N + 1))."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def lengths(y):
    mask = pyro.sample("mask", OrderedMask.uniform(K))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mask.sum(-1), 3.0), obs=y)


@pytest.fixture
def y():
    return torch.randn(N) + 2


@pytest.mark.parametrize("batch_size", [None, 10])
def test_recovers_the_conjugate_posterior(batch_size, y):
    guide = AutoNormal(normal_mean)
    epochs = 1500 if batch_size is None else 250
    fit(normal_mean, guide, y, num_epochs=epochs, batch_size=batch_size, lr=0.02, progress=False)
    fit(normal_mean, guide, y, num_epochs=epochs, batch_size=batch_size, lr=0.001, progress=False)
    loc, scale = guide.locs.mu.item(), guide.scales.mu.item()
    exact_sd = (N + 1) ** -0.5
    assert abs(loc - y.sum().item() / (N + 1)) < 0.25 * exact_sd
    # Without the scale of the mini-batch the standard deviation would be 2.4 times as large.
    assert abs(scale / exact_sd - 1) < 0.15


def test_mini_batch_losses_average_to_the_full_loss(y):
    # With the same draw of mu, the mean over a partition into batches is the full loss, exactly.
    guide = AutoNormal(normal_mean)
    guide(y)  # lazy: the first call would draw more
    elbo = Trace_ELBO()

    def loss(rows, scale):
        pyro.set_rng_seed(1)
        with scale:
            return elbo.differentiable_loss(normal_mean, guide, rows).item()

    full = loss(y, ScaleToDataset("data", N, N))
    parts = [loss(rows, ScaleToDataset("data", N, 15)) for rows in y.split(15)]
    assert full == pytest.approx(sum(parts) / len(parts), rel=1e-12)
    unscaled = [loss(rows, ScaleToDataset("data", 15, 15)) for rows in y.split(15)]
    assert abs(full - sum(unscaled) / len(unscaled)) > 10


def test_a_plate_that_knows_the_full_size_is_not_scaled_twice(y):
    def model(rows):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", N, subsample_size=len(rows)):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=rows)

    with ScaleToDataset("data", N, 15):
        trace = pyro.poutine.trace(model).get_trace(y[:15])
    assert trace.nodes["y"]["scale"] == N / 15


def test_kl_weight_scales_latents_outside_the_plate_only(y):
    with ScaleToDataset("data", N, N, kl_weight=0.25):
        trace = pyro.poutine.trace(normal_mean).get_trace(y)
    assert trace.nodes["mu"]["scale"] == 0.25
    assert trace.nodes["y"]["scale"] == 1


def test_parts_of_the_elbo(y):
    # One mask, exact KL: ELBO = log-likelihood of the drawn length - KL(q || p), both known.
    guide = AutoNested(lengths)
    monitor = ElboMonitor()
    elbo = pyro.infer.TraceMeanField_ELBO()
    guide(y)
    with torch.no_grad():
        guide[0].logits_unconstrained.copy_(torch.tensor([0.0, 1.0, 2.0, 0.5]))
    with monitor:
        loss = elbo.differentiable_loss(lengths, guide, y).item()
    probs = guide.laws["mask"].probs
    exact_kl = (probs * (probs.log() - math.log(1 / K))).sum().item()
    assert monitor.log_likelihood + loss == pytest.approx(exact_kl, rel=1e-9)
    candidates = [dist.Normal(float(k), 3.0).log_prob(y).sum().item() for k in range(1, K + 1)]
    assert min(abs(monitor.log_likelihood - c) for c in candidates) < 1e-9


def test_result_has_nats_per_row_and_lengths(y):
    guide = AutoNested(lengths)
    result = fit(lengths, guide, y, num_epochs=30, batch_size=20, lr=0.05, progress=False)
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
        guide = AutoNested(lengths)
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

    class Guide(pyro.nn.PyroModule):
        def __init__(self):
            super().__init__()
            self.logits = torch.nn.Parameter(torch.zeros(K))

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


def test_progress_shows_the_parts_and_the_length(y, capsys):
    fit(lengths, AutoNested(lengths), y, num_epochs=2, lr=0.01)
    shown = capsys.readouterr().err
    for part in ("ELBO=", "log-lik=", "KL=", "E[L mask]="):
        assert part in shown


def test_collapse_warns():
    y = torch.full((500,), 3.0)

    def model(rows):
        mask = pyro.sample("mask", OrderedMask.uniform(K))
        with pyro.plate("data", len(rows)):
            pyro.sample("y", dist.Normal(mask.sum(-1), 0.5), obs=rows)

    guide = AutoNested(model)
    with pytest.warns(LengthCollapseWarning, match=r"site 'mask' has collapsed \(E\[L\] = 3.0"):
        fit(model, guide, y, num_epochs=400, lr=0.1, progress=False)
    assert guide.laws["mask"].mode.sum() == 3


class _Breaks(pyro.nn.PyroModule):
    """A model whose log-likelihood becomes infinite, or its gradient NaN, on the third call."""

    def __init__(self, how):
        super().__init__()
        self.how, self.calls = how, 0

    def forward(self, y):
        self.calls += 1
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        if self.calls > 2:
            # sqrt has an infinite slope at zero: a finite value whose gradient is 0 * inf.
            mu = mu * torch.inf if self.how == "loss" else mu + 0 * (0 * mu).abs().sqrt()
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Laplace(mu, 1.0), obs=y)


@pytest.mark.parametrize(("how", "message"), [("loss", "'y'"), ("gradient", r"gradient of .*mu")])
def test_non_finite_loss_stops_and_names_the_culprit(how, message, y):
    model = _Breaks(how)
    guide = AutoNormal(model)
    with pyro.validation_enabled(False), pytest.raises(NonFiniteLossError, match=message):
        fit(model, guide, y, num_epochs=10, progress=False)
    with module_local_params(guide):
        assert all(torch.isfinite(p).all() for p in guide.parameters())


def test_an_invalid_distribution_names_the_site(y):
    def model(rows):
        scale = pyro.sample("scale", dist.Normal(-5.0, 0.1))
        with pyro.plate("data", len(rows)):
            pyro.sample("y", dist.Normal(0.0, scale.detach() + 5.5 if model.ok else scale), obs=rows)

    model.ok = True
    guide = AutoNormal(model)
    with module_local_params(guide):
        guide(y)
    calls = iter(range(100))

    def breaking(rows):
        model.ok = next(calls) < 2
        return model(rows)

    with pytest.raises(NonFiniteLossError, match="after site 'scale'"):
        fit(breaking, guide, y, num_epochs=10, progress=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"data": [torch.ones(3), torch.ones(4)]}, r"same number of rows, at least 1; got \[\(3,\), \(4,\)\]"),
        ({"data": torch.ones(0)}, "at least 1"),
        ({"data": torch.tensor([1.0, math.nan])}, r"`data\[0\]` of shape \(2,\) must be finite"),
        ({"data": [1.0]}, r"`data\[0\]` must be a tensor"),
        ({"batch_size": N + 1}, "`batch_size` must be from 1 to 60"),
        ({"num_epochs": 0}, "`num_epochs` must be at least 1"),
        ({"kl_weight": -1.0}, "`kl_weight` must be finite and >= 0"),
        ({"plate": "rows", "batch_size": 10}, r"no site of the model is in a plate named 'rows'.*\{'data': 10\}"),
    ],
)
def test_bad_arguments(arguments, message, y):
    arguments = {"data": y, **arguments}
    with pytest.raises(ValueError, match=message):
        fit(normal_mean, AutoNormal(normal_mean), arguments.pop("data"), progress=False, **arguments)


def test_global_parameters_are_refused(y):
    def guide(rows):
        pyro.sample("mu", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))

    with pytest.raises(ValueError, match="'loc' belongs to no nn"):
        fit(normal_mean, guide, y, progress=False)
