"""Speed beside loops written by hand and beside other libraries, against what was aimed at.

    python -m benchmarks.peers [--json FILE] [--seconds S] [--repeats R] [--only WORK ...]

Each work is done by ours and by others in interleaved blocks in one process, and this several times: CPU time, float32,
one torch thread, argument validation off. Only ratios within one run mean something. Training steps are those of a
loop over shuffled batches, the same fused Adam for all, one draw a step, the KL in the loss: ours those of `fit`, less
what a fit does once, which is the difference between fits of 2n and of n steps.

The other libraries have pins on old versions of torch, so they go without into an environment of their own:

    python -m venv peers && . peers/bin/activate
    pip install -c constraints.txt -e ".[bench]" pydantic imageio
    pip install --no-deps bayesian-torch==0.5.0 blitz-bayesian-pytorch==0.2.8 pythae==0.1.2 torch-uncertainty==0.13.0 \
        tyxe==0.0.2

Libraries that are not installed are left out. With `--only` rows that are not measured stay as they are in FILE.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import pyro
import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks import nest_cost as nest_costs
from benchmarks import ordered_speed, predictions
from benchmarks.by_hand import BayesianNet, Step, adam_step
from benchmarks.mask_methods import REFERENCE, timing_rows
from benchmarks.ordered_latents import RECIPE
from benchmarks.peer_nets import (
    PACKAGES,
    bayesian_torch_step,
    blitz_step,
    pythae_step,
    torch_uncertainty_step,
    tyxe_step,
)
from benchmarks.record import header, markdown_table, rounded, write_json
from benchmarks.timing import interleaved_medians, peak_bytes
from models.nets import lenet, mlp
from pyro_vnd.autoencoders import OrderedVAE, mlp_bodies
from pyro_vnd.infer import MaskSchedule, NestedELBO, fit
from pyro_vnd.nn import NestedClassifier, nest

__all__ = ["WORKS", "markdown", "run"]

Take = Callable[[int], object]  # takes a number of steps
Measure = Callable[[float], dict[str, float]]  # what each method costs, in a time about to be spent

RESULTS = Path(__file__).parent / "results" / "peers.json"
NUM_DATA, BLOCKS, MIN_ROUNDS = 60_000, 16, 5
LOCAL, NOISE = "local reparameterisation", "weight noise"
SHAPE = (1, 28, 28)


@dataclass(frozen=True)
class Net:
    """A net to train, and how it is timed.

    Attributes:
        make: Makes the plain net.
        shape: Shape of an input.
        batch_size: Rows of a batch.
        steps: Steps of the shorter of two fits, n.
    """

    make: Callable[[], nn.Sequential]
    shape: tuple[int, ...]
    batch_size: int
    steps: int


@dataclass(frozen=True)
class Work:
    """Something that ours and others do.

    Attributes:
        what: What it is.
        prepare: Makes ready what ours and others do, given their names, and returns what measures them.
        rows: Ours and another, by name, and the most that the first may cost in terms of the second.
        unit: Of the costs, "s" or "bytes".
    """

    what: str
    prepare: Callable[[list[str]], Measure]
    rows: tuple[tuple[str, str, float], ...]
    unit: str = "s"

    def methods(self) -> list[str]:
        """Return the names in the rows, but for libraries that are not installed."""
        names = dict.fromkeys(name for *pair, _ in self.rows for name in pair)
        return [name for name in names if name not in PACKAGES or _version(name)]


PEERS: dict[str, Callable[[nn.Sequential, Tensor, int], Step]] = {
    "TyXe": tyxe_step,
    "bayesian-torch": bayesian_torch_step,
    "blitz": blitz_step,
    "torch-uncertainty": torch_uncertainty_step,
}
NETS = {
    "mlp_128": Net(mlp, SHAPE, 128, 8),
    "mlp_1024": Net(mlp, SHAPE, 1024, 2),
    "lenet_64": Net(lenet, SHAPE, 64, 4),
    "wide": Net(partial(mlp, hidden=(2048, 2048)), SHAPE, 1024, 1),
    "tiny": Net(partial(mlp, 8, hidden=(16, 16)), (8,), 2, 50),
}
VAE_STEPS = 4


def steps_of_fit(model: Any, data: tuple[Tensor, ...], batch_size: int, **arguments: Any) -> Take:
    """Return a function that fits a model for a number of steps, one epoch of as many batches."""

    def take(num_steps: int) -> None:
        fit(
            model,
            model.guide,
            tuple(x[: num_steps * batch_size] for x in data),
            num_epochs=1,
            batch_size=batch_size,
            lr=1e-3,
            optimizer=partial(torch.optim.Adam, fused=True),
            progress=False,
            **arguments,
        )

    return take


def steps_of_loop(step: Step, data: tuple[Tensor, ...], batch_size: int) -> Take:
    """Return a function that takes a number of steps on shuffled batches, as `fit` does."""

    def take(num_steps: int) -> None:
        for rows in torch.randperm(num_steps * batch_size).split(batch_size):
            step(*(x.index_select(0, rows) for x in data))

    return take


def _net_steps(name: str, methods: list[str]) -> dict[str, Take]:
    net, found = NETS[name], dict[str, Take]()
    x = torch.rand(2 * net.steps * net.batch_size, *net.shape)
    data = (x, torch.randint(10, (len(x),)))
    for method in methods:
        if method in (LOCAL, NOISE):
            model = NestedClassifier(nest(net.make(), x[:1], num_blocks=BLOCKS))
            found[method] = steps_of_fit(model, data, net.batch_size, elbo=NestedELBO(local_reparam=method == LOCAL))
        else:
            make = PEERS.get(method, _step_by_hand)
            found[method] = steps_of_loop(make(net.make(), x[:1], NUM_DATA), data, net.batch_size)
    return found


def _step_by_hand(net: nn.Sequential, example: Tensor, num_data: int) -> Step:
    bayesian = BayesianNet(net, local=True, num_blocks=BLOCKS, num_data=num_data)
    return adam_step(bayesian.parameters(), bayesian.loss)


def _vae_steps(methods: list[str]) -> dict[str, Take]:
    data = (torch.rand(2 * VAE_STEPS * RECIPE.batch_size, *SHAPE),)
    others = {
        "by hand": partial(ordered_speed.step_by_hand, SHAPE[-1]),
        "pythae": partial(pythae_step, SHAPE, RECIPE.num_latents, RECIPE.lr),
    }
    vae = OrderedVAE(SHAPE, RECIPE.num_latents, bodies=mlp_bodies(SHAPE))
    found = {"": steps_of_fit(vae, data, RECIPE.batch_size, schedule=MaskSchedule())}
    loops = {name: steps_of_loop(make(), data, RECIPE.batch_size) for name, make in others.items() if name in methods}
    return found | loops


def _times_of_steps(takes: dict[str, Take], num_steps: int) -> Measure:
    functions = {f"{name} {n}": partial(take, n * num_steps) for name, take in takes.items() for n in (1, 2)}

    def measure(seconds: float) -> dict[str, float]:
        times = interleaved_medians(functions, seconds=seconds, min_rounds=MIN_ROUNDS)
        return {name: (times[f"{name} 2"] - times[f"{name} 1"]) / num_steps for name in takes}

    return measure


def _net_work(name: str, what: str, *rows: tuple[str, str, float]) -> Work:
    def prepare(methods: list[str]) -> Measure:
        return _times_of_steps(_net_steps(name, methods), NETS[name].steps)

    return Work(f"a step of {what}, batch {NETS[name].batch_size:,}", prepare, rows)


def _memory(name: str, methods: list[str]) -> Measure:
    # Steps are made anew for each repeat, so that all allocate their Adam's state: two numbers for each mean and scale.
    state = 4 * sum(parameter.nbytes for parameter in NETS[name].make().parameters())
    return lambda seconds: {
        key: peak_bytes(partial(take, 2)) - state for key, take in _net_steps(name, methods).items()
    }


def _mask_times(methods: list[str]) -> Measure:
    names = {"": "straight_through_logistic", "by hand": REFERENCE}

    def measure(seconds: float) -> dict[str, float]:
        rows = timing_rows("draw_backward", "per_row", 1, 32, seconds=seconds, min_rounds=MIN_ROUNDS)
        times = {row["method"]: row["median_seconds"] for row in rows}
        return {name: times[method] for name, method in names.items()}

    return measure


def _times(make: Callable[[], dict[str, Callable[[], object]]], methods: list[str]) -> Measure:
    functions = make()
    return lambda seconds: interleaved_medians(functions, seconds=seconds, min_rounds=MIN_ROUNDS)


AHEAD = 1.0
PERCEPTRON = "the perceptron 784-512-512-10"
WORKS = {
    "mlp_128": _net_work(
        "mlp_128",
        PERCEPTRON,
        (LOCAL, "by hand", 1.12),
        (LOCAL, "TyXe", AHEAD),
        *((NOISE, name, AHEAD) for name in ("bayesian-torch", "blitz", "torch-uncertainty")),
    ),
    "mlp_1024": _net_work(
        "mlp_1024",
        PERCEPTRON,
        (LOCAL, "by hand", 1.05),
        (LOCAL, "TyXe", AHEAD),
        *((NOISE, name, AHEAD) for name in ("bayesian-torch", "blitz", "torch-uncertainty")),
    ),
    "lenet_64": _net_work(
        "lenet_64",
        "LeNet",
        (LOCAL, "by hand", 1.05),
        (LOCAL, "TyXe", AHEAD),
        (NOISE, "bayesian-torch", 1.1),
        (NOISE, "blitz", AHEAD),
        (NOISE, "torch-uncertainty", AHEAD),
    ),
    "tiny": _net_work("tiny", "the perceptron 8-16-16-10", (LOCAL, "by hand", 1.8)),
    "vae": Work(
        "a step of an ordered VAE, against plain ones",
        lambda methods: _times_of_steps(_vae_steps(methods), VAE_STEPS),
        (("", "by hand", 1.25), ("", "pythae", 1.2)),
    ),
    "draws": Work(
        "100 draws of 10,000 inputs, learned laws",
        partial(_times, predictions.draws_of_inputs),
        (("ours", "by hand", 1.2),),
    ),
    "widths": Work(
        "`evaluate_widths`, one width, 1,000 inputs",
        partial(_times, predictions.scores_at_a_width),
        (("ours", "by hand", 1.3),),
    ),
    "one_input": Work(
        "one input at width 1/4", partial(_times, predictions.one_input_at_a_width), (("ours", "built so", 2.0),)
    ),
    "mask": Work("a mask of 32 units, draw and backward", _mask_times, (("", "by hand", 1.4),)),
    "memory": Work(
        "peak memory of steps of the perceptron 784-2048-2048-10, batch 1,024, beyond the optimiser's state",
        partial(_memory, "wide"),
        ((LOCAL, "by hand", 0.76), (LOCAL, "TyXe", 0.56)),
        "bytes",
    ),
}


def run(names: list[str], seconds: float, repeats: int) -> dict[str, Any]:
    """Measure works and return what goes into the JSON file; threads and random numbers are then as before."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    try:
        about = header("benchmarks.peers")
        with torch.random.fork_rng(), pyro.validation_enabled(False), tqdm(names) as works:
            torch.manual_seed(0)
            for name in works:
                works.set_description(name)
                rows += _rows(name, WORKS[name], seconds, repeats)
    finally:
        torch.set_num_threads(threads)
    packages = {name: found for name in PACKAGES if (found := _version(name))}
    return {"header": about, "packages": packages, "rows": rows}


