"""Which layers share channels: known answers for known nets, and nets that are cut to see whether it was true."""

import copy
import random

import channel_nets as nets
import pytest
import torch
from channel_nets import Net, conv
from torch import nn
from torch.nn import functional as F

from pyro_vnd.nn.tracing import channel_groups

CONVOLUTIONS = nn.modules.conv._ConvNd
BATCH_NORMS = nn.modules.batchnorm._BatchNorm
EXACT = [
    *[nets.mlp, nets.lenet, nets.vgg, nets.resnet, nets.densenet, nets.mobilenet, nets.resnext, nets.widening_groups],
    *[nets.concat_depthwise, nets.group_norm, nets.instance_norm, nets.autoencoder, nets.volume, nets.attention],
    *[nets.fused_attention, nets.einsum_attention, nets.squeeze_excite, nets.spatial_attention, nets.shared_layer],
    *[nets.mixer, nets.shape_juggling, nets.sum_of_group_norms],
]


def randomised(net):
    """Give norms the parameters and statistics of a net that was trained, and evaluate."""
    for module in net.modules():
        for name in ("weight", "running_var"):
            if isinstance(module, BATCH_NORMS | nn.GroupNorm) and getattr(module, name, None) is not None:
                getattr(module, name).data.uniform_(0.5, 1.5)
        for name in ("bias", "running_mean"):
            if isinstance(module, BATCH_NORMS | nn.GroupNorm) and getattr(module, name, None) is not None:
                getattr(module, name).data.normal_()
    return net.eval()


