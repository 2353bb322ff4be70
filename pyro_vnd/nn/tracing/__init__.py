"""Which layers of a net share channels: the net is traced, and channels are followed through its operations."""

from pyro_vnd.nn.tracing.attention import unpack_attention
from pyro_vnd.nn.tracing.groups import ChannelGroups, LayerChannels, Tracer, channel_groups

__all__ = ["ChannelGroups", "LayerChannels", "Tracer", "channel_groups", "unpack_attention"]
