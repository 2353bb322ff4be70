"""Nets as people write them, each with an input, the units of its groups, and what a quarter of the width leaves.

The last number bounds the share of the parameters that is left when a quarter of each group is kept.
"""

from collections import namedtuple

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

Output = namedtuple("Output", "logits features")
NETS = {}


class Net(nn.Module):
    """A function of itself and the inputs, and its parts by name: modules, parameters or numbers."""

    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *inputs):
        return self.function(self, *inputs)


def net(units, share):
    """Register a function that returns a net and its input."""

    def register(build):
        NETS[build.__name__] = build, units, share
        return build

    return register


def parameter(*shape):
    return nn.Parameter(torch.randn(*shape) * 0.3)


def conv(inputs, outputs, **options):
    return nn.Conv2d(inputs, outputs, 3, padding=1, **options)


@net({"a": 32, "b": 32}, 0.2)
def sizes_of_layers_asked_for():
    def forward(net, x):
        h = net.norm(net.a(x)).relu().view(len(x), net.a.out_features)
        return net.c(net.b(h.reshape(-1, net.norm.num_features)).relu().view(-1, net.c.in_features))

    parts = {"a": nn.Linear(8, 32), "norm": nn.BatchNorm1d(32), "b": nn.Linear(32, 32), "c": nn.Linear(32, 5)}
    return Net(forward, **parts), torch.randn(2, 8)


@net({"a": 32, "b": 32}, 0.2)
def control_flow_on_shapes():
    def forward(net, x):
        assert x.shape[-1] == 8
        if not isinstance(x, torch.Tensor):
            raise TypeError
        if x.shape[1] > 4:
            x = x[:, :4]
        h = 0
        for t in range(x.shape[1]):
            h = torch.tanh(net.a(input=x[:, t]) + h)
        return net.c(net.b(h).relu())

    return Net(forward, a=nn.Linear(8, 32), b=nn.Linear(32, 32), c=nn.Linear(32, 3)), torch.randn(2, 6, 8)


@net({"a": 16}, 0.2)
def a_recurrent_net_in_a_loop():
    def forward(net, x):
        h = x.new_zeros(x.shape[0], net.hidden)
        out = x.new_zeros(x.shape[0], x.shape[1], net.hidden)
        for t in range(x.shape[1]):
            h = torch.tanh(net.a(x[:, t]) + net.b(h))
            out[:, t] = h
        return net.c(out.mean(1))

    return Net(forward, a=nn.Linear(8, 16), b=nn.Linear(16, 16), c=nn.Linear(16, 3), hidden=16), torch.randn(2, 6, 8)


@net({"a": 16, "b": 16}, 0.2)
def attributes_of_layers():
    def forward(net, x):
        x = net.a(F.pad(x.to(net.a.weight.device), (1, 0))).relu()
        return net.c(net.b(F.pad(x, (net.b.dilation[0], 0))).relu())

    layers = {"a": nn.Conv1d(1, 16, 2), "b": nn.Conv1d(16, 16, 2, dilation=2), "c": nn.Conv1d(16, 4, 1)}
    return Net(forward, **layers), torch.randn(2, 1, 20)


def rows(time_first, length):
    def forward(net, x):
        h = x.transpose(0, 1) if time_first else x.flatten(0, 1)
        h = net.c(net.b(net.a(h).relu()).relu())
        return h.mean(0) if time_first else h.unflatten(0, (x.shape[0], -1)).mean(1)

    return Net(forward, a=nn.Linear(8, 32), b=nn.Linear(32, 32), c=nn.Linear(32, 3)), torch.randn(2, length, 8)


@net({"a": 32, "b": 32}, 0.2)
def time_first_inside():
    return rows(True, 6)


@net({"a": 32, "b": 32}, 0.2)
def time_first_inside_as_long_as_the_batch():
    return rows(True, 2)


@net({"a": 32, "b": 32}, 0.2)
def tokens_flattened_into_rows():
    return rows(False, 6)


@net({"a": 32}, 0.3)
def time_first_flattened_into_rows():
    def forward(net, x):
        h = net.b(net.norm(net.a(x.transpose(0, 1).flatten(0, 1))).relu())
        return h.unflatten(0, (-1, x.shape[0])).mean(0)

    return Net(forward, a=nn.Linear(8, 32), norm=nn.LayerNorm(32), b=nn.Linear(32, 3)), torch.randn(2, 6, 8)


@net({"a": 32}, 0.3)
def pairs_in_one_batch():
    def forward(net, x, y):
        return torch.cat(net.b(net.a(torch.cat([x, y])).relu()).chunk(2), 1)

    return Net(forward, a=nn.Linear(8, 32), b=nn.Linear(32, 3)), (torch.randn(2, 8), torch.randn(2, 8))


@net({"body": 32}, 0.3)
def a_head_for_training_only():
    def forward(net, x):
        h = net.body(x).relu()
        return (net.head(h), net.aux(h)) if net.training else net.head(h)

    return Net(forward, body=nn.Linear(8, 32), head=nn.Linear(32, 3), aux=nn.Linear(32, 3)), torch.randn(2, 8)


@net({"a": 32}, 0.3)
def named_tuple():
    def forward(net, x):
        return Output(net.b(net.a(x).relu()), x)

    return Net(forward, a=nn.Linear(8, 32), b=nn.Linear(32, 3)), torch.randn(2, 8)


