"""The stopping rule holds the rate of false stops that it states, and ends a real fit near its optimum."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from masked_mean import normal_mean
from pyro.infer.autoguide import AutoNormal
from scipy import stats

from pyro_vnd.distributions import OrderedMask
from pyro_vnd.infer import AutoNested, Callback, KLWeights, MaskSchedule, Plateau, fit, linear
from pyro_vnd.infer.plateau import _student_quantile
from pyro_vnd.nn import NestedClassifier, nest

RULE = Plateau(window=50, tolerance=0.01, alpha=0.05)
REPLICATES, EPOCHS = 200, 1000


def traces(rise, noise, autocorrelation, seed=0, window=RULE.window):
    """ELBOs that rise by `rise` a window, with stationary AR(1) noise of standard deviation `noise`."""
    rng = np.random.default_rng(seed)
    errors = rng.normal(size=(REPLICATES, EPOCHS))
    for epoch in range(1, EPOCHS):
        fresh = (1 - autocorrelation**2) ** 0.5 * errors[:, epoch]
        errors[:, epoch] = autocorrelation * errors[:, epoch - 1] + fresh
    return rise / window * np.arange(EPOCHS) + noise * errors


def stops(rule, elbos):
    """After how many epochs each is stopped; infinity where it never is."""
    return np.array([rule.first(elbo.tolist()) or math.inf for elbo in elbos])


def windows(elbo):
    """Gain of the last window and its error if epochs were independent."""
    old, new = np.array(elbo[-2 * RULE.window :]).reshape(2, -1)
    return new.mean() - old.mean(), math.sqrt((old.var(ddof=1) + new.var(ddof=1)) / RULE.window)


def rate(rule, elbos):
    """Share of the ELBOs that a rule stops at the end of some window."""
    ends = range(2 * RULE.window, EPOCHS + 1, RULE.window)
    return np.mean([any(rule(elbo[:end].tolist()) for end in ends) for elbo in elbos])


# Noise that hides the rise of a window, and less of it, where the test has no such excuse.
@pytest.mark.parametrize("noise", [0.003, 0.005, 0.01, 0.03])
@pytest.mark.parametrize(("autocorrelation", "window"), [(0.0, 50), (0.5, 50), (0.9, 100)])
def test_an_elbo_that_still_rises_by_the_tolerance_is_stopped_at_the_stated_rate(noise, autocorrelation, window):
    rule = Plateau(window, RULE.tolerance, RULE.alpha)
    stopped = np.isfinite(stops(rule, traces(RULE.tolerance, noise, autocorrelation, window=window)))
    # At a rate of .05, more than 17 of 200 have a probability of 1 %.
    assert stopped.sum() <= 17


def test_power_rules_that_want_less_stop_what_rises():
    def no_significant_gain(elbo):
        gain, error = windows(elbo)
        return gain < 1.645 * error

    def epochs_are_independent(elbo):
        gain, error = windows(elbo)
        return abs(gain) + 1.96 * error < RULE.tolerance

    assert rate(no_significant_gain, traces(RULE.tolerance, 0.03, 0.5)) > 0.95
    assert rate(epochs_are_independent, traces(RULE.tolerance, 0.005, 0.9)) > 0.5


@pytest.mark.parametrize(
    ("noise", "autocorrelation", "within"), [(0.005, 0.0, 100), (0.005, 0.5, 100), (0.003, 0.9, 300)]
)
def test_a_stationary_elbo_is_stopped_soon(noise, autocorrelation, within):
    # The first test is after two windows.
    assert (stops(RULE, traces(0.0, noise, autocorrelation)) <= within).mean() >= 0.95


def test_a_falling_elbo_is_not_at_rest():
    assert not np.isfinite(stops(RULE, traces(-2 * RULE.tolerance, 0.005, 0.5))).any()


def test_noise_beyond_the_tolerance_never_looks_like_rest():
    assert np.isfinite(stops(RULE, traces(0.0, 0.1, 0.0))).mean() < 0.01


def test_gain_and_margin_have_the_stated_error():
    # The margin of the first test is the quantile of Student's law at .025 with 8 degrees of freedom.
    elbos = traces(0.0, 0.01, 0.0)[:, :100]
    gains, margins = np.transpose([RULE.gain(elbo.tolist()) for elbo in elbos])
    assert gains.std() == pytest.approx(0.01 * math.sqrt(2 / 50), rel=0.15)
    assert (gains > margins).mean() <= 0.06
    assert (gains > margins / 2).mean() > 0.06


@pytest.mark.parametrize("level", [0.025, 1e-3, 1e-5])
def test_student_quantile(level):
    assert _student_quantile(level, 8) == pytest.approx(stats.t.isf(level, 8), rel=0.02)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window": 12}, "`window` must be a multiple of 5 from 10 on; got 12"),
        ({"window": 5}, "`window` must be a multiple of 5 from 10 on; got 5"),
        ({"tolerance": 0.0}, "`tolerance` must be finite and > 0; got 0.0"),
        ({"alpha": 0.5}, r"`alpha` must be in \(0, 0.5\); got 0.5"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        Plateau(**arguments)


def test_an_elbo_without_noise_has_a_gain_without_error():
    gain, margin = Plateau(window=10).gain([1.0] * 10 + [1.25] * 10)
    assert (gain, margin) == (0.25, 0.0)
    assert Plateau(window=10, tolerance=0.3)([1.0] * 10 + [1.25] * 10)
    assert not Plateau(window=10, tolerance=0.2)([1.0] * 10 + [1.25] * 10)


def test_gain_wants_two_windows():
    with pytest.raises(ValueError, match="two windows, 20 epochs; got 19"):
        Plateau(window=10).gain([0.0] * 19)


@pytest.fixture
def y():
    return torch.randn(100) + 5


def train(y, **arguments):
    guide = AutoNormal(normal_mean)
    return fit(normal_mean, guide, y, **{"num_epochs": 600, "lr": 0.05, "progress": False, **arguments})


def evidence(y):
    """Exact log-evidence in nats per row: the ELBO of the best guide, for the posterior is a Normal."""
    covariance = torch.eye(len(y)) + torch.ones(len(y), len(y))
    return dist.MultivariateNormal(torch.zeros(len(y)), covariance).log_prob(y).item() / len(y)


def test_a_fit_stops_near_its_optimum_and_nothing_else_changes(y):
    result, long = train(y, callbacks=[RULE]), train(y)
    stopped = len(result.elbo)
    assert (result.converged, long.converged) == (True, False)
    assert len(long.elbo) == 600
    assert stopped == RULE.first(long.elbo) == result.num_steps <= 350
    assert result.elbo == long.elbo[:stopped]
    assert f"{stopped} epochs, converged, " in str(result)
    # Means over the last 50 epochs and over the second half of the long run, with errors of about .001.
    at_end, optimum = np.mean(result.elbo[-50:]), np.mean(long.elbo[300:])
    assert at_end == pytest.approx(optimum, abs=RULE.tolerance)
    assert at_end == pytest.approx(evidence(y), abs=RULE.tolerance)
    # Power: half as long was not enough.
    assert np.mean(result.elbo[stopped // 2 - 50 : stopped // 2]) < optimum - 5 * RULE.tolerance


class Watched(Plateau):
    """A rule that keeps what it is asked about, and never holds."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __call__(self, elbo):
        self.seen += [[*elbo]] if elbo else []
        return False


