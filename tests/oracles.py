"""Slow, obvious answers to compare the library with: sums over every length, and samplers written by hand.

Lengths run over 1..K; `probs` is a float64 vector of their probabilities, unless said otherwise.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from scipy import optimize, stats
from torch import Tensor

Objective = Callable[[Tensor], Tensor]  # masks (n, K) to values (n,)


def all_masks(num_units: int) -> Tensor:
    """The K masks, by increasing length."""
    masks = torch.zeros(num_units, num_units, dtype=torch.float64)
    for length in range(1, num_units + 1):
        masks[length - 1, :length] = 1
    return masks


def length_of(masks: Tensor) -> Tensor:
    return masks.sum(-1).long()


def mean(probs: Tensor) -> Tensor:
    return sum(p * mask for p, mask in zip(probs, all_masks(len(probs)), strict=True))


def covariance(probs: Tensor) -> Tensor:
    centered = all_masks(len(probs)) - mean(probs)
    return sum(p * torch.outer(x, x) for p, x in zip(probs, centered, strict=True))


def length_moments(probs: Tensor) -> tuple[float, float]:
    """Mean and standard deviation of the length."""
    first = sum(p * k for k, p in enumerate(probs.tolist(), 1))
    second = sum(p * k**2 for k, p in enumerate(probs.tolist(), 1))
    return first, math.sqrt(max(0.0, second - first**2))


def entropy(probs: Tensor) -> float:
    return -sum(p * math.log(p) for p in probs.tolist() if p > 0)


def kl(q: Tensor, p: Tensor) -> float:
    total = 0.0
    for q_k, p_k in zip(q.tolist(), p.tolist(), strict=True):
        if q_k > 0:
            total += q_k * (math.log(q_k) - math.log(p_k)) if p_k > 0 else math.inf
    return total


def tilted(probs: Tensor, price: float, cost: Tensor | None = None) -> Tensor:
    """Probabilities of the lengths at a price, length by length: the weight of one over the sum of all weights.

    Each weight is taken relative to the one it is compared with, so that the exponents are those that count.
    """
    costs = [sum((cost if cost is not None else torch.ones(len(probs))).tolist()[:k]) for k in range(1, len(probs) + 1)]
    pairs = list(zip(probs.tolist(), costs, strict=True))

    def over(p: float, c: float, q: float, d: float) -> float:
        exponent = price * (c - d)
        return 0.0 if q == 0 else math.inf if exponent > 700 else q / p * math.exp(exponent)

    found = [1 / sum(over(p, c, q, d) for q, d in pairs) if p > 0 else 0.0 for p, c in pairs]
    return torch.tensor(found, dtype=torch.float64)


def price_of(probs: Tensor, mean_length: float, cost: Tensor | None = None) -> float:
    """The price at which laws, shape (N, K), have a mean length on average, by Brent's method."""

    def excess(price: float) -> float:
        return sum(length_moments(tilted(row, price, cost))[0] for row in probs) / len(probs) - mean_length

    bound = 1.0
    while excess(-bound) < 0 or excess(bound) > 0:
        bound *= 2
    return float(optimize.brentq(excess, -bound, bound, xtol=1e-13, rtol=1e-14))


def chain_probs(chain_logits: Tensor) -> Tensor:
    """Walk the Bernoulli chain: go on to the next unit with probability sigmoid(a), or stop here."""
    probs, reached = [], 1.0
    for a in chain_logits.tolist():
        go_on = 1 / (1 + math.exp(-a))
        probs.append(reached * (1 - go_on))
        reached *= go_on
    return torch.tensor([*probs, reached], dtype=torch.float64)


def expectation(probs: Tensor, f: Objective) -> Tensor:
    """E f(z)."""
    return (probs * f(all_masks(len(probs)))).sum()


def expectation_gradient(logits: Tensor, f: Objective) -> Tensor:
    """Gradient of E f(z) with respect to the logits: p_k (f(z_k) - E f)."""
    probs = logits.double().softmax(-1)
    values = f(all_masks(len(probs)))
    return probs * (values - (probs * values).sum())


def nested_normal_log_prob(value: Tensor, loc: Tensor, scale: Tensor, probs: Tensor) -> float:
    """Log density of a Normal vector cut past a random length, which is where its last non-zero number stands."""
    numbers = value.tolist()
    length = max([k for k, x in enumerate(numbers, 1) if x != 0], default=1)
    total = math.log(probs[length - 1].item())
    for x, m, s in zip(numbers[:length], loc.tolist(), scale.tolist(), strict=False):
        total += -0.5 * ((x - m) / s) ** 2 - math.log(s) - 0.5 * math.log(2 * math.pi)
    return total


