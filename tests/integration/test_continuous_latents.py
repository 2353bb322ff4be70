"""Masks and nested vectors as latents of samplers and autoguides that work in unconstrained space."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import LENGTH_CASES, Case, each
from pyro.infer import MCMC, NUTS, Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal
from pyro.ops.stats import effective_sample_size
from torch import Tensor

from pyro_vnd.distributions import RelaxedOrderedMask

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


ATOMIC_CASES = [case for case in LENGTH_CASES if case.cls is not RelaxedOrderedMask]


@pytest.mark.parametrize("autoguide", [AutoNormal, AutoMultivariateNormal, AutoDelta])
@each(ATOMIC_CASES)
def test_autoguide_refuses_laws_with_atoms(autoguide: type, case: Case):
    """A silent answer would be wrong: these laws have no density in unconstrained space."""
    error, message = (ValueError, "discrete") if case.hard else (NotImplementedError, "Cannot transform")
    with pytest.raises(error, match=message):
        autoguide(lambda: pyro.sample("z", case.build(num_units=K)))()


@each(ATOMIC_CASES, hard=False)
def test_nuts_refuses_nested_vectors(case: Case):
    mcmc = MCMC(NUTS(lambda: pyro.sample("x", case.build(num_units=K))), num_samples=1, warmup_steps=0)
    with pytest.raises(NotImplementedError, match="Cannot transform"):
        mcmc.run()
