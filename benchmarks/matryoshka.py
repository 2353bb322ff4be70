"""Embeddings that can be cut, learned lengths against a list of sizes: which images does a prefix find?

Every method has the same net, epochs, batches and optimiser; they differ in the prefixes that an image is seen through:

- plain: the whole embedding only; pca: principal components of that one, fitted on the training part;
- fixed_sizes: all powers of two, their losses summed, as in Matryoshka representation learning (its tied form);
- fixed_uniform: one of these, drawn anew for each image and step;
- fixed_octaves: one length in each octave, as many as fixed_sizes, drawn anew each time;
- vnd: ours, the same from laws that are learned;
- vnd_schedule: one length, from one law that is learned and from the budgets of a `MaskSchedule`.

Each is scored once more with a length by query: `distil_lengths` teaches it, on the training part, what lengths are
worth to an image, and queries have the lengths of the price that has a given mean length.

The training part is the index and the test part are the queries, compared by the cosine of prefixes. Recipes are
chosen with the validation part as queries and other seeds:

    python -m benchmarks.matryoshka --part validation --first-seed 10 --set length_weight=1 --json FILE

Each fit is kept in a file of its own as soon as it is done, so that a run that is interrupted goes on from there.
"""

import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.ordered_latents import PrincipalComponents
from benchmarks.recipes import kept_rows, read_arguments, write_rows
from benchmarks.record import markdown_table, rounded
from benchmarks.tables import Rows
from benchmarks.timing import interleaved_medians
from models.datasets import Dataset, Split, load
from models.matryoshka import MatryoshkaEmbedding, octaves
from models.ood import Part
from pyro_vnd.distributions import OrderedMask
from pyro_vnd.infer import (
    KLWeights,
    MaskSchedule,
    OptimizerSettings,
    cosine_to_zero,
    distil_lengths,
    fit,
    module_local_params,
)

RESULTS = Path(__file__).parent / "results" / "matryoshka.json"
PARTS = Path("results") / "matryoshka"
PREFIXES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)
LABELS = {
    "plain": "plain",
    "pca": "principal components of plain",
    "fixed_sizes": "list of sizes, summed",
    "fixed_uniform": "list of sizes, drawn",
    "fixed_octaves": "a length in each octave, drawn",
    "vnd": "ours, a length in each octave",
    "vnd_schedule": "ours, one length",
}
METHODS = tuple(method for method in LABELS if method != "pca")  # which comes with plain
METRICS = ("1-NN accuracy", "mAP@10", "classification accuracy")
BY_QUERY = ", length by query"  # the same metrics at a mean length


@dataclass(frozen=True)
class Recipe:
    """What all fits share, and what only ours have.

    Attributes:
        epochs: Passes over the training part.
        batch_size: Rows of a batch.
        lr: Largest learning rate of Adam, which rises for a twentieth of the steps and falls to zero on a cosine.
        num_dims: K.
        length_weight: Weight of the KL of the lengths.
        distil_steps: Steps in which what lengths are worth is learned.
    """

    epochs: int = 5
    batch_size: int = 256
    lr: float = 2e-3
    num_dims: int = 64
    length_weight: float = 0.1
    distil_steps: int = 2000


RECIPE = Recipe()


def views(method: str, num_dims: int) -> OrderedMask:
    """Return the law of the lengths of each of a method's views, which those of ours start from."""
    sizes = [2**j for j in range(1, num_dims.bit_length()) if 2**j < num_dims] + [num_dims]
    masses = torch.eye(num_dims)[[size - 1 for size in sizes]]  # each on one size
    return {
        "plain": OrderedMask(probs=masses[-1]),
        "fixed_sizes": OrderedMask(probs=masses),
        "fixed_uniform": OrderedMask(probs=masses.sum(0)),
        "fixed_octaves": octaves(num_dims),
        "vnd": octaves(num_dims),
        "vnd_schedule": OrderedMask(probs=1 / torch.arange(1, num_dims + 1)),
    }[method]


