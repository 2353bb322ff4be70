"""What lies along an axis: runs of several widths."""

import pytest
import torch

from pyro_vnd.nn import Width
from pyro_vnd.nn.axis import Axis, Rows, Run, kept_channels, take


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
    assert Axis(8).widths == []


def test_runs_that_do_not_fit_are_errors(widths):
    a, b = widths
    with pytest.raises(ValueError, match="width 'a' of 4 units cannot share 6 channels"):
        Axis(6, a)
    with pytest.raises(ValueError, match=r"the layer has 8 channels, but runs of \[4, 3\]"):
        Axis(8, (Run(a, 4), Run(b, 3)))


def test_take_keeps_leading_channels_or_chosen_ones_and_its_gradient_is_zero_elsewhere():
    x = torch.randn(4, 5, 3, requires_grad=True)
    indices = {0: slice(0, 2), 1: torch.tensor([0, 3]), 2: None}
    kept = take(x, indices)
    assert torch.equal(kept, x[:2][:, [0, 3]])
    assert [kept_channels(index, size) for index, size in zip(indices.values(), x.shape, strict=True)] == [2, 2, 3]
    weight = torch.randn(2, 2, 3)
    (kept * weight).sum().backward()
    expected = torch.zeros(4, 5, 3)
    expected[:2, [0, 3]] = weight
    assert torch.equal(x.grad, expected)


@pytest.mark.parametrize(
    ("rows", "order"),
    [
        (Rows(), [0, 1]),
        (Rows(each=3), [0, 0, 0, 1, 1, 1]),
        (Rows(repeats=3), [0, 1, 0, 1, 0, 1]),
        (Rows(repeats=2, each=3), [0, 0, 0, 1, 1, 1] * 2),
        # More time steps, or tokens, than the example had.
        (Rows(repeats=2), [0, 1] * 4),
        (Rows(each=2), [0] * 5 + [1] * 5),
    ],
)
def test_masks_of_examples_are_spread_over_the_rows_that_they_have(rows, order):
    mask = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]])
    expected = mask[order]
    torch.testing.assert_close(rows.spread(mask, torch.zeros(len(order), 3), 1), expected)
    torch.testing.assert_close(rows.spread(mask, torch.zeros(len(order), 5, 3), -1), expected.unsqueeze(1))
    other = rows._replace(axis=1)
    torch.testing.assert_close(other.spread(mask, torch.zeros(3, len(order)), 0), expected.T)
    torch.testing.assert_close(other.spread(mask, torch.zeros(5, len(order), 3), -1), expected.unsqueeze(0))


@pytest.mark.parametrize("rows", [Rows(), Rows(repeats=3), Rows(each=2), Rows(repeats=2, each=2)])
def test_rows_that_no_examples_have_are_an_error(rows):
    with pytest.raises(ValueError, match="a layer reads 7 rows where there are masks for 2 examples"):
        rows.spread(torch.ones(2, 3), torch.zeros(7, 3), 1)
