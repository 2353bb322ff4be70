"""Masks and nested vectors as sample sites under Pyro's plates, particles, effect handlers and predictive tools."""

from collections.abc import Callable
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import LENGTH_CASES, Case, each
from pyro import poutine
from pyro.distributions import TorchDistribution
from pyro.infer import Predictive, Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor
from torch.distributions import kl_divergence

from pyro_vnd.distributions import OrderedMask
from pyro_vnd.infer import AutoNested, fit

ROWS, K = 4, 3
PRIOR_LOGITS = torch.tensor([0.3, 0.0, -0.6], dtype=torch.float64)
ROW_LOGITS = torch.linspace(-1, 1, ROWS * K, dtype=torch.float64).reshape(ROWS, K).sin()
WEIGHTS = torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64)
Y = torch.tensor([0.2, 1.0, 2.5, -0.4], dtype=torch.float64)


class Laws(NamedTuple):
    """A guide and the prior that goes with it, each a function of the `logits` of the lengths."""

    guide: Callable[..., TorchDistribution]
    prior: Callable[..., TorchDistribution]


each_reparameterised = each(LENGTH_CASES, reparameterised=True)
each_exact_kl = each(LENGTH_CASES, reparameterised=True, divergence=True)


@pytest.fixture
def laws(case: Case) -> Laws:
    """A guide and a prior of a case, of other arguments; the prior of a mask that has atoms is the exact law."""
    return Laws(case.by_lengths(K), OrderedMask if case.hard else case.by_lengths(K))


class RowModel:
    """A mask for each row of a data set, and a guide with a law for each row; `seen` picks rows, `observed` data."""

    def __init__(self, laws: Laws, observed: bool = True) -> None:
        self.laws, self.observed = laws, observed

    def plate(self, seen: list[int] | None, size: int | None) -> pyro.plate:
        subsample = None if seen is None else torch.tensor(seen)
        return pyro.plate("rows", ROWS, subsample_size=size, subsample=subsample, dim=-1)

    def model(self, seen: list[int] | None = None, size: int | None = None) -> None:
        with self.plate(seen, size) as index:
            z = pyro.sample("z", self.laws.prior(logits=PRIOR_LOGITS))
            if self.observed:
                pyro.sample("y", dist.Normal((z * WEIGHTS).sum(-1), 1.0), obs=Y[index])

    def guide(self, seen: list[int] | None = None, size: int | None = None) -> None:
        with self.plate(seen, size):
            # Inside a plate Pyro hands out the rows of the subsample.
            logits = pyro.param("row_logits", ROW_LOGITS.clone(), event_dim=1)
            pyro.sample("z", self.laws.guide(logits=logits))

    def divergence(self) -> Tensor:
        """Return KL(guide || prior) of every row."""
        return kl_divergence(self.laws.guide(logits=ROW_LOGITS), self.laws.prior(logits=PRIOR_LOGITS))


@pytest.mark.parametrize("rows", [3, 1])
def test_predictions_in_a_plate_are_those_one_by_one(rows: int):
    """After a fit in which y was observed: the mean of 4,000 draws at once is that of 1,000 one by one, by z-scores."""

    def model(x: Tensor, y: Tensor | None = None) -> Tensor:
        mask = pyro.sample("mask", OrderedMask.uniform(3))
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(x), dim=-1):
            return pyro.sample("y", dist.Normal((x * mask * w).sum(-1), 0.1), obs=y)

    x = torch.randn(20, 3)
    guide = AutoNested(model)
    fit(model, guide, (x, x[:, 0]), num_epochs=5, progress=False)
    with torch.no_grad(), pyro.plate("draws", 4_000, dim=-2):
        trace = poutine.trace(guide).get_trace(x[:rows])
        at_once = poutine.replay(model, trace=trace)(x[:rows])
    one_by_one = Predictive(model, guide=guide, num_samples=1_000)(x[:rows])["y"]
    assert at_once.shape == (4_000, rows)
    assert one_by_one.shape == (1_000, rows)
    error = (at_once.var(0) / 4_000 + one_by_one.var(0) / 1_000).sqrt()
    assert ((at_once.mean(0) - one_by_one.mean(0)) / error).abs().max() < 4
    assert ((at_once.mean(0) - one_by_one.mean(0) - 0.5) / error).abs().max() > 4


