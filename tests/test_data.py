"""Data as a tensor, a tuple or a mapping: their arguments, their rows, and how errors speak of their parts."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from pyro_vnd._data import as_arguments, batches, check_rows, map_parts, named_parts, num_rows, shapes, split_rows


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


X, Y = torch.arange(10.0).reshape(5, 2), torch.arange(5)
FORMS = {"tensor": X, "tuple": (X, Y), "list": [X, Y], "named tuple": Pair(X, Y), "mapping": {"x": X, "y": Y}}
forms = pytest.mark.parametrize("data", FORMS.values(), ids=FORMS)


def same(one, other):
    assert type(one) is type(other)
    for name in named_parts(one):
        assert torch.equal(named_parts(one)[name], named_parts(other)[name])


@forms
def test_rows_of_every_part_go_together(data):
    assert num_rows(data) == 5
    batches = list(split_rows(data, 2))
    assert [num_rows(batch) for batch in batches] == [2, 2, 1]
    joined = [torch.cat(parts) for parts in zip(*(named_parts(batch).values() for batch in batches), strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(joined, named_parts(data).values(), strict=True))
    check_rows("fit", data)


@forms
def test_the_form_stays(data):
    args, kwargs = as_arguments(map_parts(lambda part: part[:2], data))
    expected_args, expected_kwargs = as_arguments(data)
    assert len(args) == len(expected_args)
    assert list(kwargs) == list(expected_kwargs)


def test_shapes_are_by_name_where_there_is_one():
    assert shapes(X) == [(5, 2)]
    assert shapes(Pair(X, Y)) == [(5, 2), (5,)]
    assert shapes({"x": X, "n": 3}) == {"x": (5, 2), "n": "int"}


class Unreadable(torch.utils.data.DataLoader):
    def __iter__(self):
        raise AssertionError("read")


BAD = {
    "nan": (torch.tensor([1.0, torch.nan]), r"`rows` of shape \(2,\) must be finite; got NaN or inf"),
    "nan in a tuple": ((Y, torch.tensor([torch.inf])), r"`rows\[1\]` of shape \(1,\) must be finite"),
    "nan in a mapping": ({"x": torch.tensor([torch.nan])}, r"`rows\['x'\]` of shape \(1,\) must be finite"),
    "no mask": ({"x": torch.tensor([1.0, -torch.inf])}, r"`rows\['x'\]` of shape \(2,\) must be finite"),
    "infinite rows": ({"x": torch.tensor([0.0, torch.inf])}, r"`rows\['x'\]` of shape \(2,\) must be finite"),
    "no rows": (torch.tensor(1.0), "`rows` must be a tensor with rows; got a tensor without rows"),
    "a number": ([1.0], r"`rows\[0\]` must be a tensor with rows; got float"),
    "numpy": ({"x": np.ones(3)}, r"`rows\['x'\]` must be a tensor with rows; got ndarray"),
    "no tensor": (np.ones(3), "`rows` must be a tensor, a tuple of tensors, or a mapping .*; got ndarray"),
    "loader": (Unreadable([1]), "`rows` must be a tensor, a tuple of tensors, or a mapping .*; got Unreadable"),
    "none": (None, "`rows` must be a tensor, .*; got NoneType"),
    "keys": ({"x": X, 1: Y}, r"`rows` must be .*; got the keys \['x', 1\]"),
    "ragged": ((X, Y[:3]), r"same number of rows, at least 1; got \[\(5, 2\), \(3,\)\]"),
    "ragged mapping": ({"x": X, "y": Y[:3]}, r"same number of rows, at least 1; got \{'x': \(5, 2\), 'y': \(3,\)\}"),
    "empty": (X[:0], "at least 1"),
    "nothing": ((), r"at least 1; got \[\]"),
    "sparse": (
        (X.to_sparse(),),
        r"`rows\[0\]` must be a dense tensor; got layout torch.sparse_coo: give x.to_dense\(\)",
    ),
    "meta": ((X.to("meta"),), r"`rows\[0\]` must be a dense tensor; got a tensor on the device 'meta', which has no v"),
}


@pytest.mark.parametrize(("data", "message"), BAD.values(), ids=BAD)
def test_what_is_no_data_is_refused(data, message):
    with pytest.raises(ValueError, match=f"^caller: argument {message}" if message[0] == "`" else message):
        check_rows("caller", data, "rows")


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: torch.nested.nested_tensor([X[0], X[1, :1]]),
            r"a nested tensor: give torch.nested.to_padded_tensor\(x",
        ),
        (lambda: torch.quantize_per_tensor(X.float(), 0.1, 0, torch.qint8), r"a quantised tensor: give x.dequantize\("),
    ],
)
def test_tensors_without_dense_values_are_refused(make, message):
    with pytest.raises(ValueError, match="caller: argument `rows` must be a dense tensor; got " + message):
        check_rows("caller", make(), "rows")


@pytest.mark.parametrize("names", [("x", "y"), ("y", "x"), ("weight", "y", "x"), ("images", "labels")])
def test_batches_of_a_mapping_begin_with_inputs_and_labels(names):
    x, y = torch.arange(10.0).reshape(5, 2), torch.arange(5)
    named = {"x": x, "y": y, "images": x, "labels": y, "weight": torch.ones(5)}
    for (inputs, labels, *_), rows in zip(batches({name: named[name] for name in names}, 2), y.split(2), strict=True):
        assert torch.equal(labels, rows)
        assert torch.equal(inputs, x[rows])
