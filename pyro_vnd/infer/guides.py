"""An automatic guide for models with ordered masks, and parameters that belong to their modules."""

import warnings
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from itertools import groupby
from typing import Any, Literal, cast

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide, AutoGuideList, AutoNormal
from pyro.infer.autoguide.initialization import init_to_median
from pyro.nn import PyroModule
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_vnd._compat import give_local_params
from pyro_vnd._sizes import is_one_of
from pyro_vnd.distributions import OrderedMask
from pyro_vnd.distributions.straight_through import Noise
from pyro_vnd.infer._conditional.guide import AutoConditional
from pyro_vnd.infer._conditional.layout import Plan
from pyro_vnd.infer._conditional.layout import plan as make_plan
from pyro_vnd.infer._model_sites import AsInModel, ModelRun, is_plain, run_model
from pyro_vnd.infer.amortised import AutoAmortised, LengthsByRow, amortised_site
from pyro_vnd.infer.auto_parts import AutoLengths, AutoRelaxedMask, part_for

__all__ = ["AutoNested", "module_local_params"]


class AutoNested(LengthsByRow, AutoGuideList):
    r"""Guide for any Pyro model with ordered masks, or numbers that may be cut.

    By default all other latents w know the lengths L, and the law of the lengths is the best one there is for them,

    $$q(L, w) = q(L) \, q(w \mid L), \qquad q(L = k) \propto p(L = k) \exp(\mathrm{ELBO}_k),$$

    where $q(w \mid L = k)$ is a Normal law for each length, with correlations where these are few enough, and
    $\mathrm{ELBO}_k$ what it makes of the model at that length. Each step evaluates all lengths, with the same
    `num_draws` draws, and trains their laws with equal weight, so that none is given up before it was learned. Under
    `NestedELBO`, and so in `fit`, which has settings for this guide, models are taken as they are written; under
    `pyro.infer.SVI` with `TraceEnum_ELBO` they must broadcast, as enumeration wants it. The best law is a running mean
    of the last steps; `fit` takes it from all data at the end. Masks in the plate of the data have a law for each row,
    of which the latents in that plate know the lengths. Several masks outside it have a joint law, or, if their lengths
    have more than 256 combinations, a law each, and the tables of the others are sums of one for each mask.

    Mean field, `latents="mean_field"`, is for models with too many lengths or too dear ones. It is much cheaper in
    large models, but wrong about lengths wherever other latents matter: they have one law, which must fit all lengths.
    Each `OrderedMask` site then gets an independent `OrderedMaskStraightThrough` with learned logits; a
    `RelaxedOrderedMask` another one, of the same temperature; a `NestedNormal` or `NestedAutoregressive` a
    `NestedNormal`, the latter's from zeros; other sites an `AutoNormal`. All lengths start at their law in the model,
    and sites keep its order, as `TraceMeanField_ELBO` wants it. A mask that the model marks for enumeration gets an
    exact `OrderedMask` with the same mark, for `TraceEnum_ELBO`.

    A plate named in `shared_plates` has one law of lengths for all its rows, each of which still draws a mask of its
    own: cheap for data plates, and the way to learn how long prefixes should be over a population. A plate to which the
    model gives rows, `pyro.plate("data", N, subsample=i)`, has these here, and each row starts at the prior that it has
    when a call first has it.

    The mask and the scale that a latent has in the model, `poutine.mask`, `poutine.scale` and `law.mask(...)`, hold for
    its site here, so that rows that a model hides cost nothing and teach nothing. They are those of each call, for
    which the model is run once more where it has any. Weights of KLs that a site of the model has,
    `infer={"kl_weight": w}` or `"length_weight"`, are those of its site here, where `NestedELBO` reads them.

    With `amortise`, lengths are by row in another way: a network looks at rows, which need not be those of the fit, and
    a `ValueHead` on its features says what each length is worth to a row, and so its law at any price: see `lengths`.
    `fit` teaches it what rows turn out to be worth at the lengths that they draw, at random prices with a
    `PriceSchedule`; or `distil_lengths` does, after any fit. This is mean field: the other latents have one law for all
    lengths. The mask, or `NestedNormal`, is the only one in a plate, and has one law a priori.

    | latents know the lengths by default where these | are so |
    |---|---|
    | arguments for mean field | not given: `noise`, `temperature`, `base`, `create_plates`, `amortise` |
    | masks | outside plates, or in one stack of plates with data |
    | combinations of lengths | at most 256, or the lengths of all masks, if these are outside plates |
    | plates of latents | not subsampled |
    | observed numbers, by combination and draw | at most $2^{24}$ in a step |

    All latents are one block, or, where lengths are by row or latents are too many, those in the same plates with data
    are. A block of D latents has correlations where lengths times $D^2$ are at most $2^{20}$, and laws for each length
    at all where lengths times D are at most $2^{17}$. `repr` says what there is, and why if it is mean field.

    Args:
        model: A Pyro model.
        latents: "conditional" if all other latents must know the lengths, "mean_field" if they must not; by default
            they do where the table above has it.
        noise: Noise of the straight-through masks, for all sites or by site name.
        temperature: Temperature of the straight-through masks, for all sites or by site name.
        shared_plates: Names of plates whose rows share the law of their lengths.
        base: Makes the autoguide of all other sites from a model, `AutoMultivariateNormal` say. By default an
            `AutoNormal` for each run of sites between two masks.
        create_plates: As in Pyro's autoguides, for plates of another size in each call.
        num_draws: Draws of latents that know the lengths for each of these; every second one mirrors the one before.
        amortise: Maps the arguments of the model to features of its rows, shape (N, D). A module is trained with the
            guide: by the bound through the means and deviations of a `NestedNormal`, or by the error of the values of a
            mask. What the model itself uses is best given without gradient, `lambda x, y: net(x).detach()`.
        init_loc_fn: Where latents that are no masks start, as in Pyro's autoguides. By default those that know the
            lengths start at the median of the prior, with 3 % of its deviation.

    Raises:
        ValueError: If `latents`, `num_draws` or `amortise` is no such thing. On the first call, if "conditional" does
            not fit, if `noise` or `temperature` names a site, or `shared_plates` a plate, that the model does not have,
            if `amortise` returns no such features or finds no such site, if the model has no mask, or weights of KLs
            beside a `base`.

    Warns:
        UserWarning: On the first call, if other latents are mean field although nobody asked for it.

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
        latents: Literal["conditional", "mean_field"] | None = None,
        noise: Noise | Mapping[str, Noise] = "logistic",
        temperature: float | Mapping[str, float] = 0.2,
        shared_plates: Collection[str] = (),
        base: Callable[[Callable[..., Any]], AutoGuide] | None = None,
        create_plates: Callable[..., Any] | None = None,
        num_draws: int = 4,
        amortise: Callable[..., Tensor] | None = None,
        init_loc_fn: Callable[[Any], Any] | None = None,
    ) -> None:
        if not is_one_of(latents, ("conditional", "mean_field", None)):
            raise ValueError(
                f"AutoNested: argument `latents` must be 'conditional', 'mean_field' or None; got {latents!r}"
            )
        if amortise is not None and (not callable(amortise) or isinstance(amortise, type)):
            raise ValueError(
                "AutoNested: argument `amortise` must be a function or a module, from the arguments of the model to "
                f"features of its rows; got {amortise!r}"
            )
        if isinstance(num_draws, bool) or not isinstance(num_draws, int) or num_draws < 1:
            raise ValueError(f"AutoNested: argument `num_draws` must be an integer >= 1; got {num_draws!r}")
        super().__init__(model, create_plates=create_plates)
        self._noise, self._temperature = noise, temperature
        self._latents, self._num_draws, self._init_loc_fn = latents, num_draws, init_loc_fn
        self._why = self._drawn_by = ""
        self._shared_plates = (shared_plates,) if isinstance(shared_plates, str) else tuple(shared_plates)
        self._base = base
        self._amortise: Any = (amortise,)  # in a tuple: a module here would be one of the parts
        self._weights: dict[str, Any] = {}

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        super()._setup_prototype(*args, **kwargs)
        run = run_model(self.model, args, kwargs)
        self._follows = not all(map(is_plain, run.sites.values()))
        with poutine.block():
            self._given = set(run.rows) & set(self._prototype_frames) - set(self._made_plates(args, kwargs))
        parts = {name: part for name, site in run.sites.items() if (part := part_for(site["fn"])) is not None}
        self._check_names(parts)
        keys = ("kl_weight", "length_weight")
        self._weights = {name: {k: s["infer"][k] for k in keys if k in s["infer"]} for name, s in run.sites.items()}
        by_row = None if self._amortise[0] is None else amortised_site(run.sites, parts, self._shared_plates)
        if (plan := self._plan(run.sites, args, kwargs)) is not None:
            start = self._init_loc_fn or init_to_median
            self.append(AutoConditional(self.model, plan, self._shared_plates, self._num_draws, start))
            return
        others = [name for name in run.sites if name not in parts]
        if others and self._latents is None and not self._chose_mean_field():
            warnings.warn(
                f"AutoNested: {_some(others)} and the lengths are independent here, mean field, as {self._why}. What "
                "is learned of lengths may be far off; latents='mean_field' says that this is meant",
                stacklevel=2,
            )
        if self._base is not None and (weighted := [name for name in others if self._weights[name]]):
            raise ValueError(
                f"AutoNested: sites {weighted} have weights of KLs in `infer`, which cannot be told apart in the guide "
                "that `base` makes: leave `base` out, or give `weights` to fit"
            )
        for make, group in groupby(run.sites, key=parts.get):
            names = list(group)
            if make is not None:
                for name in names:
                    noise, temperature = _of(self._noise, name, "logistic"), _of(self._temperature, name, 0.2)
                    if name == by_row:
                        self.append(AutoAmortised(self._only([name]), name, self._amortise[0], noise, temperature))
                    else:
                        self.append(make(self._only([name]), name, noise, temperature, self._shared_plates, run.rows))
            elif self._base is None:
                given = {} if self._init_loc_fn is None else {"init_loc_fn": self._init_loc_fn}
                self.append(AutoNormal(self._only(names), **given))
            elif names[0] == others[0]:
                self.append(self._base(self._only(others)))

    def _plan(self, sites: Mapping[str, Any], args: Any, kwargs: Any) -> Plan | None:
        """Say what a conditional guide consists of; none if it is not wanted, or does not fit."""
        if self._latents == "mean_field":
            return None
        changed = self._chose_mean_field()
        plan: Plan | str
        if changed:
            plan = f"argument `{changed[0]}` is for mean field"
        elif self._drawn_by:
            plan = f"{self._drawn_by} draws lengths"
        elif self._given:
            plan = f"the model gives rows to plates {sorted(self._given)}"
        else:
            with torch.no_grad(), poutine.block():
                trace: Any = poutine.trace(self.model).get_trace(*args, **kwargs)
            plan = make_plan(trace, sites, self._num_draws)
        if isinstance(plan, Plan):
            return plan
        if self._latents == "conditional":
            raise ValueError(f"AutoNested: argument `latents` must be 'mean_field' here, not 'conditional': {plan}")
        self._why = plan
        return None

    def leave_lengths_to(self, objective: str) -> None:
        """Be mean field, if that is still open, as an objective can only draw lengths, and not sum over them."""
        if self.prototype_trace is None and self._latents is None:
            self._drawn_by = objective

    def _chose_mean_field(self) -> list[str]:
        """Return the arguments for mean field that were given."""
        defaults = {"noise": "logistic", "temperature": 0.2, "base": None, "create_plates": None, "amortise": None}
        given: dict[str, Any] = {"noise": self._noise, "temperature": self._temperature, "base": self._base}
        given |= {"create_plates": self.create_plates, "amortise": self._amortise[0]}
        return [name for name, value in given.items() if value is not defaults[name] and value != defaults[name]]

    @property
    def conditional(self) -> AutoConditional | None:
        """The guide whose latents know the lengths, or None if it is mean field or was not called yet."""
        (part,) = self if len(self) == 1 else (None,)
        return part if isinstance(part, AutoConditional) else None

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draw all latent sites."""
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        run = run_model(self.model, args, kwargs) if self._given or self._follows else ModelRun({}, {})
        plates = self._plates_of_call(run.rows, args, kwargs)
        frames = self._prototype_frames.items()
        drawn = [name for name, f in frames if f.full_size not in (None, f.size) and name not in run.rows]
        if self._follows and drawn:
            run = run_model(self.model, args, kwargs, {name: plates[name].indices for name in drawn})
        result = {}
        if self.conditional is not None:
            self.conditional.hides = run.sites if self._follows else {}
        with AsInModel(run.sites if self._follows else {}), poutine.infer_config(config_fn=self._weights_of):
            for part in cast(Any, self):
                result.update(part(*args, **kwargs))
        return result

    def _weights_of(self, site: Any) -> Any:
        # `AutoNormal` draws "w" as "w_unconstrained", whose entropy is part of the same divergence.
        return self._weights.get(site["name"].removesuffix("_unconstrained"), {})

    # Pyro's guides forget their model when they are copied, the original's too, and its parts forget their guide.

    def __getstate__(self) -> dict[str, Any]:
        model = self._model
        state = super().__getstate__()
        self._model = model
        return {**state, "_model": model}

    def _plates_of_call(self, rows: Mapping[str, Tensor], args: Any, kwargs: Any) -> Any:
        """Return the plates of a call, with the rows that the model gives to its own."""
        for part in cast(Any, self):
            part.master = weakref.ref(self)
        sizes = next((part.see(*args, **kwargs) for part in self if isinstance(part, AutoAmortised)), {})
        if self.master is not None or not (self._given or sizes):
            return self._create_plates(*args, **kwargs)
        self.plates = self._made_plates(args, kwargs)
        for name, frame in sorted(self._prototype_frames.items()):
            if name not in self.plates:
                size = sizes.get(name, frame.size)
                how = {"subsample": rows[name]} if name in rows else {"subsample_size": size}
                full_size = frame.full_size if frame.full_size not in (None, frame.size) or name in rows else size
                self.plates[name] = pyro.plate(name, full_size, dim=frame.dim, **how)
        return self.plates

    def _made_plates(self, args: Any, kwargs: Any) -> dict[str, Any]:
        plates = [] if self.create_plates is None else self.create_plates(*args, **kwargs)
        return {plate.name: plate for plate in ([plates] if isinstance(plates, pyro.plate) else plates)}

    def _only(self, names: list[str]) -> Callable[..., Any]:
        return poutine.block(self.model, hide_fn=lambda msg: msg["name"] not in names and not site_is_subsample(msg))

    def _check_names(self, parts: Mapping[str, type[AutoLengths]]) -> None:
        masks = [name for name, part in parts.items() if part is not AutoRelaxedMask]
        if not parts:
            raise ValueError(
                "AutoNested: the model has no latent OrderedMask, RelaxedOrderedMask or NestedNormal; use one of "
                "Pyro's autoguides"
            )
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
        """The learned law of lengths of each mask and `NestedNormal`, by site, without gradient; empty before a call.

        Raises:
            ValueError: If rows of a plate start at laws of their own and no call has had them.
        """
        if self.conditional is not None:
            return self.conditional.laws()
        return {part.site_name: part.law() for part in self if isinstance(part, AutoLengths)}

    def __bool__(self) -> bool:
        """A guide is true, also before its first call, when it has no parts yet."""
        return True

    def __repr__(self) -> str:
        parts: list[Any] = [*self] or [self]
        text = _some([_describe(part) for part in parts], "; ")
        if self.prototype_trace is not None and self.conditional is None:
            text += f"; mean field{f', as {self._why}' if self._why else ''}"
        return f"AutoNested({text})"


def _of(setting: Any, name: str, default: Any) -> Any:
    return setting.get(name, default) if isinstance(setting, Mapping) else setting


def _describe(part: AutoGuide) -> str:
    prototype: Any = part.prototype_trace
    if prototype is None:
        return "not called yet"
    if isinstance(part, AutoConditional | AutoAmortised):
        return part.describe()
    if isinstance(part, AutoLengths):
        return f"{part.site_name}: {part.summary()}"
    return f"{_some(dict(prototype.iter_stochastic_nodes()))}: {type(part).__name__}"


def _some(names: Collection[str], separator: str = ", ") -> str:
    """Name the first ten."""
    more = [f"and {len(names) - 10} more"] if len(names) > 10 else []
    return separator.join([*list(names)[:10], *more])


@contextmanager
def module_local_params(*modules: Any) -> Iterator[None]:
    """Run a block in which models and guides keep their own parameters.

    Pyro's `module_local_params` setting, also for modules that were made without it. Two guides of one name then do
    not read each other's values, which under the global store the second would, silently. What `fit` has trained does
    so without it; use it around modules that you train yourself, as `Elbo()(model, guide)` with a torch optimiser.

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
