"""Predictions of a nested perceptron, and the same by hand in bare torch from what it has learned."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from models.nets import mlp
from pyro_vnd.diagnostics import evaluate_widths
from pyro_vnd.diagnostics.metrics.predictive import average_draws, predictive_metrics
from pyro_vnd.nn import NestedNet, nest

__all__ = [
    "draw_by_hand",
    "draws_of_inputs",
    "narrowed",
    "one_input_at_a_width",
    "outputs_by_hand",
    "scores_at_a_width",
]

Weights = list[tuple[Tensor, Tensor]]  # weight and bias by layer, of one draw
Functions = dict[str, Callable[[], object]]

INPUTS, HIDDEN, BLOCKS, CLASSES = 64, 128, 16, 10
DRAWS, ROWS, BATCH = 100, 10_000, 256
SCORED_DRAWS, SCORED_ROWS, WIDTH = 20, 1_000, 0.25


def perceptron() -> NestedNet:
    """Return a nested perceptron whose laws are not those it starts with."""
    net = nest(mlp(INPUTS, CLASSES, (HIDDEN, HIDDEN)), torch.zeros(1, INPUTS), num_blocks=BLOCKS).eval()
    for width in net.widths.values():
        width.logits.data.copy_(torch.linspace(-1, 1, len(width.logits)))
    return net


def draws_of_inputs() -> Functions:
    """Return outputs of many draws for many inputs, with lengths from the learned laws."""
    net, x = perceptron(), torch.rand(ROWS, INPUTS)

    def ours() -> Tensor:
        draws = net.draws(DRAWS)
        return torch.cat([draws.predict(rows) for rows in x.split(BATCH)], 1)

    @torch.no_grad()
    def by_hand() -> Tensor:
        draws, keep_probs = [draw_by_hand(net) for _ in range(DRAWS)], keep_probs_by_hand(net)
        parts = [torch.stack([outputs_by_hand(draw, rows, keep_probs) for draw in draws]) for rows in x.split(BATCH)]
        return torch.cat(parts, 1)

    return {"ours": ours, "by hand": by_hand}


def scores_at_a_width() -> Functions:
    """Return the scores of a net at one width."""
    net, x, y = perceptron(), torch.rand(SCORED_ROWS, INPUTS), torch.randint(CLASSES, (SCORED_ROWS,))

    def ours() -> object:
        return evaluate_widths(net, (x, y), [WIDTH], SCORED_DRAWS, progress=False)

    @torch.no_grad()
    def by_hand() -> object:
        draws = [narrowed(draw_by_hand(net), WIDTH) for _ in range(SCORED_DRAWS)]
        logits = [torch.stack([outputs_by_hand(draw, rows) for draw in draws]) for rows in x.split(BATCH)]
        return predictive_metrics(average_draws(logits=torch.cat(logits, 1)), y)

    return {"ours": ours, "by hand": by_hand}


def one_input_at_a_width() -> Functions:
    """Return the outputs of a kept draw that is cut, and those of a plain net that was built so, for one input."""
    draws, x = perceptron().draws(1), torch.rand(1, INPUTS)
    plain = mlp(INPUTS, CLASSES, (round(WIDTH * HIDDEN),) * 2).eval()

    @torch.no_grad()
    def built() -> Tensor:
        outputs: Tensor = plain(x)
        return outputs

    return {"ours": lambda: draws.predict(x, width=WIDTH), "built so": built}


@torch.no_grad()
def draw_by_hand(net: NestedNet) -> Weights:
    """Draw the weights of a nested perceptron."""
    weights = []
    for layer in net.layers.values():
        parameters = ((layer.plain.get_parameter(name), layer.log_scales[name]) for name in ("weight", "bias"))
        weight, bias = (torch.addcmul(mean, rho.exp(), torch.randn_like(mean)) for mean, rho in parameters)
        weights.append((weight, bias))
    return weights


@torch.no_grad()
def keep_probs_by_hand(net: NestedNet) -> list[Tensor]:
    """Return the probability with which each hidden unit is kept, by layer."""
    laws = [width.logits.softmax(-1) for width in net.widths.values()]
    return [law.flip(-1).cumsum(-1).flip(-1).repeat_interleave(HIDDEN // BLOCKS) for law in laws]


def outputs_by_hand(weights: Weights, x: Tensor, keep_probs: Sequence[Tensor] = ()) -> Tensor:
    """Run a draw of a perceptron on a batch, under a mask for each row and hidden layer if any may be dropped."""
    *hidden, last = weights
    for number, (weight, bias) in enumerate(hidden):
        x = F.linear(x, weight, bias).relu_()
        if keep_probs:
            x *= torch.rand(len(x), 1) * keep_probs[number][0] < keep_probs[number]  # the first unit is always kept
    return F.linear(x, *last)


def narrowed(weights: Weights, width: float) -> Weights:
    """Cut a draw of a perceptron to a width."""
    kept, inputs = [], weights[0][0].shape[1]
    for number, (weight, bias) in enumerate(weights, 1):
        units = len(bias) if number == len(weights) else round(width * len(bias))
        kept.append((weight[:units, :inputs].clone(), bias[:units]))
        inputs = units
    return kept
