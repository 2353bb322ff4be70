"""A Bayesian neural classifier that can be cut to any width."""

from collections.abc import Sequence
from functools import cached_property, partial

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal, init_to_sample
from torch import Tensor
from torch.nn.functional import relu

from pyro_vnd.distributions import OrderedMask
from pyro_vnd.infer import AutoNested, module_local_params


class MaskedPerceptron:
    r"""Multilayer perceptron with Normal weights and a learned ordered mask on each hidden layer.

    $$W_l \sim N(0, 2 / d_{l-1}), \qquad z_{nl} \sim \mathrm{OrderedMask.geometric}(\rho), \qquad
      h_{nl} = z_{nl} \odot \mathrm{relu}(W_l h_{n,l-1} + b_l), \qquad y_n \sim \mathrm{Categorical}(W h_{nL} + b).$$

    Each image n is seen through a width of its own, drawn from a law that all images share. Its optimum is the prior
    p_k reweighed by exp(-loss of width k) of one image: no width is starved, as it would be if one mask held for the
    whole data set, whose likelihood is N times stronger than the prior.

    Written out, to show the masks in a Pyro model of one's own; `pyro_vnd.nn.nest` makes the like of any torch net.

    Args:
        num_inputs: Pixels of an image.
        num_classes: Number of classes.
        hidden: Units of each hidden layer.
        keep: Prior probability to keep the next unit, rho: below one, so that narrow widths are cheaper.
    """

    def __init__(self, num_inputs: int, num_classes: int, hidden: Sequence[int] = (64, 64), keep: float = 0.95) -> None:
        self.keep = keep
        self.sizes = (num_inputs, *hidden, num_classes)
        self.mask_names = [f"mask{layer}" for layer in range(1, len(hidden) + 1)]

    def __call__(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Run the model on flattened images, shape (N, num_inputs), and labels; return the logits, shape (N, C)."""
        weights = []
        for layer, (fan_in, fan_out) in enumerate(zip(self.sizes[:-1], self.sizes[1:], strict=True), start=1):
            scale = x.new_tensor((2 / fan_in) ** 0.5)
            weight = pyro.sample(f"weight{layer}", dist.Normal(0, scale).expand([fan_in, fan_out]).to_event(2))
            bias = pyro.sample(f"bias{layer}", dist.Normal(0, x.new_ones(fan_out)).to_event(1))
            weights.append((weight, bias))
        with pyro.plate("data", len(x)):
            units = x
            for name, (weight, bias) in zip(self.mask_names, weights, strict=False):
                mask = pyro.sample(name, OrderedMask.geometric(x.new_tensor(self.keep), weight.shape[-1]))
                units = relu(units @ weight + bias) * mask
            logits = units @ weights[-1][0] + weights[-1][1]
            pyro.sample("label", dist.Categorical(logits=logits), obs=y)
        return logits

    @cached_property
    def guide(self) -> AutoNested:
        """A mean-field guide in which all images share the law of each mask.

        Mean field, as `base` and `create_plates` make it: an image has 64 x 64 pairs of lengths, and weights that know
        the lengths would be fitted to each. Batches may be of any size.
        """
        normal = partial(AutoNormal, init_loc_fn=init_to_sample, init_scale=0.02)
        return AutoNested(self, shared_plates=["data"], base=normal, create_plates=_data_plate)

    @torch.no_grad()
    def predict(self, x: Tensor, widths: Sequence[float], num_samples: int = 50) -> Tensor:
        """Return class probabilities of draws of the guide at given widths.

        Args:
            x: Flattened images, shape (N, num_inputs).
            widths: Fractions of the hidden units to keep, in (0, 1].
            num_samples: Number of draws of the weights; all widths use the same ones.

        Returns:
            Probabilities, shape (num_widths, num_samples, N, num_classes).

        Raises:
            ValueError: If a width is not in (0, 1].
        """
        bad = [width for width in widths if not 0 < width <= 1]
        if bad:
            raise ValueError(f"MaskedPerceptron.predict: argument `widths` must be fractions in (0, 1]; got {bad}")
        draws = []
        with module_local_params(self.guide):
            for _ in range(num_samples):
                trace = poutine.trace(self.guide).get_trace(x)
                draws.append([self._at_width(trace, x, width).softmax(-1) for width in widths])
        return torch.stack([torch.stack(draw) for draw in zip(*draws, strict=True)])

    def _at_width(self, trace: poutine.Trace, x: Tensor, width: float) -> Tensor:
        masks = {
            name: (torch.arange(size, device=x.device) < max(1, round(width * size))).to(x)
            for name, size in zip(self.mask_names, self.sizes[1:], strict=False)
        }
        return poutine.condition(poutine.replay(self, trace), data=masks)(x)


def _data_plate(x: Tensor, y: Tensor | None = None) -> pyro.plate:
    return pyro.plate("data", len(x))
