"""The ELBO with exact KL divergences, and its parts."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from types import MappingProxyType
from typing import Any, Literal

import torch
from pyro import poutine
from pyro.distributions import Delta
from pyro.distributions.util import scale_and_mask
from pyro.infer import TraceMeanField_ELBO
from pyro.infer.util import check_fully_reparametrized, is_validation_enabled, torch_item
from pyro.poutine.guide import GuideMessenger
from pyro.poutine.replay_messenger import ReplayMessenger
from pyro.poutine.trace_messenger import TraceMessenger
from pyro.poutine.util import prune_subsample_sites, site_is_subsample
from pyro.util import check_if_enumerated, check_model_guide_match, check_site_shape
from torch import Tensor

from pyro_vnd._compat import check_mean_field_requirement
from pyro_vnd.distributions.nested import innermost
from pyro_vnd.infer._conditional.evaluation import evaluate
from pyro_vnd.infer._conditional.guide import AutoConditional
from pyro_vnd.infer._kl import kl_terms, weight_of
from pyro_vnd.infer._model_sites import masked_like, owner_of, split_mask, visible_entries
from pyro_vnd.infer.guides import AutoNested
from pyro_vnd.infer.local_reparam import LocalReparameterization

__all__ = ["NestedELBO"]


class NestedELBO(TraceMeanField_ELBO):
    r"""ELBO that takes the exact KL of each latent that has one, scores nothing else, and keeps its parts.

    $$E_q \log p(x \mid z) - \sum_i w_i \, \mathrm{KL}(q(z_i) \| p(z_i)).$$

    Value and gradient are those of Pyro's `TraceMeanField_ELBO`, which also scores the value of every site and drops
    the scores where it has a KL: for a net of millions of weights that is most of the work beside the net itself. And
    under `LocalReparameterization` the value of a weight is no draw, so that it must not be scored. Latents without a
    registered KL are estimated by the scores of their draws. So are points (`Delta`), whose log-density Pyro leaves
    out: with an `AutoNormal` and a positive latent, `TraceMeanField_ELBO` lacks the Jacobian, and this one has it.
    Where the prior is a `NestedAutoregressive` the KL is that of each coordinate given the draws of those before it, by
    the chain rule an unbiased estimate with less variance than a score. From a mixture it is the exact one from a
    Normal with its moments, and the difference of the scores that the draw has in the two.
    Latents must be reparameterised, and none may depend in the model on one that comes after it in the guide. One that
    the guide lacks is drawn from the model, and costs nothing.

    The mask and the scale that a latent has in the model, `poutine.mask`, `poutine.scale` and `law.mask(...)`, hold for
    its site in the guide, too, and for the `AutoNormal` site it comes from: hidden rows cost nothing. What the guide
    says itself of them does not count.

    A weight $w_i$ other than one is read from the site of the guide: `infer={"kl_weight": w}`. A mask, and the lengths
    of a `NestedNormal`, whose KL has two terms, may have one of their own, `infer={"length_weight": w}`. Under `fit`
    the weights of a site are multiplied by those of the fit.

    Attributes:
        log_likelihood: Score of the observed sites in the last evaluation, its mean over the particles; detached.
        kl: KL of each latent in it, by site, without the weights; detached.
        kl_lengths: The part of it that is for lengths, by site, without the weights: all of it for a mask, one term for
            a `NestedNormal`; detached.

    Args:
        *args: As those of `pyro.infer.ELBO`: `num_particles`, `vectorize_particles` and so on.
        local_reparam: Whether nested layers draw their outputs rather than their weights, `LocalReparameterization`:
            gradients have less noise; "linear" leaves convolutions out.
        **kwargs: As `args`, by name.

    Raises:
        ValueError: If `local_reparam` is none of these.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model():
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(mu, 1.0), obs=torch.tensor(0.5))
        >>> def guide():
        ...     pyro.sample("mu", dist.Normal(1.0, 1.0))
        >>> elbo = NestedELBO()
        >>> loss = elbo.differentiable_loss(model, guide)
        >>> elbo.kl
        {'mu': tensor(0.5000)}
        >>> bool(loss.isclose(0.5 - elbo.log_likelihood))
        True
    """

    def __init__(self, *args: Any, local_reparam: bool | Literal["linear"] = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not isinstance(local_reparam, bool | str) or local_reparam not in (False, True, "linear"):
            raise ValueError(
                f"NestedELBO: argument `local_reparam` must be True, False or 'linear'; got {local_reparam!r}"
            )
        self.local_reparam = local_reparam
        self.log_likelihood: Tensor | float = 0.0
        self.kl: dict[str, Tensor] = {}
        self.kl_lengths: dict[str, Tensor] = {}
        self._layout: Any = None  # of the sites that were checked

    def __repr__(self) -> str:
        vectorized = ", vectorize_particles=True" if self.vectorize_particles else ""
        local = f", local_reparam={self.local_reparam!r}" if self.local_reparam else ""
        return f"NestedELBO(num_particles={self.num_particles}{vectorized}{local})"

    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """Return the negative ELBO as a number."""
        if (conditional := conditional_part(guide, args, kwargs)) is not None:
            return torch_item(self._at_every_length(conditional, model, args, kwargs))
        with self._drawing():
            return torch_item(super().loss(model, guide, *args, **kwargs))

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """Return the negative ELBO as a number, after a backward pass; what `pyro.infer.SVI` calls."""
        if conditional_part(guide, args, kwargs) is None:
            with self._drawing():
                return torch_item(super().loss_and_grads(model, guide, *args, **kwargs))
        # SVI trains the parameters that it sees in a call of the guide and the model.
        poutine.replay(model, trace=poutine.trace(guide).get_trace(*args, **kwargs))(*args, **kwargs)
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        loss.backward()
        return loss.item()

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Return the negative ELBO with its gradient; unlike Pyro's, it never waits for the device to look at it."""
        if (conditional := conditional_part(guide, args, kwargs)) is not None:
            return self._at_every_length(conditional, model, args, kwargs)
        with self._drawing():
            traces = self._get_traces(model, guide, args, kwargs)
            loss: Any = sum(self._differentiable_loss_particle(*pair)[1] for pair in traces)
        return self._mean(loss)

    def _drawing(self) -> AbstractContextManager[Any]:
        """Return a context for an evaluation, in which layers draw what they are to."""
        if not self.local_reparam:
            return nullcontext()
        return LocalReparameterization("all" if self.local_reparam is True else self.local_reparam)

    def _at_every_length(self, guide: AutoConditional, model: Any, args: Any, kwargs: Any) -> Tensor:
        """Return the negative ELBO of a guide whose latents know the lengths."""
        found = evaluate(guide, model, args, kwargs, guide.num_draws * self.num_particles)
        if guide.training and torch.is_grad_enabled():
            guide.learn(found.logits, found.logits_by_row)
        self.log_likelihood = found.log_likelihood
        self.kl, self.kl_lengths = dict(found.kl), found.kl_lengths
        for name, kl in found.kl_lengths.items():  # a `NestedNormal` is in both
            self.kl[name] = self.kl[name] + kl if name in self.kl else kl
        return found.loss

    def _mean(self, total: Tensor) -> Tensor:
        """Return the mean of what was summed over the particles."""
        return total if self.num_particles == 1 else total / self.num_particles

    def _get_traces(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Iterator[Any]:
        self.log_likelihood, self.kl, self.kl_lengths = 0.0, {}, {}
        yield from super()._get_traces(model, guide, args, kwargs)

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        messenger = poutine.unwrap(guide)
        if isinstance(messenger, GuideMessenger):
            guide(*args, **kwargs)
            model_trace, guide_trace = messenger.get_traces()
        else:
            guide_trace = _traced(guide, args, kwargs)
            model_trace = _traced(ReplayMessenger(trace=guide_trace)(model), args, kwargs)
        _check_sites(model_trace, guide_trace)
        layout = (_layout(model_trace), _layout(guide_trace)) if is_validation_enabled() else self._layout
        is_new = layout != self._layout  # what the checks look at is nearly always as in the last evaluation
        if is_new:
            check_model_guide_match(model_trace, guide_trace, self.max_plate_nesting)
        guide_trace, model_trace = prune_subsample_sites(guide_trace), prune_subsample_sites(model_trace)
        _hide_as_in_model(model_trace, guide_trace)
        _keep_exact_kl(model_trace, guide_trace)
        exact = {name for name, site in guide_trace.nodes.items() if "kl" in site}
        if any(site["type"] == "sample" and name not in exact for name, site in guide_trace.nodes.items()):
            # The nodes of this trace are those of the whole one: what is computed here is found there.
            scored_guide = guide_trace.copy()
            for name in exact:
                scored_guide.remove_node(name)
            scored_guide.compute_score_parts()
        model_trace.compute_log_prob(lambda name, site: name not in exact)
        if is_new:
            for trace in (model_trace, guide_trace):
                self._check_shapes(trace)
            check_if_enumerated(guide_trace)
            check_mean_field_requirement(model_trace, guide_trace)
            self._layout = layout
        return model_trace, guide_trace

    def _check_shapes(self, trace: Any) -> None:
        for site in trace.nodes.values():
            if site["type"] == "sample":
                if "log_prob" not in site:
                    site = {**site, "log_prob": torch.empty(()).expand(site["fn"].batch_shape)}
                check_site_shape(site, self.max_plate_nesting)

    def _differentiable_loss_particle(self, model_trace: Any, guide_trace: Any) -> tuple[Tensor, Tensor]:
        likelihoods, divergences = [], []
        for name, site in model_trace.nodes.items():
            if site["type"] == "sample":
                if site["is_observed"]:
                    likelihoods.append(site["log_prob_sum"])
                elif name in guide_trace.nodes:
                    divergences.append(self._weighted_kl(name, guide_trace.nodes[name], site))
        for name, site in guide_trace.nodes.items():
            if site["type"] == "sample" and name not in model_trace.nodes:
                divergences.append(self._weighted_kl(name, site))
        if likelihoods:
            likelihood: Any = sum(likelihoods)
            self.log_likelihood = self.log_likelihood + self._mean(likelihood.detach())
            divergences.append(-likelihood)
        loss: Any = sum(divergences)
        return loss.detach(), loss

    def _weighted_kl(self, name: str, guide_site: Any, model_site: Any = None) -> Tensor:
        if "kl" in guide_site:
            parts = guide_site["kl"]
        else:
            if is_validation_enabled():
                check_fully_reparametrized(guide_site)
            kl = guide_site["score_parts"].entropy_term.sum()
            parts = {weight_of(guide_site["fn"]): kl if model_site is None else kl - model_site["log_prob_sum"]}
        for record, keys in ((self.kl, parts), (self.kl_lengths, {"length_weight"} & parts.keys())):
            for key in keys:
                part = self._mean(parts[key].detach())
                record[name] = record[name] + part if name in record else part
        infer = guide_site["infer"]
        weights = [infer.get(key, infer.get("kl_weight", 1.0)) for key in parts]
        pairs = zip(weights, parts.values(), strict=True)
        weighted: Any = sum(part if weight == 1 else weight * part for weight, part in pairs)
        return weighted


def _traced(program: Any, args: Any, kwargs: Any) -> Any:
    """Run a program and return its trace, which is no copy."""
    messenger = TraceMessenger()
    messenger(program)(*args, **kwargs)
    return messenger.trace


def _layout(trace: Any) -> list[Any]:
    """Return what Pyro's checks of names, shapes, plates and kinds of sites look at."""
    return [
        (
            name,
            site["is_observed"],
            site["cond_indep_stack"],
            type(site["fn"]),
            getattr(site["fn"], "batch_shape", None),
            getattr(site["fn"], "event_shape", None),
            getattr(site["value"], "shape", None),
            [site["infer"].get(key) for key in ("enumerate", "_enumerate_dim", "is_auxiliary")],
        )
        for name, site in trace.nodes.items()
        if site["type"] == "sample"
    ]


def _check_sites(model_trace: Any, guide_trace: Any) -> None:
    """Raise where a latent is in the guide alone, or in the model alone with a score that is missed.

    A latent that the guide lacks is drawn from the model: its log p and log q are one, and cancel.
    """
    for name, site in guide_trace.iter_stochastic_nodes():
        if name not in model_trace.nodes and not (site["infer"].get("is_auxiliary") or site_is_subsample(site)):
            raise ValueError(
                f"NestedELBO: site {name!r} of the guide is no latent of the model; one that only the guide has needs "
                'infer={"is_auxiliary": True}'
            )
    for name, site in model_trace.iter_stochastic_nodes():
        if name in guide_trace.nodes or site_is_subsample(site) or site["fn"].has_rsample:
            continue
        if site["fn"].log_prob(site["value"]).requires_grad:
            raise NotImplementedError(
                f"NestedELBO: site {name!r} is not in the guide, so that it is drawn from the model, where its law is "
                "not reparameterised: what the law depends on would miss its gradient"
            )


def _hide_as_in_model(model_trace: Any, guide_trace: Any) -> None:
    """Give each site of the guide the masks and the scale of its latent in the model."""
    for name, site in guide_trace.nodes.items():
        latent = owner_of(name, model_trace.nodes) if site["type"] == "sample" else None
        if latent is not None and latent["type"] == "sample":
            _check_hidden_alone(name, site, latent, guide_trace)
            law = masked_like(site["fn"], latent["fn"])
            site.update(fn=law, mask=latent["mask"], scale=latent["scale"])


def _check_hidden_alone(name: str, site: Any, latent: Any, guide_trace: Any) -> None:
    """Raise where part of a latent is hidden that a guide makes of a draw for several latents."""
    if not isinstance(innermost(site["fn"]), Delta) or f"{name}_unconstrained" in guide_trace.nodes:
        return
    joint = [
        key
        for key, other in guide_trace.iter_stochastic_nodes()
        if other["infer"].get("is_auxiliary") and other["mask"] is None and not key.endswith("_unconstrained")
    ]
    visible = visible_entries(latent)
    if joint and visible is not None and not torch.as_tensor(visible).all():
        raise ValueError(
            f"NestedELBO: the model hides part of site {name!r}, which the guide draws with others at {joint}, where "
            "it cannot be left out: use a guide that draws it by itself, such as AutoNormal"
        )


def _keep_exact_kl(model_trace: Any, guide_trace: Any) -> None:
    """Put the summed KL into the sites of the guide that have an exact one, as `site["kl"]`: its terms by their weight.

    Points are scored: what Pyro registers as their KL leaves out the log-density that they carry, the Jacobian of a
    transformed latent of an autoguide.
    """
    for name, model_site in model_trace.nodes.items():
        site = guide_trace.nodes.get(name)
        if model_site["type"] != "sample" or model_site["is_observed"] or site is None:
            continue
        if isinstance(innermost(site["fn"]), Delta):
            continue
        (q, mask), (p, _) = split_mask(site), split_mask(model_site)
        try:
            terms = kl_terms(q, p, site["value"])
        except NotImplementedError:
            continue
        batch_shape = site["fn"].batch_shape
        if is_validation_enabled() and not site["fn"].has_rsample:
            raise NotImplementedError(f"NestedELBO: site {name!r} of the guide must be reparameterised; its law is not")
        site["kl"] = {}
        for weight, kl in terms.items():
            if not isinstance(kl, Tensor):  # Pyro's KL of laws that hide all entries is the number zero
                kl = torch.as_tensor(kl, device=getattr(site["value"], "device", None)).expand(batch_shape)
            assert kl.shape == batch_shape, f"KL at site {name!r} has shape {kl.shape}, its guide {batch_shape}"
            kl = scale_and_mask(kl, site["scale"], mask)
            site["kl"][weight] = kl.sum() if kl.dim() else kl


def conditional_part(guide: Any, args: Any = (), kwargs: Any = MappingProxyType({})) -> AutoConditional | None:
    """Return the part of an `AutoNested` whose latents know the lengths, if it has one; a new guide is called first."""
    if not isinstance(guide, AutoNested):
        return None
    if guide.prototype_trace is None:
        poutine.block(guide)(*args, **kwargs)
    return guide.conditional
