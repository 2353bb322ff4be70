"""Draws of the weights of a nested net, kept to predict with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from pyro_vnd._compat import num_changes, plain_checkpoints, quiet_lookups
from pyro_vnd._data import Batch, Rows
from pyro_vnd._inputs import explain_arguments, refuse_nan
from pyro_vnd._sizes import check_seed, is_integer
from pyro_vnd._state import cuda_devices, random_numbers
from pyro_vnd.distributions._fast.masks import hard_mask
from pyro_vnd.nn.narrow_draws import Draw, NarrowDraws, Pick, Predictor
from pyro_vnd.nn.net import NestedNet, WidthLike
from pyro_vnd.nn.outputs import picked
from pyro_vnd.nn.width import Rounding, Width

__all__ = ["NetDraws"]

AT_ONCE = 200_000  # numbers of masks that are made together: small nets take .8 of the time of one draw at once


class NetDraws(Predictor):
    r"""S draws of the weights of a nested net, $w_s \sim q(w)$, kept: `net.draws(S)`.

    Whatever is predicted with them, and in however many batches, is so with the same S nets,

    $$y_{sn} = f(x_n; w_s, z_{sn}), \qquad z_{sn} \sim q(z),$$

    so that rows of several batches are draws of their joint predictive, and weights are drawn once. With one mask for
    each example masks belong to the rows, and each call draws them anew from torch's random numbers. With one mask for
    each batch a draw has a length of each group, the same in all calls.

    It is a sequence of draws, each a mapping from site to weights as `narrow` takes it, and a function from inputs to
    outputs, which `evaluate` takes. Weights are those that the net had when they were drawn. All else, such as laws of
    widths, statistics of BatchNorm, point estimates and the mode, is the net's own at each call.

    Args:
        net: The nested net.
        num_samples: Number of draws S.
        seed: Seed of the draws; by default it is drawn from torch's random numbers.
        keep: Whether the draws stay in memory, S times the weights. Otherwise they are made again, the same ones,
            whenever they are used, one at a time: memory holds two nets, and each batch pays for new draws, which take
            the time of passes of some 150 rows (one thread; a perceptron 784-512-512-10).
        pick: What the outputs are of that which the net returns; by default the tensor, or what is called "logits".

    Attributes:
        net: The nested net.
        seed: The seed.
        lengths: With one mask for each batch, the numbers of blocks of each draw, by group.

    Raises:
        ValueError: If the number of draws is not positive; or, without `keep`, the net is on a device whose random
            numbers cannot be put back.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from pyro_vnd.nn import narrow, nest
        >>> net = nest(nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 3)), torch.zeros(1, 8), num_blocks=16)
        >>> draws = net.draws(10, seed=0)
        >>> draws
        NetDraws(10 draws of Sequential, kept, one mask for each example, seed 0)
        >>> draws.predict(torch.randn(5, 8)).shape
        torch.Size([10, 5, 3])
        >>> quarter, x = draws.narrow(0.25), torch.randn(1, 8)
        >>> bool((quarter.predict(x)[2] == narrow(net, 0.25, draws[2])(x)).all())
        True
    """

    def __init__(
        self,
        net: NestedNet,
        num_samples: int,
        seed: int | None = None,
        *,
        keep: bool = True,
        pick: Pick | None = None,
    ) -> None:
        if not is_integer(num_samples) or num_samples < 1:
            raise ValueError(f"NetDraws: argument `num_samples` must be an integer, at least 1; got {num_samples!r}")
        if seed is not None:
            check_seed("NetDraws", seed)
        super().__init__(net, partial(picked, "NetDraws") if pick is None else pick)
        self.net, self.num_samples = net, int(num_samples)
        self.seed = int(torch.randint(2**62, ())) if seed is None else seed
        self._devices = cuda_devices([net])
        others = {each.device.type for each in net.parameters()} - {"cpu", "cuda"}
        if not keep and others:
            raise ValueError(f"NetDraws: argument `keep` must be True for a net on {others.pop()}")
        posteriors = _posteriors(net)
        if keep:
            self._posteriors: dict[str, tuple[Tensor, Tensor]] = {}
            with random_numbers(self.seed, self._devices):
                self._kept = [_drawn(posteriors) for _ in range(self.num_samples)]
        else:
            self._posteriors = {site: (mean.clone(), scale) for site, (mean, scale) in posteriors.items()}
            self._kept = []
        self.lengths = self._draw_lengths() if net.mask_per == "batch" else {}
        self._narrow: _Kept | None = None

    def __repr__(self) -> str:
        masks = f"one mask for each {self.net.mask_per}"
        kept = "kept" if self._kept else "drawn anew at each use"
        return f"NetDraws({self.num_samples} draws of {type(self.net.net).__name__}, {kept}, {masks}, seed {self.seed})"

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, number: int) -> Draw:
        """Return the weights of a draw, by name of their site."""
        return next(islice(self, range(self.num_samples)[number], None))

    def __iter__(self) -> Iterator[Draw]:
        yield from self._kept
        state: list[Tensor] = []
        for _ in range(self.num_samples - len(self._kept)):
            with torch.random.fork_rng(self._devices):
                if state:
                    for put, each in zip(
                        self._states(torch.set_rng_state, torch.cuda.set_rng_state), state, strict=True
                    ):
                        put(each)
                else:
                    torch.manual_seed(self.seed)
                draw = _drawn(self._posteriors)
                state = [get() for get in self._states(torch.get_rng_state, torch.cuda.get_rng_state)]
            yield draw

    def _states(self, of_cpu: Callable[..., Any], of_cuda: Callable[..., Any]) -> list[Callable[..., Any]]:
        return [of_cpu, *(partial(of_cuda, device=device) for device in self._devices)]

    @property
    def nets(self) -> list[nn.Module]:
        """The modules that are run."""
        return [self.net]

    def picking(self, pick: Pick) -> NetDraws:
        """Return the same draws with other outputs."""
        same = copy.copy(self)
        same.pick, same._narrow = pick, None
        return same

    @torch.no_grad()
    def _draw_lengths(self) -> dict[str, list[int]]:
        """Draw a number of blocks of each group for each draw."""
        own = torch.Generator("cpu").manual_seed(self.seed)
        seed = int(torch.randint(2**62, (), generator=own, device="cpu"))  # of other numbers than those of the weights
        lengths = {}
        with random_numbers(seed, self._devices):
            for name, width in self.net.widths.items():
                masks = width.law.sample((self.num_samples,))
                lengths[name] = [int(kept) + width.always_kept - 1 for kept in masks.sum(-1)]
        return lengths

    def predict(
        self, *inputs: Any, width: WidthLike | None = None, rounding: Rounding | None = None, **named: Any
    ) -> Tensor:
        """Return the outputs of all draws.

        Args:
            *inputs: What the net takes.
            width: As in `net.cut`; None draws masks from their learned laws. Nets of a width are kept until another one
                is asked for, see `narrow`.
            rounding: As in `net.cut`.
            **named: What the net takes by name.

        Returns:
            Outputs, shape (S, N, ...).

        Raises:
            ValueError: If a width is invalid, inputs are NaN or not those of the net, or it returns no tensor.
        """
        if width is not None and not isinstance(width, Tensor) and self._fixes_all(width):
            return self.narrow(width, rounding).predict(*inputs, **named)
        batch = Batch(inputs, named)
        refuse_nan("NetDraws.predict", "inputs", batch.inputs)
        with self.explained(self.net.net, batch):
            return self._outputs(batch, width, rounding)

    def __call__(self, *inputs: Any, **named: Any) -> Tensor:
        """Return the outputs of all draws, shape (S, N, ...), with masks from their learned laws, for `evaluate`."""
        with explain_arguments("evaluate", self.net.net, inputs, named):
            return self._outputs(Batch(inputs, named))

    def _fixes_all(self, width: Any) -> bool:
        return not isinstance(width, Mapping) or width.keys() >= self.net.widths.keys()

    @torch.no_grad()
    def _outputs(self, batch: Batch, width: WidthLike | None = None, rounding: Rounding | None = None) -> Tensor:
        net = self.net
        found = []
        with (
            quiet_lookups(),
            plain_checkpoints(),
            nullcontext() if width is None else net.cut(width, rounding=rounding),
        ):
            net._check_fits(batch.num_rows)
            widths = list(net.widths.values())
            parts = [self._parts(name, each, batch.num_rows) for name, each in net.widths.items()]
            plain, is_sliced = net.net, net.mask_per == "batch" or bool(net.cut_blocks)
            weights = [
                (layer, f"{net.site_of(name)}.{key}", key)
                for name, layer in net.layers.items()
                for key in layer.log_scales
            ]
            parameters = [(each, f"{net.prefix}{name}") for name, each in net.random_parameters.items()]
            try:
                for draw, *held in zip(self, *parts, strict=True):
                    for each, part in zip(widths, held, strict=True):
                        each.hold(**part)
                    for layer, site, name in weights:
                        value = draw[site]
                        layer.values[name] = layer.take(name, value) if is_sliced else value
                    for parameter, site in parameters:
                        parameter.value = parameter.take(draw[site])
                    with net._in_place():
                        found.append(self.pick(plain(*batch.args, **batch.kwargs)))
            finally:
                for each in widths:
                    each.release()
                for layer, *_ in weights:
                    layer.values.clear()
                for parameter, _ in parameters:
                    parameter.value = None
        return torch.stack(found)

    def _parts(self, name: str, width: Width, num_rows: int) -> Iterator[dict[str, Any]]:
        """Yield what a width holds in the pass of each draw."""
        blocks, fractions = self.net.cut_blocks.get(name), self.net.cut_fractions
        if blocks is None and fractions is not None and self.net.mask_per == "batch" and fractions > 0:
            blocks = int(width.prefix(fractions).sum()) + width.always_kept - 1
        if blocks is not None or self.net.mask_per == "batch":
            lengths = self.lengths[name] if blocks is None else [blocks] * self.num_samples
            yield from ({"kept_units": width.kept_units(length)} for length in lengths)
            return
        keep_probs = width.law.keep_probs
        uniform = torch.rand(self.num_samples, num_rows, 1, dtype=keep_probs.dtype, device=keep_probs.device)
        for some in uniform.split(max(1, AT_ONCE // (max(1, num_rows) * width.num_units))):
            masks = hard_mask(keep_probs, some)
            if fractions is not None:
                masks = torch.where((fractions == 0).unsqueeze(-1), masks, width.prefix(fractions))
            yield from ({"mask": mask} for mask in width.spread(masks))

    def narrow(
        self,
        width: float | int | Mapping[str, float | int],
        rounding: Rounding | None = None,
        *,
        recalibrate: Rows | None = None,
        batch_size: int = 256,
    ) -> NarrowDraws:
        """Narrow the net of each draw to a width, once for all predictions with it.

        Args:
            width: As in `narrow`. The one asked for last is kept, until another one is.
            rounding: As in `Width.kept_blocks`.
            recalibrate: Training inputs, for nets with BatchNorm: each draw gets statistics of its own from them, as of
                `recalibrate_batchnorm`.
            batch_size: Rows of a batch, where these are tensors.

        Returns:
            The narrowed nets; memory holds S of them.

        Raises:
            ValueError: If a width is invalid or does not fit a group.
        """
        asked = (repr(width), rounding, self.net.training)  # 1 and 1.0 are other widths
        if recalibrate is None and self._narrow is not None and self._narrow.is_for(asked):
            return self._narrow.nets
        blocks = {name: each.num_blocks for name, each in self.net.widths.items()}
        blocks |= self.net.kept_blocks(width, rounding)
        found = NarrowDraws(self.net, blocks, self, self.pick, recalibrate=recalibrate, batch_size=batch_size)
        if recalibrate is None:
            self._narrow = _Kept(asked, found, self.net)
        return found


class _Kept:
    """Nets of a width, as long as the net they were made of stays what it is: more training changes it."""

    def __init__(self, asked: Any, nets: NarrowDraws, net: NestedNet) -> None:
        self.asked, self.nets = asked, nets
        self._tensors = [*net.parameters(), *net.buffers()]
        self._changes = num_changes(self._tensors)

    def is_for(self, asked: Any) -> bool:
        """Say whether they are what is asked for, and still are those of the net."""
        return bool(self.asked == asked and self._changes == num_changes(self._tensors))


def _drawn(posteriors: Mapping[str, tuple[Tensor, Tensor]]) -> Draw:
    return {site: torch.addcmul(mean, scale, torch.randn_like(mean)) for site, (mean, scale) in posteriors.items()}


def _posteriors(net: NestedNet) -> dict[str, tuple[Tensor, Tensor]]:
    """Return mean and standard deviation of all random parameters, by name of their site."""
    found = {
        f"{net.site_of(name)}.{key}": (layer.plain.get_parameter(key), log_scale)
        for name, layer in net.layers.items()
        for key, log_scale in layer.log_scales.items()
    }
    found |= {f"{net.prefix}{name}": (each.mean, each.log_scale) for name, each in net.random_parameters.items()}
    return {site: (mean.detach(), log_scale.detach().exp()) for site, (mean, log_scale) in found.items()}
