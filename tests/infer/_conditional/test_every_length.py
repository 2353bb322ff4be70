"""A function for many entries: at once where that is what it returns one by one."""

import pytest
import torch

from pyro_vnd._compat import only_plain_code
from pyro_vnd.infer._conditional.every_length import evaluate_all, find_way


def noisy_square(inputs):
    return {"square": inputs["x"] ** 2, "noisy": inputs["x"] + torch.rand(())}


@pytest.mark.parametrize("way", ["at once", "one by one"])
def test_entries_share_their_random_numbers(way):
    x = torch.arange(5.0)
    found = evaluate_all(noisy_square, {"x": x}, way)
    torch.testing.assert_close(found["square"], x**2)
    torch.testing.assert_close(found["noisy"] - x, (found["noisy"] - x)[:1].expand(5))


@pytest.mark.parametrize(
    ("number", "tried"), [(1, [0]), (7, range(7)), (16, range(16)), (31, range(0, 31, 2)), (151, range(0, 151, 10))]
)
def test_entries_are_tried_from_end_to_end(number, tried):
    seen = []

    def function(inputs):
        if not only_plain_code():  # as it is under vmap
            seen.append(inputs["x"].item())
        return noisy_square(inputs)

    state = torch.get_rng_state()
    assert find_way(function, {"x": torch.arange(float(number))}) == "at once"
    assert seen == [*tried]
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("wrong", [0, 6, 15])
def test_a_single_entry_that_differs_is_found(wrong):
    """By a function that knows how often it was called, which nothing batched tells."""
    calls = []

    def function(inputs):
        calls.append(None)
        return {"y": inputs["x"] + (len(calls) == wrong + 1)}

    with pytest.warns(UserWarning, match="one length after another.*its log-probabilities are then others"):
        assert find_way(function, {"x": torch.arange(16.0)}) == "one by one"


def test_what_has_no_batched_form_is_named():
    with pytest.warns(UserWarning, match=r"one length after another.*torch.func.vmap: RuntimeError: "):
        assert find_way(lambda inputs: {"y": torch.tensor(inputs["x"].item())}, {"x": torch.ones(3)}) == "one by one"
