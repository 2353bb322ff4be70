"""The shared, learnable width of a group of channels."""

import math

import pytest
import torch
from torch import nn

from pyro_vnd.distributions import OrderedMask
from pyro_vnd.nn import Width
from pyro_vnd.nn.axis import Axis, Run

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
    assert width.kept_units(1e-9) == width.kept_units(max(frozen, 1))
    assert width.kept_units(1.0) == num_units


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fractions_in_tensors_mean_what_numbers_mean(dtype):
    hundredths = [i / 100 for i in range(1, 101)]
    for num_blocks in (1, 2, 3, 10, 25, 45, 50, 64, 75, 100, 128):  # 0.58 of 25 is half a block, but not in float32
        width = make(2 * num_blocks, num_blocks, min(2, num_blocks))
        masks = width.prefix(torch.tensor(hundredths, dtype=dtype))
        kept = width.spread(masks).sum(-1).tolist()
        assert kept == [width.kept_units(fraction) for fraction in hundredths], num_blocks


def test_half_a_block_is_rounded_up():
    width = Width("hidden", 10)
    assert [width.kept_blocks(f) for f in (0.01, 0.149, 0.15, 0.249, 0.25, 0.949, 0.95)] == [1, 1, 2, 2, 3, 9, 10]


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
    assert repr(width) == "Width(hidden, 10 units in 4 blocks, frozen=2)"


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


# What lies along an axis: runs of several widths.


@pytest.fixture
def widths():
    return Width("a", 4, 2), Width("b", 3)


def test_masks_of_runs_are_laid_after_each_other(widths):
    a, b = widths
    axis = Axis(8 + 2 + 3, (Run(a, 8), Run(None, 2), Run(b, 3)))
    assert axis.mask() is None
    assert axis.widths == [a, b]
    a.hold(torch.tensor([1.0, 0.0]))
    assert axis.mask().tolist() == [1] * 4 + [0] * 4 + [1] * 5
    b.hold(torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]]))  # a row for each example, and one for the batch
    assert axis.mask().tolist() == [[1] * 4 + [0] * 4 + [1, 1] + [1, 0, 0], [1] * 4 + [0] * 4 + [1, 1] + [1, 1, 0]]


def test_a_sliced_run_leaves_the_mask_of_the_others(widths):
    a, b = widths
    axis = Axis(8 + 2 + 3, (Run(a, 8), Run(None, 2), Run(b, 3)))
    a.hold(kept_units=2)
    b.hold(torch.tensor([1.0, 1.0, 0.0]), torch.tensor([1.0, 0.5, 0.2]))
    assert axis.index().tolist() == [0, 1, 2, 3, 8, 9, 10, 11, 12]
    assert axis.mask().tolist() == [1] * 4 + [1, 1] + [1, 1, 0]
    assert axis.keep_probs().tolist() == [1] * 4 + [1, 1] + [1, 0.5, 0.2]
    assert axis.owned_by(b).tolist() == [False] * 6 + [True] * 3
    assert axis.index({"b": 1}).tolist() == [*range(8), 8, 9, 10]


def test_one_run_is_cut_to_a_slice(widths):
    a, _ = widths
    axis = Axis(8, a)
    assert axis.index() is None
    a.hold(kept_units=2)
    assert axis.index() == slice(0, 4)
    assert axis.is_sliced
    assert axis.mask() is None
    a.hold(kept_units=4)
    assert axis.index() is None
    assert Axis(8).is_whole


def test_runs_that_do_not_fit_are_errors(widths):
    a, b = widths
    with pytest.raises(ValueError, match="width 'a' of 4 units cannot share 6 channels"):
        Axis(6, a)
    with pytest.raises(ValueError, match=r"the layer has 8 channels, but runs of \[4, 3\]"):
        Axis(8, (Run(a, 4), Run(b, 3)))


def test_a_width_is_a_module_of_its_own():
    assert isinstance(Width("hidden", 3), nn.Module)
