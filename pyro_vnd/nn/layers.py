"""Linear and convolutional layers whose units may be cut and whose weights may be random."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, cast

import pyro
import torch
from pyro.poutine.runtime import effectful
from torch import Tensor, nn
from torch.distributions import Distribution, Normal, kl_divergence
from torch.nn import functional as F

from pyro_vnd._compat import has_hooks
from pyro_vnd.distributions import Gated
from pyro_vnd.distributions.weights import FixedNormal, LogScaleNormal, fixed_normal
from pyro_vnd.nn.axis import Axis, Channels, Index, Rows, joint_keep_probs, kept_channels, take
from pyro_vnd.nn.reads import MaskedReads, Read, apply_mask, on_its_own, substituted
from pyro_vnd.nn.width import Width

if TYPE_CHECKING:
    from pyro_vnd.nn.depth import NestedBlock

__all__ = [
    "AFFINE",
    "NestedLayer",
    "Prior",
    "affine",
    "affine_kind",
    "cut_law",
    "drawn_entries",
    "entry_law",
    "in_block",
    "spread_of",
]

Plain = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
Prior = Distribution | Callable[[str, nn.Module], Distribution] | Mapping[str, Any]

AFFINE: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.Linear: F.linear,
    nn.Conv1d: F.conv1d,
    nn.Conv2d: F.conv2d,
    nn.Conv3d: F.conv3d,
    nn.ConvTranspose1d: F.conv_transpose1d,
    nn.ConvTranspose2d: F.conv_transpose2d,
    nn.ConvTranspose3d: F.conv_transpose3d,
}
SIZES = ("in_features", "out_features", "in_channels", "out_channels")


def affine_kind(layer: nn.Module) -> type[nn.Module] | None:
    """Return the linear or convolutional class of torch that a layer is of, or a subclass of; None if it is none."""
    return next((kind for kind in AFFINE if isinstance(layer, kind)), None)


@effectful(type="affine")
def affine(layer: NestedLayer, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Apply a layer with given weights; an effect, so that a handler can draw the outputs rather than the weights."""
    return layer.affine(x, weight, bias)


