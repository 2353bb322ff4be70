"""Detection of foreign rows against scikit-learn, with ties, and scores beyond what torchmetrics takes as they are."""

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from pyro_vnd.diagnostics import ood_metrics
from pyro_vnd.diagnostics.metrics.ood import ood_scores
from pyro_vnd.diagnostics.metrics.predictive import average_draws


def scikit_learn(inside, outside):
    foreign, scores = np.repeat([0, 1], [len(inside), len(outside)]), torch.cat([inside, outside]).numpy()
    false_positives, true_positives, _ = roc_curve(foreign, scores, drop_intermediate=False)
    return {
        "auroc": roc_auc_score(foreign, scores),
        "aupr": average_precision_score(foreign, scores),
        "fpr95": false_positives[true_positives >= 0.95][0],
        "prevalence": foreign.mean(),
    }


@pytest.mark.parametrize(
    "scores",
    [
        lambda n, shift: torch.randn(n) + shift,
        lambda n, shift: (torch.rand(n) * 4 + shift).round() / 10,  # ties
        lambda n, shift: 1e3 * (torch.randn(n) + shift),
        lambda n, shift: 1e-30 * (torch.rand(n) + shift),
    ],
    ids=["any", "ties", "large", "tiny"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_agrees_with_scikit_learn(scores, dtype):
    inside, outside = scores(300, 0).to(dtype), scores(200, 1).to(dtype)
    assert ood_metrics(inside, outside) == pytest.approx(scikit_learn(inside, outside), abs=1e-9)


def test_in_float32_too():
    torch.set_default_dtype(torch.float32)  # in which torchmetrics makes its rates
    inside, outside = torch.randn(20_000), torch.randn(5_000) + 1
    assert ood_metrics(inside, outside) == pytest.approx(scikit_learn(inside, outside), abs=2e-6)


def test_large_scores_are_not_merged():
    # A sigmoid, which torchmetrics applies to scores beyond [0, 1], is 1 in float32 for all of these.
    metrics = ood_metrics(torch.arange(30.0, 40.0).float(), torch.arange(40.0, 50.0).float())
    assert metrics == pytest.approx({"auroc": 1, "aupr": 1, "fpr95": 0, "prevalence": 0.5})


def test_infinite_scores_tie_with_each_other():
    inf = float("inf")
    assert ood_metrics(torch.tensor([0.0, inf]), torch.tensor([inf, inf]))["auroc"] == 0.75


def test_a_score_without_information():
    metrics = ood_metrics(torch.zeros(30), torch.zeros(10))
    assert metrics == {"auroc": 0.5, "aupr": pytest.approx(0.25), "fpr95": 1, "prevalence": 0.25}


def test_fpr95_by_hand():
    # 19 of 20 foreign rows lie above 0; to find them, the rows inside at 1 and 2 are taken for foreign, -1 is not.
    outside = torch.cat([torch.full((19,), 0.5), torch.tensor([-2.0])])
    assert ood_metrics(torch.tensor([1.0, 2.0, -1.0, 0.0]), outside)["fpr95"] == 0.5


def test_scores_grow_with_disagreement_and_doubt():
    sure, doubtful = torch.tensor([0.99, 0.01]), torch.tensor([0.5, 0.5])
    draws = torch.stack([torch.stack([sure, doubtful, sure]), torch.stack([sure, doubtful, sure.flip(0)])])
    scores = ood_scores(average_draws(probs=draws))
    for name in ("doubt", "entropy"):
        assert scores[name][0] < scores[name][1]
        torch.testing.assert_close(scores[name][1], scores[name][2])
    assert scores["mutual_information"][0] == scores["mutual_information"][1] == 0
    assert scores["mutual_information"][2] > 0.6


@pytest.mark.parametrize("bad", [torch.zeros(0), torch.zeros(2, 2), torch.tensor([0.0, float("nan")])])
def test_scores_are_checked(bad):
    with pytest.raises(ValueError, match="`inside` must have shape"):
        ood_metrics(bad, torch.zeros(3))
    with pytest.raises(ValueError, match="`outside` must have shape"):
        ood_metrics(torch.zeros(3), bad)