def nested_normal_kl(q: tuple[Tensor, Tensor, Tensor], p: tuple[Tensor, Tensor, Tensor]) -> float:
    """KL of two (loc, scale, probs), length by length: a length of k costs its first k coordinates."""
    (q_loc, q_scale, q_probs), (p_loc, p_scale, p_probs) = q, p
    total = kl(q_probs, p_probs)
    for length in range(1, len(q_probs) + 1):
        for i in range(length):
            ratio = (q_scale[i] / p_scale[i]) ** 2
            cost = 0.5 * (ratio + ((q_loc[i] - p_loc[i]) / p_scale[i]) ** 2 - 1 - ratio.log())
            total += (q_probs[length - 1] * cost).item()
    return total


def probs_as_logits(probs: Tensor, temperature: float, count: int) -> Tensor:
    """The wrong law of the published code: `gumbel_softmax` wants logits and is given probabilities.

    Shape (count, ..., K); has the straight-through gradient.
    """
    one_hot = torch.nn.functional.gumbel_softmax(probs.expand(count, *probs.shape), tau=temperature, hard=True)
    return one_hot.flip(-1).cumsum(-1).flip(-1)


def relaxed_masks(probs: Tensor, temperature: float, count: int, seed: int) -> np.ndarray:
    """Soft masks, by numpy: softmax of perturbed log-probabilities, each mask entry a sum of the tail."""
    noise = np.random.default_rng(seed).gumbel(size=(count, len(probs)))
    scores = np.exp((np.log(probs.numpy()) + noise) / temperature)
    one_hot = scores / scores.sum(-1, keepdims=True)
    return np.stack([one_hot[:, i:].sum(-1) for i in range(len(probs))], -1)


def z_scores(draws: Tensor, expected: Tensor) -> Tensor:
    """Compare the mean over the first dimension with what is expected, in standard errors."""
    return (draws.mean(0) - expected) / draws.std(0) * math.sqrt(len(draws))


def law_pvalue(masks: Tensor, probs: Tensor) -> float:
    """p-value of Pearson's chi-square test that the lengths of hard masks follow `probs`.

    Lengths expected fewer than five times are counted together, and an impossible length that was drawn gives zero.
    """
    counts = torch.bincount(length_of(masks.reshape(-1, len(probs))) - 1, minlength=len(probs)).double()
    expected = counts.sum() * probs
    if (counts[expected == 0] > 0).any():
        return 0.0
    rare = expected < 5
    observed, awaited = counts[~rare], expected[~rare]
    if expected[rare].sum() > 0:
        observed = torch.cat([observed, counts[rare].sum().reshape(1)])
        awaited = torch.cat([awaited, expected[rare].sum().reshape(1)])
    statistic = ((observed - awaited) ** 2 / awaited).sum().item()
    return float(stats.chi2.sf(statistic, len(observed) - 1)) if len(observed) > 1 else 1.0


def soft_mask(probs: Tensor, uniform: Tensor, temperature: Tensor | float) -> Tensor:
    """The surrogate of the logistic noise, sigmoid((log S - log F - logit u) / tau), in the naive way.

    Shape broadcast(probs, uniform); the first unit is always kept.
    """
    keep = probs.flip(-1).cumsum(-1).flip(-1)[..., 1:]
    drop = probs.cumsum(-1)[..., :-1]
    rest = torch.sigmoid((keep.log() - drop.log() - torch.logit(uniform)) / temperature)
    return torch.cat([torch.ones_like(uniform).expand(*rest.shape[:-1], 1), rest], -1)


# In the widest floats there are, for laws of any size: exp(-10,000) and a weight of 5e-324 are numbers there.


def wide(x: Tensor) -> np.ndarray:
    return x.detach().double().numpy().astype(np.longdouble)


def log_probs_of(lengths: Tensor, are_logits: bool) -> np.ndarray:
    """Log-probabilities of lengths given by logits, or by weights, the same shape."""
    with np.errstate(divide="ignore"):
        logits = wide(lengths) if are_logits else np.log(wide(lengths))
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def tails(x: np.ndarray) -> np.ndarray:
    """Sums of every tail of the last dimension."""
    return x[..., ::-1].cumsum(-1)[..., ::-1]


def heads(x: np.ndarray) -> np.ndarray:
    """Sums of what comes before each entry of the last dimension; nothing is subtracted."""
    return np.concatenate([np.zeros_like(x[..., :1]), x[..., :-1]], -1).cumsum(-1)


def mean_of(log_probs: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Mean over lengths, of which the impossible ones count nothing."""
    return (np.exp(log_probs) * np.where(log_probs == -np.inf, 0, values)).sum(-1)
