"""Masks and nested vectors as latents of samplers and autoguides that work in unconstrained space."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import LENGTH_CASES, Case, each
from pyro.infer import MCMC, NUTS, Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal
from pyro.infer.reparam import AutoReparam, DiscreteCosineReparam, HaarReparam, LocScaleReparam
from pyro.infer.reparam.reparam import Reparam
from pyro.ops.stats import effective_sample_size
from torch import Tensor
from torch.distributions import biject_to
from torch.func import jacrev, vmap

from pyro_vnd.distributions import NestedAutoregressive, NestedNormal, RelaxedOrderedMask, TailSum

K = 3
LOGITS = torch.tensor([0.4, -0.2, 0.3], dtype=torch.float64)


def relaxed(logits: Tensor) -> RelaxedOrderedMask:
    return RelaxedOrderedMask(1.0, logits=logits)


def moments(z: Tensor) -> Tensor:
    """Return the first two moments of the units that vary, and their product, one row a draw."""
    a, b = z[..., 1], z[..., 2]
    return torch.stack([a, b, a**2, b**2, a * b], -1)


def z_scores(draws: Tensor, law: RelaxedOrderedMask) -> Tensor:
    """Compare the moments of a chain with those of 200,000 direct draws; errors by effective sample size."""
    chain, direct = moments(draws), moments(law.sample((200_000,)))
    error = chain.std(0) / effective_sample_size(chain.unsqueeze(0)).sqrt()
    return (chain.mean(0) - direct.mean(0)) / error


def test_nuts_samples_a_relaxed_mask():
    """The sampler's change of variables, stick-breaking and tail sums, has the right Jacobian."""
    mcmc = MCMC(
        NUTS(lambda: pyro.sample("z", relaxed(LOGITS))), num_samples=400, warmup_steps=100, disable_progbar=True
    )
    mcmc.run()
    draws = mcmc.get_samples()["z"]
    assert relaxed(LOGITS).support.check(draws).all()
    assert z_scores(draws, relaxed(LOGITS)).abs().max() < 4
    assert z_scores(draws, relaxed(-LOGITS)).abs().max() > 4  # power: a law of other lengths is rejected


@pytest.mark.parametrize("autoguide", [AutoNormal, AutoMultivariateNormal, AutoDelta])
def test_autoguide_draws_relaxed_masks(autoguide: type):
    """An autoguide finds the bijection: its draws are soft masks, and its loss is finite and has a gradient."""

    def model() -> None:
        z = pyro.sample("z", relaxed(LOGITS))
        pyro.sample("y", dist.Normal(z.sum(-1), 0.5), obs=torch.tensor(2.0))

    guide = autoguide(model)
    loss = Trace_ELBO().differentiable_loss(model, guide)
    loss.backward()
    assert torch.isfinite(loss)
    assert all((p.grad != 0).any() for p in guide.parameters())
    assert relaxed(LOGITS).support.check(guide()["z"]).all()


def unconstrained(num_units: int) -> tuple[Tensor, Tensor, Tensor]:
    """A grid of unconstrained numbers with their masks, and log-determinants by autograd; steps of 0.15."""
    axis = torch.arange(-20 if num_units == 2 else -12, 12, 0.15)
    u = torch.cartesian_prod(*[axis] * (num_units - 1)).reshape(-1, num_units - 1)
    to_mask = biject_to(relaxed(LOGITS).support)
    jacobian = vmap(jacrev(lambda x: to_mask(x)[1:]))(u)
    return u, to_mask(u), torch.linalg.slogdet(jacobian).logabsdet


def two_or_three_units(num_units: int) -> None:
    z = pyro.sample("z", relaxed(LOGITS[:num_units]))
    pyro.sample("y", dist.Normal(z.sum(-1), 0.5), obs=torch.tensor(2.0))


@pytest.mark.parametrize("num_units", [2, 3])
def test_elbo_of_an_autoguide_is_that_by_quadrature(num_units: int):
    """The mean over 20,000 particles, by its z-score; without the Jacobian it is off by far more."""
    law, step = relaxed(LOGITS[:num_units]), 0.15 ** (num_units - 1)
    u, masks, log_det = unconstrained(num_units)
    prior = law.log_prob(masks)
    assert ((prior + log_det).exp() * step).sum().item() == pytest.approx(1, abs=1e-4)
    guide = AutoNormal(two_or_three_units)
    guide(num_units)
    loc, scale = torch.tensor([0.4, -0.7])[: num_units - 1], torch.tensor([0.8, 1.3])[: num_units - 1]
    with torch.no_grad():
        guide.locs.z.copy_(loc)
        guide.scales.z = scale
    log_q = dist.Normal(loc, scale).log_prob(u).sum(-1)
    log_likelihood = dist.Normal(masks.sum(-1), 0.5).log_prob(torch.tensor(2.0))

    def mean_and_deviation(log_weight: Tensor) -> tuple[Tensor, Tensor]:
        weight = log_q.exp() * step
        mean = (weight * log_weight).sum()
        return mean, (weight * (log_weight - mean) ** 2).sum().sqrt()

    elbo = Trace_ELBO(num_particles=20_000, vectorize_particles=True, max_plate_nesting=0)
    found = -elbo.loss(two_or_three_units, guide, num_units)
    mean, deviation = mean_and_deviation(log_likelihood + prior + log_det - log_q)
    assert abs(found - mean) / (deviation / 20_000**0.5) < 4
    mean, deviation = mean_and_deviation(log_likelihood + prior - log_q)
    assert abs(found - mean) / (deviation / 20_000**0.5) > 20


