"""An automatic guide for models with ordered masks, and parameters that belong to their modules."""

import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import groupby
from typing import Any, cast

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide, AutoGuideList, AutoNormal
from pyro.nn import PyroModule
from pyro.nn.module import PyroParam
from pyro.ops.tensor_utils import periodic_repeat
from torch import Tensor
from torch.distributions import constraints

from pyro_vnd._compat import give_local_params
from pyro_vnd.distributions import OrderedMask, OrderedMaskStraightThrough
from pyro_vnd.distributions.nested import find_mask
from pyro_vnd.distributions.straight_through import Noise
from pyro_vnd.infer.result import LengthSummary

__all__ = ["AutoMask", "AutoNested", "module_local_params"]


class AutoNested(AutoGuideList):
    r"""Guide for any Pyro model that has `OrderedMask` sites; other sites go to a Pyro autoguide.

    Each mask site gets an independent `OrderedMaskStraightThrough` whose logits, one a length, are learned and start
    at the law of the model. Sites keep the order of the model, as `TraceMeanField_ELBO` wants it.

    In a plate every row has a law of its own, as mean field has it. A plate named in `shared_plates` has one law for
    all its rows, each of which still draws a mask of its own: cheap for data plates, and the way to learn how long
    prefixes should be over a population.

    A mask that the model marks for enumeration, by `infer={"enumerate": "parallel"}` or by
    `AutoNested(config_enumerate(model))`, gets an exact `OrderedMask` with the same mark: `TraceEnum_ELBO` then takes
    the expectation over all K lengths, without noise or bias, for K evaluations of what depends on the mask.

    Weights of KLs that a site of the model has, `infer={"kl_weight": w}` or `"length_weight"`, are those of its site
    here, where `NestedELBO` reads them.

    Args:
        model: A Pyro model.
        noise: Noise of the straight-through masks, for all sites or by site name.
        temperature: Temperature of the straight-through masks, for all sites or by site name.
        shared_plates: Names of plates whose rows share the law of their masks.
        base: Makes the autoguide of all other sites from a model, `AutoMultivariateNormal` say. By default an
            `AutoNormal` for each run of sites between two masks.
        create_plates: As in Pyro's autoguides, for plates that subsample.

    Raises:
        ValueError: On the first call, if `noise` or `temperature` names a site, or `shared_plates` a plate, that the
            model does not have, if the model has no mask, or weights of KLs beside a `base`.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> from pyro_vnd.distributions import OrderedMask
        >>> def model(x, y):
        ...     mask = pyro.sample("mask", OrderedMask.uniform(3))
        ...     w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("y", dist.Normal(x @ (mask * w), 0.1), obs=y)
        >>> guide = AutoNested(model)
        >>> sorted(guide(torch.randn(5, 3), torch.randn(5)))
        ['mask', 'w']
        >>> guide.laws["mask"].keep_probs
        tensor([1.0000, 0.6667, 0.3333])
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        noise: Noise | Mapping[str, Noise] = "logistic",
        temperature: float | Mapping[str, float] = 0.2,
        shared_plates: Collection[str] = (),
        base: Callable[[Callable[..., Any]], AutoGuide] | None = None,
        create_plates: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__(model, create_plates=create_plates)
        self._noise, self._temperature = noise, temperature
        self._shared_plates = (shared_plates,) if isinstance(shared_plates, str) else tuple(shared_plates)
        self._base = base
        self._weights: dict[str, Any] = {}

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        super()._setup_prototype(*args, **kwargs)
        prototype: Any = self.prototype_trace
        sites = dict(prototype.iter_stochastic_nodes())
        masks = [name for name, site in sites.items() if isinstance(find_mask(site["fn"]), OrderedMask)]
        self._check_names(masks)
        keys = ("kl_weight", "length_weight")
        self._weights = {name: {k: s["infer"][k] for k in keys if k in s["infer"]} for name, s in sites.items()}
        others = [name for name in sites if name not in masks]
        if self._base is not None and (weighted := [name for name in others if self._weights[name]]):
            raise ValueError(
                f"AutoNested: sites {weighted} have weights of KLs in `infer`, which cannot be told apart in the guide "
                "that `base` makes: leave `base` out, or give `kl_weight` to fit"
            )
        for is_mask, run in groupby(sites, key=lambda name: name in masks):
            names = list(run)
            if is_mask:
                self._append_masks(names)
            elif self._base is None:
                self.append(AutoNormal(self._only(names)))
            elif names[0] == others[0]:
                self.append(self._base(self._only(others)))

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draw all latent sites."""
        with poutine.infer_config(config_fn=self._weights_of):
            return super().forward(*args, **kwargs)

    def _weights_of(self, site: Any) -> Any:
        # `AutoNormal` draws "w" as "w_unconstrained", whose entropy is part of the same divergence.
        return self._weights.get(site["name"].removesuffix("_unconstrained"), {})

    def _append_masks(self, names: list[str]) -> None:
        for name in names:
            self.append(
                AutoMask(
                    self._only([name]),
                    name,
                    self._noise if isinstance(self._noise, str) else self._noise.get(name, "logistic"),
                    self._temperature.get(name, 0.2) if isinstance(self._temperature, Mapping) else self._temperature,
                    self._shared_plates,
                )
            )

    # Pyro's guides forget their model when they are copied, the original's too, and its parts forget their guide.

    def __getstate__(self) -> dict[str, Any]:
        model = self._model
        state = super().__getstate__()
        self._model = model
        return {**state, "_model": model}

    def _create_plates(self, *args: Any, **kwargs: Any) -> Any:
        parts: Any = self
        for part in parts:
            part.master = weakref.ref(self)
        return super()._create_plates(*args, **kwargs)

    def _only(self, names: list[str]) -> Callable[..., Any]:
        return poutine.block(self.model, expose=names)

    def _check_names(self, masks: list[str]) -> None:
        if not masks:
            raise ValueError("AutoNested: the model has no latent OrderedMask site; use one of Pyro's autoguides")
        for argument, value in (("noise", self._noise), ("temperature", self._temperature)):
            unknown = sorted(set(value) - set(masks)) if isinstance(value, Mapping) else []
            if unknown:
                raise ValueError(f"AutoNested: argument `{argument}` names {unknown}; mask sites of the model: {masks}")
        unknown = sorted(set(self._shared_plates) - set(self._prototype_frames))
        if unknown:
            plates = sorted(self._prototype_frames)
            raise ValueError(f"AutoNested: argument `shared_plates` names {unknown}; plates of the model: {plates}")

    @property
    def laws(self) -> dict[str, OrderedMask]:
        """The learned law of each mask site, by name and without gradient; empty before the first call."""
        return {part.site_name: part.law() for part in self if isinstance(part, AutoMask)}

    def __bool__(self) -> bool:
        """A guide is true, also before its first call, when it has no parts yet."""
        return True

    def __repr__(self) -> str:
        parts: list[Any] = [*self] or [self]
        return f"AutoNested({_some([_describe(part) for part in parts], '; ')})"


