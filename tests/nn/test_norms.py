"""Norms over channels that may be cut."""

import pytest
import torch
from torch import nn

from pyro_vnd.distributions import OrderedMask
from pyro_vnd.nn import NestedNorm, Width
from pyro_vnd.nn.axis import Run
from pyro_vnd.nn.recognition import as_torch_has_it

NORMS = {
    "batch1d": (lambda: nn.BatchNorm1d(8), (5, 8)),
    "batch2d": (lambda: nn.BatchNorm2d(8, affine=False), (5, 8, 3, 3)),
    "batch3d": (lambda: nn.BatchNorm3d(8, momentum=None), (5, 8, 3, 2, 2)),
    "batch-without-statistics": (lambda: nn.BatchNorm1d(8, track_running_stats=False), (5, 8)),
    "instance1d": (lambda: nn.InstanceNorm1d(8), (5, 8, 6)),
    "instance2d": (lambda: nn.InstanceNorm2d(8, affine=True), (5, 8, 3, 3)),
    "instance3d": (lambda: nn.InstanceNorm3d(8, affine=True, track_running_stats=True), (5, 8, 3, 2, 2)),
    "group": (lambda: nn.GroupNorm(4, 8), (5, 8, 3, 3)),
    "group-one": (lambda: nn.GroupNorm(1, 8), (5, 8, 3, 3)),
    "group-one-vectors": (lambda: nn.GroupNorm(1, 8, affine=False), (5, 8)),
    "layer": (lambda: nn.LayerNorm(8), (5, 3, 8)),
    "layer-bare": (lambda: nn.LayerNorm(8, elementwise_affine=False), (5, 8)),
    "layer-without-bias": (lambda: nn.LayerNorm(8, bias=False), (5, 3, 8)),
    "rms": (lambda: nn.RMSNorm(8), (5, 3, 8)),
    "rms-eps": (lambda: nn.RMSNorm(8, eps=0.1, elementwise_affine=False), (5, 8)),
    "prelu": (lambda: nn.PReLU(8), (5, 8, 3)),
}
every = pytest.mark.parametrize(("build", "shape"), NORMS.values(), ids=NORMS)


def randomised(build):
    norm = build()
    for name, value in [*norm.named_parameters(), *norm.named_buffers()]:
        if value.dim():
            nn.init.uniform_(value, 0.5, 1.5) if "bias" not in name else nn.init.normal_(value)
    return norm


