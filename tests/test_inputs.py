"""What is said of labels and inputs that a model cannot take; `tests/bad_labels.py` has the labels."""

import re

import pytest
import torch
from bad_labels import BAD_LABELS, NUM_CLASSES, ROWS
from torch import nn

from pyro_vnd._inputs import Look, check_labels, explain_arguments, explain_inputs


@pytest.mark.parametrize(("labels", "got"), BAD_LABELS.values(), ids=BAD_LABELS)
def test_labels_that_are_no_classes_are_refused(labels, got):
    expected = rf"^caller: argument `y` must be classes, integers from 0 to 3, shape \(6,\); {got}"
    with pytest.raises(ValueError, match=expected):
        check_labels("caller", labels, ROWS, NUM_CLASSES, argument="y")


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int8, torch.int32, torch.int64])
def test_all_integers_are_classes(dtype):
    labels = torch.tensor([0, 1, 1, 0]).to(dtype)
    found = check_labels("caller", labels, 4, 2)
    assert found.dtype == torch.int64
    assert found.tolist() == [0, 1, 1, 0]
    assert check_labels("caller", labels[:0], 0, 2).shape == (0,)


def test_any_integers_are_labels_of_an_unknown_number_of_classes():
    labels = torch.tensor([-5, 70])
    assert check_labels("caller", labels, 2).tolist() == [-5, 70]
    with pytest.raises(ValueError, match=r"must be classes, integers, shape \(2,\); got torch.float64"):
        check_labels("caller", labels.double(), 2)


def test_values_are_looked_at_on_the_cpu_always_and_elsewhere_when_due():
    look, here, there = Look(), torch.zeros(2), torch.zeros(2, device="meta")
    assert look.is_due(here)
    assert look.is_due(there)
    look.done = True
    assert look.is_due(here)
    assert not look.is_due(there)


def test_values_are_not_looked_at_where_torch_traces():
    look, looked = Look(), []

    def f(x):
        looked.append(look.is_due(x))
        return x

    torch.func.vmap(f)(torch.zeros(3, 2))
    assert looked == [False]


def test_errors_about_inputs_say_what_came():
    net = nn.Linear(4, 2).float()

    def run(x, shapes=()):
        with explain_inputs("caller", (x,), torch.float32, shapes):
            return net(x)

    assert run(torch.zeros(3, 4).float()).shape == (3, 2)
    for dtype in (torch.float64, torch.uint8, torch.int64):
        message = (
            f"caller: inputs must be of the type of the net's parameters, torch.float32; got {dtype} of shape (3, 4)"
        )
        with pytest.raises(ValueError, match=re.escape(message)):
            run(torch.zeros(3, 4).to(dtype))
    message = (
        "caller: inputs must be like the example that the net was nested with, of shape (1, 4); got torch.float32 of"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        run(torch.zeros(3, 5).float(), [(1, 4)])
    with pytest.raises(RuntimeError, match="cannot be multiplied"):  # nothing better is known
        run(torch.zeros(3, 5).float())


def test_a_type_error_of_the_net_itself_stays_what_it_is():
    net, x = nn.Linear(4, 2), torch.zeros(3, 4)
    with pytest.raises(TypeError, match="of the net"), explain_arguments("caller", net, (x,), {}):
        raise TypeError("of the net")
    message = r"caller: inputs must be the arguments of Linear, \(input.*; got 2 in order and \['scale'\] by name: too"
    with pytest.raises(ValueError, match=message), explain_arguments("caller", net, (x, x), {"scale": 1.0}):
        net(x, x, scale=1.0)


def test_other_errors_stay_what_they_are():
    for error in (KeyError("type"), ValueError("type"), torch.OutOfMemoryError("type")):
        with pytest.raises(type(error)), explain_inputs("caller", (torch.zeros(2),), torch.float32, [(5, 5)]):
            raise error
