"""The shared, learnable width of a group of channels."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from pyro_vnd.distributions import OrderedMask
from pyro_vnd.nn import Width

BLOCKS = [
    (1, 1, 0),
    (4, 4, 0),
    (10, 4, 0),
    (12, 4, 0),
    (12, 4, 2),
    (10, 4, 3),
    (10, 4, 4),
    (7, 1, 0),
    (7, 7, 3),
    (5, 1, 1),
]


def make(num_units, num_blocks, frozen, **options):
    return Width("hidden", num_units, num_blocks, frozen=frozen, **options)


def cut_by_hand(num_units, num_blocks):
    """Deal the units out to the blocks one by one, and return each block's number of them."""
    sizes = [0] * num_blocks
    for unit in range(num_units):
        sizes[unit % num_blocks] += 1
    return tuple(sizes)


@pytest.mark.parametrize(("num_units", "num_blocks", "frozen"), BLOCKS)
def test_blocks_are_as_even_as_can_be(num_units, num_blocks, frozen):
    width = make(num_units, num_blocks, frozen)
    assert width.sizes == cut_by_hand(num_units, num_blocks)
    assert width.law.num_units == num_blocks - max(frozen, 1) + 1 == width.prior.num_units
    assert width.always_kept == max(frozen, 1)


def test_each_unit_is_a_block_by_default():
    assert Width("hidden", 5).sizes == (1,) * 5


@pytest.mark.parametrize(("num_units", "num_blocks", "frozen"), BLOCKS)
def test_a_mask_over_blocks_is_spread_over_their_units(num_units, num_blocks, frozen):
    width = make(num_units, num_blocks, frozen)
    values = torch.rand(2, 3, width.law.num_units)
    expected = []
    for block, size in enumerate(width.sizes):
        entry = max(0, block - max(frozen, 1) + 1)  # the first entry stands for all blocks that are always kept
        expected += [values[..., entry]] * size
    assert torch.equal(width.spread(values), torch.stack(expected, -1))


@pytest.mark.parametrize(("num_units", "num_blocks", "frozen"), BLOCKS)
def test_kept_units_of_each_number_of_blocks(num_units, num_blocks, frozen):
    width = make(num_units, num_blocks, frozen)
    for blocks in range(max(frozen, 1), num_blocks + 1):
        kept = sum(cut_by_hand(num_units, num_blocks)[:blocks])
        assert width.kept_units(blocks) == kept
        assert width.kept_units(blocks / num_blocks) == kept
        assert width.spread(width.prefix(torch.tensor(blocks / num_blocks))).tolist() == [1] * kept + [0] * (
            num_units - kept
        )
        assert width.kept_units(torch.tensor(blocks / num_blocks).float().item()) == kept
    assert width.kept_units(1e-9, "nearest") == width.kept_units(max(frozen, 1))
    assert width.kept_units(1.0) == num_units


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fractions_in_tensors_mean_what_numbers_mean(dtype):
    hundredths = [i / 100 for i in range(1, 101)]
    for num_blocks in (1, 2, 3, 10, 25, 45, 50, 64, 75, 100, 128):  # 0.58 of 25 is half a block, but not in float32
        width = make(2 * num_blocks, num_blocks, min(2, num_blocks))
        masks = width.prefix(torch.tensor(hundredths, dtype=dtype))
        kept = width.spread(masks).sum(-1).tolist()
        assert kept == [width.kept_units(fraction, "nearest") for fraction in hundredths], num_blocks


def test_half_a_block_is_rounded_up():
    width = Width("hidden", 10)
    fractions = (0.01, 0.149, 0.15, 0.249, 0.25, 0.949, 0.95)
    assert [width.kept_blocks(f, "nearest") for f in fractions] == [1, 1, 2, 2, 3, 9, 10]


