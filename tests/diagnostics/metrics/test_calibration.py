"""Metrics of class probabilities: hand-computed values, other libraries, predictors calibrated by construction."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import brier_score_loss
from torchmetrics.functional.classification import multiclass_calibration_error

from pyro_vnd.diagnostics import classification_metrics
from pyro_vnd.diagnostics.metrics.calibration import calibration_bins


def test_hand_computed():
    probs = torch.tensor([[0.9, 0.1], [0.7, 0.3], [0.2, 0.8], [0.4, 0.6]])
    metrics = classification_metrics(probs, torch.tensor([0, 1, 1, 1]))
    assert metrics["accuracy"] == 0.75
    assert metrics["accuracy_se"] == pytest.approx(math.sqrt(0.75 * 0.25 / 4))
    assert metrics["nll"] == pytest.approx(-sum(map(math.log, (0.9, 0.3, 0.8, 0.6))) / 4)
    errors = np.array([2 * 0.1**2, 2 * 0.7**2, 2 * 0.2**2, 2 * 0.4**2])
    assert metrics["brier"] == pytest.approx(errors.mean())
    assert metrics["brier_se"] == pytest.approx(errors.std() / 2)
    # Four bins of one row each: |1 - .9|, |0 - .7|, |1 - .8|, |1 - .6|.
    assert metrics["ece"] == pytest.approx((0.1 + 0.7 + 0.2 + 0.4) / 4)
    assert metrics["adaptive_ece"] == pytest.approx((0.1 + 0.7 + 0.2 + 0.4) / 4)


def test_brier_score_is_scikit_learns():
    probs = torch.randn(200, 4).softmax(-1)
    labels = torch.randint(4, (200,))
    expected = brier_score_loss(labels.numpy(), probs.numpy(), labels=range(4))
    assert classification_metrics(probs, labels)["brier"] == pytest.approx(expected)


def test_a_calibrated_predictor_scores_near_zero_and_an_overconfident_one_does_not():
    logits = 2 * torch.randn(20_000, 5)
    labels = torch.distributions.Categorical(logits=logits).sample()
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


def test_a_certain_mistake_is_finite():
    metrics = classification_metrics(torch.tensor([[1.0, 0.0]]), torch.tensor([1]))
    assert math.isfinite(metrics["nll"])
    assert metrics["brier"] == pytest.approx(2)


@pytest.mark.parametrize(("shape", "labels"), [((3, 2), 4), ((3,), 3), ((0, 2), 0)])
def test_shapes_are_checked(shape, labels):
    with pytest.raises(ValueError, match=r"`probs` must have shape \(N, C\)"):
        classification_metrics(torch.ones(shape), torch.zeros(labels, dtype=torch.long))


@pytest.mark.parametrize("value", [-0.1, 1.5, math.nan])
def test_probabilities_are_checked(value):
    with pytest.raises(ValueError, match=r"`probs` must be in \[0, 1\]"):
        classification_metrics(torch.tensor([[0.5, value]]), torch.tensor([0]))


@pytest.mark.parametrize("labels", [[0, 2], [-1, 0], [0.0, 1.0]])
def test_labels_are_checked(labels):
    with pytest.raises(ValueError, match="`labels` must be integers from 0 to 1; got"):
        classification_metrics(torch.full((2, 2), 0.5), torch.tensor(labels))
