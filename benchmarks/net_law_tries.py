"""Three trainings in which a learned law of a net's widths might be worth something, on the validation part.

Each is compared with fractions that are the same in all groups, at equal multiply-adds:

- priced: a law for each group, tilted by a price per multiply-add, q(L | price) ~ exp(v(L) - price cost(L)); prices are
  random by row, v is learned by gradient with the weights, and a price then picks the widths of both layers;
- path: widths by layer that a greedy search on half of the validation part finds best for their cost, and a net that is
  trained along them, in place of equal fractions;
- by_input: a head on the first layer's features, or on the narrowest net's logits, too, that is regressed on the NLL of
  the training rows at each width; a price then picks the width of each row.

    python -m benchmarks.net_law_tries
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.nested_fits import Data, Recipe, build, fit_nested, nested
from benchmarks.net_law import RECIPE, TRIES, cost
from benchmarks.recipes import kept_rows, read_arguments, write_rows
from benchmarks.record import rounded
from models.ood import Part
from pyro_vnd.distributions import OrderedMask, OrderedMaskStraightThrough
from pyro_vnd.nn import NestedNet, Width, narrow

RESULTS = Path(__file__).parent / "results" / "net_law_tries.json"
PARTS = Path("results") / "net_law_tries"
COSTS = (1 / 16, 1 / 8, 1 / 4, 1 / 2)  # of the multiply-adds of the whole net
PRICES = (0.05, 250.0)  # of all multiply-adds, in nats of the KL of lengths
GRID = (1, 2, 3, 4, 6, 8, 12, 16)  # blocks of each layer in the search
CHOICES = (1, 2, 4, 8, 16)  # blocks that a row may get
HEAD = 32  # hidden units of the head that chooses
DRAWS = 10

Labelled = tuple[Tensor, Tensor]
Curve = Sequence[tuple[float, float, float]]  # cost, NLL, accuracy


class PricedWidth(Width):
    """A width whose laws, given and learned, are tilted by prices by row, while there are any."""

    prices: Tensor | None
    costs: Tensor

    def _tilted(self, logits: Tensor) -> Tensor:
        return logits if self.prices is None else logits - self.prices.unsqueeze(-1) * self.costs

    @property
    def prior(self) -> OrderedMask:
        """Prior law given the price: exp(-price cost)."""
        return OrderedMask(logits=self._tilted(self.prior_logits), validate_args=False)

    @property
    def posterior(self) -> OrderedMaskStraightThrough:
        """Learned law given the price."""
        return OrderedMaskStraightThrough(self.temperature, logits=self._tilted(self.logits), validate_args=False)


def add_prices(net: NestedNet, size: int) -> None:
    """Tilt the laws of a net; in training each row has a price, log-uniform, and the same one for both layers.

    What a block costs is read along equal fractions: the part of it that both layers share is halved.
    """
    blocks = np.arange(1, 17)
    alone = (cost(blocks, 0, size), cost(0, blocks, size))
    shared = cost(blocks, blocks, size) - sum(alone)
    for width, own in zip(net.widths.values(), alone, strict=True):
        width.__class__ = PricedWidth
        width.register_buffer("prices", None, persistent=False)
        width.register_buffer("costs", torch.tensor(own + shared / 2).float(), persistent=False)

    def draw(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        low, high = np.log(PRICES)
        prices = torch.empty(len(inputs[0])).uniform_(low, high).exp()
        for width in net.widths.values():
            width.prices = prices

    net.guide.register_forward_pre_hook(draw)


def score(net: NestedNet, rows: Labelled, blocks: tuple[int, int], draws: int = DRAWS) -> tuple[Tensor, Tensor]:
    """Return the NLL of each row, and whether it is right, with so many blocks of each layer."""
    width = dict(zip(net.widths, blocks, strict=True))
    torch.manual_seed(0)
    logits = torch.cat([net.predict(x, width=width, num_samples=draws) for x in rows[0].split(2500)], 1)
    log_probs = logits.log_softmax(-1).logsumexp(0) - np.log(draws)
    return -log_probs.gather(-1, rows[1][:, None])[:, 0], log_probs.argmax(-1) == rows[1]


def curve(net: NestedNet, rows: Labelled, points: Mapping[tuple[int, int], float]) -> Curve:
    """Score a net at several widths of its layers, whose costs are given."""
    found = []
    for blocks, share in points.items():
        nll, right = score(net, rows, blocks)
        found.append((share, nll.mean().item(), right.float().mean().item()))
    return sorted(found)


def at_cost(found: Curve, share: float) -> dict[str, float]:
    """Return NLL and accuracy at a cost, between the points on both sides of it on the log scale, if there are such."""
    costs, *scores = (np.array(column) for column in zip(*found, strict=True))
    if not costs[0] <= share <= costs[-1]:
        return {}
    values = (float(np.interp(np.log(share), np.log(costs), column)) for column in scores)
    return dict(zip(("nll", "accuracy"), values, strict=True))


def equal_fractions(net: NestedNet, rows: Labelled, size: int) -> Curve:
    """Score a net at all fractions that are the same in both layers."""
    return curve(net, rows, {(k, k): cost(k, k, size) for k in range(1, 17)})


def fitted(seed: int, data: Data, recipe: Recipe, learned: float, change: Callable[[NestedNet], None]) -> NestedNet:
    """Fit the MLP, changed beforehand, with a share of masks from its laws."""
    torch.manual_seed(seed)
    net = nested(build("mlp", data.image_size), data, recipe)
    change(net)
    fit_nested(net, seed, data, recipe, recipe.schedule(learned))
    return net


def priced(seed: int, data: Data, recipe: Recipe, plain: NestedNet) -> Iterator[tuple[str, Curve]]:
    """Learn laws under random prices, of which each picks mean lengths."""
    size = data.image_size
    net = fitted(seed, data, recipe, 0.25, partial(add_prices, size=size))
    means: dict[tuple[int, int], float] = {}
    modes: dict[tuple[int, int], float] = {}
    for price in np.geomspace(*PRICES, 100):
        for width in net.widths.values():
            width.prices = torch.tensor([price]).float()
        laws = [width.posterior for width in net.widths.values()]
        for points, (first, second) in (
            (means, [round(law.mean_length.item()) for law in laws]),
            (modes, [int(law.probs.argmax().item()) + 1 for law in laws]),
        ):
            points[first, second] = cost(first, second, size)
    print("mean widths by price:", *means, "modes:", *modes, flush=True)
    yield "equal fractions", equal_fractions(plain, data.scored, size)
    yield "equal fractions, trained under prices", equal_fractions(net, data.scored, size)
    yield "mean widths given a price", curve(net, data.scored, means)
    yield "most probable widths given a price", curve(net, data.scored, modes)


def greedy_steps(nll: Mapping[tuple[int, int], float], size: int) -> list[tuple[int, int]]:
    """Widen from one block a layer on, each time the layer that gains most for its cost, and return the steps."""
    wider = dict(pairwise(GRID))
    steps = [(GRID[0], GRID[0])]
    while steps[-1] != (GRID[-1], GRID[-1]):
        here = steps[-1]
        first, second = here
        ahead = [(wider[first], second)] if first in wider else []
        ahead += [(first, wider[second])] if second in wider else []
        gains = [(nll[here] - nll[a, b]) / (cost(a, b, size) - cost(first, second, size)) for a, b in ahead]
        steps.append(ahead[int(np.argmax(gains))])
    return steps


def units_along(steps: Sequence[tuple[int, int]], size: int) -> list[tuple[int, int]]:
    """Return units of both layers, between steps, whose costs are nearest to those of the sixteen equal fractions."""
    between = [
        (round(32 * (a + t * (c - a))), round(32 * (b + t * (d - b))))
        for (a, b), (c, d) in pairwise(steps)
        for t in np.linspace(0, 1, 33)
    ]
    costs = np.array([cost(a / 32, b / 32, size) for a, b in between])
    return [between[int(np.argmin(abs(costs - cost(k, k, size))))] for k in range(1, 17)]


def path(seed: int, data: Data, recipe: Recipe, plain: NestedNet) -> Iterator[tuple[str, Curve]]:
    """Search widths by layer on one half of the rows, and train a net along them; the other half is scored."""
    size, (searched, rest) = data.image_size, halves(data.scored)
    nll = {(a, b): score(plain, searched, (a, b))[0].mean().item() for a in GRID for b in GRID}
    steps = greedy_steps(nll, size)
    units = units_along(steps, size)
    print("units of the path:", *units, flush=True)

    def follow(net: NestedNet) -> None:
        for width, sizes in zip(net.widths.values(), np.diff([(0, 0), *units], axis=0).T.tolist(), strict=True):
            width.sizes = tuple(sizes)
            width.entries = torch.repeat_interleave(torch.arange(16), torch.tensor(sizes))

    net = fitted(seed, data, recipe, 0, follow)
    yield "equal fractions", equal_fractions(plain, rest, size)
    yield "the path, not trained along it", curve(plain, rest, {step: cost(*step, size) for step in steps})
    along = {(k, k): cost(a / 32, b / 32, size) for k, (a, b) in enumerate(units, 1)}
    yield "the path, trained along it", curve(net, rest, along)


def by_input(seed: int, data: Data, recipe: Recipe, plain: NestedNet) -> Iterator[tuple[str, Curve]]:
    """Regress heads on the NLL of rows at each width; where they are held out, it is one half of the rows.

    Costs are with those of the choice, whatever is chosen: the head, and the narrowest net but for its first layer,
    which wider ones share.
    """
    size, (held_out, rest) = data.image_size, halves(data.scored)
    narrowest = narrow(plain, CHOICES[0])
    shares = torch.tensor([cost(k, k, size) for k in CHOICES])
    nll, right = (
        torch.stack(column, -1) for column in zip(*(score(plain, rest, (k, k)) for k in CHOICES), strict=True)
    )

    def mixed(values: Tensor, extra: float = 0.0, order: Tensor | None = None) -> Curve:
        found: list[Any] = []
        for price in np.geomspace(1e-3, 1e2, 200):
            choice = (values + price * shares).argmin(-1)[slice(None) if order is None else order]
            picked = (each.gather(-1, choice[:, None]).float().mean().item() for each in (nll, right))
            found.append((extra + shares[choice].mean().item(), *picked))
        return sorted(found)

    yield "equal fractions", equal_fractions(plain, rest, size)
    first = nn.Sequential(*list(narrowest.children())[:3])
    features: dict[str, Callable[[Tensor], Tensor]] = {
        "first layer": first,
        "narrowest net": lambda x: torch.cat([first(x), narrowest(x)], -1),
    }
    one = cost(0, 1 / 320, size)  # multiply-add, as a share: a unit of the second layer alone has ten
    for source, rows in (("training", data.train), ("held-out", held_out)):
        wanted = torch.stack([score(plain, rows, (k, k))[0] for k in CHOICES], -1)
        for name, read in features.items():
            torch.manual_seed(seed)
            with torch.no_grad():
                inputs, own = read(rows[0]), read(rest[0])
            head = regress(inputs, wanted)
            with torch.no_grad():
                values = head(own)
            extra = one * HEAD * (inputs.shape[-1] + len(CHOICES))
            if name == "narrowest net":
                extra += cost(CHOICES[0], CHOICES[0], size) - cost(CHOICES[0], 0, size)
            yield f"by input, {name}, {source} rows", mixed(values, extra)
            yield f"by input, {name}, {source} rows, shuffled", mixed(values, extra, torch.randperm(len(values)))
    yield "by input, the NLL known", mixed(nll)


def regress(inputs: Tensor, wanted: Tensor, steps: int = 3000) -> nn.Module:
    """Fit a small head to the NLL at each width."""
    standard = nn.BatchNorm1d(inputs.shape[-1], affine=False, momentum=None)
    head = nn.Sequential(standard, nn.Linear(inputs.shape[-1], HEAD), nn.ReLU(), nn.Linear(HEAD, wanted.shape[-1]))
    optimizer = torch.optim.Adam(head.parameters(), lr=3e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        rows = torch.randint(len(inputs), (256,))
        loss = (head(inputs[rows]) - wanted[rows]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return head.eval()


def halves(rows: Labelled) -> tuple[Labelled, Labelled]:
    """Return the first and the second half of rows."""
    (x, more_x), (y, more_y) = (part.chunk(2) for part in rows)
    return (x, y), (more_x, more_y)


def rows(name: str, seed: int, data: Data, recipe: Recipe, plain: Callable[[], NestedNet]) -> Iterator[dict[str, Any]]:
    """Run one try: a row for each way to choose widths, cost and metric."""
    run_try = {"priced": priced, "path": path, "by_input": by_input}[name]
    for method, found in run_try(seed, data, recipe, plain()):
        for share in COSTS:
            for metric, value in at_cost(found, share).items():
                base = {"data": data.name, "try": name, "method": method, "seed": seed, "cost": share}
                yield base | {"metric": metric, "value": rounded(value)}


def run(name: str, tries: Sequence[str], seeds: range, recipe: Recipe, part: Part, join: bool) -> list[dict[str, Any]]:
    """Run what is not done yet, unless rows are only to be joined, and return all rows."""
    data = Data.load(name, part)
    result: list[dict[str, Any]] = []
    for seed in seeds:
        plain = cache(partial(fitted, seed, data, recipe, 0, lambda net: None))
        for each in tries:
            make = None if join else partial(rows, each, seed, data, recipe, plain)
            result += kept_rows(PARTS / part / f"{name}-{each}-{seed}.json", asdict(recipe), make)
    return result


def main(argv: list[str] | None = None) -> None:
    """Run the tries and write their rows."""
    torch.set_flush_denormal(True)
    about = __doc__.partition("\n")[0]
    args = read_arguments(
        "benchmarks.net_law_tries", about, {"tries": tuple(TRIES)}, Recipe, RESULTS, argv, "validation"
    )
    recipe = replace(RECIPE, **args.changes)
    result = run(args.data, args.tries, args.seeds, recipe, args.part, args.join)
    write_rows(args, "benchmarks.net_law_tries", result, {"recipe": asdict(recipe)})


if __name__ == "__main__":
    main()
