"""What `nest` costs: time in forward passes of the net, memory in bytes of its parameters, and how both grow.

    python -m benchmarks.nest_cost [--json FILE] [--seconds S]

A pass is one of the net that is given, on the example that `nest` gets, in evaluation mode and without gradient.
Medians of interleaved blocks in one process: CPU time, float32, one torch thread, after a first call of each.
"""

import argparse
import gc
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.record import header, markdown_table, rounded, write_json
from benchmarks.timing import interleaved_medians, peak_bytes
from models.nets import mobilenet_v2, resnet18, vit
from models.nets.mobilenet import STAGES
from models.nets.residual import Residual
from pyro_vnd.nn import NestedNet, nest

__all__ = ["NETS", "markdown", "run"]

RESULTS = Path(__file__).parent / "results" / "nest_cost.json"
CLASSES = 1000
SIZES = ((224, 1), (224, 2), (64, 1), (64, 2))  # pixels, and examples
LAYERS, UNITS = (50, 100, 200), 32
PASSES, MEMORY, EXPONENT = 10.0, 1.2, 1.05  # at most


def large_resnet18(pixels: int) -> nn.Module:
    """Return ResNet-18 with the stem for ImageNet."""
    stem = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
    return nn.Sequential(*stem, *list(resnet18(num_classes=CLASSES))[3:])


def large_mobilenet_v2(pixels: int) -> nn.Module:
    """Return MobileNetV2 with the strides for ImageNet."""
    stages = [stage._replace(stride=2) if stage.channels == 24 else stage for stage in STAGES]
    rest = list(mobilenet_v2(num_classes=CLASSES, stages=stages))[1:]
    return nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1, bias=False), *rest)


def small_vit(pixels: int) -> nn.Module:
    """Return ViT-S with patches of 16 x 16."""
    return vit(num_classes=CLASSES, image_size=pixels, patch=16, dim=384, heads=6)


NETS: dict[str, Callable[[int], nn.Module]] = {
    "ResNet-18": large_resnet18,
    "MobileNetV2": large_mobilenet_v2,
    "ViT-S/16": small_vit,
}