ATOMIC_CASES = [case for case in LENGTH_CASES if case.cls is not RelaxedOrderedMask]


@pytest.mark.parametrize("autoguide", [AutoNormal, AutoMultivariateNormal, AutoDelta])
@each(ATOMIC_CASES)
def test_autoguide_refuses_laws_with_atoms(autoguide: type, case: Case):
    """A silent answer would be wrong: these laws have no density in unconstrained space."""
    error, message = (ValueError, "discrete") if case.hard else (NotImplementedError, "take pyro_vnd.infer.AutoNested")
    with pytest.raises(error, match=message):
        autoguide(lambda: pyro.sample("z", case.build(num_units=K)))()


@each(ATOMIC_CASES, hard=False)
def test_nuts_refuses_nested_vectors(case: Case):
    mcmc = MCMC(NUTS(lambda: pyro.sample("x", case.build(num_units=K))), num_samples=1, warmup_steps=0)
    with pytest.raises(NotImplementedError, match=r"not an autoguide of Pyro or HMC"):
        mcmc.run()


def test_nested_laws_cannot_be_transformed():
    """What is zero has no density: Pyro's class would charge the Jacobian of all coordinates."""
    law = NestedNormal(torch.zeros(3), torch.ones(3), torch.zeros(3))
    double = dist.transforms.AffineTransform(0.0, 2.0, event_dim=1)
    laws = [law, law.cut(2), law.expand((2,)).to_event(1), law.mask(False), law.expand_by((2,))]
    laws.append(NestedAutoregressive(lambda x: (0 * x, 0 * x + 1), torch.zeros(3)))
    for each_law in laws:
        with pytest.raises(ValueError, match=r"cannot be transformed: .* Scale `loc` and `scale` of the law itself"):
            dist.TransformedDistribution(each_law, [double])
    with pytest.raises(ValueError, match="a NestedNormal cannot be transformed"):
        dist.TransformedDistribution(transforms=[double], base_distribution=law)
    with pytest.raises(ValueError, match="FoldedDistribution: a NestedNormal cannot be transformed"):
        dist.FoldedDistribution(law)
    soft = dist.TransformedDistribution(RelaxedOrderedMask(0.5, logits=torch.zeros(3)), [TailSum().inv])
    assert dist.constraints.simplex.check(soft.sample())


REPARAMETERISERS = {
    "decentred": (LocScaleReparam(0.0), AttributeError, "LocScaleReparam, which would move dropped coordinates"),
    "rotated": (DiscreteCosineReparam(), NotImplementedError, "take pyro_vnd.infer.AutoNested"),
    "in wavelets": (HaarReparam(), NotImplementedError, "take pyro_vnd.infer.AutoNested"),
}


@pytest.mark.parametrize(("reparam", "error", "message"), REPARAMETERISERS.values(), ids=REPARAMETERISERS)
@pytest.mark.parametrize("autoregressive", [False, True])
def test_nested_laws_are_not_reparameterised(reparam: Reparam, error: type, message: str, autoregressive: bool):
    law = NestedAutoregressive(lambda x: (0 * x, 0 * x + 1), torch.zeros(3))
    law = law if autoregressive else NestedNormal(torch.zeros(3), torch.ones(3), torch.zeros(3))
    with pytest.raises(error, match=message):
        pyro.poutine.reparam(lambda: pyro.sample("x", law), {"x": reparam})()


@each(LENGTH_CASES)
def test_what_pyro_reparameterises_by_itself_is_left_alone(case: Case):
    law = case.build(num_units=K)
    trace = pyro.poutine.trace(AutoReparam()(lambda: pyro.sample("z", law))).get_trace()
    assert trace.nodes["z"]["fn"] is law


@pytest.mark.parametrize("reparam", [DiscreteCosineReparam(), HaarReparam()], ids=["rotated", "in wavelets"])
def test_soft_masks_can_be_rotated(reparam: Reparam):
    """The density of the new site integrates to one, and its mean is that of the mask."""
    model = pyro.poutine.reparam(lambda: pyro.sample("z", relaxed(LOGITS[:2])), {"z": reparam})
    (name,) = [name for name in pyro.poutine.trace(model).get_trace().nodes if name not in ("_INPUT", "z", "_RETURN")]
    traces = [
        pyro.poutine.trace(pyro.condition(model, {name: x.reshape(1)})).get_trace() for x in torch.arange(-20, 20, 0.1)
    ]
    density = torch.stack([trace.nodes[name]["fn"].log_prob(trace.nodes[name]["value"]) for trace in traces]).exp()
    assert density.sum().item() * 0.1 == pytest.approx(1, abs=1e-4)
    masks = torch.stack([trace.nodes["z"]["value"] for trace in traces])
    mean, draws = 0.1 * (density * masks[:, 1]).sum(), relaxed(LOGITS[:2]).sample((100_000,))[:, 1]
    assert abs(draws.mean() - mean) / (draws.std() / 100_000**0.5) < 4
