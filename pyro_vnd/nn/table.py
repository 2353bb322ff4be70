"""What a nested net shows of itself: its groups, what their masks have learned, and what a cut saves."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from html import escape
from typing import TYPE_CHECKING

from pyro_vnd.distributions.modes import name_modes
from pyro_vnd.nn.layers import NestedLayer
from pyro_vnd.nn.norms import NestedNorm

if TYPE_CHECKING:
    from pyro_vnd.nn.net import NestedNet
    from pyro_vnd.nn.width import Width

__all__ = ["as_html", "as_text", "multiply_adds", "num_parameters", "share_that_narrows"]

HEADER = ("group", "units", "blocks", "mean blocks kept", "mode", "layers")
SHOWN = {"1/4": 0.25, "1/2": 0.5}  # fractions at which a net says what is left
MAX_NAMES = 6


def as_text(net: NestedNet) -> str:
    """Return the table as plain text."""
    rows = [HEADER, *_rows(net)]
    sizes = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    lines = ["  ".join(cell.ljust(size) for cell, size in zip(row, sizes, strict=True)).rstrip() for row in rows]
    return "\n".join([_title(net), *(f"  {line}" for line in lines), *_notes(net)])


def as_html(net: NestedNet) -> str:
    """Return the table as HTML."""
    head = "".join(f"<th>{cell}</th>" for cell in HEADER)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in _rows(net))
    notes = "".join(f"<br>{escape(note)}" for note in _notes(net))
    return f"<div>{escape(_title(net))}<table><tr>{head}</tr>{body}</table>{notes.removeprefix('<br>')}</div>"


def num_parameters(net: NestedNet, kept: Mapping[str, int]) -> int:
    """Return the number of parameters of the narrowed net.

    Args:
        net: The nested net.
        kept: Units that groups keep; those left out keep all.
    """
    left = {id(parameter): parameter.numel() for parameter in net.net.parameters()}
    for module in _nested(net).values():
        for name, parameter in module.plain.named_parameters():
            left[id(parameter)] = module.num_parameters(name, kept)
    for own in net.own_channels:
        for name, parameter in own.module.named_parameters(recurse=False):
            left[id(parameter)] = own.num_parameters(name, kept)
    # Neither what has laws of its own nor a dropped block is part of the narrowed net.
    laws = (parameter for layer in net.layers.values() for parameter in layer.log_scales.parameters())
    dropped = (each for block in net.blocks if block.is_dropped(kept) for each in block.module.parameters())
    gone = {id(parameter) for parameter in (*laws, *dropped)}
    return sum(count for parameter, count in left.items() if parameter not in gone)


def share_that_narrows(net: NestedNet) -> float:
    """Return which share of the parameters is gone when every group keeps a single unit."""
    return 1 - num_parameters(net, dict.fromkeys(net.widths, 1)) / num_parameters(net, {})


def multiply_adds(net: NestedNet, kept: Mapping[str, int], layers: Collection[str] | None = None) -> int:
    """Return how often linear and convolutional layers multiply for one example.

    Args:
        net: The nested net, made by `nest`.
        kept: Units that groups keep; those left out keep all.
        layers: Names of the layers that count; all by default.
    """
    names, parts = net.positions if layers is None else layers, net.layers
    left = [name for name in names if not ((block := parts[name].block) and block.is_dropped(kept))]
    return sum(net.positions[name] * parts[name].num_parameters("weight", kept) for name in left)


def _nested(net: NestedNet) -> dict[str, NestedLayer | NestedNorm]:
    return {name: part for name, part in net.net.named_modules() if isinstance(part, NestedLayer | NestedNorm)}


def _title(net: NestedNet) -> str:
    prefix = f", prefix {net.prefix!r}" if net.prefix else ""
    return f"NestedNet({type(net.net).__name__}), one mask for each {net.mask_per}{prefix}"


def _rows(net: NestedNet) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for name, width in net.widths.items():
        mean, modes = width.describe_law()
        blocks = f"{width.num_blocks}" + (f" ({width.frozen} frozen)" if width.frozen else "")
        rows.append((name, f"{width.num_units}", blocks, f"{mean:.4g}", name_modes(modes), _sharing(net, width)))
    return rows


def _sharing(net: NestedNet, width: Width) -> str:
    """Name the layers that make or read the units of a group."""
    names = [name or "the net" for name, part in _nested(net).items() if width in part.widths]
    for own in net.own_channels:
        for name, axes in own.parameters.items():
            if any(width in axis.widths for axis in axes.values()):
                names.append(f"{own.path}.{name}" if own.path else name)
    names += [block.path for block in net.blocks if block.width is width]
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return ", ".join(names[:MAX_NAMES]) + more


def _notes(net: NestedNet) -> list[str]:
    counts = {"parameters": num_parameters} | ({"multiply-adds": multiply_adds} if net.positions else {})
    notes = []
    for label, count in counts.items():
        whole, parts = count(net, {}), []
        for share, fraction in SHOWN.items():
            kept = {name: width.kept_units(fraction, "nearest") for name, width in net.widths.items()}
            parts.append(f"{count(net, kept) / whole:.1%} at width {share}")
        notes.append(f"{whole:,} {label}: {', '.join(parts)}, to the nearest block")
    notes += [f"cut to {cut}" for cut in [net.describe_cut()] if cut]
    return notes + [f"whole: {name} ({reason})" for name, reason in net.whole.items()]
