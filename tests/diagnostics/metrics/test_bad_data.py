"""Every score says what came, where labels are no classes or inputs are not what the net takes."""

import re

import numpy as np
import pytest
import torch
from bad_labels import BAD_LABELS, CLASSES, NUM_CLASSES, ROWS
from torch import nn

from pyro_vnd.diagnostics import (
    classification_metrics,
    evaluate,
    evaluate_learned,
    evaluate_prefixes,
    evaluate_widths,
    fit_temperature,
    loo_widths,
)
from pyro_vnd.nn import nest

X = torch.zeros(ROWS, 5).double()


def make_net(num_outputs=NUM_CLASSES):
    return nest(nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, num_outputs)), X[:1])


QUIET = {"progress": False}
SCORES = {
    "evaluate": lambda net, data, **more: evaluate(net.net, data, **QUIET, **more),
    "evaluate_widths": lambda net, data, **more: evaluate_widths(net, data, [0.5], 2, **QUIET, **more),
    "evaluate_learned": lambda net, data, **more: evaluate_learned(net, data, 2, **QUIET, **more),
    "loo_widths": lambda net, data: loo_widths(net, data, [0.5], 30, **QUIET),
}


def caller(name):
    return "loo_widths" if name == "loo_widths" else "evaluate"


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize(("labels", "got"), BAD_LABELS.values(), ids=BAD_LABELS)
def test_labels_that_are_no_classes_are_refused(labels, got, score):
    batches = iter([(X, labels)])  # what comes from a loader
    with pytest.raises(ValueError, match=rf"^{caller(score)}: argument `labels` must be classes.*; {got}"):
        SCORES[score](make_net(), [*batches])


@pytest.mark.parametrize(("labels", "got"), BAD_LABELS.values(), ids=BAD_LABELS)
def test_labels_that_do_not_fit_probabilities_are_refused(labels, got):
    probs = torch.full((ROWS, NUM_CLASSES), 1 / NUM_CLASSES)
    with pytest.raises(ValueError, match=rf"^classification_metrics: argument `labels` must be classes.*; {got}"):
        classification_metrics(probs, labels)
    with pytest.raises(ValueError, match=rf"^fit_temperature: argument `labels` must be classes.*; {got}"):
        fit_temperature(probs.log(), labels)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.filterwarnings("ignore::UserWarning")  # a k-hat of an untrained net
def test_integers_of_every_kind_are_classes(score, dtype):
    SCORES[score](make_net(), (X, CLASSES.to(dtype)))


@pytest.mark.parametrize("score", SCORES)
def test_real_targets_and_a_single_logit_are_no_classes(score):
    with pytest.raises(
        ValueError, match=r"a column for each of two or more classes; got shape \(6, 1\). Regression is"
    ):
        SCORES[score](make_net(1), (X, torch.randn(ROWS, 1)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
@pytest.mark.parametrize("score", SCORES)
def test_inputs_have_the_type_of_the_net(score, dtype):
    net = make_net()
    message = (
        f": inputs must be of the type of the net's parameters, torch.float64; got {dtype} of shape (6, 5): give x."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        SCORES[score](net, (X.to(dtype), CLASSES))
    if score != "loo_widths":
        with pytest.raises(ValueError, match=re.escape(message)) as error:
            SCORES[score](net, (X, CLASSES), ood={"bytes": X.to(dtype)})
        assert error.value.__notes__ == ["evaluate: in the foreign bytes data"]


@pytest.mark.parametrize("score", [score for score in SCORES if score != "evaluate"])
def test_inputs_are_like_the_example_that_was_nested(score):
    with pytest.raises(
        ValueError, match=r"inputs must be like the example .* of shape \(1, 5\); got torch.float64 of sha"
    ):
        SCORES[score](make_net(), (X[:, :3], CLASSES))


@pytest.mark.parametrize("score", ["evaluate", "evaluate_widths", "evaluate_learned"])
def test_inputs_are_finite(score):
    x = X.clone()
    x[2:4, 1] = torch.nan
    with pytest.raises(ValueError, match="evaluate: inputs must be finite; 2 of 6 rows have NaN or inf"):
        SCORES[score](make_net(), (x, CLASSES))


def test_labels_of_foreign_data_are_not_looked_at():
    foreign = {"other classes": (X, CLASSES + 100), "pixels": (X, X)}
    assert SCORES["evaluate_widths"](make_net(), (X, CLASSES), ood=foreign).sizes["ood"] == 2


@pytest.mark.parametrize("score", SCORES)
def test_arrays_are_no_tensors(score):
    for data in ((X.numpy(), CLASSES.numpy()), (X, CLASSES.numpy()), X.numpy()):
        with pytest.raises(ValueError, match=r"got ndarray: (make|give) .*torch.as_tensor|got (int64|float64): make"):
            SCORES[score](make_net(), data)


class Same:
    num_latents = 5

    def embed(self, x, length):
        return x * (torch.arange(5) < length)

    reconstruct = embed

    def sample(self, num_samples, length):
        return torch.zeros(num_samples, 5)


@pytest.mark.parametrize("name", ["one-hot", "a column", "floats", "halves", "nan", "too few", "of tokens", "numpy"])
def test_labels_of_images_are_integers(name):
    labels, _ = BAD_LABELS[name]
    data = [(torch.randn(ROWS, 5), labels)]
    with pytest.raises(
        ValueError, match=r"evaluate_prefixes: argument `labels` must be classes, integers, shape \(6,\); g"
    ):
        evaluate_prefixes(Same(), data, [1], **QUIET)


def test_images_are_tensors():
    with pytest.raises(ValueError, match=r"got ndarray|got float"):
        evaluate_prefixes(Same(), np.zeros((3, 5)), [1], **QUIET)