def perceptron(layers: int) -> nn.Module:
    """Return a perceptron of equal layers."""
    hidden = [part for _ in range(layers - 1) for part in (nn.Linear(UNITS, UNITS), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(UNITS, 3))


def residual_net(layers: int) -> nn.Module:
    """Return a net of residual blocks of two layers each, all of one group."""
    blocks = [
        Residual(
            nn.Sequential(nn.Linear(UNITS, UNITS), nn.ReLU(), nn.Linear(UNITS, UNITS)), nn.Identity(), nn.Identity()
        )
        for _ in range(layers // 2 - 1)
    ]
    return nn.Sequential(nn.Linear(UNITS, UNITS), *blocks, nn.Linear(UNITS, 3))


class FusedAttention(nn.Module):
    """Attention of two heads whose queries, keys and values are made by one layer, as in timm's nets."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.size = 2, UNITS // 2
        self.qkv, self.out = nn.Linear(UNITS, 3 * UNITS), nn.Linear(UNITS, UNITS)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens, shape (N, T, UNITS), to tokens of the same shape."""
        rows, tokens, size = x.shape
        q, k, v = self.qkv(x).reshape(rows, tokens, 3, self.heads, self.size).permute(2, 0, 3, 1, 4).unbind(0)
        return self.out(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).reshape(rows, tokens, size))


def transformer(layers: int) -> nn.Module:
    """Return a net of attention and perceptrons of two layers in turn, on a single token."""
    parts = [
        Residual(part, nn.Identity(), nn.Identity())
        for _ in range(layers // 4)
        for part in (
            FusedAttention(),
            nn.Sequential(nn.Linear(UNITS, UNITS), nn.ReLU(), nn.Linear(UNITS, UNITS)),
        )
    ]
    return nn.Sequential(nn.Unflatten(1, (1, UNITS)), nn.Linear(UNITS, UNITS), *parts, nn.Linear(UNITS, 3))


DEEP: dict[str, Callable[[int], nn.Module]] = {
    "perceptron": perceptron,
    "residual net": residual_net,
    "transformer": transformer,
}


def tensor_bytes(net: nn.Module) -> int:
    """Return the bytes of all parameters and buffers, each once."""
    return sum(x.nbytes for x in {id(x): x for x in [*net.parameters(), *net.buffers()]}.values())


def run(seconds: float, min_rounds: int = 7) -> dict[str, Any]:
    """Measure everything and return the result; threads and random numbers are then as before."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            time = partial(interleaved_medians, seconds=seconds, min_rounds=min_rounds)
            return {
                "header": header("benchmarks.nest_cost"),
                "nets": [_cost(name, pixels, rows, time) for name in NETS for pixels, rows in SIZES],
                "depths": [_depths(name, time) for name in DEEP],
            }
    finally:
        torch.set_num_threads(threads)


def _cost(name: str, pixels: int, rows: int, time: Callable[..., dict[str, float]]) -> dict[str, Any]:
    net, x = NETS[name](pixels).eval(), torch.randn(rows, 3, pixels, pixels)
    forward = torch.no_grad()(partial(net, x))
    times = time({"forward": forward, "nest": partial(nest, net, x)})
    made: list[NestedNet] = []
    gc.collect()  # nets of before, which would be let go on the way
    peak = peak_bytes(lambda: made.append(nest(net, x)))
    parameters, held = sum(p.nbytes for p in net.parameters()), tensor_bytes(made[0])
    return {
        "net": name,
        "pixels": pixels,
        "examples": rows,
        "forward_seconds": rounded(times["forward"]),
        "nest_seconds": rounded(times["nest"]),
        "passes": rounded(times["nest"] / times["forward"]),
        "parameter_bytes": parameters,
        "held": rounded(held / parameters),
        "peak_beyond": rounded((peak - held) / parameters),
        "peak_of_a_pass": rounded(peak_bytes(forward) / parameters),
    }


def _depths(name: str, time: Callable[..., dict[str, float]]) -> dict[str, Any]:
    x: Tensor = torch.randn(2, UNITS)
    times = time({str(layers): partial(nest, DEEP[name](layers), x) for layers in LAYERS})
    growth = math.log(times[str(LAYERS[-1])] / times[str(LAYERS[0])]) / math.log(LAYERS[-1] / LAYERS[0])
    return {"net": name, "seconds": {k: rounded(v) for k, v in times.items()}, "exponent": rounded(growth)}


def markdown(result: dict[str, Any]) -> str:
    """Format the result as tables."""
    nets = markdown_table(
        [
            "net",
            "pixels",
            "examples",
            "one pass, ms",
            "nest, ms",
            "passes",
            "MB of parameters",
            "held",
            "peak beyond",
            "a pass",
        ],
        [
            [
                row["net"],
                f"{row['pixels']}",
                f"{row['examples']}",
                f"{1e3 * row['forward_seconds']:.1f}",
                f"{1e3 * row['nest_seconds']:.0f}",
                f"{row['passes']:.1f}",
                f"{row['parameter_bytes'] / 1e6:.1f}",
                f"{row['held']:.2f}",
                f"{row['peak_beyond']:.2f}",
                f"{row['peak_of_a_pass']:.2f}",
            ]
            for row in result["nets"]
        ],
    )
    depths = markdown_table(
        ["layers", *(row["net"] for row in result["depths"])],
        [
            *(
                [layers, *(f"{1e3 * row['seconds'][layers]:.0f} ms" for row in result["depths"])]
                for layers in _layers(result)
            ),
            ["exponent", *(f"{row['exponent']:.2f}" for row in result["depths"])],
        ],
    )
    missed = {
        f"{PASSES:g} passes": [_named(row) for row in result["nets"] if row["passes"] > PASSES],
        f"{MEMORY:g} times the parameters beyond what is held": [
            _named(row) for row in result["nets"] if row["peak_beyond"] > MEMORY
        ],
        f"an exponent of {EXPONENT:g}": [row["net"] for row in result["depths"] if row["exponent"] > EXPONENT],
    }
    kept = [f"- At most {bar}: " + (f"all but {', '.join(rows)}." if rows else "all.") for bar, rows in missed.items()]
    return "\n\n".join([nets, depths, "\n".join(kept)])


def _layers(result: dict[str, Any]) -> list[str]:
    return list(result["depths"][0]["seconds"])


def _named(row: dict[str, Any]) -> str:
    return f"{row['net']} of {row['examples']} x {row['pixels']} px"


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark, write its result and print its tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.nest_cost", description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, default=RESULTS, metavar="FILE", help="where the result goes")
    parser.add_argument("--seconds", type=float, default=3.0, help="time for one net at one size, about")
    args = parser.parse_args(argv)
    result = run(args.seconds)
    write_json(args.json, result, table="nets")
    print(markdown(result))


if __name__ == "__main__":
    main()
