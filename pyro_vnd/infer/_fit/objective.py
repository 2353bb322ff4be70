"""The objective of a fit: the ELBO of a mini-batch, its parts, and what makes them infinite."""

import re
from collections.abc import Callable
from functools import partial
from traceback import walk_tb
from typing import Any

import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_vnd._compat import stray_params
from pyro_vnd._data import Data, as_arguments, num_rows
from pyro_vnd.infer._fit.checks import check_elbo, foreign_dtype
from pyro_vnd.infer._fit.handlers import EvaluationRecord, ScaleToDataset
from pyro_vnd.infer._fit.parallel import Averaged, Ranks
from pyro_vnd.infer._fit.settings import KLWeights
from pyro_vnd.infer.elbo import NestedELBO, conditional_part
from pyro_vnd.infer.result import ElboParts

__all__ = ["NonFiniteLossError", "Objective"]

# How packages say that values are refused.
_OF_TORCH = "Expected parameter|Expected value argument"
_REFUSED = {"torch": _OF_TORCH, "pyro": _OF_TORCH, "pyro_vnd": r"(?i)\b(nan|inf|finite|must be masks)\b"}


class NonFiniteLossError(ArithmeticError):
    """The ELBO or its gradient became infinite or NaN; parameters are those of the last finite step."""


