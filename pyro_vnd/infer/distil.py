"""Teach a model, after its fit, what each length is worth to each row."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_vnd._data import Data, as_arguments, batches_of, check_rows, is_tensors, map_parts, num_rows
from pyro_vnd._sizes import check_count, check_seed, is_within, without_values
from pyro_vnd._state import cuda_devices, module_mode, random_numbers
from pyro_vnd.distributions import OrderedMask
from pyro_vnd.nn.values import ValueHead, interpolate_values, spaced_lengths

__all__ = ["DistilReport", "ValuedModel", "distil_lengths"]

HELD_OUT, MOST_HELD_OUT = 0.1, 1000  # share of the rows that report on the head, and how many at most
FEWEST_ROWS = 20  # of which two are held out: one has no correlation
FINE = 64  # lengths of their curves, at most
SHORT, LONG = 1.1, 0.9  # mean lengths at whose prices a head is trained: from this many units to this share of K


class ValuedModel(Protocol):
    """What `distil_lengths` needs of a model, an `nn.Module`: rows are the arguments of its methods, as of itself."""

    @property
    def add_value_head(self) -> Callable[[], ValueHead]:
        """Return the model's value head, a new one if it has none: `add_value_head()`."""

    @property
    def value_inputs(self) -> Callable[..., Tensor]:
        """Return what the head looks at, shape (N, num_inputs): `value_inputs(*rows)`."""

    @property
    def value_curve(self) -> Callable[..., Tensor]:
        """Return what lengths are worth to rows in nats, shape (N, number of them): `value_curve(*rows, lengths=)`."""


@dataclass(frozen=True)
class DistilReport:
    """How well the lengths that a head predicts do on rows that it has not seen.

    Attributes:
        mean_lengths: Mean lengths at which this is asked.
        prices: Prices at which the head has them.
        share_of_gain: What the value of rows gains over one length for all of them, by choosing the length of each by
            the head, as a share of what it gains by its true values; 1 is best, 0 no gain.
        correlation: Of the mean lengths by row, the head's and the true ones.
        num_rows: Rows that the head has learned from.
        num_held_out: Rows that this is about.
        seconds: Time that all took.
    """

    mean_lengths: tuple[float, ...]
    prices: tuple[float, ...]
    share_of_gain: tuple[float, ...]
    correlation: tuple[float, ...]
    num_rows: int
    num_held_out: int
    seconds: float

    def __str__(self) -> str:
        lines = [
            f"lengths distilled from {self.num_rows} rows in {self.seconds:.1f} s; on {self.num_held_out} others:",
            f"{'mean length':>13}{'price, nats':>13}{'share of gain':>15}{'correlation':>13}",
        ]
        columns = zip(self.mean_lengths, self.prices, self.share_of_gain, self.correlation, strict=True)
        lines += [f"{m:13.4g}{price:13.4g}{share:15.2f}{r:13.2f}" for m, price, share, r in columns]
        return "\n".join(lines)


