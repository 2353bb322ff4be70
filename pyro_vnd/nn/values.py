"""What each length is worth for each row, and from it the law of lengths at any price."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from pyro_vnd._inputs import check_features
from pyro_vnd._sizes import as_integers, check_count, check_sizes, is_within, without_values
from pyro_vnd.distributions import OrderedMask

__all__ = ["ValueHead", "checked_lengths", "chosen_at_mean", "interpolate_values", "majorant_slopes", "spaced_lengths"]

NUM_PRICES = 256
LARGEST_PRICE, SMALLEST_PRICE = 100.0, 1e-4  # in units of the spread of values
MOMENTUM = 0.01  # of the running means of inputs, by batch
AT_ONCE = 1_000_000  # numbers in a block of laws by price


class ValueHead(nn.Module):
    r"""Predict what each length is worth for a row, its *value curve*, from features of the row.

    $$v_L(x) = E_q \log p(x \mid z_{\le L}) - \mathrm{KL}(q(z_{\le L} \mid x) \| p(z_{\le L})), \qquad L = 1..K.$$

    Whatever a unit may cost, the best law of lengths follows from this curve: $q(L \mid x, \lambda) \propto
    p(L) \exp(v_L(x) - \lambda L)$ at a price of $\lambda$ nats a unit. One head so serves all budgets. `fit` trains it
    by regression on the one length that each row was seen at, and `distil_lengths` on whole curves.

    A perceptron, whose inputs are standardised and whose outputs are deviations from a mean curve, by means that are
    taken in training and kept with the weights. So are mean lengths at many prices, see `calibrate`.

    Args:
        num_inputs: Features of a row.
        num_units: K.
        hidden: Units of each hidden layer.
        prior: Law of the lengths a priori; uniform by default.
        temperature: That of laws at a price, > 0: below one where a length has to be chosen and values are so few nats
            that laws at temperature one have many.

    Raises:
        ValueError: If a size or the temperature is not positive, or the prior is no single law over K that gives each a
            chance.

    Example:
        >>> head = ValueHead(num_inputs=3, num_units=4)
        >>> head(torch.randn(5, 3)).shape
        torch.Size([5, 4])
    """

    loc: Tensor
    scale: Tensor
    curve: Tensor
    deviation: Tensor
    seen: Tensor
    prices: Tensor
    mean_lengths: Tensor
    chosen_prices: Tensor
    log_probs: Tensor

    def __init__(
        self,
        num_inputs: int,
        num_units: int,
        hidden: Sequence[int] = (64, 64),
        prior: OrderedMask | None = None,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        check_count(type(self).__name__, num_inputs=num_inputs, num_units=num_units)
        check_sizes(type(self).__name__, hidden=hidden)
        _check_temperature("ValueHead", temperature)
        prior = OrderedMask.uniform(num_units) if prior is None else prior
        is_single = isinstance(prior, OrderedMask) and not prior.batch_shape and prior.num_units == num_units
        if not is_single or not (prior.probs > 0).all():
            raise ValueError(
                f"ValueHead: argument `prior` must be a single law over {num_units} units that gives each length a "
                f"positive probability; got {prior!r}"
            )
        layers: list[nn.Module] = []
        for n_in, n_out in pairwise([num_inputs, *hidden]):
            layers += [nn.Linear(n_in, n_out), nn.SiLU()]
        last = nn.Linear(hidden[-1] if hidden else num_inputs, num_units)
        nn.init.zeros_(last.weight)  # the mean curve, for all rows
        nn.init.zeros_(last.bias)
        self.net = nn.Sequential(*layers, last)
        self.num_inputs, self.num_units, self.temperature = num_inputs, num_units, temperature
        for name, size, start in (
            ("loc", (num_inputs,), 0.0),
            ("scale", (num_inputs,), 1.0),
            ("curve", (num_units,), 0.0),
            ("deviation", (), 1.0),
            ("seen", (num_units,), 0.0),
            ("prices", (NUM_PRICES,), torch.nan),
            ("mean_lengths", (NUM_PRICES,), torch.nan),
            ("chosen_prices", (NUM_PRICES,), torch.nan),
        ):
            self.register_buffer(name, torch.full(size, start))
        self.register_buffer("log_probs", prior.logits.detach().clone())

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the values of the lengths 1..K in nats, shape (..., K), of features, shape (..., num_inputs)."""
        first, *rest = self.net
        assert isinstance(first, nn.Linear)
        check_features("ValueHead: argument `inputs`", inputs, self.num_inputs, first.weight.dtype)
        # Copies: another particle, or what was seen, may move them before the gradient is taken.
        loc, scale, deviation = self.loc.clone(), self.scale.clone(), self.deviation.clone()
        weight = first.weight / scale  # on the weights, of which there are fewer than inputs
        hidden = nn.functional.linear(inputs, weight, first.bias - weight @ loc)
        for layer in rest:
            hidden = layer(hidden)
        return torch.addcmul(self.curve, deviation, hidden)

    @torch.no_grad()
    def standardise(self, inputs: Tensor, momentum: float = 1.0) -> None:
        """Move mean and deviation of the inputs towards those of a batch.

        Args:
            inputs: Shape (N, num_inputs).
            momentum: How far: 1 is all the way.
        """
        if len(inputs) < 2:
            return
        momentum = momentum if self.seen.any() else 1.0
        mean = inputs.mean(0)
        variance = (inputs - mean).square().sum(0) / (len(inputs) - 1)  # a tenth of the time of `var_mean`
        self.loc.lerp_(mean, momentum)
        self.scale.lerp_(variance.sqrt_().clamp_min_(1e-3), momentum)

    @torch.no_grad()
    def centre(self, curves: Tensor) -> None:
        """Take the mean curve of some rows, shape (N, K), for that which the net deviates from."""
        self.curve.copy_(curves.mean(0))
        self.deviation.copy_((curves - self.curve).square().mean().sqrt().clamp_min(torch.finfo(curves.dtype).tiny))
        self.seen.fill_(len(curves))

    def regression(self, values: Tensor, lengths: Tensor, observed: Tensor, weights: Tensor | None = None) -> Tensor:
        r"""Return the error of predictions where rows were seen at one length each, and note what was seen.

        $$\sum_n w_n (v_{L_n}(x_n) - \hat v_n)^2 / 2 s^2,$$

        with s the deviation of values: of order one for each row, whatever the units.

        Args:
            values: As the head returned them, shape (N, K).
            lengths: L, integers 1..K, shape (N,).
            observed: What they turned out to be worth, nats, shape (N,).
            weights: w, shape (N,); one each by default.

        Returns:
            A scalar, with its gradient to the weights of the head.
        """
        weights = torch.ones_like(observed) if weights is None else weights.to(observed)
        observed = torch.where(weights > 0, observed, 0)  # what is hidden may be anything
        errors = (values.gather(-1, lengths.unsqueeze(-1) - 1).squeeze(-1) - observed) / self.deviation.clone()
        self._note(lengths, observed, weights)
        return (weights * errors.square()).sum() / 2

    @torch.no_grad()
    def _note(self, lengths: Tensor, observed: Tensor, weights: Tensor) -> None:
        """Take what was seen, at a length a row, into the mean curve and the deviation from it.

        Means over all that was ever seen: in the end they stand still, and what has changed since is for the net to
        say. Means that forgot would tremble, at each length by itself, by more than neighbouring lengths differ.
        """
        at, one = lengths - 1, (weights > 0).to(observed)
        counts, sums = (torch.zeros_like(self.seen).index_add_(0, at, each) for each in (one, observed))
        total, before = counts.sum(), self.seen.sum()
        mean = sums.sum() / total.clamp_min(1)
        means = torch.where(counts > 0, sums / counts.clamp_min(1), mean)
        share = counts / (self.seen + counts).clamp_min(1)
        # From the curve before them: from their own mean a few rows, of one length each say, hardly deviate.
        errors = observed - torch.where(before > 0, self.curve, mean)[at]
        square = (one * errors.square()).sum() / total.clamp_min(1)
        moved = self.deviation.square().lerp(square, total / (before + total).clamp_min(1)).sqrt()
        self.deviation.copy_(torch.where(square > 0, moved, self.deviation))
        self.curve.lerp_(means, torch.where(before > 0, share, 1.0))  # at first also where no row was
        self.seen += counts

    @torch.no_grad()
    def calibrate(self, values: Tensor) -> None:
        """Keep the mean length over some rows at each of many prices, and the prices of mean lengths that are chosen.

        Args:
            values: Values of the rows, shape (N, K).
        """
        logits = (values.double() + self.log_probs.double()) / self.temperature
        mean = logits.mean(0)
        spread = 1 + (logits - mean).square().mean().sqrt() + mean.std(correction=0)  # a nat moves equal lengths, too
        lengths = torch.arange(1, self.num_units + 1, device=values.device).to(logits)
        at_once = max(AT_ONCE // logits.numel(), 1)
        places = steps = logits.new_tensor([-1.0, 1.0])
        for number in (NUM_PRICES // 4, NUM_PRICES // 2, NUM_PRICES):
            # At equal steps in the order of magnitude of the price and, together with that, in the mean length.
            steps = _on_lines(torch.linspace(-1, 1, number).to(places), places, steps)
            prices = SMALLEST_PRICE * spread * torch.sinh(math.asinh(LARGEST_PRICE / SMALLEST_PRICE) * steps)
            means = torch.cat(
                [
                    ((logits - price.reshape(-1, 1, 1) * lengths).softmax(-1) @ lengths).mean(-1)
                    for price in prices.split(at_once)
                ]
            )
            fallen = (means[0] - means) / (means[0] - means[-1]).clamp_min(torch.finfo(means.dtype).tiny)
            places = steps / 2 + fallen - 0.5 if self.num_units > 1 else steps
        self.prices.copy_(
            self.temperature * prices.flip(0)
        )  # in the order of mean lengths, which fall as the price rises
        self.mean_lengths.copy_(means.flip(0))
        if self.num_units > 1:
            slopes = majorant_slopes(logits).flatten().sort(descending=True).values
            at = torch.linspace(0, len(slopes) - 1, NUM_PRICES, dtype=torch.float64, device=slopes.device)
            self.chosen_prices.copy_(self.temperature * slopes[at.round().long()])

    @torch.no_grad()
    def forget(self) -> None:
        """Forget prices of mean lengths: the model was trained without the head, whose values are no longer its own."""
        for table in (self.prices, self.mean_lengths, self.chosen_prices):
            table.fill_(torch.nan)

    @property
    def is_calibrated(self) -> bool:
        """Whether it knows which price leads to which mean length."""
        return not bool(self.mean_lengths[0].isnan())

    def law(
        self,
        inputs: Tensor,
        price: float | Tensor | None = None,
        mean_length: float | Tensor | None = None,
        temperature: float = 1.0,
    ) -> OrderedMask:
        r"""Return the law of the lengths of rows at a price, $q(L | x, \lambda) \propto p(L) \exp(v_L(x) - \lambda L)$.

        Args:
            inputs: Features of the rows, shape (..., num_inputs).
            price: Nats for one more unit, a number or one a row; none by default.
            mean_length: In place of a price that at which the rows of `calibrate` have this mean length.
            temperature: Flattens the law, > 0: times that of the head.

        Returns:
            Laws, one a row.

        Raises:
            ValueError: If both price and mean length are given, or one of the arguments is invalid.
        """
        if price is not None and mean_length is not None:
            raise ValueError("ValueHead.law: give one of `price` and `mean_length`; got both")
        _check_temperature("ValueHead.law", temperature)
        law = OrderedMask(logits=self(inputs) + self.log_probs)
        price = price if mean_length is None else self.price_at(mean_length)
        law = law if price is None else law.tilt(price)
        temperature = temperature * self.temperature
        return law if temperature == 1 else OrderedMask(logits=law.logits / temperature)

    def choose(
        self, inputs: Tensor, price: float | Tensor | None = None, mean_length: float | Tensor | None = None
    ) -> Tensor:
        """Return the best length of each row at a price, the mode of its law.

        Args:
            inputs: Features of the rows, shape (..., num_inputs).
            price: As in `law`.
            mean_length: In place of a price that at which the best lengths of the rows of `calibrate` have this mean.
                Their laws, which are random still, have another mean there.

        Returns:
            Integers from 1 to K, shape (...).

        Raises:
            ValueError: As in `law`.
        """
        if mean_length is not None and price is None:
            price, mean_length = self.price_at(mean_length, chosen=True), None
        return self.law(inputs, price, mean_length).logits.argmax(-1) + 1

    def price_at(self, mean_length: float | Tensor, *, chosen: bool = False) -> Tensor:
        """Return the price at which the lengths of the rows of `calibrate` have a given mean.

        Args:
            mean_length: Strictly between 1 and K.
            chosen: Whether the lengths are those of `choose`, one a row, rather than random ones by `law`.

        Returns:
            Nats a unit, the shape of `mean_length`.

        Raises:
            ValueError: If it is not, or the head was not calibrated.
        """
        if not self.is_calibrated:
            raise ValueError(
                "ValueHead: argument `mean_length` needs a price, which is not known yet, or not since the model was "
                "fitted without its head: fit it with lengths by values (an autoencoder's posterior_lengths='priced', "
                "say), or call `distil_lengths`"
            )
        try:
            wanted = torch.as_tensor(mean_length, dtype=self.prices.dtype, device=self.prices.device)
        except (TypeError, ValueError, RuntimeError, OverflowError):
            wanted = self.prices.new_tensor(torch.nan)
        if without_values(wanted) or not ((wanted > 1) & (wanted < self.num_units)).all():
            raise ValueError(
                f"ValueHead: argument `mean_length` must be strictly between 1 and {self.num_units}; got "
                f"{mean_length!r}"
            )
        if chosen:
            return _on_lines(wanted, torch.linspace(1, self.num_units, NUM_PRICES).to(wanted), self.chosen_prices)
        return _on_lines(wanted, self.mean_lengths, self.prices)


def majorant_slopes(curves: Tensor) -> Tensor:
    r"""Return by how much the least concave curve above each one rises from each length to the next.

    At a price $\lambda$ the best length, $\arg\max_L v_L - \lambda L$, is one more than the number of slopes above it.

    Args:
        curves: v at the lengths 1..K, shape (N, K).

    Returns:
        Falling slopes, shape (N, K - 1).

    Example:
        >>> majorant_slopes(torch.tensor([[0.0, 1.0, 4.0, 5.0]]))  # a length of two is never the best
        tensor([[2., 2., 1.]])
    """
    num_rows, num_units = curves.shape
    units = torch.arange(num_units, device=curves.device)
    slopes, at = torch.zeros_like(curves), units.new_zeros(num_rows, 1)
    while num_units > 1 and bool((at < num_units - 1).any()):
        rises = (curves - curves.gather(-1, at)) / (units - at)
        rise, to = rises.where(units > at, -torch.inf).max(-1, keepdim=True)
        to = to.where(at < num_units - 1, at)
        slopes = torch.where((units > at) & (units <= to), rise, slopes)
        at = to
    return slopes[:, 1:]


def chosen_at_mean(logits: Tensor, mean_length: float) -> Tensor:
    """Return the best lengths of rows, the modes of their laws, at the price at which these have a mean, or just less.

    Args:
        logits: Of the lengths 1..K at no price, shape (N, K).
        mean_length: From 1 to K.

    Returns:
        Integers, shape (N,).

    Example:
        >>> chosen_at_mean(torch.tensor([[0.0, 1.0, 1.5], [0.0, 3.0, 6.0]]), 2.5)
        tensor([2, 3])
    """
    slopes = majorant_slopes(logits.double().clamp_min(torch.finfo(torch.float32).min))
    number = int((mean_length - 1) * len(slopes) + 1e-9)
    if number >= slopes.numel():
        return torch.full((len(slopes),), logits.shape[-1], device=logits.device)
    return (slopes > slopes.flatten().sort(descending=True).values[number]).sum(-1) + 1


def _check_temperature(caller: str, temperature: float) -> None:
    if not is_within(temperature, above=0):
        raise ValueError(f"{caller}: argument `temperature` must be finite and > 0; got {temperature!r}")


def checked_lengths(caller: str, lengths: Sequence[int] | None, num_units: int) -> list[int]:
    """Return the lengths at which a value curve is wanted, all K by default.

    Raises:
        ValueError: If one is no integer from 1 to K, or there are none.
    """
    units = range(1, num_units + 1)
    wanted = as_integers([*units] if lengths is None else lengths)
    if wanted is None or wanted.dim() != 1 or not wanted.numel() or not all(each in units for each in wanted.tolist()):
        raise ValueError(f"{caller}: argument `lengths` must be integers from 1 to {num_units}; got {lengths!r}")
    return wanted.tolist()


def spaced_lengths(num_units: int, num_lengths: int) -> list[int]:
    """Return lengths from 1 to K with about the same ratio from one to the next.

    Args:
        num_units: K.
        num_lengths: How many, two at least; all K if there are no more.

    Returns:
        The lengths, rising.

    Example:
        >>> spaced_lengths(32, 12)
        [1, 2, 3, 4, 6, 7, 9, 12, 15, 20, 25, 32]
    """
    if num_lengths >= num_units:
        return list(range(1, num_units + 1))
    num_lengths, found = max(num_lengths, 2), [1, num_units]
    for tried in range(num_lengths, 64 * num_units):
        spaced = torch.logspace(0, 1, tried, base=num_units, dtype=torch.float64).round().long()
        lengths = sorted({1, *spaced.tolist(), num_units})
        if len(lengths) > num_lengths:
            break
        found = lengths
    return found


def interpolate_values(values: Tensor, lengths: Sequence[int], num_units: int) -> Tensor:
    """Return the values of all lengths from those of some, on lines over the logarithm of the length.

    Args:
        values: Shape (N, n).
        lengths: Of these, rising, the first and the last of them 1 and K.
        num_units: K.

    Returns:
        Shape (N, K).

    Example:
        >>> interpolate_values(torch.tensor([[0.0, 2.0]]), [1, 4], num_units=4)
        tensor([[0.0000, 1.0000, 1.5850, 2.0000]])
    """
    if len(lengths) == num_units:
        return values
    known = torch.tensor(lengths, dtype=values.dtype, device=values.device).log()
    wanted = torch.arange(1, num_units + 1, device=values.device).to(values).log()
    return _on_lines(wanted, known, values)


def _on_lines(wanted: Tensor, known: Tensor, values: Tensor) -> Tensor:
    """Return values, shape (..., m), at some places from those at others, which rise, shape (n,) and (..., n)."""
    after = torch.searchsorted(known, wanted).clamp(1, len(known) - 1)
    low, high = known[after - 1], known[after]
    share = ((wanted - low) / (high - low).clamp_min(torch.finfo(known.dtype).tiny)).clamp(0, 1)
    return torch.lerp(values[..., after - 1], values[..., after], share)
