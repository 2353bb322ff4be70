"""Multilayer perceptron."""

from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from models.sizes import check_sizes


def mlp(num_inputs: int = 784, num_classes: int = 10, hidden: Sequence[int] = (512, 512)) -> nn.Sequential:
    """Multilayer perceptron with ReLU.

    Args:
        num_inputs: Pixels of an image, D.
        num_classes: Number of classes, K.
        hidden: Units of each hidden layer.

    Returns:
        A net from images of D pixels in all, shape (N, ...), to logits, shape (N, K).

    Raises:
        ValueError: If a size is not positive.

    Example:
        >>> import torch
        >>> mlp(64, hidden=(32,))(torch.zeros(5, 1, 8, 8)).shape
        torch.Size([5, 10])
    """
    check_sizes("mlp", num_inputs=num_inputs, num_classes=num_classes, hidden=hidden)
    layers: list[nn.Module] = [nn.Flatten()]
    for fan_in, fan_out in pairwise((num_inputs, *hidden)):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear((num_inputs, *hidden)[-1], num_classes))