def distil_lengths(
    model: ValuedModel,
    data: Any,
    *,
    prices: tuple[float, float] | None = None,
    num_lengths: int = 12,
    num_rows_used: int = 20_000,
    num_steps: int = 4000,
    batch_size: int = 512,
    lr: float = 0.003,
    seed: int | None = 0,
    progress: bool = True,
) -> DistilReport:
    r"""Teach the value head of a fitted model what each length is worth to each row.

    Some rows are decoded at some lengths, between which the values v are interpolated, and the head, $\hat v$, is
    trained to have the same laws at random prices,

    $$\min \; E_{n, \lambda} \; \mathrm{KL}\big(\mathrm{softmax}(\log p + v(x_n) - \lambda L) \,\|\,
      \mathrm{softmax}(\log p + \hat v(x_n) - \lambda L)\big).$$

    Nothing else of the model changes. It need not have been fitted with a law that was learned: a model that was
    trained under a fixed law knows afterwards, too, how long a code each row needs. Takes seconds.

    Args:
        model: An autoencoder of the library, an `AutoNested` with `amortise`, or another `ValuedModel`.
        data: Rows as those of `fit`, such as its training data, in any of its forms. Of what comes in batches the first
            rows are looked at.
        prices: Lowest and highest price for a unit, in nats, > 0, from which prices are drawn log-uniformly. By default
            they are those of mean lengths from 1.1 units to nine tenths of K, log-uniform in the mean length.
        num_lengths: Lengths that are decoded.
        num_rows_used: Rows that are looked at, at most.
        num_steps: Steps of Adam.
        batch_size: Rows of a step, and of a batch, where data do not come in batches.
        lr: Learning rate, which falls to zero on half a cosine.
        seed: Seed of a new head, the choice of rows and the prices; None goes on with the caller's random numbers.
        progress: Whether to show progress bars.

    Returns:
        How well the head does on rows that were held back, one in ten.

    Raises:
        ValueError: If an argument is invalid.

    Example:
        >>> from pyro_vnd.autoencoders import OrderedVAE
        >>> from pyro_vnd.distributions import OrderedMask
        >>> vae, x = OrderedVAE((9,), num_latents=4, posterior_lengths="prior"), torch.rand(200, 9)
        >>> report = distil_lengths(vae, x, num_steps=20, progress=False)
        >>> vae.encode(x, mean_length=2.0).batch_shape
        torch.Size([200])
    """
    name = "distil_lengths"
    missing = [method for method in ("add_value_head", "value_inputs", "value_curve") if not hasattr(model, method)]
    if missing or not isinstance(model, torch.nn.Module):
        raise ValueError(
            f"{name}: argument `model` must be an nn.Module with the methods of `ValuedModel`; {type(model).__name__} "
            f"lacks {', '.join(missing) or 'those of an nn.Module'}"
        )
    check_count(name, num_lengths=num_lengths, num_rows_used=num_rows_used, num_steps=num_steps, batch_size=batch_size)
    batch_size = int(batch_size)  # torch splits by no other integers
    if prices is not None and not _are_prices(prices):
        raise ValueError(f"{name}: argument `prices` must be two prices, 0 < low < high; got {prices!r}")
    if not is_within(lr, above=0):
        raise ValueError(f"{name}: argument `lr` must be finite and > 0; got {lr!r}")
    if seed is not None:
        check_seed(name, seed)
    if torch.is_inference_mode_enabled():
        raise ValueError(f"{name}: the head is trained, which torch.inference_mode does not allow: call it outside")
    if is_tensors(data):
        check_rows(name, data)
        _check_arguments(model, data)
        _check_enough(num_rows(data), num_rows_used)
    started = time.perf_counter()
    with random_numbers(seed, cuda_devices([model])):
        head = model.add_value_head()
        if not isinstance(head, ValueHead):
            raise ValueError(
                f"{name}: argument `model` must return a ValueHead from `add_value_head`; got {type(head).__name__}"
            )
        before = {key: value.clone() for key, value in head.state_dict().items()}
        with module_mode([model], training=False):
            lengths = {False: spaced_lengths(head.num_units, num_lengths), True: spaced_lengths(head.num_units, FINE)}
            parts = (
                _of_tensors(data, num_rows_used, batch_size)
                if is_tensors(data)
                else _of_batches(model, data, num_rows_used, batch_size)
            )
            (inputs, curves), (held_inputs, held_curves) = _look(model, head, parts, lengths, progress)
            _check_enough(len(curves) + len(held_curves), num_rows_used)
            _train(head, inputs, curves, prices, num_steps, batch_size, float(lr), progress)
            if not all(bool(part.isfinite().all()) for part in head.parameters()):
                head.load_state_dict(before)
                raise ValueError(
                    f"{name}: argument `lr` must be lower: the head has diverged at {lr!r}, and is what it was before"
                )
            with torch.no_grad():
                head.calibrate(head(inputs[: MOST_HELD_OUT * 2]))
                scores = _scores(head, head(held_inputs), held_curves)
    means, at, shares, correlation = scores
    return DistilReport(means, at, shares, correlation, len(curves), len(held_curves), time.perf_counter() - started)


def _check_enough(count: int, num_rows_used: int) -> None:
    if min(count, num_rows_used) < FEWEST_ROWS:
        raise ValueError(
            f"distil_lengths: arguments `data` and `num_rows_used` must have {FEWEST_ROWS} rows at least; got {count} "
            f"and {num_rows_used}"
        )


def _check_arguments(model: ValuedModel, data: Data) -> None:
    """Raise a ValueError if the model's methods do not take the parts of the data."""
    args, kwargs = as_arguments(data)
    for method, more in ((model.value_inputs, {}), (model.value_curve, {"lengths": [1]})):
        wanted = signature(method)
        try:
            wanted.bind(*args, **kwargs, **more)
        except TypeError as error:
            parts = ", ".join([*(f"{type(part).__name__}" for part in args), *kwargs])
            raise ValueError(
                f"distil_lengths: argument `data` must be what {type(model).__name__}.{method.__name__}{wanted} takes; "
                f"it has the parts ({parts}): {error}"
            ) from None


def _are_prices(prices: Any) -> bool:
    is_pair = isinstance(prices, Sequence) and len(prices) == 2 and all(is_within(price, above=0) for price in prices)
    return is_pair and bool(prices[0] < prices[1])


def _rows(data: Data, rows: Tensor) -> Data:
    return map_parts(lambda part: part[rows.to(part.device)], data)


def _of_tensors(data: Data, num_rows_used: int, batch_size: int) -> Iterator[tuple[Data, bool]]:
    """Yield batches of rows at random, each with whether it is held back."""
    chosen = torch.randperm(num_rows(data))[:num_rows_used]
    num_held_out = min(math.ceil(HELD_OUT * len(chosen)), MOST_HELD_OUT)
    for rows, held_out in ((chosen[num_held_out:], False), (chosen[:num_held_out], True)):
        for some in rows.split(batch_size):
            yield _rows(data, some), held_out


