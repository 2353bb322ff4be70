"""What each fast path of the library gains over the plain code that it stands for.

    python -m benchmarks.fast_paths [--json FILE] [--seconds S] [--only NAME ...]
    python -m benchmarks.fast_paths --table FILE

A path is in the library where it takes at most .9 of the time of the plain code at the size it is for, which is the
last of its sizes here. Medians of interleaved blocks in one process: CPU time, float32, one torch thread, argument
validation off. "Forward and backward" is one evaluation and the gradients of all that has one. Fast paths are no public
interface, so that this benchmark, unlike the others, looks behind it.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor, nn
from torch.distributions import kl_divergence
from tqdm import tqdm

from benchmarks.ordered_latents import RECIPE, fit_arguments
from benchmarks.record import header, markdown_table, rounded, write_json
from benchmarks.timing import interleaved_medians
from pyro_vnd._compat import QuietModule, quiet_lookups
from pyro_vnd.autoencoders.codes import Completion
from pyro_vnd.autoencoders.likelihoods import IsotropicNormal
from pyro_vnd.distributions import OrderedMask, OrderedMaskStraightThrough
from pyro_vnd.distributions._fast import arrays, broadcast, log_uniform, masks, mixtures, normals
from pyro_vnd.distributions.masks import Cut
from pyro_vnd.infer import MaskSchedule
from pyro_vnd.nn import Width

__all__ = ["LIMIT", "PATHS", "markdown", "run"]

Function = Callable[[], object]
Pair = tuple[Function, Function]  # the fast path and the plain code

RESULTS = Path(__file__).parent / "results" / "fast_paths.json"
LIMIT = 0.9
CODES = (256, RECIPE.num_latents)  # codes of a batch
LAYER, SMALL_LAYER = (2048, 2048), (256, 784)  # weights
ACTIVATIONS, SMALL_ACTIVATIONS = (1024, 2048), (128, 256)


def both(fast: Callable[..., Any], plain: Callable[..., Any], *inputs: Any) -> Pair:
    """Return two functions' evaluation and gradients, with respect to the inputs that want one."""
    return partial(_forward_backward, fast, inputs), partial(_forward_backward, plain, inputs)


def _forward_backward(function: Callable[..., Any], inputs: tuple[Any, ...]) -> object:
    found = function(*inputs)
    outputs = found if isinstance(found, tuple) else (found,)
    wanted = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
    return torch.autograd.grad(outputs, wanted, [torch.ones_like(x) for x in outputs]) if wanted else outputs


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape).requires_grad_()


def positive(*shape: int) -> Tensor:
    return (torch.rand(shape) + 0.1).requires_grad_()


def logistic_mask(*shape: int) -> Pair:
    return both(masks.logistic_mask, masks.plain_logistic_mask, leaf(*shape), torch.rand(shape[0], 1), 0.2, True)


def hard_mask(*shape: int) -> Pair:
    inputs = torch.rand(shape), torch.rand(shape[0], 1)
    return partial(masks.hard_mask, *inputs), partial(masks.plain_hard_mask, *inputs)


def normal_kl(*shape: int) -> Pair:
    prior = torch.zeros(shape), torch.ones(shape)
    return both(normals.normal_kl, normals.plain_normal_kl, leaf(*shape), positive(*shape), *prior)


def variance_and_kl(*shape: int) -> Pair:
    return both(normals.variance_and_kl, normals.plain_variance_and_kl, leaf(*shape), leaf(*shape), (0.0, 0.5))


def draw_and_kl(*shape: int) -> Pair:
    inputs = leaf(*shape), leaf(*shape), torch.randn(shape), (0.0, 0.5)
    return both(normals.draw_and_kl, normals.plain_draw_and_kl, *inputs)


def mixture_terms(*shape: int) -> Pair:
    inputs = leaf(*shape[:-1]), leaf(*shape), positive(*shape), leaf(*shape)
    return both(mixtures.mixture_terms, mixtures.plain_mixture_terms, *inputs)


def log_uniform_kl(*shape: int) -> Pair:
    return both(log_uniform.log_uniform_kl, log_uniform.plain_log_uniform_kl, leaf(*shape), positive(*shape))


def noisy(*shape: int) -> Pair:
    return both(arrays.noisy, arrays.plain_noisy, leaf(*shape), positive(*shape), torch.randn(shape))


