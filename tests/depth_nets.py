"""Nets whose blocks can be dropped, each with an input and its stages, and nets that look as if they had some.

The numbers are those of the blocks of each stage; a stage is "taken out" if its blocks leave the list that they are in.
"""

import torch
from torch import nn
from torch.nn import functional as F
from written_nets import RMS, Block, FusedAttention, Net, parameter

NETS = {}
DECOYS = {}


def net(stages, gone=True):
    """Register a function that returns a net and its input."""

    def register(build):
        NETS[build.__name__] = build, stages, gone
        return build

    return register


def decoy(why=""):
    """Register a net of which no block can be dropped, and the reason that `nest` gives, if there is more to say."""

    def register(build):
        DECOYS[build.__name__] = build, why
        return build

    return register


def tokens(*layers, size=12, loop=None):
    """Return a net of blocks of tokens, between a layer before and a layer after them, and its input."""

    def forward(net, x):
        x = net.before(x)
        for layer in net.layers:
            x = layer(x)
        return net.after(x.mean(1))

    parts = {"before": nn.Linear(8, size), "layers": nn.ModuleList(layers), "after": nn.Linear(size, 3)}
    return Net(loop or forward, **parts), torch.randn(2, 6, 8)


def block():
    return Block(12, FusedAttention(12, 3))


class Bottleneck(nn.Module):
    """Residual block of convolutions, with a projection where it changes the shape."""

    def __init__(self, inputs, outputs, stride=1):
        super().__init__()
        hidden = outputs // 2
        self.one, self.two = nn.Conv2d(inputs, hidden, 3, stride, 1), nn.Conv2d(hidden, outputs, 3, padding=1)
        self.norm1, self.norm2, self.relu = nn.BatchNorm2d(hidden), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
        changes = stride > 1 or inputs != outputs
        self.project = nn.Conv2d(inputs, outputs, 1, stride) if changes else None

    def forward(self, x):
        identity = x if self.project is None else self.project(x)
        out = self.norm2(self.two(self.relu(self.norm1(self.one(x)))))
        out += identity
        return self.relu(out)


@net({"2.depth": 2, "3.depth": 3})
def a_residual_net():
    stages = [nn.Sequential(Bottleneck(8, 8), Bottleneck(8, 8))]
    stages.append(nn.Sequential(Bottleneck(8, 12, 2), *(Bottleneck(12, 12) for _ in range(3))))
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 3)]
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), *stages, *head), torch.randn(2, 3, 10, 10)


@net({"3.depth": 2, "6.depth": 2})
def stages_in_one_list():
    sizes = [(8, 12), (12, 12), (12, 12), (12, 16), (16, 16), (16, 16)]
    blocks = [Bottleneck(inputs, outputs) for inputs, outputs in sizes]
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), *blocks, nn.Conv2d(16, 2, 3)), torch.randn(2, 3, 8, 8)


@net({"layers.depth": 4})
def blocks_with_a_norm_before():
    return tokens(*(block() for _ in range(4)))


class Residual(nn.Module):
    """Adds to its input what a part makes of it."""

    def __init__(self, part, size):
        super().__init__()
        self.norm, self.part = nn.LayerNorm(size), part

    def forward(self, x):
        return x + self.part(self.norm(x))


@net({"layers.depth": 3})
def blocks_of_residual_parts():
    def both():
        mlp = nn.Sequential(nn.Linear(12, 16), nn.GELU(), nn.Linear(16, 12))
        return nn.Sequential(Residual(FusedAttention(12, 3), 12), Residual(mlp, 12))

    return tokens(*(both() for _ in range(3)))