@net({"0": 32, "3": 16}, 0.2)
def hooks():
    layers = [nn.Linear(8, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 3)]
    net = nn.Sequential(*layers)
    net[0].register_forward_hook(lambda module, inputs, output: output * 2 + 1)
    net[1].register_forward_hook(lambda module, inputs, output: output * 3)
    net[3].register_forward_pre_hook(lambda module, inputs: (inputs[0] - 1,))
    return net, torch.randn(2, 8)


def attention(*, batch_first=True, output=0, **options):
    def forward(net, x, **masks):
        x = net.i(x if batch_first else x.transpose(0, 1))
        y, weights = net.a(x, x, x, **options, **masks)
        y = net.o(x + y)
        y = y if batch_first else y.transpose(0, 1)
        return (y, weights) if output else y

    layers = {"i": nn.Linear(8, 32), "a": nn.MultiheadAttention(32, 4, batch_first=batch_first), "o": nn.Linear(32, 3)}
    return Net(forward, **layers), torch.randn(2, 6, 8)


@net({"i": 32, "a.query": 4}, 0.2)
def attention_whose_weights_are_not_used():
    return attention()


@net({"i": 32}, 0.4)
def attention_that_returns_its_weights():
    return attention(output=1)


@net({"i": 32}, 0.4)
def attention_that_returns_weights_of_heads():
    return attention(output=1, average_attn_weights=False)


@net({"i": 32, "a.query": 4}, 0.2)
def attention_with_a_mask():
    return attention(attn_mask=torch.ones(6, 6).triu(1).bool(), is_causal=True, need_weights=False)


@net({"i": 32, "a.query": 4}, 0.2)
def attention_time_first_with_an_added_mask():
    return attention(batch_first=False, attn_mask=torch.randn(6, 6), need_weights=False)


@net({"i": 32, "a.query": 4}, 0.2)
def attention_with_padding():
    def forward(net, x, mask):
        x = net.i(x)
        return net.o(x + net.a(x, x, x, key_padding_mask=mask, need_weights=False)[0])

    built, x = attention()
    built.function = forward
    return built, (x, torch.tensor([[0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 0, 1]]).bool())


@net({"i": 32, "e.layers.0.self_attn.query": 4, "e.layers.0.linear1": 64}, 0.2)
def a_transformer_of_torch():
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.1)
    encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
    built = Net(lambda net, x: net.o(net.e(net.i(x)).mean(1)), i=nn.Linear(8, 32), e=encoder, o=nn.Linear(32, 3))
    return built, torch.randn(2, 6, 8)


@net({"embed": 64, "a": 32}, 0.3)
def an_embedding():
    def forward(net, x):
        x = net.embed(x)
        return net.out((x + net.b(net.a(x).relu())).mean(1))

    layers = {"embed": nn.Embedding(50, 64), "a": nn.Linear(64, 32), "b": nn.Linear(32, 64), "out": nn.Linear(64, 3)}
    return Net(forward, **layers), torch.randint(0, 50, (2, 12))


@net({"embed": 16, "a": 32}, 0.3)
def an_embedding_tied_to_the_output():
    def forward(net, x):
        x = net.embed(x)
        return net.out(x + net.b(net.a(x).relu()))

    layers = {"embed": nn.Embedding(50, 16), "a": nn.Linear(16, 32), "b": nn.Linear(32, 16)}
    built = Net(forward, **layers, out=nn.Linear(16, 50, bias=False))
    built.out.weight = built.embed.weight
    return built, torch.randint(0, 50, (2, 5))


@net({"bag": 16, "a": 32}, 0.4)
def bags_of_words():
    layers = {"bag": nn.EmbeddingBag(50, 16), "a": nn.Linear(16, 32), "out": nn.Linear(32, 3)}
    return Net(lambda net, x: net.out(net.a(net.bag(x).relu()).relu()), **layers), torch.randint(0, 50, (2, 5))


@net({"i": 32}, 0.4)
def channels_that_are_rows_of_a_product():
    def forward(net, x):
        h = torch.baddbmm(torch.zeros(1), net.i(x).transpose(1, 2), x[..., :4])
        return net.o(h.mean(-1))

    return Net(forward, i=nn.Linear(8, 32), o=nn.Linear(32, 3)), torch.randn(2, 6, 8)


@net({"b": 16, "a": 32}, 0.4)
def an_embedding_by_a_function():
    def forward(net, x):
        x = F.embedding(x, net.table)
        return net.out(x + net.b(net.a(x).relu()))

    layers = {"a": nn.Linear(16, 32), "b": nn.Linear(32, 16), "out": nn.Linear(16, 3)}
    return Net(forward, table=parameter(50, 16), **layers), torch.randint(0, 50, (2, 5))


@net({"a": 32, "b": 8}, 0.3)
def weights_that_a_function_reads_again():
    def forward(net, x):
        code = net.b(net.a(x).relu())
        return F.linear(F.linear(code, net.b.weight.t()).relu(), net.a.weight.t())

    return Net(forward, a=nn.Linear(20, 32), b=nn.Linear(32, 8)), torch.randn(2, 20)


@net({"w1": 32, "w2": 16}, 0.2)
def parameters_without_modules():
    def forward(net, x):
        return net.o(torch.tanh(torch.tanh(x @ net.w1 + net.b1) @ net.w2))

    parts = {"w1": parameter(8, 32), "b1": parameter(32), "w2": parameter(32, 16), "o": nn.Linear(16, 3)}
    return Net(forward, **parts), torch.randn(2, 8)


