"""Each output of the conditioner sees the inputs before it and no others."""

import pytest
import torch
from odd import NO_NUMBERS, WITHOUT_VALUES
from torch import nn

from pyro_vnd.autoencoders import Conditioner


def moved(num_units: int, **options) -> Conditioner:
    """One whose last layer is no longer zero."""
    torch.manual_seed(0)
    conditioner = Conditioner(num_units, **options)
    nn.init.normal_(conditioner.net[-1].weight)
    nn.init.normal_(conditioner.net[-1].bias)
    return conditioner


@pytest.mark.parametrize("num_components", [1, 3])
@pytest.mark.parametrize(("num_units", "hidden"), [(6, (96, 96)), (6, (17,)), (2, (5, 3)), (3, ()), (20, (64, 32, 64))])
def test_each_output_depends_on_all_inputs_before_it_and_on_nothing_else(
    num_units: int, hidden: tuple[int, ...], num_components: int
):
    conditioner, x = moved(num_units, hidden=hidden, num_components=num_components), torch.randn(num_units) / 4
    assert len(conditioner(x)) == (2 if num_components == 1 else 3)
    for which in range(len(conditioner(x))):
        jacobian = torch.autograd.functional.jacobian(lambda x, w=which: conditioner(x)[w], x)
        for part in jacobian.view(num_units, -1, num_units).unbind(1):
            assert torch.equal(part.tril(-1) != 0, torch.ones(num_units, num_units).tril(-1) > 0)
            assert (part.triu() == 0).all()


def test_it_starts_at_standard_normals():
    loc, scale = Conditioner(5)(torch.randn(3, 2, 5))
    assert torch.equal(loc, torch.zeros(3, 2, 5))
    assert torch.equal(scale, torch.ones(3, 2, 5))


@pytest.mark.parametrize("num_components", [2, 5, 10])
def test_mixtures_start_apart_with_the_moments_of_standard_normals(num_components: int):
    loc, scale, logits = (part for part in Conditioner(5, num_components=num_components)(torch.randn(3, 5)))
    assert loc.shape == scale.shape == logits.shape == (3, 5, num_components)
    assert (loc.diff() > 0.1).all()
    probs = logits.softmax(-1)
    mean = (probs * loc).sum(-1)
    variance = (probs * (loc.square() + scale.square())).sum(-1) - mean.square()
    torch.testing.assert_close(mean, torch.zeros(3, 5), atol=1e-6, rtol=0)
    torch.testing.assert_close(variance, torch.ones(3, 5), atol=1e-5, rtol=0)


@pytest.mark.parametrize("num_components", [1, 4])
def test_far_off_inputs_have_bounded_outputs(num_components: int):
    conditioner = moved(8, num_components=num_components)
    near, far = (conditioner(size * torch.randn(500, 8)) for size in (1, 1e6))
    assert far[0].abs().max() < 3 * near[0].abs().max()
    assert far[-1].abs().max() < 3 * near[-1].abs().max()
    assert torch.isfinite(far[1]).all()
    assert (far[1] > 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_unit_and_no_rows(dtype: torch.dtype):
    loc, scale = moved(1).to(dtype)(torch.randn(7, 1, dtype=dtype))
    assert loc.dtype == dtype
    assert (loc == loc[0]).all()
    assert (scale == scale[0]).all()
    assert Conditioner(4)(torch.zeros(0, 4))[0].shape == (0, 4)


@pytest.mark.parametrize("argument", ["num_units", "hidden", "num_components"])
def test_sizes_are_checked(argument):
    odd = [*NO_NUMBERS.values(), 0, -1, 2.0, True, None, b"x", [0], [4, -1], [2.0], [True], ["4"], torch.ones(2)]
    for size in odd if argument == "hidden" else [*odd, [4, 4], 2**70]:
        with pytest.raises(ValueError, match=f"^Conditioner: argument `{argument}` must be "):
            Conditioner(**{"num_units": 3} | {argument: size})


@pytest.mark.filterwarnings("ignore::UserWarning")  # of torch, that nested tensors may change
def test_odd_inputs():
    conditioner = Conditioner(3)
    odd = [
        *NO_NUMBERS.values(),
        None,
        [0.0] * 3,
        torch.ones(4),
        torch.ones(3, 1),
        torch.tensor(1.0),
        torch.ones(3).half(),
    ]
    for x in [*odd, *(make(torch.ones(3, 3)) for make in WITHOUT_VALUES.values()), torch.ones(3) + 0j]:
        with pytest.raises(
            ValueError, match=r"^Conditioner: argument `x` must be a dense tensor of torch.float64, shape"
        ):
            conditioner(x)
