"""Small nets of the usual designs, each with an input."""

import torch
from torch import nn
from torch.nn import functional as F


class Net(nn.Module):
    """Layers by name, and a function of these layers and the input."""

    def __init__(self, forward, **layers):
        super().__init__()
        self.body = forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x):
        return self.body(self, x)


def conv(inputs, outputs, kernel=3, **options):
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **options)


def mlp():
    return nn.Sequential(nn.Linear(5, 12), nn.Tanh(), nn.Linear(12, 8), nn.PReLU(8), nn.Linear(8, 3)), torch.randn(2, 5)


def lenet():
    def forward(net, x):
        x = F.max_pool2d(F.relu(net.conv1(x)), 2)
        x = torch.flatten(F.max_pool2d(F.relu(net.conv2(x)), kernel_size=2), 1)
        return F.log_softmax(net.fc2(F.relu(net.fc1(x))), dim=1)

    layers = {"conv1": conv(1, 6, 5), "conv2": conv(6, 16, 5), "fc1": nn.Linear(16 * 4, 20), "fc2": nn.Linear(20, 10)}
    return Net(forward, **layers), torch.randn(2, 1, 8, 8)


def vgg():
    net = nn.Sequential(
        *[conv(3, 8, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Dropout(0.5)],
        *[conv(8, 12, bias=False), nn.BatchNorm2d(12), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d((2, 2))],
        *[nn.Flatten(), nn.Linear(48, 10), nn.BatchNorm1d(10), nn.ReLU(), nn.Linear(10, 3)],
    )
    return net, torch.randn(2, 3, 8, 8)


def basic_block(inputs, outputs, stride):
    def forward(block, x):
        out = block.bn2(block.conv2(F.relu(block.bn1(block.conv1(x)))))
        out += block.down(x)
        return F.relu(out)

    down = nn.Sequential(conv(inputs, outputs, 1, stride=stride), nn.BatchNorm2d(outputs))
    return Net(
        forward,
        conv1=conv(inputs, outputs, stride=stride),
        bn1=nn.BatchNorm2d(outputs),
        conv2=conv(outputs, outputs),
        bn2=nn.BatchNorm2d(outputs),
        down=nn.Identity() if inputs == outputs and stride == 1 else down,
    )


def resnet():
    blocks = nn.Sequential(basic_block(8, 8, 1), basic_block(8, 8, 1), basic_block(8, 12, 2), basic_block(12, 12, 1))
    net = Net(
        lambda net, x: net.head(net.blocks(F.relu(net.bn(net.stem(x)))).mean([2, 3])),
        stem=conv(3, 8),
        bn=nn.BatchNorm2d(8),
        blocks=blocks,
        head=nn.Linear(12, 4),
    )
    return net, torch.randn(2, 3, 8, 8)


def densenet():
    def forward(net, x):
        first = net.stem(x)
        second = torch.cat([first, net.grow(F.relu(net.bn1(first)))], 1)
        third = torch.cat((x, second), dim=1)
        return net.head(net.last(F.relu(net.bn2(third))).amax((-2, -1)))

    layers = {"bn1": nn.BatchNorm2d(8), "grow": conv(8, 4), "bn2": nn.BatchNorm2d(15), "last": conv(15, 6)}
    return Net(forward, stem=conv(3, 8), **layers, head=nn.Linear(6, 2)), torch.randn(2, 3, 4, 4)


def mobilenet():
    inverted = Net(
        lambda net, x: x + net.project(F.relu6(net.bn(net.depthwise(F.hardswish(net.expand(x)))))),
        expand=conv(8, 24, 1),
        depthwise=conv(24, 24, groups=24),
        bn=nn.BatchNorm2d(24),
        project=conv(24, 8, 1),
    )
    tail = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)]
    return nn.Sequential(conv(3, 8), inverted, *tail), torch.randn(2, 3, 6, 6)


def resnext():
    body = [conv(3, 24), nn.ReLU(), conv(24, 24, groups=4), nn.BatchNorm2d(24), nn.ReLU(), conv(24, 12, groups=6)]
    return nn.Sequential(*body, nn.ReLU(), conv(12, 4)), torch.randn(2, 3, 5, 5)


def widening_groups():
    """Grouped convolutions with other numbers of outputs than of inputs, forward and transposed."""
    return nn.Sequential(
        *[conv(3, 8), nn.SiLU(), conv(8, 16, groups=8), nn.SiLU(), conv(16, 12, groups=4), nn.SiLU()],
        *[nn.ConvTranspose2d(12, 8, 2, groups=2), nn.SiLU(), conv(8, 2)],
    ), torch.randn(2, 3, 5, 5)


def concat_depthwise():
    """A depthwise convolution of channels of two layers."""
    return Net(
        lambda net, x: net.out(net.depthwise(torch.cat([net.a(x), net.b(x)], 1)).relu()),
        a=conv(2, 4),
        b=conv(2, 6),
        depthwise=conv(10, 20, groups=10),
        out=conv(20, 3),
    ), torch.randn(2, 2, 4, 4)


def group_norm():
    return nn.Sequential(conv(3, 12), nn.GroupNorm(6, 12), nn.ReLU(), nn.Conv2d(12, 2, 1)), torch.randn(2, 3, 4, 4)


