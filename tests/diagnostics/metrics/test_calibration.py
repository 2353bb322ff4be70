"""Calibration errors against other libraries and by construction, and a temperature that is known."""

import pytest
import torch
from torch.distributions import Categorical
from torch.nn.functional import nll_loss
from torchmetrics.functional.classification import multiclass_calibration_error

from pyro_vnd.diagnostics import classification_metrics, fit_temperature, scale_temperature
from pyro_vnd.diagnostics.metrics.calibration import calibration_bins


def test_a_calibrated_predictor_scores_near_zero_and_an_overconfident_one_does_not():
    logits = 2 * torch.randn(20_000, 5)
    labels = Categorical(logits=logits).sample()
    right = classification_metrics(logits.softmax(-1), labels)
    wrong = classification_metrics((2 * logits).softmax(-1), labels)
    for name in ("ece", "adaptive_ece"):
        # Sampling error of 15 bins at n = 20,000 adds up to about .008.
        assert right[name] < 0.02
        assert wrong[name] > 0.05


def test_equal_mass_bins_see_what_equal_widths_average_away():
    # All confidences lie in (.94, 1): one bin of equal width, in which too bold and too shy cancel.
    confidence = torch.cat([torch.full((500,), 0.99), torch.full((500,), 0.95)])
    right = torch.cat([torch.arange(500) < 475, torch.arange(500) < 495])
    probs = torch.stack([confidence, 1 - confidence], -1)
    metrics = classification_metrics(probs, (~right).long())
    assert metrics["ece"] == pytest.approx(0, abs=1e-6)
    assert metrics["adaptive_ece"] == pytest.approx(0.04, abs=1e-6)


def test_equal_mass_bins_hold_the_same_number_of_rows():
    probs = torch.randn(3000, 5).mul(3).softmax(-1)
    bins = calibration_bins(probs, torch.randint(5, (3000,)), equal_mass=True)
    assert bins.count.tolist() == [200] * 15
    assert (bins.confidence.diff() > 0).all()


def test_adaptive_ece_does_not_depend_on_the_order_of_rows_with_ties():
    probs = torch.tensor([0.6, 0.9, 1.0])[torch.randint(3, (400,))]
    probs, labels = torch.stack([probs, 1 - probs], -1), (torch.rand(400) < 0.3).long()
    shuffle = torch.randperm(400)
    first, second = (classification_metrics(probs[i], labels[i])["adaptive_ece"] for i in (torch.arange(400), shuffle))
    assert first == pytest.approx(second, rel=1e-12)


def test_bins_give_the_error_of_torchmetrics():
    probs, labels = torch.randn(2000, 3).mul(2).softmax(-1), torch.randint(3, (2000,))
    expected = multiclass_calibration_error(probs, labels, 3, n_bins=15).item()
    assert calibration_bins(probs, labels).error == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_certainty_belongs_to_the_last_bin(dtype):
    # One bin with mean confidence .985 and accuracy .5; as two bins the error would be (1 + .03) / 2.
    probs = torch.tensor([[1.0, 0.0], [0.97, 0.03]], dtype=dtype)
    labels = torch.tensor([1, 0])
    assert classification_metrics(probs, labels)["ece"] == pytest.approx(0.485, abs=1e-6)
    assert calibration_bins(probs, labels).error == pytest.approx(0.485, abs=1e-6)


def test_many_rows_add_up():
    probs = torch.tensor([0.987, 0.013], dtype=torch.float32).expand(200_000, 2)
    labels = (torch.arange(200_000) % 1000 >= 987).int()
    assert classification_metrics(probs, labels)["ece"] == pytest.approx(0, abs=1e-7)
    summed_in_float32 = multiclass_calibration_error(probs, labels, 2, n_bins=15).item()
    assert summed_in_float32 > 1e-4  # what this guards against


def test_probabilities_that_round_above_one_are_not_taken_for_logits():
    exact = torch.tensor([[1.0, 0.0], [0.97, 0.03]], dtype=torch.float32)
    rounded = exact.clone()
    rounded[0, 0] = 1.0000001
    labels = torch.tensor([0, 0])
    assert classification_metrics(rounded, labels)["ece"] == pytest.approx(
        classification_metrics(exact, labels)["ece"], abs=1e-6
    )


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
