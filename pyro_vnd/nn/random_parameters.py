"""Laws of parameters that no nested layer has: class tokens, position embeddings, scales of layers, tables."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Normal

from pyro_vnd.distributions import Gated
from pyro_vnd.distributions.weights import fixed_normal
from pyro_vnd.nn.axis import Axis, Index, joint_keep_probs, take
from pyro_vnd.nn.layers import cut_law, drawn_entries, entry_law, in_block, posterior_law, spread_of
from pyro_vnd.nn.reads import substituted

if TYPE_CHECKING:
    from pyro_vnd.nn.depth import NestedBlock

__all__ = ["RandomParameter", "ZeroMeanNormal"]


@dataclass(frozen=True)
class ZeroMeanNormal:
    """The prior N(0, scale^2) of each entry of any parameter.

    Attributes:
        scale: Standard deviation.
    """

    scale: float = 1.0

    def __call__(self, name: str, module: nn.Module) -> Normal:
        """Return the law, of the type and on the device of the parameter."""
        return fixed_normal(0.0, self.scale, module.get_parameter(name))


class RandomParameter(nn.Module):
    r"""A parameter of a module that is no nested layer, with independent Normal entries.

    $$w_e \sim q = N(\mu_e, \sigma_e^2), \qquad p = \text{the prior}, \qquad
    \mathrm{KL} = \sum_e P(\text{units of } e \text{ kept}) \, \mathrm{KL}(q_e \| p_e).$$

    The parameter itself is the mean. `NestedNet` draws it before a pass, in which the module finds the draw in its
    place. Entries of dropped units follow the prior, as in `NestedLayer`.

    Args:
        name: Its name in the net, which is that of its Pyro site.
        module: The module that has it.
        axes: Channels along its axes, where these can be cut.
        prior: Law of each entry, or a function of the parameter's own name and its module that returns it.
        init_scale: Starting standard deviation of the posterior as a share of the prior's, or of one where that has
            none.

    Raises:
        ValueError: If the prior does not fit the parameter.
    """

    def __init__(
        self, name: str, module: nn.Module, axes: Mapping[int, Axis], prior: Any, init_scale: float = 0.1
    ) -> None:
        super().__init__()
        self.name, self.key, self.axes, self.prior = name, name.rpartition(".")[2], dict(axes), prior
        self._holder = (module,)  # which is a part of the net, and not of this
        scale = init_scale * (spread_of(self._prior()) or 1.0)
        self.log_scale = nn.Parameter(torch.full_like(self.mean.detach(), math.log(scale)))
        self.value: Tensor | None = None
        self.block: NestedBlock | None = None  # that may be dropped, and the parameter with it

    @property
    def module(self) -> nn.Module:
        """The module that has it."""
        return self._holder[0]

    @property
    def mean(self) -> nn.Parameter:
        """The parameter."""
        return dict(self.module.named_parameters(recurse=False))[self.key]

    def _prior(self) -> Distribution:
        return entry_law("nest", self.prior, self.key, self.module)

    def take(self, x: Tensor, kept: Mapping[str, int] | None = None) -> Tensor:
        """Return the kept part of an array of the shape of the parameter, as `Axis.index` says what is kept."""
        index: dict[int, Index] = {dim: axis.index(kept) for dim, axis in self.axes.items()}
        return take(x, index)

    def law(self, which: Literal["prior", "posterior"]) -> Gated:
        """Return the prior or the posterior of the part that this forward pass computes with."""
        mean, prior = self.take(self.mean), self._prior()
        if prior.batch_shape.numel() != 1 and any(axis.is_sliced for axis in self.axes.values()):
            prior = cut_law(prior, self.take)
        if which == "prior":
            return Gated._of(prior, mean.shape)
        gate = in_block(joint_keep_probs(self.axes, mean.dim()), self.block)
        return posterior_law(mean, self.take(self.log_scale), prior, gate)

    def draw(self, which: Literal["prior", "posterior"], prefix: str) -> dict[str, Tensor]:
        """Draw the parameter for the coming pass, at the Pyro site of its name."""
        site = f"{prefix}{self.name}"
        self.value = drawn_entries(site, self.law(which), self.mean)
        return {site: self.value}

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the module find what was drawn inside a block; its own parameter, if nothing was."""
        with substituted(self.module, {} if self.value is None else {self.key: self.value}):
            yield