class BatchNormAct2d(nn.BatchNorm2d):
    def forward(self, x):
        buffers = self.running_mean, self.running_var
        return F.relu(F.batch_norm(x, *buffers, self.weight, self.bias, self.training, 0.1, self.eps))


class LayerNorm2d(nn.LayerNorm):
    def forward(self, x):
        x = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class GroupNormAct(nn.GroupNorm):
    def forward(self, x):
        return F.silu(F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps))


def normed(norm):
    layers = [nn.Conv2d(3, 16, 3), norm(16), nn.Conv2d(16, 32, 3), norm(32), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(32, 3)), torch.randn(2, 3, 9, 9)


@net({"0": 16, "2": 32}, 0.2)
def batch_norm_and_activation():
    return normed(BatchNormAct2d)


@net({"0": 16, "2": 32}, 0.2)
def layer_norm_of_images():
    return normed(LayerNorm2d)


@net({"0": 8, "2": 8}, 0.2)
def group_norm_and_activation():
    return normed(lambda size: GroupNormAct(8, size))


@net({"0": 16, "2": 32}, 0.2)
def group_norm_of_one_group():
    return normed(lambda size: GroupNormAct(1, size))


class RMS(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.rand(size) + 0.5), 1e-6

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))


class Linear(nn.Linear):
    def reset_parameters(self):
        nn.init.orthogonal_(self.weight)
        nn.init.zeros_(self.bias)


class Conv2dSame(nn.Conv2d):
    def forward(self, x):
        x = F.pad(x, (0, 1, 0, 1))
        return F.conv2d(x, self.weight, self.bias, self.stride, (0, 0), self.dilation, self.groups)


class StandardisedConv(nn.Conv2d):
    def forward(self, x):
        weight = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(weight, None, None, training=True, momentum=0.0, eps=1e-6).reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


@net({"0": 32}, 0.3)
def a_subclass_of_linear():
    return nn.Sequential(Linear(8, 32), nn.ReLU(), nn.Linear(32, 3)), torch.randn(2, 8)


@net({"0": 16, "4": 8}, 0.3)
def convolutions_with_padding_of_their_own():
    layers = [Conv2dSame(3, 16, 2), nn.ReLU(), Conv2dSame(16, 16, 2, groups=16), nn.ReLU(), Conv2dSame(16, 8, 2)]
    return nn.Sequential(*layers, nn.ReLU(), nn.Flatten(), nn.Linear(200, 3)), torch.randn(2, 3, 5, 5)


@net({"0": 16, "2": 16, "5": 8}, 0.2)
def standardised_weights():
    layers = [StandardisedConv(3, 16, 3), nn.ReLU(), StandardisedConv(16, 16, 3), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(2, 3, 5, 5)


@net({"0": 32, "2": 16}, 0.2)
def normalised_weights():
    first = nn.utils.parametrizations.weight_norm(nn.Linear(8, 32))
    return nn.Sequential(first, nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 3)), torch.randn(2, 8)


@net({"0": 32, "2": 16}, 0.2)
def pruned_weights():
    built = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 3))
    prune.l1_unstructured(built[0], "weight", 0.5)
    return built, torch.randn(2, 8)


@net({"2": 16}, 0.6)
def weights_with_a_spectral_norm():
    first = nn.utils.parametrizations.spectral_norm(nn.Linear(8, 32))
    return nn.Sequential(first, nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 3)), torch.randn(2, 8)


class DropPath(nn.Module):
    def forward(self, x):
        if not self.training:
            return x
        kept = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(0.9)
        kept.div_(0.9)
        return x * kept


@net({"i": 32, "f": 24}, 0.2)
def stochastic_depth_and_layer_scale():
    def forward(net, x):
        x = net.i(x)
        return net.o(x + net.d(net.gamma * net.g(net.f(x).relu())))

    layers = {"i": nn.Linear(8, 32), "f": nn.Linear(32, 24), "g": nn.Linear(24, 32), "o": nn.Linear(32, 3)}
    return Net(forward, **layers, gamma=parameter(32), d=DropPath()), torch.randn(2, 8)


class FusedAttention(nn.Module):
    """As in timm."""

    def __init__(self, size, heads):
        super().__init__()
        self.num_heads, self.head_dim = heads, size // heads
        self.scale = self.head_dim**-0.5
        self.qkv, self.proj = nn.Linear(size, 3 * size), nn.Linear(size, size)

    def forward(self, x):
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        weights = ((q * self.scale) @ k.transpose(-2, -1)).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(B, N, C))


class Block(nn.Module):
    def __init__(self, size, attention):
        super().__init__()
        self.norm1, self.norm2, self.attn = nn.LayerNorm(size), nn.LayerNorm(size), attention
        self.fc1, self.fc2 = nn.Linear(size, 2 * size), nn.Linear(2 * size, size)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


@net({"patch": 4, "block.fc1": 64}, 0.2)
def a_vision_transformer():
    def forward(net, x):
        x = net.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat((net.token.expand(x.shape[0], -1, -1), x), 1) + net.position
        return net.head(net.norm(net.block(x))[:, 0])

    parts = {"token": parameter(1, 1, 32), "position": parameter(1, 5, 32), "block": Block(32, FusedAttention(32, 4))}
    head = {"norm": nn.LayerNorm(32), "head": nn.Linear(32, 3)}
    return Net(forward, patch=nn.Conv2d(3, 32, 4, 4), **parts, **head), torch.randn(2, 3, 8, 8)


