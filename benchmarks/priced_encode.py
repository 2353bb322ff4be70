"""What lengths at a price cost: the law of codes with the value head, over that without.

The perceptron 784-512-256 with 32 latents on batches of 256 images, in evaluation mode and without gradients.
"""

import argparse

import torch

from benchmarks.timing import interleaved_medians
from pyro_vnd.autoencoders import OrderedVAE

BATCH_SIZE, NUM_LATENTS = 256, 32
LIMIT = 1.1


def run(seconds: float) -> dict[str, float]:
    """Return the seconds of an encode without lengths, with those of a price, and with those of a mean length."""
    x = torch.rand(BATCH_SIZE, 1, 28, 28)
    with torch.random.fork_rng(), torch.no_grad():
        plain = OrderedVAE((1, 28, 28), NUM_LATENTS, posterior_lengths="prior").eval()
        priced = OrderedVAE((1, 28, 28), NUM_LATENTS, posterior_lengths="priced").eval()
        head = priced.encoder.value_head
        assert head is not None
        head.calibrate(torch.randn(100, NUM_LATENTS).cumsum(-1))
        ways = {
            "plain": lambda: plain.encode(x),
            "head": lambda: priced.encode(x),
            "price": lambda: priced.encode(x, price=1.0),
            "mean length": lambda: priced.encode(x, mean_length=4.0),
        }
        return interleaved_medians(ways, seconds=seconds, min_rounds=5)


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark and print its result."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.priced_encode", description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=20, help="time to spend, about")
    times = run(parser.parse_args(argv).seconds)
    for name, value in times.items():
        print(f"{name}: {1e3 * value:.3f} ms, {value / times['plain']:.3f} of plain, at most {LIMIT:g}")


if __name__ == "__main__":
    main()