def train(method: str, seed: int, data: Dataset, recipe: Recipe) -> tuple[MatryoshkaEmbedding, OrderedMask, float]:
    """Fit one method; return the embedding, the law of its lengths, and the seconds that its thread ran."""
    torch.manual_seed(seed)
    lengths = views(method, recipe.num_dims)
    net = MatryoshkaEmbedding(data.image_shape, len(data.class_names), recipe.num_dims, lengths=lengths)
    guide = net.guide
    if not method.startswith("vnd"):
        with module_local_params(net, guide):
            guide(data.train.images[:1])  # makes the laws, which are left at what they are
        guide.requires_grad_(False)
    started = time.thread_time()
    fit(
        net,
        guide,
        data.train,
        num_epochs=recipe.epochs,
        batch_size=recipe.batch_size,
        lr=recipe.lr,
        optimizer=OptimizerSettings(lr_schedule=cosine_to_zero()),
        weights=KLWeights(lengths=recipe.length_weight),
        schedule=MaskSchedule(law="log-uniform") if method == "vnd_schedule" else None,
        seed=seed,
        progress=sys.stderr.isatty(),
    )
    seconds = time.thread_time() - started
    return net.eval(), net.length_law, seconds


def retrieval_accuracy(index: Split, queries: Split, top_k: int = 10, chunk_size: int = 500) -> dict[str, float]:
    r"""Score how well the neighbours of queries, by cosine, have their labels.

    $$\mathrm{mAP@}k = \frac1Q \sum_q
      \frac{\sum_{i \le k} r_{qi} \, \frac1i \sum_{j \le i} r_{qj}}{\sum_{i \le k} r_{qi}},$$

    where $r_{qi}$ says whether the i-th neighbour is of the query's class; a query without such a neighbour counts 0.

    Args:
        index: Embeddings, shape (N, D), and labels, shape (N,), among which neighbours are sought.
        queries: Embeddings, shape (Q, D), and labels, shape (Q,).
        top_k: Neighbours of a query, at most N.
        chunk_size: Queries that are compared at once.

    Returns:
        The share of queries whose nearest neighbour is of their class, and the mean average precision.

    Raises:
        ValueError: If shapes do not belong together, or `top_k` is not from 1 to N.

    Example:
        >>> index = Split(torch.tensor([[1.0, 0.1], [0.9, 0.3], [0.0, 1.0]]), torch.tensor([0, 1, 1]))
        >>> retrieval_accuracy(index, Split(torch.tensor([[0.0, 2.0]]), torch.tensor([1])), top_k=3)
        {'1-NN accuracy': 1.0, 'mAP@3': 1.0}
    """
    for name, part in (("index", index), ("queries", queries)):
        if part[0].dim() != 2 or part[1].shape != part[0].shape[:1] or part[0].shape[1] != index[0].shape[1]:
            shapes = [tuple(tensor.shape) for tensor in part]
            raise ValueError(
                f"argument `{name}` must be embeddings (N, D) and labels (N,), D the index's; got {shapes}"
            )
    if not 1 <= top_k <= len(index[0]):
        raise ValueError(f"argument `top_k` must be from 1 to {len(index[0])}, the rows of the index; got {top_k}")
    columns = normalize(index[0], dim=-1).T
    chunks = normalize(queries[0], dim=-1).split(chunk_size)
    found = torch.cat([(chunk @ columns).topk(top_k).indices for chunk in chunks])
    relevant = (index[1][found] == queries[1].unsqueeze(-1)).double()
    precision = relevant.cumsum(-1) / torch.arange(1, top_k + 1)
    average = (relevant * precision).sum(-1) / relevant.sum(-1).clamp_min(1)
    return {"1-NN accuracy": relevant[:, 0].mean().item(), f"mAP@{top_k}": average.mean().item()}


