"""A nested net that is as wide as each input needs."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from numbers import Integral, Real
from typing import Any, NamedTuple, Self, cast, get_args

import torch
from torch import Tensor, nn

from pyro_vnd._data import Batch, Rows, input_batches, take_rows
from pyro_vnd._inputs import explain_inputs
from pyro_vnd._sizes import as_numbers, check_count, is_integer, is_one_of, is_within, without_values
from pyro_vnd._state import module_mode
from pyro_vnd.nn.draws import NetDraws
from pyro_vnd.nn.likelihoods import CategoricalLabels
from pyro_vnd.nn.model import NestedModel
from pyro_vnd.nn.narrow import narrow, recalibrated
from pyro_vnd.nn.net import NestedNet
from pyro_vnd.nn.outputs import Output
from pyro_vnd.nn.stages import Doubt, Stage, continued, doubt_of, shared_layers
from pyro_vnd.nn.table import multiply_adds
from pyro_vnd.nn.thresholds import best_thresholds
from pyro_vnd.nn.width import Rounding

__all__ = ["CascadeNet", "CascadeOutput"]


class CascadeOutput(NamedTuple):
    """What a cascade makes of a batch.

    Attributes:
        logits: Shape (N, C), or (S, N, C) where there are S draws.
        stage: The last stage that each row went through, counted from 0, shape (N,).
    """

    logits: Tensor
    stage: Tensor


class CascadeNet(nn.Module):
    r"""A trained nested net at several widths, the narrowest first: rows that leave doubt go on to the next one.

    Row n stops at the first stage k whose doubt is below a threshold,

    $$s_n = \min \{k : u_k(x_n) < t_k\}, \qquad u = H[p(y \mid x)] \text{ or the mutual information of } y
    \text{ and the weights},$$

    or else at the last one, and costs the multiply-adds of all stages up to $s_n$. Thresholds are given, or found by
    `fit_thresholds` for a mean cost. A stage goes on from what the stage before computed for these rows: a linear or
    convolutional layer that comes before any layer with cut inputs has the same inputs, or more of them, at a larger
    width, so that only what is added is computed, and counted. Where a row stops depends on that row alone.

    Args:
        net: The nested net, made by `nest`, trained; its outputs are logits, shape (N, C). Or a model of classes with
            it, whose `output` says which these are. Weights are copied: training it further does not change the
            cascade.
        widths: The widths of the stages, each a width as of `narrow` and wider than the one before. A single one is
            that width for all rows.
        threshold: Rows whose doubt is at least this go on: 0 sends all of them to the widest, infinity none. One for
            all stages but the last, or one each.
        mean_cost: What `fit_thresholds` is to find thresholds for: a fraction of the whole net's multiply-adds in
            (0, 1] as a float, or a number of them for a row as an int.
        doubt: "entropy", or "mutual_information", which needs draws.
        num_samples: Number of draws S of the weights, each of which costs a pass; None is one pass with their posterior
            mean.
        rounding: As in `Width.kept_blocks`.
        recalibrate: Training inputs, for nets with BatchNorm: each stage gets statistics of its own from them, as of
            `recalibrate_batchnorm`.
        seed: Seed of the draws.

    Attributes:
        stages: The stages, for `parts`; always in evaluation mode.
        kept: Numbers of blocks of each stage, by group.
        multiply_adds: Multiply-adds of each stage for a row, without those of the stages before it.
        whole_cost: Multiply-adds of the whole net for a row. All costs are those of linear and convolutional layers.
        thresholds: Thresholds of all stages but the last, shape (number of stages - 1,); NaN until they are known.

    Raises:
        ValueError: If an argument is invalid, a width is not wider than the one before, or the net was not made by
            `nest`, or is the model of something else than classes.

    Example:
        >>> from pyro_vnd.nn import nest
        >>> plain = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))
        >>> x = torch.randn(1000, 8)
        >>> cascade = CascadeNet(nest(plain, x[:1], num_blocks=16), [0.125, 0.5], mean_cost=0.25)
        >>> cascade.fit_thresholds(x)(x).shape
        torch.Size([1000, 3])
        >>> mean_cost = cascade.costs[cascade.run(x).stage].double().mean()
        >>> round(mean_cost.item() / cascade.whole_cost, 2)
        0.25
    """

    thresholds: Tensor

    def __init__(
        self,
        net: NestedNet | NestedModel,
        widths: Sequence[float | int | Mapping[str, float | int]],
        threshold: float | Sequence[float] | Tensor | None = None,
        *,
        mean_cost: float | int | None = None,
        doubt: Doubt = "entropy",
        num_samples: int | None = None,
        rounding: Rounding | None = None,
        recalibrate: Rows | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        net, output = _check_net(net)
        kept = _check_widths(net, widths, rounding)
        if not is_one_of(doubt, get_args(Doubt)):
            raise ValueError(f"CascadeNet: argument `doubt` must be one of {get_args(Doubt)}; got {doubt!r}")
        if num_samples is not None:
            check_count("CascadeNet", num_samples=num_samples)
        if doubt == "mutual_information" and (num_samples or 1) < 2:
            raise ValueError(
                f"CascadeNet: doubt='mutual_information' needs `num_samples` of at least 2, since a single pass has "
                f"none; got {num_samples}"
            )
        self.kept, self.doubt, self.num_samples = kept, doubt, num_samples
        self.input_shapes, self.whole_cost = net.input_shapes, multiply_adds(net, {})
        self.num_inputs, self.input_names = net.num_inputs, _names(net)
        with module_mode([net], training=False):
            draws = [None] if num_samples is None else net.draws(num_samples, seed)
            self._add_stages(net, draws, recalibrate, output)
        self.mean_cost = None if mean_cost is None else self._check_cost(mean_cost)
        self.register_buffer("thresholds", self._check_threshold(threshold).to(next(net.parameters()).device))
        self.eval()

    def _add_stages(
        self,
        net: NestedNet,
        draws: Sequence[None] | NetDraws,
        recalibrate: Rows | None,
        output: Output,
    ) -> None:
        shared: list[str] = []
        self.stages, self.multiply_adds, before = nn.ModuleList(), [], None
        for blocks in self.kept:
            units = {name: width.kept_units(blocks[name]) for name, width in net.widths.items()}
            nets = []
            for draw in draws:
                plain = narrow(net, blocks, draw)
                if recalibrate is not None:
                    try:
                        recalibrated(plain, input_batches(recalibrate, 256, net.num_inputs))
                    except ValueError as error:
                        raise ValueError(
                            f"CascadeNet: argument `recalibrate` must be inputs of the net: {error}"
                        ) from None
                # Behind a block that the narrower net has dropped, nothing is as it was there.
                shared = [] if net.blocks else shared_layers(net, plain)
                nets.append(continued(net, plain, shared, before, units, draw, output))
            known = 0 if before is None else multiply_adds(net, before, shared)
            self.multiply_adds.append(len(draws) * (multiply_adds(net, units) - known))
            self.stages.append(Stage(nets, self.doubt, self.num_samples is not None, len(self.input_names)))
            before = units

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode, whatever the mode: a cascade only predicts."""
        return super().train(False)

    @property
    def costs(self) -> Tensor:
        """Multiply-adds for a row that stops at each stage, those of the stages before it too."""
        return torch.tensor(self.multiply_adds).cumsum(0)

    def forward(self, *inputs: Tensor, **named: Tensor) -> Tensor:
        """Predict each row at the width that it needs.

        Args:
            *inputs: Inputs, a row for each example.
            **named: Inputs by their names.

        Returns:
            Logits, shape (N, C), or (S, N, C) if there are draws.

        Raises:
            ValueError: If there are no thresholds yet, or inputs do not fit the net, or predictions are NaN.
        """
        return self.run(*inputs, **named).logits

    @torch.no_grad()
    def run(self, *inputs: Tensor, **named: Tensor) -> CascadeOutput:
        """Predict each row at the width that it needs, and say which that was; as in a call."""
        if self.thresholds.isnan().any():
            raise ValueError(
                "CascadeNet: it has no thresholds yet: call `fit_thresholds` with validation inputs and a `mean_cost`, "
                "or give `threshold`"
            )
        given = self._in_order(inputs, named)
        for x in given:
            said = without_values(x) if isinstance(x, Tensor) else ""
            if said or (x is given[0] and not (isinstance(x, Tensor) and x.dim())):
                raise ValueError(
                    "CascadeNet: inputs must be dense tensors with a row for each example, those of a mapping by name; "
                    f"got {said or type(x).__name__}"
                )
        num_rows = len(given[0])
        logits, doubt, *known = self._start(given)
        if bool((unknown := doubt.isnan()).any()):  # which is below no threshold, nor above one
            raise ValueError(
                f"CascadeNet: predictions are NaN for {int(unknown.sum())} of {num_rows} rows: the inputs, or the "
                "weights, have NaN or inf"
            )
        rows = torch.arange(num_rows, device=logits.device)
        stage = torch.zeros_like(rows)
        for number, (module, threshold) in enumerate(zip(self.stages[1:], self.thresholds, strict=True), 1):
            on = doubt >= threshold
            if not on.any():
                break
            rows, known = rows[on], [value[on] for value in known]
            logits[rows], doubt, *known = module(*take_rows(given, num_rows, rows), *known)
            stage[rows] = number
        return CascadeOutput(logits if self.num_samples is None else logits.movedim(1, 0), stage)

    def _in_order(self, inputs: Sequence[Tensor], named: Mapping[str, Tensor]) -> list[Tensor]:
        """Return the inputs in the order in which stages take them."""
        left = self.input_names[len(inputs) :]
        if len(inputs) > len(self.input_names) or set(named) != set(left):
            raise ValueError(
                f"CascadeNet: give the inputs {', '.join(self.input_names)}; got {len(inputs)} in order and "
                f"{list(named)} by name"
            )
        return [*inputs, *(named[name] for name in left)]

    def _start(self, inputs: Sequence[Tensor]) -> Any:
        parameter = next(self.parameters())
        with explain_inputs("CascadeNet", inputs, parameter.dtype, self.input_shapes):
            return self.stages[0](*inputs)

    @torch.no_grad()
    def fit_thresholds(self, data: Rows, mean_cost: float | int | None = None, *, batch_size: int = 256) -> Self:
        r"""Find the thresholds at which data cost a given mean, and are predicted as surely as can be.

        Among thresholds of that mean cost, the mean entropy $\frac1N \sum_n H[p_{s_n}(y \mid x_n)]$ of the predictions
        is least: of calibrated ones it is the expected NLL, and it needs no labels. A mean cost holds for rows like
        these; rows of another kind may leave more doubt, and cost more.

        Args:
            data: Validation data, on which the net was not trained, as in `evaluate_widths`; labels are not used.
            mean_cost: As in the constructor, whose value is the default.
            batch_size: Rows of a batch, where data are tensors.

        Returns:
            The cascade. It costs the given mean on these data, to within what a single row may cost, or several that
            are the same.

        Raises:
            ValueError: If no mean cost is given here or there, or it is less than the narrowest width's for all rows,
                or there are no rows, or predictions are NaN, or inputs do not fit the net.
        """
        mean_cost = self.mean_cost if mean_cost is None else self._check_cost(mean_cost)
        if mean_cost is None:
            raise ValueError(
                "CascadeNet.fit_thresholds: give `mean_cost`, a fraction of the whole net's multiply-adds (a float) or "
                "a number of them for a row (an int), here or to CascadeNet"
            )
        parts = [self._through_all(batch) for batch in input_batches(data, batch_size, self.num_inputs)]
        if not sum(doubts.shape[1] for doubts, _ in parts):
            raise ValueError("CascadeNet.fit_thresholds: argument `data` has no rows")
        doubts, entropies = (torch.cat(each, 1).cpu() for each in zip(*parts, strict=True))
        if bad := int((doubts + entropies).isnan().any(0).sum()):
            raise ValueError(f"CascadeNet.fit_thresholds: argument `data` has {bad} rows whose predictions are NaN")
        if len(self.stages) > 1:
            self.thresholds.copy_(best_thresholds(doubts[:-1], entropies, torch.tensor(self.multiply_adds), mean_cost))
        self.mean_cost = mean_cost
        return self

    def _through_all(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Run all rows through all stages: doubt and entropy after each, shape (number of stages, N)."""
        batch.check("CascadeNet.fit_thresholds", self.num_inputs)
        batch = batch.to(self.thresholds.device)
        inputs = self._in_order(batch.args, batch.kwargs)
        outputs = [self._start(inputs)]
        for module in self.stages[1:]:
            outputs.append(module(*inputs, *outputs[-1][2:]))
        entropies = [
            doubt_of(logits.unsqueeze(1) if self.num_samples is None else logits, "entropy") for logits, *_ in outputs
        ]
        return torch.stack([doubt for _, doubt, *_ in outputs]), torch.stack(entropies)

    def parts(self, *inputs: Tensor, **named: Tensor) -> list[tuple[Stage, tuple[Tensor, ...]]]:
        """Return the stages and an input of each, for `torch.export` and ONNX, which keep one at a time.

        A stage maps inputs, and what the stage before handed on for these rows, to logits, their doubt and what it
        hands on, all with a row for each example. What is exported needs neither Pyro nor this library: run the first
        part, and pass inputs and what it hands on to the next one, of the rows whose doubt is at least the threshold.

        Args:
            *inputs: Some inputs, which are run through all stages.
            **named: Inputs by their names.

        Returns:
            For each stage, the module and its arguments.

        Example:
            >>> from pyro_vnd.nn import nest
            >>> x = torch.randn(2, 8)
            >>> net = nest(nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 3)), x, num_blocks=16)
            >>> first, second = [torch.export.export(*part) for part in CascadeNet(net, [0.25, 1.0], 0.5).parts(x)]
            >>> logits, doubt, *known = first.module()(x)
            >>> logits, doubt, *known = second.module()(x, *known)
        """
        parts: list[tuple[Stage, tuple[Tensor, ...]]] = []
        given, known = self._in_order(inputs, named), list[Tensor]()
        for stage in self.stages:
            parts.append((cast(Stage, stage), (*given, *known)))
            with torch.no_grad():
                _, _, *known = stage(*given, *known)
        return parts

    def __repr__(self) -> str:
        """Say of each stage how wide it is, what it costs, and which rows go on to it; `stages` has the modules."""
        lines = ["CascadeNet"]
        for number, (blocks, cost) in enumerate(zip(self.kept, self.multiply_adds, strict=True)):
            share = f"{cost:,} multiply-adds ({cost / self.whole_cost:.1%} of the whole net)"
            some = next(iter(blocks.values())) if len(set(blocks.values())) == 1 else blocks
            rows = f"{self.doubt} >= {self.thresholds[number - 1]:.4g}" if number else "all rows"
            lines.append(f"  stage {number}: {rows}, {some} blocks, {share}")
        return "\n".join(lines)

    def _check_cost(self, mean_cost: float | int) -> float:
        """Return a mean cost in multiply-adds for a row."""
        low = self.multiply_adds[0]
        if is_integer(mean_cost) and is_within(mean_cost, 1):
            cost = float(mean_cost)
        elif isinstance(mean_cost, Real) and not isinstance(mean_cost, Integral) and 0 < mean_cost <= 1:
            cost = float(mean_cost) * self.whole_cost
        else:
            raise ValueError(
                f"CascadeNet: argument `mean_cost` must be a fraction of the whole net's {self.whole_cost:,} "
                f"multiply-adds in (0, 1] (a float), or a number of them (an int); got {mean_cost!r}"
            )
        if cost < low:
            raise ValueError(
                f"CascadeNet: argument `mean_cost` is {mean_cost!r}, {cost:,.0f} multiply-adds a row; the narrowest "
                f"width, which all rows go through, has {low:,}: give at least {low / self.whole_cost:.4g}, or begin "
                "narrower"
            )
        return cost

    def _check_threshold(self, threshold: float | Sequence[float] | Tensor | None) -> Tensor:
        count = len(self.kept) - 1
        if threshold is None:
            return torch.full((count,), math.nan)
        given = as_numbers(threshold)
        values = torch.tensor(math.nan) if given is None else given.detach().to(torch.get_default_dtype())
        values = values.expand(count) if values.dim() == 0 else values
        if values.shape != (count,) or not (values >= 0).all():
            raise ValueError(
                f"CascadeNet: argument `threshold` must be a number >= 0, or one for each of the {count} stages that "
                f"rows can go on from; got {threshold!r}"
            )
        return values.clone()


def _check_net(model: Any) -> tuple[NestedNet, Output]:
    """Return the nested net, and what its outputs are of that which it returns."""
    net, output = (model.net, model.output) if isinstance(model, NestedModel) else (model, None)
    if not isinstance(net, NestedNet):
        raise ValueError(
            "CascadeNet: argument `net` must be a NestedNet, as `nest` returns, or a NestedModel of classes; got "
            f"{type(net).__name__}"
        )
    if isinstance(model, NestedModel) and not isinstance(model.likelihood, CategoricalLabels):
        raise ValueError(
            "CascadeNet: argument `net` must be a model of classes, CategoricalLabels(), whose doubt it measures; got "
            f"one with {type(model.likelihood).__name__}"
        )
    if not net.positions:
        raise ValueError(
            "CascadeNet: argument `net` must be made by `nest`, from which it knows what a row costs; this one was "
            "made by hand"
        )
    return net, output


def _names(net: NestedNet) -> tuple[str, ...]:
    """Return the names of the inputs in the order in which stages take them."""
    names = list(net.input_names or inspect.signature(net.net.forward).parameters)[: net.num_inputs or None]
    return (*names, *(f"input {number}" for number in range(len(names), net.num_inputs)))  # of forward(*inputs), say


def _check_widths(net: NestedNet, widths: Any, rounding: Rounding | None) -> list[dict[str, int]]:
    """Return the numbers of blocks of each stage."""
    if not isinstance(widths, Sequence) or isinstance(widths, str) or not widths:
        raise ValueError(f"CascadeNet: argument `widths` must be a list of widths; got {widths!r}")
    whole = {name: width.num_blocks for name, width in net.widths.items()}
    if not is_one_of(rounding, (None, *get_args(Rounding))):
        raise ValueError(f"CascadeNet: argument `rounding` must be {get_args(Rounding)} or None; got {rounding!r}")
    try:
        kept = [whole | net.kept_blocks(width, rounding) for width in widths]
    except ValueError as error:
        raise ValueError(f"CascadeNet: argument `widths` must be widths of the net; got {widths!r}: {error}") from None
    for (narrower, wider), before, after in zip(pairwise(kept), widths[:-1], widths[1:], strict=True):
        if narrower == wider or any(narrower[name] > wider[name] for name in whole):
            raise ValueError(
                f"CascadeNet: argument `widths` must grow from stage to stage, in no group less; got {before!r} before "
                f"{after!r}, which keep the blocks {narrower} and {wider}"
            )
    return kept