class SplitAttention(nn.Module):
    """As in the BERT of transformers."""

    def __init__(self, size, heads):
        super().__init__()
        self.num_attention_heads, self.attention_head_size, self.all_head_size = heads, size // heads, size
        self.query, self.key, self.value, self.out = (nn.Linear(size, size) for _ in range(4))

    def in_heads(self, x):
        return x.view((*x.size()[:-1], self.num_attention_heads, self.attention_head_size)).permute(0, 2, 1, 3)

    def forward(self, x):
        q, k, v = (self.in_heads(layer(x)) for layer in (self.query, self.key, self.value))
        weights = (torch.matmul(q, k.transpose(-1, -2)) / self.attention_head_size**0.5).softmax(-1)
        mixed = torch.matmul(weights, v).permute(0, 2, 1, 3).contiguous()
        return self.out(mixed.view((*mixed.size()[:-2], self.all_head_size)))


@net({"words": 32, "block.attn.query": 4, "block.fc1": 64, "pool": 32}, 0.2)
def a_text_encoder():
    def forward(net, ids):
        h = net.block(net.norm(net.words(ids) + net.places(net.position_ids[:, : ids.size(1)])))
        return net.head(torch.tanh(net.pool(h[:, 0])))

    parts = {"words": nn.Embedding(40, 32), "places": nn.Embedding(16, 32), "norm": nn.LayerNorm(32)}
    head = {"pool": nn.Linear(32, 32), "head": nn.Linear(32, 3)}
    built = Net(forward, **parts, block=Block(32, SplitAttention(32, 4)), **head)
    built.register_buffer("position_ids", torch.arange(16)[None])
    return built, torch.randint(0, 40, (2, 7))


class Conv1D(nn.Module):
    """The linear layer of the GPT-2 of transformers."""

    def __init__(self, outputs, inputs):
        super().__init__()
        self.nf, self.weight, self.bias = outputs, parameter(inputs, outputs), parameter(outputs)

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(x.size()[:-1] + (self.nf,))  # noqa: RUF005  (as it is written)


class CausalAttention(nn.Module):
    def __init__(self, size, heads):
        super().__init__()
        self.split_size, self.head_dim = size, size // heads
        self.c_attn, self.c_proj = Conv1D(3 * size, size), Conv1D(size, size)
        self.register_buffer("mask", torch.ones(16, 16).tril().bool()[None, None])

    def forward(self, x):
        q, k, v = self.c_attn(x).split(self.split_size, dim=2)
        q, k, v = (each.view(*each.shape[:-1], -1, self.head_dim).transpose(1, 2) for each in (q, k, v))
        scores = torch.matmul(q, k.transpose(-1, -2)) * self.head_dim**-0.5
        length = q.size(-2)
        scores = torch.where(self.mask[:, :, :length, :length], scores, torch.finfo(scores.dtype).min)
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).contiguous()
        return self.c_proj(mixed.reshape(*mixed.shape[:-2], -1))


@net({"words": 32, "block.attn.c_attn.bias": 4, "block.fc1": 64}, 0.2)
def a_language_model_with_tied_words():
    def forward(net, ids):
        h = net.words(ids) + net.places(torch.arange(ids.shape[1])[None])
        return F.linear(net.norm(net.block(h)), net.words.weight)

    parts = {"words": nn.Embedding(40, 32), "places": nn.Embedding(16, 32), "norm": nn.LayerNorm(32)}
    return Net(forward, **parts, block=Block(32, CausalAttention(32, 4))), torch.randint(0, 40, (2, 7))


def rotated(x):
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), -1)


