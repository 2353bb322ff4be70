"""Which layers of a net share channels: the net is traced, and channels are followed through its operations."""

from pyro_vnd.nn.tracing.attention import unpack_attention
from pyro_vnd.nn.tracing.depth import MUST_RUN, Given, ResidualBlock
from pyro_vnd.nn.tracing.groups import ChannelGroups, LayerChannels, channel_groups
from pyro_vnd.nn.tracing.recurrent import unpack_recurrent

__all__ = [
    "MUST_RUN",
    "ChannelGroups",
    "Given",
    "LayerChannels",
    "ResidualBlock",
    "channel_groups",
    "unpack_attention",
    "unpack_recurrent",
]
