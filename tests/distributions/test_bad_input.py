"""Bad input is a ValueError that names the argument, the shape it came in and what was expected."""

import re

import numpy as np
import pyro
import pytest
import torch
from cases import LENGTH_CASES, each
from torch.distributions import kl_divergence

from pyro_vnd.distributions import NestedNormal, OrderedMask, RelaxedOrderedMask

NAN, INF = float("nan"), float("inf")


def raises(*parts: str):
    """Expect a ValueError with all these parts in its message."""
    lookaheads = "".join(f"(?=.*{re.escape(part)})" for part in parts)
    return pytest.raises(ValueError, match=f"(?s){lookaheads}")


@each(LENGTH_CASES)
def test_exactly_one_parameter_of_the_lengths(case):
    with raises("exactly one of `probs` and `logits`", "none"):
        case.with_lengths()
    with raises("exactly one of `probs` and `logits`", "both"):
        case.with_lengths(probs=torch.ones(4), logits=torch.zeros(4))


WRONG_LENGTHS = {
    "nan logits": ({"logits": [0.0, NAN]}, "finite"),
    "inf logits": ({"logits": [0.0, INF]}, "finite"),
    "-inf logits": ({"logits": [[0.0, -INF]]}, "use `probs` for lengths of probability zero"),
    "nan probs": ({"probs": [0.5, NAN]}, "finite"),
    "inf probs": ({"probs": [[0.5, INF, 1.0]]}, "finite"),
    "negative probs": ({"probs": [0.5, -0.1]}, ">= 0"),
    "all-zero probs": ({"probs": [0.0, 0.0]}, "at least one positive"),
    "an all-zero row": ({"probs": [[0.5, 0.5], [0.0, 0.0]]}, "at least one positive"),
}


@each(LENGTH_CASES)
@pytest.mark.parametrize(("lengths", "expected"), WRONG_LENGTHS.values(), ids=WRONG_LENGTHS)
def test_values_of_the_lengths(case, lengths, expected):
    ((name, values),) = lengths.items()
    value = torch.tensor(values)
    with raises(f"`{name}`", str(tuple(value.shape)), expected):
        case.with_lengths(**{name: value})


WRONG_STRUCTURE = {
    "zero-dimensional": (torch.tensor(0.5), "()"),
    "no units": (torch.zeros(3, 0), "(3, 0)"),
    "integers": (torch.ones(4, dtype=torch.int64), "torch.int64"),
    "booleans": (torch.ones(4, dtype=torch.bool), "torch.bool"),
    "complex numbers": (torch.ones(4, dtype=torch.complex64), "torch.complex64"),
    "a list": ([0.5, 0.5], "list"),
    "a number": (0.5, "float"),
}


@each(LENGTH_CASES)
@pytest.mark.parametrize("name", ["probs", "logits"])
@pytest.mark.parametrize("validate_args", [True, False])
@pytest.mark.parametrize(("value", "got"), WRONG_STRUCTURE.values(), ids=WRONG_STRUCTURE)
def test_structure_of_the_lengths(case, name, value, got, validate_args):
    """Checked even with validation off: it costs nothing."""
    with raises(f"`{name}`", "(..., num_units)", got):
        case.with_lengths(**{name: value}, validate_args=validate_args)


WRONG_TEMPERATURES = {
    "zero": 0.0,
    "negative": -1.0,
    "nan": NAN,
    "inf": INF,
    "text": "cold",
    "nothing": None,
    "a boolean": True,
    "zero tensor": torch.tensor(0.0),
    "negative tensor": torch.tensor([0.5, -0.5, 0.5]),
    "nan tensor": torch.tensor(NAN),
    "inf tensor": torch.tensor([INF, 1.0, 1.0]),
}


@each([case for case in LENGTH_CASES if case.batch])
@pytest.mark.parametrize("value", WRONG_TEMPERATURES.values(), ids=WRONG_TEMPERATURES)
def test_temperature(case, value):
    shape = str(tuple(value.shape)) if isinstance(value, torch.Tensor) else repr(value)
    with raises("`temperature`", shape, "positive", "finite"):
        case.build((3,), temperature=value)


