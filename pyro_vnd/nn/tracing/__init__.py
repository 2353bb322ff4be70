"""Which layers of a net share channels: the net is traced, and channels are followed through its operations."""

from pyro_vnd.nn.tracing.groups import channel_groups

__all__ = ["channel_groups"]
