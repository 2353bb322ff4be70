"""ResNeXt, as published for CIFAR."""

from torch import nn

from models.nets.residual import Residual, classifier, conv_norm, projection
from models.sizes import check_sizes


def resnext29(
    in_channels: int = 3,
    num_classes: int = 10,
    cardinality: int = 8,
    base_width: int = 64,
    depth: int = 29,
    base: int = 64,
) -> nn.Sequential:
    """ResNeXt-29: three stages of bottlenecks whose 3x3 convolution is grouped.

    Source: Xie et al., "Aggregated Residual Transformations for Deep Neural Networks", arXiv 1611.05431, which has
    8x64d (the default) and 16x64d for CIFAR.

    Args:
        in_channels: Channels of an image, C.
        num_classes: Number of classes, K.
        cardinality: Groups of each grouped convolution.
        base_width: Channels of each group in the first stage; doubled by each further stage.
        depth: Layers in all, nine for each block of a stage and two more.
        base: Channels of the stem, a quarter of what the first stage puts out; doubled by each further stage.

    Returns:
        A net from images, shape (N, C, H, W), to logits, shape (N, K).

    Raises:
        ValueError: If a size is not positive, or the depth not 9 b + 2.

    Example:
        >>> import torch
        >>> resnext29(cardinality=4, base_width=4, depth=11, base=8)(torch.zeros(5, 3, 32, 32)).shape
        torch.Size([5, 10])
    """
    check_sizes("resnext29", in_channels=in_channels, num_classes=num_classes)
    check_sizes("resnext29", cardinality=cardinality, base_width=base_width, base=base)
    num_blocks, left = divmod(depth - 2, 9)
    if num_blocks < 1 or left:
        raise ValueError(
            f"resnext29: argument `depth` must be 9 b + 2 for b blocks a stage, as 11, 20 and 29 are; got {depth}"
        )
    layers: list[nn.Module] = [*conv_norm(in_channels, base, kernel=3), nn.ReLU()]
    channels = base
    for stage in range(3):
        width, out_channels = cardinality * base_width * 2**stage, 4 * base * 2**stage
        for block in range(num_blocks):
            layers.append(_block(channels, width, out_channels, 2 if stage > 0 and block == 0 else 1, cardinality))
            channels = out_channels
    return nn.Sequential(*layers, *classifier(channels, num_classes))


def _block(in_channels: int, width: int, out_channels: int, stride: int, cardinality: int) -> Residual:
    branch = nn.Sequential(
        *conv_norm(in_channels, width),
        nn.ReLU(),
        *conv_norm(width, width, kernel=3, stride=stride, groups=cardinality),
        nn.ReLU(),
        *conv_norm(width, out_channels),
    )
    return Residual(branch, projection(in_channels, out_channels, stride), nn.ReLU())
