"""Command line: `python -m models` lists the models, `python -m models demo` runs them on real images."""

import argparse
import sys
from pathlib import Path

import torch

from models import datasets, demo

MODELS = {
    "NestedClassifier": "Bayesian classifier that can be cut to any width (models/nested_classifier.py)",
    "OrderedVAE": "variational autoencoder whose code can be cut at any length (models/ordered_vae.py)",
}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code: 2, after one line, where something about the request is wrong."""
    parser = argparse.ArgumentParser(prog="python -m models", description="Complete models with learned order.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    command = commands.add_parser("demo", help="train both models on real images and write a report")
    command.add_argument("--data", default="digits", metavar="NAME", help=f"one of {', '.join(datasets.NAMES)}")
    command.add_argument("--out", type=Path, default=Path("results/demo"), metavar="DIR", help="default: %(default)s")
    command.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    command.add_argument("--quick", action="store_true", help="train for a few steps only, to see that all runs")
    options = parser.parse_args(arguments)
    if options.command is None:
        for name, description in MODELS.items():
            print(f"{name:18}{description}")
        parser.print_usage()
        return 0
    # These nets are too small to gain from a second thread, and on a busy machine threads wait for each other.
    torch.set_num_threads(1)
    try:
        demo.run(options.data, options.out, seed=options.seed, quick=options.quick)
    except (ValueError, OSError) as error:
        print(f"{parser.prog} demo: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
