"""Averages over draws: log space, uncertainties with known values, extremes."""

import math

import pytest
import torch

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
        ({}, "exactly one of"),
        ({"logits": torch.zeros(1, 1, 2), "probs": torch.ones(1, 1, 2)}, "exactly one of"),
        ({"logits": torch.zeros(3, 2)}, r"`logits` must have shape \(S, N, C\).*got \(3, 2\)"),
        ({"logits": torch.tensor([[[0.0, math.nan]]])}, "`logits` must hold a distribution.*1 rows"),
        ({"logits": torch.tensor([[[0.0, math.inf]]])}, "`logits` must hold a distribution.*1 rows"),
        ({"probs": torch.zeros(2, 3, 4)}, "`probs` must hold a distribution.*6 rows"),
        ({"probs": torch.tensor([[[1.1, -0.1]]])}, "`probs` must hold a distribution.*1 rows"),
    ],
)
def test_draws_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        average_draws(**arguments)