@each(LENGTH_CASES)
def test_disjoint_subsamples_add_up(laws: Laws):
    """At given values the scaled log joint of the halves of a data set average to that of the whole."""
    rows = RowModel(laws)
    z = laws.prior(logits=PRIOR_LOGITS).sample((ROWS,))

    def log_joint(seen: list[int]) -> Tensor:
        trace = poutine.trace(poutine.condition(rows.model, {"z": z[seen]})).get_trace(seen)
        assert trace.nodes["z"]["scale"] == ROWS / len(seen)
        return trace.log_prob_sum()

    halves = torch.stack([log_joint([0, 3]), log_joint([2, 1])])
    torch.testing.assert_close(halves.mean(), log_joint([0, 1, 2, 3]))
    assert (halves - halves.mean()).abs().min() > 0.01  # the halves differ


@each_exact_kl
def test_subsampled_mean_field_divergence(laws: Laws):
    """Amortised rows: each subsample counts its own rows, scaled; random subsamples are right in expectation."""
    rows, elbo = RowModel(laws, observed=False), TraceMeanField_ELBO()
    divergence = rows.divergence().detach()
    for seen in ([0, 3], [2], [0, 1, 2, 3]):
        expected = ROWS / len(seen) * divergence[seen].sum().item()
        assert elbo.loss(rows.model, rows.guide, seen) == pytest.approx(expected)
    losses = torch.tensor([elbo.loss(rows.model, rows.guide, None, 2) for _ in range(400)])
    # n = 400 subsamples of two rows: the mean is 4 standard errors off in one of 16,000 runs.
    assert ((losses.mean() - divergence.sum()) / losses.std() * 20).abs() < 4
    assert losses.std() > 0.01


@each(LENGTH_CASES)
def test_vectorised_particles_agree_with_a_loop(laws: Laws):
    """One loss of 20,000 vectorised particles against 400 losses of one particle each."""
    rows = RowModel(laws)
    vectorised = Trace_ELBO(num_particles=20_000, vectorize_particles=True, max_plate_nesting=1)
    together = vectorised.loss(rows.model, rows.guide)
    alone = torch.tensor([Trace_ELBO().loss(rows.model, rows.guide) for _ in range(400)])
    assert ((alone.mean() - together) / alone.std() * 20).abs() < 4  # a z-score; the other error is 7 times smaller


@each_exact_kl
@pytest.mark.parametrize("how", ["poutine.mask", "Distribution.mask", "to_event"])
def test_masked_and_independent_divergence(laws: Laws, how: str, monkeypatch):
    """TraceMeanField_ELBO counts the exact divergence of the rows left unmasked, or of all as one event."""
    kept = torch.tensor([True, False, True, True])
    found = []

    def counted(q: TorchDistribution, p: TorchDistribution) -> Tensor:
        found.append(kl_divergence(q, p))  # not reached where it raises and sampling takes over
        return found[-1]

    monkeypatch.setattr(pyro.infer.trace_mean_field_elbo, "kl_divergence", counted)

    def sample(law: TorchDistribution) -> None:
        if how == "to_event":
            pyro.sample("z", law.expand([ROWS]).to_event(1))
            return
        with pyro.plate("rows", ROWS):
            if how == "Distribution.mask":
                pyro.sample("z", law.expand([ROWS]).mask(kept))
            else:
                with poutine.mask(mask=kept):
                    pyro.sample("z", law)

    loss = TraceMeanField_ELBO().loss(
        lambda: sample(laws.prior(logits=PRIOR_LOGITS)), lambda: sample(laws.guide(logits=ROW_LOGITS))
    )
    counting = torch.ones(ROWS) if how == "to_event" else kept
    assert loss == pytest.approx((counting * RowModel(laws).divergence()).sum().item())
    assert len(found) == 1


@each_exact_kl
def test_scaled_divergence(laws: Laws):
    rows = RowModel(laws, observed=False)
    model, guide = (poutine.scale(f, scale=0.25) for f in (rows.model, rows.guide))
    expected = 0.25 * rows.divergence().sum().item()
    assert TraceMeanField_ELBO().loss(model, guide) == pytest.approx(expected)


@each_reparameterised
def test_masked_rows_have_no_gradient(laws: Laws):
    """Under Trace_ELBO the logits of a masked row stay where they are, those of the others learn."""
    kept = torch.tensor([True, False, True, False])
    rows = RowModel(laws)
    model, guide = (poutine.mask(f, mask=kept) for f in (rows.model, rows.guide))
    elbo = Trace_ELBO(num_particles=50, vectorize_particles=True, max_plate_nesting=1)
    elbo.loss_and_grads(model, guide)
    (logits,) = (value for _, value in pyro.get_param_store().named_parameters())
    assert ((logits.grad != 0).any(-1) == kept).all()


