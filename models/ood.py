"""Images from outside a net's domain, to see whether it knows what it does not know."""

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from models.datasets import Split, load
from models.datasets.split import hold_out

Part = Literal["validation", "test"]


def ood_sets(images: Tensor, *, split: Part = "test", seed: int = 0) -> dict[str, Tensor]:
    """Returns four sets of images that are not of the domain of `images`, in the same layout.

    | name | what | how many |
    |---|---|---|
    | digits | scikit-learn's handwritten digits, enlarged bilinearly | 898 for validation, 899 for testing |
    | inverted | 1 - x | as many as `images` |
    | rotated | x turned left by 90 degrees | as many |
    | noise | independent uniform pixels | as many |

    An image that looks the same when turned does not leave the domain: among the rotated, some bags.

    Args:
        images: A part of the data in the domain, gray and square, in [0, 1], shape (N, 1, S, S).
        split: Which part that is. The two have different digits and different noise, so that what is chosen on
            the one is not measured on it.
        seed: Of the noise, which has a generator of its own.

    Returns:
        The sets by name, with the images' dtype and device, shape (M, 1, S, S).

    Raises:
        ValueError: If the images are not as described, or `split` is neither part.

    Example:
        >>> sets = ood_sets(torch.rand(5, 1, 28, 28), split="validation")
        >>> {name: tuple(images.shape) for name, images in sets.items()}
        {'digits': (898, 1, 28, 28), 'inverted': (5, 1, 28, 28), 'rotated': (5, 1, 28, 28), 'noise': (5, 1, 28, 28)}
    """
    if split not in get_args(Part):
        raise ValueError(f"`split` must be one of {', '.join(get_args(Part))}; got {split!r}")
    _check(images)
    return {
        "digits": interpolate(_digits(split), images.shape[2:], mode="bilinear", align_corners=False).to(images),
        "inverted": 1 - images,
        "rotated": images.rot90(1, (2, 3)).contiguous(),
        "noise": _noise(images.shape, 2 * seed + (split == "test")).to(images),
    }


def _check(images: Tensor) -> None:
    if images.ndim != 4 or images.shape[1] != 1 or images.shape[2] != images.shape[3] or not images.numel():
        raise ValueError(f"`images` must be gray and square, of shape (N, 1, S, S); got shape {tuple(images.shape)}")
    if not images.is_floating_point():
        raise ValueError(f"`images` must be floats; got {images.dtype}")
    if not ((images >= 0) & (images <= 1)).all():  # in this form NaN fails, too
        raise ValueError(f"`images` must be in [0, 1]; got values from {images.min()} to {images.max()}")


def _digits(split: Part) -> Tensor:
    data = load("digits")
    parts = (data.train, data.validation, data.test)
    every = Split(torch.cat([part.images for part in parts]), torch.cat([part.labels for part in parts]))
    test, validation = hold_out(every, 0.5)
    return (validation if split == "validation" else test).images


def _noise(shape: torch.Size, seed: int) -> Tensor:
    # Drawn on the CPU, so that a device sees the same.
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