def test_fractions_are_rounded_only_when_asked_for():
    width = Width("hidden", 24, 6, frozen=2)
    for fraction, down, nearest, up in [
        (0.4, 2, 2, 3),
        (0.45, 2, 3, 3),
        (0.5, 3, 3, 3),
        (0.99, 5, 6, 6),
        (0.1, 2, 2, 2),
    ]:
        rounded = [width.kept_blocks(fraction, rounding) for rounding in ("down", "nearest", "up")]
        assert rounded == [down, nearest, up]
        assert width.kept_units(fraction, "up") == 4 * up
    assert width.kept_blocks(0.5) == 3
    for fraction, neighbours in [
        (0.4, r"0.3333333 \(2 of 6 blocks\) and 0.5 \(3 of 6 blocks\)"),
        (0.99, r"0.8333333 \(5 of 6 blocks\) and 1 \(6 of 6 blocks\)"),
        (1 / 6, r"0.3333333 \(2 of 6 blocks\);"),  # a number of blocks, but fewer than are always kept
        (0.01, r"0.3333333 \(2 of 6 blocks\);"),
    ]:
        with pytest.raises(ValueError, match=f"'hidden' can keep: near it are {neighbours}.*rounding='nearest'"):
            width.kept_blocks(fraction)
    with pytest.raises(ValueError, match="`rounding` must be 'nearest', 'down' or 'up', or None; got 'floor'"):
        width.kept_blocks(0.4, "floor")


