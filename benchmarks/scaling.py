"""How the time of each kind of work grows with its size: masks, divergences, fits, evaluations, draws for ArviZ.

    python -m benchmarks.scaling [--json FILE] [--seconds S]

Medians of interleaved blocks in one process: CPU time, float32, one torch thread, after a first call of each. The
exponent of growth is the slope of the logarithm of the time over that of the size, between the two largest sizes.
"""

import argparse
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.record import header, markdown_table, rounded, write_json
from benchmarks.timing import interleaved_medians
from pyro_vnd.diagnostics import evaluate_widths, to_arviz
from pyro_vnd.distributions import OrderedMask, OrderedMaskStraightThrough
from pyro_vnd.infer import MaskSchedule, MiniBatchELBO, NestedELBO, fit
from pyro_vnd.nn import NestedClassifier, nest

__all__ = ["WORK", "markdown", "run"]

RESULTS = Path(__file__).parent / "results" / "scaling.json"
UNITS, CLASSES = 64, 10


class Work(NamedTuple):
    """One kind of work.

    Attributes:
        name: What it is.
        size: What grows.
        sizes: How large it is.
        make: Makes what is timed, given a size.
    """

    name: str
    size: str
    sizes: tuple[int, ...]
    make: Callable[[int], Callable[[], object]]


def draw(num_masks: int, num_units: int) -> Callable[[], object]:
    """Draw masks from one law, and go back to its logits."""
    logits, weight = torch.zeros(num_units, requires_grad=True), torch.randn(num_units)

    def step() -> Tensor:
        masks = OrderedMaskStraightThrough(0.2, logits=logits).rsample((num_masks,))
        return torch.autograd.grad((masks @ weight).sum(), logits)[0]

    return step


def divergence(num_units: int) -> Callable[[], object]:
    """Take the divergence of a law, and its gradient."""
    logits, prior = torch.zeros(num_units, requires_grad=True), OrderedMask.uniform(num_units)

    def step() -> Tensor:
        kl = torch.distributions.kl_divergence(OrderedMask(logits=logits), prior)
        return torch.autograd.grad(kl, logits)[0]

    return step


def rows(num_rows: int) -> tuple[Tensor, Tensor]:
    """Return inputs and classes of a perceptron."""
    return torch.randn(num_rows, UNITS), torch.randint(CLASSES, (num_rows,))


def perceptron() -> NestedClassifier:
    """Return a nested perceptron of two hidden layers."""
    net = nn.Sequential(nn.Linear(UNITS, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, CLASSES))
    return NestedClassifier(nest(net, torch.zeros(1, UNITS), num_blocks=16))


def whole_fit(num_rows: int) -> Callable[[], object]:
    """Fit for one epoch of batches of 128."""
    model, data = perceptron(), rows(num_rows)
    return partial(fit, model, model.guide, data, num_epochs=1, batch_size=128, progress=False)


def steps(num_particles: int) -> Callable[[], object]:
    """Fit for eight steps of a batch of 128."""
    model, data, schedule = perceptron(), rows(1024), MaskSchedule(num_particles=num_particles)
    return partial(fit, model, model.guide, data, num_epochs=1, batch_size=128, schedule=schedule, progress=False)


def evaluation(batch_size: int) -> Callable[[], object]:
    """Evaluate the objective on a batch, and go back."""
    model, data = perceptron(), rows(batch_size)
    objective = MiniBatchELBO(model, model.guide, data, num_data=100_000, elbo=NestedELBO())

    def step() -> None:
        objective.zero_grad()
        objective(*data).backward()

    return step


def scores(num_rows: int) -> Callable[[], object]:
    """Score at two widths, with ten draws each."""
    model, data = perceptron(), rows(num_rows)
    return partial(evaluate_widths, model, data, [0.5, 1.0], num_samples=10, progress=False)


def posterior(num_rows: int) -> Callable[[], object]:
    """Draw twenty times, with predictions and likelihoods of all rows."""
    model, data = perceptron(), rows(num_rows)
    return partial(to_arviz, model, model.guide, data, num_samples=20)


WORK = (
    Work("mask: draw and gradient, 64 masks", "units", (15_000, 150_000, 600_000), partial(draw, 64)),
    Work("mask: draw and gradient, 64 units", "masks", (15_000, 150_000, 600_000), lambda n: draw(n, 64)),
    Work("KL of a law of lengths and its gradient", "units", (10_000, 10_000_000, 30_000_000), divergence),
    Work("`fit`, an epoch in batches of 128", "rows", (2_000, 8_000, 32_000), whole_fit),
    Work("objective and its gradient", "rows of a batch", (128, 4_096, 32_768), evaluation),
    Work("`fit`, eight steps", "particles", (1, 4, 16), steps),
    Work("`evaluate_widths`, two widths, ten draws", "rows", (2_000, 16_000, 128_000), scores),
    Work("`to_arviz`, twenty draws", "rows", (1_000, 8_000, 64_000), posterior),
)


def run(seconds: float, min_rounds: int = 3) -> dict[str, Any]:
    """Measure everything and return the result; threads and random numbers are then as before."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            found = [_growth(each, seconds, min_rounds) for each in WORK]
            return {"header": header("benchmarks.scaling"), "work": found}
    finally:
        torch.set_num_threads(threads)


def _growth(work: Work, seconds: float, min_rounds: int) -> dict[str, Any]:
    made = {str(size): work.make(size) for size in work.sizes}
    times = interleaved_medians(made, seconds=seconds, min_rounds=min_rounds)
    (size, time), (larger, longer) = [(int(size), time) for size, time in times.items()][-2:]
    return {
        "work": work.name,
        "size": work.size,
        "seconds": {size: rounded(time) for size, time in times.items()},
        "exponent": rounded(math.log(longer / time) / math.log(larger / size)),
    }


def markdown(result: Mapping[str, Any], nest_cost: Mapping[str, Any]) -> str:
    """Format the result as a table, with how `nest` grows with depth, which has a benchmark of its own."""
    grown = [
        *result["work"],
        *({"work": f"`nest`, {row['net']}", "size": "layers"} | row for row in nest_cost["depths"]),
    ]
    return markdown_table(
        ["work", "grows with", "sizes and ms", "exponent"],
        [
            [
                row["work"],
                row["size"],
                "; ".join(f"{int(size):,}: {float(f'{1e3 * time:.3g}'):,g}" for size, time in row["seconds"].items()),
                f"{row['exponent']:.2f}",
            ]
            for row in grown
        ],
    )


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark and write its result."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, default=RESULTS, metavar="FILE", help="where the result goes")
    parser.add_argument("--seconds", type=float, default=8.0, help="time for one kind of work, about")
    args = parser.parse_args(argv)
    write_json(args.json, run(args.seconds), table="work")


if __name__ == "__main__":
    main()
