"""One temperature: recovered where it is known, the minimum of the NLL elsewhere."""

import pytest
import torch
from torch.distributions import Categorical
from torch.nn.functional import nll_loss

from pyro_vnd.diagnostics import fit_temperature, scale_temperature


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_a_known_temperature_is_recovered(temperature):
    logits = 3 * torch.randn(20_000, 5)
    labels = Categorical(logits=logits).sample()
    # Labels follow softmax(logits); what is given is as sharp as 1 / temperature makes it.
    given = (temperature * logits).log_softmax(-1)
    # Its standard error at n = 20,000 is about 1 %.
    assert fit_temperature(given, labels) == pytest.approx(temperature, rel=0.04)


def test_the_nll_is_smallest_there():
    log_probs = torch.randn(300, 4).mul(3).log_softmax(-1)
    labels = Categorical(logits=0.4 * log_probs).sample()
    best = fit_temperature(log_probs, labels)
    nll = {t: nll_loss(scale_temperature(log_probs, t), labels).item() for t in (best / 1.01, best, best * 1.01, 1.0)}
    assert min(nll, key=nll.get) == best


def test_separable_and_hopeless_data_go_to_the_ends():
    log_probs = torch.tensor([[0.9, 0.1], [0.2, 0.8]]).log()
    assert fit_temperature(log_probs, torch.tensor([0, 1])) == pytest.approx(1e-3, rel=1e-6)
    assert fit_temperature(log_probs, torch.tensor([1, 0])) == pytest.approx(1e3, rel=1e-6)


def test_zero_probabilities_are_fine():
    log_probs = torch.tensor([[1.0, 0.0], [0.6, 0.4], [0.7, 0.3]]).log()
    for labels in ([0, 0, 1], [1, 0, 1]):
        assert 0 < fit_temperature(log_probs, torch.tensor(labels)) <= 1000.001


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("inf"), float("nan")])
def test_temperatures_are_checked(temperature):
    with pytest.raises(ValueError, match="`temperature` must be positive and finite"):
        scale_temperature(torch.zeros(2, 2), temperature)
