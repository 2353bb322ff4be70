"""Local reparameterisation: draw the outputs of a layer instead of its weights."""

from typing import Any, Literal

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import Normal

from pyro_vnd._sizes import is_one_of
from pyro_vnd.distributions import Gated
from pyro_vnd.distributions._fast.arrays import noisy
from pyro_vnd.distributions.weights import LogScaleNormal

__all__ = ["LocalReparameterization"]


class LocalReparameterization(Messenger):
    r"""Effect handler under which nested layers with Normal weights draw their outputs, one for each example.

    $$W \sim N(M, \Sigma) \Rightarrow y = W x \sim N(M x, \Sigma x^2),$$

    where Σ and the square act entry by entry. The law of each example's output is the same, and the gradient has less
    variance, because examples no longer share the noise of the weights. For a linear layer of vectors it is exact; the
    outputs for one example at different places of an image or sequence, correlated through their weights, are drawn
    independently, as is usual.

    Weights are not drawn: their value in a trace is their mean. Use the handler with an objective that has the KL of
    the weights in closed form, `NestedELBO(local_reparam=True)`; `Trace_ELBO` would score the mean.
    Weights whose prior has no closed-form KL from a Normal are drawn as ever.

    Args:
        layers: "all", or "linear" to draw the weights of convolutions as ever: cheaper, and with the noise that the
            places of an image share.

    Raises:
        ValueError: If `layers` is neither.

    Source: Kingma, Salimans and Welling, arXiv 1506.02557, section 2.3.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from pyro_vnd.infer import NestedELBO
        >>> from pyro_vnd.nn import NestedClassifier, nest
        >>> net = nest(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), torch.zeros(1, 4), num_blocks=4)
        >>> data = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
        >>> with LocalReparameterization():
        ...     loss = NestedELBO().differentiable_loss(NestedClassifier(net), net.guide, *data)
    """

    def __init__(self, layers: Literal["all", "linear"] = "all") -> None:
        super().__init__()
        if not is_one_of(layers, ("all", "linear")):
            raise ValueError(f"LocalReparameterization: argument `layers` must be 'all' or 'linear'; got {layers!r}")
        self.layers = layers
        self._kinds = ("linear", "convolution") if layers == "all" else ("linear",)

    def __repr__(self) -> str:
        return f"LocalReparameterization(layers={self.layers!r})"

    def __enter__(self) -> Any:
        self._variances: dict[int, tuple[Tensor, Tensor]] = {}  # with the mean, so that its number stays its own
        return super().__enter__()

    def __exit__(self, *args: Any) -> None:
        self._variances = {}
        super().__exit__(*args)

    def _pyro_sample(self, msg: Any) -> None:
        law = msg["fn"]
        if msg["done"] or msg["is_observed"] or msg["value"] is not None:
            return
        if msg["infer"].get("local_reparam") in self._kinds and isinstance(law, Gated) and isinstance(law.base, Normal):
            # A new tensor for each site and call, so that its identity says whose mean it is.
            mean, variance = _mean_and_variance(law)
            self._variances[id(mean)] = mean, variance
            msg["value"], msg["done"] = mean, True

    def _variance(self, mean: Tensor | None) -> Tensor | None:
        return None if mean is None or id(mean) not in self._variances else self._variances[id(mean)][1]

    def _pyro_affine(self, msg: Any) -> None:
        layer, x, weight, bias = msg["args"]
        weight_variance, bias_variance = self._variance(weight), self._variance(bias)
        if weight_variance is None and bias_variance is None:
            return
        mean = layer.affine(x, weight, bias)
        if weight_variance is None:  # the weights were drawn
            variance = layer.affine(torch.zeros_like(x), weight, bias_variance)
        else:
            variance = layer.affine(x * x, weight_variance, bias_variance)  # x.square() takes one array more backwards
        msg["value"], msg["done"] = noisy(mean, variance, torch.randn_like(mean)), True


def _mean_and_variance(law: Gated) -> tuple[Tensor, Tensor]:
    """Return the moments of an array of Normals; the first is a tensor that belongs to no other law."""
    base: Any = law.base
    if isinstance(base, LogScaleNormal) and base.batch_shape == law.event_shape:
        return base.mean_and_variance
    return base.loc.expand(law.event_shape).view(law.event_shape), law.variance
