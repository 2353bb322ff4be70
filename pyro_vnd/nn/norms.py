"""Normalisation over channels that may be cut."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyro_vnd._compat import has_hooks
from pyro_vnd.nn.axis import Axis, Channels, Rows, kept_channels, take
from pyro_vnd.nn.reads import MaskedReads, Read, masked_norm, shaped, substituted
from pyro_vnd.nn.width import Width

__all__ = ["BATCH_NORMS", "INSTANCE_NORMS", "NestedNorm", "mixes_channels"]

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)


class NestedNorm(nn.Module):
    """A torch norm, or a PReLU, over channels that may be cut.

    Norms of each channel by itself see dropped channels as they are, because masks act later. Norms over all channels
    (LayerNorm, RMSNorm, GroupNorm with one group) take their statistics over the kept ones, as the narrowed net does.

    Args:
        layer: BatchNorm, InstanceNorm, GroupNorm, LayerNorm, RMSNorm or PReLU.
        channels: Width of the channels, or runs of several.
        rows: Where the examples lie in the inputs; by default along the first axis.

    Raises:
        ValueError: If the layer is of another kind.
    """

    def __init__(self, layer: nn.Module, channels: Channels, rows: Rows | None = None) -> None:
        super().__init__()
        kinds = (*BATCH_NORMS, *INSTANCE_NORMS, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.PReLU)
        if not isinstance(layer, kinds):
            known = ", ".join(kind.__name__ for kind in kinds)
            raise ValueError(f"NestedNorm: argument `layer` must be one of {known}; got {type(layer).__name__}")
        if len(getattr(layer, "normalized_shape", ())) > 1:
            raise ValueError(
                f"NestedNorm: argument `layer` must normalise over the channels only; got {layer.normalized_shape}"
            )
        self.plain: Any = layer
        self.rows, self.has_hooks = rows, has_hooks(layer)
        self.axis = Axis(_num_channels(layer), channels)

    @property
    def widths(self) -> list[Width]:
        """The widths of its channels."""
        return self.axis.widths

    def num_parameters(self, name: str, kept: Mapping[str, int]) -> int:
        """Return how many entries of "weight" or "bias" are left when groups keep a number of units."""
        return kept_channels(self.axis.index(kept), self.plain.get_parameter(name).numel())

    def __getattr__(self, name: str) -> Any:
        """Return what the plain norm has: the code of a net may ask for it; sizes are those of the pass."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "plain" not in vars(self).get("_modules", {}) or name.startswith("__"):
                raise
        if name in ("weight", "bias"):
            return self._kept_parameters()[name == "bias"]
        sizes = sizes_of(self.plain, kept_channels(self.axis.index(), self.axis.size))
        return sizes[name] if name in sizes else getattr(self.plain, name)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (as torch's norms name it)
        """Normalise the kept channels; dropped ones are left to the layers that read them."""
        plain, x = self.plain, input
        mask = self.axis.mask()
        if self.has_hooks:
            return self._with_hooks(x)
        if mask is None or not mixes_channels(plain):
            return self._sliced(x) if self.axis.is_sliced else plain(x)
        last = isinstance(plain, nn.LayerNorm | nn.RMSNorm)
        kept = shaped(x, mask, -1 if last else 1, self.rows).expand(x.shape)
        dims = -1 if last else tuple(range(1, x.dim()))
        x = masked_norm(x, kept, dims, plain.eps, not isinstance(plain, nn.RMSNorm))
        trailing = (1,) * (0 if last else x.dim() - 2)
        weight, bias = self._kept_parameters()
        if weight is not None:
            x = x * weight.reshape(-1, *trailing)
        return x if bias is None else x + bias.reshape(-1, *trailing)

    def _with_hooks(self, x: Tensor) -> Tensor:
        """Run the norm as it is, so that its hooks are, with the parameters of this pass in the place of its own."""
        index = self.axis.index()
        values: dict[str, Any] = {name: take(value, {0: index}) for name, value in _per_channel(self.plain).items()}
        numbers = sizes_of(self.plain, kept_channels(index, self.axis.size)) if self.axis.is_sliced else {}
        weight = values.get("weight")
        masked = MaskedReads([] if weight is None else [(weight, Read(self.axis, self.rows))])
        with substituted(self.plain, values | numbers), masked:
            return self.plain(x)

    def _kept_parameters(self) -> tuple[Tensor | None, Tensor | None]:
        index = self.axis.index()
        weight, bias = getattr(self.plain, "weight", None), getattr(self.plain, "bias", None)
        return (None if weight is None else take(weight, {0: index})), (
            None if bias is None else take(bias, {0: index})
        )

    def _sliced(self, x: Tensor) -> Tensor:
        plain, index = self.plain, self.axis.index()
        weight, bias = self._kept_parameters()
        if isinstance(plain, nn.LayerNorm):
            return F.layer_norm(x, x.shape[-1:], weight, bias, plain.eps)
        if isinstance(plain, nn.RMSNorm):
            return F.rms_norm(x, list(x.shape[-1:]), weight, plain.eps)
        if isinstance(plain, nn.GroupNorm):
            groups = 1 if plain.num_groups == 1 else plain.num_groups * x.shape[1] // plain.num_channels
            return F.group_norm(x, groups, weight, bias, plain.eps)
        if isinstance(plain, nn.PReLU):
            return F.prelu(x, take(plain.weight, {0: index}))
        # Batch and instance norms: shorter tensors; running statistics are written back.
        tensors = {name: take(value, {0: index}) for name, value in _per_channel(plain).items()}
        if isinstance(plain, INSTANCE_NORMS):  # the module insists on its number of channels
            mean, variance = tensors.get("running_mean"), tensors.get("running_var")
            of_input = plain.training or mean is None
            result = F.instance_norm(x, mean, variance, weight, bias, of_input, plain.momentum or 0.0, plain.eps)
        else:
            result = torch.func.functional_call(plain, tensors, (x,))
        if plain.training and isinstance(index, Tensor):
            for name, buffer in plain.named_buffers():
                if name in tensors:
                    buffer.index_copy_(0, index.to(buffer.device), tensors[name])
        return result

    def extra_repr(self) -> str:
        """Describe the norm in the representation of a net."""
        return f"channels={[width.name for width in self.axis.widths] or 'whole'}"


def _num_channels(layer: Any) -> int:
    if isinstance(layer, nn.LayerNorm | nn.RMSNorm):
        return layer.normalized_shape[-1]
    if isinstance(layer, nn.GroupNorm):
        return layer.num_channels
    return layer.num_parameters if isinstance(layer, nn.PReLU) else layer.num_features


def sizes_of(layer: Any, size: int) -> dict[str, Any]:
    """Return the attributes by which a torch norm knows its number of channels, when it has `size` of them."""
    if isinstance(layer, nn.GroupNorm):
        groups = layer.num_groups if layer.num_groups == 1 else layer.num_groups * size // layer.num_channels
        return {"num_groups": groups, "num_channels": size}
    if isinstance(layer, nn.LayerNorm | nn.RMSNorm):
        return {"normalized_shape": (size,)}
    return {"num_parameters" if isinstance(layer, nn.PReLU) else "num_features": size}


def mixes_channels(layer: Any) -> bool:
    """Say whether a torch norm takes statistics over the channels."""
    return isinstance(layer, nn.LayerNorm | nn.RMSNorm) or (isinstance(layer, nn.GroupNorm) and layer.num_groups == 1)


def _per_channel(layer: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers with one entry a channel."""
    tensors: dict[str, Tensor] = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    return {name: value for name, value in tensors.items() if value.dim() == 1}
