"""The ELBO of each combination of lengths of a conditional guide, all of them from the same draws."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyro_vnd.infer._conditional.every_length import Values, evaluate_all, find_way
from pyro_vnd.infer._conditional.guide import AutoConditional
from pyro_vnd.infer._conditional.layout import Block, Lengths
from pyro_vnd.infer._conditional.program import Program
from pyro_vnd.infer._conditional.tables import TableNormal, Tables

__all__ = ["Evaluation", "evaluate"]


@dataclass
class Evaluation:
    """What an evaluation at all lengths found.

    Attributes:
        loss: Minus `elbo`. Its gradient trains tables and model: the lengths weigh the same in the tables, and as in
            their law in the model.
        elbo: The bound at the laws of the lengths that are best for these tables; detached, as all that follow.
        log_likelihood: Its likelihood part, at the laws so far.
        kl: KL of each latent, by name.
        kl_lengths: KL of the lengths.
        logits: The best log-law of the lengths outside plates, not normalised, shape (num_shared,).
        logits_by_row: That of the lengths of a row, shape (num_shared, *rows, num_by_row), or None.
        log_weights: log p - log q of each draw but for the lengths outside plates, shape (num_draws, num_shared).
    """

    loss: Tensor
    elbo: Tensor
    log_likelihood: Tensor
    kl: Values
    kl_lengths: Values
    logits: Tensor
    logits_by_row: Tensor | None
    log_weights: Tensor


def evaluate(
    guide: AutoConditional,
    model: Callable[..., Any],
    args: Any,
    kwargs: Any,
    num_draws: int,
    *,
    release: bool = False,
) -> Evaluation:
    """Evaluate a model at all lengths.

    Args:
        guide: The guide, which has been called before.
        model: The model.
        args: Arguments of both.
        kwargs: The same, by name.
        num_draws: Draws of the other latents, the same noise for all lengths; every second one mirrors the one before.
        release: Whether latents that the model hides, of which a fit learns nothing, are given back their prior.
    """
    plan = guide.plan
    laws = _Laws(guide)
    draws = [_Draw.of(block, tables, laws, num_draws) for block, tables in zip(plan.blocks, guide.tables, strict=True)]
    program = Program(model, args, kwargs, plan.row_frames)
    masks = plan.masks(laws.grid)
    values = _values(guide, draws, masks, num_draws)
    if guide.way is None:
        guide.way = find_way(program, {name: value[: laws.number].detach() for name, value in values.items()})
    out = evaluate_all(program, values, guide.way)
    out = {key: x.reshape(num_draws, laws.number, *x.shape[1:]) for key, x in out.items()}

    found = _Terms(program, laws, num_draws)
    for name in program.observed:
        found.add(name, _possible(out[f"log_prob:{name}"]))
    log_likelihood = found.expected.clone()
    kl = {}
    for draw in draws:
        if release:
            draw.release(program, out, masks)
        for name, log_q, weighted in draw.log_q(program, out, masks):
            log_p = out[f"log_prob:{name}"]
            kl[name] = found.expectation(name, (log_q - log_p).detach())
            found.add(name, program.kl_weight(name) * log_p - weighted)
    return found.with_lengths(guide, out, log_likelihood, kl)


class _Laws:
    """Laws of the lengths in training, and how much each combination weighs.

    Attributes:
        number: Combinations; those of a row are the inner ones.
        of_shared: Which combination outside plates each has, shape (number,).
        shared: Probabilities of these, shape (num_shared,).
        grid: The lengths of all combinations, from 0, shape (number, lengths).
        factor: One over their weight in the loss, in units of the same weight for all, shape (num_shared,).
        weight: What a term weighs that does not depend on the lengths of rows, shape (number,).
        row_weight: What a term of a row weighs, shape (number, *rows), with one where the law is shared.
    """

    def __init__(self, guide: AutoConditional) -> None:
        plan = guide.plan
        self.log_shared, self.log_by_row = guide.floored_logits()
        self.shared = self.log_shared.exp()
        self.number = plan.num_shared * plan.num_by_row
        self.of_shared = torch.arange(self.number, device=self.shared.device) // plan.num_by_row
        self.grid = guide.draw_combinations()
        self.separate = plan.separate
        sizes = [law.new_full(law.shape, len(law)) for law in guide.split(self.shared)]
        self.factor = 1 / (torch.cat(sizes) * self.shared)
        self.weight = self.shared[self.of_shared] / (plan.num_by_row * len(sizes))
        self.row_weight = self.weight
        if self.log_by_row is not None:
            conditional = self.log_by_row.exp().movedim(-1, 1).flatten(0, 1)
            outer = self.shared[self.of_shared].reshape((-1,) + (1,) * (conditional.dim() - 1))
            self.row_weight = outer * conditional


@dataclass
class _Draw:
    """Draws of one block.

    Attributes:
        block: The block.
        tables: Its laws.
        index: Which of them a combination has, shape (combinations,).
        law: All of them.
        noise: What the draws are made of, shape (num_draws, 1, *rows, D).
        value: The draws, shape (num_draws, laws, *rows, D).
        log_densities: What transforms add to log q, by latent, shape (num_draws, combinations, *batch).
    """

    block: Block
    tables: Tables
    index: Tensor
    law: TableNormal
    noise: Tensor
    value: Tensor
    log_densities: Values = field(default_factory=dict)

    @classmethod
    def of(cls, block: Block, tables: Tables, laws: _Laws, num_draws: int) -> "_Draw":
        """Draw."""
        shape = (*block.shape, block.size)
        at = laws.grid.reshape(-1, *(1 for _ in block.shape), laws.grid.shape[-1])
        law = tables.law(at if laws.separate and tables.knows_lengths else None)
        noise = torch.randn((-(-num_draws // 2), 1, *shape), dtype=law.loc.dtype, device=law.loc.device)
        noise = torch.stack([noise, -noise], 1).flatten(0, 1)[:num_draws]
        if not tables.knows_lengths:
            return cls(block, tables, torch.zeros_like(laws.of_shared), law, noise, law.of_noise(noise))
        # The loss weighs each length as its law does; in the tables all weigh the same.
        if block.by_row_length:
            index = torch.arange(laws.number, device=noise.device)
            factor = 1 / (laws.number * laws.row_weight)
        else:
            index = laws.of_shared
            factor = laws.factor
        ones = (1,) * (len(shape) - factor.dim())
        law.factor = factor.reshape(-1, *ones, *factor.shape[1:], 1)
        return cls(block, tables, index, law, noise, law.of_noise(noise))

    def log_q(self, program: Program, out: Values, masks: Values) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Yield of each latent its name and log q, as it is, without gradient, and with the weight of its KL."""
        weights = self._weights(program, out, masks)
        if weights is None:
            terms = self.law.log_prob_of(self.value, self.noise, None)[:, self.index]
            exact = terms.detach()
        else:
            law, value, noise = self.law, self.value[:, self.index], self.noise
            if len(law.loc) != len(self.index):
                law = self.tables.law(self.index.reshape((-1,) + (1,) * len(self.block.shape)))
            with torch.no_grad():
                exact = law.log_prob_of(value, noise, weights)
            weights = weights * torch.cat(
                [weights.new_full((latent.size,), program.kl_weight(latent.name)) for latent in self.block.latents]
            )
            terms = law.log_prob_of(value, noise, weights)
        for latent in self.block.latents:
            density = self.log_densities[latent.name]
            if f"weight:{latent.name}" in out:
                density = density * out[f"weight:{latent.name}"]
            density = program.reduce(latent.name, density, lead=2)
            both = []
            for x, weight in ((exact, 1.0), (terms, program.kl_weight(latent.name))):
                x = program.reduce(latent.name, x[..., latent.start : latent.stop].sum(-1), lead=2)
                both.append(x + weight * density)
            yield latent.name, both[0].detach(), both[1]

    def release(self, program: Program, out: Values, masks: Values) -> None:
        """Give coordinates that count in no draw the location and the deviation of their prior."""
        weights = self._weights(program, out, masks)
        if weights is not None and (hidden := weights.amax((0, 1)) == 0).any():
            self.tables.release(hidden)

    def _weights(self, program: Program, out: Values, masks: Values) -> Tensor | None:
        """Return how much each coordinate counts, shape (num_draws, combinations, *rows, D), or None for once."""
        latents = self.block.latents
        special = [f"weight:{latent.name}" in out or latent.nested for latent in latents]
        if not any(special) and all(program.kl_weight(latent.name) == 1 for latent in latents):
            return None
        lead = (len(self.noise), len(self.index))
        parts = []
        for latent in latents:
            part = self.noise.new_ones(*lead, *self.block.shape, latent.size)
            if f"weight:{latent.name}" in out:
                part = part * latent.weigh(out[f"weight:{latent.name}"]).reshape(part.shape)
            if latent.nested:
                part = part * masks[latent.name].reshape(lead[1], *(1 for _ in self.block.shape), -1)
            parts.append(part)
        return torch.cat(parts, -1)


