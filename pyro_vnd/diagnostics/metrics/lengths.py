"""What it is worth to choose the length of each code, beside one length for all."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn
from torch.nn.functional import one_hot
from tqdm.auto import tqdm

from pyro_vnd._data import Rows, batches
from pyro_vnd._inputs import check_labels
from pyro_vnd._sizes import check_count, check_num_latents, check_seed, is_within
from pyro_vnd._state import module_mode
from pyro_vnd.diagnostics.metrics.variables import variable
from pyro_vnd.distributions import OrderedMask
from pyro_vnd.nn.values import chosen_at_mean

__all__ = ["LengthModel", "evaluate_lengths"]

DEFAULT = (2, 4, 8, 12)
LAWS = ("fixed", "model", "decoded", "exact")
_ROUNDING = 1e-5  # of lengths by laws in single precision
_LABELS = {
    "mse": ("squared error of a pixel", "1"),
    "elbo": ("ELBO with the length paid", "nats"),
    "rate": ("rate with the length paid", "nats"),
    "distortion": ("distortion", "nats"),
    "information": ("information of the length about the image", "nats"),
    "share_of_gain": ("share of the exact gain", "1"),
    "correlation": ("correlation with the exact lengths", "1"),
    "length": ("expected length of a code", "latents"),
    "length_by_class": ("mean length of a class", "latents"),
    "mse_by_class": ("squared error of a pixel of a class", "1"),
    "mean_length_at_price": ("mean length at the price that the model has for it", "latents"),
}


class LengthModel(Protocol):
    """What `evaluate_lengths` needs of a model: an autoencoder of the library, or what is like it.

    It may have `elbo(x, length, num_samples)`, as in `PrefixModel`.
    """

    num_latents: int

    def reconstruct(self, x: Tensor, length: int, /) -> Tensor:
        """Return images from codes of a length."""

    def value_curve(self, x: Tensor, lengths: Sequence[int], /) -> Tensor:
        """Return what lengths are worth to images, in nats, shape (N, number of lengths)."""

    def lengths(
        self, x: Tensor, *, price: float | None = None, mean_length: float | None = None, exact: int | None = None
    ) -> OrderedMask:
        """Return the law of the lengths of images, batch shape (N,)."""


@dataclass
class _Curves:
    """What each length does for each image, shape (N, K) each, and laws of lengths at no price."""

    error: Tensor
    log_likelihood: Tensor | None
    rate: Tensor | None
    laws: dict[str, Tensor]


def evaluate_lengths(
    model: LengthModel,
    data: Rows,
    mean_lengths: Sequence[float] | None = None,
    *,
    chosen: bool = False,
    laws: Mapping[str, OrderedMask] | None = None,
    num_decoded: int = 12,
    num_samples: int = 1,
    seed: int = 0,
    batch_size: int = 500,
    progress: bool = True,
) -> xr.Dataset:
    r"""Score laws of the length of a code, each at the price at which its mean length over the images is a given one.

    The laws are "fixed", one length for all images, or two neighbouring ones where the mean is no integer; "model",
    $q(L \mid x, \lambda)$ from the encoder alone, by its value head or its learned law; "decoded", from decoding
    `num_decoded` lengths of each image; and "exact", from decoding all of them. Errors are expectations under the law.

    Laws are random still: an image has one of several lengths. With `chosen` it has its best length, the mode of its
    law, as `reconstruct` gives it at a mean length; prices are those at which the chosen lengths have the mean.

    A receiver must know the length of a code. Where lengths vary this costs the information that they have about the
    image, which is part of the rate:

    $$R = E_x E_q \, \mathrm{KL}(q(z_{\le L} \mid x) \| p(z_{\le L})) + I(x; L), \qquad
      I(x; L) = E_x \mathrm{KL}\big(q(L \mid x) \,\|\, E_x q(L \mid x)\big).$$

    Args:
        model: An autoencoder of the library. It is run in evaluation mode and then put back.
        data: Test images x, and labels y if there are any: a tensor x, a pair (x, y), a mapping, a `Dataset`, or an
            iterable of batches.
        mean_lengths: Mean lengths, each from 1 to K; by default those of 2, 4, 8 and 12 that are shorter than K.
        chosen: Whether each image has its best length rather than a random one.
        laws: More laws of the lengths of these images, by name, with batch shape (N,), to tilt and score as well.
        num_decoded: Lengths that "decoded" decodes.
        num_samples: Draws of each code for the ELBO.
        seed: Seed of the draws, and the coordinate of the result: give each fit its own.
        batch_size: Rows of a batch.
        progress: Whether to show a progress bar.

    Returns:
        A Dataset with the dimensions `seed`, `law`, `mean_length` and, of some, `image` and `class`:

        - `mse` (seed, law, mean_length), over images and pixels, `share_of_gain`, how much of what "exact" gains over
          "fixed" a law gains, NaN where that gains nothing, and `correlation`, over images, of its expected lengths and
          those of "exact", NaN where all images have one;
        - of models with `elbo`: `elbo`, `distortion`, `rate` and `information`, in nats an image, the same dimensions;
        - `length` (seed, law, mean_length, image), the expected length of each code, and with labels `length_by_class`
          and `mse_by_class` (seed, law, mean_length, class);
        - `mean_length_at_price` (seed, mean_length), of "model" at the price that it has for a mean length, if it has
          one: the mean over other images than those it was calibrated on.

    "Exact" is best in nats, at a price that is paid. In squared error at equal mean length it is no bound: where all
    lengths are worth about the same, to within a nat or so, random lengths by any law may be worse than a fixed one.

    Raises:
        ValueError: If lengths or numbers are invalid, or there are no rows.

    Example:
        >>> from pyro_vnd.autoencoders import OrderedVAE
        >>> vae = OrderedVAE((9,), num_latents=4)
        >>> result = evaluate_lengths(vae, torch.rand(50, 9), [2, 2.5], progress=False)
        >>> result["length"].sel(law="exact").mean("image").values.round(3).tolist()
        [[2.0, 2.5]]
    """
    name = "evaluate_lengths"
    check_num_latents(name, model)
    num_latents = model.num_latents
    check_seed(name, seed)
    if not isinstance(chosen, bool):
        raise ValueError(f"{name}: argument `chosen` must be True or False; got {chosen!r}")
    if not isinstance(laws, Mapping | None):
        raise ValueError(f"{name}: argument `laws` must be a mapping from names to laws; got {type(laws).__name__}")
    check_count(name, num_decoded=num_decoded, num_samples=num_samples, batch_size=batch_size)
    if mean_lengths is None:
        mean_lengths = [m for m in DEFAULT if m < num_latents] or [1]
    given_lengths = list(mean_lengths) if isinstance(mean_lengths, Iterable) else []
    wanted = [float(m) for m in given_lengths if is_within(m, 1, num_latents)]
    if not wanted or len(set(wanted)) < len(given_lengths):
        raise ValueError(
            f"{name}: argument `mean_lengths` must be distinct numbers from 1 to {num_latents}; got {mean_lengths!r}"
        )
    at_price: dict[str, Any] = {}
    with torch.random.fork_rng(), module_mode([model], training=False), torch.no_grad():
        parts, labels = [], []
        torch.manual_seed(seed)  # a loader that shuffles draws from it
        for x, *more in tqdm(batches(data, batch_size), desc="lengths", unit="batch", disable=not progress):
            if not len(x):
                continue
            labels += [check_labels(name, y, len(x)) for y in more[:1]]
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                parts.append(_look(model, _to_device(x, model), num_decoded, num_samples))
        if not parts:
            raise ValueError(f"{name}: argument `data` has no rows")
        curves = _join(parts)
        for law, given in (laws or {}).items():
            if (
                not isinstance(given, OrderedMask)
                or law in LAWS
                or given.batch_shape != curves.error.shape[:1]
                or given.num_units != num_latents
            ):
                raise ValueError(
                    f"{name}: argument `laws` must have names other than {', '.join(LAWS)}, and laws of batch shape "
                    f"({len(curves.error)},) over {num_latents} units; got {law!r}: {given!r}"
                )
            curves.laws[law] = given.logits.double().cpu()
        head = getattr(getattr(model, "encoder", None), "value_head", None)
        if head is not None and head.is_calibrated:
            logits = curves.laws["model"].double()
            means = [
                _mean_at_price(logits, head.price_at(m, chosen=chosen).item(), chosen) if 1 < m < num_latents else m
                for m in wanted
            ]
            at_price = {"mean_length_at_price": variable(_LABELS, {}, "mean_length_at_price", ("mean_length",), means)}
    classes = torch.cat(labels).cpu() if labels else None
    scores: dict[str, list[list[Any]]] = defaultdict(list)
    names = [*LAWS, *(laws or {})]
    for law in names:
        rows = [_score(curves, law, m, classes, chosen) for m in wanted]
        for key in rows[0]:
            scores[key].append([row[key] for row in rows])
    coords: dict[str, Any] = {"seed": [seed], "law": names}
    coords["mean_length"] = ("mean_length", wanted, {"long_name": "mean length", "units": "latents"})
    dims = {"length": ("image",), "length_by_class": ("class",), "mse_by_class": ("class",)}
    variables = {
        key: variable(_LABELS, {}, key, ("law", "mean_length", *dims.get(key, ())), np.array(values))
        for key, values in scores.items()
    }
    if classes is not None:
        coords["class"] = classes.unique().numpy()
    attrs = {"num_rows": len(curves.error), "num_latents": num_latents, "num_decoded": num_decoded}
    return xr.Dataset(variables | at_price, coords, attrs | {"chosen": int(chosen)})


def _to_device(x: Tensor, model: Any) -> Tensor:
    if not isinstance(model, nn.Module):
        return x
    state = chain(model.parameters(), model.buffers())
    return x.to(next((value.device for value in state), x.device))


def _look(model: Any, x: Tensor, num_decoded: int, num_samples: int) -> _Curves:
    """Return what each length does for each image of a batch."""
    units = range(1, model.num_latents + 1)
    prior = _log_prior(model)
    laws = {
        "model": model.lengths(x, price=0.0).logits if _has_head(model) else model.lengths(x).logits,
        "decoded": model.lengths(x, price=0.0, exact=num_decoded).logits,
        "exact": model.value_curve(x, units) + prior,
    }
    error = [(model.reconstruct(x, k) - x).square().flatten(1).mean(-1) for k in units]
    log_likelihood = rate = None
    if hasattr(model, "elbo"):
        state = torch.get_rng_state()
        terms = []
        for k in units:
            torch.set_rng_state(state)  # the same draws for all lengths
            terms.append(model.elbo(x, k, num_samples))
        log_likelihood = torch.stack([each.log_likelihood for each in terms], -1).double().cpu()
        rate = torch.stack([each.kl_latents for each in terms], -1).double().cpu()
    laws = {name: logits.double().cpu() for name, logits in laws.items()}
    return _Curves(torch.stack(error, -1).double().cpu(), log_likelihood, rate, laws)


def _has_head(model: Any) -> bool:
    return getattr(getattr(model, "encoder", None), "value_head", None) is not None


def _log_prior(model: Any) -> Tensor | float:
    probs = getattr(model, "prior_probs", None)
    return 0.0 if probs is None else probs.log()


def _join(parts: list[_Curves]) -> _Curves:
    def cat(values: list[Any]) -> Any:
        return None if values[0] is None else torch.cat(values)

    return _Curves(
        torch.cat([part.error for part in parts]),
        cat([part.log_likelihood for part in parts]),
        cat([part.rate for part in parts]),
        {name: torch.cat([part.laws[name] for part in parts]) for name in parts[0].laws},
    )


def _mean_at_price(logits: Tensor, price: float, chosen: bool) -> float:
    law = OrderedMask(logits=logits).tilt(price)
    lengths = law.logits.argmax(-1).double() + 1 if chosen else law.mean_length
    return lengths.mean().item()


def _probs(curves: _Curves, law: str, mean_length: float, chosen: bool) -> Tensor:
    """Return the law of each image at the price of a mean length, shape (N, K)."""
    num_rows, num_units = curves.error.shape
    if law == "fixed" or mean_length in (1.0, float(num_units)):
        low = min(int(mean_length), num_units - 1) if num_units > 1 else 1
        probs = torch.zeros(num_units, dtype=torch.float64)
        probs[low - 1] = 1 - (mean_length - low)
        if num_units > 1:
            probs[low] = mean_length - low
        return probs.expand(num_rows, -1)
    if chosen:
        return one_hot(chosen_at_mean(curves.laws[law], mean_length) - 1, num_units).double()
    law_of_lengths = OrderedMask(logits=curves.laws[law], validate_args=False)  # some may be impossible
    return law_of_lengths.at_mean_length(mean_length, shared=True).probs


def _score(curves: _Curves, law: str, mean_length: float, classes: Tensor | None, chosen: bool) -> dict[str, Any]:
    probs, exact, fixed = (_probs(curves, name, mean_length, chosen) for name in (law, "exact", "fixed"))
    units = torch.arange(1, probs.shape[-1] + 1).to(probs)
    errors, lengths = (probs * curves.error).sum(-1), probs @ units
    gain = ((fixed - probs) * curves.error).sum(-1).mean()
    whole = ((fixed - exact) * curves.error).sum(-1).mean()
    scores: dict[str, Any] = {
        "mse": errors.mean().item(),
        "share_of_gain": (gain / whole).item() if whole > 0 else math.nan,
        "correlation": _correlation(lengths, exact @ units),
        "length": lengths.numpy(),
    }
    if curves.log_likelihood is not None and curves.rate is not None:
        mean = probs.mean(0).clamp_min(torch.finfo(probs.dtype).tiny)  # one that underflows is no more than that
        information = (torch.special.xlogy(probs, probs) - torch.special.xlogy(probs, mean)).sum(-1).mean()
        rate = (probs * curves.rate).sum(-1).mean() + information
        distortion = -(probs * curves.log_likelihood).sum(-1).mean()
        scores |= {"elbo": -(distortion + rate).item(), "rate": rate.item()}
        scores |= {"distortion": distortion.item(), "information": information.item()}
    if classes is not None:
        of = [classes == label for label in classes.unique()]
        scores["length_by_class"] = [lengths[rows].mean().item() for rows in of]
        scores["mse_by_class"] = [errors[rows].mean().item() for rows in of]
    return scores


def _correlation(x: Tensor, y: Tensor) -> float:
    """Return the correlation of lengths, NaN where those of one kind differ by rounding alone."""
    if len(x) < 2 or min(x.std(), y.std()) < _ROUNDING:
        return math.nan
    return torch.corrcoef(torch.stack([x, y]))[0, 1].item()
