"""Command line: `python -m models` lists the models, `demo` and `nest` train some of them on real images."""

import argparse
import sys
from pathlib import Path
from typing import TypeAlias

import torch

from models import datasets, demo, nested_zoo
from models.nets import NETS
from pyro_vnd.infer import NonFiniteLossError

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"  # it has no public name

MODELS = {
    "demo": "a Bayesian classifier of any width and an OrderedVAE, trained and compared (models/demo)",
    "nest": f"an ordinary net made Bayesian and cuttable (models/nested_zoo.py): {', '.join(NETS)}",
    "MaskedPerceptron": "Bayesian classifier of any width, its masks written out (models/masked_perceptron.py)",
    "OrderedRegression": "regression whose order is learned, and known exactly (models/order_selection.py)",
    "GaussianMixture": "mixture whose number of components is learned (models/mixture.py)",
    "Autoregression": "autoregression whose order is learned (models/autoregression.py)",
    "FactorModel": "Bayesian principal components whose rank is learned (models/factor_model.py)",
    "MatryoshkaEmbedding": "embedding of images that can be cut anywhere (models/matryoshka.py)",
}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code: 2, after one line, where something about the request is wrong."""
    parser = argparse.ArgumentParser(prog="python -m models", description="Complete models with learned order.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    _add_demo(commands)
    _add_nest(commands)
    options = parser.parse_args(arguments)
    if options.command is None:
        for name, description in MODELS.items():
            print(f"{name:20}{description}")
        parser.print_usage()
        return 0
    try:
        options.run(options)
    except (ValueError, OSError, NonFiniteLossError) as error:
        reason = str(error).partition("\n")[0]  # Pyro adds the shapes of all sites
        print(f"{parser.prog} {options.command}: {reason}", file=sys.stderr)
        return 2
    return 0


def _add_demo(commands: Commands) -> None:
    command = commands.add_parser("demo", help="train both models on real images and write a report")
    command.add_argument("--data", default="digits", metavar="NAME", help=f"one of {', '.join(demo.SETTINGS)}")
    command.add_argument("--out", type=Path, default=Path("results/demo"), metavar="DIR", help="default: %(default)s")
    command.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    command.add_argument("--quick", action="store_true", help="train for a few steps only, to see that all runs")
    command.set_defaults(run=_run_demo)


def _run_demo(options: argparse.Namespace) -> None:
    _use_one_thread()
    demo.run(options.data, options.out, seed=options.seed, quick=options.quick)


def _add_nest(commands: Commands) -> None:
    command = commands.add_parser("nest", help="nest a net, train it on real images, score and narrow it")
    command.add_argument("net", metavar="NET", help=f"one of {', '.join(NETS)}")
    command.add_argument("--data", default="digits", metavar="NAME", help=f"one of {', '.join(datasets.NAMES)}")
    command.add_argument("--epochs", type=int, metavar="N", help="default: as the data set needs")
    command.add_argument(
        "--widths",
        type=float,
        nargs="+",
        default=nested_zoo.WIDTHS,
        metavar="W",
        help=f"shares of the units in (0, 1]; default: {' '.join(map(str, nested_zoo.WIDTHS))}",
    )
    command.add_argument("--full", action="store_true", help="the published sizes, which want a GPU but for the least")
    command.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="default: %(default)s")
    command.add_argument("--out", type=Path, metavar="DIR", help="default: results/nest/NET")
    command.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    command.set_defaults(run=_run_nest)


def _run_nest(options: argparse.Namespace) -> None:
    if not options.full:
        _use_one_thread()
    nested_zoo.run(
        options.net,
        options.data,
        options.out or Path("results/nest") / options.net,
        widths=options.widths,
        epochs=options.epochs,
        size="full" if options.full else "small",
        device=options.device,
        seed=options.seed,
    )


def _use_one_thread() -> None:
    # Small nets do not gain from a second thread, and on a busy machine threads wait for each other.
    torch.set_num_threads(1)


if __name__ == "__main__":
    sys.exit(main())
