"""Nets of nested layers as Pyro programs: masks first, then weights, then the net."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import pyro
import torch
from pyro import poutine
from torch import Tensor, nn

from pyro_vnd._compat import QuietModule, plain_checkpoints
from pyro_vnd._data import Batch
from pyro_vnd._inputs import explain_arguments, explain_inputs, refuse_nan
from pyro_vnd._sizes import is_integer, is_one_of
from pyro_vnd.distributions import OrderedMask
from pyro_vnd.nn.depth import NestedBlock
from pyro_vnd.nn.guide import NetGuide
from pyro_vnd.nn.layers import NestedLayer
from pyro_vnd.nn.norms import NestedNorm
from pyro_vnd.nn.outputs import picked
from pyro_vnd.nn.random_parameters import RandomParameter
from pyro_vnd.nn.reads import MaskedReads, OwnChannels, Read
from pyro_vnd.nn.state import keep_groups_in_state
from pyro_vnd.nn.table import as_html, as_text
from pyro_vnd.nn.width import Rounding, Width, kept_blocks

if TYPE_CHECKING:
    from pyro_vnd.nn.draws import NetDraws

__all__ = ["NestedNet", "WidthLike"]

WidthLike = float | int | Mapping[str, float | int] | Tensor


@dataclass(frozen=True)
class _Cut:
    """Widths that replace draws of masks: numbers of blocks by group, or fractions by row."""

    blocks: Mapping[str, int]
    fractions: Tensor | None
    sliced: bool


class NestedNet(QuietModule):
    r"""A net of `NestedLayer`s as a Pyro program.

    Calling it draws a mask for each width and the weights of each layer from their priors, and runs the net; its
    `guide` draws the same sites from the learned laws. Put the call into a model, with a likelihood:

        def model(x, y):
            rows = pyro.plate("data", len(x), dim=-1)
            mean = net(x, plate=rows)
            with rows:
                pyro.sample("y", dist.Normal(mean, 1.0).to_event(1), obs=y)

        guide = net.guide

    With one mask for each example (the default) the masks are local latents: pass the plate of the data to the call,
    or let it open one named "data" if the model has none. Guides of several nets in one model share a plate likewise.
    All examples share the law of a width, whose optimum under the ELBO is the prior reweighed by exp(-loss at that
    width), so that it does not collapse. One mask for each batch is one global latent, whose law collapses unless
    something holds it (see `fit`), but lets sliced passes compute the kept part only; the KL of a weight then counts
    with the probability that its units are kept.

    Args:
        net: A module with `NestedLayer`s; `nest` makes one from an ordinary net.
        mask_per: "example" or "batch".
        gated: Whether the KL of a weight counts with the probability that the units at both its ends are kept. By
            default with one mask a batch, where that is exact: weights that are not in use follow the prior. With one
            mask an example every weight is in use by some of them, and a gate is a choice: it regularises a weight in
            proportion to the rows that use it, so that the tail, which few rows use, is held less to the prior.
        prefix: Prefix of the names of all Pyro sites, for models with several nets.
        own_channels: Parameters, and numbers of channels, of modules that are no nested layers, as `nest` finds them.
        reads: Parameters that functions take as weights, each as its module, its name, and what is read with it.
        random_parameters: Laws of parameters of modules that are no nested layers.
        blocks: Residual blocks that can be dropped, as `nest` finds them.

    Attributes:
        whole: Why channels cannot be cut, by the layer that makes them, as far as `nest` found out.
        positions: How often each layer is applied to one example (pixels, tokens), by its name, if `nest` counted.
        input_shapes: Shapes of the example that it was nested with, if it was.
        num_inputs: How many inputs it takes in order, before what is observed; 0 if it takes them by name.
        example: The first row of the example that it was nested with, if it was.
        input_names: Names of those of the example that it was nested with, if they had names.

    Raises:
        ValueError: If the net has no widths, or two have one name.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> hidden = Width("hidden", 64, num_blocks=16)
        >>> first = NestedLayer(nn.Linear(8, 64), outputs=hidden)
        >>> last = NestedLayer(nn.Linear(64, 3), inputs=hidden)
        >>> net = NestedNet(nn.Sequential(first, nn.ReLU(), last))
        >>> net.predict(torch.randn(5, 8), width=0.25, num_samples=10).shape
        torch.Size([10, 5, 3])
    """

    def __init__(
        self,
        net: nn.Module,
        *,
        mask_per: Literal["example", "batch"] = "example",
        gated: bool | None = None,
        prefix: str = "",
        own_channels: Sequence[OwnChannels] = (),
        reads: Sequence[tuple[nn.Module, str, Read]] = (),
        random_parameters: Sequence[RandomParameter] = (),
        blocks: Sequence[NestedBlock] = (),
    ) -> None:
        super().__init__()
        if not is_one_of(mask_per, ("example", "batch")):
            raise ValueError(f"NestedNet: argument `mask_per` must be 'example' or 'batch'; got {mask_per!r}")
        self.net, self.mask_per, self.prefix = net, mask_per, prefix
        self.gated = mask_per == "batch" if gated is None else gated
        found: dict[str, Width] = {}
        parts = [module for module in net.modules() if isinstance(module, NestedLayer | NestedNorm)]
        widths = [width for part in (*parts, *own_channels) for width in part.widths]
        for width in (*widths, *(block.width for block in blocks)):
            if found.setdefault(width.name, width) is not width:
                raise ValueError(f"NestedNet: two widths have the name {width.name!r}")
        if not found:
            raise ValueError("NestedNet: argument `net` has no NestedLayer with a width; use `nest` to convert a net")
        self._groups = tuple(found)
        self._widths = nn.ModuleList(found.values())
        self._cut: _Cut | None = None
        self.whole: dict[str, str] = {}
        self.positions: dict[str, int] = {}
        self.input_shapes: tuple[tuple[int, ...], ...] = ()
        self.num_inputs = 1
        self.example: tuple[Any, ...] = ()
        self.input_names: tuple[str, ...] = ()
        self.own_channels, self.reads, self.blocks = list(own_channels), list(reads), list(blocks)
        self._random_parameters = nn.ModuleList(random_parameters)
        for block in blocks:
            inside = set(block.module.modules())
            for part in (*inside, *random_parameters):
                if isinstance(part, NestedLayer) or (isinstance(part, RandomParameter) and part.module in inside):
                    part.block = block
        keep_groups_in_state(self)

    def __repr__(self) -> str:
        """Return a table of the groups; `net.net` has the modules."""
        return as_text(self)

    def _repr_html_(self) -> str:
        return as_html(self)

    @property
    def widths(self) -> dict[str, Width]:
        """The widths by name of their group, in the order of the net."""
        return dict(zip(self._groups, self._widths, strict=True))  # type: ignore[arg-type]

    @property
    def layers(self) -> dict[str, NestedLayer]:
        """The nested layers by name, in the order of the net."""
        return {name: module for name, module in self.net.named_modules() if isinstance(module, NestedLayer)}

    def site_of(self, name: str) -> str:
        """Return the Pyro site of a layer by its name, to which that of the parameter is added."""
        return f"{self.prefix}{name or 'layer'}"

    @property
    def random_parameters(self) -> dict[str, RandomParameter]:
        """The laws of parameters of modules that are no nested layers, by name of the parameter."""
        return {each.name: each for each in self._random_parameters}  # type: ignore[misc]

    @property
    def laws(self) -> dict[str, OrderedMask]:
        """The learned law of each mask, by name of its site and without gradient."""
        return {f"{self.prefix}{name}.mask": width.law for name, width in self.widths.items()}

    @cached_property
    def guide(self) -> NetGuide:
        """The guide: draws masks and weights from the learned laws; its parameters are those of the net.

        Always the same module, and none of the net's own parts; copies of the net have guides of their own.
        """
        return NetGuide(self)

    def forward(self, *inputs: Any, plate: pyro.plate | None = None, **named: Any) -> Any:
        """Draw masks and weights from their priors and run the net.

        Args:
            *inputs: What the net takes; the first dimension of the first tensor counts the examples.
            plate: The plate of the data, for masks by example; by default one named "data" is opened.
            **named: What the net takes by name.

        Returns:
            What the net returns.

        Raises:
            ValueError: If inputs are not of the net's type, or of a shape that it cannot take.
        """
        with self._drawn("prior", Batch(inputs, named).num_rows, plate):
            return self._run(inputs, named)

    def _run(self, inputs: tuple[Any, ...], named: Mapping[str, Any]) -> Any:
        net = self.net
        try:
            return net(*inputs, **named)
        except (RuntimeError, TypeError):
            dtype = next((parameter.dtype for parameter in self.parameters()), None)
            given, caller = (*inputs, *named.values()), f"NestedNet({type(net).__name__})"
            with (
                explain_inputs(caller, given, dtype, self.input_shapes),
                explain_arguments(caller, net, inputs, named),
            ):
                raise

    @contextmanager
    def _drawn(
        self,
        which: Literal["prior", "posterior"],
        num_rows: int,
        plate: pyro.plate | None = None,
        *,
        weights: bool = True,
    ) -> Iterator[dict[str, Tensor]]:
        """Draw masks and weights, or compute with the mean weights, in the passes inside the block."""
        widths, layers = self.widths, self.layers
        try:
            values = self._draw_masks(which, num_rows, plate, widths)
            values |= self._draw_weights(which, layers) if weights else {}
            with self._in_place(), plain_checkpoints():
                yield values
        finally:
            for width in widths.values():
                width.release()
            for layer in layers.values():
                layer.values.clear()
            for each in self.random_parameters.values():
                each.value = None

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        """Let modules that are no nested layers find and read what is kept, and blocks be dropped."""
        if not (self.blocks or self.own_channels or self.reads or len(self._random_parameters)):
            yield
            return
        with ExitStack() as stack:
            for block in self.blocks:
                stack.enter_context(block.masked())
            for own in self.own_channels:
                stack.enter_context(own.cut())
            for each in self.random_parameters.values():
                stack.enter_context(each.in_place())
            reads = MaskedReads([(getattr(module, name), read) for module, name, read in self.reads])
            if reads:
                stack.enter_context(reads)
            yield

    def _draw_masks(
        self,
        which: Literal["prior", "posterior"],
        num_rows: int,
        plate: pyro.plate | None,
        widths: Mapping[str, Width],
    ) -> dict[str, Tensor]:
        cut, values = self._cut, {}
        by_example = self.mask_per == "example"
        fractions = None if cut is None else cut.fractions
        if num_rows == 0 and by_example and plate is None:
            raise ValueError(
                f"NestedNet({type(self.net).__name__}): inputs must be tensors with a row for each example, at least "
                "one, those of a mapping by name; got none"
            )
        self._check_fits(num_rows)
        drawn = [name for name in widths if cut is None or fractions is not None or name not in cut.blocks]
        in_plate: Any = nullcontext()
        if drawn and by_example:
            in_plate = pyro.plate("data", num_rows, dim=-1) if plate is None else plate
        # Rows whose width is given have no latent mask, and no KL.
        is_free: Any = None if fractions is None else fractions == 0
        latent: Any = nullcontext() if fractions is None else poutine.mask(mask=is_free)
        with in_plate, latent:
            for name, width in widths.items():
                site = f"{self.prefix}{name}.mask"
                if name not in drawn:
                    assert cut is not None
                    self._hold_fixed(width, cut.blocks[name], cut.sliced)
                    continue
                law = width.prior if which == "prior" else width.posterior
                if cut is not None and cut.sliced and not by_example:
                    # What is not computed has no straight-through gradient: the exact law, for score functions.
                    mask = values[site] = pyro.sample(site, OrderedMask(logits=law.logits, validate_args=False))
                    self._hold_fixed(width, int(mask.sum().item()) + width.always_kept - 1, sliced=True)
                    continue
                mask = values[site] = pyro.sample(site, law)
                keep_probs = width.posterior.keep_probs if self.gated else None
                if fractions is not None:
                    given = width.prefix(fractions)
                    free = is_free.unsqueeze(-1)
                    mask = torch.where(free, mask, given)
                    keep_probs = None if keep_probs is None else torch.where(free, keep_probs, given)
                if keep_probs is not None and keep_probs.dim() > 1:
                    keep_probs = keep_probs.mean(0)
                width.hold(mask, keep_probs)
        return values

    def _hold_fixed(self, width: Width, num_blocks: int, sliced: bool) -> None:
        if sliced:
            width.hold(kept_units=width.kept_units(num_blocks))
            return
        mask = width.prefix(width.logits.new_tensor(num_blocks / width.num_blocks))
        width.hold(mask, keep_probs=mask)  # as if sliced: what is dropped costs nothing

    def _draw_weights(
        self, which: Literal["prior", "posterior"], layers: Mapping[str, NestedLayer]
    ) -> dict[str, Tensor]:
        values: dict[str, Tensor] = {}
        for name, layer in layers.items():
            if layer.block is not None and layer.block.is_sliced_away:
                continue
            values |= layer.draw(which, self.site_of(name))
        for each in self.random_parameters.values():
            if each.block is not None and each.block.is_sliced_away:
                continue
            values |= each.draw(which, self.prefix)
        return values

    def kept_blocks(
        self, width: float | int | Mapping[str, float | int], rounding: Rounding | None = None
    ) -> dict[str, int]:
        """Return how many blocks a width keeps of each group, but for those that a mapping leaves out.

        Args:
            width: A fraction in (0, 1] as a float, a number of blocks as an int, or a mapping from group to either.
            rounding: As in `Width.kept_blocks`.

        Returns:
            Numbers of blocks by name of the group.

        Raises:
            ValueError: If a width is invalid, or does not fit a group; the message lists those it does not fit.
        """
        if isinstance(width, Mapping) and (unknown := sorted(set(width) - set(self.widths))):
            raise ValueError(f"NestedNet: argument `width` names {unknown}; groups of the net: {list(self.widths)}")
        widths = dict(width) if isinstance(width, Mapping) else dict.fromkeys(self.widths, width)
        wanted = [(self.widths[name], value) for name, value in widths.items()]
        return dict(zip(widths, kept_blocks(wanted, rounding), strict=True))

    @contextmanager
    def cut(self, width: WidthLike, *, sliced: bool = False, rounding: Rounding | None = None) -> Iterator[NestedNet]:
        """Run a block in which the net has given widths rather than draws of masks, in model and guide alike.

        Args:
            width: A fraction in (0, 1] for all groups (a float), a number of blocks (an int), a mapping from group to
                either, which leaves the other groups random, or a tensor of fractions: one for each row of the batch,
                or a single one if there is one mask a batch. A zero in the tensor leaves that row random.
            sliced: Whether the pass computes only the kept part of each layer, rather than multiplying by a mask.
                Groups that are left random, all of them with `cut({}, sliced=True)`, are then drawn as exact masks
                without a straight-through gradient, if there is one mask a batch: for score functions, as in
                `Trace_ELBO`.
            rounding: As in `Width.kept_blocks`. What is in a tensor is always rounded to the nearest block.

        Yields:
            The net.

        Raises:
            ValueError: If a width is invalid, or does not fit a group; the message lists the valid ones.
        """
        if not isinstance(width, Tensor):
            cut = _Cut(self.kept_blocks(width, rounding), None, sliced)
        elif sliced:
            raise ValueError("cut: sliced=True needs one width for the whole batch, a number rather than a tensor")
        else:
            cut = _Cut({}, self._check_fractions(width, rounding), sliced)
        outer, self._cut = self._cut, cut
        try:
            yield self
        finally:
            self._cut = outer

    @property
    def is_sliced(self) -> bool:
        """Whether the net is cut so that only what is kept is computed."""
        return self._cut is not None and self._cut.sliced

    @property
    def cut_blocks(self) -> Mapping[str, int]:
        """Numbers of blocks that the net is cut to, by group."""
        return {} if self._cut is None else self._cut.blocks

    @property
    def cut_fractions(self) -> Tensor | None:
        """Fractions that the net is cut to, by row; None if it is not."""
        return None if self._cut is None else self._cut.fractions

    def describe_cut(self) -> str:
        """Say what the net is cut to at the moment, "" if it is not."""
        if self._cut is None:
            return ""
        if (fractions := self._cut.fractions) is not None:
            return f"fractions of {len(fractions)} rows" if fractions.dim() else f"the fraction {fractions.item():.4g}"
        blocks = [
            f"{kept} of {self.widths[name].num_blocks} blocks of {name}" for name, kept in self._cut.blocks.items()
        ]
        free = ["the other groups random"] if len(blocks) < len(self.widths) else []
        return ", ".join([*blocks, *free]) + (", sliced" if self._cut.sliced else "")

    def _check_fractions(self, width: Tensor, rounding: Rounding | None) -> Tensor:
        expected = 1 if self.mask_per == "example" else 0
        fits = width.is_floating_point() and width.dim() == expected
        if not (fits and ((width >= 0) & (width <= 1)).all()):
            raise ValueError(
                f"cut: argument `width` must be a tensor of fractions in [0, 1] with {expected} dimension(s) for "
                f"mask_per={self.mask_per!r}; got shape {tuple(width.shape)}, {width.dtype}"
            )
        if rounding not in (None, "nearest"):
            raise ValueError(
                f"cut: argument `rounding` must be 'nearest' or None for a tensor of fractions; got {rounding!r}"
            )
        return width

    def _check_fits(self, num_rows: int) -> None:
        """Check that a cut is of as many rows as there are."""
        fractions = self.cut_fractions
        if fractions is not None and self.mask_per == "example" and fractions.shape != (num_rows,):
            raise ValueError(
                f"cut: argument `width` has one fraction for each of {len(fractions)} rows; the batch has {num_rows}"
            )

    def draws(self, num_samples: int, seed: int | None = None, *, keep: bool = True) -> NetDraws:
        """Draw weights, and lengths if there is one mask a batch, to predict with again and again.

        Args:
            num_samples: Number of draws S.
            seed: Seed of the draws; by default it is drawn from torch's random numbers.
            keep: Whether they stay in memory, or are made again whenever they are used, see `NetDraws`.

        Returns:
            The draws.

        Raises:
            ValueError: If the number of draws is not positive.
        """
        from pyro_vnd.nn import NetDraws  # which narrows nets

        return NetDraws(self, num_samples, seed, keep=keep)

    def predict(
        self,
        *inputs: Any,
        width: WidthLike | None = None,
        rounding: Rounding | None = None,
        num_samples: int = 1,
        **named: Any,
    ) -> Tensor:
        """Return the outputs of new posterior draws; `draws` keeps them for further inputs.

        Args:
            *inputs: What the net takes.
            width: As in `cut`; None draws masks from their learned laws, too.
            rounding: As in `cut`.
            num_samples: Number of draws S of the weights.
            **named: What the net takes by name.

        Returns:
            Outputs, shape (S, N, ...).

        Raises:
            ValueError: If a width or the number of draws is invalid, inputs are NaN, the net returns no tensor, or as
                in a call of the net.
        """
        refuse_nan("predict", "inputs", (*inputs, *named.values()))
        if not is_integer(num_samples) or num_samples < 1:
            raise ValueError(f"predict: argument `num_samples` must be an integer, at least 1; got {num_samples!r}")
        sliced, outputs = width is not None and not isinstance(width, Tensor), []
        cut = nullcontext() if width is None else self.cut(width, sliced=sliced, rounding=rounding)
        with torch.no_grad(), cut, poutine.block():
            for _ in range(num_samples):
                with self._drawn("posterior", Batch(inputs, named).num_rows):
                    outputs.append(picked("NestedNet.predict", self._run(inputs, named)))
        return torch.stack(outputs)