class GroupedQueries(nn.Module):
    """As in Llama."""

    def __init__(self, size, heads, kv_heads):
        super().__init__()
        self.head_dim, self.groups = size // heads, heads // kv_heads
        self.q, self.o = nn.Linear(size, size, bias=False), nn.Linear(size, size, bias=False)
        self.k, self.v = (nn.Linear(size, kv_heads * self.head_dim, bias=False) for _ in range(2))

    def repeated(self, x):
        b, heads, n, size = x.shape
        return x[:, :, None].expand(b, heads, self.groups, n, size).reshape(b, heads * self.groups, n, size)

    def forward(self, x):
        shape = (*x.shape[:-1], -1, self.head_dim)
        q, k, v = (layer(x).view(shape).transpose(1, 2) for layer in (self.q, self.k, self.v))
        angles = torch.arange(x.shape[1])[:, None] * torch.exp(-torch.arange(self.head_dim // 2) / 1.0)
        angles = torch.cat((angles, angles), -1)
        q, k = (each * angles.cos() + rotated(each) * angles.sin() for each in (q, k))
        out = F.scaled_dot_product_attention(q, self.repeated(k), self.repeated(v), is_causal=True)
        return self.o(out.transpose(1, 2).contiguous().reshape(*x.shape[:-1], -1))


@net({"words": 32, "attn.q": 2, "gate": 64}, 0.2)
def a_language_model_with_grouped_queries():
    def forward(net, ids):
        h = net.words(ids)
        h = h + net.attn(net.n1(h))
        g = net.n2(h)
        return net.head(net.n3(h + net.down(F.silu(net.gate(g)) * net.up(g))))

    sizes = {"gate": (32, 64), "up": (32, 64), "down": (64, 32), "head": (32, 40)}
    parts = {name: nn.Linear(*size, bias=False) for name, size in sizes.items()}
    norms = {name: RMS(32) for name in ("n1", "n2", "n3")}
    attention = GroupedQueries(32, 4, 2)
    return Net(forward, words=nn.Embedding(40, 32), attn=attention, **norms, **parts), torch.randint(0, 40, (2, 7))


def windows(x, size):
    B, H, W, C = x.shape
    return x.view(B, H // size, size, W // size, size, C).permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, size**2, C)


@net({"patch": 4, "reduction": 64}, 0.2)
def shifted_windows():
    def forward(net, x):
        x = net.patch(x).permute(0, 2, 3, 1)
        B, H, W, C = x.shape
        y = windows(torch.roll(net.n1(x), (-1, -1), (1, 2)), net.window)
        Bw, N, _ = y.shape
        q, k, v = net.qkv(y).reshape(Bw, N, 3, net.heads, C // net.heads).permute(2, 0, 3, 1, 4).unbind(0)
        scores = q * (C // net.heads) ** -0.5 @ k.transpose(-2, -1)
        bias = net.table[net.index.view(-1)].view(N, N, -1).permute(2, 0, 1).contiguous()
        y = net.proj(((scores + bias[None]).softmax(-1) @ v).transpose(1, 2).reshape(Bw, N, C))
        y = y.view(B, H // net.window, W // net.window, net.window, net.window, C).permute(0, 1, 3, 2, 4, 5)
        x = x + torch.roll(y.contiguous().view(B, H, W, C), (1, 1), (1, 2))
        x = torch.cat([x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], -1)
        return net.head(net.reduction(net.n2(x)).mean((1, 2)))

    layers = {"patch": nn.Conv2d(3, 32, 1), "n1": nn.LayerNorm(32), "qkv": nn.Linear(32, 96), "proj": nn.Linear(32, 32)}
    more = {
        "table": parameter(9, 4),
        "n2": nn.LayerNorm(128),
        "reduction": nn.Linear(128, 64),
        "head": nn.Linear(64, 3),
    }
    built = Net(forward, **layers, **more, window=2, heads=4)
    built.register_buffer("index", torch.randint(0, 9, (4, 4)))
    return built, torch.randn(2, 3, 4, 4)


@net({"i": 32}, 0.3)
def gated_halves():
    def forward(net, x):
        a, b = net.i(x).chunk(2, -1)
        return net.o(a * b.sigmoid())

    return Net(forward, i=nn.Linear(8, 64), o=nn.Linear(32, 3)), torch.randn(2, 8)


@net({"i": 32}, 0.3)
def gated_halves_of_torch():
    return Net(lambda net, x: net.o(F.glu(net.i(x))), i=nn.Linear(8, 64), o=nn.Linear(32, 3)), torch.randn(2, 8)


@net({"i": 32}, 0.3)
def halves_as_slices():
    def forward(net, x):
        h = net.i(x)
        return net.o(h[..., : net.half] * F.gelu(h[..., net.half :]))

    return Net(forward, i=nn.Linear(8, 64), o=nn.Linear(32, 3), half=32), torch.randn(2, 8)


@net({"i": 32}, 0.3)
def the_larger_of_two():
    def forward(net, x):
        return net.o(net.i(x).view(x.shape[0], -1, 2).max(-1).values)

    return Net(forward, i=nn.Linear(8, 64), o=nn.Linear(32, 3)), torch.randn(2, 8)


def shuffled(x, groups):
    b, c, h, w = x.shape
    return x.view(b, groups, c // groups, h, w).transpose(1, 2).contiguous().view(b, c, h, w)


@net({"a": 8}, 0.3)
def halves_that_are_turned():
    def forward(net, x):
        h = net.a(x).relu()
        half = h.shape[-1] // 2
        return net.o(torch.cat((-h[..., half:], h[..., :half]), -1))

    return Net(forward, a=nn.Linear(8, 16), o=nn.Linear(16, 3)), torch.randn(2, 8)


@net({"a": 4, "b": 8}, 0.35)
def channels_that_are_shifted_in_time():
    def forward(net, x):
        h = net.a(x)
        out, fold = torch.zeros_like(h), h.size(2) // 4
        out[:, :-1, :fold] = h[:, 1:, :fold]
        out[:, 1:, fold : 2 * fold] = h[:, :-1, fold : 2 * fold]
        out[:, :, 2 * fold :] = h[:, :, 2 * fold :]
        return net.o(net.b(out).relu()).mean(1)

    return Net(forward, a=nn.Linear(8, 16), b=nn.Linear(16, 8), o=nn.Linear(8, 3)), torch.randn(2, 6, 8)


@net({"a": 4, "c": 4, "b": 8}, 0.35)
def channels_of_which_a_quarter_is_convolved():
    def forward(net, x):
        h = net.a(x)
        quarter = h.shape[1] // 4
        some, rest = torch.split(h, [quarter, h.shape[1] - quarter], dim=1)
        return net.o(net.b(torch.cat((net.c(some), rest), 1)).relu().mean((2, 3)))

    layers = {"a": conv(3, 16), "c": conv(4, 4), "b": conv(16, 8), "o": nn.Linear(8, 3)}
    return Net(forward, **layers), torch.randn(2, 3, 5, 5)


@net({"q": 4}, 0.4)
def rotations_by_complex_numbers():
    def turned(x, angles):
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)[: x.shape[-2]]).flatten(-2)

    def forward(net, x):
        q, k, v = (each(x).unflatten(-1, (-1, 4)).transpose(1, 2) for each in (net.q, net.k, net.v))
        seen = F.scaled_dot_product_attention(turned(q, net.angles), turned(k, net.angles), v)
        return net.o(seen.transpose(1, 2).flatten(2)).mean(1)

    layers = {name: nn.Linear(8, 16) for name in "qkv"}
    return Net(forward, **layers, o=nn.Linear(16, 3), angles=torch.rand(9, 2)), torch.randn(2, 5, 8)


@net({"a": 8}, 0.2)
def shuffled_channels():
    def forward(net, x):
        left, right = net.a(x).chunk(2, 1)
        return net.c(shuffled(torch.cat((left, net.depth(net.b(right).relu())), 1), 2)).mean((2, 3))

    return Net(forward, a=conv(3, 16), b=conv(8, 8), depth=conv(8, 8, groups=8), c=conv(16, 3)), torch.randn(2, 3, 5, 5)


@net({"a": 8}, 0.3)
def channels_shuffled_by_torch():
    def forward(net, x):
        return net.c(net.shuffle(net.a(x).relu())).mean((2, 3))

    return Net(forward, a=conv(3, 16), shuffle=nn.ChannelShuffle(2), c=conv(16, 3)), torch.randn(2, 3, 5, 5)


@net({"a": 8, "a[1]": 8}, 0.3)
def a_layer_added_to_two_others():
    def forward(net, x):
        return net.o((net.a(x) + torch.cat([net.b(x), net.c(x)], 1)).relu())

    layers = {"a": nn.Linear(8, 16), "b": nn.Linear(8, 8), "c": nn.Linear(8, 8), "o": nn.Linear(16, 3)}
    return Net(forward, **layers), torch.randn(2, 8)


class SqueezeExcite(nn.Module):
    def __init__(self, size, inner):
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(size, inner), nn.ReLU(), nn.Linear(inner, size), nn.Sigmoid())

    def forward(self, x):
        b, c, _, _ = x.size()
        return x * self.fc(x.mean((2, 3)).view(b, c)).view(b, c, 1, 1).expand_as(x)


@net({"0": 16, "2.fc.0": 4}, 0.3)
def squeeze_and_excitation():
    layers = [conv(3, 16), nn.ReLU(), SqueezeExcite(16, 4), nn.Flatten(), nn.Linear(16 * 25, 3)]
    return nn.Sequential(*layers), torch.randn(2, 3, 5, 5)


@net({"a": 32, "b.0": 32, "b.2": 32}, 0.2)
def a_checkpoint():
    def forward(net, x):
        return net.c(checkpoint(net.b, net.a(x).relu(), use_reentrant=False))

    inner = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
    return Net(forward, a=nn.Linear(8, 32), b=inner, c=nn.Linear(32, 3)), torch.randn(2, 8)


def recurrent(kind, outputs, **options):
    def forward(net, x):
        return net.o(net.rnn(net.i(x).relu())[0][:, -1])

    layers = {"i": nn.Linear(8, 32), "rnn": kind(32, 16, batch_first=True, **options), "o": nn.Linear(outputs, 3)}
    return Net(forward, **layers), torch.randn(2, 6, 8)


@net({"i": 32, "rnn.steps.0.input": 16}, 0.2)
def an_lstm():
    return recurrent(nn.LSTM, 16)


@net({"i": 32, "rnn.steps.0.input": 16}, 0.2)
def a_gru_in_both_directions():
    return recurrent(nn.GRU, 32, num_layers=2, bidirectional=True, dropout=0.2)


@net({"i": 32, "rnn.steps.0.input": 16}, 0.2)
def a_plain_recurrent_net():
    return recurrent(nn.RNN, 16, nonlinearity="relu", bias=False)


@net({"cell.step.input": 16}, 0.2)
def a_cell_in_a_loop():
    def forward(net, x):
        h, c = x.new_zeros(x.shape[0], net.hidden), x.new_zeros(x.shape[0], net.hidden)
        for t in range(x.shape[1]):
            h, c = net.cell(x[:, t], (h, c))
        return net.o(h)

    return Net(forward, cell=nn.LSTMCell(8, 16), o=nn.Linear(16, 3), hidden=16), torch.randn(2, 6, 8)


@net({"cell.step.input": 16}, 0.2)
def a_cell_that_begins_at_zero():
    def forward(net, x):
        h = None
        for t in range(x.shape[1]):
            h = net.cell(x[:, t], h)
        return net.o(h)

    return Net(forward, cell=nn.GRUCell(8, 16), o=nn.Linear(16, 3)), torch.randn(2, 6, 8)


@net({"i": 32}, 0.3)
def picked_tokens():
    def forward(net, x):
        h = net.i(x)
        index = torch.zeros(len(x), 1, 1, dtype=torch.long).expand(-1, -1, h.shape[-1])
        summed = torch.zeros_like(h).index_add(1, torch.tensor([0, 0, 1, 1, 2, 2]), h)
        return net.o(torch.gather(h, 1, index)[:, 0] + summed[:, 0])

    return Net(forward, i=nn.Linear(8, 32), o=nn.Linear(32, 3)), torch.randn(2, 6, 8)


@net({"c": 12}, 0.7)
def an_unknown_operation():
    def forward(net, x):
        return net.o(net.c(torch.fft.rfft(net.a(x).relu()).real).relu())

    return Net(forward, a=nn.Linear(8, 16), c=nn.Linear(9, 12), o=nn.Linear(12, 3)), torch.randn(2, 8)


@net({"c": 12}, 0.9)
def a_size_that_is_hidden():
    def forward(net, x):
        h = net.a(x).relu()
        return net.o(net.c(net.b(h / int(str(h.shape[-1])))).relu())

    layers = {"a": nn.Linear(8, 16), "b": nn.Linear(16, 12), "c": nn.Linear(12, 12), "o": nn.Linear(12, 3)}
    return Net(forward, **layers), torch.randn(2, 8)


@net({"a": 16, "aux.0": 8, "rnn.steps.0.input": 6, "c": 12}, 0.4)
def parts_whose_outputs_are_not_used():
    def forward(net, x):
        h = net.norm(net.a(x).relu())
        net.aux(h).softmax(-1)
        net.dead(h)
        net.rnn(h)[0].relu()
        return net.o(net.c(h.mean(1)).relu())

    layers = {"a": nn.Linear(8, 16), "norm": nn.LayerNorm(16), "rnn": nn.RNN(16, 6, batch_first=True)}
    layers |= {"aux": nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 2)), "dead": nn.Linear(16, 5)}
    return Net(forward, **layers, c=nn.Linear(16, 12), o=nn.Linear(12, 3)), torch.randn(2, 4, 8)


@net({"a": 16, "b": 16, "c": 12, "d": 12}, 0.2)
def layers_of_which_functions_take_the_weight():
    def forward(net, x):
        h = net.a(x).relu()
        h = F.linear(h, net.b.weight).relu()
        h = torch.addmm(net.c.bias, h, net.c.weight.t()).relu()
        h = torch.matmul(h, net.d.weight.T).relu() + F.linear(h, net.d.weight, net.d.bias)
        return h @ net.o.weight.mT

    layers = {"a": nn.Linear(8, 16), "b": nn.Linear(16, 16), "c": nn.Linear(16, 12), "d": nn.Linear(12, 12)}
    return Net(forward, **layers, o=nn.Linear(12, 3)), torch.randn(2, 8)


@net({"i": 32}, 0.3)
def a_norm_of_all_positions():
    def forward(net, x):
        h = net.i(x)
        return net.o(net.norm(h.flatten(0, 1)).reshape_as(h).relu().mean(1))

    return Net(forward, i=nn.Linear(8, 32), norm=nn.BatchNorm1d(32), o=nn.Linear(32, 3)), torch.randn(2, 6, 8)


@net({"i": 8, "i[1]": 8, "i[2]": 8, "i[3]": 8}, 0.3)
def branches_whose_sizes_are_a_tuple():
    def forward(net, x):
        same, one, two, three = torch.split(net.i(x), net.sizes, dim=1)
        return net.o(torch.cat((same, net.one(one), net.two(two), net.three(three)), 1).relu().mean((2, 3)))

    layers = {
        "i": nn.Conv2d(3, 32, 1),
        "one": nn.Conv2d(8, 8, 3, padding=1, groups=8),
        "two": nn.Conv2d(8, 8, (1, 5), padding=(0, 2), groups=8),
        "three": nn.Conv2d(8, 8, (5, 1), padding=(2, 0), groups=8),
        "o": nn.Linear(32, 3),
    }
    return Net(forward, **layers, sizes=(8, 8, 8, 8)), torch.randn(2, 3, 6, 6)


@net({"e": 16}, 0.3)
def a_mask_from_where_positions_jump():
    def forward(net, x):
        starts = torch.diff(x, prepend=x[:, :1] - 1, dim=-1) != 1
        h = net.e(x).masked_fill(starts.unsqueeze(-1), 0.0)
        return net.o(h.mean(1))

    return Net(forward, e=nn.Embedding(20, 16), o=nn.Linear(16, 3)), torch.randint(0, 20, (2, 6))


@net({"e": 32}, 0.3)
def a_layer_whose_weight_is_read_elsewhere():
    def forward(net, x):
        h = net.e(x).cos()
        return net.o(F.linear(h, weight=net.m.weight, bias=net.bias).relu() + h)

    layers = {"e": nn.Linear(8, 32), "m": nn.Linear(32, 32, bias=False)}
    return Net(forward, **layers, bias=nn.Parameter(torch.randn(32)), o=nn.Linear(32, 3)), torch.randn(2, 8)


@net({"i": 32, "m.bias": 4, "out": 32}, 0.3)
def attention_without_a_bias_of_its_keys():
    def forward(net, x):
        h = net.i(x)
        bias = net.m.bias.clone()
        length = bias.numel() // 3
        bias[length : 2 * length].zero_()
        qkv = F.linear(h, net.m.weight, bias).unflatten(-1, (3, net.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*qkv.unbind(0))
        return net.o(net.out(mixed.transpose(1, 2).flatten(2)).mean(1))

    layers = {"i": nn.Linear(8, 32), "m": nn.Linear(32, 96), "out": nn.Linear(32, 32), "o": nn.Linear(32, 3)}
    return Net(forward, **layers, heads=4), torch.randn(2, 6, 8)


@net({"a": 32}, 0.2)
def maxima_and_gates_and_similarities():
    def forward(net, x):
        h = F.glu(torch.max(net.a(x), net.b(x)), 1)
        return net.o(F.cosine_similarity(h, net.c(h), dim=1))

    layers = {"a": nn.Linear(8, 32), "b": nn.Linear(8, 32), "c": nn.Linear(32, 32), "o": nn.Linear(32, 3)}
    return Net(forward, **layers), torch.randn(2, 6, 8)


@net({"i": 32}, 0.2)
def causal_attention_without_a_softmax():
    def forward(net, x):
        h = net.i(x)
        scores = (net.q(h) @ net.k(h).transpose(-1, -2)).tril()
        return net.o(torch.baddbmm(h, scores, net.v(h)).mean(1))

    layers = {"i": nn.Linear(8, 32), "q": nn.Linear(32, 16), "k": nn.Linear(32, 16), "v": nn.Linear(32, 32)}
    return Net(forward, **layers, o=nn.Linear(32, 3)), torch.randn(2, 6, 8)


@net({"i": 32, "v": 32}, 0.2)
def attention_added_to_a_bias():
    def forward(net, x):
        h = net.i(x)
        scores = torch.softmax(net.q(h) @ net.k(h).transpose(-1, -2), -1)
        return net.o(torch.baddbmm(net.bias, scores, net.v(h)).mean(1))

    layers = {"i": nn.Linear(8, 32), "q": nn.Linear(32, 16), "k": nn.Linear(32, 16), "v": nn.Linear(32, 32)}
    return Net(forward, **layers, bias=parameter(1, 1, 32), o=nn.Linear(32, 3)), torch.randn(2, 6, 8)


@net({"v": 32}, 0.5)
def attention_by_distance():
    def forward(net, x):
        h = net.a(x)
        near = torch.cdist(h, h).neg().softmax(-1) @ net.v(h)
        return net.o((near * F.pairwise_distance(h, h.relu(), keepdim=True)).mean(1))

    return Net(forward, a=nn.Linear(8, 32), v=nn.Linear(32, 32), o=nn.Linear(32, 3)), torch.randn(2, 6, 8)


@net({"b": 32}, 0.6)
def a_gate_by_distance():
    def forward(net, x):
        h = net.a(x)
        return net.o(net.b(h) * net.distance(h, h.relu()).unsqueeze(-1))

    layers = {"a": nn.Linear(8, 16), "b": nn.Linear(16, 32), "distance": nn.PairwiseDistance(), "o": nn.Linear(32, 3)}
    return Net(forward, **layers), torch.randn(2, 8)


@net({"a": 32}, 0.2)
def maxima_put_back_where_they_were():
    def forward(net, x):
        pooled, places = net.pool(net.a(x).relu())
        return net.o(net.up(net.b(pooled), places).mean([2, 3]))

    layers = {"a": conv(3, 32), "b": conv(32, 32), "o": nn.Linear(32, 3)}
    pools = {"pool": nn.MaxPool2d(2, return_indices=True), "up": nn.MaxUnpool2d(2)}
    return Net(forward, **layers, **pools), torch.randn(2, 3, 6, 6)


@net({"a": 32, "b": 16}, 0.2)
def a_norm_as_a_function_of_its_own_size():
    def forward(net, x):
        h = net.a(x)
        h = F.layer_norm(h, h.shape[-1:], net.scale, net.shift)
        return net.o(net.b(F.rms_norm(h, h.shape[-1:], net.again)).relu().mean(1))

    layers = {"a": nn.Linear(8, 32), "b": nn.Linear(32, 16), "o": nn.Linear(16, 3)}
    weights = {"scale": parameter(32), "shift": parameter(32), "again": parameter(32)}
    return Net(forward, **layers, **weights), torch.randn(2, 6, 8)


@net({"a": 16, "b": 16}, 0.2)
def patches_by_unfold():
    def forward(net, x):
        patches = net.unfold(net.a(x)).transpose(1, 2)
        return net.o(net.b(patches).relu().unfold(1, 4, 4).mean([1, 3]))

    layers = {"a": conv(3, 16), "unfold": nn.Unfold(3, padding=1), "b": nn.Linear(144, 16), "o": nn.Linear(16, 3)}
    return Net(forward, **layers), torch.randn(2, 3, 4, 4)


@net({"a": 32}, 0.3)
def a_token_put_in_place():
    def forward(net, x):
        h = net.a(x).clone()
        h[:, 0] = net.b(x[:, 0])
        return net.o(h.mean(1))

    return Net(forward, a=nn.Linear(8, 32), b=nn.Linear(8, 32), o=nn.Linear(32, 3)), torch.randn(2, 6, 8)


@net({"a": 10, "b": 6}, 0.35)
def groups_in_which_no_channels_of_two_layers_meet():
    def forward(net, x):
        return net.o(net.g(torch.cat([net.a(x), net.b(x)], 1)).relu().mean([2, 3]))

    layers = {"a": conv(3, 20), "b": conv(3, 12), "g": conv(32, 48, groups=16), "o": nn.Linear(48, 3)}
    return Net(forward, **layers), torch.randn(2, 3, 4, 4)


@net({"a": 8, "m": 32, "n": 32}, 0.3)
def norms_and_inputs_asked_for_by_name():
    def forward(net, x):
        h = net.norm(net.a(x))
        assert h.shape[1] == net.norm.num_channels == 4 * net.norm.num_groups
        h = (h * net.norm.weight[:, None, None]).mean([2, 3])
        return net.o(F.linear(input=F.linear(input=h, weight=net.m.weight).relu(), weight=net.n.weight))

    layers = {"a": conv(3, 32), "norm": nn.GroupNorm(8, 32), "m": nn.Linear(32, 32), "n": nn.Linear(32, 32)}
    return Net(forward, **layers, o=nn.Linear(32, 3)), torch.randn(2, 3, 4, 4)
