"""Nets whose hidden layers can be cut to any width."""

from pyro_vnd.nn.axis import Axis, Run
from pyro_vnd.nn.layers import NestedLayer
from pyro_vnd.nn.likelihoods import NestedClassifier
from pyro_vnd.nn.narrow import narrow, recalibrate_batchnorm
from pyro_vnd.nn.nest import nest
from pyro_vnd.nn.net import NestedNet, NetGuide
from pyro_vnd.nn.norms import NestedNorm
from pyro_vnd.nn.tracing.groups import ChannelGroups, channel_groups
from pyro_vnd.nn.width import Width

__all__ = [
    "Axis",
    "ChannelGroups",
    "NestedClassifier",
    "NestedLayer",
    "NestedNet",
    "NestedNorm",
    "NetGuide",
    "Run",
    "Width",
    "channel_groups",
    "narrow",
    "nest",
    "recalibrate_batchnorm",
]