def sum_of_group_norms():
    """Two branches with groups of different sizes."""
    layers = {"a": conv(3, 12), "b": conv(3, 12), "norm_a": nn.GroupNorm(4, 12), "norm_b": nn.GroupNorm(6, 12)}
    return Net(
        lambda net, x: net.out((net.norm_a(net.a(x)) + net.norm_b(net.b(x))).relu()), **layers, out=conv(12, 2)
    ), torch.randn(2, 3, 4, 4)


def instance_norm():
    body = [
        nn.Conv1d(2, 6, 3),
        nn.InstanceNorm1d(6, affine=True),
        nn.ELU(),
        nn.ZeroPad1d(1),
        nn.Upsample(scale_factor=2),
    ]
    return nn.Sequential(*body, nn.Conv1d(6, 2, 3)), torch.randn(2, 2, 9)


def autoencoder():
    encoder = [nn.Conv2d(1, 6, 3, stride=2), nn.ReLU(), nn.Conv2d(6, 4, 3, stride=2), nn.Sigmoid()]
    decoder = [
        nn.ConvTranspose2d(4, 6, 3, stride=2),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.ConvTranspose2d(6, 1, 3, stride=2),
    ]
    return nn.Sequential(*encoder, *decoder), torch.randn(2, 1, 15, 15)


def volume():
    layers = [nn.Conv3d(1, 4, 2), nn.BatchNorm3d(4), nn.GELU(), nn.AvgPool3d(2), nn.Conv3d(4, 6, 1), nn.Flatten(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(6, 2)), torch.randn(2, 1, 3, 3, 3)


def attention(handwritten=True):
    def forward(net, x):
        B, N, _ = x.shape
        q, k, v = (layer(x).reshape(B, N, -1, 4).transpose(1, 2) for layer in (net.q, net.k, net.v))
        if handwritten:
            weights = (q @ k.transpose(-2, -1) * q.size(-1) ** -0.5).softmax(-1)
            out = torch.matmul(weights, v)
        else:
            out = F.scaled_dot_product_attention(q, k, v)
        return net.out(out.permute(0, 2, 1, 3).flatten(2))

    names = ("q", "k", "v", "out")
    return Net(forward, **{name: nn.Linear(12, 12) for name in names}), torch.randn(2, 5, 12)


def fused_attention():
    return attention(handwritten=False)


def einsum_attention():
    def forward(net, x):
        q, k, v = (layer(x).unflatten(-1, (-1, 4)) for layer in (net.q, net.k, net.v))
        weights = torch.einsum("bnhd,bmhd->bhnm", q, k).softmax(-1)
        return net.out(torch.einsum("bhnm,bmhd->bnhd", [weights, v]).flatten(-2))

    return Net(forward, **{name: nn.Linear(12, 12) for name in ("q", "k", "v", "out")}), torch.randn(2, 5, 12)


def squeeze_excite():
    def forward(net, x):
        x = net.conv(x)
        scale = net.up(F.relu(net.down(x.mean((2, 3), keepdim=True))))
        return net.out(x * torch.sigmoid(scale))

    layers = {"conv": conv(3, 8), "down": conv(8, 4, 1), "up": conv(4, 8, 1), "out": conv(8, 2)}
    return Net(forward, **layers), torch.randn(2, 3, 4, 4)


def spatial_attention():
    """A gate of one channel, broadcast over all others."""
    layers = {"conv": conv(3, 8), "gate": conv(8, 1), "out": conv(8, 2)}
    return Net(lambda net, x: net.out((h := net.conv(x)) * net.gate(F.relu(h)).sigmoid() + 1), **layers), torch.randn(
        2, 3, 4, 4
    )


def shared_layer():
    def forward(net, x):
        return net.out(F.relu(net.twice(F.relu(net.twice(net.first(x))))))

    return Net(forward, first=nn.Linear(3, 6), twice=nn.Linear(6, 6), out=nn.Linear(6, 2)), torch.randn(4, 3)


def mixer():
    """Tokens and channels are mixed in turn; both hidden layers can be cut, and the stream as well."""

    def forward(net, x):
        x = net.embed(x)
        x = x + net.tokens(x.transpose(1, 2)).transpose(1, 2)
        return net.head((x + net.channels(x)).mean(1))

    def hidden(size, inner):
        return nn.Sequential(nn.Linear(size, inner), nn.GELU(), nn.Linear(inner, size))

    layers = {"tokens": hidden(5, 7), "channels": hidden(8, 9)}
    return Net(forward, embed=nn.Linear(3, 8), **layers, head=nn.Linear(8, 2)), torch.randn(2, 5, 3)


def shape_juggling():
    """Sizes that are read from the tensor itself, and channels that move from axis to axis."""

    def forward(net, x):
        x = net.a(x)
        B, C, H, W = x.shape
        x = x.view(B, C, H * W).permute(0, 2, 1)
        x = net.b(x).movedim(-1, 1).unsqueeze(-1).view(B, -1, H, W)
        x = F.pixel_shuffle(x, 2)
        return net.c(x[..., :2, :2].contiguous().view(x.size(0), x.size(1) * 4))

    return Net(forward, a=conv(2, 6), b=nn.Linear(6, 16), c=nn.Linear(16, 3)), torch.randn(2, 2, 4, 3)
