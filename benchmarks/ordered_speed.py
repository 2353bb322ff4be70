"""A training step of an ordered VAE against that of a plain one, in time and memory.

The perceptron 784-512-256 with 32 latents on batches of 256 images. Steps are those of `fit`, and all have the same
fused Adam; "by hand" is a plain VAE in a torch loop without Pyro.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from benchmarks.by_hand import Step, adam_step
from benchmarks.ordered_latents import RECIPE, build, fit_arguments
from benchmarks.record import header, markdown_table, rounded, write_json
from benchmarks.timing import interleaved_medians, peak_bytes
from pyro_vnd.autoencoders.vae import PriorLatents
from pyro_vnd.infer import fit

RESULTS = Path(__file__).parent / "results" / "ordered_speed.json"
STEPS = 20  # of one call of `fit`, which also sets things up

LABELS = {
    "by_hand": "plain VAE, by hand without Pyro",
    "plain": "plain VAE",
    "plain_learned_prior": "plain VAE, our prior",
    "fixed_uniform": "nested dropout, uniform",
    "vnd": "ours",
    "vnd_simple_prior": "ours, N(0, 1) prior",
}
OTHER_PRIORS: dict[str, tuple[str, PriorLatents]] = {
    "plain_learned_prior": ("plain", "autoregressive"),
    "vnd_simple_prior": ("vnd", "independent"),
}
TARGETS = {
    "time of ours / plain": ("seconds", "plain", 1.15),
    "time of ours / plain, our prior": ("seconds", "plain_learned_prior", 1.15),
    "memory of ours / plain": ("peak_mib", "plain", 1.1),
}


def steps_of(name: str, x: Tensor) -> Callable[[int], object]:
    """Return a function that takes a number of steps of a VAE."""
    method, prior = OTHER_PRIORS.get(name, (name, None))
    vae = build("vae", method, x.shape[-1], RECIPE, prior)
    arguments = fit_arguments("vae", method, RECIPE) | {"num_epochs": 1, "optimizer": None}
    guide = vae.guide

    def take(num_steps: int) -> None:
        fit(vae, guide, x[: num_steps * RECIPE.batch_size], **arguments, progress=False)

    return take


def step_by_hand(image_size: int) -> Step:
    """Make a step of the plain VAE in bare torch, which takes a batch of images."""
    vae = build("vae", "plain", image_size, RECIPE)
    whole = torch.ones(vae.num_latents)

    def loss(x: Tensor) -> Tensor:
        loc, raw_scale = vae.encoder.heads(vae.encoder.body(x)).chunk(2, -1)
        q = Normal(loc, torch.nn.functional.softplus(raw_scale) + 1e-4, validate_args=False)
        pixels = vae.likelihood_given(q.rsample(), whole)
        prior = Normal(torch.zeros_like(loc), 1.0, validate_args=False)
        return kl_divergence(q, prior).sum() - pixels.log_prob(x).sum()

    return adam_step(vae.parameters(), loss, RECIPE.lr)


def steps_by_hand(x: Tensor) -> Callable[[int], object]:
    """Return a function that takes a number of steps of the plain VAE in bare torch."""
    step = step_by_hand(x.shape[-1])

    def take(num_steps: int) -> None:
        for batch in x[: num_steps * RECIPE.batch_size].split(RECIPE.batch_size):
            step(batch)

    return take


def run(seconds: float, threads: int) -> dict[str, Any]:
    """Time everything and return the result; threads and random numbers are then as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            x = torch.rand(STEPS * RECIPE.batch_size, 1, 28, 28)
            takers = {"by_hand": steps_by_hand(x)} | {name: steps_of(name, x) for name in LABELS if name != "by_hand"}
            clock: dict[str, Any] = {} if threads == 1 else {"clock": perf_counter}
            many = {name: partial(take, STEPS) for name, take in takers.items()}
            times = interleaved_medians(many, seconds=seconds, min_rounds=5, **clock)
            peaks = {name: peak_bytes(partial(take, 2)) / 2**20 for name, take in takers.items()}
            about = header("benchmarks.ordered_speed")  # which names the threads, so before they change back
    finally:
        torch.set_num_threads(before)
    result: dict[str, Any] = {
        "header": about,
        "seconds": {name: rounded(value / STEPS) for name, value in times.items()},
        "peak_mib": {name: rounded(value) for name, value in peaks.items()},
    }
    result["targets"] = [
        {"what": what, "value": rounded(result[of]["vnd"] / result[of][reference]), "limit": limit}
        for what, (of, reference, limit) in TARGETS.items()
    ]
    return result


def markdown(result: dict[str, Any], two_threads: dict[str, Any] | None = None) -> str:
    """Format a result as a table, with the times of another run beside its own."""
    heads = ["time / plain", "peak memory, MiB"] + (["time / plain, two threads"] if two_threads else [])
    body = []
    for name, label in LABELS.items():
        times = [f"{run['seconds'][name] / run['seconds']['plain']:.2f}" for run in (result, two_threads) if run]
        body.append([label, times[0], f"{result['peak_mib'][name]:.1f}", *times[1:]])
    return markdown_table(["one training step", *heads], body)


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark and write its result."""
    torch.set_flush_denormal(True)  # as in the fits: latents that nothing needs have ever smaller numbers
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ordered_speed", description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, default=RESULTS, metavar="FILE", help="where the result goes")
    parser.add_argument("--seconds", type=float, default=60, help="time to spend, about")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads; the fits have one")
    args = parser.parse_args(argv)
    args.json.parent.mkdir(parents=True, exist_ok=True)
    result = run(args.seconds, args.threads)
    write_json(args.json, result)
    print(markdown(result))
    for row in result["targets"]:
        print(f"{row['what']}: {row['value']:.2f}, at most {row['limit']:g}")


if __name__ == "__main__":
    main()