@each(LENGTH_CASES)
def test_condition_makes_an_observation(laws: Laws):
    """Given the masks, nothing is latent: the loss under an empty guide is minus the log joint, exactly."""
    z = laws.prior(logits=PRIOR_LOGITS).sample((ROWS,))
    model = poutine.condition(RowModel(laws).model, {"z": z})
    log_joint = laws.prior(logits=PRIOR_LOGITS).log_prob(z) + dist.Normal(z @ WEIGHTS, 1.0).log_prob(Y)
    assert Trace_ELBO().loss(model, lambda: None) == pytest.approx(-log_joint.sum().item())


@each(LENGTH_CASES)
def test_replay_scores_the_guide_draw(laws: Laws, case: Case):
    """The model scores the guide's draw, as the same object, and the prior's part has a gradient to the guide."""
    rows = RowModel(laws)
    guide_trace = poutine.trace(rows.guide).get_trace()
    model_trace = poutine.trace(poutine.replay(rows.model, trace=guide_trace)).get_trace()
    z = guide_trace.nodes["z"]["value"]
    assert model_trace.nodes["z"]["value"] is z
    model_trace.compute_log_prob()
    log_prob = model_trace.nodes["z"]["log_prob"]
    # A copy has forgotten what the draw remembers, and scores the same.
    torch.testing.assert_close(log_prob, laws.prior(logits=PRIOR_LOGITS).log_prob(z.detach().clone()))
    if not case.reparameterised:
        assert not log_prob.requires_grad
    else:
        (gradient,) = torch.autograd.grad(log_prob.sum(), guide_trace.nodes["row_logits"]["value"])
        assert (gradient != 0).any(-1).all()


def mean_model(laws: Laws) -> Tensor:
    with pyro.plate("rows", ROWS):
        z = pyro.sample("z", laws.prior(logits=PRIOR_LOGITS))
        return pyro.deterministic("mean", z @ WEIGHTS)


@each(LENGTH_CASES)
@pytest.mark.parametrize("parallel", [False, True])
def test_predictive_from_a_guide(laws: Laws, parallel: bool):
    """Draws have the guide's law, not the prior's, and the rest of the model is computed from the same draws."""
    rows = RowModel(laws)
    predictive = Predictive(
        lambda: mean_model(laws), guide=rows.guide, num_samples=1000, return_sites=["z", "mean"], parallel=parallel
    )
    draws = predictive()
    z = draws["z"].detach()
    torch.testing.assert_close(draws["mean"].detach(), z @ WEIGHTS)
    # A z-score of the first two moments a row and unit against 100,000 direct draws; the first unit does not vary.
    found = torch.cat([z, z**2], -1).mean(0)

    def z_scores(law: TorchDistribution) -> Tensor:
        direct = law.sample((100_000,))
        moments = torch.cat([direct, direct**2], -1)
        return (found - moments.mean(0)) / (moments.std(0) / 1000**0.5 + 1e-12)

    assert z_scores(laws.guide(logits=ROW_LOGITS)).abs().max() < 4.5
    assert z_scores(laws.prior(logits=PRIOR_LOGITS)).abs().max() > 6  # power


@each(LENGTH_CASES)
@pytest.mark.parametrize("parallel", [False, True])
def test_predictive_from_posterior_samples(laws: Laws, parallel: bool):
    """Given draws are used in their order."""
    z = laws.prior(logits=PRIOR_LOGITS).sample((5, ROWS))
    predictive = Predictive(lambda: mean_model(laws), {"z": z}, return_sites=["mean"], parallel=parallel)
    torch.testing.assert_close(predictive()["mean"], z @ WEIGHTS)


@each(LENGTH_CASES)
def test_model_graph_shows_parameters_and_dependence(laws: Laws, case: Case):
    def model() -> None:
        logits = pyro.param("logits", torch.zeros(K))
        with pyro.plate("rows", ROWS):
            z = pyro.sample("z", laws.guide(logits=logits))
            pyro.sample("y", dist.Normal((z * WEIGHTS).sum(-1), 1.0), obs=Y)

    source = pyro.render_model(model, render_distributions=True, render_params=True).source
    for part in (f"z ~ {case.cls.__name__}\\l", "logits -> z\n", "z -> y\n", "label=rows"):
        assert part in source
    assert "logits -> y" not in source  # only through the mask