def _rows(name: str, work: Work, seconds: float, repeats: int) -> list[dict[str, Any]]:
    methods = work.methods()
    measure = work.prepare(methods)
    costs = [measure(seconds) for _ in range(repeats)]
    return [
        {
            "work": name,
            "ours": ours,
            "theirs": theirs,
            "cost_of_ours": rounded(median(each[ours] for each in costs)),
            "cost_of_theirs": rounded(median(each[theirs] for each in costs)),
            "ratios": [rounded(each[ours] / each[theirs]) for each in costs],
        }
        for ours, theirs, _ in work.rows
        if theirs in methods
    ]


def _version(library: str) -> str | None:
    try:
        return version(PACKAGES[library])
    except PackageNotFoundError:
        return None


def merged(whole: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    """Put the rows of a run of some works in place of theirs in an earlier result, and its header beside the first."""
    rows = {_key(row): row for row in [*whole["rows"], *part["rows"]]}
    return {
        **whole,
        "later_headers": [*whole.get("later_headers", []), part["header"]],
        "packages": whole["packages"] | part["packages"],
        "rows": [rows[key] for key in _keys() if key in rows],
    }


def _keys() -> list[tuple[str, str, str]]:
    return [(name, ours, theirs) for name, work in WORKS.items() for ours, theirs, _ in work.rows]


def _key(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["work"], row["ours"], row["theirs"]


def markdown(result: dict[str, Any], nest_cost: dict[str, Any] | None = None) -> str:
    """Format a result as a table, with how `nest` grows from a result of `benchmarks.nest_cost`."""
    found, body = {_key(row): row for row in result["rows"]}, []
    for name, ours, theirs, limit in ((name, *row) for name, work in WORKS.items() for row in work.rows):
        what = f"{WORKS[name].what}, {ours}" if ours in (LOCAL, NOISE) else WORKS[name].what
        row = found.get((name, ours, theirs))
        if row is None:
            missing = theirs in PACKAGES and theirs not in result["packages"]
            cells = ["not installed" if missing else "not measured", *[""] * 4]
        else:
            cells = _cells(row, WORKS[name].unit, limit)
        body.append([what, theirs, *cells[:-1], f"{limit:g}", cells[-1]])
    if nest_cost is not None:
        for row in nest_cost["depths"]:
            met = _yes(row["exponent"] <= nest_costs.EXPONENT)
            what = f"`nest`, exponent of its time in the layers of a {row['net']}"
            body.append([what, "", "", "", f"{row['exponent']:.2f}", "", f"{nest_costs.EXPONENT:g}", met])
    packages = ", ".join(f"{name} {number}" for name, number in result["packages"].items())
    table = markdown_table(["work", "against", "ours", "theirs", "ours / theirs", "of repeats", "at most", "met"], body)
    return f"Of the libraries: {packages or 'none'}.\n\n{table}"


def _cells(row: dict[str, Any], unit: str, limit: float) -> list[str]:
    ratio, costs = median(row["ratios"]), (row["cost_of_ours"], row["cost_of_theirs"])
    shown = [f"{cost / 2**20:.1f} MiB" if unit == "bytes" else _time(cost) for cost in costs]
    return [*shown, f"{ratio:.2f}", f"{min(row['ratios']):.2f} to {max(row['ratios']):.2f}", _yes(ratio <= limit)]


def _time(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{1e6 * seconds:.0f} μs"
    return f"{1e3 * seconds:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _yes(met: bool) -> str:
    return "yes" if met else "no"


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark, write its result and print its table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, default=RESULTS, metavar="FILE", help="where the result goes")
    parser.add_argument("--seconds", type=float, default=10, help="time for a repeat of a work, about")
    parser.add_argument("--repeats", type=int, default=5, help="how often each work is measured")
    parser.add_argument(
        "--only", nargs="+", choices=WORKS, metavar="WORK", help="measure these; others keep their rows"
    )
    args = parser.parse_args(argv)
    result = run(args.only or list(WORKS), args.seconds, args.repeats)
    if args.only and args.json.exists():
        result = merged(json.loads(args.json.read_text()), result)
    args.json.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.json, result, table="rows")
    print(markdown(result))


if __name__ == "__main__":
    main()
