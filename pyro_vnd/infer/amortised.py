"""A part of an automatic guide that has its law of lengths by row from a network, for rows it has never seen, too."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.nn.functional import softplus

from pyro_vnd._state import cuda_devices, module_mode
from pyro_vnd.distributions import NestedNormal, OrderedMask, OrderedMaskStraightThrough
from pyro_vnd.distributions.nested import NestedLaw, innermost
from pyro_vnd.distributions.straight_through import Noise
from pyro_vnd.infer._fit.values import ValueSites
from pyro_vnd.infer._model_sites import run_model
from pyro_vnd.infer.auto_parts import AutoLengths, AutoRelaxedMask, mask_quantiles, nested_quantiles
from pyro_vnd.nn.values import MOMENTUM, ValueHead, checked_lengths

__all__ = ["AutoAmortised", "LengthsByRow", "amortised_site"]


class AutoAmortised(AutoGuide):
    r"""Law of lengths of a mask, or of ordered numbers that may be cut, by what each length is worth to a row.

    $$q(L \mid x) \propto p(L) \exp(v_L(f(x))),$$

    with features f(x) from a network, and values v from a `ValueHead` on these. Ordered numbers have means and
    deviations that are linear in the features, and start at the law of the model; the head then looks at features and
    means, and as in the autoencoders nothing of what it looks at learns from it.

    Args:
        model: A model with the one site, in one plate.
        site_name: Its name.
        network: Maps the arguments of the model to features, shape (N, D).
        noise: Noise of a straight-through mask.
        temperature: Temperature of a straight-through mask.
    """

    head: ValueHead
    codes: nn.Linear | None

    def __init__(
        self, model: Any, site_name: str, network: Callable[..., Tensor], noise: Noise, temperature: float
    ) -> None:
        super().__init__(model)
        self.site_name, self.network, self.noise, self.temperature = site_name, network, noise, temperature
        self._seen: Any = None

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        super()._setup_prototype(*args, **kwargs)
        prototype: Any = self.prototype_trace
        site = prototype.nodes[self.site_name]
        (self.frame,) = site["cond_indep_stack"]
        law = innermost(site["fn"])
        features = self._features(args, kwargs)
        if len(features) != self.frame.size:
            raise ValueError(
                f"AutoNested: argument `amortise` must return a row of features for each of the {self.frame.size} rows "
                f"of plate {self.frame.name!r}; got shape {tuple(features.shape)}. Rows that a plate draws inside the "
                "model it does not see: give `fit` a batch_size instead of the plate a subsample_size"
            )
        is_mask = isinstance(law, OrderedMask)
        prior = self._single(law if is_mask else law.mask_law)
        num_inputs, num_units = features.shape[-1], law.num_units
        self.codes = None
        if not is_mask:
            normal = law.given(torch.zeros_like(prior.logits))
            loc, scale = (x.expand(law.batch_shape + x.shape[-1:]) for x in (normal.loc, normal.scale))
            start = torch.cat([loc, scale + (-(-scale).expm1()).log()], -1)  # the latter under softplus
            self.codes = nn.Linear(num_inputs, 2 * num_units).to(features)
            with torch.no_grad():
                self.codes.weight.zero_()
                self.codes.bias.copy_(start.flatten(0, -2).mean(0))
            num_inputs += num_units
        self.head = ValueHead(num_inputs, num_units, prior=prior).to(features)
        self.head.standardise(self.inputs(features))

    def _single(self, law: OrderedMask) -> OrderedMask:
        """Return the law a priori of all rows."""
        probs = law.probs.detach().flatten(0, -2)
        if not (probs == probs[0]).all():
            raise ValueError(
                f"AutoNested: argument `amortise` is for lengths that have one law a priori for all rows; at site "
                f"{self.site_name!r} the model has one for each"
            )
        return OrderedMask(probs=probs[0])

    def look(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return what the head looks at in rows, shape (N, num_inputs)."""
        return self.inputs(self._features(args, kwargs))

    def _features(self, args: Any, kwargs: Any) -> Tensor:
        found = self.network(*args, **kwargs)
        if not isinstance(found, Tensor) or found.dim() != 2 or not found.is_floating_point():
            got = f"shape {tuple(found.shape)}, {found.dtype}" if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(
                "AutoNested: argument `amortise` must map the arguments of the model to features of its rows, shape "
                f"(N, D), of floating-point numbers; got {got}"
            )
        return found

    def inputs(self, features: Tensor) -> Tensor:
        """Return what the head looks at, given features."""
        if self.codes is None:
            return features
        loc, _ = self.codes(features).chunk(2, -1)
        return torch.cat([features, loc], -1).detach()

    def see(self, *args: Any, **kwargs: Any) -> dict[str, int]:
        """Look at the rows of the next call; return how many there are, by the name of their plate."""
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        self._seen = self._features(args, kwargs)
        return {self.frame.name: len(self._seen)}

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draw the site, for the rows that were seen."""
        features, self._seen = self._seen, None
        infer: Any = {"value_head": self.head}
        with self._create_plates(*args, **kwargs)[self.frame.name]:
            value = pyro.sample(self.site_name, self._law(features), infer=infer)
        return {self.site_name: value}

    def _law(self, features: Tensor) -> OrderedMask | NestedNormal:
        """Return the laws of rows, in the dimension that their plate has."""
        inputs = self.inputs(features)
        if self.training and torch.is_grad_enabled():
            self.head.standardise(inputs, momentum=MOMENTUM)
        logits = self._in_plate(self.head(inputs) + self.head.log_probs)
        if self.codes is None:
            return OrderedMaskStraightThrough(self.temperature, logits=logits, noise=self.noise)
        loc, scale = self._in_plate(self.codes(features)).chunk(2, -1)
        return NestedNormal(loc, softplus(scale), logits, temperature=self.temperature, noise=self.noise)

    def _in_plate(self, rows: Tensor) -> Tensor:
        return rows.reshape(len(rows), *[1] * (-self.frame.dim - 1), rows.shape[-1])

    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Return the median of each entry: of a mask, the mask of the median length."""
        (median,) = self.quantiles([0.5], *args, **kwargs)[self.site_name]
        return {self.site_name: median}

    @torch.no_grad()
    def quantiles(self, quantiles: list[float], *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Return quantiles of each entry of rows, stacked in a new first dimension."""
        with module_mode([self], training=False):
            law = self._law(self._features(args, kwargs))
        find: Any = mask_quantiles if isinstance(law, OrderedMask) else nested_quantiles
        return {self.site_name: find(law, quantiles)}

    def describe(self) -> str:
        """Say what the guide has."""
        return f"{self.site_name}: 1 to {self.head.num_units} by row, from {self.head.num_inputs} features"


class LengthsByRow:
    r"""What a guide knows of the lengths of rows, at any price, if it was made with `amortise`.

    $$q(L \mid x, \lambda) \propto p(L) \exp(v_L(x) - \lambda L), \qquad
      v_L(x) = E_q \log p(x \mid z_{\le L}, w) - \mathrm{KL}(q(z_{\le L} \mid x) \| p(z_{\le L})).$$

    Rows are the arguments of the model, as in a call of the guide.
    """

    model: Any
    _num_draws: int

    def _part_by_row(self, method: str) -> AutoAmortised:
        for part in self:  # type: ignore[attr-defined]
            if isinstance(part, AutoAmortised):
                return part
        raise ValueError(
            f"AutoNested.{method}: the guide does not know what lengths are worth to rows: make it by "
            "AutoNested(model, amortise=network), and fit it, or call it, first"
        )

    @torch.no_grad()
    def lengths(
        self,
        *args: Any,
        price: float | Tensor | None = None,
        mean_length: float | None = None,
        temperature: float = 1.0,
        **kwargs: Any,
    ) -> OrderedMask:
        """Return the law of the length of each row at a price, of a guide made with `amortise`.

        Args:
            *args: Rows, the arguments of the model; they need not be those of the fit.
            price: Nats for one more unit, for all rows or one a row, shape (N,).
            mean_length: In place of a price that at which the rows of the last `fit` or `distil_lengths` have this mean
                length, strictly between 1 and K.
            temperature: Flattens the law, > 0.
            **kwargs: Rows by name.

        Returns:
            A law with batch shape (N,).

        Raises:
            ValueError: If the guide was made without `amortise` or was not called yet, or an argument is invalid.
        """
        part = self._part_by_row("lengths")
        with module_mode([part], training=False):
            inputs = part.look(*args, **kwargs)
        return part.head.law(inputs, price, mean_length, temperature)

    @torch.no_grad()
    def choose_lengths(
        self, *args: Any, price: float | Tensor | None = None, mean_length: float | None = None, **kwargs: Any
    ) -> Tensor:
        """Return the best length of each row at a price, of a guide made with `amortise`.

        Args:
            *args: As in `lengths`.
            price: As in `lengths`.
            mean_length: In place of a price that at which these lengths, rather than random ones by `lengths`, have
                this mean over the rows of the last `fit` or `distil_lengths`.
            **kwargs: As in `lengths`.

        Returns:
            Integers from 1 to K, shape (N,): the modes of the laws of `lengths` at the price.

        Raises:
            ValueError: As in `lengths`.
        """
        part = self._part_by_row("choose_lengths")
        with module_mode([part], training=False):
            return part.head.choose(part.look(*args, **kwargs), price, mean_length)

    def add_value_head(self) -> ValueHead:
        """Return the part that predicts what lengths are worth, which `fit` or the first call made."""
        return self._part_by_row("add_value_head").head

    def value_inputs(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return what that part looks at in rows, shape (N, num_inputs)."""
        return self._part_by_row("value_inputs").look(*args, **kwargs)

    @torch.no_grad()
    def value_curve(self, *args: Any, lengths: Sequence[int] | None = None, **kwargs: Any) -> Tensor:
        """Return what lengths are worth to rows, by running the model at each.

        Where there are other latents, it is the mean over `num_draws` draws of these, the same for all lengths.

        Args:
            *args: Rows, the arguments of the model.
            lengths: In 1..K; all K by default.
            **kwargs: Rows by name.

        Returns:
            Nats, shape (N, number of lengths).

        Raises:
            ValueError: If a length is none, or other latents have a law for each row and the model does not say which
                rows these are.
        """
        part = self._part_by_row("value_curve")
        lengths = checked_lengths("AutoNested.value_curve", lengths, part.head.num_units)
        rows = run_model(self.model, args, kwargs).rows.get(part.frame.name)
        others = [name for name, frames in self._others() if part.frame.name in {frame.name for frame in frames}]
        if others and rows is None:
            raise ValueError(
                f"AutoNested.value_curve: latents {others} have a law for each row, and nothing says which rows these "
                f"are: number them, i = torch.arange(N) among the data and pyro.plate({part.frame.name!r}, N, "
                "subsample=i) in the model"
            )
        scale = 1.0 if rows is None else part.frame.full_size / len(rows)
        num_draws = 1 if part.codes is None and not [*self._others()] else self._num_draws
        with torch.random.fork_rng(cuda_devices([self, *args, *kwargs.values()])):
            seeds = torch.randint(2**31, (num_draws,)).tolist()
            curves = [[self._worth(part, scale, length, seed, args, kwargs) for length in lengths] for seed in seeds]
        return torch.stack([torch.stack(curve, -1) for curve in curves]).mean(0)

    def _others(self) -> Iterator[tuple[str, Any]]:
        """Yield all other latents, with their plates."""
        for part in self:  # type: ignore[attr-defined]
            if not isinstance(part, AutoAmortised):
                for name, site in part.prototype_trace.iter_stochastic_nodes():
                    yield name, site["cond_indep_stack"]

    def _worth(self, part: AutoAmortised, scale: float, length: int, seed: int, args: Any, kwargs: Any) -> Tensor:
        """Return what a length turns out to be worth to rows, shape (N,)."""
        torch.manual_seed(seed)
        guide: Any = self
        values = ValueSites(part.frame.name, scale, True, None)
        modules = module_mode([guide, self.model], training=False)
        with modules, poutine.block(), _AtLength(part.site_name, length), values:  # within: it sees laws uncut
            trace = poutine.trace(guide).get_trace(*args, **kwargs)
            poutine.replay(self.model, trace=trace)(*args, **kwargs)
        return values.rounds[-1].worth(part.site_name).flatten()


class _AtLength(Messenger):
    """Give a site one length, in model and guide alike."""

    def __init__(self, site_name: str, length: int) -> None:
        super().__init__()
        self.site_name, self.length = site_name, length

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] == self.site_name:
            msg["fn"] = msg["fn"].cut(self.length)