def _of_batches(model: ValuedModel, data: Any, num_rows_used: int, batch_size: int) -> Iterator[tuple[Data, bool]]:
    """Yield the first rows of batches, of each of which some at random are held back."""
    seen = num_held_out = 0
    for batch in batches_of(data, batch_size):
        check_rows("distil_lengths", batch)
        if not seen:
            _check_arguments(model, batch)
        order = torch.randperm(num_rows(batch))[: num_rows_used - seen]
        seen += len(order)
        more = min(math.ceil(HELD_OUT * seen), MOST_HELD_OUT) - num_held_out
        num_held_out += more
        for rows, held_out in ((order[more:], False), (order[:more], True)):
            if len(rows):
                yield _rows(batch, rows), held_out
        if seen == num_rows_used:
            return


@torch.no_grad()
def _look(
    model: ValuedModel,
    head: ValueHead,
    parts: Iterable[tuple[Data, bool]],
    lengths: Mapping[bool, Sequence[int]],
    progress: bool,
) -> list[tuple[Tensor, Tensor]]:
    """Return what the head is given of rows, and their value curves, of those to learn from and of those held back."""
    found: dict[bool, list[tuple[Tensor, Tensor]]] = {False: [], True: []}
    with tqdm(desc="values", unit="row", disable=not progress) as bar:
        for batch, held_out in parts:
            args, kwargs = as_arguments(batch)
            inputs = model.value_inputs(*args, **kwargs)
            values = model.value_curve(*args, lengths=lengths[held_out], **kwargs)
            count = num_rows(batch)
            _check_found(model, "value_inputs", inputs, (count, head.num_inputs))
            _check_found(model, "value_curve", values, (count, len(lengths[held_out])))
            found[held_out].append((inputs, interpolate_values(values, lengths[held_out], head.num_units)))
            bar.update(count)
    empty = (torch.empty(0), torch.empty(0))
    columns = (zip(*(each or [empty]), strict=True) for each in found.values())
    return [(torch.cat(inputs), torch.cat(curves)) for inputs, curves in columns]


def _check_found(model: ValuedModel, method: str, found: Any, shape: tuple[int, int]) -> None:
    came = found.shape if isinstance(found, Tensor) else None
    if came != shape or without_values(found) or not bool(found.isfinite().all()):
        got = type(found).__name__ if came is None else without_values(found) or f"shape {tuple(came)}, or NaN or inf"
        raise ValueError(
            f"distil_lengths: argument `model` must return finite numbers of shape {shape} from "
            f"{type(model).__name__}.{method}; got {got}"
        )


def _train(
    head: ValueHead,
    inputs: Tensor,
    curves: Tensor,
    prices: tuple[float, float] | None,
    num_steps: int,
    batch_size: int,
    lr: float,
    progress: bool,
) -> None:
    head.standardise(inputs)
    head.centre(curves)
    head.calibrate(curves[: 2 * MOST_HELD_OUT])  # for the prices, for now
    units = torch.arange(1, head.num_units + 1, device=curves.device).to(curves)
    optimizer = torch.optim.Adam(head.parameters(), lr=lr)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    for _ in tqdm(range(num_steps), desc="distil", unit="step", disable=not progress):
        rows = torch.randint(len(inputs), (batch_size,), device=inputs.device)
        paid = _draw_prices(head, prices, batch_size).to(curves).unsqueeze(-1) * units - head.log_probs
        with torch.enable_grad():
            target = (curves[rows] - paid).softmax(-1)
            loss = -(target * (head(inputs[rows]) - paid).log_softmax(-1)).sum(-1).mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
        optimizer.step()
        scheduler.step()


def _draw_prices(head: ValueHead, prices: tuple[float, float] | None, num: int) -> Tensor:
    low, high = (SHORT, max(LONG * head.num_units, SHORT + 0.1)) if prices is None else prices
    if prices is None and head.num_units < 2:
        return torch.zeros(num)
    drawn = (math.log(low) + (math.log(high) - math.log(low)) * torch.rand(num)).exp()
    return head.price_at(drawn) if prices is None else drawn


def _scores(head: ValueHead, predicted: Tensor, curves: Tensor) -> list[tuple[float, ...]]:
    """Return mean lengths, prices, shares of the gain and correlations."""
    rows: list[tuple[float, float, float, float]] = []
    mine, best = (OrderedMask(logits=(values + head.log_probs) / head.temperature) for values in (predicted, curves))
    for mean_length in (2.0, 4.0, 8.0, 12.0, 16.0, 32.0, 64.0):
        if mean_length > LONG * head.num_units:
            break
        ours, theirs = (law.at_mean_length(mean_length, shared=True) for law in (mine, best))
        fixed = curves[:, round(mean_length) - 1].mean()
        gain, whole = ((law.probs * curves).sum(-1).mean() - fixed for law in (ours, theirs))
        correlation = torch.corrcoef(torch.stack([ours.mean_length, theirs.mean_length]))[0, 1]
        price = head.temperature * mine.price_at_mean_length(mean_length, shared=True)
        share = (gain / whole).item() if whole > 0 else math.nan
        rows.append((mean_length, price.item(), share, correlation.item()))
    return [tuple(row[i] for row in rows) for i in range(4)]
