"""How far the learned law of the order of a regression is from the exact one, which has a closed form.

    python -m benchmarks.order_law            all problems, three seeds: ten minutes and more
    python -m benchmarks.order_law --quick    few problems and epochs, to see that all runs

The measure is the total variation (TV) of the two laws, half the sum of the absolute differences of probabilities.
"""

import argparse
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from time import thread_time
from typing import Any

import torch
from pyro.infer import TraceEnum_ELBO, config_enumerate
from sklearn.datasets import load_diabetes, load_wine  # type: ignore[import-untyped]
from torch import Tensor

from benchmarks.record import header, markdown_table, rounded, write_json
from models.order_selection import OrderedRegression
from pyro_vnd.distributions import OrderedMask
from pyro_vnd.infer import (
    AutoNested,
    Callback,
    LengthCollapseWarning,
    NestedELBO,
    OptimizerSettings,
    PoorFitWarning,
    Run,
    cosine_to_zero,
    fit,
)

__all__ = [
    "METHODS",
    "Problem",
    "diabetes",
    "learned_law",
    "markdown",
    "random_problem",
    "run",
    "total_variation",
    "wine",
]

RESULTS = Path(__file__).parent / "results" / "order_law.json"
NUM_RANDOM = 20

METHODS = {
    "conditional": "`AutoNested(model)`, `fit` as it is",
    "mean_field": "mean field, `fit` as it is",
    "mean_field_500": "mean field, recipe of the first",
    "enumerated": "mean field, every length enumerated, recipe of the first",
}
GROUPS = {"diabetes": "diabetes", "wine": "wine", "random": "{} random"}


@dataclass(frozen=True)
class Problem:
    """Data of an ordered regression, float32.

    Attributes:
        name: Its name; those that start alike are reported together.
        features: Shape (N, K), in their order.
        y: Shape (N,).
        noise: Deviation of the noise.
        weight_scale: Prior deviation of a weight.
    """

    name: str
    features: Tensor
    y: Tensor
    noise: float
    weight_scale: float

    def model(self, *, known_noise: bool = True) -> OrderedRegression:
        """Return the model, in which the noise is known or a latent."""
        prior = OrderedMask.uniform(self.features.shape[1], dtype=self.features.dtype)
        return OrderedRegression(prior, self.noise if known_noise else None, self.weight_scale)


def diabetes() -> Problem:
    """Progression of diabetes by ten measurements, those first that explain most beside the ones before them."""
    columns = [2, 8, 3, 4, 1, 5, 6, 7, 9, 0]
    data = load_diabetes()
    features, y = (_standardised(torch.tensor(part)) for part in (data.data, data.target))
    return Problem("diabetes", features[:, columns], y, noise=0.72, weight_scale=0.5)


def wine() -> Problem:
    """Alcohol in wines by twelve other measurements, in an order of the same kind."""
    columns = [12, 9, 1, 3, 11, 8, 10, 2, 7, 5, 6, 4]
    data = _standardised(torch.tensor(load_wine().data))
    return Problem("wine", data[:, columns], data[:, 0], noise=0.66, weight_scale=0.5)


def _standardised(x: Tensor) -> Tensor:
    return ((x - x.mean(0)) / x.std(0, correction=0)).float()


def random_problem(seed: int, correlation: float = 0.9) -> Problem:
    """Draw 30 to 500 rows of 4 to 15 correlated features, an order, and weights and noise that are large or small.

    All features are correlated alike, or, for odd seeds, like the values of an autoregression.
    """
    generator = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    k, n = number(4, 15), number(30, 500)
    place = torch.arange(k, dtype=torch.float64)
    distance = (place.unsqueeze(-1) - place).abs()
    covariance = correlation ** (distance if seed % 2 else distance.sign())
    features = normal(n, k) @ torch.linalg.cholesky(covariance).T
    weights = normal(k) * (place < number(1, k)) * (1.0 if seed % 3 else 0.3)
    noise = 0.5 if seed % 4 < 2 else 1.5
    y = features @ weights + noise * normal(n)
    return Problem(f"random {seed}", features.float(), y.float(), noise, weight_scale=1.0)


