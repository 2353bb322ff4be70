"""Masks with a joint law of their lengths, and other latents with a law for each combination of these lengths."""

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.nn import PyroParam
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import constraints

from pyro_vnd.distributions import OrderedMask
from pyro_vnd.distributions.nested import find_mask
from pyro_vnd.infer._conditional.laws import is_possible, joint_prior, marginals, select, with_floor
from pyro_vnd.infer._conditional.layout import Block, Latent, Lengths, Plan
from pyro_vnd.infer._conditional.tables import TableNormal, Tables, at_rows
from pyro_vnd.infer._model_sites import in_plates, weight_in_model
from pyro_vnd.infer.result import LengthSummary

__all__ = ["AutoConditional"]

_HORIZON = 25  # steps in the running mean of the law of the lengths
_PRIOR_DRAWS = 15


class AutoConditional(AutoGuide):
    r"""Guide of masks and all other latents, $q(L) \, q(w \mid L)$.

    The law of the lengths follows no gradient: given the ELBO of each length it is known,
    $q_k \propto p_k \exp(\mathrm{ELBO}_k)$. `logits` has its running mean over the last steps.

    Args:
        model: The model.
        plan: What the guide consists of.
        shared_plates: Plates whose rows share the law of their masks.
        num_draws: Draws of the other latents for each length in a step.
        init_loc_fn: Where the other latents start, as in Pyro's autoguides.

    Attributes:
        logits: Log-law of the lengths outside plates, over their combinations.
        logits_by_row: Log-law of the lengths of a row given those, shape (num_shared, *rows, num_by_row), or None.
        horizon: Steps in the running mean.
        batch_weight: By how much a batch counts in it that has fewer rows than others.
    """

    logits: Any
    logits_by_row: Any
    num_updates: Tensor
    possible: Tensor
    possible_by_row: Tensor

    def __init__(
        self,
        model: Callable[..., Any],
        plan: Plan,
        shared_plates: Collection[str],
        num_draws: int,
        init_loc_fn: Callable[[Any], Any],
    ) -> None:
        super().__init__(model)
        self.plan, self.shared_plates, self.num_draws = plan, tuple(shared_plates), num_draws
        self.init_loc_fn, self.horizon, self.batch_weight = init_loc_fn, _HORIZON, 1.0
        self._enumerated = True
        self.way: str | None = None  # in which a model can be evaluated for all lengths
        self.hides: Mapping[str, Any] = {}  # sites of the model in this call, if it hides or scales some

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        try:
            super()._setup_prototype(*args, **kwargs)
        except KeyError as error:  # a site that the guide around this one has not met
            raise ValueError(_comes_and_goes(error.args[0])) from error
        plan = self.plan
        sizes = [each.num_units for each in plan.shared]
        priors = [joint_prior([each.prior for each in group], like=plan.like) for group in plan.groups]
        prior = torch.cat(priors, -1)
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.long, device=prior.device))
        self.logits = PyroParam(prior, constraints.real)
        self.register_buffer("possible", is_possible(prior))
        self._has_rows = bool(plan.by_row)
        if self._has_rows:
            rows = [1] * max(-frame.dim for frame in plan.row_frames)
            for frame in plan.row_frames:
                rows[frame.dim] = 1 if frame.name in self.shared_plates else frame.size
            prior = joint_prior([each.prior for each in plan.by_row], like=plan.like)
            if prior.shape[:-1].numel() > math.prod(rows):  # a law that rows share starts at that of the first
                prior = prior[tuple(slice(0, n) for n in rows[len(rows) - prior.dim() + 1 :])]
            prior = prior.expand(plan.num_shared, *rows, plan.num_by_row).contiguous()
            self.logits_by_row = PyroParam(prior, constraints.real)
            self.register_buffer("possible_by_row", is_possible(prior))
        centers, spreads = self._start(*args, **kwargs)
        for i, block in enumerate(plan.blocks):
            center = torch.cat([centers[latent.name] for latent in block.latents], -1)
            spread = torch.cat([spreads[latent.name] for latent in block.latents], -1)
            laws = plan.num_shared * (plan.num_by_row if block.by_row_length else 1)
            offsets = [sum(sizes[:j]) for j in range(len(sizes))] if plan.separate else [0]
            setattr(self, f"tables_{i}", Tables(block, laws, center, spread, offsets))

    @torch.no_grad()
    def _start(self, *args: Any, **kwargs: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return where the coordinates of each latent start, and the deviations of their prior."""
        latents = {latent.name: (block, latent) for block in self.plan.blocks for latent in block.latents}
        if not latents:
            return {}, {}
        hidden = poutine.block(self.model, hide=[each.name for each in self.plan.lengths])
        programs = [InitMessenger(self.init_loc_fn)(hidden)] + [self.model] * _PRIOR_DRAWS
        draws: dict[str, list[Tensor]] = {name: [] for name in latents}
        for program in programs:
            trace: Any = poutine.block(poutine.trace(program).get_trace)(*args, **kwargs)
            known = latents.keys() | {each.name for each in self.plan.lengths}
            drawn = [name for name, site in trace.iter_stochastic_nodes() if not site_is_subsample(site)]
            if new := [name for name in drawn if name not in known]:
                raise ValueError(_comes_and_goes(new[0]))
            for block, latent in latents.values():
                if latent.name not in trace.nodes and not latent.nested:
                    raise ValueError(_comes_and_goes(latent.name))
                if not latent.nested:
                    value = trace.nodes[latent.name]["value"]
                elif latent.name not in trace.nodes:
                    value = torch.zeros(latent.fn.shape()).to(self.plan.like)
                else:  # all coordinates, also those that a draw has dropped
                    law: Any = find_mask(trace.nodes[latent.name]["fn"])
                    value = law.cut(law.num_units).sample()
                coordinates = latent.collect(latent.transform.inv(value))
                draws[latent.name].append(coordinates.reshape(*block.shape, latent.size))
        spreads = {}
        for name, values in draws.items():
            low, high = torch.stack(values[1:]).sort(0).values[[_PRIOR_DRAWS // 4, -1 - _PRIOR_DRAWS // 4]]
            spreads[name] = ((high - low) / 1.54).clamp(1e-6, 1e6)
        return {name: values[0] for name, values in draws.items()}, spreads

    @property
    def tables(self) -> list[Tables]:
        """Laws of the blocks."""
        return [getattr(self, f"tables_{i}") for i in range(len(self.plan.blocks))]

    def floored_logits(self) -> tuple[Tensor, Tensor | None]:
        """Return the log-laws of training, without gradient: of the lengths outside plates, and of those of a row."""
        by_row = with_floor(self.logits_by_row.detach()) if self._has_rows else None
        return torch.cat([with_floor(law) for law in self.split(self.logits.detach())]), by_row

    def split(self, shared: Tensor) -> list[Tensor]:
        """Return the laws in what belongs to the lengths outside plates: one for each if they are separate, or one."""
        return list(shared.split([math.prod(each.num_units for each in group) for group in self.plan.groups]))

    def draw_combinations(self) -> Tensor:
        """Return the lengths, from 0, of all combinations, shape (combinations, lengths).

        If lengths are separate, those of each in turn, with the others drawn from their laws.
        """
        if not self.plan.separate:
            return self.plan.grid
        laws = [law.exp() for law in self.split(self.floored_logits()[0])]
        total = sum(len(law) for law in laws)
        grid = torch.stack([torch.multinomial(law, total, replacement=True) for law in laws], -1)
        start = 0
        for i, law in enumerate(laws):
            grid[start : start + len(law), i] = torch.arange(len(law), device=law.device)
            start += len(law)
        return grid

    def _leaves(self) -> tuple[Tensor, Tensor | None]:
        r"""Return the same, with a gradient from which the backward pass reads the ELBO of each length.

        With $V_k$ the ELBO of length k, log p included, the loss $-\sum_k q_k (V_k - \log q_k)$ has in the logit k the
        gradient $-q_k (V_k - \log q_k)$, but for a constant times $q_k$.
        """
        shared = with_floor(self.logits.detach(), self.possible)
        by_row = with_floor(self.logits_by_row.detach(), self.possible_by_row) if self._has_rows else None
        log_q = shared.clone()
        self._enumerated = True

        def best(log_law: Tensor, gradient: Tensor) -> Tensor:
            if not self._enumerated:
                raise RuntimeError(
                    "AutoNested: its latents know the lengths, which an objective must not draw but sum over: train "
                    "it with NestedELBO or TraceEnum_ELBO, or use AutoNested(model, latents='mean_field')"
                )
            return torch.where(is_possible(log_law), log_law - gradient, -1e4)

        shared.requires_grad_().register_hook(
            lambda gradient: self.learn(best(log_q, gradient * (-log_q).clamp_max(80).exp()), None)
        )
        if by_row is not None:
            log_r = by_row.clone()
            # A law that rows share has the sum of their gradients.
            number = math.prod(frame.size for frame in self.plan.row_frames if frame.name in self.shared_plates)
            outer = log_q.reshape((-1,) + (1,) * (log_r.dim() - 1))
            by_row.requires_grad_().register_hook(
                lambda gradient: self.learn(None, best(log_r, gradient * (-log_r - outer).clamp_max(80).exp() / number))
            )
        return shared, by_row

    @torch.no_grad()
    def learn(self, logits: Tensor | None, logits_by_row: Tensor | None, share: float | None = None) -> None:
        """Move the laws of the lengths towards the best ones for the other latents as they are.

        Args:
            logits: These, not normalised, shape (num_shared,), or None to leave them.
            logits_by_row: Shape (num_shared, *rows, num_by_row), or None.
            share: Weight of the new ones; by default that of a step in a running mean, times `batch_weight`.
        """
        if share is None:
            self.num_updates += logits is not None
            share = self.batch_weight / max(min(int(self.num_updates), self.horizon), 1)
        for name, new in (("logits", logits), ("logits_by_row", logits_by_row)):
            if new is None or new.isnan().any():
                continue
            parameter = getattr(self, name)
            pairs = [(parameter, new.reshape(parameter.shape))]
            if name == "logits":
                pairs = list(zip(self.split(parameter), self.split(new), strict=True))
            for old, best in pairs:
                best = best.to(old).log_softmax(-1).clamp_min(-1e4)
                old.copy_(torch.lerp(old, best, share).log_softmax(-1))

    def laws(self) -> dict[str, OrderedMask]:
        """Return the learned law of each length, without gradient."""
        shared = self.logits.detach()
        found: dict[str, OrderedMask] = {}
        for group, law in zip(self.plan.groups, self.split(shared), strict=True):
            found |= marginals(group, law)
        if self._has_rows:
            by_row = self.logits_by_row.detach()
            mixed = by_row + shared.reshape((-1,) + (1,) * (by_row.dim() - 1))
            found |= marginals(self.plan.by_row, mixed.logsumexp(0))
        return found

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draw all latents."""
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        plates = self._create_plates(*args, **kwargs)
        training = self.training and torch.is_grad_enabled() and not self.plan.separate
        laws = self._leaves() if training else (self.logits, self.logits_by_row if self._has_rows else None)
        masks: dict[str, Tensor] = {}
        if self.plan.separate:
            drawn = [
                self._draw_masks([each], law, plates, masks, enumerate_="")
                for each, law in zip(self.plan.shared, self.split(laws[0]), strict=True)
            ]
            index, factor = torch.stack([number for number, _ in drawn], -1), torch.ones_like(drawn[0][1])
        else:
            index, factor = self._draw_masks(self.plan.shared, laws[0], plates, masks)
        result = {each.name: masks[each.name] for each in self.plan.shared if not each.nested}
        # Outside the plates first, as enumeration wants it.
        order = sorted(range(len(self.plan.blocks)), key=lambda i: len(self.plan.blocks[i].rows))
        for i in order:
            if not self.plan.blocks[i].by_row_length:
                result |= self._draw_block(i, index, factor, training, masks, plates)
        if laws[1] is not None:
            row_index, row_factor = self._draw_masks(self.plan.by_row, at_rows(laws[1], index), plates, masks)
            result |= {each.name: masks[each.name] for each in self.plan.by_row if not each.nested}
            for i in order:
                if self.plan.blocks[i].by_row_length:
                    place = index * self.plan.num_by_row + row_index
                    result |= self._draw_block(i, place, factor * row_factor, training, masks, plates)
        return result

    def _draw_block(
        self,
        number: int,
        index: Tensor,
        factor: Tensor,
        training: bool,
        masks: dict[str, Tensor],
        plates: dict[str, Any],
    ) -> dict[str, Tensor]:
        """Draw the latents of a block, given the number of the combination of lengths."""
        block, tables = self.plan.blocks[number], self.tables[number]
        law = tables.law(index)
        if training:  # one noise for all lengths, whose ELBOs are compared
            law.common = tuple(i - index.dim() for i in range(index.dim() - len(block.shape)) if index.shape[i] > 1)
            law.factor = factor.unsqueeze(-1) if tables.knows_lengths else None
        if any(latent.name in self.hides for latent in block.latents):
            law.weights = self._weights(block, law)
        with in_plates(plates, block.rows):
            drawn = pyro.sample(f"_latents_{number}", law, infer={"is_auxiliary": True})
        return {latent.name: self._unpack(latent, law, drawn, masks, plates) for latent in block.latents}

    def _draw_masks(
        self,
        lengths: list[Lengths],
        log_q: Tensor,
        plates: dict[str, Any],
        masks: dict[str, Tensor],
        enumerate_: str = "parallel",
    ) -> tuple[Tensor, Tensor]:
        """Draw lengths one after another from their joint law, shape (..., combinations).

        Returns:
            The number of the combination, and one over its probability in units of the uniform law.
        """
        index = torch.zeros((), dtype=torch.long, device=log_q.device)
        number = log_q.shape[-1]
        log_q = log_q.reshape(*log_q.shape[:-1], *(each.num_units for each in lengths), 1)
        for i, each in enumerate(lengths):
            first = i - len(lengths) - 1  # its dimension, and those of the later ones behind it
            fn = OrderedMask(logits=log_q.logsumexp([*range(first + 1, 0)]), validate_args=False)
            name = f"{each.name}_mask" if each.nested else each.name
            infer: Any = {"is_auxiliary": each.nested} | ({"enumerate": enumerate_} if enumerate_ else {})
            with in_plates(plates, each.frames), _Enumeration() as seen:
                mask = pyro.sample(name, fn, infer=infer)
            self._enumerated &= seen.enumerated
            masks[each.name] = mask
            length = mask.detach().sum(-1).long() - 1
            log_q = select(log_q, length, first)
            index = index * each.num_units + length
        return index, (-log_q.detach().squeeze(-1)).exp().clamp_max(1e9) / number

    def _weights(self, block: Block, law: TableNormal) -> Tensor:
        """Return how much each coordinate counts in the model of this call, shape (*rows, D)."""
        parts = []
        for latent in block.latents:
            weight = weight_in_model(self.hides[latent.name], law.loc.new_ones(latent.batch))
            parts.append(latent.weigh(weight).reshape(*block.shape, latent.size))
        return torch.cat(parts, -1)

    def describe(self) -> str:
        """Say which laws there are, for the repr of the guide."""
        every = list(self.laws().items())
        laws = [f"{name}: {LengthSummary.of(law)}" for name, law in every[:10]]
        laws += [f"and {len(every) - 10} more"] if len(every) > 10 else []
        for block, tables in zip(self.plan.blocks, self.tables, strict=True):
            names = ", ".join(latent.name for latent in block.latents[:10])
            more = f" and {len(block.latents) - 10} more" if len(block.latents) > 10 else ""
            kind = "multivariate Normal" if tables.correlated else "Normal"
            each_of = "each length of each, added" if self.plan.separate else f"each of {tables.num_laws} lengths"
            given = f"for {each_of}" if tables.knows_lengths else "for all lengths"
            laws.append(f"{names}{more}: a {kind} {given}")
        return "; ".join(laws)

    def _unpack(
        self, latent: Latent, law: TableNormal, drawn: Tensor, masks: dict[str, Tensor], plates: dict[str, Any]
    ) -> Tensor:
        """Make a latent of the model from the draw of its block, as a point with the rest of its log-density."""
        value, log_density = latent.constrain(latent.place(drawn[..., latent.start : latent.stop]))
        if latent.nested:
            mask = masks[latent.name]
            value = mask * value
            # What is dropped has no density in the model, and is to have none here.
            shape = torch.broadcast_shapes(drawn.shape[:-1], mask.shape[:-1])
            weights = drawn.new_zeros(*shape, drawn.shape[-1])
            weights[..., latent.start : latent.stop] = 1 - mask
            log_density = -law.log_prob_of(drawn, law.noise_of(drawn), weights).sum(-1)
        with in_plates(plates, latent.frames):
            delta = dist.Delta(value, log_density=log_density, event_dim=latent.fn.event_dim)
            return pyro.sample(latent.name, delta)

    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Return the median of each latent."""
        return {name: values[0] for name, values in self.quantiles([0.5], *args, **kwargs).items()}

    @torch.no_grad()
    def quantiles(
        self, quantiles: list[float], *args: Any, num_samples: int = 1000, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Return quantiles of each latent, stacked in a new first dimension: of draws, as laws of lengths are mixed."""
        prototype: Any = self.prototype_trace
        depth = max((-frame.dim for frame in self._prototype_frames.values()), default=0)
        with torch.random.fork_rng(), poutine.block(), pyro.plate("quantiles", num_samples, dim=-depth - 1):
            torch.manual_seed(0)
            drawn = self(*args, **kwargs)
        found = {}
        for name, value in drawn.items():
            values = value.expand(torch.broadcast_shapes(value.shape, (num_samples, *(1 for _ in value.shape[1:]))))
            values = values.reshape(num_samples, *prototype.nodes[name]["value"].shape)
            # By entries this is the mask of the quantile of the length, too.
            levels = torch.as_tensor(quantiles, dtype=values.dtype, device=values.device)
            found[name] = values.quantile(levels, 0, interpolation="nearest")
        return found


def _comes_and_goes(name: str) -> str:
    return (
        f"AutoNested: site {name!r} is not in every run of the model: sites may not depend on a length. Draw all of "
        "them, and multiply by the mask what is to be dropped"
    )


class _Enumeration(Messenger):
    """See whether a site is enumerated."""

    enumerated = False

    def _pyro_post_sample(self, msg: Any) -> None:
        self.enumerated |= msg["infer"].get("_enumerate_dim") is not None
