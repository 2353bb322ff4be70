"""What the state of a nested net says of its groups, so that it goes into no net that is cut in another way."""

from collections.abc import Mapping
from typing import Any

from torch import nn

__all__ = ["keep_groups_in_state"]


def keep_groups_in_state(net: nn.Module) -> None:
    """Let the states of a nested net say what its groups are, and compare those of what it loads with its own.

    Arrays alone do not tell: 3 blocks of 4 units, and 4 blocks of 3 units of which 2 are always kept, have laws of one
    shape. The groups are in the metadata of the state, where they are no entry of it; states without them, as other
    versions wrote them, are taken as they are.

    Args:
        net: The nested net.
    """
    net.register_state_dict_post_hook(_write)
    net.register_load_state_dict_pre_hook(_compare)


def _groups(net: Any) -> dict[str, list[int]]:
    return {name: [each.num_units, each.num_blocks, each.always_kept] for name, each in net.widths.items()}


def _write(net: nn.Module, state: Mapping[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
    metadata["groups"] = _groups(net)


def _compare(
    net: nn.Module, state: Mapping[str, Any], prefix: str, metadata: Mapping[str, Any], strict: bool, *lists: list[str]
) -> None:
    own, other = _groups(net), metadata.get("groups")
    if not strict or other is None or list(own.items()) == list(other.items()):
        return
    names = [name for name in {**other, **own} if own.get(name) != other.get(name)]
    lines = [
        f"\n\t- {name!r}: {_said(other.get(name))} in the state, {_said(own.get(name))} in the net" for name in names
    ]
    # torch raises what is in the last list, with what else does not fit.
    lists[-1].append(
        "load_state_dict: argument `state_dict` is that of a net with other groups, so nest the same net with the "
        "arguments of `nest` that the saved one had:" + "".join(lines or ["\n\t- their order"])
    )


def _said(group: list[int] | None) -> str:
    if group is None:
        return "no group"
    units, blocks, always = group
    return f"{units} units in {blocks} blocks, {always} always kept"
