"""ResNet with eighteen layers, as used for CIFAR."""

from torch import nn

from models.nets.residual import Residual, classifier, conv_norm, projection
from models.sizes import check_sizes


def resnet18(in_channels: int = 3, num_classes: int = 10, base: int = 64) -> nn.Sequential:
    """ResNet-18 with a stem for small images: a 3x3 convolution in place of the 7x7 one and the pooling.

    Source: He et al., "Deep Residual Learning for Image Recognition", arXiv 1512.03385.

    Args:
        in_channels: Channels of an image, C.
        num_classes: Number of classes, K.
        base: Channels of the stem and of the first of four stages; each stage has twice those of the one before.

    Returns:
        A net from images, shape (N, C, H, W), to logits, shape (N, K).

    Raises:
        ValueError: If a size is not positive.

    Example:
        >>> import torch
        >>> resnet18(base=8)(torch.zeros(5, 3, 32, 32)).shape
        torch.Size([5, 10])
    """
    check_sizes("resnet18", in_channels=in_channels, num_classes=num_classes, base=base)
    layers: list[nn.Module] = [*conv_norm(in_channels, base, kernel=3), nn.ReLU()]
    channels = base
    for stage in range(4):
        out_channels = base * 2**stage
        for stride in (1 if stage == 0 else 2, 1):
            layers.append(_block(channels, out_channels, stride))
            channels = out_channels
    return nn.Sequential(*layers, *classifier(channels, num_classes))


def _block(in_channels: int, out_channels: int, stride: int) -> Residual:
    branch = nn.Sequential(
        *conv_norm(in_channels, out_channels, kernel=3, stride=stride),
        nn.ReLU(),
        *conv_norm(out_channels, out_channels, kernel=3),
    )
    return Residual(branch, projection(in_channels, out_channels, stride), nn.ReLU())