def learned_law(
    method: str, model: OrderedRegression, features: Tensor, y: Tensor, *, seed: int = 0, **changes: Any
) -> OrderedMask:
    """Fit a guide by one of `METHODS` and return its law of the order; `changes` are arguments of `fit`."""
    # "conditional" needs none of this, which is what `fit` does for it: epochs, optimiser, and draws of each length.
    optimizer = OptimizerSettings(partial(torch.optim.Adam, betas=(0.9, 0.95)), lr_schedule=cosine_to_zero())
    same: dict[str, Any] = {"num_epochs": 500, "lr": 0.1, "optimizer": optimizer}
    draws: dict[str, Any] = {"num_particles": 4, "vectorize_particles": True, "max_plate_nesting": 1}
    choices: dict[str, tuple[Callable[[], AutoNested], dict[str, Any]]] = {
        "conditional": (partial(AutoNested, model), {}),
        "mean_field": (partial(AutoNested, model, latents="mean_field"), {}),
        "mean_field_500": (partial(AutoNested, model, latents="mean_field"), same | {"elbo": NestedELBO(**draws)}),
        "enumerated": (
            partial(AutoNested, config_enumerate(model), latents="mean_field"),
            same | {"elbo": TraceEnum_ELBO(**draws)},
        ),
    }
    make, arguments = choices[method]
    guide = make()
    with warnings.catch_warnings():
        for far_off in (LengthCollapseWarning, PoorFitWarning):  # how far the law then is, is what is measured
            warnings.simplefilter("ignore", far_off)
        fit(model, guide, (features, y), seed=seed, **arguments | {"progress": False} | changes)
    return guide.laws["mask"]


def total_variation(p: OrderedMask, q: OrderedMask) -> float:
    """Return half the sum of the absolute differences of the probabilities."""
    return (p.probs.double() - q.probs.double()).abs().sum().item() / 2