class Objective:
    """The negative ELBO of a mini-batch, scaled to its data set.

    It is evaluated once when it is made: lazy guides make their parameters then, and the sites become known.

    Args:
        elbo: The ELBO.
        model: The model.
        guide: The guide.
        scale: Makes the handler that scales a batch to the data, from its number of rows and the weights of KLs.
        first_batch: Rows for the first evaluation.

    Attributes:
        module: Model, guide and ELBO, whose parameters are trained.
        parameters: These parameters.
        averaged: What evaluates it such that gradients are averaged over processes.
        record: What was seen in the last evaluation.

    Raises:
        ValueError: If the plate or the parameters do not fit what `fit` trains.
    """

    def __init__(
        self,
        elbo: Any,
        model: Any,
        guide: Any,
        scale: Callable[[int, KLWeights], ScaleToDataset],
        first_batch: Data,
    ) -> None:
        self.module: Any = elbo(model, guide)
        self.scale = scale
        self.keeps_parts = isinstance(elbo, NestedELBO)
        self.record = EvaluationRecord(score=not self.keeps_parts)
        first, sites = scale(num_rows(first_batch), KLWeights()), ProgramSites()
        with poutine.trace(param_only=True) as trace:
            try:
                self._evaluate(first_batch, first, partial(elbo.differentiable_loss, *sites.watch(model, guide)))
            except Exception as error:
                sites.check()
                self._explain(error, first_batch)
                raise
        sites.check()
        check_elbo(elbo, guide)
        first.check()
        if self.keeps_parts:  # an ELBO that enumerates has dimensions without plates
            self._check_shapes()
        self.parameters: list[Tensor] = list(self.module.parameters())
        known = {id(parameter) for parameter in self.parameters}
        for name, site in trace.trace.nodes.items():
            value: Any = site.get("value")
            unconstrained = value.unconstrained() if hasattr(value, "unconstrained") else value
            if site["type"] == "param" and id(unconstrained) not in known:
                raise ValueError(_of_no_module(name))
        if not self.parameters:
            raise ValueError("fit: neither model nor guide has parameters; is the guide an nn.Module?")
        self.share(Ranks())

    def __call__(self, batch: Data, weights: KLWeights) -> Tensor:
        """Evaluate the negative ELBO.

        Args:
            batch: Rows of the data.
            weights: Weights of KLs.

        Returns:
            The loss, with its gradient.

        Raises:
            NonFiniteLossError: If torch or Pyro refuse a law or a value that is not finite. Any other error stays what
                it is, and has a note that names the last site before it.
        """
        return self._evaluate(batch, self.scale(num_rows(batch), weights), self.module)

    def share(self, ranks: Ranks) -> None:
        """From here on, average gradients over processes.

        Raises:
            ValueError: If there are laws for rows that processes would have to exchange.
        """
        part = conditional_part(self.module.guide)
        if ranks.size > 1 and part is not None and part.plan.by_row:
            raise ValueError(
                "fit: a guide with a law of lengths for each row learns on one process; let the rows share it "
                "(`shared_plates`), or start one process"
            )
        self.ranks, self.averaged = ranks, Averaged(self.module, ranks)

    def share_buffers(self) -> None:
        """Give all processes the first one's buffers, such as running means of norms."""
        for buffer in self.module.buffers() if self.ranks.size > 1 else ():
            buffer.copy_(self.ranks.same(buffer))

    def row_scale(self, batch: Data) -> float:
        """Return by how much the rows of a batch are scaled."""
        return self.scale(num_rows(batch), KLWeights()).row_scale

    def weigh(self, weight: float) -> None:
        """Say by how much the next batch counts, in laws that are learned in closed form."""
        part = conditional_part(self.module.guide)
        if part is not None:
            part.batch_weight = min(weight, 1.0)

    def agree(self) -> None:
        """Let processes have the same laws where these are learned in closed form, not by gradients."""
        part = conditional_part(self.module.guide)
        if self.ranks.size > 1 and part is not None:
            mean = self.ranks.sum(part.logits.detach().clone()) / self.ranks.size
            part.learn(mean, None, share=1.0)

    def _evaluate(self, batch: Data, scale: ScaleToDataset, loss: Callable[..., Tensor]) -> Tensor:
        args, kwargs = as_arguments(batch)
        try:
            with scale, self.record:
                value = loss(*args, **kwargs)
            if isinstance(value, Tensor) and value.is_complex():
                raise ValueError(
                    f"fit: the ELBO must be a real number; got {value.dtype}, as the data, or what the model makes of "
                    "them, are complex: score real numbers, such as those of torch.view_as_real(x)"
                )
            return value
        except Exception as error:
            site = f"after site {self.record.last_site!r}" if self.record.last_site else "before the first site"
            if isinstance(error, ValueError) and _is_about_something_infinite(error):
                raise NonFiniteLossError(f"fit: evaluating the ELBO failed {site}: {error}") from error
            error.add_note(f"fit: raised while the ELBO was evaluated, {site}, on {_size_of(batch)}")
            raise

    def _explain(self, error: Exception, batch: Data) -> None:
        """Raise an error that says what to do, if one of the first evaluation is a known mistake."""
        check_elbo(self.module.elbo, self.module.guide)
        if names := stray_params((self.module.model, self.module.guide)):
            raise ValueError(_of_no_module(names[0])) from error
        if isinstance(error, AttributeError) and error.name == "param_state":
            raise ValueError(
                "fit: model or guide calls a PyroModule that is no part of it, so that its parameters would not be "
                "trained: make it one, of an nn.Module that holds it (`self.net = net`)"
            ) from error
        if isinstance(error, RuntimeError) and "type" in str(error) and (said := foreign_dtype(batch, self.module)):
            raise ValueError(f"fit: {said}") from error
        if isinstance(error, ValueError) and "log_prob shape" in str(error):
            self._check_shapes(error)

    def _check_shapes(self, error: Exception | None = None) -> None:
        for name, (value, law) in self.record.misfits.items():
            raise ValueError(
                f"fit: site {name!r} has data of shape {value} and a law of shape {law}, which do not go together in "
                "its plates: give both the same shape (y.squeeze(-1), say), or what is no row to the law's events "
                "(.to_event(1))"
            ) from error

    def parts(self, loss: Tensor) -> ElboParts:
        """Return the parts of the last evaluation, given its loss; detached."""
        elbo, likelihood, latents, lengths = self.module.elbo, torch.nan, torch.nan, torch.nan
        if self.keeps_parts:
            likelihood, lengths = elbo.log_likelihood, sum(elbo.kl_lengths.values())
            latents = sum(elbo.kl.values()) - lengths
        elif not self.record.enumerated:
            likelihood = self.record.log_likelihood / elbo.num_particles
        return ElboParts(*(torch.as_tensor(part).to(loss) for part in (-loss.detach(), likelihood, latents, lengths)))

    def blame(self, batch: Data) -> str:
        """Say which site is not finite in another evaluation, or else which gradient is not; never raise."""
        last = f"last site {self.record.last_site!r}"
        try:
            if site := self._site_to_blame(batch):
                return site
        except Exception as error:  # what is to be explained is another error
            # Laws in closed form have learned from the step that failed, and are no law to draw from by now.
            if bad := [name for name, p in self.module.named_parameters() if not torch.isfinite(p).all()]:
                return f"it made {bad} not finite; {last}"
            what = f"{type(error).__name__}: {error}".partition("\n")[0]  # without the shapes that Pyro adds
            return f"evaluating the model once more, to find the site, raised {what}; {last}"
        if self.ranks.size > 1:  # whose gradients are all the same by now
            return f"on a new draw each site of process {self.ranks.rank} is finite: the others' errors may say more"
        gradients = {name: p.grad for name, p in self.module.named_parameters() if p.grad is not None}
        bad = [name for name, gradient in gradients.items() if not torch.isfinite(gradient).all()]
        return f"the gradient of {bad} is not finite; {last}" if bad else f"on a new draw each site is finite; {last}"

    @torch.no_grad()
    def _site_to_blame(self, batch: Data) -> str:
        args, kwargs = as_arguments(batch)
        with self.scale(num_rows(batch), KLWeights()):
            guide = poutine.trace(self.module.guide).get_trace(*args, **kwargs)
            model = poutine.trace(poutine.replay(self.module.model, trace=guide)).get_trace(*args, **kwargs)
        for where, trace in (("guide", guide), ("model", model)):
            for name, site in trace.nodes.items():
                if site["type"] != "sample" or poutine.util.site_is_subsample(site):
                    continue
                score = site["fn"].log_prob(site["value"])
                for what, value in (("value", site["value"]), ("log-probability", score)):
                    if not torch.isfinite(value).all():
                        return f"the {what} of site {name!r} of the {where} is not finite"
        return ""


