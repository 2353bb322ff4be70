"""Numbers that the code of a net computes from sizes follow these when they change."""

import operator

import pytest

from pyro_vnd.nn.tracing.tape import Attribute, _from, resolved

SIZE, OTHER = Attribute("a", "size", None, 12), Attribute("b", "size", None, 5)
CUT = {SIZE: 6, OTHER: 2}
FORMULAS = {
    "sums": lambda n, m: 3 + n - m + 1,
    "products": lambda n, m: 2 * n * m,
    "quotients": lambda n, m: (n // m, 25 // m, n % m, 7 % m),
    "fractions": lambda n, m: [n / m, 1 / n, -n / 4, n * 0.5],
    "powers": lambda n, m: {"a": n**2, "b": 2**m, "c": n**-0.5},
    "slices": lambda n, m: (slice(n, None), slice(m, n + m, 2)),
}


@pytest.mark.parametrize("formula", FORMULAS.values(), ids=FORMULAS)
def test_what_is_computed_of_sizes_is_computed_of_others(formula):
    found = formula(_from(SIZE, 12), _from(OTHER, 5))
    assert found == formula(12, 5)
    assert resolved(found, CUT.__getitem__) == formula(6, 2)
    assert resolved(found, {SIZE: 12, OTHER: 2}.__getitem__) == formula(12, 2)


def test_sources_are_those_of_all_that_was_used():
    n, m = _from(SIZE, 12), _from(OTHER, 5)
    assert (n * 2 + 1).sources == {SIZE}
    assert (m - n / 3).sources == {SIZE, OTHER}


def test_what_is_no_number_is_left_to_python():
    n = _from(SIZE, 3)
    assert n * [0] == [0] * n == [0, 0, 0]
    assert n * "ab" == "ababab"
    assert type((-n) ** 0.5) is complex
    for operation in (operator.add, operator.truediv):
        with pytest.raises(TypeError, match="unsupported operand"):
            operation(n, None)
