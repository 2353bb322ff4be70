"""Multi-head attention in parts that can be nested: heads are the units."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from pyro_vnd._compat import has_hooks
from pyro_vnd.nn.submodules import replace_modules

__all__ = ["Attention", "as_graph", "unpack_attention"]


class _Way(NamedTuple):
    """How attention is called, as far as what it does depends on it."""

    key_padding_mask: torch.dtype | None = None
    attn_mask: torch.dtype | None = None
    attn_mask_dims: int = 0
    query_dims: int = 3
    need_weights: bool = True
    average_attn_weights: bool = True


class Attention(nn.Module):
    """What `torch.nn.MultiheadAttention` computes, with a linear layer for each of query, key, value and output.

    The number of heads is read off the tensors, so that the layers can be cut to fewer heads.

    Args:
        attention: The module to take the weights from, without `add_bias_kv` and `add_zero_attn`.
    """

    # What torch's own layers ask of attention before they take a fast path, which this is not.
    in_proj_bias = in_proj_weight = None
    _qkv_same_embed_dim = False

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.head_dim, self.dropout = attention.head_dim, nn.Dropout(attention.dropout)
        self.batch_first, self.num_heads = attention.batch_first, attention.num_heads
        self.way = _Way()  # of the last call
        size, has_bias = attention.embed_dim, attention.in_proj_bias is not None
        if attention.in_proj_weight is not None:
            weights = attention.in_proj_weight.chunk(3)
        else:
            weights = (attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight)
        biases = attention.in_proj_bias.chunk(3) if has_bias else (None, None, None)
        for name, weight, bias in zip(("query", "key", "value"), weights, biases, strict=True):
            linear = nn.Linear(weight.shape[1], size, bias=has_bias, device=weight.device, dtype=weight.dtype)
            linear.weight = nn.Parameter(weight.detach().clone())
            if bias is not None:
                linear.bias = nn.Parameter(bias.detach().clone())
            setattr(self, name, linear)
        out = attention.out_proj
        self.out = nn.Linear(size, size, out.bias is not None, device=out.weight.device, dtype=out.weight.dtype)
        self.out.load_state_dict(out.state_dict())
        self.train(attention.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend; arguments and results are those of `torch.nn.MultiheadAttention`."""
        if is_causal and attn_mask is None:
            raise RuntimeError("Need attn_mask if specifying the is_causal hint.")  # as torch does
        self.way = _Way(
            None if key_padding_mask is None else key_padding_mask.dtype,
            None if attn_mask is None else attn_mask.dtype,
            0 if attn_mask is None else attn_mask.dim(),
            query.dim(),
            bool(need_weights),
            bool(average_attn_weights),
        )
        return self._attend(query, key, value, key_padding_mask, attn_mask, self.way)

    def as_it_was_called(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend in the way of the last call; other ways are errors."""
        way, other = self.way, "a narrowed attention is called in another way than when it was nested: "
        torch._assert(need_weights == way.need_weights, f"{other}need_weights")
        if way.need_weights:
            torch._assert(average_attn_weights == way.average_attn_weights, f"{other}average_attn_weights")
        # Comparisons with None are what a graph can hold.
        if way.key_padding_mask is None:
            torch._assert(key_padding_mask == None, f"{other}key_padding_mask")  # noqa: E711
            key_padding_mask = None
        if way.attn_mask is None:
            torch._assert(attn_mask == None, f"{other}attn_mask")  # noqa: E711
            attn_mask = None
        return self._attend(query, key, value, key_padding_mask, attn_mask, way)

    def _attend(
        self, query: Any, key: Any, value: Any, padding: Tensor | None, mask: Tensor | None, way: _Way
    ) -> tuple[Tensor, Tensor | None]:
        is_batch = way.query_dims == 3
        if not is_batch:
            query, key, value = (x.unsqueeze(0) for x in (query, key, value))
            padding = None if padding is None else padding.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        layers: tuple[tuple[Any, Tensor], ...] = (self.query, query), (self.key, key), (self.value, value)
        q, k, v = (layer(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for layer, x in layers)
        added = self._added(q, padding, mask, way)
        weights = None
        if self.dropout.p or way.need_weights:  # dropout is a module, to follow the mode of a graph
            scores = q @ k.transpose(-2, -1) / math.sqrt(self.head_dim)
            weights = self.dropout((scores if added is None else scores + added).softmax(-1))
            mixed = weights @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, added)
        out = self.out(mixed.transpose(1, 2).flatten(-2))
        if not way.need_weights:
            weights = None
        elif way.average_attn_weights:
            weights = weights.mean(1)  # type: ignore[union-attr]
        if not is_batch:
            return out.squeeze(0), None if weights is None else weights.squeeze(0)
        return (out if self.batch_first else out.transpose(0, 1)), weights

    def _added(self, q: Tensor, padding: Any, mask: Any, way: _Way) -> Tensor | None:
        """Return what masks add to the scores."""
        parts = []
        if mask is not None:
            mask = mask if way.attn_mask_dims == 2 else mask.unflatten(0, (-1, self.num_heads))
            parts.append((mask, way.attn_mask))
        if padding is not None:
            parts.append((padding.unsqueeze(1).unsqueeze(1), way.key_padding_mask))
        added: Any = None
        for part, dtype in parts:
            part = torch.zeros_like(part, dtype=q.dtype).masked_fill(part, -math.inf) if dtype == torch.bool else part
            added = part if added is None else added + part
        return added


class _Tracer(fx.Tracer):
    traced_func_name = "as_it_was_called"


def as_graph(attention: Attention) -> fx.GraphModule:
    """Turn attention, as it was last called, into a module of torch, which needs nothing of this library."""
    graph = _Tracer().trace(attention)
    for node in graph.nodes:
        node.type = None  # names of types could not be saved
    copied = fx.Graph()  # does without the tracer, which could not be made again where the module is unpickled
    copied.output(copied.graph_copy(graph, {}))
    module = fx.GraphModule(attention, copied, class_name=type(attention).__name__)
    for name in ("batch_first", "num_heads", "in_proj_bias", "in_proj_weight", "_qkv_same_embed_dim"):
        setattr(module, name, getattr(attention, name))
    return module.train(attention.training)


def unpack_attention(net: nn.Module, excluded: tuple[str, ...] = ()) -> nn.Module:
    """Replace each `torch.nn.MultiheadAttention` of a net by its parts, in place.

    Those that are excluded, or have hooks, `add_bias_kv` or `add_zero_attn`, stay as they are.
    """
    replacements: dict[nn.Module, nn.Module] = {
        module: Attention(module)
        for name, module in net.named_modules()
        if type(module) is nn.MultiheadAttention
        and not any(f"{name}.".startswith(f"{e}.") for e in excluded)
        and module.bias_k is None
        and not module.add_zero_attn
        and not has_hooks(module)
    }
    for module in net.modules():
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False  # a fast path for padded batches, with the same result
    return replace_modules(net, replacements)
