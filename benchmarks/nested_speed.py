"""One training step of a nested net, and a forward pass of a narrowed one, against plain torch.

A perceptron with two hidden layers of 2,048 units on batches of 1,024 images, in one run on this machine. Ratios are
to the deterministic dense net's step, with the same fused Adam; "by hand" is a torch loop of the same mathematics.
"""

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import pyro
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.by_hand import BayesianNet, adam_step
from benchmarks.record import header, markdown_table, rounded, write_json
from benchmarks.timing import interleaved_medians, peak_bytes
from models.nets import mlp
from pyro_vnd.infer import LocalReparameterization, NestedELBO, module_local_params
from pyro_vnd.nn import NestedClassifier, NestedNet, narrow, nest

RESULTS = Path(__file__).parent / "results" / "nested_speed.json"
HIDDEN, BATCH, BLOCKS, NUM_DATA = 2048, 1024, 16, 60_000
CYCLE = tuple(k / BLOCKS for k in range(1, BLOCKS + 1))  # widths of the sliced steps: every one of a uniform budget

Step = Callable[[], object]
LABELS = {
    "plain": "plain torch, deterministic",
    "dense": "nested, a mask an example, local reparameterisation",
    "dense_by_hand": "the same by hand",
    "dense_weight_noise": "nested, a mask an example, weight noise",
    "weight_noise_by_hand": "the same by hand",
    "sliced": "nested, sliced, widths 1/16, ..., 1 in turn",
    "sliced_weight_noise": "the same, weight noise",
}
TARGETS = (
    ("dense step / plain", "dense", "plain", 2.3),
    ("sliced step / plain", "sliced", "plain", 1.0),
    ("dense step / by hand", "dense", "dense_by_hand", 1.25),
    ("narrowed to 1/4 / built at 1/4", "narrowed", "built", 1.1),
    ("narrowed to 1/4 / whole", "narrowed", "whole", 0.25),
)


def plain_net(hidden: int = HIDDEN) -> nn.Sequential:
    """Return the plain net."""
    return mlp(784, hidden=(hidden, hidden))


def plain_step(x: Tensor, y: Tensor) -> Step:
    """Make a step of the deterministic net."""
    net = plain_net()
    return partial(adam_step(net.parameters(), lambda x, y: F.cross_entropy(net(x), y)), x, y)


def nested_step(x: Tensor, y: Tensor, *, local: bool, sliced: bool = False) -> Step:
    """Make a step of the nested net, or, if sliced, a cycle of steps of different widths."""
    net = nest(plain_net(), x[:1], num_blocks=BLOCKS, mask_per="batch" if sliced else "example")
    model, guide = NestedClassifier(net), net.guide
    optimizer = torch.optim.Adam(net.parameters(), fused=True)
    widths: tuple[float | None, ...] = CYCLE if sliced else (None,)

    def step() -> None:
        with module_local_params(model, guide):
            for width in widths:
                optimizer.zero_grad()
                with (
                    LocalReparameterization() if local else nullcontext(),
                    nullcontext() if width is None else net.cut(width, sliced=True),
                    pyro.poutine.scale(scale=1 / NUM_DATA),
                ):
                    loss = NestedELBO()(model, guide)(x, y)
                loss.backward()
                optimizer.step()

    return step


def step_by_hand(x: Tensor, y: Tensor, *, local: bool) -> Step:
    """Make a step of the same objective in bare torch: local reparameterisation, masks, both KLs."""
    net = BayesianNet(plain_net(), local=local, num_blocks=BLOCKS, num_data=NUM_DATA)
    return partial(adam_step(net.parameters(), net.loss), x, y)


def forward_of(net: nn.Module, x: Tensor) -> Step:
    """Make a forward pass without gradients."""

    def forward() -> None:
        with torch.inference_mode():
            net(x)

    return forward


def run(seconds: float, threads: int) -> dict[str, Any]:
    """Time everything and return the result; threads, random numbers and validation are then as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        # Without validation, as for any long training.
        with torch.random.fork_rng(), pyro.validation_enabled(False):
            torch.manual_seed(0)
            return _measure(seconds, threads)
    finally:
        torch.set_num_threads(before)


def _measure(seconds: float, threads: int) -> dict[str, Any]:
    x, y = torch.rand(BATCH, 1, 28, 28), torch.randint(10, (BATCH,))
    steps = {
        "plain": plain_step(x, y),
        "dense": nested_step(x, y, local=True),
        "dense_by_hand": step_by_hand(x, y, local=True),
        "dense_weight_noise": nested_step(x, y, local=False),
        "weight_noise_by_hand": step_by_hand(x, y, local=False),
        "sliced": nested_step(x, y, local=True, sliced=True),
        "sliced_weight_noise": nested_step(x, y, local=False, sliced=True),
    }
    # One thread's own time leaves out waiting for a core, but counts the work of no other thread.
    clock: dict[str, Any] = {} if threads == 1 else {"clock": perf_counter}
    times = interleaved_medians(steps, seconds=seconds, min_rounds=5, **clock)
    for name in times:
        if name.startswith("sliced"):
            times[name] /= len(CYCLE)
    net: NestedNet = nest(plain_net(), x[:1], num_blocks=BLOCKS)
    passes = {
        "whole": forward_of(narrow(net, 1.0), x),
        "narrowed": forward_of(narrow(net, 0.25), x),
        "built": forward_of(plain_net(HIDDEN // 4), x),
    }
    times |= interleaved_medians(passes, seconds=seconds / 4, min_rounds=20, **clock)
    return {
        "header": header("benchmarks.nested_speed"),
        "seconds": {name: rounded(value) for name, value in times.items()},
        "ratio": {name: rounded(times[name] / times["plain"]) for name in steps},
        "peak_mib": {name: rounded(peak_bytes(step) / 2**20) for name, step in (steps | passes).items()},
        "targets": [
            {"what": what, "value": rounded(times[one] / times[other]), "limit": limit}
            for what, one, other, limit in TARGETS
        ],
    }


def markdown(result: dict[str, Any]) -> str:
    """Format the result as tables."""
    steps = markdown_table(
        ["one training step", "time / plain", "peak memory, MiB"],
        [[label, f"{result['ratio'][name]:.2f}", f"{result['peak_mib'][name]:.0f}"] for name, label in LABELS.items()],
    )
    targets = markdown_table(
        ["ratio", "measured", "target"],
        [[row["what"], f"{row['value']:.2f}", f"at most {row['limit']:g}"] for row in result["targets"]],
    )
    return f"{steps}\n\n{targets}"


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark, write its result and print its tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.nested_speed", description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, default=RESULTS, metavar="FILE", help="where the result goes")
    parser.add_argument("--seconds", type=float, default=120, help="time to spend on steps, about")
    parser.add_argument("--threads", type=int, default=2, help="torch's threads")
    args = parser.parse_args(argv)
    args.json.parent.mkdir(parents=True, exist_ok=True)
    result = run(args.seconds, args.threads)
    write_json(args.json, result)
    print(markdown(result))


if __name__ == "__main__":
    main()
