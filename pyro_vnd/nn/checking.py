"""Whether a nested net computes what it should, asked of the net itself when it is made."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pyro_vnd._data import take_rows
from pyro_vnd._state import cuda_devices, module_mode, random_numbers
from pyro_vnd.nn.axis import take
from pyro_vnd.nn.depth import NestedBlock, is_in_a_list, taken_out
from pyro_vnd.nn.layers import NestedLayer
from pyro_vnd.nn.net import NestedNet
from pyro_vnd.nn.tracing.tape import tensors_in, with_one_more

__all__ = ["Misfit", "check_and_count"]

_ROWS_OF_NORMS = 4  # of which two are narrow where widths are mixed
_DROPOUT = {
    *(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout),
    *(torch.dropout, torch.feature_dropout, torch.alpha_dropout, torch.feature_alpha_dropout),
}


class Misfit(ValueError):
    """A nested net that does not compute what it should.

    Args:
        path: Name of the module to blame, or of the group of blocks; "" if it is not known.
        why: What is wrong.
    """

    def __init__(self, path: str, why: str) -> None:
        super().__init__(f"nest: {why}")
        self.path, self.why = path, why


def check_and_count(
    net: NestedNet, inputs: tuple[Any, ...], trains: bool, whole: Sequence[Tensor] = (), one_row_trains: bool = False
) -> dict[str, int]:
    """Compare passes that are cut by masks with passes that compute the kept part only; count positions of the layers.

    Both are compared in evaluation mode and, if the net can be run in it, in training mode, with the same random
    numbers and groups of different widths. With masks by example, rows of mixed widths are compared with passes of one
    width. Where the results have a row for each example, one pass of mixed widths is enough for both: its narrow rows
    must be what a sliced pass gives, and its wide ones what the net gave. It is also found out which blocks can be
    taken out of the lists that they are in.

    Args:
        net: The nested net.
        inputs: The example.
        trains: Whether the net can be run in training mode.
        whole: What the net given returns, on these inputs or on more rows after them.
        one_row_trains: Whether in training mode it does the same as in evaluation mode, on a single row, too.

    Returns:
        How often each layer is applied to one example, by its name.

    Raises:
        Misfit: If they differ, or the net does not run with fewer channels.
    """
    rows = len(next(x for x in inputs if isinstance(x, Tensor)))
    try:
        return _checked(net, inputs, rows, trains, whole, one_row_trains)
    except Misfit:
        raise
    except ValueError:  # of a norm that wants more than one number, which a channel of a single row may be
        for count in range(rows, _ROWS_OF_NORMS):
            inputs = with_one_more(inputs, count)
        return _checked(net, inputs, max(rows, _ROWS_OF_NORMS), trains, whole, False)


def _checked(
    net: NestedNet, inputs: tuple[Any, ...], rows: int, trains: bool, whole: Sequence[Tensor], one_row_trains: bool
) -> dict[str, int]:
    more = inputs if rows > 1 else with_one_more(inputs, rows)  # norms of a batch want two rows
    half = net.kept_blocks(0.5, "nearest")
    uneven = net.kept_blocks({name: (0.25, 0.75)[place % 2] for place, name in enumerate(net.widths)}, "nearest")
    with _as_it_was(net), torch.no_grad(), random_numbers(0, cuda_devices([net])):
        with module_mode([net], training=False):
            positions = _agree_at_once(net, more, max(rows, 2), half, whole) if net.mask_per == "example" else {}
            if not positions:
                positions = _compare(net, inputs, rows, half)
                if net.mask_per == "example":
                    _compare_rows(net, inputs, rows)
        if trains:
            with module_mode([net], training=True), _shaken(net):
                if one_row_trains:
                    _compare(net, take_rows(inputs, rows, torch.arange(rows) == 0), 1, uneven)
                else:
                    _compare(net, more, max(rows, 2), uneven)
        with module_mode([net], training=False):
            _let_blocks_go(net, inputs, rows)
    return positions


def _agree_at_once(
    net: NestedNet, inputs: tuple[Any, ...], rows: int, half: dict[str, int], whole: Sequence[Tensor]
) -> dict[str, int]:
    """Compare a pass of mixed widths with a sliced one and the whole one; return positions, none if they differ.

    That they differ may have reasons that are none, such as results that do not have a row for each example.
    """
    is_narrow = torch.arange(rows) % 2 == 0
    try:
        mixed, positions = _pass(net, inputs, rows, _fractions(net, is_narrow), sliced=False)
        sliced, _ = _pass(net, take_rows(inputs, rows, is_narrow), int(is_narrow.sum()), half, sliced=True)
    except Misfit:
        return {}
    if not len(mixed) == len(sliced) == len(whole):
        return {}
    for both, narrow, wide in zip(mixed, sliced, whole, strict=True):
        if both.shape[:1] != (rows,) or wide.dim() != both.dim():
            return {}
        pairs = ((both[is_narrow], narrow), (both[~is_narrow], wide[:rows][~is_narrow[: len(wide)]]))
        if any(one.shape != other.shape or not _alike(one, other) for one, other in pairs):
            return {}
    return positions


def _fractions(net: NestedNet, is_narrow: Tensor) -> Tensor:
    """Return a width for each row, of the type and device that fractions have."""
    law = net.widths[next(iter(net.widths))].logits
    return torch.where(is_narrow, 0.5, 1.0).to(law)


def _compare(net: NestedNet, inputs: tuple[Any, ...], rows: int, half: dict[str, int]) -> dict[str, int]:
    """Compare passes of one width, cut by masks and sliced; return positions.

    A stage of blocks is blamed if they only differ when it is cut.
    """
    try:
        return _compare_layers(net, inputs, rows, half)
    except Misfit:
        for name, width in {block.width.name: block.width for block in net.blocks}.items():
            if half[name] < width.num_blocks and _agrees(net, inputs, rows, half | {name: width.num_blocks}):
                raise Misfit(name, "the net without its last blocks and the net with these masked differ") from None
        raise


def _agrees(net: NestedNet, inputs: tuple[Any, ...], rows: int, blocks: dict[str, int]) -> bool:
    try:
        _compare_layers(net, inputs, rows, blocks)
    except Misfit:
        return False
    return True


def _compare_layers(net: NestedNet, inputs: tuple[Any, ...], rows: int, half: dict[str, int]) -> dict[str, int]:
    dense, positions = _pass(net, inputs, rows, half, sliced=False)
    sliced, _ = _pass(net, inputs, rows, half, sliced=True)
    shapes = [[x.shape for x in each] for each in (dense, sliced)]
    if shapes[0] == shapes[1]:
        if all(map(_alike, dense, sliced)):
            return positions
        other, _ = _pass(net, inputs, rows, half, sliced=False, seed=1)
        if all(map(partial(_is_explained, times=10), dense, sliced, other)):
            return positions  # a random net, such as with dropout in attention, draws other numbers for fewer channels
        nudged, _ = _pass(net, _nudged(inputs), rows, half, sliced=False)
        if all(map(partial(_is_explained, times=100), dense, sliced, nudged)):
            return positions  # a net that magnifies rounding, such as by norms over few and like rows, is no measure
    path = _first_that_differs(net, inputs, rows, half)
    where = f"`{path}` is the first layer that differs" if path else "no single layer differs"
    raise Misfit(
        path,
        f"a cut net and the same net masked differ; {where}. A part of the net mixes channels in a way that was not "
        f"recognised: leave parts alone with `exclude`{f', such as exclude={[path]!r}' if path else ''}",
    )


def _compare_rows(net: NestedNet, inputs: tuple[Any, ...], rows: int) -> None:
    """Compare rows of different widths with passes of one width."""
    more, count = with_one_more(inputs, rows), rows + 1
    is_narrow = torch.arange(count) % 2 == 0
    narrow, wide, mixed = (
        _pass(net, more, count, _fractions(net, rows_of), sliced=False)[0]
        for rows_of in (torch.ones_like(is_narrow), torch.zeros_like(is_narrow), is_narrow)
    )
    for one, other, both in zip(narrow, wide, mixed, strict=True):
        if both.shape[:1] == (count,):
            of_rows = is_narrow.to(both.device).reshape(-1, *[1] * (both.dim() - 1))
            if not _alike(both, torch.where(of_rows, one, other)):
                raise Misfit(
                    "", 'rows of different widths disturb each other; nest with mask_per="batch", one mask for all rows'
                )


def _pass(
    net: NestedNet, inputs: tuple[Any, ...], rows: int, width: Any, *, sliced: bool, seed: int = 0
) -> tuple[list[Tensor], dict[str, int]]:
    """Run the net at the mean of its weights; return its outputs, and how often layers were applied to a row."""
    try:
        with _counted(net) as positions:
            outputs = _run(net, inputs, rows, width, sliced, seed)
    except RuntimeError as error:
        path = _where_it_fails(net, inputs, rows, width, sliced, seed)
        inside = f" in `{path}`" if path else ""
        raise Misfit(
            path,
            f"the net does not run with fewer channels{inside}: {error}. Does its forward name a number of channels, "
            "as in view(-1, 512)? "
            + (f"exclude={[path]!r} leaves that part alone" if path else "Write torch.flatten(x, 1), or -1 there"),
        ) from error
    return outputs, {name: count // rows for name, count in positions.items()}


def _run(net: NestedNet, inputs: tuple[Any, ...], rows: int, width: Any, sliced: bool, seed: int = 0) -> list[Tensor]:
    given = copy.deepcopy(inputs)  # operations in place may change them
    drawn = net._drawn("posterior", rows, weights=False)
    with net.cut(width, sliced=sliced), drawn, random_numbers(seed, cuda_devices(inputs)), _WithoutDropout():
        return [x.detach().clone() for x in tensors_in(net.net(*given))]


def _where_it_fails(net: NestedNet, *how: Any) -> str:
    """Return the name of the module in which a pass fails."""
    stack: list[str] = []
    with ExitStack() as hooks:
        for name, part in net.net.named_modules():
            hooks.enter_context(part.register_forward_pre_hook(lambda *_, name=name: stack.append(name)))
            hooks.enter_context(part.register_forward_hook(lambda *_: _ignore(stack.pop())))
        with suppress(RuntimeError):
            _run(net, *how)
    return next((name for name in reversed(stack) if "plain" not in name.split(".")), "")


def _ignore(_: Any) -> None:
    """Let a hook return nothing."""


def _nudged(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Move numbers by some units of their rounding."""

    def nudged(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        return x * (1 + 8 * torch.finfo(x.dtype).eps * torch.randn_like(x))

    return tuple(map(nudged, inputs))


def _is_explained(one: Tensor, other: Tensor, again: Tensor, times: float) -> bool:
    """Say whether results differ no more, but for a factor, than they do with other random numbers or inputs."""
    if _alike(one, other) or _alike(one, again):
        return _alike(one, other)
    return not one.is_floating_point() or bool((one - other).abs().max() <= times * (one - again).abs().max())


def _alike(one: Tensor, other: Tensor) -> bool:
    """Say whether results are the same but for rounding, compared with how they spread, since they may lie far off."""
    if not one.is_floating_point():
        return bool(torch.equal(one, other))
    finite = one[one.isfinite()]
    if not finite.numel():
        return torch.allclose(one, other, equal_nan=True)
    rounding = min(100 * torch.finfo(one.dtype).eps, 1e-3)
    allowed = rounding * finite.abs().max().item() + 1e-3 * (finite - finite.mean()).abs().max().item()
    return torch.allclose(one, other, rtol=0, atol=allowed, equal_nan=True)


def _first_that_differs(net: NestedNet, inputs: tuple[Any, ...], rows: int, half: dict[str, int]) -> str:
    dense, sliced = (_outputs_of_layers(net, inputs, rows, half, sliced) for sliced in (False, True))
    kept = {name: width.kept_units(half[name]) for name, width in net.widths.items()}
    layers = net.layers
    for name, one in dense.items():
        layer = layers[name]
        if layer.block is not None and layer.block.is_dropped(kept):
            continue
        dim = -1 if layer.channel_dim == -1 else one.dim() - len(layer.plain.kernel_size) - 1
        part = take(one, {dim: layer.output_axis.index(kept)})
        other = sliced.get(name)
        if other is None or part.shape != other.shape or not _alike(part, other):
            return name
    return ""


def _outputs_of_layers(net: NestedNet, *how: Any) -> dict[str, Tensor]:
    """Return what the nested layers put out in a pass, the first time that each is called."""
    seen: dict[str, Tensor] = {}

    def hook(_: nn.Module, inputs: Any, out: Tensor, name: str) -> None:
        seen.setdefault(name, out.detach())

    with ExitStack() as hooks:
        for name, layer in net.layers.items():
            hooks.enter_context(layer.register_forward_hook(partial(hook, name=name)))
        _run(net, *how)
    return seen


def _let_blocks_go(net: NestedNet, inputs: tuple[Any, ...], rows: int) -> None:
    """Find out which stages the code of the net runs through in a loop, so that it runs as well without the last."""
    whole = {name: width.num_blocks for name, width in net.widths.items()}
    fewest = whole | {block.width.name: block.width.always_kept for block in net.blocks}
    kept = {block.width.name: block.width.kept_units(fewest[block.width.name]) for block in net.blocks}
    stages = dict[str, list[NestedBlock]]()
    for block in net.blocks:
        if block.is_dropped(kept) and is_in_a_list(net.net, block.path):
            stages.setdefault(block.width.name, []).append(block)
    if not stages:
        return
    # Without all that can go, and without the last of each stage: what all blocks return may be averaged, say, which
    # shows nothing when a single one is left.
    one_less = {name: max(number - 1, fewest[name]) for name, number in whole.items()}
    expected = [(left, _pass(net, inputs, rows, left, sliced=True)[0]) for left in (fewest, one_less)]
    every = [block for blocks in stages.values() for block in blocks]
    for blocks in [every] if _runs_without(net, every, inputs, rows, expected) else stages.values():
        can_go = blocks is every or _runs_without(net, blocks, inputs, rows, expected)
        for block in blocks:
            block.can_go = can_go


def _runs_without(
    net: NestedNet,
    blocks: list[NestedBlock],
    inputs: tuple[Any, ...],
    rows: int,
    expected: Sequence[tuple[dict[str, int], list[Tensor]]],
) -> bool:
    """Say whether the net computes the same when blocks are not there as when they are passed over."""
    for left, passed_over in expected:
        kept = {name: width.kept_units(left[name]) for name, width in net.widths.items()}
        try:
            with taken_out(net.net, [block.path for block in blocks if block.is_dropped(kept)]):
                got, _ = _pass(net, inputs, rows, left, sliced=True)
        except Exception:  # whatever the code of the net says of a module that is not there
            return False
        if len(got) != len(passed_over) or not all(
            one.shape == other.shape and _alike(one, other) for one, other in zip(got, passed_over, strict=True)
        ):
            return False
    return True


class _WithoutDropout(TorchFunctionMode):
    """Pass over dropout, which draws other numbers for fewer channels, so that what is compared is not random."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        if func in _DROPOUT:
            return args[0] if args else named["input"]
        return func(*args, **named)


@contextmanager
def _shaken(net: NestedNet) -> Iterator[None]:
    """Move parameters that are constant, such as a last layer of zeros, in a block, since they hide what is before."""
    laws = {id(each) for layer in net.layers.values() for each in layer.log_scales.parameters()}
    some = [each for each in net.net.parameters() if id(each) not in laws and _is_constant(each)]
    before = [each.detach().clone() for each in some]
    try:
        for each in some:
            each.add_(0.1 * torch.randn_like(each))
        yield
    finally:
        for each, value in zip(some, before, strict=True):
            each.copy_(value)


def _is_constant(x: Tensor) -> bool:
    if not x.is_floating_point() or not x.numel():
        return False
    first, last = x.detach().flatten()[[0, -1]]
    return bool(first == last) and bool((x == first).all())


@contextmanager
def _as_it_was(net: nn.Module) -> Iterator[None]:
    """Give buffers, such as running statistics, and attributes their values back after a block."""
    buffers = [(buffer, buffer.detach().clone()) for buffer in net.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


@contextmanager
def _counted(net: NestedNet) -> Iterator[dict[str, int]]:
    """Count the positions, rows of a linear layer or pixels of a convolution, to which layers are applied.

    Only passes that are cut by masks count, in which all of the net is run.
    """
    positions = dict.fromkeys(net.layers, 0)

    def count(name: str) -> Callable[..., None]:
        def hook(layer: NestedLayer, inputs: tuple[Tensor], output: Tensor) -> None:
            if net.is_sliced:
                return
            x = inputs[0] if layer.transposed and inputs else output
            positions[name] += x.numel() // x.shape[layer.channel_dim]

        return hook

    handles = [layer.register_forward_hook(count(name)) for name, layer in net.layers.items()]
    try:
        yield positions
    finally:
        for handle in handles:
            handle.remove()