def amortised_site(sites: Mapping[str, Any], parts: Mapping[str, type[AutoLengths]], shared: Sequence[str]) -> str:
    """Return the site whose lengths are to be amortised.

    Args:
        sites: Latents of the model by name, as in a trace.
        parts: The part of a guide for each that is about lengths.
        shared: Names of plates whose rows share their law of lengths.

    Raises:
        ValueError: If it is not a single one.
    """
    stacks = {name: [f.name for f in sites[name]["cond_indep_stack"]] for name in parts}
    fit = {name: plates for name, plates in stacks.items() if plates and parts[name] is not AutoRelaxedMask}
    want = "AutoNested: argument `amortise` needs one OrderedMask or NestedNormal in one plate, that of the data"
    if not fit:
        raise ValueError(
            f"{want}; the model's masks {[*parts]} are outside plates, and so one for all rows, or soft. Put one in "
            "the plate, or leave `amortise` out"
        )
    if len(fit) > 1 or len(next(iter(fit.values()))) > 1:
        raise ValueError(f"{want}; got those of {fit}")
    ((name, (plate,)),) = fit.items()
    if not isinstance(sites[name]["fn"], OrderedMask | NestedLaw):
        raise ValueError(f"{want}; the law at site {name!r} is wrapped: {sites[name]['fn']!r}")
    if sites[name]["infer"].get("enumerate"):
        raise ValueError(f"{want}, which is drawn; the model marks site {name!r} for enumeration")
    if plate in shared:
        raise ValueError(
            f"{want}; argument `shared_plates` says that the rows of {plate!r} share their law: leave one of them out"
        )
    return name
