"""What residual nets are built of."""

from torch import Tensor, nn


class Residual(nn.Module):
    r"""Residual block, $y = \mathrm{act}(\mathrm{branch}(x) + \mathrm{shortcut}(x))$.

    Args:
        branch: What is learned.
        shortcut: The identity, or a projection where the branch changes the shape.
        activation: What follows the sum.
    """

    def __init__(self, branch: nn.Module, shortcut: nn.Module, activation: nn.Module) -> None:
        super().__init__()
        self.branch, self.shortcut, self.activation = branch, shortcut, activation

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output for images, shape (N, C, H, W)."""
        return self.activation(self.branch(x) + self.shortcut(x))


def conv_norm(
    in_channels: int, out_channels: int, kernel: int = 1, stride: int = 1, groups: int = 1
) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    """Returns a convolution that keeps the image's size, but for the stride, and its BatchNorm."""
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    return conv, nn.BatchNorm2d(out_channels)


def projection(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """Returns the shortcut of a block: a 1x1 convolution where the shape changes, else the identity."""
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    return nn.Sequential(*conv_norm(in_channels, out_channels, stride=stride))


def classifier(in_channels: int, num_classes: int) -> tuple[nn.Module, ...]:
    """Returns the last layers: the mean over the image, and a linear layer to the logits."""
    return nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(in_channels, num_classes)
