"""LeNet."""

from torch import nn

from models.sizes import check_sizes


def lenet(
    in_channels: int = 1,
    num_classes: int = 10,
    channels: tuple[int, int] = (32, 64),
    hidden: int = 128,
    image_size: int = 28,
) -> nn.Sequential:
    """LeNet with ReLU and max-pooling: two 5x5 convolutions, each pooled, and two linear layers.

    The convolutions are not padded, as in the original (LeCun et al., "Gradient-Based Learning Applied to Document
    Recognition", 1998). On images under 16 pixels, of which they would leave nothing, they are padded by two.

    Args:
        in_channels: Channels of an image, C.
        num_classes: Number of classes, K.
        channels: Channels of the two convolutions; (20, 50) with hidden=500 is Caffe's LeNet.
        hidden: Units of the hidden linear layer.
        image_size: Height and width of an image, S; at least 4.

    Returns:
        A net from images, shape (N, C, S, S), to logits, shape (N, K).

    Raises:
        ValueError: If a size is not positive, or the image too small.

    Example:
        >>> import torch
        >>> lenet(channels=(8, 16), hidden=32, image_size=8)(torch.zeros(5, 1, 8, 8)).shape
        torch.Size([5, 10])
    """
    check_sizes("lenet", in_channels=in_channels, num_classes=num_classes, channels=channels, hidden=hidden)
    if image_size < 4:
        raise ValueError(
            f"lenet: argument `image_size` must be at least 4, which pooling twice leaves one of; got {image_size}"
        )
    padding = 2 if image_size < 16 else 0
    lost = 4 - 2 * padding  # by each convolution, at the borders
    side = ((image_size - lost) // 2 - lost) // 2
    return nn.Sequential(
        nn.Conv2d(in_channels, channels[0], 5, padding=padding),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(channels[0], channels[1], 5, padding=padding),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(channels[1] * side**2, hidden),
        nn.ReLU(),
        nn.Linear(hidden, num_classes),
    )
