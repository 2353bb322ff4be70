"""Nets whose hidden layers can be cut to any width."""

from pyro_vnd.nn.axis import Axis, Run
from pyro_vnd.nn.channels import ChannelGroups, channel_groups
from pyro_vnd.nn.classifier import NestedClassifier
from pyro_vnd.nn.conditioner import Conditioner
from pyro_vnd.nn.layers import NestedLayer
from pyro_vnd.nn.narrow import narrow, recalibrate_batchnorm
from pyro_vnd.nn.nest import nest
from pyro_vnd.nn.net import NestedNet, Posterior
from pyro_vnd.nn.norms import NestedNorm
from pyro_vnd.nn.width import Width

__all__ = [
    "Axis",
    "ChannelGroups",
    "Conditioner",
    "NestedClassifier",
    "NestedLayer",
    "NestedNet",
    "NestedNorm",
    "Posterior",
    "Run",
    "Width",
    "channel_groups",
    "narrow",
    "nest",
    "recalibrate_batchnorm",
]
