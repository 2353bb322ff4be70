"""Metrics of class probabilities against hand-computed values and a predictor that is calibrated by construction."""

import math

import pytest
import torch

from pyro_vnd.diagnostics import classification_metrics


def test_hand_computed():
    probs = torch.tensor([[0.9, 0.1], [0.7, 0.3], [0.2, 0.8], [0.4, 0.6]])
    metrics = classification_metrics(probs, torch.tensor([0, 1, 1, 1]))
    assert metrics["accuracy"] == 0.75
    assert metrics["accuracy_se"] == pytest.approx(math.sqrt(0.75 * 0.25 / 4))
    assert metrics["nll"] == pytest.approx(-sum(map(math.log, (0.9, 0.3, 0.8, 0.6))) / 4)
    # Four bins of one row each: |1 - .9|, |0 - .7|, |1 - .8|, |1 - .6|.
    assert metrics["ece"] == pytest.approx((0.1 + 0.7 + 0.2 + 0.4) / 4)


def test_a_calibrated_predictor_scores_near_zero_and_an_overconfident_one_does_not():
    logits = 2 * torch.randn(20_000, 5)
    labels = torch.distributions.Categorical(logits=logits).sample()
    # Sampling error of 15 bins at n = 20,000 adds up to about .008.
    assert classification_metrics(logits.softmax(-1), labels)["ece"] < 0.02
    assert classification_metrics((2 * logits).softmax(-1), labels)["ece"] > 0.05


def test_a_certain_mistake_is_finite():
    assert math.isfinite(classification_metrics(torch.tensor([[1.0, 0.0]]), torch.tensor([1]))["nll"])


@pytest.mark.parametrize(("shape", "labels"), [((3, 2), 4), ((3,), 3), ((0, 2), 0)])
def test_shapes_are_checked(shape, labels):
    with pytest.raises(ValueError, match=r"`probs` must have shape \(N, C\)"):
        classification_metrics(torch.ones(shape), torch.zeros(labels, dtype=torch.long))