def cut_by_hand(norm, channels):
    """The same norm made anew with fewer channels."""
    if isinstance(norm, nn.GroupNorm):
        groups = 1 if norm.num_groups == 1 else norm.num_groups * len(channels) // 8
        small = nn.GroupNorm(groups, len(channels), affine=norm.affine)
    elif isinstance(norm, nn.LayerNorm):
        small = nn.LayerNorm(len(channels), norm.eps, norm.elementwise_affine, norm.bias is not None)
    elif isinstance(norm, nn.RMSNorm):
        small = nn.RMSNorm(len(channels), norm.eps, norm.elementwise_affine)
    elif isinstance(norm, nn.PReLU):
        small = nn.PReLU(len(channels))
    else:
        small = type(norm)(len(channels), norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    state = {name: value[channels] if value.dim() else value for name, value in norm.state_dict().items()}
    small.load_state_dict(state)
    return small.train(norm.training)


def channels_last(norm):
    return isinstance(norm, nn.LayerNorm | nn.RMSNorm)


@every
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("blocks", [1, 3, 4])
def test_cut_norms_are_norms_of_fewer_channels(build, shape, training, blocks):
    norm, x, width = randomised(build).train(training), torch.randn(shape), Width("hidden", 8, 4)
    nested, kept = NestedNorm(norm, width), list(range(2 * blocks))
    dim = x.dim() - 1 if channels_last(norm) else 1
    small, x_kept = cut_by_hand(norm, kept), x.index_select(dim, torch.tensor(kept))
    state = {name: value.clone() for name, value in norm.state_dict().items()}

    width.hold(width.prefix(torch.tensor(blocks / 4)))
    masked = nested(x).index_select(dim, torch.tensor(kept))
    after = {name: value.clone() for name, value in norm.state_dict().items()}
    norm.load_state_dict(state)
    width.hold(kept_units=len(kept))
    expected = small(x_kept)
    torch.testing.assert_close(nested(x_kept), expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(masked, expected, rtol=1e-11, atol=1e-11)
    for name, value in small.state_dict().items():
        for states in (norm.state_dict(), after):
            torch.testing.assert_close(states[name][kept] if value.dim() else states[name], value)


@every
def test_statistics_of_channels_that_are_not_computed_stay(build, shape):
    norm, width = randomised(build).train(), Width("hidden", 8, 4)
    nested, dim = NestedNorm(norm, width), -1 if channels_last(norm) else 1
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    width.hold(kept_units=6)
    nested(torch.randn(shape).narrow(dim, 0, 6))
    for name, value in norm.state_dict().items():
        if value.dim():
            assert torch.equal(value[6:], before[name][6:])
            assert torch.equal(value[:6], before[name][:6]) == ("running" not in name)


@every
def test_a_mask_for_each_example_is_a_loop_over_examples(build, shape):
    norm, x, width = randomised(build).eval(), torch.randn(shape), Width("hidden", 8, 4)
    nested, masks = NestedNorm(norm, width), OrderedMask.uniform(4).sample((5,))
    if isinstance(norm, nn.BatchNorm1d) and not norm.track_running_stats:
        return  # depends on the batch
    width.hold(masks)
    rows = nested(x)
    dim = -1 if channels_last(norm) else 0
    for n, mask in enumerate(masks):
        width.hold(mask)
        kept = int(width.mask.sum())
        torch.testing.assert_close(rows[n].narrow(dim, 0, kept), nested(x[n : n + 1])[0].narrow(dim, 0, kept))


@pytest.mark.parametrize(
    "build", [lambda: nn.BatchNorm1d(11), lambda: nn.InstanceNorm1d(11), lambda: nn.GroupNorm(1, 11)]
)
def test_norms_over_runs_of_several_widths(build):
    norm, x = randomised(build).train(), torch.randn(5, 11, 4)
    a, b = Width("a", 4), Width("b", 3)
    nested = NestedNorm(norm, (Run(a, 4), Run(None, 4), Run(b, 3)))
    kept = [0, 1, *range(4, 8), 8]
    small = cut_by_hand(norm, kept)
    a.hold(kept_units=2), b.hold(kept_units=1)
    torch.testing.assert_close(nested(x[:, kept]), small(x[:, kept]))
    for name, value in small.state_dict().items():
        if value.dim():
            torch.testing.assert_close(norm.state_dict()[name][kept], value)
    b.hold(torch.tensor([1.0, 0.0, 0.0]))
    expected = small.eval()(x[:, kept]) if isinstance(norm, nn.GroupNorm) else None
    if expected is not None:
        torch.testing.assert_close(nested(x[:, [0, 1, *range(4, 11)]])[:, :7], expected)


def test_gradients_of_kept_channels_do_not_see_dropped_ones():
    norm, width = randomised(lambda: nn.LayerNorm(8)), Width("hidden", 8, 4)
    x = torch.randn(5, 8, requires_grad=True)
    width.hold(torch.tensor([1.0, 1.0, 0.0, 0.0]))
    NestedNorm(norm, width)(x)[:, :4].square().sum().backward()
    assert (x.grad[:, 4:] == 0).all()
    assert (x.grad[:, :4] != 0).all()


def test_what_is_no_norm_of_channels_is_an_error():
    with pytest.raises(ValueError, match=r"`layer` must be one of BatchNorm1d, .*; got Linear"):
        NestedNorm(nn.Linear(2, 2), None)
    with pytest.raises(ValueError, match=r"normalise over the channels only; got \(4, 8\)"):
        NestedNorm(nn.LayerNorm((4, 8)), Width("a", 8))
    assert "channels=['a']" in repr(NestedNorm(nn.BatchNorm1d(4), Width("a", 4)))


@pytest.mark.parametrize("eps", [1e-5, 1e-6, 1e-8, 1e-12])
def test_a_number_that_a_norm_has_in_its_code_alone_is_found(eps):
    class Norm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.rand(6))

        def forward(self, x):
            return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)

    assert as_torch_has_it(Norm()).eps == eps
