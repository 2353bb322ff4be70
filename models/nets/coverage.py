"""Which nets of torchvision, timm and transformers nest as they are, how exactly, and how small they become.

    python -m models.nets.coverage                      all of them; rows that are there are measured anew
    python -m models.nets.coverage --missing            those without a row, after an interruption say
    python -m models.nets.coverage --only timm swin_t   a source, or nets by their names

Needs the extra `coverage`, best in an environment of its own: the three packages bind versions of torch. Each net has
random weights and a process of its own, is nested with the defaults, narrowed to a quarter of its width at a draw of
its posterior, compared with the masked net and with the plain net whose dropped weights are zero, and takes a step of
training. Beside it, in another process of bounded memory and time, the same net through torch-pruning's dependency
graph with its defaults.
"""

import argparse
import copy
import json
import math
import multiprocessing
import resource
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro import distributions as dist
from pyro import poutine
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.record import header, markdown_table, rounded, write_json
from models.nets.coverage_nets import NETS, Example, build
from pyro_vnd.infer import module_local_params
from pyro_vnd.nn import NestedNet, narrow, nest

__all__ = ["markdown", "measure"]

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "coverage.json"
PACKAGES = ("timm", "torch", "torch-pruning", "torchvision", "transformers")
WIDTH = 0.25
EXACT = 1e-4  # the largest relative difference, in float32, that counts as none
SMALL = 0.2  # share of the parameters
LONGEST = 500  # characters of a message
PRUNING_BYTES, PRUNING_SECONDS = 8 * 2**30, 60.0  # torch-pruning took 23 GB for one net
TARGETS = {  # source: how many nest exactly, and how many of them become small
    "torchvision": (78, 72),
    "torchvision, segmentation and video": (7, 0),
    "timm": (85, 75),
    "transformers": (9, 9),
}


def shaken(net: nn.Module) -> nn.Module:
    """Give constants that nets start from other values, so that no part of a net is multiplied by zero or nearly so."""
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if not parameter.is_floating_point():
                continue
            if name.endswith("bias"):
                parameter.normal_(std=0.02)  # large ones would hide what comes from the input
            elif parameter.dim() < 2:
                parameter.uniform_(0.5, 1.5)
            elif parameter.std() < 1e-3:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
        for name, buffer in net.named_buffers():
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
    return net


def outputs(returned: Any) -> Tensor:
    """Join all numbers that a net returns: tensors, and what is in tuples, mappings and data classes."""
    if isinstance(returned, Tensor):
        return returned.flatten() if returned.is_floating_point() else returned.new_zeros(0)
    inner = returned.values() if isinstance(returned, Mapping) else returned
    if isinstance(inner, str | bytes) or not hasattr(inner, "__iter__"):
        return torch.zeros(0)
    return torch.cat([outputs(each).float() for each in inner] or [torch.zeros(0)])


def measure(plain: nn.Module, example: Example) -> dict[str, Any]:
    """Nest a net with the defaults and see what it becomes.

    Args:
        plain: The net.
        example: Its arguments, of two rows at least.

    Returns:
        whole_share, what is left of the parameters at a single block of each group; max_difference and
        zeroed_difference of a quarter of the width, relative to the largest output, the latter None where norms over
        channels make the zeroed net another one; share_of_parameters left at it; groups; trained; seconds to nest; and
        warned, what was left whole because it could not be followed, "" if nothing was.
    """
    plain = plain.eval()
    with torch.no_grad():
        before = outputs(plain(*example))
    start = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        net = nest(plain, example)
    seconds = time.perf_counter() - start
    warned = next((str(each.message) for each in caught if str(each.message).startswith("nest:")), "")
    count = sum(parameter.numel() for parameter in plain.parameters())
    row = {"whole_share": rounded(sum(p.numel() for p in narrow(net, 1).parameters()) / count)}
    with torch.no_grad(), net.cut(WIDTH, rounding="nearest"), poutine.block():
        draw = net.guide(*example)
        masked = outputs(poutine.condition(net, data=draw)(*example))
    narrowed = narrow(net, WIDTH, draw, rounding="nearest").eval()
    with torch.no_grad():
        cut = outputs(narrowed(*example))
    row["max_difference"] = rounded(_difference(cut, masked))
    zeroed = _zeroed(net, plain, draw)
    if zeroed is not None:
        with torch.no_grad():
            row["zeroed_difference"] = rounded(_difference(cut, outputs(zeroed(*example))))
        del zeroed
    row["changed"] = rounded(_difference(cut, before))
    row["share_of_parameters"] = rounded(sum(p.numel() for p in narrowed.parameters()) / count)
    row["groups"] = len(net.widths)
    del narrowed, draw
    row["trained"] = _trains(net, example)
    return {"nested": True, **row, "seconds": rounded(seconds), "warned": warned}


def _difference(one: Tensor, other: Tensor) -> float:
    if one.shape != other.shape or not (one.isfinite().all() and other.isfinite().all()):
        return math.inf
    return ((one - other).abs().max() / other.abs().max().clamp_min(1e-30)).item()


