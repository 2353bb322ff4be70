"""Averages over draws and their scores: log space, hand-computed values, other libraries, extremes."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import brier_score_loss

from pyro_vnd.diagnostics import classification_metrics
from pyro_vnd.diagnostics.metrics.predictive import average_draws, predictive_metrics


def test_probabilities_are_averaged_before_anything_else():
    logits = torch.randn(7, 50, 4)
    labels = torch.randint(4, (50,))
    predictive = average_draws(logits=logits)
    mean = logits.softmax(-1).mean(0)
    torch.testing.assert_close(predictive.probs, mean)
    metrics = predictive_metrics(predictive, labels)
    expected = classification_metrics(mean, labels)
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, abs=1e-9)
    mean_of_metrics = sum(classification_metrics(p, labels)["nll"] for p in logits.softmax(-1)) / 7
    assert metrics["nll"] < mean_of_metrics - 0.05  # Jensen's inequality: the test can tell the two


def test_entropies_by_hand():
    probs = torch.tensor([[[0.5, 0.5], [0.9, 0.1]], [[0.5, 0.5], [0.3, 0.7]]])
    predictive = average_draws(probs=probs)

    def entropy(p):
        return -p * math.log(p) - (1 - p) * math.log(1 - p)

    torch.testing.assert_close(predictive.entropy, torch.tensor([entropy(0.5), entropy(0.6)]))
    information = entropy(0.6) - (entropy(0.9) + entropy(0.7)) / 2
    torch.testing.assert_close(predictive.mutual_information, torch.tensor([0.0, information]))
    metrics = predictive_metrics(predictive, torch.tensor([0, 0]))
    assert metrics["mutual_information"] == pytest.approx(information / 2)
    assert metrics["mutual_information_se"] == pytest.approx(information / 2 / math.sqrt(2))


@pytest.mark.parametrize("num_samples", [1, 20])
def test_identical_draws_have_no_mutual_information(num_samples):
    draw = (10 * torch.randn(1, 500, 10)).float()
    information = average_draws(logits=draw.expand(num_samples, -1, -1)).mutual_information
    assert (information >= 0).all()
    assert information.max() < 1e-13


@pytest.mark.parametrize("num_classes", [2, 10])
def test_draws_that_are_sure_of_different_classes_have_log_c(num_classes):
    draws = torch.eye(num_classes).unsqueeze(1).expand(-1, 3, -1)
    predictive = average_draws(probs=draws)
    expected = torch.full((3,), math.log(num_classes))
    torch.testing.assert_close(predictive.mutual_information, expected)
    torch.testing.assert_close(predictive.entropy, expected)
    torch.testing.assert_close(predictive.expected_entropy, torch.zeros(3))


def test_logits_of_a_hundred_keep_their_likelihood_in_float32():
    logits = torch.tensor([[[100.0, -100.0]], [[100.0, -100.0]]], dtype=torch.float32)
    predictive = average_draws(logits=logits)
    metrics = predictive_metrics(predictive, torch.tensor([1]))
    assert metrics["nll"] == pytest.approx(200)
    assert predictive.doubt.item() == pytest.approx(math.exp(-200), abs=0)
    assert all(math.isfinite(value) for value in metrics.values())


def test_doubt_does_not_cancel():
    predictive = average_draws(logits=torch.tensor([[[0.0, -50.0], [0.0, -60.0]]]))
    assert predictive.doubt[0] > predictive.doubt[1] > 0
    assert (1 - predictive.probs.amax(-1) == 0).all()  # as it would


def test_zero_probabilities_are_fine():
    predictive = average_draws(probs=torch.tensor([[[1.0, 0.0, 0.0]], [[0.5, 0.5, 0.0]]]))
    metrics = predictive_metrics(predictive, torch.tensor([2]))
    assert all(math.isfinite(value) for value in metrics.values())
    assert metrics["nll"] > 700


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "evaluate: give exactly one of"),
        ({"logits": torch.zeros(1, 1, 2), "probs": torch.ones(1, 1, 2)}, "exactly one of"),
        ({"logits": torch.zeros(3, 2)}, r"evaluate: `logits` must have shape \(S, N, C\).*got \(3, 2\)"),
        ({"logits": torch.tensor([[[0.0, math.nan]]])}, "`logits` must hold a distribution.*1 rows"),
        ({"logits": torch.tensor([[[0.0, math.inf]]])}, "`logits` must hold a distribution.*1 rows"),
        ({"probs": torch.zeros(2, 3, 4)}, "`probs` must hold a distribution.*6 rows"),
        ({"probs": torch.tensor([[[1.1, -0.1]]])}, "`probs` must hold a distribution.*1 rows"),
    ],
)
def test_draws_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        average_draws(**arguments)


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


def test_a_certain_mistake_is_finite():
    metrics = classification_metrics(torch.tensor([[1.0, 0.0]]), torch.tensor([1]))
    assert math.isfinite(metrics["nll"])
    assert metrics["brier"] == pytest.approx(2)


@pytest.mark.parametrize(("shape", "labels"), [((3,), 3), ((0, 2), 0), ((3, 1), 3)])
def test_shapes_are_checked(shape, labels):
    with pytest.raises(ValueError, match="`probs` must have"):
        classification_metrics(torch.ones(shape), torch.zeros(labels, dtype=torch.long))


@pytest.mark.parametrize("value", [-0.1, 1.5, math.nan])
def test_probabilities_are_checked(value):
    with pytest.raises(ValueError, match=r"`probs` must be in \[0, 1\]"):
        classification_metrics(torch.tensor([[0.5, value]]), torch.tensor([0]))