@each([case for case in LENGTH_CASES if case.batch])
@pytest.mark.parametrize("validate_args", [True, False])
def test_temperature_that_does_not_broadcast(case, validate_args):
    with raises("`temperature`", "(2,)", "(3,)"):
        case.build((3,), temperature=torch.ones(2), validate_args=validate_args)


@each(LENGTH_CASES, takes_noise=True)
@pytest.mark.parametrize("noise", ["normal", None, ""])
def test_noise(case, noise):
    with raises("`noise`", "'logistic' or 'gumbel'", repr(noise)):
        case.build(noise=noise)


WRONG_MASKS = {
    "soft": ([1.0, 0.5, 0.0, 0.0], "zeros and ones"),
    "twos": ([2.0, 1.0, 0.0, 0.0], "zeros and ones"),
    "negative": ([1.0, -1.0, -1.0, -1.0], "zeros and ones"),
    "increasing": ([1.0, 0.0, 1.0, 0.0], "z_1 >= ... >= z_K"),
    "first unit dropped": ([0.0, 0.0, 0.0, 0.0], "1 = z_1"),
    "nan": ([1.0, NAN, 0.0, 0.0], "zeros and ones"),
    "one bad row": ([[1.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 1.0]], "[1.0, 0.0, 0.0, 1.0]"),
}
WRONG_SOFT_MASKS = {
    "increasing": ([1.0, 0.2, 0.3, 0.0], "z_1 >= ... >= z_K"),
    "first unit below one": ([0.9, 0.5, 0.3, 0.0], "1 = z_1"),
    "negative": ([1.0, 0.5, 0.3, -0.1], ">= 0"),
    "above one": ([1.2, 1.1, 0.3, 0.0], "1 = z_1"),
    "nan": ([1.0, NAN, 0.0, 0.0], "1 = z_1"),
}


@each(hard=True)
@pytest.mark.parametrize(("value", "expected"), WRONG_MASKS.values(), ids=WRONG_MASKS)
def test_hard_mask(case, value, expected):
    value = torch.tensor(value)
    with raises(case.cls.__name__, "`value`", str(tuple(value.shape)), expected):
        case.build().log_prob(value)


@pytest.mark.parametrize(("value", "expected"), WRONG_SOFT_MASKS.values(), ids=WRONG_SOFT_MASKS)
def test_soft_mask(value, expected):
    with raises("RelaxedOrderedMask", "`value`", "(4,)", expected):
        RelaxedOrderedMask(0.5, logits=torch.zeros(4)).log_prob(torch.tensor(value))


@each(over_lengths=True)
@pytest.mark.parametrize("value", [torch.ones(3), torch.ones(2, 5), torch.tensor(1.0), torch.ones(4, 0)])
def test_value_of_the_wrong_number_of_units(case, value):
    with raises(case.cls.__name__, "`value`", str(tuple(value.shape)), "(..., 4)"):
        case.build().log_prob(value)


@each(over_lengths=True)
def test_value_that_is_no_tensor(case):
    with raises("`value`", "tensor", "list"):
        case.build().log_prob([1.0, 1.0, 0.0, 0.0])


@each(over_lengths=True)
def test_value_whose_batch_does_not_broadcast(case):
    value = case.build().sample((2,))
    with raises("`value`", "(2, 4)", "(3,)"):
        case.build((3,)).log_prob(value)


@pytest.mark.parametrize("value", [[1.0, NAN, 0.0, 0.0], [1.0, INF, 0.0, 0.0]])
def test_value_of_a_nested_normal(value):
    law = NestedNormal(torch.zeros(4), torch.ones(4), torch.zeros(4))
    with raises("NestedNormal", "`value`", "finite", "(4,)"):
        law.log_prob(torch.tensor(value))


