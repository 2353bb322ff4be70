"""Whatever is given to laws without a mask, to those of chains and as switches of any law, is refused by name."""

import numpy as np
import pytest
import torch
from cases import LENGTH_CASES, each
from odd import NO_NUMBERS, WITHOUT_VALUES
from torch.distributions import Normal

from pyro_vnd.distributions import Gated, LogUniform, NestedAutoregressive, NestedNormal, OrderedMask

K = 4
BASE = Normal(torch.zeros(K), 1.0)
NO_LAWS = [*NO_NUMBERS.values(), 1, True, [], [BASE], torch.zeros(K), Normal, np.zeros(K)]
NO_SHAPES = ["", "4", b"", b"x", {}, {4: 1}, {4}, 4, 4.0, [-1], [4.0], ["4"], [None], True, object(), torch.ones(2)]
NO_SWITCHES = [*NO_NUMBERS.values(), 1, 0, "", [], torch.tensor(True), torch.ones(2), np.ones(2)]
NO_VALUES = [*NO_NUMBERS.values(), None, 1.0, [0.0] * K, np.zeros(K), torch.zeros(K) + 0j, torch.ones(K) > 0]
NO_VALUES += [torch.zeros(K - 1), torch.zeros(0), torch.full((K,), torch.nan)]
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of torch, that nested tensors may change


def conditioner(x):
    return torch.zeros_like(x), torch.ones_like(x)


SWITCHED = {
    "gated": lambda **switch: Gated(BASE, **switch),
    "log-uniform": LogUniform,
    "uniform": lambda **switch: OrderedMask.uniform(K, **switch),
    "geometric": lambda **switch: OrderedMask.geometric(0.5, K, **switch),
    "chain": lambda **switch: OrderedMask.from_chain_logits(torch.zeros(K), **switch),
    **{case.name: case.build for case in LENGTH_CASES},
}


@pytest.mark.parametrize("law", SWITCHED)
def test_switches(law):
    for odd in NO_SWITCHES:
        with pytest.raises(ValueError, match=r"^\w+: argument `validate_args` must be True, False or None; got "):
            SWITCHED[law](validate_args=odd)
    for usual in (True, np.True_, None):
        SWITCHED[law](validate_args=usual)


@each(LENGTH_CASES, takes_noise=True)
def test_noise(case):
    for odd in (*NO_NUMBERS.values(), None, [], ["logistic"], np.array(["logistic"] * 2), np.zeros(2), torch.ones(2)):
        with pytest.raises(ValueError, match=f"^{case.cls.__name__}: argument `noise` must be 'logistic' or 'gumbel'"):
            case.build(noise=odd)


@pytest.mark.parametrize("argument", ["base", "rest"])
def test_laws_of_gated_arrays(argument):
    for odd in [*NO_LAWS, *([None] if argument == "base" else [])]:
        with pytest.raises(ValueError, match=f"^Gated: argument `{argument}` must be a distribution; got "):
            Gated(**{"base": BASE} | {argument: odd})


def test_shapes():
    for odd in NO_SHAPES:
        with pytest.raises(ValueError, match=r"^Gated: argument `event_shape` must be a sequence of sizes >= 0; got "):
            Gated(Normal(0.0, 1.0), odd)
        with pytest.raises(ValueError, match=r"^LogUniform: argument `batch_shape` must be a sequence of sizes >= 0"):
            LogUniform(odd)
    assert Gated(Normal(0.0, 1.0), [np.int64(2), 3]).event_shape == LogUniform((2, 3)).batch_shape == (2, 3)


@pytest.mark.parametrize("without", WITHOUT_VALUES)
def test_gates_without_values(without):
    with pytest.raises(ValueError, match=r"^Gated: argument `gate` must be a "):
        Gated(BASE, gate=WITHOUT_VALUES[without](torch.ones(K)))


@pytest.mark.parametrize("law", [Gated(BASE), LogUniform([K])], ids=repr)
def test_values(law):
    for odd in [*NO_VALUES, *(make(torch.ones(K)) for make in WITHOUT_VALUES.values())]:
        with pytest.raises(ValueError, match=f"^{type(law).__name__}: argument `value` must be "):
            law.log_prob(odd)


def test_a_density_is_of_real_numbers():
    with pytest.raises(ValueError, match=r"^LogUniform: argument `value` must be floating-point numbers; got "):
        LogUniform().log_prob(torch.tensor(2))


def test_values_of_a_chain():
    law = NestedAutoregressive(conditioner, torch.zeros(K))
    for odd in [*NO_VALUES[:-1], *(make(torch.ones(K)) for make in WITHOUT_VALUES.values())]:
        with pytest.raises(ValueError, match=r"^NestedAutoregressive: argument `value` must be "):
            law.given(odd)


def test_conditioners_that_cannot_be_called_with_values():
    for odd in (*NO_LAWS[:-3], None, int, torch.zeros(K)):
        if isinstance(odd, torch.nn.Module):
            continue
        with pytest.raises(
            ValueError, match=r"^NestedAutoregressive: argument `conditioner` must be callable with val"
        ):
            NestedAutoregressive(odd, torch.zeros(K))


@pytest.mark.parametrize("made", [torch.ones(K) > 0, torch.zeros(K) + 0j, torch.zeros(K, device="meta")])
def test_conditioners_of_no_numbers(made):
    law = NestedAutoregressive(lambda x: (made, torch.ones(K)), torch.zeros(K))
    with pytest.raises(ValueError, match=r"^NestedAutoregressive: .*argument `conditioner` returns must be a "):
        law.sample()


@pytest.mark.parametrize("cls", [NestedNormal, NestedAutoregressive])
def test_a_law_of_vectors_names_itself_where_its_lengths_are_wrong(cls):
    first = (conditioner,) if cls is NestedAutoregressive else (0.0, 1.0)
    for wrong in ({"logits": [0.0]}, {"probs": -torch.ones(K)}, {"logits": torch.zeros(K), "temperature": 0.0}):
        with pytest.raises(ValueError, match=f"^{cls.__name__}: argument `{[*wrong][-1]}` "):
            cls(*first, **wrong)


def test_a_number_of_units_is_no_truth():
    with pytest.raises(ValueError, match=r"^OrderedMask: argument `num_units` must be an integer >= 1"):
        OrderedMask.uniform(torch.tensor(True))
