"""Draws of the weights of a nested net at one width, which torch's own layers run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from pyro_vnd._data import Batch, Rows, input_batches
from pyro_vnd._inputs import explain_arguments, explain_inputs, refuse_nan
from pyro_vnd.nn.narrow import drawn_parts, narrow_to_blocks, narrowed_parts, recalibrated
from pyro_vnd.nn.net import NestedNet
from pyro_vnd.nn.norms import BATCH_NORMS

__all__ = ["Draw", "NarrowDraws", "Pick", "Predictor"]

Draw = Mapping[str, Tensor]  # by name of the site
Pick = Callable[[Any], Tensor]  # the outputs, of what a net returns


class Predictor:
    """What returns the outputs of S draws when it is called, as `evaluate` wants it.

    Args:
        net: The nested net.
        pick: What outputs are of that which the net returns.

    Attributes:
        num_inputs: How many inputs the net takes in order.
        input_shapes: Shapes of the example that it was nested with.
        dtype: Type of its parameters.
    """

    def __init__(self, net: NestedNet, pick: Pick) -> None:
        self.pick, self.num_inputs, self.input_shapes = pick, net.num_inputs, net.input_shapes
        self.dtype = next(net.parameters()).dtype

    @contextmanager
    def explained(self, net: nn.Module, batch: Batch) -> Iterator[None]:
        """Run a net on a batch in the block, and say what came where it cannot."""
        caller = type(self).__name__
        with (
            explain_inputs(caller, batch.inputs, self.dtype, self.input_shapes),
            explain_arguments(caller, net, batch.args, batch.kwargs),
        ):
            yield


class NarrowDraws(Predictor):
    """Draws of the weights of a nested net, narrowed: `draws.narrow(width)`.

    They share no memory with the nested net and do not change with it. A call runs layers of torch, one draw after the
    other, in the time of plain nets of this width. There is one such net, in which the weights of the draws take turns.

    Args:
        net: The nested net.
        blocks: Numbers of blocks, one for each group.
        draws: Draws of the weights; None stands for their posterior mean.
        pick: As in `NetDraws`.
        recalibrate: As in `NetDraws.narrow`.
        batch_size: As in `NetDraws.narrow`.

    Attributes:
        net: The narrowed net; its weights are those of any draw.
    """

    @torch.no_grad()
    def __init__(
        self,
        net: NestedNet,
        blocks: Mapping[str, int],
        draws: Iterable[Draw | None],
        pick: Pick,
        *,
        recalibrate: Rows | None = None,
        batch_size: int = 256,
    ) -> None:
        super().__init__(net, pick)
        self._shares = [f"{kept} of {net.widths[name].num_blocks} blocks of {name}" for name, kept in blocks.items()]
        draws = iter(draws)
        first = next(draws)
        self.net, narrowed = narrowed_parts(net, blocks, first)
        drawn = () if first is None else drawn_parts(net, blocks)
        parts = {id(narrowed[id(mean)]): (site, take) for site, mean, take in drawn if id(mean) in narrowed}
        found = [
            (module, name, id(value))
            for module in self.net.modules()
            for name, value in module.named_parameters(recurse=False, remove_duplicate=False)
            if id(value) in parts
        ]
        self._places = [(module, name) for module, name, _ in found]
        # Recurrent nets of torch keep lists of their weights, beside those that can be put in their place.
        if {key for *_, key in found} == parts.keys() and not any(isinstance(each, nn.RNNBase) for each, *_ in found):
            takes = [parts[key] for *_, key in found]
            self._passes = [
                (self.net, [] if draw is None else [_part(draw[site], take) for site, take in takes])
                for draw in chain([first], draws)
            ]
        else:
            self._places = []
            self._passes = [(self.net, []), *((narrow_to_blocks(net, blocks, draw), []) for draw in draws)]
        if recalibrate is not None:
            self._recalibrate(recalibrate, batch_size)

    def __repr__(self) -> str:
        return f"NarrowDraws({len(self)} draws of {type(self.net).__name__}, {', '.join(self._shares)})"

    def __len__(self) -> int:
        return len(self._passes)

    @property
    def nets(self) -> list[nn.Module]:
        """The modules that are run: a single one, but for recurrent nets."""
        return list(dict.fromkeys(net for net, _ in self._passes))

    def _in_turn(self) -> Iterator[nn.Module]:
        """Yield the net of each draw, until the next one is asked for."""
        for net, values in self._passes:
            for (module, name), value in zip(self._places, values, strict=True):
                vars(module)[name] = value  # is found before the parameter
            yield net

    def _recalibrate(self, data: Rows, batch_size: int) -> None:
        """Let each draw have statistics of BatchNorm of its own."""
        statistics = [
            (module, name)
            for module in self.net.modules()
            if isinstance(module, BATCH_NORMS) and module.running_mean is not None
            for name in ("running_mean", "running_var")
        ]
        is_shared, found = len(self.nets) == 1, list[list[Tensor]]()
        for net in self._in_turn():
            recalibrated(net, input_batches(data, batch_size, self.num_inputs))
            found.append([getattr(module, name).clone() for module, name in statistics] if is_shared else [])
        self._passes = [(net, values + more) for (net, values), more in zip(self._passes, found, strict=True)]
        self._places += statistics if is_shared else []

    def predict(self, *inputs: Any, **named: Any) -> Tensor:
        """Return the outputs of all draws.

        Args:
            *inputs: What the net takes.
            **named: What the net takes by name.

        Returns:
            Outputs, shape (S, N, ...).

        Raises:
            ValueError: If inputs are NaN or not those of the net, or it returns no tensor.
        """
        batch = Batch(inputs, named)
        refuse_nan("NarrowDraws.predict", "inputs", batch.inputs)
        with self.explained(self.net, batch):
            return self._outputs(batch)

    def __call__(self, *inputs: Any, **named: Any) -> Tensor:
        """Return the outputs of all draws, shape (S, N, ...), for `evaluate`."""
        with explain_arguments("evaluate", self.net, inputs, named):
            return self._outputs(Batch(inputs, named))

    @torch.no_grad()
    def _outputs(self, batch: Batch) -> Tensor:
        return torch.stack([self.pick(net(*batch.args, **batch.kwargs)) for net in self._in_turn()])


def _part(value: Tensor, take: Callable[[Tensor], Tensor]) -> Tensor:
    """Return what is kept of a draw, in memory of its own if that is less."""
    part = take(value)
    return part if part.numel() == value.numel() else part.clone(memory_format=torch.contiguous_format)
