"""Whatever is given to cascades, heads and likelihoods in place of their arguments is refused by name."""

import numpy as np
import pytest
import torch
from odd import NO_NUMBERS, WITHOUT_VALUES
from torch import nn

from pyro_vnd.nn import (
    BernoulliLabels,
    CascadeNet,
    CategoricalLabels,
    NetDraws,
    NormalTargets,
    OrdinalLabels,
    PixelLabels,
    TokenLabels,
    ValueHead,
    nest,
)

NO_INTEGERS = [*NO_NUMBERS.values(), True, 1.5, torch.ones(2), torch.tensor(True), np.ones(2)]
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of torch, that nested tensors may change


def make_net():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2))
    return nest(plain, torch.randn(2, 3), num_blocks=2)


WRONG = {
    "net": [*NO_NUMBERS.values(), None],
    "widths": [
        *NO_NUMBERS.values(),
        [99],
        [0],
        [0.3, 1.0],
        [1.0, 0.5],
        [None],
        ["a"],
        [[0.5]],
        [torch.ones(2)],
        [{"x": 1}],
    ],
    "threshold": [*NO_NUMBERS.values(), True, -1.0, [True], [0.1, 0.2], torch.ones(1) > 0, torch.ones(1) + 0j],
    "mean_cost": [*NO_NUMBERS.values(), True, 0, -1, 1.5, [0.5], torch.ones(2)],
    "doubt": [*NO_NUMBERS.values(), None, "variance", np.array(["entropy"] * 2)],
    "num_samples": [*NO_INTEGERS, 0, -1],
    "rounding": [*NO_NUMBERS.values(), "sideways", np.array(["up"] * 2), torch.ones(2)],
    "recalibrate": [*NO_NUMBERS.values(), 3, [], torch.ones(6, 3).long(), torch.ones(6, 3).to_sparse()],
}


@pytest.mark.parametrize("argument", WRONG)
def test_cascades(argument):
    net = make_net()
    for odd in WRONG[argument]:
        with pytest.raises(ValueError, match=f"^CascadeNet: argument `{argument}` "):
            CascadeNet(**{"net": net, "widths": [0.5, 1.0], "threshold": 0.5} | {argument: odd})


def test_widths_that_do_not_fit_say_why():
    with pytest.raises(
        ValueError, match=r"^CascadeNet: argument `widths` .* got \[99\]: width 99 is invalid for group"
    ):
        CascadeNet(make_net(), [99])


@pytest.mark.parametrize(
    "threshold", [[0.3], (0.3,), np.array([0.3]), torch.tensor([0.3]), torch.tensor(0.3), np.float32(0.3)]
)
def test_thresholds_of_any_kind_of_number(threshold):
    cascade = CascadeNet(make_net(), [0.5, 1.0], threshold)
    torch.testing.assert_close(cascade.thresholds, torch.tensor([0.3]), rtol=1e-6, atol=0)


def test_seeds_of_draws():
    for odd in (*NO_INTEGERS, "a", 2**64):
        with pytest.raises(ValueError, match=r"^NetDraws: argument `seed` must be an integer"):
            NetDraws(make_net(), 2, odd)


HEADS = {
    "num_inputs": [*NO_INTEGERS, 0, [3], ""],
    "num_units": [*NO_INTEGERS, 0, [4], ""],
    "hidden": [*NO_NUMBERS.values(), 4, [0], [True], [2.0], b"a"],
    "prior": [*NO_NUMBERS.values(), 1.0, torch.ones(4)],
}


@pytest.mark.parametrize("argument", HEADS)
def test_value_heads(argument):
    for odd in HEADS[argument]:
        with pytest.raises(ValueError, match=f"^ValueHead: argument `{argument}` must be "):
            ValueHead(**{"num_inputs": 3, "num_units": 4} | {argument: odd})


def test_features_of_value_heads():
    head = ValueHead(3, 4)
    odd = [
        *NO_NUMBERS.values(),
        None,
        [0.0] * 3,
        torch.ones(2),
        torch.tensor(1.0),
        torch.ones(3).half(),
        torch.ones(3) > 0,
    ]
    for x in [*odd, *(make(torch.ones(3, 3)) for make in WITHOUT_VALUES.values())]:
        for call in (head, head.law, head.choose):
            with pytest.raises(
                ValueError, match=r"^ValueHead: argument `inputs` must be a dense tensor of torch.float64"
            ):
                call(x)


def test_mean_lengths_of_value_heads():
    head = ValueHead(3, 4)
    head.calibrate(torch.randn(5, 4))
    for odd in [*NO_NUMBERS.values(), 1.0, 4.0, torch.full((2,), 2.0).to_sparse(), torch.ones(2, device="meta")]:
        with pytest.raises(ValueError, match=r"^ValueHead: argument `mean_length` must be strictly between 1 and 4"):
            head.price_at(odd)


def test_scales():
    odd = [*NO_NUMBERS.values(), None, True, [True], [], 0.0, -1.0, np.inf, torch.ones(2) > 0, torch.ones(2) + 0j]
    for scale in [*odd, *(make(torch.ones(2)) for make in WITHOUT_VALUES.values())]:
        with pytest.raises(ValueError, match=r"^NormalTargets: argument `scale` must be "):
            NormalTargets(scale)
    for scale in (2, 2.0, [2.0], np.array([2.0]), torch.tensor([2]), torch.tensor(2.0, requires_grad=True)):
        assert NormalTargets(scale).log_scale.exp().allclose(torch.tensor(2.0))
    for dim in (1.0, "1", None, True, [1], torch.ones(2), nn.Linear(1, 1)):
        with pytest.raises(ValueError, match=r"^NormalTargets: argument `dim` must be an integer; got "):
            NormalTargets("predicted", dim=dim)


def test_levels_and_labels_to_be_ignored():
    for odd in (*NO_INTEGERS, None, 1, 0, -1, 2**70):
        with pytest.raises(ValueError, match=r"^OrdinalLabels: argument `num_levels` must be an integer"):
            OrdinalLabels(odd)
    for cls in (TokenLabels, PixelLabels):
        for odd in (*NO_INTEGERS, None, "", b"x", [1.0], [True], [None], 2**70):
            with pytest.raises(ValueError, match=f"^{cls.__name__}: argument `ignore_index` must be an integer or int"):
                cls(odd)
        assert cls(np.int64(3)).ignored == cls((3,)).ignored == cls({3}).ignored == (3,)
    assert len(OrdinalLabels(np.int64(3)).cutpoints) == 2


@pytest.mark.parametrize("without", WITHOUT_VALUES)
@pytest.mark.parametrize(
    "likelihood", [CategoricalLabels, BernoulliLabels, NormalTargets], ids=lambda kind: kind.__name__
)
def test_targets_without_values(likelihood, without):
    y = WITHOUT_VALUES[without](torch.ones(3))
    with pytest.raises(ValueError, match=r"^caller: argument `y` must be "):
        likelihood().targets("caller", y, torch.zeros(3, 2) if likelihood is CategoricalLabels else torch.zeros(3))