@net({"encoder.layers.depth": 3})
def an_encoder_of_torch_with_a_norm_after():
    def forward(net, x, padding):
        return net.after(net.encoder(net.before(x), src_key_padding_mask=padding)[:, 0])

    layer = nn.TransformerEncoderLayer(12, 3, 20, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    for one in encoder.layers:
        nn.init.normal_(one.linear1.weight)
    padding = torch.zeros(2, 6, dtype=torch.bool)
    padding[0, 4:] = True
    return Net(forward, before=nn.Linear(8, 12), encoder=encoder, after=nn.Linear(12, 3)), (
        torch.randn(2, 6, 8),
        padding,
    )


class TupleLayer(nn.Module):
    """Layer that returns the stream and what it was given or makes besides: the first one makes a bias for all."""

    def __init__(self, size, makes_bias):
        super().__init__()
        self.attention, self.norm, self.kind = FusedAttention(size, 3), RMS(size), "full"
        self.up, self.down = nn.Linear(size, 16), nn.Linear(16, size)
        self.bias = parameter(1, 1, size) if makes_bias else None

    def forward(self, hidden, mask=None, *, bias=None, with_weights=False, **rest):
        if bias is None:
            bias = self.bias * mask
        hidden = hidden + self.attention(self.norm(hidden)) * mask
        hidden = hidden + self.down(F.gelu(self.up(hidden + bias)))
        return hidden, (hidden.mean(-1) if with_weights else None), bias


def tuples(by_place):
    def forward(net, x):
        hidden, bias, mask = net.before(x), None, x[..., :1].sigmoid()
        for i in range(4) if by_place else net.layers:
            layer = net.layers[i] if by_place else i
            outputs = layer(hidden, mask=mask, bias=bias, cache=None, kind=layer.kind)
            hidden, bias = outputs[0], outputs[2]
        return net.after(hidden.mean(1))

    return tokens(*(TupleLayer(12, not i) for i in range(4)), loop=forward)


@net({"layers.depth": 4})
def blocks_that_return_tuples():
    return tuples(by_place=False)


@net({"layers.depth": 4}, gone=False)
def blocks_that_return_tuples_called_by_place():
    return tuples(by_place=True)


@net({"layers.depth": 3}, gone=False)
def blocks_called_by_place():
    def forward(net, x):
        x = net.before(x)
        for i in range(3):
            x = net.layers[i](x)
        return net.after(x.mean(1))

    return tokens(*(Residual(nn.Linear(12, 12), 12) for _ in range(3)), loop=forward)


@net({"depth": 3}, gone=False)
def blocks_that_are_attributes():
    def forward(net, x):
        return net.after(net.c(net.b(net.a(net.before(x)))).mean(1))

    blocks = {name: block() for name in "abc"}
    return Net(forward, before=nn.Linear(8, 12), after=nn.Linear(12, 3), **blocks), torch.randn(2, 6, 8)


@net({"layers.depth": 3}, gone=False)
def features_of_some_blocks():
    def forward(net, x):
        x, seen = net.before(x), []
        for i, layer in enumerate(net.layers):
            x = layer(x)
            seen += [x.mean(1)] if i in (0, 2) else []
        return net.after(torch.stack(seen).sum(0)), len(seen), seen[-1]

    return tokens(*(block() for _ in range(3)), loop=forward)


@net({"layers.depth": 3})
def blocks_time_first():
    def forward(net, x):
        x = net.before(x.transpose(0, 1))
        for layer in net.layers:
            x = layer(x)
        return net.after(x.mean(0))

    return tokens(*(Residual(nn.Linear(12, 12), 12) for _ in range(3)), loop=forward)


@net({"layers.depth": 3})
def tokens_flattened_before_the_blocks():
    def forward(net, x):
        h = net.before(x).flatten(0, 1)
        for layer in net.layers:
            h = layer(h)
        return net.after(h.unflatten(0, (x.shape[0], -1)).mean(1))

    return tokens(*(Residual(nn.Linear(12, 12), 12) for _ in range(3)), loop=forward)


class InPlace(nn.Module):
    """Adds to its input in place."""

    def __init__(self, size):
        super().__init__()
        self.one, self.two = nn.Linear(size, 16), nn.Linear(16, size)

    def forward(self, x):
        x += self.two(self.one(torch.tanh(x)))
        return x


@net({"layers.depth": 3})
def blocks_that_add_in_place():
    return tokens(*(InPlace(12) for _ in range(3)))


class Windows(nn.Module):
    """Moves the entries of its input, adds to them there, and moves them back."""

    def __init__(self, size):
        super().__init__()
        self.scale, self.part = parameter(size), Residual(nn.Linear(size, size), size)

    def forward(self, x):
        windows = x.roll(1, 1).unflatten(1, (2, 3)).transpose(1, 2)
        windows = windows + self.part.part(windows.tanh()) * self.scale
        return windows.transpose(1, 2).flatten(1, 2).roll(-1, 1)


@net({"layers.depth": 3})
def blocks_in_windows():
    return tokens(*(Windows(12) for _ in range(3)))


class Shuffled(Residual):
    """Takes its tokens in an order that a tensor has."""

    def __init__(self, size):
        super().__init__(nn.Linear(size, size), size)
        order = torch.tensor([2, 0, 5, 1, 4, 3])
        self.register_buffer("order", order)
        self.register_buffer("back", order.argsort())

    def forward(self, x):
        return super().forward(x[:, self.order]).index_select(1, self.back)


@net({"layers.depth": 3})
def blocks_in_another_order():
    return tokens(*(Shuffled(12) for _ in range(3)))


@decoy()
def layers_without_a_sum():
    return tokens(*(nn.Sequential(nn.Linear(12, 12), nn.Tanh()) for _ in range(3)))


@decoy()
def gates_between_input_and_layer():
    def forward(net, x):
        gate = net.gate(x).sigmoid()
        return x * (1 - gate) + net.part(x) * gate

    return tokens(*(Net(forward, gate=nn.Linear(12, 12), part=nn.Linear(12, 12)) for _ in range(3)))


@decoy()
def channels_that_are_scaled():
    def forward(net, x):
        return x * net.scale(x.mean(1, keepdim=True)).sigmoid()

    return tokens(*(Net(forward, scale=nn.Linear(12, 12)) for _ in range(3)))


@decoy()
def the_input_comes_back_turned():
    def forward(net, x):
        return x.transpose(2, 3) + net.part(x)

    blocks = [Net(forward, part=nn.Conv2d(8, 8, 3, padding=1)) for _ in range(3)]
    return nn.Sequential(nn.Conv2d(3, 8, 3), *blocks, nn.Conv2d(8, 2, 3)), torch.randn(2, 3, 8, 8)


@decoy()
def the_input_comes_back_shifted():
    def forward(net, x):
        return x.roll(1, 1) + net.part(x)

    return tokens(*(Net(forward, part=nn.Linear(12, 12)) for _ in range(3)))


@decoy()
def the_input_is_taken_away():
    def forward(net, x):
        return net.part(x) - x

    return tokens(*(Net(forward, part=nn.Linear(12, 12)) for _ in range(3)))


@decoy()
def sums_of_the_input_alone():
    def forward(net, x):
        return x + net.shift

    return tokens(*(Net(forward, shift=parameter(12)) for _ in range(3)))


@decoy()
def one_block_that_is_called_again():
    def forward(net, x):
        return net.after(net.layers[0](net.layers[0](net.before(x))).mean(1))

    return tokens(block(), loop=forward)


@decoy()
def blocks_of_other_shapes():
    return nn.Sequential(*(Bottleneck(3 + i, 4 + i) for i in range(3))), torch.randn(2, 3, 8, 8)


@decoy("what it returns beside its first result is used")
def weights_that_are_used():
    def forward(net, x):
        x, total = net.before(x), 0.0
        for layer in net.layers:
            x, weights, _ = layer(x, mask=1.0, bias=x.new_zeros(12), with_weights=True)
            total = total + weights.mean(1)
        return net.after(x.mean(1)) + total[:, None]

    return tokens(*(TupleLayer(12, False) for _ in range(3)), loop=forward)


@decoy("something in it is used elsewhere, beside what it returns")
def a_value_that_is_kept():
    class Keeps(Block):
        def forward(self, x):
            x = super().forward(x)
            self.seen = x.relu()
            return x + self.seen

    def forward(net, x):
        x = net.before(x)
        for layer in net.layers:
            x = layer(x)
        return net.after(x.mean(1)), [layer.seen for layer in net.layers]

    return tokens(*(Keeps(12, nn.Linear(12, 12)) for _ in range(3)), loop=forward)


@decoy("it shares parameters with other parts")
def blocks_with_parameters_in_common():
    blocks = [Residual(nn.Linear(12, 12), 12) for _ in range(3)]
    for one in blocks:
        one.part.weight = blocks[0].part.weight
    return tokens(*blocks)


@decoy("it has hooks")
def blocks_with_hooks():
    blocks = [block() for _ in range(3)]
    for one in blocks:
        one.register_forward_hook(lambda *_: None)
    return tokens(*blocks)


@decoy("it changes an argument in place")
def blocks_that_write_into_a_memory():
    def body(net, x, memory):
        memory += x.mean(1)
        return x + net.part(x)

    def forward(net, x):
        x = net.before(x)
        memory = torch.zeros_like(x[:, 0])
        for layer in net.layers:
            x = layer(x, memory)
        return net.after(x.mean(1) + memory)

    return tokens(*(Net(body, part=nn.Linear(12, 12)) for _ in range(3)), loop=forward)


@decoy("parts of it are used elsewhere")
def blocks_whose_layers_are_called_again():
    def forward(net, x):
        x = net.before(x)
        for layer in net.layers:
            x = layer(x)
        return net.after(sum(layer.part(x) for layer in net.layers).mean(1))

    return tokens(*(Residual(nn.Linear(12, 12), 12) for _ in range(3)), loop=forward)


@net({"layers.depth": 3})
def blocks_with_results_that_are_not_used():
    def body(net, x):
        y = net.part(x)
        return x + y, y.mean(1)

    def forward(net, x):
        x = net.before(x)
        for layer in net.layers:
            x, _ = layer(x)
        return net.after(x.mean(1))

    return tokens(*(Net(body, part=nn.Linear(12, 12)) for _ in range(3)), loop=forward)


class AnyName(nn.Module):
    """Takes its input by a name that its forward does not say."""

    def __init__(self, size):
        super().__init__()
        self.part = nn.Linear(size, size)

    def forward(self, **inputs):
        return inputs["hidden"] + self.part(inputs["hidden"]).tanh()


@net({"layers.depth": 3})
def blocks_with_inputs_of_any_name():
    def forward(net, x):
        x = net.before(x)
        for layer in net.layers:
            x = layer(hidden=x)
        return net.after(x.mean(1))

    return tokens(*(AnyName(12) for _ in range(3)), loop=forward)


@decoy()
def one_block_with_a_hook():
    """It has no other block to be dropped after: the hook is not what keeps it."""
    one = block()
    one.register_forward_hook(lambda *_: None)
    return tokens(one)
