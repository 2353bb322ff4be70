"""Parameters in groups that have learning rates of their own."""

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from pyro_vnd.infer._fit.checks import LearningRate
from pyro_vnd.infer.auto_parts import AutoLengths
from pyro_vnd.infer.elbo import conditional_part
from pyro_vnd.nn import Width
from pyro_vnd.nn.values import ValueHead

__all__ = ["parameter_groups"]

LAWS, REST = "laws", "*"


def parameter_groups(module: nn.Module, lr: LearningRate, default: float) -> list[Any]:
    """Return the parameters of a fit as an optimiser takes them, in groups if there are rates by group.

    Args:
        module: Model, guide and objective.
        lr: A rate for all, or rates by group: "laws" are the parameters of laws of lengths, "*" is the rest, and other
            keys are patterns of names of parameters, `"model.encoder.*"` say. The first that fits holds.
        default: The rate of the rest where `lr` does not say.

    Raises:
        ValueError: If a group is empty.
    """
    named = dict(module.named_parameters())
    if not isinstance(lr, Mapping):
        return list(named.values())
    laws = {id(parameter) for parameter in _of_laws(module)}
    groups: dict[str, list[Tensor]] = {key: [] for key in [*lr, REST]}
    for name, parameter in named.items():
        fits = [key for key in lr if (id(parameter) in laws if key == LAWS else _matches(name, key))]
        groups[[*fits, REST][0]].append(parameter)
    for key in lr:
        if key == LAWS and not groups[key] and conditional_part(module.guide) is not None:
            raise ValueError(
                "fit: argument `lr` has a rate for 'laws', and the guide has its law of lengths in closed form, which "
                "needs none: leave 'laws' out"
            )
        if not groups[key] and key != REST:
            raise ValueError(
                f"fit: argument `lr` has a rate for {key!r}, and no parameter of model or guide is in that group; "
                f'groups are "laws", "*" and patterns of these names: {[*named][:8]}{" ..." * (len(named) > 8)}'
            )
    return [{"params": group, "lr": lr.get(key, default)} for key, group in groups.items() if group]


def _matches(name: str, key: str) -> bool:
    return key != REST and (fnmatchcase(name, key) or fnmatchcase(name.partition(".")[2], key))


def _of_laws(module: nn.Module) -> Iterator[Tensor]:
    for part in module.modules():
        if isinstance(part, Width):
            yield part.logits
        elif isinstance(part, AutoLengths):
            yield from (p for name, p in part.named_parameters(recurse=False) if name.startswith("logits"))
        elif isinstance(part, ValueHead):
            yield from part.parameters()
        else:  # an autoencoder's
            yield from (p for name, p in part.named_parameters(recurse=False) if name == "length_logits")
