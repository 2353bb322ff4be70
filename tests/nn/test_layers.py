"""Nested layers compute what torch's do, and what is left of them when units are cut."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.distributions import ContinuousBernoulli, Normal, kl_divergence

from pyro_vnd.distributions import OrderedMask
from pyro_vnd.nn import NestedLayer, Width
from pyro_vnd.nn.axis import Run
from pyro_vnd.nn.layers import cut_law

LAYERS = {
    "linear": (lambda: nn.Linear(6, 8), (5, 6)),
    "linear-3d": (lambda: nn.Linear(6, 8, bias=False), (5, 2, 6)),
    "conv1d": (lambda: nn.Conv1d(6, 8, 3, stride=2, padding=1), (5, 6, 7)),
    "conv2d": (lambda: nn.Conv2d(6, 8, 3, dilation=2, bias=False), (5, 6, 7, 7)),
    "conv2d-same": (lambda: nn.Conv2d(6, 8, (3, 5), padding="same"), (5, 6, 7, 7)),
    "conv2d-reflect": (lambda: nn.Conv2d(6, 8, 3, padding=(1, 2), padding_mode="reflect"), (5, 6, 7, 7)),
    "conv2d-circular": (lambda: nn.Conv2d(6, 8, 3, padding=1, padding_mode="circular"), (5, 6, 7, 7)),
    "conv2d-same-even": (
        lambda: nn.Conv2d(6, 8, (4, 3), padding="same", dilation=(1, 2), padding_mode="reflect"),
        (5, 6, 7, 7),
    ),
    "conv2d-valid": (lambda: nn.Conv2d(6, 8, 3, padding="valid", padding_mode="circular"), (5, 6, 7, 7)),
    "conv2d-replicate": (lambda: nn.Conv2d(6, 8, 3, padding="same", padding_mode="replicate"), (5, 6, 7, 7)),
    "conv3d": (lambda: nn.Conv3d(6, 8, 2, stride=(1, 2, 1)), (5, 6, 3, 4, 3)),
    "transposed1d": (lambda: nn.ConvTranspose1d(6, 8, 3, stride=2, output_padding=1), (5, 6, 4)),
    "transposed2d": (lambda: nn.ConvTranspose2d(6, 8, 3, stride=2, padding=1, output_padding=1), (5, 6, 4, 4)),
    "transposed2d-dilated": (lambda: nn.ConvTranspose2d(6, 8, 3, dilation=2, bias=False), (5, 6, 4, 4)),
    "transposed3d": (lambda: nn.ConvTranspose3d(6, 8, 2), (5, 6, 2, 3, 2)),
}
GROUPED = {
    "depthwise": (lambda: nn.Conv2d(6, 6, 3, padding=1, groups=6), (5, 6, 5, 5), 6),
    "multiplied": (lambda: nn.Conv1d(6, 12, 3, groups=6), (5, 6, 5), 6),
    "groups": (lambda: nn.Conv2d(12, 6, 3, groups=3), (5, 12, 5, 5), 3),
    "transposed": (lambda: nn.ConvTranspose2d(12, 6, 3, groups=3), (5, 12, 5, 5), 3),
    "transposed-depthwise": (lambda: nn.ConvTranspose1d(6, 6, 3, groups=6, bias=False), (5, 6, 5), 6),
}
every = pytest.mark.parametrize(("build", "shape"), LAYERS.values(), ids=LAYERS)
every_grouped = pytest.mark.parametrize(("build", "shape", "units"), GROUPED.values(), ids=GROUPED)


def channel_dim(x, layer):
    return x.dim() - 1 if isinstance(layer, nn.Linear) else 1


@every
def test_nothing_cut_is_torchs_own_layer(build, shape):
    plain, x = build(), torch.randn(shape)
    hidden = Width("in", 6, 3), Width("out", 8, 4)
    layer = NestedLayer(plain, inputs=hidden[0], outputs=hidden[1])
    assert torch.equal(layer(x), plain(x))
    for width in hidden:
        width.hold(torch.ones(width.num_blocks))
    torch.testing.assert_close(layer(x), plain(x))


@every_grouped
def test_grouped_layers_whole(build, shape, units):
    plain, x = build(), torch.randn(shape)
    width = Width("hidden", units)
    assert torch.equal(NestedLayer(plain, inputs=width, outputs=width)(x), plain(x))


@every
@pytest.mark.parametrize(("blocks_in", "blocks_out"), [(1, 4), (2, 1), (3, 3)])
def test_slicing_is_masking_the_inputs(build, shape, blocks_in, blocks_out):
    plain, x = build(), torch.randn(shape)
    inputs, outputs = Width("in", 6, 3), Width("out", 8, 4)
    layer = NestedLayer(plain, inputs=inputs, outputs=outputs)
    kept_in, kept_out = inputs.kept_units(blocks_in), outputs.kept_units(blocks_out)
    dim = channel_dim(x, plain)
    by_hand = x.clone()
    by_hand.narrow(dim, kept_in, 6 - kept_in).zero_()
    expected = plain(by_hand).narrow(dim, 0, kept_out)

    inputs.hold(inputs.prefix(torch.tensor(blocks_in / 3)))
    torch.testing.assert_close(layer(x).narrow(dim, 0, kept_out), expected, rtol=1e-12, atol=1e-12)
    inputs.hold(kept_units=kept_in)
    outputs.hold(kept_units=kept_out)
    torch.testing.assert_close(layer(x.narrow(dim, 0, kept_in)), expected, rtol=1e-12, atol=1e-12)


@every_grouped
def test_slicing_groups(build, shape, units):
    plain, x = build(), torch.randn(shape)
    width = Width("hidden", units)
    layer = NestedLayer(plain, inputs=width, outputs=width)
    for kept in range(1, units + 1):
        width.release()
        kept_in, kept_out = kept * plain.in_channels // units, kept * plain.out_channels // units
        width.hold(kept_units=kept)
        torch.testing.assert_close(layer(x[:, :kept_in]), plain(x)[:, :kept_out], rtol=1e-12, atol=1e-12)


@every
def test_a_mask_for_each_example_is_a_loop_over_examples(build, shape):
    plain, x = build(), torch.randn(shape)
    inputs = Width("in", 6, 3)
    layer = NestedLayer(plain, inputs=inputs)
    masks = OrderedMask.uniform(3).sample((len(x),))
    inputs.hold(masks)
    rows = layer(x)
    for n, mask in enumerate(masks):
        inputs.hold(mask)
        torch.testing.assert_close(rows[n], layer(x[n : n + 1])[0], rtol=1e-12, atol=1e-12)


# Gates: the probability that both ends of a weight are kept.


def enumerated_gate(layer, widths) -> torch.Tensor:
    """Average over all masks of all widths whether a weight connects two units that are both kept."""
    plain, total = layer.plain, 0.0
    laws = [width.law for width in widths]
    for lengths in itertools.product(*[range(law.num_units) for law in laws]):
        probability = math.prod(law.probs[k].item() for law, k in zip(laws, lengths, strict=True))
        for width, k in zip(widths, lengths, strict=True):
            width.hold(width.prefix(torch.tensor((k + 1) / width.num_blocks)))
        masks = [axis.mask() for axis in (layer.output_axis, layer.input_axis)]
        rows, columns = (
            torch.ones(axis.size) if mask is None else mask
            for mask, axis in zip(masks, (layer.output_axis, layer.input_axis), strict=True)
        )
        kept = columns.unsqueeze(1) * rows if layer.transposed else rows.unsqueeze(1) * columns
        total = total + probability * kept.reshape(*kept.shape, *[1] * (plain.weight.dim() - 2))
    return total


def hold_keep_probs(*widths):
    for width in widths:
        width.hold(keep_probs=width.law.keep_probs)


def learned(name, *args, **options):
    width = Width(name, *args, **options)
    torch.nn.init.normal_(width.logits)
    return width


@pytest.mark.parametrize(
    "build", [lambda: nn.Linear(6, 8), lambda: nn.Conv2d(6, 8, 3), lambda: nn.ConvTranspose1d(6, 8, 2)]
)
@pytest.mark.parametrize("ends", ["both", "inputs", "outputs", "none"])
def test_gate_is_the_probability_that_both_units_are_kept(build, ends):
    a, b = learned("a", 6, 3), learned("b", 8)
    inputs, outputs = a if ends in ("both", "inputs") else None, b if ends in ("both", "outputs") else None
    layer = NestedLayer(build(), inputs=inputs, outputs=outputs)
    widths = [width for width in (inputs, outputs) if width is not None]
    expected = enumerated_gate(layer, widths)
    hold_keep_probs(*widths)
    gate = layer.gate("weight")
    if ends == "none":
        assert gate is None
        return
    shape = layer.plain.weight.shape
    torch.testing.assert_close(gate.expand(shape), expected.expand(shape))
    bias = layer.gate("bias")
    assert (bias is None) == (outputs is None)
    if bias is not None:
        torch.testing.assert_close(bias, b.law.keep_probs)


def test_gate_between_layers_of_one_width():
    width = learned("shared", 6, 3)
    layer = NestedLayer(nn.Linear(6, 6), inputs=width, outputs=width)
    expected = enumerated_gate(layer, [width])
    hold_keep_probs(width)
    gate = layer.gate("weight")
    torch.testing.assert_close(gate, expected)
    keep = width.spread(width.law.keep_probs)
    torch.testing.assert_close(gate, torch.tensor([[keep[max(i, j)] for j in range(6)] for i in range(6)]))


def test_gate_between_concatenations_that_share_widths():
    a, b = learned("a", 2), learned("b", 4, 2)
    runs_in, runs_out = (Run(a, 2), Run(None, 1), Run(b, 8)), (Run(b, 4), Run(a, 4))
    layer = NestedLayer(nn.Linear(11, 8), inputs=runs_in, outputs=runs_out)
    expected = enumerated_gate(layer, [a, b])
    hold_keep_probs(a, b)
    torch.testing.assert_close(layer.gate("weight"), expected)


@every_grouped
def test_gate_of_grouped_layers_is_that_of_the_group(build, shape, units):
    width = learned("hidden", units)
    layer = NestedLayer(build(), inputs=width, outputs=width)
    hold_keep_probs(width)
    rows = layer.plain.weight.shape[0]
    expected = width.law.keep_probs.repeat_interleave(rows // units)
    shape = layer.plain.weight.shape
    got = layer.gate("weight").expand(shape)
    torch.testing.assert_close(got, expected.reshape(-1, *[1] * (len(shape) - 1)).expand(shape))


def test_mean_kl_of_kept_blocks_is_the_gated_kl():
    a, b = learned("a", 6, 3), learned("b", 8, 4)
    prior = {"weight": Normal(torch.zeros(8, 6), torch.rand(8, 6) + 0.5), "bias": Normal(0.1, 2.0)}
    layer = NestedLayer(nn.Linear(6, 8), inputs=a, outputs=b, prior=prior)
    expected = torch.zeros(2)
    for i, j in itertools.product(range(3), range(4)):
        a.hold(kept_units=a.kept_units(i + 1))
        b.hold(kept_units=b.kept_units(j + 1))
        kls = [kl_divergence(layer.law(name, "posterior"), layer.law(name, "prior")) for name in ("weight", "bias")]
        expected += a.law.probs[i] * b.law.probs[j] * torch.stack(kls).detach()
    a.release(), b.release()
    hold_keep_probs(a, b)
    for name, value in zip(("weight", "bias"), expected, strict=True):
        torch.testing.assert_close(kl_divergence(layer.law(name, "posterior"), layer.law(name, "prior")), value)


def test_a_law_by_probabilities_is_cut_by_these():
    """It has logits, too, and cannot be made of both."""
    law = ContinuousBernoulli(torch.linspace(0.1, 0.8, 8).reshape(4, 2))
    cut = cut_law(law, lambda x: x[:3])
    assert type(cut) is ContinuousBernoulli
    torch.testing.assert_close(cut.probs, law.probs[:3])
    value = torch.rand(3, 2)
    torch.testing.assert_close(cut.log_prob(value), law.log_prob(torch.cat([value, value[:1]]))[:3])
