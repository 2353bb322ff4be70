"""Layers that people write themselves, and that torch has: recognised by what they compute."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from pyro_vnd._compat import has_hooks
from pyro_vnd._state import cuda_devices, random_numbers
from pyro_vnd.nn.layers import AFFINE, affine_kind

__all__ = ["as_torch_has_it"]

USUAL_EPS = (1e-5, 1e-6, 1e-8, 1e-12)


def as_torch_has_it(module: nn.Module) -> nn.Module | None:
    """Return a layer of torch that computes what a module does, with its parameters; None if it is not recognised.

    Recognised are RMSNorm and LayerNorm over the last axis, and convolutions and linear layers whose weights are
    computed from their parameters, as by weight standardisation.

    Args:
        module: A module.
    """
    kind = affine_kind(module)
    if any(True for _ in module.children()) or has_hooks(module) or hasattr(module, "parametrizations"):
        return None
    if type(module).__module__.startswith("torch.nn."):
        return None
    with torch.no_grad(), random_numbers(0, cuda_devices([module])):
        if kind is not None:
            return _with_computed_weight(module, kind) if type(module).forward is not kind.forward else None
        return _norm(module)


def _norm(module: Any) -> nn.Module | None:
    own = dict(module.named_parameters(recurse=False))
    weight, bias = own.get("weight"), own.get("bias")
    if weight is None or weight.dim() != 1 or own.keys() - {"weight", "bias"} or any(True for _ in module.buffers()):
        return None
    size, was_training = len(weight), module.training
    # Small numbers tell what is added to the variance, large ones what is divided by.
    x = weight.new_empty(3, 2, size).normal_() * torch.tensor([1e-3, 1.0, 30.0]).to(weight).reshape(3, 1, 1) + 1e-3
    shaken = copy.deepcopy(module).eval()
    for parameter in shaken.parameters():
        parameter.uniform_(0.5, 1.5)
    try:
        out = shaken(x.clone())
    except Exception:  # whatever it wants in place of such a tensor
        return None
    finally:
        module.train(was_training)
    if not isinstance(out, Tensor) or out.shape != x.shape:
        return None
    weights = dict(shaken.named_parameters())
    for eps in (*(each for each in vars(module).values() if isinstance(each, float)), *USUAL_EPS):
        if bias is None and _same(out, F.rms_norm(x, [size], weights["weight"], eps)):
            return _made(nn.RMSNorm(size, eps, device="meta"), own, was_training)
        if _same(out, F.layer_norm(x, [size], weights["weight"], weights.get("bias"), eps)):
            return _made(nn.LayerNorm(size, eps, bias=bias is not None, device="meta"), own, was_training)
    return None


def _same(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-4, atol=1e-6)


class _Watch(TorchFunctionMode):
    """Sees what a convolution or linear layer gives the function that computes it."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function, self.calls = function, list[tuple[Any, Any, Any]]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function."""
        out = func(*args, **(kwargs or {}))
        if func is self.function:
            self.calls.append((args, kwargs or {}, out))
        return out


def _with_computed_weight(module: Any, kind: Any) -> nn.Module | None:
    """Return a layer of torch with the weight that a layer computes from its parameters, if that is all it does."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter) or (kind is not nn.Linear and module.padding_mode != "zeros"):
        return None
    if kind is nn.Linear:
        shape: tuple[int, ...] = (2, module.in_features)
    else:
        sizes = zip(module.kernel_size, module.dilation, module.stride, strict=True)
        shape = (2, module.in_channels, *(size * dilation + stride for size, dilation, stride in sizes))
    x = weight.new_empty(shape).normal_()
    copied = copy.deepcopy(module).eval()
    try:
        with _Watch(AFFINE[kind]) as watch:
            out = copied(x)
    except Exception:  # whatever it wants in place of such a tensor
        return None
    if len(watch.calls) != 1:
        return None
    args, kwargs, result = watch.calls[0]
    given = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
    used, bias = given.get("weight"), given.get("bias")
    if given.get("input") is not x or result is not out or used is None or used.shape != weight.shape:
        return None
    if used.untyped_storage().data_ptr() == copied.weight.untyped_storage().data_ptr():
        return None
    has_bias = bias is not None
    if kind is nn.Linear:
        plain: Any = nn.Linear(module.in_features, module.out_features, has_bias, device="meta")
    else:
        names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
        options = {name: getattr(module, name) for name in names}
        if "Transpose" in kind.__name__:
            options["output_padding"] = module.output_padding
        plain = kind(**options, bias=has_bias, device="meta")
    values = {"weight": nn.Parameter(used.clone())} | ({"bias": nn.Parameter(bias.clone())} if bias is not None else {})
    plain = _made(plain, values, module.training)
    # Weights that depend on the inputs, or on the mode, are no parameters.
    other = torch.randn_like(x)
    same = _same(plain(x), out) and _same(plain(other), copied(other)) and _same(plain(other), copied.train()(other))
    return plain if same else None


def _made(plain: nn.Module, parameters: dict[str, Any], training: bool) -> nn.Module:
    for name, value in parameters.items():
        plain.register_parameter(name, value)
    return plain.train(training)
