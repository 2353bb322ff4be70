"""Bias and spread of straight-through gradients, against the exact gradient by enumeration."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_vnd.distributions import OrderedMask

__all__ = ["OBJECTIVES", "Problem", "Quality", "exact_gradient", "gradient_quality", "make_problem"]

OBJECTIVES = {
    "network": "smooth and nonlinear: f(z) = |g(h z) - g(h)|^2, g(x) = B tanh(A x), A and B random",
    "linear": "smooth and quadratic: f(z) = |W(h z) - W h|^2, column i of W random and scaled by 1/i",
}
DRAWS = 4  # masks an estimate
BLOCKS = 20  # the fewest for a jackknife


@dataclass(frozen=True)
class Problem:
    """An expected loss to differentiate.

    Attributes:
        logits: One law a data row, shape (rows, K).
        loss: Maps masks of shape (..., rows, K) to losses of shape (..., rows).
    """

    logits: Tensor
    loss: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Quality:
    """How good a gradient estimator is, in units of the norm of the exact gradient.

    Attributes:
        bias: Norm of the mean error. What finitely many estimates leave there by chance is subtracted from its square.
        bias_error: Standard error of `bias`, by the jackknife.
        deviation: Root mean squared norm of the deviation of an estimate from the mean estimate.
        estimates: How many estimates that took.
    """

    bias: float
    bias_error: float
    deviation: float
    estimates: int


def make_problem(objective: str, *, rows: int = 64, num_units: int = 32, seed: int = 0) -> Problem:
    """Build one of `OBJECTIVES`: the loss of cutting the units h of each data row after a random length.

    Rows share the weights and differ in h and in the law of their length, as with an amortised guide. Units, weights
    and logits are standard normal numbers, divided by the square root of the number of inputs in the network.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    units, logits = normal(rows, num_units), normal(rows, num_units)
    if objective == "network":
        hidden = 64
        first, second = normal(num_units, hidden) / num_units**0.5, normal(hidden, 10) / hidden**0.5

        def output(z: Tensor) -> Tensor:
            return ((units * z) @ first).tanh() @ second

    elif objective == "linear":
        weights = normal(num_units, 10) / torch.arange(1, num_units + 1).unsqueeze(-1)

        def output(z: Tensor) -> Tensor:
            return (units * z) @ weights

    else:
        raise ValueError(f"unknown objective {objective!r}: choose from {', '.join(OBJECTIVES)}")
    full = output(torch.ones(num_units))
    return Problem(logits, lambda z: (output(z) - full).square().sum(-1))


def exact_gradient(problem: Problem) -> Tensor:
    """Return the gradient of the expected losses with respect to the logits, summed over all K lengths."""
    logits = problem.logits.clone().requires_grad_()
    law = OrderedMask(logits=logits)
    losses = problem.loss(law.enumerate_support(expand=False))  # shape (K, rows)
    (gradient,) = torch.autograd.grad((law.probs * losses.T).sum(), logits)
    return gradient


def gradient_quality(
    draw: Callable[[Tensor, torch.Size], Tensor],
    problem: Problem,
    *,
    block: int = 100,
    max_blocks: int = 200,
    tolerance: float = 0.015,
) -> Quality:
    """Compare gradient estimates, each from four masks a row, with the exact gradient.

    Args:
        draw: Draws masks from logits and a sample shape, with a gradient.
        problem: What to differentiate.
        block: Estimates drawn at once; the jackknife leaves out one block at a time.
        max_blocks: Blocks to stop at.
        tolerance: Standard error of the relative bias to stop at.

    Returns:
        Bias and deviation over all rows and logits taken as one vector.
    """
    exact = exact_gradient(problem).double().flatten()
    logits = problem.logits.expand(block, *problem.logits.shape).clone().requires_grad_()
    errors, variances = [], []
    while True:
        masks = draw(logits, torch.Size([DRAWS]))
        (gradients,) = torch.autograd.grad(problem.loss(masks).mean(0).sum(), logits)
        gradients = gradients.double().flatten(1) / exact.norm()
        errors.append(gradients.mean(0) - exact / exact.norm())
        variances.append(gradients.var(0).sum())
        if len(errors) % BLOCKS == 0:
            quality = _summary(torch.stack(errors), torch.stack(variances).mean(), block)
            if quality.bias_error <= tolerance or len(errors) >= max_blocks:
                return quality


def _summary(errors: Tensor, variance: Tensor, block: int) -> Quality:
    """Summarise the mean error of each block, shape (blocks, parameters), and the variance of one estimate."""
    blocks = len(errors)
    total = errors.sum(0)
    squared_bias = (total / blocks).square().sum() - variance / (blocks * block)
    left_out = ((total - errors) / (blocks - 1)).square().sum(-1) - variance / ((blocks - 1) * block)
    squared_bias_error = ((blocks - 1) * left_out.var(correction=0)).sqrt()
    # From the bias up to the bias whose square is one standard error more: this holds at a bias of zero too.
    bias = squared_bias.clamp_min(0).sqrt()
    bias_error = (bias.square() + squared_bias_error).sqrt() - bias
    return Quality(bias.item(), bias_error.item(), variance.sqrt().item(), blocks * block)