class NestedLayer(nn.Module):
    r"""A linear or convolutional layer with widths at its inputs and outputs, and random weights.

    $$y = W (z_{in} \odot x) + b, \qquad W_{oi} \sim q = N(\mu_{oi}, \sigma_{oi}^2), \qquad p = \text{the prior}.$$

    The mask of the inputs acts here, where they are read: after whatever norm, activation or sum came between. In a
    sliced pass only the kept rows and columns of the weights exist. The layer draws nothing itself: `NestedNet` draws
    the weights of all its layers before a pass. Used outside one, the layer computes with the posterior mean. Layers
    with a forward of their own, or with hooks, run it, and find the drawn weights in the place of their parameters.

    Args:
        layer: A torch layer, or of a subclass, whose weights are the starting means: pretrained ones, or torch's own.
        inputs: Width of the input channels, or runs of several, or None if they are left whole.
        outputs: Width of the output channels.
        prior: Law of each weight, or a function of the parameter's name ("weight" or "bias") and the layer that
            returns it, or a mapping with the keys "weight" and "bias"; None makes the weights point estimates. The
            default is N(0, 2 / fan_in) for weights and N(0, 1) for biases.
        init_scale: Starting standard deviation of the posterior as a share of the prior's, or of N(0, 2 / fan_in)
            where that has none.
        rows: Where the examples lie in the inputs; by default along the first axis.

    Raises:
        ValueError: If the layer is of another kind, or an argument does not fit it.

    Source: Cui et al., arXiv 2101.11353, section 4.2; Blundell et al., arXiv 1505.05424 (mean-field weights).

    Example:
        >>> import torch
        >>> hidden = Width("hidden", 6, num_blocks=3)
        >>> layer = NestedLayer(torch.nn.Linear(4, 6), outputs=hidden)
        >>> layer(torch.zeros(2, 4)).shape
        torch.Size([2, 6])
    """

    def __init__(
        self,
        layer: nn.Module,
        *,
        inputs: Channels = None,
        outputs: Channels = None,
        prior: Prior | Literal["normal"] | None = "normal",
        init_scale: float = 0.1,
        rows: Rows | None = None,
    ) -> None:
        super().__init__()
        kind = affine_kind(layer)
        if kind is None:
            known = ", ".join(kind.__name__ for kind in AFFINE)
            raise ValueError(f"NestedLayer: argument `layer` must be one of {known}; got {type(layer).__name__}")
        if isinstance(prior, str) and prior != "normal":
            raise ValueError(f"NestedLayer: argument `prior` must be 'normal', a law or None; got {prior!r}")
        if not 0 < init_scale < math.inf:
            raise ValueError(f"NestedLayer: argument `init_scale` must be finite and > 0; got {init_scale}")
        self.plain: Any = layer  # its weights are the means
        self.kind, self.rows = kind, rows
        self.runs_plain = type(layer).forward is not kind.forward or has_hooks(layer)
        self.transposed, self.groups = "Transpose" in kind.__name__, getattr(layer, "groups", 1)
        linear, plain = isinstance(layer, nn.Linear), cast(Any, layer)
        self.channel_dim = -1 if linear else 1
        self.input_axis = Axis(plain.in_features if linear else plain.in_channels, inputs)
        self.output_axis = Axis(plain.out_features if linear else plain.out_channels, outputs)
        self.prior = fan_in_normal if isinstance(prior, str) else prior
        self.log_scales = nn.ParameterDict()
        if self.prior is not None:
            for name, mean in layer.named_parameters():
                scale = init_scale * self._spread_of_prior(name)
                self.log_scales[name] = nn.Parameter(torch.full_like(mean.detach(), math.log(scale)))
        # Outputs are drawn rather than weights only where nobody else sees the weights.
        self.draws_outputs = {name: self._has_exact_kl(name) and not self.runs_plain for name in self.log_scales}
        self.values: dict[str, Tensor] = {}
        self.is_read = False
        self.block: NestedBlock | None = None  # that may be dropped, and the layer with it

    @property
    def widths(self) -> list[Width]:
        """The widths of its inputs and outputs, each once."""
        return list(dict.fromkeys(self.input_axis.widths + self.output_axis.widths))

    def share(self) -> None:
        """Let others read the weights, too: what is drawn is then weights, and the same ones for all."""
        self.is_read, self.draws_outputs = True, dict.fromkeys(self.draws_outputs, False)

    def _spread_of_prior(self, name: str) -> float:
        return spread_of(self.prior_of(name)) or fan_in_normal(name, self.plain).stddev.item()

    def _has_exact_kl(self, name: str) -> bool:
        try:
            kl_divergence(Normal(torch.zeros(()), torch.ones(())), self.prior_of(name))
        except NotImplementedError:
            return False
        return True

    def prior_of(self, name: str) -> Distribution:
        """Return the prior of the entries of "weight" or "bias"."""
        prior: Any = self.prior
        if isinstance(prior, Mapping):
            if name not in prior:
                raise ValueError(f"NestedLayer: argument `prior` lacks {name!r}; got {list(prior)}")
            prior = prior[name]
        return entry_law("NestedLayer", prior, name, self.plain)

    def take(self, name: str, x: Tensor, index: tuple[Index, Index] | None = None) -> Tensor:
        """Return the kept rows and columns of an array of the shape of a parameter.

        Args:
            name: "weight" or "bias".
            x: The array.
            index: Kept outputs and inputs; those of this forward pass by default.
        """
        rows, columns = (self.output_axis.index(), self.input_axis.index()) if index is None else index
        return x if rows is None and columns is None else take(x, self._along(name, (rows, columns)))

    def num_parameters(self, name: str, kept: Mapping[str, int]) -> int:
        """Return how many entries of "weight" or "bias" are left when groups keep a number of units."""
        cut = self._along(name, (self.output_axis.index(kept), self.input_axis.index(kept)))
        return math.prod(
            kept_channels(cut.get(dim), size) for dim, size in enumerate(self.plain.get_parameter(name).shape)
        )

    def _along(self, name: str, index: tuple[Index, Index]) -> dict[int, Index]:
        """Say along which dimensions of a parameter the kept outputs and inputs lie."""
        rows, columns = index
        if name == "bias":
            return {0: rows}
        if self.groups > 1:
            # A kept group of the convolution stays whole: only the dimension that runs over groups is cut.
            return {0: columns if self.transposed else rows}
        return {0: columns, 1: rows} if self.transposed else {0: rows, 1: columns}

    def gate(self, name: str) -> Tensor | None:
        """Return P(both units and the block around them kept) for each entry of a parameter; None if all count."""
        ends = (self.input_axis, self.output_axis) if self.transposed else (self.output_axis, self.input_axis)
        if all(width.keep_probs is None for axis in ends for width in axis.widths):
            return in_block(None, self.block)
        # The two ends of a grouped convolution are the same width.
        axes = (self.output_axis,) if name == "bias" else ends[:1] if self.groups > 1 else ends
        gate = joint_keep_probs(dict(enumerate(axes)), self.plain.get_parameter(name).dim())
        return in_block(gate, self.block)

    def law(self, name: str, which: Literal["prior", "posterior"]) -> Gated:
        """Return the prior or posterior of the kept part of a parameter.

        The posterior counts in so far as both units are kept, and is the prior where they are dropped.
        """
        mean, prior = self.take(name, getattr(self.plain, name)), self._kept_prior(name)
        if which == "prior":
            return Gated._of(prior, mean.shape)
        return posterior_law(mean, self.take(name, self.log_scales[name]), prior, self.gate(name))

    def _kept_prior(self, name: str) -> Distribution:
        law = self.prior_of(name)
        if law.batch_shape.numel() == 1 or not (self.input_axis.is_sliced or self.output_axis.is_sliced):
            return law
        return cut_law(law, lambda x: self.take(name, x))

    def draw(self, which: Literal["prior", "posterior"], site: str) -> dict[str, Tensor]:
        """Draw the weights for the coming pass, at the Pyro sites `site.weight` and `site.bias`."""
        kind = "linear" if self.channel_dim == -1 else "convolution"
        for name, draws_outputs in self.draws_outputs.items():
            infer: Any = {"local_reparam": kind if draws_outputs else None}
            law = self.law(name, which)
            self.values[name] = drawn_entries(f"{site}.{name}", law, getattr(self.plain, name), infer)
        return {f"{site}.{name}": value for name, value in self.values.items()}

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (as torch's layers name it)
        """Mask the inputs and apply the layer.

        Args:
            input: Inputs, shape (N, ..., channels) for linear layers and (N, channels, ...) for convolutions; in a
                sliced pass with the kept channels only.

        Returns:
            Outputs; those of dropped units are left to the layers that read them.
        """
        if self.runs_plain:
            return self._run_plain(input)
        if self.is_read:
            with on_its_own():
                return self._run(input)
        return self._run(input)

    def _run(self, x: Tensor) -> Tensor:
        weight, bias = self.value("weight"), self.value("bias")
        return affine(self, apply_mask(x, self.input_axis.mask(), self.channel_dim, self.rows), weight, bias)

    def value(self, name: str) -> Any:
        """Return the "weight" or "bias" that this forward pass computes with, drawn or the mean; None if there is none.

        Layers that share a parameter share what is drawn for it.
        """
        if name in self.values:
            return self.values[name]
        mean = self.plain.get_parameter(name) if getattr(self.plain, name, None) is not None else None
        return None if mean is None else self.take(name, mean)

    def __getattr__(self, name: str) -> Any:
        """Return what the plain layer has: the code of a net may ask for it; weights and sizes are of this pass."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "plain" not in vars(self).get("_modules", {}) or name.startswith("__"):
                raise
        if name in ("weight", "bias"):
            return self.value(name)
        if name in SIZES:
            axis = self.input_axis if name.startswith("in") else self.output_axis
            return kept_channels(axis.index(), axis.size)
        return getattr(self.plain, name)

    def _run_plain(self, x: Tensor) -> Tensor:
        """Run the layer as it is written, with the weights of this pass in the place of its own."""
        weight, bias = self.value("weight"), self.value("bias")
        values: dict[str, Any] = {"weight": weight} | ({} if bias is None else {"bias": bias})
        if self.groups > 1:
            kept = kept_channels(self.input_axis.index(), self.input_axis.size)
            values["groups"] = self.groups * kept // self.input_axis.size
        own = [] if self.is_read else [(weight, Read(self.input_axis, self.rows))]  # else functions mask it anyway
        with substituted(self.plain, values), MaskedReads(own):
            return self.plain(x)

    def affine(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Apply the plain layer's operation with other weights, whole or sliced."""
        plain = self.plain
        if isinstance(plain, nn.Linear):
            return F.linear(x, weight, bias)
        groups = self.groups
        if groups > 1:
            groups = groups * x.shape[1] // self.input_axis.size
        if self.transposed:
            return AFFINE[self.kind](
                x, weight, bias, plain.stride, plain.padding, plain.output_padding, groups, plain.dilation
            )
        padding = plain.padding
        if plain.padding_mode != "zeros":
            x, padding = F.pad(x, _padding_of_ends(plain), mode=plain.padding_mode), 0
        return AFFINE[self.kind](x, weight, bias, plain.stride, padding, plain.dilation, groups)

    def extra_repr(self) -> str:
        """Describe the layer in the representation of a net."""
        names = [[width.name for width in axis.widths] for axis in (self.input_axis, self.output_axis)]
        return f"inputs={names[0] or 'whole'}, outputs={names[1] or 'whole'}"


def _padding_of_ends(plain: Any) -> list[int]:
    """Return the padding of a convolution at both ends of each axis, the last axis first, as `F.pad` takes it."""
    if isinstance(plain.padding, str):
        sizes = zip(plain.kernel_size, plain.dilation, strict=True)
        totals = [dilation * (size - 1) if plain.padding == "same" else 0 for size, dilation in sizes]
        ends = [(total // 2, total - total // 2) for total in totals]
    else:
        ends = [(size, size) for size in plain.padding]
    return [end for both in reversed(ends) for end in both]


def fan_in_normal(name: str, layer: nn.Module) -> Normal:
    """Return N(0, 2 / fan_in) for weights, which keeps the scale of rectified units, and N(0, 1) for biases."""
    weight: Any = layer.weight
    fan_in = math.prod(weight.shape[1:])
    if "Transpose" in type(layer).__name__:
        fan_in = weight.numel() // weight.shape[1] // layer.groups
    return fixed_normal(0.0, math.sqrt(2 / max(1, fan_in)) if name == "weight" else 1.0, weight)


def entry_law(caller: str, prior: Any, name: str, module: nn.Module) -> Distribution:
    """Return the prior of the entries of a parameter: a law, or what a function of its name and module returns."""
    if not isinstance(prior, Distribution) and not callable(prior):
        raise ValueError(
            f"{caller}: the prior of {name!r} must be a law, or a function that returns one; `nest` takes 'normal', a "
            f"scale and None, too; got {prior!r}"
        )
    law = prior if isinstance(prior, Distribution) else prior(name, module)
    if isinstance(law, FixedNormal) and not law.batch_shape:  # one entry
        return law
    shape = module.get_parameter(name).shape
    if law.event_shape or law.batch_shape.numel() not in (1, shape.numel()):
        raise ValueError(
            f"{caller}: the prior of {name!r} must have one entry, or those of the array {tuple(shape)}; got {law}"
        )
    return law


def posterior_law(mean: Tensor, log_scale: Tensor, prior: Any, gate: Tensor | None) -> Gated:
    """Return the law of an array of Normals, which is the prior in so far as the gate leaves entries out.

    Args:
        mean: Means.
        log_scale: Logarithms of the standard deviations.
        prior: The law of each entry a priori.
        gate: Probability that each entry counts; None if all do.
    """
    base = LogScaleNormal(mean, log_scale, prior=prior if isinstance(prior, FixedNormal) else None, validate_args=False)
    return Gated._of(base, mean.shape, gate, None if gate is None else prior)


def in_block(gate: Tensor | None, block: NestedBlock | None) -> Tensor | None:
    """Return the probability that entries count and the block around them, if there is one, is kept.

    Args:
        gate: Probability that each entry counts; None if all do.
        block: What may be dropped with them. Its mask is independent of theirs.
    """
    kept = None if block is None else block.keep_prob()
    return gate if kept is None else kept if gate is None else gate * kept.to(gate.device)


def drawn_entries(site: str, law: Any, like: Tensor, infer: Any = None) -> Tensor:
    """Draw an array at a Pyro site, of the type of a parameter and with as many axes.

    Raises:
        ValueError: If the site is in a plate.
    """
    value = pyro.sample(site, law, infer=infer)
    extra = value.dim() - like.dim()
    if extra and value.shape[:extra].numel() > 1:
        raise ValueError(
            f"site {site}: weights were drawn in a plate, shape {tuple(value.shape)}; call the net outside of plates, "
            "and use several particles without vectorize_particles"
        )
    value = value.reshape(value.shape[extra:]) if extra else value  # `Predictive` puts ones before the shape
    return value.to(like.dtype)  # a prior may be of another precision


def spread_of(law: Distribution) -> float | None:
    """Return the standard deviation of a law, None if it has none."""
    try:
        spread = law.stddev.mean().item()
    except (NotImplementedError, AttributeError):
        return None
    return spread if 0 < spread < math.inf else None


def cut_law(law: Any, cut: Callable[[Tensor], Tensor]) -> Distribution:
    """Cut each tensor argument of a distribution over the entries of an array."""
    shape = law.batch_shape
    arguments = {name: cut(getattr(law, name).expand(shape)) for name in law.arg_constraints if hasattr(law, name)}
    if {"probs", "logits"} <= set(arguments):
        del arguments["logits"]
    try:
        return type(law)(**arguments)
    except TypeError as error:
        raise ValueError(
            f"a prior {law} with entries of its own cannot be cut: give one law for all entries"
        ) from error