def channel_mask(layout, groups, keep):
    """Which channels are left when each group keeps its first units."""
    parts = []
    for group, size in layout:
        limit = size if group is None else keep[group] * (size // groups.units[group])
        parts.append(torch.arange(size) < limit)
    return torch.cat(parts)


def mask_inputs(net, groups, keep):
    """Zero what is cut wherever a linear or convolutional layer reads it."""
    net = copy.deepcopy(net)
    for name, layer in net.named_modules():
        if name in groups.layers and isinstance(layer, nn.Linear | CONVOLUTIONS):
            mask = channel_mask(groups.layers[name].inputs, groups, keep)
            if isinstance(layer, CONVOLUTIONS):
                mask = mask.reshape(-1, *[1] * len(layer.kernel_size))
            layer.register_forward_pre_hook(lambda _, args, mask=mask: (args[0] * mask,))
    return net


def cut(net, groups, keep):
    """Delete rows and columns of the weights."""
    net = copy.deepcopy(net)
    for name, channels in groups.layers.items():
        layer = net.get_submodule(name)
        rows, columns = (channel_mask(lay, groups, keep) for lay in (channels.outputs, channels.inputs))
        transposed = isinstance(layer, CONVOLUTIONS) and layer.transposed
        conv_groups = getattr(layer, "groups", 1)
        first, second = (columns, rows) if transposed else (rows, columns)
        for tensors in (layer._parameters, layer._buffers):
            for key, tensor in tensors.items():
                if tensor is None or tensor.dim() == 0:
                    continue
                value = tensor.data[first if key == "weight" else rows]
                if key == "weight" and value.dim() > 1 and conv_groups == 1:
                    value = value[:, second]
                tensors[key] = nn.Parameter(value) if isinstance(tensor, nn.Parameter) else value
        if isinstance(layer, CONVOLUTIONS):
            layer.groups = conv_groups * int(columns.sum()) // len(columns) if conv_groups > 1 else 1
            layer.in_channels, layer.out_channels = int(columns.sum()), int(rows.sum())
        elif isinstance(layer, nn.GroupNorm):
            layer.num_groups = max(1, layer.num_groups * int(rows.sum()) // len(rows))
            layer.num_channels = int(rows.sum())
        elif isinstance(layer, nn.modules.batchnorm._NormBase):
            layer.num_features = int(rows.sum())
        elif isinstance(layer, nn.LayerNorm):
            layer.normalized_shape = (int(rows.sum()),)
    return net


@pytest.mark.parametrize("build", EXACT)
def test_deleting_channels_is_masking_them(build):
    net, x = build()
    randomised(net)
    groups = channel_groups(net, x)
    changed = 0
    draw = random.Random(0)
    for trial in range(6):
        keep = {group: 1 if trial == 0 else draw.randint(1, units) for group, units in groups.units.items()}
        expected, small = mask_inputs(net, groups, keep)(x), cut(net, groups, keep)
        torch.testing.assert_close(small(x), expected, atol=1e-10, rtol=1e-8)
        changed += not torch.allclose(expected, net(x))
        if trial == 0:
            size, full = (sum(p.numel() for p in each.parameters()) for each in (small, net))
            assert size < full
    assert changed >= 2  # the masks do something


def test_mlp():
    groups = channel_groups(*nets.mlp())
    assert list(groups.units.items()) == [("0", 12), ("2", 8)]
    assert list(groups.layers) == ["0", "2", "3", "4"]  # an activation without parameters is no layer
    assert groups.layers["0"].inputs == ((None, 5),)
    assert groups.layers["2"].outputs == groups.layers["3"].inputs == groups.layers["4"].inputs == (("2", 8),)
    assert groups.layers["4"].outputs == ((None, 3),)
    assert groups.whole == {"4": "it reaches the net's output"}


def test_flatten_spreads_a_channel_over_its_pixels():
    groups = channel_groups(*nets.lenet())
    assert list(groups.units.items()) == [("conv1", 6), ("conv2", 16), ("fc1", 20)]
    assert groups.layers["fc1"].inputs == (("conv2", 64),)


def test_batch_norm_keeps_the_channels():
    groups = channel_groups(*nets.vgg())
    assert groups.names == ("0", "5", "10")
    assert groups.layers["6"].inputs == groups.layers["6"].outputs == (("5", 12),)
    assert groups.layers["11"].outputs == (("10", 10),)


def test_sums_of_a_stage_share_a_group():
    groups = channel_groups(*nets.resnet())
    inner = [f"blocks.{i}.conv1" for i in range(4)]
    assert groups.names == ("stem", *inner[:3], "blocks.2.conv2", inner[3])
    for name in ("blocks.2.down.0", "blocks.2.down.1", "blocks.3.conv2", "blocks.3.bn2"):
        assert groups.layers[name].outputs == (("blocks.2.conv2", 12),)
    assert groups.layers["blocks.1.conv2"].outputs == (("stem", 8),)


def test_concatenation_keeps_groups_apart():
    groups = channel_groups(*nets.densenet())
    assert groups.names == ("stem", "grow", "last")
    assert groups.layers["bn2"].outputs == groups.layers["last"].inputs == ((None, 3), ("stem", 8), ("grow", 4))


def test_depthwise_convolution_is_tied_to_its_input():
    groups = channel_groups(*nets.mobilenet())
    assert list(groups.units.items()) == [("0", 8), ("1.expand", 24)]
    assert groups.layers["1.depthwise"].inputs == groups.layers["1.depthwise"].outputs == (("1.expand", 24),)
    assert groups.layers["1.project"].outputs == (("0", 8),)


def test_grouped_convolutions_are_cut_by_groups():
    groups = channel_groups(*nets.resnext())  # 24 channels in 4 groups, then in 6: halves fit both
    assert list(groups.units.items()) == [("0", 2)]
    assert groups.layers["7"].inputs == (("0", 12),)


def test_grouped_convolution_with_other_outputs():
    groups = channel_groups(*nets.widening_groups())
    assert list(groups.units.items()) == [("0", 2)]
    assert [groups.layers[name].outputs for name in "0246"] == [(("0", 8),), (("0", 16),), (("0", 12),), (("0", 8),)]


def test_group_norm_is_cut_by_groups():
    assert channel_groups(*nets.group_norm()).units == {"0": 6}
    assert channel_groups(*nets.sum_of_group_norms()).units == {"a": 2}  # 4 groups and 6
    net = nn.Sequential(nn.Conv2d(3, 12, 1), nn.GroupNorm(1, 12), nn.Conv2d(12, 2, 1))
    assert channel_groups(net, torch.randn(2, 3, 4, 4)).units == {"0": 12}


@pytest.mark.parametrize("norm", [nn.LayerNorm, getattr(nn, "RMSNorm", nn.LayerNorm)])
def test_layer_norm_in_a_residual_net(norm):
    block = Net(
        lambda net, x: x + net.down(F.gelu(net.up(net.norm(x)))),
        norm=norm(8),
        up=nn.Linear(8, 16),
        down=nn.Linear(16, 8),
    )
    net = nn.Sequential(nn.Linear(3, 8), block, norm(8), nn.Linear(8, 2))
    groups = channel_groups(net, torch.randn(2, 3))
    assert list(groups.units.items()) == [("0", 8), ("1.up", 16)]
    assert groups.layers["2"].inputs == groups.layers["1.norm"].outputs == (("0", 8),)


def test_norm_over_several_axes_stays_whole():
    net = nn.Sequential(conv(1, 4), nn.LayerNorm((4, 3, 3)), conv(4, 6), nn.ReLU(), conv(6, 1))
    groups = channel_groups(net, torch.randn(2, 1, 3, 3))
    assert groups.names == ("2",)
    assert "LayerNorm" in groups.whole["0"]


def test_autoencoder_has_a_whole_output():
    groups = channel_groups(*nets.autoencoder())
    assert groups.names == ("0", "2", "4")
    assert groups.layers["7"].outputs == ((None, 1),)


@pytest.mark.parametrize("build", [nets.attention, nets.fused_attention, nets.einsum_attention])
def test_heads_are_the_units_of_attention(build):
    groups = channel_groups(*build())
    assert list(groups.units.items()) == [("q", 3)]
    assert groups.layers["out"].inputs == groups.layers["k"].outputs == (("q", 12),)


def test_gate_shares_the_group_of_what_it_scales():
    groups = channel_groups(*nets.squeeze_excite())
    assert list(groups.units.items()) == [("conv", 8), ("down", 4)]
    assert groups.layers["up"].outputs == (("conv", 8),)


def test_shared_layer_has_one_layout():
    groups = channel_groups(*nets.shared_layer())
    assert groups.names == ("first",)
    assert groups.layers["twice"].inputs == groups.layers["twice"].outputs == (("first", 6),)