def _values(guide: AutoConditional, draws: list[_Draw], masks: Values, num_draws: int) -> Values:
    """Return the values of all latents, draws and combinations together in the first dimension."""
    plan = guide.plan
    number = plan.num_shared * plan.num_by_row
    lead = num_draws * number
    values: Values = {}
    for each in plan.lengths:
        if not each.nested:
            batch = each.prior.batch_shape
            mask = masks[each.name].reshape(number, *(1 for _ in batch), each.num_units)
            values[each.name] = mask.expand(num_draws, number, *batch, -1).reshape(lead, *batch, -1)
    for draw in draws:
        drawn, depth = draw.value[:, draw.index], len(draw.block.shape)
        for latent in draw.block.latents:
            ones = (1,) * max(len(latent.batch) - depth, 0)
            x = drawn[..., latent.start : latent.stop].reshape(lead, *ones, *draw.block.shape, latent.size)
            value, log_density = latent.constrain(latent.place(x).reshape(lead, *latent.batch, *latent.event))
            draw.log_densities[latent.name] = log_density.reshape(num_draws, number, *latent.batch)
            if latent.nested:
                mask = masks[latent.name].reshape(number, *(1 for _ in latent.batch), -1)
                value = (value.reshape(num_draws, number, *latent.batch, -1) * mask).reshape(value.shape)
            values[latent.name] = value
    return values