def _zeroed(net: NestedNet, plain: nn.Module, draw: Mapping[str, Tensor]) -> nn.Module | None:
    """Return the plain net with the weights of a draw, zero where they read what is dropped; None if it is another."""
    modules = dict(plain.named_modules())
    norms = {type(part).__name__ for part in modules.values() if "norm" in type(part).__name__.lower()}
    if any("batch" not in name.lower() for name in norms) or net.reads or not net.layers.keys() <= modules.keys():
        return None
    kept = {name: width.kept_units(WIDTH, "nearest") for name, width in net.widths.items()}
    zeroed = copy.deepcopy(plain)
    with torch.no_grad():
        for name, layer in net.layers.items():
            part = zeroed.get_submodule(name)
            for key, value in part.named_parameters(recurse=False):
                value.copy_(draw.get(f"{name}.{key}", value))
            index, dim = layer.input_axis.index(kept), 0 if layer.transposed else 1
            weight: Any = part.weight
            if index is not None and weight.shape[dim] == layer.input_axis.size:  # a grouped one is cut by its outputs
                is_kept = torch.zeros(weight.shape[dim], dtype=torch.bool)
                is_kept[index] = True
                weight.index_fill_(dim, (~is_kept).nonzero().flatten(), 0.0)
    return zeroed


def _trains(net: NestedNet, example: Example) -> bool:
    """Take a step of training; say whether the ELBO is finite and all layers moved."""

    def model(*inputs: Any) -> None:
        mean = outputs(net(*inputs))
        pyro.sample("y", dist.Normal(mean, 1.0).to_event(1), obs=torch.ones_like(mean))

    net.train()
    with module_local_params(model, net.guide):
        programs: Any = model, net.guide
        loss = pyro.infer.Trace_ELBO()(*programs)(*example)
        loss.backward()
    means = [layer.plain.weight for layer in net.layers.values() if layer.output_axis.widths]
    reached = [mean for mean in means if mean.grad is not None and mean.grad.abs().max() > 0]
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.grad is not None:
                parameter.sub_(1e-6 * parameter.grad)
    finite = all(parameter.isfinite().all() for parameter in net.parameters())
    return bool(loss.isfinite()) and finite and len(reached) == len(means)


def measure_pruning(plain: nn.Module, example: Example) -> dict[str, Any]:
    """Prune a net by torch-pruning with its defaults to a quarter of its channels; return the share that is left."""
    import torch_pruning as tp

    plain = plain.eval()
    count = sum(parameter.numel() for parameter in plain.parameters())
    with torch.no_grad():
        before = outputs(plain(*example))
    names = [name for name, part in plain.named_modules() if isinstance(part, nn.Linear | nn.Conv2d | nn.Conv3d)]
    last = [plain.get_submodule(names[-1])]  # what makes the output stays whole
    inputs = example[0] if len(example) == 1 else example
    pruner = tp.pruner.BasePruner(
        plain, inputs, importance=tp.importance.MagnitudeImportance(), pruning_ratio=1 - WIDTH, ignored_layers=last
    )
    pruner.step()
    with torch.no_grad():
        after = outputs(plain(*example))
    if after.shape != before.shape:
        raise ValueError(f"the output has {after.numel()} numbers, {before.numel()} before it was pruned")
    return {"share_of_parameters": rounded(sum(p.numel() for p in plain.parameters()) / count)}


def row(source: str, name: str) -> dict[str, Any]:
    """Nest one net by its name; see `measure`."""
    plain, example = _built(source, name)
    count = sum(parameter.numel() for parameter in plain.parameters())
    sizes = {"parameters": count, "input": [list(each.shape) for each in example]}
    try:
        return sizes | measure(plain, example) | {"error": ""}
    except Exception as error:
        return sizes | {"nested": False, "error": f"{type(error).__name__}: {error}"[:LONGEST]}


def pruned(source: str, name: str) -> dict[str, Any]:
    """Prune one net by its name, in bounded memory; see `measure_pruning`."""
    resource.setrlimit(resource.RLIMIT_AS, (PRUNING_BYTES, PRUNING_BYTES))
    return measure_pruning(*_built(source, name)) | {"error": ""}


def _built(source: str, name: str) -> tuple[nn.Module, Example]:
    torch.manual_seed(0)
    plain, example = build(source, name)
    return shaken(plain), example


def run(nets: Sequence[tuple[str, str]], path: Path, timeout: float) -> dict[str, Any]:
    """Measure nets, each in processes of its own; the file is written after each of them."""
    result = json.loads(path.read_text()) if path.exists() else {"rows": []}
    result = {"header": header("models.nets.coverage"), "packages": {name: version(name) for name in PACKAGES}} | {
        "rows": result["rows"]
    }
    commit = result["header"]["revision"]["commit"]
    for package in PACKAGES:
        import_module(package.replace("-", "_"))
    order = {net: number for number, net in enumerate(NETS)}
    rows = {(each["source"], each["family"]): each for each in result["rows"]}
    for source, name in tqdm(nets, unit="net"):
        own = {"nested": False} | _of_process(row, source, name, timeout)
        pruning = _of_process(pruned, source, name, PRUNING_SECONDS)
        about = {"source": source, "family": name, "revision": commit and commit[:7]}
        rows[source, name] = about | own | {"pruning": pruning}
        result["rows"] = [rows[net] for net in sorted(rows.keys() & order.keys(), key=order.__getitem__)]
        write_json(path, result, table="rows")
    return result