def _describe(part: AutoGuide) -> str:
    prototype: Any = part.prototype_trace
    if prototype is None:
        return "not called yet"
    if isinstance(part, AutoMask):
        return f"{part.site_name}: {LengthSummary.of(part.law())}"
    return f"{_some(dict(prototype.iter_stochastic_nodes()))}: {type(part).__name__}"


def _some(names: Collection[str], separator: str = ", ") -> str:
    """Name the first ten."""
    more = [f"and {len(names) - 10} more"] if len(names) > 10 else []
    return separator.join([*list(names)[:10], *more])


class AutoMask(AutoGuide):
    """Straight-through or enumerated mask with learned logits for the one mask site of a model."""

    def __init__(
        self,
        model: Callable[..., Any],
        site_name: str,
        noise: Noise,
        temperature: float,
        shared_plates: tuple[str, ...],
    ) -> None:
        super().__init__(model)
        self.site_name, self.noise, self.temperature = site_name, noise, temperature
        self.shared_plates = shared_plates

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        super()._setup_prototype(*args, **kwargs)
        prototype: Any = self.prototype_trace
        site = prototype.nodes[self.site_name]
        prior: Any = find_mask(site["fn"])
        event_dim = site["fn"].event_dim
        self._frames, self._extra_dims = site["cond_indep_stack"], event_dim - 1
        self._enumerate = site["infer"].get("enumerate")
        logits = prior.logits.detach()
        for frame in self._frames:
            dim = frame.dim - event_dim
            full_size = frame.full_size or frame.size
            if frame.name in self.shared_plates:
                logits = logits.narrow(dim, 0, 1)
            elif full_size != frame.size:
                logits = periodic_repeat(logits, full_size, dim)
        # A length that the prior rules out would have an infinite KL: its probability underflows to zero and stays.
        logits = logits.clamp_min(-1e3).contiguous()
        self.logits = PyroParam(logits, constraints.real, event_dim)

    def _logits(self) -> Tensor:
        return cast(Tensor, self.logits)

    def law(self) -> OrderedMask:
        """Return the learned law, without gradient."""
        return OrderedMask(logits=self._logits().detach())

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draw the mask."""
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        plates = self._create_plates(*args, **kwargs)
        with ExitStack() as stack:
            for frame in self._frames:
                stack.enter_context(plates[frame.name])
            fn: Any = (
                OrderedMask(logits=self._logits())
                if self._enumerate
                else OrderedMaskStraightThrough(self.temperature, logits=self._logits(), noise=self.noise)
            )
            mask = pyro.sample(self.site_name, fn.to_event(self._extra_dims), infer={"enumerate": self._enumerate})
        return {self.site_name: mask}

    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Return the mask of the median length."""
        (median,) = self.quantiles([0.5])[self.site_name]
        return {self.site_name: median}

    def quantiles(self, quantiles: list[float], *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Return the masks of the given quantiles of the length, stacked in a new first dimension."""
        law = self.law()
        # The q-quantile of L is the smallest k with P(L <= k) >= q: unit i is kept where P(L >= i) > 1 - q.
        masks = torch.stack([(law.keep_probs > 1 - q).to(law.probs.dtype) for q in quantiles])
        masks[..., 0] = 1
        return {self.site_name: masks}


@contextmanager
def module_local_params(*modules: Any) -> Iterator[None]:
    """Run a block in which models and guides keep their own parameters.

    Pyro's `module_local_params` setting, also for modules that were made without it. Two guides of one name then do
    not read each other's values, which under the global store the second would, silently. Use it around calls of a
    guide that `fit` has trained.

    Args:
        *modules: Models and guides that are called in the block; those that are no modules are passed over.

    Yields:
        Nothing.

    Example:
        >>> import torch
        >>> from pyro_vnd.distributions import OrderedMask
        >>> from pyro_vnd.infer import AutoNested, module_local_params
        >>> def model():
        ...     return pyro.sample("mask", OrderedMask.uniform(3))
        >>> guide = AutoNested(model)
        >>> with module_local_params(guide):
        ...     draw = guide()
        >>> len(pyro.get_param_store())
        0
    """
    for module in modules:
        if isinstance(module, torch.nn.Module):
            for part in module.modules():
                if isinstance(part, PyroModule):
                    give_local_params(part)
    with pyro.settings.context(module_local_params=True):
        yield