WRONG_NORMALS = {
    "nan loc": ({"loc": torch.tensor([0.0, NAN, 0.0])}, "finite", "(3,)"),
    "inf scale": ({"scale": torch.tensor([1.0, INF, 1.0])}, "finite", "(3,)"),
    "zero scale": ({"scale": torch.zeros(2, 3)}, "> 0", "(2, 3)"),
    "negative scale": ({"scale": torch.tensor(-1.0)}, "> 0", "()"),
    "nan scale": ({"scale": torch.full((3,), NAN)}, "> 0", "(3,)"),
    "loc of other units": ({"loc": torch.zeros(4)}, "(..., 3)", "(4,)"),
    "scale of other units": ({"scale": torch.ones(2, 2)}, "(..., 3)", "(2, 2)"),
    "loc of integers": ({"loc": torch.zeros(3, dtype=torch.int64)}, "floating-point", "torch.int64"),
    "scale of booleans": ({"scale": torch.ones(3, dtype=torch.bool)}, "floating-point", "torch.bool"),
    "scale is a boolean": ({"scale": True}, "(..., 3)", "bool"),
    "scale is a number below zero": ({"scale": -1}, "> 0", "from -1 to -1"),
    "loc is an array": ({"loc": np.zeros(3)}, "(..., 3)", "ndarray"),
    "scale is a list": ({"scale": [1.0, 1.0, 1.0]}, "(..., 3)", "list"),
}


@pytest.mark.parametrize(("wrong", "expected", "got"), WRONG_NORMALS.values(), ids=WRONG_NORMALS)
def test_location_and_scale(wrong, expected, got):
    arguments = {"loc": torch.zeros(3), "scale": torch.ones(3), "logits": torch.zeros(3)}
    (name,) = wrong
    with raises("NestedNormal", f"`{name}`", expected, got):
        NestedNormal(**(arguments | wrong))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_number_is_the_same_for_all_coordinates(dtype):
    logits = torch.arange(3.0).to(dtype)
    law, same = NestedNormal(0, np.float32(2), logits), NestedNormal(torch.zeros(3), 2 * torch.ones(3), logits)
    assert law.loc.dtype == law.sample().dtype == dtype
    value = same.sample((5,))
    torch.testing.assert_close(law.log_prob(value), same.log_prob(value))
    assert kl_divergence(law, same).item() == 0


def test_batches_that_do_not_broadcast():
    with raises("`loc` (2, 3)", "`scale` (5, 3)", "lengths (3,)"):
        NestedNormal(torch.zeros(2, 3), torch.ones(5, 3), torch.zeros(3))


@pytest.mark.parametrize("p", [0.0, 1.0, -0.5, 1.5, NAN, torch.tensor([0.5, 1.0])])
def test_geometric_probability(p):
    with raises("OrderedMask", "`p`", "strictly between 0 and 1"):
        OrderedMask.geometric(p, 4)


@pytest.mark.parametrize(("p", "got"), [("0.5", "str"), (None, "NoneType"), ([0.5], "list")])
def test_geometric_probability_that_is_no_number(p, got):
    with raises("OrderedMask", "`p`", "number or a tensor", got):
        OrderedMask.geometric(p, 4)


@pytest.mark.parametrize("num_units", [0, -1, 2.0, "4", None, True, np.True_, np.float64(3)])
@pytest.mark.parametrize("build", [OrderedMask.uniform, lambda k: OrderedMask.geometric(0.5, k)])
def test_number_of_units(build, num_units):
    with raises("OrderedMask", "`num_units`", "integer >= 1", repr(num_units)):
        build(num_units)


@pytest.mark.parametrize(("value", "got"), [(torch.tensor(0.0), "()"), ([0.0, 1.0], "list"), (0.5, "float")])
def test_chain_logits(value, got):
    with raises("OrderedMask", "`chain_logits`", "(..., num_units - 1)", got):
        OrderedMask.from_chain_logits(value)


