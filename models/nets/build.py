"""The nets by name, built for the images of a data set."""

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

from torch import nn

from models.nets.lenet import lenet
from models.nets.mlp import mlp
from models.nets.mobilenet import mobilenet_v2
from models.nets.resnet import resnet18
from models.nets.resnext import resnext29
from models.nets.vgg import vgg11
from models.nets.vit import vit

NETS: dict[str, Callable[..., nn.Module]] = {
    "mlp": mlp,
    "lenet": lenet,
    "vgg11": vgg11,
    "vgg11-wide": partial(vgg11, width=1.5, hidden=(256,)),  # as in "Variational Nested Dropout"
    "resnet18": resnet18,
    "resnext29": resnext29,
    "mobilenet-v2": mobilenet_v2,
    "vit": vit,
}

# Sizes at which nets of the same structure train in seconds.
SMALL: dict[str, dict[str, Any]] = {
    "mlp": {"hidden": (64, 64)},
    "lenet": {"channels": (16, 32), "hidden": 64},
    "vgg11": {"width": 1 / 8},
    "vgg11-wide": {"width": 3 / 16, "hidden": (32,)},
    "resnet18": {"base": 8},
    "resnext29": {"cardinality": 4, "base_width": 4, "depth": 11, "base": 8},
    "mobilenet-v2": {"width": 0.5, "stages": [(1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 2, 2)], "last_channels": 64},
    "vit": {"dim": 32, "depth": 2, "heads": 4},
}

Size = Literal["small", "full"]


def build(name: str, image_shape: tuple[int, int, int], num_classes: int = 10, size: Size = "full") -> nn.Module:
    """Builds a net by its name, for images of a given shape.

    Args:
        name: One of `NETS`.
        image_shape: (C, H, W); square but for "mlp".
        num_classes: Number of classes, K.
        size: "full" for the published sizes, the constructor's defaults; "small" for those of `SMALL`.

    Returns:
        A net from images, shape (N, C, H, W), to logits, shape (N, K).

    Raises:
        ValueError: If no net has that name, or the sizes do not fit it.

    Example:
        >>> import torch
        >>> build("lenet", (1, 8, 8), size="small")(torch.zeros(5, 1, 8, 8)).shape
        torch.Size([5, 10])
    """
    if name not in NETS:
        raise ValueError(f"unknown net {name!r}; known are {', '.join(NETS)}")
    if size not in get_args(Size):
        raise ValueError(f"`size` must be one of {', '.join(get_args(Size))}; got {size!r}")
    if len(image_shape) != 3:
        raise ValueError(f"`image_shape` must be (channels, height, width); got {image_shape}")
    channels, height, width = image_shape
    if name != "mlp" and height != width:
        raise ValueError(f"`image_shape` must be square for {name}; got {image_shape}")
    # Constructors differ in what they must know of an image: each is told what it asks for.
    known = {"num_inputs": math.prod(image_shape), "in_channels": channels, "image_size": height}
    asked = inspect.signature(NETS[name]).parameters
    of_image = {argument: value for argument, value in known.items() if argument in asked}
    return NETS[name](num_classes=num_classes, **of_image, **(SMALL[name] if size == "small" else {}))
