"""VGG with eleven layers, as used for CIFAR."""

from collections.abc import Sequence

from torch import nn

from models.nets.residual import conv_norm
from models.sizes import check_sizes

STAGES = ((64,), (128,), (256, 256), (512, 512), (512, 512))  # channels of the convolutions before each pooling


def vgg11(
    in_channels: int = 3,
    num_classes: int = 10,
    width: float = 1.0,
    hidden: Sequence[int] = (),
    image_size: int = 32,
) -> nn.Sequential:
    """VGG11 with BatchNorm: eight 3x3 convolutions in five stages, each stage pooled.

    For CIFAR the two wide linear layers of the original (Simonyan & Zisserman, arXiv 1409.1556, configuration A) are
    left out. The wide variant of "Variational Nested Dropout" (Cui et al., arXiv 2101.11353, and its authors' code)
    has 96, 192, 384, 384 and four times 768 channels and a hidden linear layer of 256: `width=1.5, hidden=(256,)`.

    Args:
        in_channels: Channels of an image, C.
        num_classes: Number of classes, K.
        width: Factor on the channels of every convolution.
        hidden: Units of each hidden linear layer, which has BatchNorm, too.
        image_size: Height and width of an image, S. Pooling rounds up, so that any size will do.

    Returns:
        A net from images, shape (N, C, S, S), to logits, shape (N, K).

    Raises:
        ValueError: If a size is not positive.

    Example:
        >>> import torch
        >>> vgg11(width=1 / 16)(torch.zeros(5, 3, 32, 32)).shape
        torch.Size([5, 10])
    """
    check_sizes("vgg11", in_channels=in_channels, num_classes=num_classes)
    check_sizes("vgg11", width=width, hidden=hidden, image_size=image_size)
    layers: list[nn.Module] = []
    for stage in STAGES:
        for base in stage:
            channels = max(1, round(base * width))
            layers += [*conv_norm(in_channels, channels, kernel=3), nn.ReLU()]
            in_channels = channels
        layers.append(nn.MaxPool2d(2, ceil_mode=True))
    side = -(-image_size // 2 ** len(STAGES))
    layers.append(nn.Flatten())
    features = in_channels * side**2
    for units in hidden:
        layers += [nn.Linear(features, units, bias=False), nn.BatchNorm1d(units), nn.ReLU()]
        features = units
    return nn.Sequential(*layers, nn.Linear(features, num_classes))
