"""Bodies of encoders and decoders: everything but the linear maps that touch the code."""

from collections.abc import Callable, Sequence
from math import prod
from typing import NamedTuple

from torch import nn

from pyro_vnd._sizes import check_count, check_sizes

__all__ = ["Bodies", "check_image_shape", "conv_bodies", "linear_bodies", "mlp_bodies"]


class Bodies(NamedTuple):
    """The two halves of an autoencoder without what touches the code.

    Attributes:
        encoder: Images, shape (N, *image_shape), to features, shape (N, num_features).
        num_features: Features of an image.
        decoder: What follows the decoder's first linear map, shape (N, num_inputs), up to shape (N, *image_shape).
        num_inputs: Outputs of that map.
    """

    encoder: nn.Module
    num_features: int
    decoder: nn.Module
    num_inputs: int


def mlp_bodies(
    image_shape: Sequence[int], hidden: Sequence[int] = (512, 256), activation: Callable[[], nn.Module] = nn.SiLU
) -> Bodies:
    """Multilayer perceptrons, the decoder being the encoder's mirror image.

    Args:
        image_shape: Shape of an image, (D,) or (C, H, W) say.
        hidden: Units of the encoder's hidden layers.
        activation: Makes an activation.

    Returns:
        The bodies.

    Raises:
        ValueError: If a size is not positive, or an activation no module.

    Example:
        >>> import torch
        >>> bodies = mlp_bodies((1, 8, 8), hidden=(32, 16))
        >>> bodies.encoder(torch.zeros(5, 1, 8, 8)).shape, bodies.decoder(torch.zeros(5, 16)).shape
        (torch.Size([5, 16]), torch.Size([5, 1, 8, 8]))
    """
    image_shape = check_image_shape("mlp_bodies", image_shape)
    check_sizes("mlp_bodies", 1, hidden=hidden)
    made = why = None
    try:
        made = None if isinstance(activation, nn.Module) else activation()
    except TypeError as error:  # it cannot be called so
        why = error
    if not isinstance(made, nn.Module):
        raise ValueError(
            f"mlp_bodies: argument `activation` must be what makes a module, without arguments; got {activation!r}"
        ) from why
    down: list[nn.Module] = [nn.Flatten()]
    up: list[nn.Module] = []
    for n_in, n_out in zip([prod(image_shape), *hidden[:-1]], hidden, strict=True):
        down += [nn.Linear(n_in, n_out), activation()]
        up = [activation(), nn.Linear(n_out, n_in), *up]
    return Bodies(nn.Sequential(*down), hidden[-1], nn.Sequential(*up, nn.Unflatten(-1, image_shape)), hidden[-1])


def conv_bodies(image_shape: Sequence[int], channels: Sequence[int] = (32, 64), hidden: int = 256) -> Bodies:
    """Convolutions that halve the image at each layer, and transposed ones that double it.

    Args:
        image_shape: Shape (C, H, W) of an image; H and W are multiples of 2 to the number of convolutions.
        channels: Channels of each convolution.
        hidden: Units of the dense layer between convolutions and code.

    Returns:
        The bodies.

    Raises:
        ValueError: If the shape is no such shape, or a size is not positive.

    Example:
        >>> import torch
        >>> bodies = conv_bodies((1, 8, 8), channels=(4, 8), hidden=16)
        >>> bodies.encoder(torch.zeros(5, 1, 8, 8)).shape, bodies.decoder(torch.zeros(5, 16)).shape
        (torch.Size([5, 16]), torch.Size([5, 1, 8, 8]))
    """
    image_shape = check_image_shape("conv_bodies", image_shape)
    check_sizes("conv_bodies", 1, channels=channels)
    check_count("conv_bodies", hidden=hidden)
    factor = 2 ** len(channels)
    if len(image_shape) != 3 or image_shape[1] % factor or image_shape[2] % factor:
        raise ValueError(
            f"conv_bodies: argument `image_shape` must be (C, H, W) with H and W multiples of {factor}; "
            f"got {image_shape}"
        )
    down: list[nn.Module] = []
    up: list[nn.Module] = []
    for n_in, n_out in zip([image_shape[0], *channels[:-1]], channels, strict=True):
        down += [nn.Conv2d(n_in, n_out, 4, stride=2, padding=1), nn.SiLU()]
        up = [nn.SiLU(), nn.ConvTranspose2d(n_out, n_in, 4, stride=2, padding=1), *up]
    inner = (channels[-1], image_shape[1] // factor, image_shape[2] // factor)
    return Bodies(
        nn.Sequential(*down, nn.Flatten(), nn.Linear(prod(inner), hidden), nn.SiLU()),
        hidden,
        nn.Sequential(nn.SiLU(), nn.Linear(hidden, prod(inner)), nn.Unflatten(-1, inner), *up),
        hidden,
    )


def linear_bodies(image_shape: Sequence[int]) -> Bodies:
    """Nothing but a change of shape: with them encoder and decoder are linear.

    Args:
        image_shape: Shape of an image.

    Returns:
        The bodies.

    Raises:
        ValueError: If a size is not positive.
    """
    image_shape = check_image_shape("linear_bodies", image_shape)
    return Bodies(nn.Flatten(), prod(image_shape), nn.Unflatten(-1, image_shape), prod(image_shape))


def check_image_shape(function: str, image_shape: Sequence[int]) -> tuple[int, ...]:
    """Return the shape of an image as integers of Python; raise a ValueError if it is none."""
    if not isinstance(image_shape, Sequence):
        raise ValueError(f"{function}: argument `image_shape` must be a tuple, (D,) or (C, H, W); got {image_shape!r}")
    check_sizes(function, 1, image_shape=image_shape)
    return tuple(map(int, image_shape))