class _Terms:
    """Sums of the terms of the ELBO but for those of the lengths.

    Attributes:
        outside: What does not depend on the lengths of rows, shape (num_draws, combinations).
        rows: What does, shape (num_draws, combinations, *rows).
        expected: Their expectation at the laws so far; detached.
    """

    def __init__(self, program: Program, laws: _Laws, num_draws: int) -> None:
        self.program, self.laws, self.num_draws = program, laws, num_draws
        self.outside = laws.weight.new_zeros(num_draws, laws.number)
        self.rows: Tensor | None = None
        self.expected = laws.weight.new_zeros(())

    def _by_row(self, x: Tensor) -> Tensor:
        """Give terms of rows all dimensions of the rows."""
        sizes = [1] * (self.laws.row_weight.dim() - 1)
        for dim, size in zip(sorted(self.program.rows.values()), x.shape[2:], strict=True):
            sizes[dim] = size
        return x.reshape(*x.shape[:2], *sizes)

    def add(self, name: str, x: Tensor) -> None:
        """Add the terms of a site."""
        self.expected = self.expected + self.expectation(name, x.detach())
        if name not in self.program.in_rows:
            self.outside = self.outside + x
        else:
            x = self._by_row(x)
            self.rows = x if self.rows is None else self.rows + x

    def expectation(self, name: str, x: Tensor) -> Tensor:
        """Return the expectation of the terms of a site at the laws so far."""
        weight = self.laws.weight
        if name in self.program.in_rows:
            weight, x = self.laws.row_weight, self._by_row(x)
        return (weight * x).sum() / len(x)

    def with_lengths(self, guide: AutoConditional, out: Values, log_likelihood: Tensor, kl: Values) -> Evaluation:
        """Add the terms of the lengths, and find the best laws of these."""
        plan = guide.plan
        # At a weight of zero the best law is on the best length, as it is just above.
        weight = max(self.program.length_weight([each.name for each in plan.lengths]), 1e-6)
        grid = (plan.num_shared, plan.num_by_row)
        loss = -(self.laws.weight * self.outside).sum() / self.num_draws
        value = self.outside.detach().mean(0).reshape(grid).mean(1)
        log_weights = self.outside.detach().reshape(-1, *grid).mean(2)
        kl_lengths: Values = {}
        logits_by_row = None
        if plan.by_row:
            added, gain, divergence, logits_by_row = self._lengths_by_row(guide, out, weight)
            loss, value, log_weights = loss + added, value + gain, log_weights + gain
            kl_lengths["+".join(each.name for each in plan.by_row)] = divergence
        if plan.shared:
            lengths = self._separate_lengths if plan.separate else self._joint_lengths
            added, logits, elbo, divergences = lengths(guide, out, weight, value)
            loss, kl_lengths = loss + added, kl_lengths | divergences
        else:
            logits, elbo = torch.zeros_like(value), value.sum()
        if not loss.requires_grad:  # there are masks alone, whose law is known without a step
            loss = loss + 0 * guide.logits.sum()
        loss = loss - loss.detach() - elbo
        return Evaluation(loss, elbo, log_likelihood, kl, kl_lengths, logits, logits_by_row, log_weights)

    def _lengths_by_row(
        self, guide: AutoConditional, out: Values, length_weight: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the loss, what the best laws add to the ELBO, the KL at those so far, and the best log-laws."""
        plan, laws = guide.plan, self.laws
        grid = (plan.num_shared, plan.num_by_row)
        scale = self._by_row(out[f"scale:{plan.by_row[0].name}"]).mean((0, 1))
        prior: Any = sum(self._by_row(out[f"length:{each.name}"]).mean(0) for each in plan.by_row)
        rows = torch.zeros_like(prior) if self.rows is None else self.rows.mean(0)
        loss = -(laws.row_weight * (rows + length_weight * scale * _finite(prior))).sum()
        prior, rows = prior.detach(), rows.detach()
        best, total = scale * prior + rows / length_weight, scale.expand_as(prior)
        shared = [i + 1 for i, size in enumerate(guide.logits_by_row.shape[1:-1]) if size == 1]
        if shared:
            best, total, prior = best.sum(shared, True), total.sum(shared, True), prior.mean(shared, True)
        # Rows that the model hides have their prior.
        best = torch.where(total > 0, best / total.clamp_min(torch.finfo(total.dtype).tiny), prior)
        best, prior = best.unflatten(0, grid), _finite(prior).unflatten(0, grid)
        total = total.unflatten(0, grid)[:, 0]
        gain = length_weight * (total * best.logsumexp(1)).flatten(1).sum(1)
        assert laws.log_by_row is not None
        divergence = (laws.log_by_row.movedim(-1, 1) - prior) * total.unsqueeze(1)
        return loss, gain, (laws.row_weight.unflatten(0, grid) * divergence).sum(), best.movedim(1, -1)

    def _joint_lengths(
        self, guide: AutoConditional, out: Values, length_weight: float, value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Values]:
        """Return the loss, the best log-law, the bound that it reaches, and the KL at the law so far."""
        plan, laws = guide.plan, self.laws
        weight = length_weight * _scale(out, plan.shared)
        prior: Any = sum(out[f"length:{each.name}"].mean(0) for each in plan.shared)
        loss = -weight * (laws.weight * _finite(prior)).sum()
        prior = prior.detach().reshape(plan.num_shared, plan.num_by_row)[:, 0]
        logits = prior + value / weight
        divergence = _scale(out, plan.shared) * (laws.shared * (laws.log_shared - _finite(prior))).sum()
        return loss, logits, weight * logits.logsumexp(-1), {"+".join(each.name for each in plan.shared): divergence}

    def _separate_lengths(
        self, guide: AutoConditional, out: Values, length_weight: float, value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Values]:
        """Return the same for lengths that have a law each, the best for the others as they are; the bound so far."""
        plan, laws = guide.plan, self.laws
        weight = length_weight * _scale(out, plan.shared)
        of_each = [out[f"length:{each.name}"].mean(0) for each in plan.shared]
        prior = torch.cat([guide.split(x)[i] for i, x in enumerate(of_each)])  # where each has its lengths in turn
        loss = -weight * (laws.shared * _finite(prior)).sum()
        prior = prior.detach()
        terms = laws.shared * (laws.log_shared - _finite(prior)) * _scale(out, plan.shared)
        divergences = {each.name: x.sum() for each, x in zip(plan.shared, guide.split(terms), strict=True)}
        bound = (laws.weight * value).sum() - length_weight * terms.sum()
        return loss, prior + value / weight, bound, divergences


def _scale(out: Values, lengths: list[Lengths]) -> Tensor:
    """Return how often the lengths outside plates count; hardly, where the model hides them."""
    return out[f"scale:{lengths[0].name}"].mean().clamp_min(1e-6)


def _possible(log_prob: Tensor) -> Tensor:
    """Return a log-likelihood with a very small number where the data rule out a length, but not all of them."""
    impossible = log_prob == -torch.inf
    return log_prob.masked_fill(impossible & ~impossible.all(1, keepdim=True), -1e5)


def _finite(log_prior: Tensor) -> Tensor:
    """Return a log-law with zero in the place of log 0: a law that is learned has nothing there but its floor."""
    return log_prior.masked_fill(log_prior == -torch.inf, 0)