WRONG_NUMBERS = {
    "nan": (NAN, "finite number"),
    "inf": (INF, "finite number"),
    "text": ("dear", "'dear'"),
    "nothing": (None, "None"),
    "a boolean": (True, "True"),
    "booleans": (torch.tensor([True, False, True]), "torch.bool"),
    "complex numbers": (torch.ones(3, dtype=torch.complex64), "torch.complex64"),
    "nan tensor": (torch.tensor([2.0, NAN, 2.0]), "must be finite"),
    "another batch": (torch.full((2,), 2.0), "of shape (2,) must broadcast with the batch shape (3,)"),
}
WRONG_COSTS = {
    "a list": ([1.0] * 4, "shape (..., 4), one a unit; got list"),
    "a number": (1.0, "got float"),
    "booleans": (torch.ones(4, dtype=torch.bool), "got (4,), torch.bool"),
    "other units": (torch.ones(3), "got (3,)"),
    "no dimension": (torch.tensor(1.0), "got ()"),
    "negative": (torch.tensor([1.0, -1.0, 3.0, 1.0]), ">= 0"),
    "nan": (torch.tensor([1.0, NAN, 3.0, 1.0]), "must be finite"),
    "inf": (torch.tensor([1.0, INF, 3.0, 1.0]), "must be finite"),
    "nothing past the first unit": (torch.tensor([1.0, 0.0, 0.0, 0.0]), "> 0 for one unit at least"),
    "a row of nothing": (torch.tensor([[1.0] * 4, [0.0] * 4, [1.0] * 4]), "> 0 for one unit at least"),
    "another batch": (torch.ones(2, 4), "of shape (2,) must broadcast with the batch shape (3,)"),
}
CALLS = {
    "tilt": ("price", lambda law, *args: law.tilt(*args)),
    "price_at_mean_length": ("mean_length", lambda law, *args: law.price_at_mean_length(*args)),
    "at_mean_length": ("mean_length", lambda law, *args: law.at_mean_length(*args)),
}
each_call = pytest.mark.parametrize("call", CALLS)


@each(LENGTH_CASES)
@each_call
@pytest.mark.parametrize(("value", "expected"), WRONG_NUMBERS.values(), ids=WRONG_NUMBERS)
def test_wrong_prices_and_mean_lengths(case, call, value, expected):
    argument, run = CALLS[call]
    law = case.build((3,))
    with pytest.raises(ValueError, match=re.escape(f"{case.cls.__name__}.{call}: argument `{argument}`")) as error:
        run(law, value)
    assert expected in str(error.value)


@each(LENGTH_CASES)
@each_call
@pytest.mark.parametrize(("cost", "expected"), WRONG_COSTS.values(), ids=WRONG_COSTS)
def test_wrong_costs(case, call, cost, expected):
    law = case.build((3,))
    with pytest.raises(ValueError, match=re.escape(f"{case.cls.__name__}.{call}: argument `cost`")) as error:
        CALLS[call][1](law, 2.0, cost)
    assert expected in str(error.value)


@each(LENGTH_CASES)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("mean_length", [1, 4.0, 0.5, -INF, torch.tensor(4.5)])
def test_mean_lengths_that_no_price_makes(case, mean_length, shared):
    with pytest.raises(ValueError, match=r"`mean_length`.* (1 and 4; got|must be a finite number)"):
        case.build((3,)).at_mean_length(mean_length, shared=shared)


@each(over_lengths=True)
def test_values_are_not_checked_without_validation(case):
    """Neither parameters nor samples: a check would wait for the GPU."""
    law = case.with_lengths(logits=torch.tensor([0.0, NAN, 0.0, 0.0]), validate_args=False)
    assert law.log_prob(torch.tensor([1.0, 0.3, 0.7, 0.0])).shape == ()
    assert law.sample().shape == (4,)


@each(over_lengths=True)
def test_validation_follows_the_global_switch(case):
    with pyro.validation_enabled(False):
        case.with_lengths(logits=torch.tensor([0.0, NAN, 0.0, 0.0]))
    with pyro.validation_enabled(True), pytest.raises(ValueError, match="finite"):
        case.with_lengths(logits=torch.tensor([0.0, NAN, 0.0, 0.0]))
