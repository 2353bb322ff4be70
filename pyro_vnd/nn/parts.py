"""The parts of a nested net, made of a plain one and of what is known of its channels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from pyro_vnd.nn.axis import Axis, Rows, Run
from pyro_vnd.nn.depth import NestedBlock
from pyro_vnd.nn.layers import NestedLayer, affine_kind
from pyro_vnd.nn.norms import NestedNorm
from pyro_vnd.nn.random_parameters import RandomParameter
from pyro_vnd.nn.reads import OwnChannels, Read
from pyro_vnd.nn.submodules import replace_modules
from pyro_vnd.nn.tracing import ChannelGroups, LayerChannels
from pyro_vnd.nn.width import Width

__all__ = ["Parts"]


class Parts:
    """What a net becomes: nested layers and norms, and modules that stay and whose own parameters can be cut.

    Args:
        net: The net, which is changed.
        groups: Its channels.
        widths: The width of each group, and None of what stays whole.
        by_example: Whether masks have a row for each example.

    Attributes:
        affine: Names of the linear and convolutional layers that are nested.
        raw: The parameters of other modules, by name, each with its module.
    """

    def __init__(
        self, net: nn.Module, groups: ChannelGroups, widths: Mapping[str | None, Width | None], by_example: bool
    ) -> None:
        self.net, self.groups, self.widths, self.by_example = net, groups, widths, by_example
        self.modules = dict(net.named_modules())
        self.replaced: dict[str, nn.Module] = {}
        self._functional = {name.rpartition(".")[0]: name for name in groups.reads if self._is_layer(name)}
        # Layers whose own forward reads the weight; of others, functions elsewhere do.
        self._inside = {path for path, name in self._functional.items() if name not in groups.read_outside}
        self.affine = [name for name in groups.layers if affine_kind(self.modules[name])] + list(self._functional)
        self._names = {id(tensor): name for name, tensor in [*net.named_parameters(), *net.named_buffers()]}
        self._uses = Counter(id(tensor) for part in net.modules() for tensor in part.parameters(recurse=False))
        self.raw = {
            f"{path}.{key}".removeprefix("."): part
            for path, part in self.modules.items()
            if path not in self.affine and path not in groups.layers
            for key, _ in part.named_parameters(recurse=False)
        }

    def _is_layer(self, name: str) -> bool:
        """Say whether a weight that a function reads is that of a linear or convolutional layer as torch has them."""
        path, _, key = name.rpartition(".")
        part = self.modules[path]
        own = {each for each, _ in part.named_parameters(recurse=False)}
        if key != "weight" or path in self.groups.layers or own - {"weight", "bias"} or not affine_kind(part):
            return False
        if hasattr(part, "parametrizations"):  # of its bias
            return False
        plain: Any = part
        sizes = (
            (plain.in_features, plain.out_features)
            if hasattr(plain, "in_features")
            else (plain.in_channels, plain.out_channels)
        )
        channels = self.groups.reads[name]
        return sizes == tuple(sum(run.size for run in runs) for runs in (channels.inputs, channels.outputs))

    def nested(self, priors: Mapping[str, Any], init_scale: float) -> nn.Module:
        """Replace layers and norms by nested ones; return the net.

        Args:
            priors: Prior of each affine layer, by its name.
            init_scale: As in `NestedLayer`.
        """
        found = self.groups.layers | {path: self.groups.reads[name] for path, name in self._functional.items()}
        for name, channels in found.items():
            layer = self.modules[name]
            inputs, outputs, rows = self._runs(channels.inputs), self._runs(channels.outputs), self._rows(channels)
            if name in priors:
                # A parameter that several modules have is a point estimate: what it is for one, it is for all.
                is_shared = any(self._uses[id(each)] > 1 for each in layer.parameters())
                prior = None if is_shared else priors[name]
                nested = NestedLayer(
                    layer, inputs=inputs, outputs=outputs, prior=prior, init_scale=init_scale, rows=rows
                )
                if name not in self._inside and self._names[id(layer.weight)] in self.groups.reads:
                    nested.share()
                self.replaced[name] = nested
            elif any(run.owner is not None for run in outputs):
                self.replaced[name] = NestedNorm(layer, outputs, rows)
        self.net = replace_modules(self.net, {self.modules[name]: part for name, part in self.replaced.items()})
        return self.net

    def random_parameters(self, priors: Mapping[str, Any], init_scale: float) -> list[RandomParameter]:
        """Return the laws of raw parameters.

        Args:
            priors: Prior of each, by its name, or by that of its module for all parameters of this.
            init_scale: As in `NestedLayer`.

        Raises:
            ValueError: If a parameter is read otherwise than by its name, so that a draw would not be seen, or is
                shared with another module, or has a row of padding, which must stay as it is.
        """
        found = []
        for name, part in self.raw.items():
            prior = priors.get(name, priors.get(name.rpartition(".")[0] or name))
            if prior is None:
                continue
            parameter = part.get_parameter(name.rpartition(".")[2])
            if self._uses[id(parameter)] > 1:
                raise ValueError(
                    f"nest: argument `prior` names {name!r}, which several modules share: it stays a point estimate; "
                    "leave it out"
                )
            if getattr(part, "padding_idx", None) is not None:
                raise ValueError(
                    f"nest: argument `prior` names {name!r}, of which row {part.padding_idx} stands for padding and is "
                    "not to be random: it stays a point estimate; leave it out"
                )
            if isinstance(part, nn.RNNBase):
                raise ValueError(
                    f"nest: argument `prior` names {name!r}, which a {type(part).__name__} keeps a copy of: it stays a "
                    "point estimate; leave it out"
                )
            found.append(RandomParameter(name, part, self._axes(parameter), prior, init_scale))
        return found

    def own_channels(self) -> list[OwnChannels]:
        """Return what modules that stay as they are have along channels."""
        found = []
        for path, part in self.modules.items():
            if path in self.replaced:
                continue
            own = [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]
            parameters = {key: axes for key, tensor in own if (axes := self._axes(tensor))}
            numbers = {
                (each.name, each.index): self._axis(layout)
                for each, layout in self.groups.attributes.items()
                if each.module == path
            }
            if parameters or numbers:
                found.append(OwnChannels(path, part, parameters, numbers))
        return found

    def reads(self) -> list[tuple[nn.Module, str, Read]]:
        """Return what functions read with parameters."""
        found = []
        for name, channels in self.groups.reads.items():
            path, _, key = name.rpartition(".")
            if path not in self._inside and any(run.owner for run in channels.inputs):
                part: nn.Module = self.replaced.get(path) or self.modules[path]
                found.append((part, key, Read(self._axis(channels.inputs), self._rows(channels))))
        return found

    def blocks(self) -> list[NestedBlock]:
        """Return the residual blocks that can be dropped."""
        found = []
        for name, stage in self.groups.stages.items():
            width = self.widths[name]
            assert width is not None
            for place, each in enumerate(stage):
                found.append(NestedBlock(self.net.get_submodule(each.path), each, width, place))
        return found

    def _axes(self, tensor: Tensor) -> dict[int, Axis]:
        """Return what lies along the axes of a parameter or buffer, of which something can be cut."""
        layouts = self.groups.parameters.get(self._names[id(tensor)], {})
        return {dim: self._axis(layout) for dim, layout in layouts.items()}

    def _runs(self, layout: tuple[Run[str | None], ...]) -> tuple[Run[Width | None], ...]:
        return tuple(Run(self.widths[run.owner], run.size) for run in layout)

    def _axis(self, layout: tuple[Run[str | None], ...]) -> Axis:
        return Axis(sum(run.size for run in layout), self._runs(layout))

    def _rows(self, channels: LayerChannels) -> Rows | None:
        """Return where the examples lie, None if that is along the first axis, or there is one mask for all."""
        return channels.rows if self.by_example and channels.rows != Rows() else None