def _of_process(made: Callable[..., dict[str, Any]], source: str, name: str, timeout: float) -> dict[str, Any]:
    """Return what a function says of a net in a process of its own, or why it said nothing."""
    context = multiprocessing.get_context("fork")  # which has the packages already
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_say, args=(sender, made, source, name))
    process.start()
    sender.close()
    try:
        if receiver.poll(timeout):
            return receiver.recv()
        return {"error": f"took longer than {timeout:.0f} s"}
    except EOFError:
        process.join()
        return {"error": f"the process ended with {process.exitcode}"}
    finally:
        process.kill()
        process.join()


def _say(sender: Any, made: Callable[..., dict[str, Any]], source: str, name: str) -> None:
    try:
        sender.send(made(source, name))
    except BaseException as error:  # such as want of memory
        sender.send({"error": f"{type(error).__name__}: {error}"[:LONGEST]})


def is_exact(row: Mapping[str, Any]) -> bool:
    """Say whether a net nests and its narrowed one computes what the masked one does."""
    differences = [row.get("max_difference", math.inf), row.get("zeroed_difference", 0.0)]
    return row["nested"] and max(differences) <= EXACT


def markdown(result: dict[str, Any]) -> str:
    """Format a result as tables: how many, and each net."""
    rows = result["rows"]
    summary = []
    for source, (exact, small) in TARGETS.items():
        own = [row for row in rows if row["source"] == source]
        fine = [row for row in own if is_exact(row)]
        smaller = [row for row in fine if row["share_of_parameters"] < SMALL]
        tried = [row["pruning"] for row in own if "pruning" in row]
        pruned = [each for each in tried if not each["error"]]
        smaller_pruned = [each for each in pruned if each["share_of_parameters"] < SMALL]
        trained = sum(row.get("trained", False) for row in fine)
        cells = [f"{len(fine)} ({exact})", f"{len(smaller)} ({small})" if small else f"{len(smaller)}", f"{trained}"]
        summary.append([source, f"{len(own)}", *cells, f"{len(pruned)} of {len(tried)}", f"{len(smaller_pruned)}"])
    head = ["source", "nets", "exact (target)", f"under {SMALL} (target)", "trained"]
    tables = [
        ", ".join(f"{name} {number}" for name, number in result["packages"].items())
        + f"; rows are of revisions {', '.join(sorted({str(row['revision']) for row in rows}))}.",
        markdown_table([*head, "torch-pruning runs", f"under {SMALL}"], summary),
    ]
    for source in TARGETS:
        own = [row for row in rows if row["source"] == source]
        head = ["net", "parameters", "difference", "zeroed", "left at 1/4", "whole", "nest, s", "torch-pruning leaves"]
        tables += [f"## {source}", markdown_table(head, list(map(_cells, own)))]
    return "\n\n".join(tables)


def _cells(row: dict[str, Any]) -> list[str]:
    pruning = row.get("pruning", {"error": "-"})
    pruned = "-" if pruning["error"] else f"{pruning['share_of_parameters']:.2f}"
    count = f"{row['parameters'] / 1e6:.1f} M" if "parameters" in row else "-"
    if not row["nested"]:
        return [f"`{row['family']}`", count, "does not nest", "", "", "", "", pruned]
    zeroed = f"{row['zeroed_difference']:.0e}" if "zeroed_difference" in row else ""
    left = [f"{row[key]:.2f}" for key in ("share_of_parameters", "whole_share")]
    difference = f"{row['max_difference']:.0e}" + ("" if row["trained"] else ", does not train")
    return [f"`{row['family']}`", count, difference, zeroed, *left, f"{row['seconds']:.1f}", pruned]


def main(argv: list[str] | None = None) -> None:
    """Measure the nets that are asked for, or print the tables of an earlier run."""
    parser = argparse.ArgumentParser(prog="python -m models.nets.coverage", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="sources, or nets")
    parser.add_argument("--missing", action="store_true", help="nets without a row, or whose row has an error")
    parser.add_argument("--json", type=Path, metavar="FILE", default=RESULTS, help="where the result goes")
    parser.add_argument("--timeout", type=float, default=1800.0, metavar="S", help="seconds for one net")
    args = parser.parse_args(argv)
    nets = [net for net in NETS if not args.only or set(net) & set(args.only)]
    if args.missing and args.json.exists():
        rows = json.loads(args.json.read_text())["rows"]
        fine = {(each["source"], each["family"]) for each in rows if not each["error"]}
        nets = [net for net in nets if net not in fine]
    if not nets and args.only:
        parser.error(f"--only: no net or source is called {' or '.join(args.only)}")
    print(markdown(run(nets, args.json, args.timeout)))


if __name__ == "__main__":
    main()