def principal_components(index: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
    """Return coordinates along the principal components of the index, the largest variance first."""
    num_dims = index.shape[1]
    components = PrincipalComponents(index, num_dims)
    return components.embed(index, num_dims), components.embed(queries, num_dims)


@torch.no_grad()
def rows(method: str, seed: int, data: Dataset, part: Part, recipe: Recipe) -> Iterator[dict[str, Any]]:
    """Fit a method and score it: one row a prefix and metric, for plain its principal components', too."""
    with torch.enable_grad():
        net, law, seconds = train(method, seed, data, recipe)
    whole, queries = net.narrow(recipe.num_dims), data.test if part == "test" else data.validation
    found = torch.cat([whole(images) for images in data.train.images.split(5000)])
    embeddings = {method: (found, whole(queries.images))}
    if method == "plain":
        embeddings["pca"] = principal_components(*embeddings["plain"])
    base = {"data": data.name, "model": "mlp", "method": method, "seed": seed}
    for name, (index, asked) in embeddings.items():
        for prefix in (k for k in PREFIXES if k <= recipe.num_dims):
            scores = retrieval_accuracy(
                Split(index[:, :prefix], data.train.labels), Split(asked[:, :prefix], queries.labels)
            )
            if name == method:
                lengths = torch.full_like(queries.labels, prefix)
                scores["classification accuracy"] = classification_accuracy(net, queries, lengths)
            for metric, value in scores.items():
                yield base | {"method": name, "prefix": prefix, "metric": metric, "value": rounded(value)}
    if method != "plain":
        distil_lengths(net, data.train, num_steps=recipe.distil_steps, progress=sys.stderr.isatty())
        labels = data.train.labels, queries.labels
        known, wanted = (Split(*pair) for pair in zip(embeddings[method], labels, strict=True))
        for prefix in (k for k in PREFIXES if 1 < k < recipe.num_dims):
            lengths = net.choose_lengths(queries.images, mean_length=prefix)
            scores = scores_by_query(known, wanted, lengths)
            scores["classification accuracy"] = classification_accuracy(net, queries, lengths)
            scores["mean length"] = lengths.double().mean().item()
            for metric, value in scores.items():
                yield base | {"prefix": prefix, "metric": metric + BY_QUERY, "value": rounded(value)}
    for metric, value in {
        "mean_length": law.mean_length.item(),
        "entropy_length": law.entropy().item(),
        "fit_thread_seconds": seconds,
    }.items():
        yield base | {"prefix": "law", "metric": metric, "value": rounded(value)}


def classification_accuracy(net: MatryoshkaEmbedding, queries: Split, lengths: Tensor) -> float:
    """Return the share of queries, each with a prefix of its own, that the proxies of their classes know."""
    return (net.classify(queries.images, lengths).argmax(-1) == queries.labels).double().mean().item()


def scores_by_query(index: Split, queries: Split, lengths: Tensor) -> dict[str, float]:
    """Score queries that each have a prefix of their own, compared with the same prefix of the index."""
    total: dict[str, float] = defaultdict(float)
    for length in lengths.unique().tolist():
        rows = lengths == length
        scores = retrieval_accuracy(
            Split(index.images[:, :length], index.labels), Split(queries.images[rows, :length], queries.labels[rows])
        )
        for metric, value in scores.items():
            total[metric] += value * rows.double().mean().item()
    return dict(total)


def run(
    data: Dataset, methods: list[str], seeds: range, recipe: Recipe, part: Part, join: bool = False
) -> list[dict[str, Any]]:
    """Run what is not done yet, unless rows are only to be joined, and return all rows."""
    folder, result = PARTS if part == "test" else PARTS / part, []
    for seed in seeds:
        for method in methods:
            make = None if join else partial(rows, method, seed, data, part, recipe)
            result += kept_rows(folder / f"{data.name}-{method}-{seed}.json", asdict(recipe), make)
    return result


def step_ratios(data: Dataset, recipe: Recipe, num_steps: int = 20) -> dict[str, float]:
    """Time short fits of all methods in turn, and return their thread's time relative to plain's."""
    few = replace(data, train=Split(*(rows[: num_steps * recipe.batch_size] for rows in data.train)))
    fits = {method: partial(train, method, 0, few, replace(recipe, epochs=1)) for method in METHODS}
    seconds = interleaved_medians(fits, seconds=0, min_rounds=5)
    return {method: rounded(seconds[method] / seconds["plain"]) for method in METHODS}


def markdown(result: Mapping[str, Any]) -> str:
    """Format the tables: both metrics by prefix, then the laws and what a step costs."""
    found = Rows(result, "model", "prefix", LABELS)
    sizes = dict.fromkeys(METRICS, PREFIXES) | {metric + BY_QUERY: PREFIXES[1:-1] for metric in METRICS}
    scored = {key[-1] for key in found.values}
    tables = [found.table("mlp", metric, prefixes) for metric, prefixes in sizes.items() if metric in scored]
    body = [
        [LABELS[method], f"{found.mean('mlp', method, 'law', 'mean_length'):.1f}", f"{ratio:.2f}"]
        for method, ratio in result["step_ratio"].items()
    ]
    return "\n\n".join(
        [*tables, markdown_table(["prefixes in training", "mean length", "time of a step / plain"], body)]
    )


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark, write its rows and print its tables."""
    torch.set_flush_denormal(True)
    about = __doc__.partition("\n")[0]
    args = read_arguments("benchmarks.matryoshka", about, {"methods": METHODS}, Recipe, RESULTS, argv)
    recipe = replace(RECIPE, **args.changes)
    data = load(args.data)
    found = run(data, args.methods, args.seeds, recipe, args.part, args.join)
    ratios = step_ratios(data, recipe)
    result = write_rows(args, "benchmarks.matryoshka", found, {"recipe": asdict(recipe)}, step_ratio=ratios)
    print(markdown(result))


if __name__ == "__main__":
    main()