@pytest.mark.parametrize("num_blocks", [3, 7, 25, 100, 1000, 4096, 10_007])
def test_neighbours_that_a_message_names_and_fractions_in_float32_are_exact(num_blocks):
    width = Width("hidden", num_blocks)
    for blocks in {1, 2, num_blocks // 3, num_blocks // 2, num_blocks - 1, num_blocks}:
        fraction = torch.tensor(blocks, dtype=torch.float32) / num_blocks
        for same in (blocks / num_blocks, fraction.item(), float(f"{blocks / num_blocks:.7g}"), np.float32(fraction)):
            assert {width.kept_blocks(same, rounding) for rounding in (None, "nearest", "down", "up")} == {blocks}
    with pytest.raises(ValueError, match="is no number of blocks"):
        width.kept_blocks(1.5 / num_blocks)


def test_one_is_a_block_and_one_point_zero_is_all():
    width = Width("hidden", 16, 4)
    assert (width.kept_units(1), width.kept_units(1.0)) == (4, 16)
    assert (width.kept_units(np.int64(1)), width.kept_units(np.float64(1))) == (4, 16)


@pytest.mark.parametrize("bad", [0, 0.0, 1.5, True, False, "a", -1, -0.5, math.nan, math.inf, 5, 1, None])
def test_an_invalid_width_is_answered_with_the_valid_ones(bad):
    width = make(8, 4, 2)
    for method in (width.kept_blocks, width.kept_units):
        with pytest.raises(ValueError, match=r"group 'hidden': .* fraction in \(0.0, 1.0\] .* blocks from 2 to 4"):
            method(bad)


def test_laws_are_uniform_and_start_at_the_prior():
    width = make(8, 4, 0)
    torch.testing.assert_close(width.prior.probs, torch.full((4,), 0.25))
    prior = OrderedMask(probs=torch.tensor([0.1, 0.2, 0.3, 0.4]))
    width = make(8, 4, 0, prior=prior)
    for law in (width.prior, width.posterior, width.law):
        torch.testing.assert_close(law.probs, prior.probs)


def test_a_start_of_its_own_and_gradients():
    init = OrderedMask.geometric(0.5, 3)
    width = make(8, 4, 2, init=init, noise="gumbel", temperature=0.7)
    torch.testing.assert_close(width.law.probs, init.probs)
    torch.testing.assert_close(width.prior.probs, torch.full((3,), 1 / 3))
    assert (width.posterior.noise, width.posterior.temperature) == ("gumbel", 0.7)
    assert not width.law.keep_probs.requires_grad
    width.posterior.keep_probs.sum().backward()
    assert width.logits.grad.abs().sum() > 0
    assert [name for name, _ in width.named_parameters()] == ["logits"]


def test_a_law_that_is_changed_later_leaves_prior_and_start_alone():
    logits = torch.zeros(4)
    width = make(8, 4, 0, prior=OrderedMask(logits=logits))
    logits[0] = 5.0
    with torch.no_grad():
        width.logits[1] = 3.0
    torch.testing.assert_close(width.prior.probs, torch.full((4,), 0.25))


def test_a_length_that_is_ruled_out_stays_finite():
    width = make(8, 4, 0, prior=OrderedMask(probs=torch.tensor([0.5, 0.0, 0.25, 0.25])))
    assert width.prior.probs[1] == 0
    assert torch.isfinite(width.prior_logits).all()


def test_state_and_dtype():
    width, other = make(10, 4, 2, init=OrderedMask.geometric(0.3, 3)), make(10, 4, 2)
    other.load_state_dict(width.state_dict())
    torch.testing.assert_close(other.law.probs, width.law.probs)
    single = width.float()
    assert single.prefix(torch.tensor([0.5])).dtype == single.posterior.rsample().dtype == torch.float32


def test_a_width_says_what_it_has_learned():
    width = make(10, 4, 2, init=OrderedMask(probs=torch.tensor([0.2, 0.5, 0.3])))
    assert repr(width) == "Width(hidden, 10 units in 4 blocks, frozen=2, mean blocks kept 3.1, mode 3)"
    assert repr(Width("a", 3)) == "Width(a, 3 units in 3 blocks, mean blocks kept 2, modes 1-3)"
    with torch.no_grad():
        width.logits.fill_(math.nan)
    assert "mean blocks kept nan" in repr(width)  # whoever looks for the NaN must be able to look


def test_the_mask_of_a_pass_is_held_and_released():
    width = make(6, 3, 0)
    width.hold(torch.tensor([1.0, 1.0, 0.0]), torch.tensor([1.0, 0.7, 0.2]))
    assert width.mask.tolist() == [1, 1, 1, 1, 0, 0]
    assert width.keep_probs.tolist() == [1, 1, 0.7, 0.7, 0.2, 0.2]
    width.release()
    assert (width.mask, width.keep_probs, width.kept) == (None, None, None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_units": 0}, "`num_units` must be an integer at least 1; got 0"),
        ({"num_units": 4.0}, "`num_units` must be an integer"),
        ({"num_units": True}, "`num_units` must be an integer"),
        ({"num_blocks": 9}, "`num_blocks` must be an integer from 1 to 8; got 9"),
        ({"num_blocks": 0}, "`num_blocks` must be an integer from 1 to 8; got 0"),
        ({"frozen": 5}, "`frozen` must be an integer from 0 to 4; got 5"),
        ({"frozen": -1}, "`frozen` must be an integer from 0 to 4; got -1"),
        ({"noise": "normal"}, "`noise` must be 'logistic' or 'gumbel'; got 'normal'"),
        ({"temperature": 0.0}, "`temperature` must be finite and > 0; got 0.0"),
        ({"temperature": math.nan}, "`temperature` must be finite and > 0; got nan"),
        ({"prior": OrderedMask.uniform(3)}, r"`prior` must be an OrderedMask over 4 entries .* got \(3,\)"),
        ({"init": OrderedMask.uniform(4), "frozen": 2}, r"`init` must be an OrderedMask over 3 entries \(4 blocks, of"),
        ({"prior": torch.ones(4)}, "`prior` must be .* got Tensor"),
    ],
)
def test_what_does_not_fit_is_named(arguments, message):
    with pytest.raises(ValueError, match=f"Width 'hidden': argument {message}"):
        Width("hidden", **({"num_units": 8, "num_blocks": 4} | arguments))


def test_sizes_may_be_integers_of_numpy():
    width = Width("hidden", np.int64(8), np.int32(4), frozen=np.uint8(2))
    assert (width.num_units, width.num_blocks, width.frozen) == (8, 4, 2)
    assert all(type(size) is int for size in (width.num_units, width.num_blocks, width.frozen))
    assert width.kept_blocks(np.int64(3)) == 3
    with pytest.raises(ValueError, match=r"`num_blocks` must be an integer from 1 to 8; got np.True_"):
        Width("hidden", 8, np.True_)


def test_a_width_is_a_module_of_its_own():
    assert isinstance(Width("hidden", 3), nn.Module)