class ProgramSites:
    """The sites of model and guide in an evaluation, each program's by itself; a guide of Pyro's kind knows its own."""

    def __init__(self) -> None:
        self.model, self.guide = _Sites(), _Sites()
        self.auto: AutoGuide | None = None

    def watch(self, model: Any, guide: Any) -> tuple[Any, Any]:
        """Return the programs, which tell of their sites."""
        self.auto = guide if isinstance(guide, AutoGuide) else None
        return self.model(model), guide if self.auto is not None else self.guide(guide)

    def check(self) -> None:
        """Raise if both ran, and the guide draws what the model has not.

        Raises:
            ValueError: If it does.
        """
        prototype: Any = None if self.auto is None else self.auto.prototype_trace
        latent = self.guide.latent if prototype is None else dict(prototype.iter_stochastic_nodes())
        for name, site in latent.items() if prototype is not None else ():
            expected, got = tuple(site["fn"].event_shape), self.model.latent.get(name)
            if got is not None and got != expected:
                raise ValueError(
                    f"fit: site {name!r} has events of shape {expected} in the guide, and of shape {got} in the model: "
                    "is it the guide of another model?"
                )
        missing = [name for name in latent if name not in self.model.latent]
        if missing and self.model.ran and (self.guide.ran or prototype is not None):
            how = "observed in the model" if missing[0] in self.model.observed else "not in the model"
            raise ValueError(
                f"fit: site {missing[0]!r} of the guide is {how}, whose latents are {[*self.model.latent]}: is it the "
                "guide of another model? A site that only the guide needs is marked `infer={'is_auxiliary': True}`"
            )


class _Sites(Messenger):
    def __init__(self) -> None:
        super().__init__()
        self.latent: dict[str, Any] = {}
        self.observed: set[str] = set()
        self.ran = False

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["is_observed"]:
            self.observed.add(msg["name"])
        elif not site_is_subsample(msg) and not msg["infer"].get("is_auxiliary"):
            self.latent[msg["name"]] = tuple(msg["fn"].event_shape)

    def __exit__(self, kind: Any, *error: Any) -> None:
        self.ran = kind is None
        super().__exit__(kind, *error)


def _size_of(batch: Data) -> str:
    if num_rows(batch) > 1:
        return f"a batch of {num_rows(batch)} rows"
    return (
        "a batch of 1 row: BatchNorm needs more of them in training; if this was the last batch of an epoch, give "
        "another `batch_size`, or drop_last=True to the DataLoader"
    )


def _of_no_module(name: str) -> str:
    learned = "; a reparametrisation must not be learned: AutoReparam(centered=0.0)" * name.endswith("_centered")
    return (
        f"fit: parameter {name!r} belongs to no nn.Module: make model and guide PyroModules, with a PyroParam in place "
        f"of pyro.param{learned}; or train with pyro.infer.SVI and Pyro's global parameter store"
    )


def _is_about_something_infinite(error: ValueError) -> bool:
    """Say whether torch, Pyro or this library refused values of a law or a sample, of which some are not finite.

    They check these in functions of their own, which have before them what they refuse; what such a function says of
    something else, a shape say, is about that.
    """
    *_, (frame, _) = walk_tb(error.__traceback__)
    where = frame.f_globals.get("__name__", "").partition(".")[0]
    if not re.search(_REFUSED.get(where, "(?!)"), str(error)):
        return False
    tensors = [x for x in frame.f_locals.values() if isinstance(x, Tensor) and x.is_floating_point()]
    return any(not torch.isfinite(x).all() for x in tensors)