def leading_block(*shape: int) -> Pair:
    lengths = {dim: size // 2 for dim, size in enumerate(shape)}
    return both(arrays.leading_block, arrays.plain_leading_block, leaf(*shape), lengths)


def broadcast_shapes(*shape: int) -> Pair:
    batch, one = torch.Size(shape), torch.Size()
    return partial(broadcast.broadcast_shapes, batch, one), partial(torch.broadcast_shapes, batch, one)


def _lengths(rows: int, num_units: int) -> Tensor:
    """Draw lengths of codes as they are cut in training."""
    schedule: Any = fit_arguments("vae", "vnd", RECIPE)["schedule"]
    return (schedule.draw(num_units, (rows,))[0] * num_units).long()


def put(rows: int, num_units: int) -> Pair:
    cut = Cut(_lengths(rows, num_units), OrderedMask.uniform(num_units).expand((rows,)))

    def general(random: Tensor, given: Tensor) -> Tensor:
        leading, flat = random.shape[:-2], given.reshape(-1, given.shape[-1])
        put = flat.expand(leading + flat.shape).index_copy(len(leading), cut.rows, random)
        return put.reshape(leading + given.shape)

    return both(cut.put, general, leaf(len(cut.rows), num_units), cut.masks)


def kl_of_cut_laws(rows: int, num_units: int) -> Pair:
    """Of a posterior and a prior that are cut alike: by the same tensor, and by a copy of it."""
    lengths, prior = _lengths(rows, num_units), OrderedMask.uniform(num_units).expand((rows,))
    cut = Cut(lengths, prior)
    copied = Cut(lengths.clone(), prior)

    def by(other: Cut) -> Callable[[Tensor], Tensor]:
        return lambda logits: kl_divergence(OrderedMask(logits=logits)._cut_by(cut), prior._cut_by(other))

    return both(by(cut), by(copied), leaf(rows, num_units))


def draw_schedule(rows: int, num_units: int) -> Pair:
    schedule = MaskSchedule()
    law = OrderedMask.uniform(num_units)
    ends = torch.cat([torch.tensor([schedule.learned]), schedule.budget * law.probs]).cumsum(0)[:-1]
    fractions = torch.arange(num_units + 1) / num_units

    def plain() -> Tensor:
        places = (torch.randperm(rows) + torch.rand(())) / rows
        return fractions[torch.searchsorted(ends, places.unsqueeze(0), right=True)]

    return partial(schedule.draw, num_units, (rows,)), plain


def completion(rows: int, num_units: int) -> Pair:
    """Of codes of which some are whole: those passed by, and all completed."""
    net, cut = Completion(num_units), _lengths(rows, num_units)
    mask = OrderedMaskStraightThrough(0.2, logits=leaf(rows, num_units)).cut(cut).rsample()
    parameters, code = list(net.parameters()), leaf(rows, num_units)

    def of(mask: Tensor) -> Function:
        return lambda: torch.autograd.grad(net(code, mask).sum(), [*parameters, code], retain_graph=True)

    return of(mask), of(mask.clone())


def isotropic_normal(rows: int, pixels: int) -> Pair:
    value = torch.rand(rows, pixels)
    return both(
        lambda loc, scale: IsotropicNormal(loc, scale, 1).log_prob(value),
        lambda loc, scale: pyro.distributions.Normal(loc, scale.unsqueeze(-1)).to_event(1).log_prob(value),
        leaf(rows, pixels),
        positive(rows),
    )


def spread(rows: int, num_units: int) -> Pair:
    """Of masks over blocks of 16 units."""
    width = Width("hidden", num_units, num_blocks=max(num_units // 16, 2))
    return both(width.spread, lambda mask: mask[..., width.entries], leaf(rows, width.num_blocks))


def lookups(times: int) -> Pair:
    """Of a net with 12 parameters in a module that is called under a trace of Pyro."""

    class Holder(QuietModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(*(nn.Linear(4, 4) for _ in range(6)))

        def forward(self) -> list[Tensor]:
            for _ in range(times):
                net = self.net
            return list(net.parameters())

    holder = Holder()

    def look_up(context: Callable[[], AbstractContextManager[None]]) -> list[Tensor]:
        with pyro.poutine.trace(), context():
            found: list[Tensor] = holder()
        return found

    return partial(look_up, quiet_lookups), partial(look_up, nullcontext)


# What makes a pair, what it does, and its sizes, of which the last is the one that counts.
PATHS: dict[str, tuple[Callable[..., Pair], str, tuple[tuple[int, ...], ...]]] = {
    "logistic_mask": (logistic_mask, "a straight-through draw, forward and backward", ((1, 32), (4096, 128), CODES)),
    "hard_mask": (hard_mask, "masks of keep probabilities and noise", ((1, 32), (4096, 128), CODES)),
    "normal_kl": (normal_kl, "KL of Normals, forward and backward", (CODES,)),
    "variance_and_kl": (variance_and_kl, "variances of weights and KL, forward and backward", (SMALL_LAYER, LAYER)),
    "draw_and_kl": (draw_and_kl, "a draw of weights and KL, forward and backward", (SMALL_LAYER, LAYER)),
    "mixture_terms": (mixture_terms, "moments and density of mixtures, forward and backward", ((*CODES, 10),)),
    "log_uniform_kl": (log_uniform_kl, "KL from the log-uniform prior, forward and backward", (SMALL_LAYER, LAYER)),
    "noisy": (noisy, "mean plus noise of a variance, forward and backward", (SMALL_ACTIVATIONS, ACTIVATIONS)),
    "leading_block": (leading_block, "half the rows and columns, forward and backward", (SMALL_LAYER, LAYER)),
    "broadcast_shapes": (broadcast_shapes, "of a batch shape and none", ((256,),)),
    "Cut.put": (put, "rows into a batch without sample shape, forward and backward", (CODES,)),
    "KL of laws cut alike": (kl_of_cut_laws, "random rows alone, forward and backward", (CODES,)),
    "MaskSchedule.draw": (draw_schedule, "numpy rather than torch", (CODES,)),
    "Completion": (completion, "whole codes passed by, forward and backward", (CODES,)),
    "IsotropicNormal": (isotropic_normal, "log-density of images, forward and backward", ((256, 784),)),
    "Width.spread": (spread, "masks of blocks to units, forward and backward", ((256, 512),)),
    "quiet_lookups": (lookups, "looking up a net of 12 parameters in a module", ((1000,),)),
}


def run(names: list[str], seconds: float, min_rounds: int = 15) -> dict[str, Any]:
    """Measure paths and return what goes into the JSON file."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    result: dict[str, Any] = {"header": header("benchmarks.fast_paths"), "rows": []}
    try:
        with pyro.validation_enabled(False), tqdm([(name, size) for name in names for size in PATHS[name][2]]) as jobs:
            for name, size in jobs:
                jobs.set_description(f"{name} {_shape(size)}")
                fast, plain = PATHS[name][0](*size)
                medians = interleaved_medians({"fast": fast, "plain": plain}, seconds=seconds, min_rounds=min_rounds)
                result["rows"].append(
                    {
                        "path": name,
                        "size": list(size),
                        "fast_seconds": rounded(medians["fast"]),
                        "plain_seconds": rounded(medians["plain"]),
                        "ratio": rounded(medians["fast"] / medians["plain"]),
                    }
                )
    finally:
        torch.set_num_threads(threads)
    return result


def merged(whole: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    """Put the rows of a run of some paths in place of theirs in an earlier result, and its header beside the first.

    Rows of paths that are gone are left out.
    """
    measured = {row["path"] for row in part["rows"]}
    rows = part["rows"] + [row for row in whole["rows"] if row["path"] not in measured and row["path"] in PATHS]
    order = list(PATHS)
    return {
        **whole,
        "later_headers": [*whole.get("later_headers", []), part["header"]],
        "rows": sorted(rows, key=lambda row: order.index(row["path"])),
    }


def kept(result: dict[str, Any]) -> Iterator[tuple[str, bool]]:
    """Say of each path whether its gain is what it must be at the size it is for."""
    last = {row["path"]: row["ratio"] for row in result["rows"]}
    for name, ratio in last.items():
        yield name, ratio <= LIMIT


def markdown(result: dict[str, Any]) -> str:
    """Format a result as a table."""
    table = markdown_table(
        ["fast path", "does", "size", "fast, μs", "plain, μs", "fast / plain"],
        [
            [
                f"`{row['path']}`" if " " not in row["path"] else row["path"],
                PATHS[row["path"]][1],
                _shape(row["size"]),
                f"{1e6 * row['fast_seconds']:,.1f}",
                f"{1e6 * row['plain_seconds']:,.1f}",
                f"{row['ratio']:.2f}",
            ]
            for row in result["rows"]
        ],
    )
    missed = [name for name, good in kept(result) if not good]
    return "\n\n".join(
        [
            "Medians of interleaved runs: CPU time, float32, argument validation off.",
            table,
            f"At the last of its sizes each takes at most {LIMIT} of the plain time"
            + (f", but for {', '.join(missed)}." if missed else "."),
        ]
    )


def _shape(size: Any) -> str:
    return " x ".join(f"{n:,}" for n in size)


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark, or print the table of an earlier run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fast_paths", description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", default=RESULTS, help="where the result goes")
    parser.add_argument("--seconds", type=float, default=6.0, help="time for one path at one size, about")
    parser.add_argument(
        "--only", nargs="+", choices=PATHS, metavar="NAME", help="measure these; others keep their rows"
    )
    parser.add_argument("--table", type=Path, metavar="FILE", help="print the table of this result, measure nothing")
    args = parser.parse_args(argv)
    if args.table:
        print(markdown(json.loads(args.table.read_text())))
        return
    result = run(args.only or list(PATHS), args.seconds)
    if args.only and args.json.exists():
        result = merged(json.loads(args.json.read_text()), result)
    write_json(args.json, result, table="rows")
    print(markdown(result))


if __name__ == "__main__":
    main()
