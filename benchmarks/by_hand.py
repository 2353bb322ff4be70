"""Training steps of Bayesian nets as one writes them by hand in bare torch, without Pyro."""

import math
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["BayesianNet", "Step", "adam_step"]

Step = Callable[..., object]

TEMPERATURE = 0.2


def adam_step(parameters: Iterable[Tensor], loss: Callable[..., Tensor], lr: float = 1e-3) -> Step:
    """Make a step of fused Adam.

    Args:
        parameters: What is trained.
        loss: Of a batch, as many tensors as the step is given.
        lr: Learning rate.
    """
    optimizer = torch.optim.Adam(parameters, lr=lr, fused=True)

    def step(*batch: Tensor) -> None:
        optimizer.zero_grad()
        loss(*batch).backward()
        optimizer.step()

    return step


class _Affine(nn.Module):
    """A linear layer or convolution with independent Normal weights, and its KL."""

    def __init__(self, layer: nn.Linear | nn.Conv2d, local: bool) -> None:
        super().__init__()
        assert layer.bias is not None
        self.weight, self.bias, self.local = layer.weight, layer.bias, local
        self.log_scale = nn.Parameter(torch.full_like(layer.weight, -5.0))
        self.bias_log_scale = nn.Parameter(torch.full_like(layer.bias, -5.0))
        self.variance = 2 / layer.weight[0].numel()
        self.apply_to: Callable[..., Tensor] = F.linear
        if isinstance(layer, nn.Conv2d):
            self.apply_to = partial(F.conv2d, stride=layer.stride, padding=layer.padding)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scale, bias_scale = self.log_scale.exp(), self.bias_log_scale.exp()
        kl = torch.zeros(())
        for mu, sigma, variance in ((self.weight, scale, self.variance), (self.bias, bias_scale, 1.0)):
            squares = (mu.square().sum() + sigma.square().sum()) / (2 * variance)
            kl = kl + squares - sigma.log().sum() + mu.numel() * (0.5 * math.log(variance) - 0.5)
        if self.local:
            spread = self.apply_to(x.square(), scale.square(), bias_scale.square())
            outputs = self.apply_to(x, self.weight, self.bias)
            return outputs + spread.clamp_min(1e-16).sqrt() * torch.randn_like(outputs), kl
        weight = self.weight + scale * torch.randn_like(scale)
        return self.apply_to(x, weight, self.bias + bias_scale * torch.randn_like(bias_scale)), kl


class _Mask(nn.Module):
    """A straight-through ordered mask for each row, over blocks of units, and its KL from the uniform law."""

    def __init__(self, units: int, num_blocks: int) -> None:
        super().__init__()
        self.logits, self.size = nn.Parameter(torch.zeros(num_blocks)), units // num_blocks

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        probs = self.logits.softmax(-1)
        above = probs.flip(-1).cumsum(-1).flip(-1)
        below = (probs.cumsum(-1) - probs).clamp_min(1e-20)
        noise = torch.rand(len(x), 1)
        hard = (noise < above).to(probs.dtype)
        soft = torch.sigmoid((above.log() - below.log() - torch.logit(noise, eps=1e-7)) / TEMPERATURE)
        mask = hard + (soft - soft.detach())
        mask = mask.unsqueeze(-1).expand(*mask.shape, self.size).flatten(-2)
        kl = len(x) * (probs * (probs.clamp_min(1e-20).log() + math.log(len(probs)))).sum()
        return x * mask.reshape(*mask.shape, *[1] * (x.dim() - 2)), kl


class BayesianNet(nn.Module):
    """A Bayesian net with a mask an example over the outputs of each hidden layer, in bare torch.

    Args:
        net: Linear layers and convolutions, and what comes between them.
        local: Whether the outputs of layers are drawn, rather than their weights.
        num_blocks: Blocks of each mask.
        num_data: Rows of the whole data.
    """

    def __init__(self, net: nn.Sequential, *, local: bool, num_blocks: int, num_data: int) -> None:
        super().__init__()
        self.num_data, self.parts = num_data, nn.ModuleList()
        pending: _Mask | None = None  # acts where it meets least: after pooling, before channels are flattened
        layers = [module for module in net if isinstance(module, nn.Linear | nn.Conv2d)]
        for module in net:
            if pending is not None and isinstance(module, nn.Flatten | nn.Linear | nn.Conv2d):
                self.parts.append(pending)
                pending = None
            self.parts.append(_Affine(module, local) if isinstance(module, nn.Linear | nn.Conv2d) else module)
            if module in layers[:-1]:
                pending = _Mask(len(module.weight), num_blocks)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the negative ELBO of a batch, per row."""
        of_weights = of_masks = torch.zeros(())
        for part in self.parts:
            if isinstance(part, _Affine):
                x, kl = part(x)
                of_weights = of_weights + kl
            elif isinstance(part, _Mask):
                x, kl = part(x)
                of_masks = of_masks + kl
            else:
                x = part(x)
        return (F.cross_entropy(x, y, reduction="sum") + of_masks) / len(y) + of_weights / self.num_data
