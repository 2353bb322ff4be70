"""Ordinary torch nets for images: torch only, and traceable by `torch.fx`.

They know nothing of nesting, of Pyro or of each other's data. Default arguments give the published nets; small ones
give nets of the same structure that train in seconds. `build` makes either by name for images of a given shape.
"""

from models.nets.build import NETS, SMALL, build
from models.nets.lenet import lenet
from models.nets.mlp import mlp
from models.nets.mobilenet import mobilenet_v2
from models.nets.resnet import resnet18
from models.nets.resnext import resnext29
from models.nets.vgg import vgg11
from models.nets.vit import vit

__all__ = ["NETS", "SMALL", "build", "lenet", "mlp", "mobilenet_v2", "resnet18", "resnext29", "vgg11", "vit"]
