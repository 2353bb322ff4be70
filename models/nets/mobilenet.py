"""MobileNetV2, as used for CIFAR."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from models.nets.residual import Residual, classifier, conv_norm
from models.sizes import check_sizes


class Stage(NamedTuple):
    """Inverted residuals with the same number of channels.

    Attributes:
        expansion: Factor by which the channels grow within a block.
        channels: Channels that each block puts out.
        num_blocks: Number of blocks.
        stride: Stride of the first block; the others keep the image's size.
    """

    expansion: int
    channels: int
    num_blocks: int
    stride: int


STAGES = (
    Stage(1, 16, 1, 1),
    Stage(6, 24, 2, 1),  # for ImageNet: stride 2, as the stem has there
    Stage(6, 32, 3, 2),
    Stage(6, 64, 4, 2),
    Stage(6, 96, 3, 1),
    Stage(6, 160, 3, 2),
    Stage(6, 320, 1, 1),
)


def mobilenet_v2(
    in_channels: int = 3,
    num_classes: int = 10,
    width: float = 1.0,
    stages: Sequence[Stage | tuple[int, int, int, int]] = STAGES,
    last_channels: int = 1280,
) -> nn.Sequential:
    """MobileNetV2 with strides for images of 32x32: blocks that widen, filter each channel, and narrow again.

    Source: Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", arXiv 1801.04381. As there, a
    block whose shape changes has no shortcut; some implementations for CIFAR project it.

    Args:
        in_channels: Channels of an image, C.
        num_classes: Number of classes, K.
        width: Factor on all channels, then rounded to a multiple of eight; the last convolution's it never shrinks.
        stages: The stages of blocks; fewer or shorter ones give a small net.
        last_channels: Channels of the last convolution.

    Returns:
        A net from images, shape (N, C, H, W), to logits, shape (N, K).

    Raises:
        ValueError: If a size is not positive.

    Example:
        >>> import torch
        >>> net = mobilenet_v2(width=0.25, stages=[(1, 16, 1, 1), (6, 24, 2, 2)], last_channels=64)
        >>> net(torch.zeros(5, 3, 32, 32)).shape
        torch.Size([5, 10])
    """
    check_sizes("mobilenet_v2", in_channels=in_channels, num_classes=num_classes)
    check_sizes("mobilenet_v2", width=width, last_channels=last_channels)
    channels = _round_to_eight(32 * width)
    layers: list[nn.Module] = [*conv_norm(in_channels, channels, kernel=3), nn.ReLU6()]
    for stage in map(Stage._make, stages):
        check_sizes("mobilenet_v2", **stage._asdict())
        out_channels = _round_to_eight(stage.channels * width)
        for block in range(stage.num_blocks):
            layers.append(_block(channels, out_channels, stage.stride if block == 0 else 1, stage.expansion))
            channels = out_channels
    last = _round_to_eight(last_channels * max(1.0, width))
    return nn.Sequential(*layers, *conv_norm(channels, last), nn.ReLU6(), *classifier(last, num_classes))


def _block(in_channels: int, out_channels: int, stride: int, expansion: int) -> nn.Module:
    inner = in_channels * expansion
    widen = (*conv_norm(in_channels, inner), nn.ReLU6()) if expansion > 1 else ()
    branch = nn.Sequential(
        *widen,
        *conv_norm(inner, inner, kernel=3, stride=stride, groups=inner),
        nn.ReLU6(),
        *conv_norm(inner, out_channels),
    )
    if stride == 1 and in_channels == out_channels:
        return Residual(branch, nn.Identity(), nn.Identity())  # the narrow end is linear
    return branch


def _round_to_eight(channels: float) -> int:
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * channels else rounded + 8  # never down by more than a tenth
