"""Ordinary torch nets for images: torch only, and traceable by `torch.fx`.

They know nothing of nesting, of Pyro or of each other's data. Default arguments give the published nets; small ones
give nets of the same structure that train in seconds.
"""

from collections.abc import Callable
from functools import partial

from torch import nn

from models.nets.lenet import lenet
from models.nets.mlp import mlp
from models.nets.mobilenet import mobilenet_v2
from models.nets.resnet import resnet18
from models.nets.resnext import resnext29
from models.nets.vgg import vgg11
from models.nets.vit import vit

__all__ = ["NETS", "lenet", "mlp", "mobilenet_v2", "resnet18", "resnext29", "vgg11", "vit"]

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