def test_epochs_in_which_weights_still_change_do_not_count(y):
    # With steps 0 to 19 the weight is one from t = 10 / 19 >= 1/2 on.
    weights = KLWeights(latents=linear(0.0, 1.0, warmup=0.5))
    result = train(y, num_epochs=20, weights=weights, callbacks=[watch := Watched()])
    assert watch.seen == [result.elbo[10 : 10 + n] for n in range(1, 11)]
    # Of steps 0 to 39 from 20 on, with which epoch 5 begins; from 21 on it would be epoch 6.
    how = {"num_epochs": 10, "batch_size": 25, "callbacks": [watch := Watched()]}
    result = train(y, weights=KLWeights(lengths=linear(0, 1, 0.5)), **how)
    assert watch.seen == [result.elbo[5 : 5 + n] for n in range(1, 6)]
    watch.seen.clear()
    train(y, weights=KLWeights(lengths=linear(0, 1, 0.53)), **how)
    assert len(watch.seen) == 4
    result = train(y, num_epochs=20, weights=KLWeights(local=linear(0.0, 1.0)), callbacks=[watch := Watched()])
    assert watch.seen == [result.elbo[-1:]]


def test_masks_and_temperatures_count_too(y):
    def model(rows):
        mask = pyro.sample("mask", OrderedMask.uniform(3))
        with pyro.plate("data", len(rows)):
            pyro.sample("y", dist.Normal(mask.sum(-1), 1.0), obs=rows)

    guide = AutoNested(model, latents="mean_field")
    masks = MaskSchedule(1, 0, 0, temperature=linear(1, 0.2, 0.5))
    fit(model, guide, y, num_epochs=20, schedule=masks, callbacks=[watch := Watched()], progress=False)
    assert len(watch.seen[-1]) == 10
    net = nest(torch.nn.Sequential(torch.nn.Linear(1, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2)), torch.zeros(1, 1))
    data, masks = (y[:, None], (y > 5).long()), MaskSchedule(anneal=0.75)
    fit(
        NestedClassifier(net),
        net.guide,
        data,
        num_epochs=21,
        schedule=masks,
        callbacks=[watch := Watched()],
        progress=False,
    )
    assert len(watch.seen[-1]) == 6


def test_a_stopped_fit_is_finished_for_its_checkpoint(y, tmp_path):
    path = tmp_path / "fit.pt"
    arguments = {"num_epochs": 60, "checkpoint": path}
    stop = Plateau(window=10, tolerance=10.0)
    first = train(y, callbacks=[stop], **arguments)
    assert first.converged
    assert len(first.elbo) < 60
    written = path.stat().st_mtime_ns
    second = train(y, callbacks=[stop], resume=True, **arguments)
    assert second == first
    assert path.stat().st_mtime_ns == written
    # Without the rule it goes on to the end.
    third = train(y, resume=True, **arguments)
    assert len(third.elbo) == 60
    assert not third.converged


def test_an_interrupted_fit_stops_where_an_uninterrupted_one_does(y, tmp_path):
    rule, path = Plateau(window=10, tolerance=10.0), tmp_path / "fit.pt"
    whole = train(y, callbacks=[rule])

    class Interrupted(Exception):
        pass

    class Interrupt(Callback):
        def on_epoch(self, run):
            if run.epoch == len(whole.elbo) - 5:
                raise Interrupted

    with pytest.raises(Interrupted):
        train(y, callbacks=[rule, Interrupt()], checkpoint=path)
    result = train(y, callbacks=[rule], checkpoint=path, resume=True)
    assert result.elbo == whole.elbo
    assert result.converged