def run(
    problems: list[Problem], seeds: range, *, rounds: int = 7, timed_epochs: int = 100, **changes: Any
) -> dict[str, Any]:
    """Fit everything and return the result; threads are then as before.

    Args:
        problems: What to fit; the smallest and the largest one are timed, too.
        seeds: Seeds of the fits.
        rounds: Rounds of timing, in each of which every method is fitted once.
        timed_epochs: Epochs of these fits.
        changes: Arguments of `fit` for all methods, to make it quick.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        about = header("benchmarks.order_law")
        rows = [row for problem in problems for row in _rows(problem, seeds, changes)]
        times = [_times(problem, rounds, timed_epochs) for problem in _smallest_and_largest(problems)]
        return {"header": about, "timed_epochs": timed_epochs, "times": times, "rows": rows}
    finally:
        torch.set_num_threads(threads)


def _rows(problem: Problem, seeds: range, changes: dict[str, Any]) -> Iterator[dict[str, Any]]:
    print(problem.name, flush=True)
    data = problem.features, problem.y
    # With a latent noise things are much the same, and one seed of the fits as they are is enough to see it.
    for noise, methods, some in (("known", list(METHODS), seeds), ("latent", list(METHODS)[:2], seeds[:1])):
        model = problem.model(known_noise=noise == "known")
        exact = model.order_posterior(*data)
        for method in methods:
            for seed in some:
                tv = total_variation(learned_law(method, model, *data, seed=seed, **changes), exact)
                row = {"problem": problem.name, "shape": list(problem.features.shape), "noise": noise}
                yield row | {"method": method, "seed": seed, "tv": rounded(tv)}


def _smallest_and_largest(problems: list[Problem]) -> list[Problem]:
    """Return the problems with the fewest and the most entries."""
    ordered = sorted(problems, key=lambda problem: problem.features.numel())
    return [ordered[0], ordered[-1]]


class _Stopwatch(Callback):
    """CPU time of training, without the estimate of k-hat after it, which only some guides have."""

    seconds = 0.0

    def on_fit_start(self, run: Run) -> None:
        """Start it."""
        self.seconds = -thread_time()

    def on_fit_end(self, run: Run) -> None:
        """Stop it."""
        self.seconds += thread_time()


def _times(problem: Problem, rounds: int, num_epochs: int) -> dict[str, Any]:
    """Time fits of as many epochs by all methods in turn: CPU time, and its ratios within each round."""
    seconds: dict[str, list[float]] = {method: [] for method in METHODS}
    model = problem.model()
    for round_ in range(rounds + 1):
        for method, found in seconds.items():
            watch = _Stopwatch()
            learned_law(method, model, problem.features, problem.y, num_epochs=num_epochs, callbacks=[watch])
            if round_:  # the first one sets things up
                found.append(watch.seconds)
    ratios = {
        method: sorted(a / b for a, b in zip(found, seconds["mean_field"], strict=True))
        for method, found in seconds.items()
    }
    return {
        "problem": problem.name,
        "shape": list(problem.features.shape),
        "ms_per_epoch": {name: rounded(1000 * median(found) / num_epochs) for name, found in seconds.items()},
        "ratio": {name: [rounded(median(r)), rounded(r[0]), rounded(r[-1])] for name, r in ratios.items()},
    }


def markdown(result: dict[str, Any]) -> str:
    """Format a result as three tables: distances with known and with latent noise, and times."""
    parts = []
    for noise, text in (("known", "The noise is known"), ("latent", "The noise is a latent, too")):
        rows = [row for row in result["rows"] if row["noise"] == noise]
        methods = {method: label for method, label in METHODS.items() if any(row["method"] == method for row in rows)}
        heads, cells = [], {method: [label] for method, label in methods.items()}
        for group, label in GROUPS.items():
            if mine := [row for row in rows if row["problem"].startswith(group)]:
                heads.append(label.format(len({row["problem"] for row in mine})))
                for method in methods:
                    found = [row["tv"] for row in mine if row["method"] == method]
                    cells[method].append(f"{median(found):.3f}, {max(found):.3f}")
        seeds = len({row["seed"] for row in rows})
        about = f"{text}. Total variation, {seeds} {'seed' if seeds == 1 else 'seeds'} a problem: median, largest."
        parts += [about, markdown_table(["guide", *heads], cells.values())]
    times = result["times"]
    heads = [f"{time['problem']}, {time['shape'][0]} x {time['shape'][1]}" for time in times]
    cells = {
        method: [label] + ["{:.2f} ({:.2f} to {:.2f})".format(*time["ratio"][method]) for time in times]
        for method, label in METHODS.items()
    }
    about = (
        f"CPU time of a fit of {result['timed_epochs']} epochs over that of mean field, `fit` as it is, in the same "
        "round: median (lowest to highest)."
    )
    return "\n\n".join([*parts, about, markdown_table(["guide", *heads], cells.values())])


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark and write its result."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.order_law", description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, default=RESULTS, metavar="FILE", help="where the result goes")
    parser.add_argument("--quick", action="store_true", help="few problems and epochs, to see that all runs")
    args = parser.parse_args(argv)
    if args.quick and args.json == RESULTS:
        parser.error("--quick needs --json FILE: the committed result is of the whole benchmark")
    args.json.parent.mkdir(parents=True, exist_ok=True)
    if args.quick:
        result = run([diabetes(), random_problem(0)], range(1), rounds=1, timed_epochs=3, num_epochs=3)
    else:
        random = [random_problem(seed) for seed in range(NUM_RANDOM)]
        result = run([diabetes(), wine(), *random], range(3))
    write_json(args.json, result, table="rows")
    print(markdown(result))


if __name__ == "__main__":
    main()
