"""Multi-head attention in parts that can be nested: heads are the units."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from pyro_vnd.nn.submodules import replace_modules

__all__ = ["Attention", "unpack_attention"]


class Attention(nn.Module):
    """What `torch.nn.MultiheadAttention` computes, with a linear layer for each of query, key, value and output.

    The number of heads is read off the tensors, so that the layers can be cut to fewer heads.

    Args:
        attention: The module to take the weights from; `batch_first`, without `add_bias_kv` and `add_zero_attn`.

    Raises:
        ValueError: If the module has an option that is not supported.
    """

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        unsupported = {
            "batch_first=False": not attention.batch_first,
            "add_bias_kv=True": attention.bias_k is not None,
            "add_zero_attn=True": attention.add_zero_attn,
        }
        if any(unsupported.values()):
            options = ", ".join(name for name, is_set in unsupported.items() if is_set)
            raise ValueError(f"MultiheadAttention with {options} cannot be nested")
        self.head_dim, self.dropout = attention.head_dim, nn.Dropout(attention.dropout)
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

    def forward(self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool = False) -> tuple[Tensor, None]:
        """Attend; shapes (N, length, channels). The attention weights are not returned, whatever is asked."""
        layers: tuple[tuple[Any, Tensor], ...] = (self.query, query), (self.key, key), (self.value, value)
        q, k, v = (layer(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for layer, x in layers)
        if self.dropout.p:  # a module, so that dropout still follows the mode of a net that was traced
            weights = (q @ k.transpose(-2, -1) / math.sqrt(self.head_dim)).softmax(-1)
            mixed = self.dropout(weights) @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v)
        return self.out(mixed.transpose(1, 2).flatten(-2)), None


def unpack_attention(net: nn.Module, excluded: tuple[str, ...] = ()) -> nn.Module:
    """Replace each `torch.nn.MultiheadAttention` of a net by its parts, in place, but for excluded ones."""
    replacements: dict[nn.Module, nn.Module] = {
        module: Attention(module)
        for name, module in net.named_modules()
        if isinstance(module, nn.MultiheadAttention) and not any(f"{name}.".startswith(f"{e}.") for e in excluded)
    }
    return replace_modules(net, replacements)
