"""`NestedClassifier`: a model of classes, which says what is wrong with nets, logits and labels."""

import re

import pytest
import torch
from bad_labels import BAD_LABELS, CLASSES, NUM_CLASSES, ROWS
from pyro.infer import SVI, TraceMeanField_ELBO
from pyro.optim import Adam
from torch import nn

from pyro_vnd.infer import fit
from pyro_vnd.nn import NestedClassifier, nest

ONCE = {"num_epochs": 1, "progress": False}


def classifier(num_outputs=NUM_CLASSES):
    return NestedClassifier(nest(nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, num_outputs)), X[:1]))


X = torch.zeros(ROWS, 5, dtype=torch.float64)


def test_a_plain_net_is_to_be_nested_first():
    with pytest.raises(
        ValueError, match=r"`net` must be a NestedNet; got Linear: nest it first, nest\(net, example_inp"
    ):
        NestedClassifier(nn.Linear(5, 4))


@pytest.mark.parametrize(("labels", "got"), BAD_LABELS.values(), ids=BAD_LABELS)
def test_labels_that_are_no_classes_are_refused(labels, got):
    model = classifier()
    with pytest.raises(ValueError, match=rf"^NestedClassifier: argument `y` must be classes.*; {got}"):
        model(X, labels)


@pytest.mark.parametrize(
    "name", ["one-hot", "a column of targets", "floats", "halves", "counted from one", "of tokens"]
)
def test_a_fit_says_so_in_its_first_evaluation(name):
    labels, _ = BAD_LABELS[name]
    model = classifier()
    with pytest.raises(ValueError, match=rf"^NestedClassifier: argument `y` must be classes.*; got {labels.dtype} of"):
        fit(model, model.guide, (X, labels), **ONCE)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_integers_of_every_kind_are_classes(dtype):
    model = classifier()
    assert len(fit(model, model.guide, (X, CLASSES.to(dtype)), **ONCE).elbo) == 1


def test_labels_are_looked_at_under_svi_too():
    model = classifier()
    svi = SVI(model, model.guide, Adam({"lr": 0.01}), TraceMeanField_ELBO())
    svi.step(X, CLASSES)
    with pytest.raises(ValueError, match="from 1 to 4: count them from 0, y - 1"):
        svi.step(X, CLASSES + 1)


def test_each_class_has_a_logit():
    model = classifier(num_outputs=1)
    message = (
        "must return logits of shape (N, C), one for each of two or more classes; got (6, 1) for 6 rows. Of two cla"
    )
    for labels in (CLASSES % 2, None):
        with pytest.raises(ValueError, match=re.escape(message)):
            model(X, labels)


def test_logits_of_tokens_want_a_likelihood_of_tokens():
    model, tokens = classifier(), torch.zeros(ROWS, 3, 5)
    with pytest.raises(
        ValueError, match=r"got \(6, 3, 4\) for 6 rows. Classes of tokens or pixels want NestedModel\(net, TokenL"
    ):
        fit(model, model.guide, (tokens, CLASSES[:, None].expand(-1, 3)), **ONCE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_inputs_have_the_type_of_the_net(dtype):
    model = classifier()
    message = (
        f"NestedNet(Sequential): inputs must be of the type of the net's parameters, torch.float64; got {dtype} of"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        fit(model, model.guide, (X.to(dtype), CLASSES), **ONCE)
    with pytest.raises(ValueError, match=re.escape(message)):
        model.net.predict(X.to(dtype))
    with pytest.raises(ValueError, match=f"nest: inputs must be of the type of the net's parameters.*got {dtype}"):
        nest(nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 2)), X.to(dtype))


def test_inputs_are_like_the_example():
    model = classifier()
    with pytest.raises(
        ValueError, match=r"the net was nested with, of shape \(1, 5\); got torch.float64 of shape \(6, 4\)"
    ):
        fit(model, model.guide, (X[:, :4], CLASSES), **ONCE)


@pytest.mark.gpu
def test_steps_on_the_gpu_do_not_wait_for_the_values_of_labels():
    model = classifier().float().cuda()
    x, look = X.float().cuda(), model._look
    with pytest.raises(ValueError, match="from 1 to 4"):
        model(x, CLASSES.cuda() + 1)
    model(x, CLASSES.cuda())
    assert not look.is_due(CLASSES.cuda())
    model.train()
    assert look.is_due(CLASSES.cuda())


def test_inputs_are_looked_at_in_the_first_evaluation():
    model, x = classifier(), X.clone()
    x[2, 1] = torch.nan
    with pytest.raises(ValueError, match=r"NestedClassifier: argument `x` has 1 numbers that are NaN, shape \(6, 5\)"):
        model(x, CLASSES)
    with pytest.raises(ValueError, match="predict: argument `inputs` has 1 numbers that are NaN"):
        model.net.predict(x, width=0.5)
    with pytest.raises(ValueError, match=r"fit: argument `data\[0\]` of shape \(6, 5\) must be finite"):
        fit(model, model.guide, (x, CLASSES), **ONCE)


def test_images_of_bytes_are_said_once():
    plain = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 4))
    model = NestedClassifier(nest(plain, torch.zeros(2, 1, 4, 4, dtype=torch.float64)))
    images = torch.randint(0, 256, (ROWS, 1, 4, 4)).double()
    with pytest.warns(UserWarning, match="argument `x` looks like images of bytes, .*: give x / 255") as said:
        fit(model, model.guide, (images, CLASSES), num_epochs=3, progress=False)
    assert len(said) == 1
    fit(model, model.guide, (images / 255, CLASSES), **ONCE)
