"""Models as people write them, with laws that are known: what was once wrong in them, or failed."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO
from torch import Tensor
from torch.distributions import MultivariateNormal

from pyro_vnd.diagnostics import loo, to_arviz
from pyro_vnd.distributions import OrderedMask
from pyro_vnd.infer import AutoNested, NestedELBO, NonFiniteLossError, fit

K = 3


def data(num_rows: int = 30) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(num_rows, K, generator=generator)
    return x, x[:, 0] - 0.5 * x[:, 1] + 0.5 * torch.randn(num_rows, generator=generator)


def regression(x: Tensor, y: Tensor, prior: Tensor | None = None, dtype: torch.dtype | None = None) -> None:
    mask = pyro.sample("mask", OrderedMask(probs=torch.ones(K) if prior is None else prior))
    w = pyro.sample("w", dist.Normal(torch.zeros(K, dtype=dtype), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal((x * (mask * w)).sum(-1), 0.5), obs=y)


def exact(x: Tensor, y: Tensor, prior: Tensor | None = None) -> Tensor:
    evidence = []
    for k in range(1, K + 1):
        covariance = 0.25 * torch.eye(len(x)) + x[:, :k] @ x[:, :k].T
        evidence.append(MultivariateNormal(torch.zeros(len(x)), covariance).log_prob(y))
    logits = torch.stack(evidence)
    return (logits if prior is None else logits + prior.log()).softmax(0)


def distance(guide: AutoNested, law: Tensor) -> float:
    return 0.5 * (guide.laws["mask"].probs - law).abs().sum().item()


def test_latents_of_groups_are_correlated_with_those_of_all():
    """A random intercept: closed form over the groups; .27 where the two are independent given the length."""
    generator = torch.Generator().manual_seed(5)
    groups, size = 12, 4
    x = torch.randn(groups, 1, K, generator=generator) + 0.3 * torch.randn(groups, size, K, generator=generator)
    intercepts = 0.8 * torch.randn(groups, 1, generator=generator)
    y = x @ torch.tensor([0.8, -0.4, 0.3]) + intercepts + 0.5 * torch.randn(groups, size, generator=generator)

    def model(x: Tensor, y: Tensor) -> None:
        mask = pyro.sample("mask", OrderedMask.uniform(K))
        w = pyro.sample("w", dist.Normal(torch.zeros(K), 1.0).to_event(1))
        with pyro.plate("groups", groups, dim=-2):
            u = pyro.sample("u", dist.Normal(0.0, 0.8))
            with pyro.plate("data", size, dim=-1):
                pyro.sample("y", dist.Normal((x * (mask * w)).sum(-1) + u, 0.5), obs=y)

    same = torch.eye(groups).repeat_interleave(size, 0).repeat_interleave(size, 1)
    rows, evidence = x.reshape(-1, K), []
    for k in range(1, K + 1):
        covariance = 0.25 * torch.eye(groups * size) + 0.64 * same + rows[:, :k] @ rows[:, :k].T
        evidence.append(MultivariateNormal(torch.zeros(groups * size), covariance).log_prob(y.reshape(-1)))
    guide = AutoNested(model)
    result = fit(model, guide, (x, y), plate="groups", progress=False)
    assert distance(guide, torch.stack(evidence).softmax(0)) < 0.02
    assert result.khat < 0.7


def test_svi_with_the_elbo_of_the_library_trains_all_of_the_guide():
    x, y = data()
    guide = AutoNested(regression)
    svi = SVI(regression, guide, pyro.optim.Adam({"lr": 0.05}), NestedELBO())
    for _ in range(300):
        svi.step(x, y)
    assert distance(guide, exact(x, y)) < 0.02


@pytest.mark.parametrize("elbo", [Trace_ELBO(), TraceGraph_ELBO(), RenyiELBO(num_particles=2)])
@pytest.mark.filterwarnings("ignore:mask:UserWarning")
def test_an_objective_that_draws_lengths_is_refused_in_its_first_step(elbo):
    guide = AutoNested(regression)
    svi = SVI(regression, guide, pyro.optim.Adam({"lr": 0.05}), elbo)
    with pytest.raises(RuntimeError, match="train it with NestedELBO or TraceEnum_ELBO"):
        svi.step(*data())


@pytest.mark.parametrize("elbo", [None, TraceEnum_ELBO(max_plate_nesting=1)])
def test_a_length_that_the_prior_rules_out_stays_so(elbo):
    x, y = data()
    prior = torch.tensor([0.5, 0.0, 0.5])
    model = lambda x, y: regression(x, y, prior)  # noqa: E731
    guide = AutoNested(model)
    fit(model, guide, (x, y), num_epochs=300, elbo=elbo, progress=False)
    assert distance(guide, exact(x, y, prior)) < 0.02
    assert guide.laws["mask"].probs[1] == 0


def test_lengths_that_the_data_rule_out():
    """How many, given the largest: p(y | L) = L^-n for y below L, and zero else."""
    y = torch.tensor([1.2, 3.4, 0.7, 2.2])

    def model(y: Tensor) -> None:
        mask = pyro.sample("mask", OrderedMask.uniform(8))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Uniform(0.0, mask.sum(-1), validate_args=False), obs=y)

    lengths = torch.arange(1.0, 9.0)
    law = torch.where(lengths > y.max(), lengths ** -len(y), 0.0)
    guide = AutoNested(model)
    fit(model, guide, y, num_epochs=2, progress=False)
    assert distance(guide, law / law.sum()) < 1e-4
    with pytest.raises(NonFiniteLossError):  # if they rule out all
        fit(model, AutoNested(model), y + 8, num_epochs=2, progress=False)


def test_masks_and_latents_of_two_precisions():
    x, y = data()
    model = lambda x, y: regression(x, y, torch.ones(K, dtype=torch.float32), torch.float64)  # noqa: E731
    guide = AutoNested(model)
    fit(model, guide, (x.double(), y.double()), num_epochs=300, progress=False)
    assert distance(guide, exact(x, y)) < 0.02


def test_a_latent_that_is_summed_out_by_enumeration():
    """The law is that of the same model with the sum written out."""
    x, y = data()

    def model(x: Tensor, y: Tensor, summed: bool = False) -> None:
        mask = pyro.sample("mask", OrderedMask.uniform(K))
        w = pyro.sample("w", dist.Normal(torch.zeros(K), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            mean = (x * (mask * w)).sum(-1)
            if summed:
                laws = dist.Normal(torch.stack([mean, mean + 3], -1), 0.5)
                law = dist.MixtureSameFamily(dist.Categorical(torch.tensor([0.8, 0.2])), laws)
            else:
                z = pyro.sample("z", dist.Bernoulli(0.2), infer={"enumerate": "parallel"})
                law = dist.Normal(mean + 3 * z, 0.5)
            pyro.sample("y", law, obs=y)

    guide = AutoNested(poutine.block(model, hide=["z"]))
    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    fit(model, guide, (x, y), num_epochs=300, elbo=elbo, progress=False)
    written = lambda x, y: model(x, y, summed=True)  # noqa: E731
    other = AutoNested(written)
    fit(written, other, (x, y), num_epochs=300, progress=False)
    assert distance(guide, other.laws["mask"].probs) < 0.02
    with pytest.raises(ValueError, match="site 'z' of the model is marked for enumeration"):
        fit(model, AutoNested(poutine.block(model, hide=["z"])), (x, y), num_epochs=1, progress=False)


def test_sites_that_depend_on_the_length_are_named():
    def model(y: Tensor) -> None:
        mask = pyro.sample("mask", OrderedMask.uniform(K))
        mean = sum(pyro.sample(f"w{i}", dist.Normal(0.0, 1.0)) for i in range(int(mask.sum())))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    for seed in range(5):
        pyro.set_rng_seed(seed)
        with pytest.raises(ValueError, match=r"AutoNested: site 'w\d' is not in every run of the model"):
            AutoNested(model, latents="conditional")(torch.zeros(4))


def test_the_guide_of_a_model_with_other_lengths():
    x, y = data()
    with pytest.raises(ValueError, match=r"site 'mask' has events of shape \(2,\) in the guide, and of shape \(3,\)"):
        fit(
            regression,
            AutoNested(lambda x, y: pyro.sample("mask", OrderedMask.uniform(2))),
            (x, y),
            num_epochs=1,
            progress=False,
        )


def test_latents_of_hidden_rows_have_their_prior_after_a_fit():
    """Spread of 300 draws of each of 15 rows: its mean over rows is near one; visible rows have sqrt(1 / 2)."""
    keep = torch.arange(20) < 5

    def model(y: Tensor) -> None:
        with pyro.plate("data", len(y)), poutine.mask(mask=keep):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("unseen", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("mask", OrderedMask.uniform(4))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    guide = AutoNested(model)
    y = torch.zeros(20)
    fit(model, guide, y, num_epochs=200, progress=False)
    with torch.no_grad():
        draws = [guide(y) for _ in range(300)]
    spread, unseen = (torch.stack([drawn[name] for drawn in draws]).std(0) for name in ("z", "unseen"))
    assert 0.7 < spread[~keep].mean() < 1.3
    assert spread[keep].mean() == pytest.approx(math.sqrt(0.5), abs=0.05)
    assert unseen.shape == (20, 2)
    assert 0.7 < unseen.mean() < 1.3


def test_latents_of_hidden_entries_have_their_prior_beside_what_is_learned():
    """The latents of all rows are one correlated block: what is hidden is not drawn into it."""
    keep = torch.arange(6) < 3

    def model(y: Tensor) -> None:
        pyro.sample("mask", OrderedMask.uniform(3))
        with pyro.plate("data", len(y)), poutine.mask(mask=keep):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    guide = AutoNested(model)
    fit(model, guide, torch.full((6,), 2.0), num_epochs=300, progress=False)
    (tables,) = guide.conditional.tables
    assert tables.correlated
    assert tables.loc[:, 3:].abs().max() == tables.log_scale[:, 3:].abs().max() == 0
    assert tables.lower[:, 3:].abs().max() == tables.lower[:, :, 3:].abs().max() == 0
    law = tables.law()
    means = (law.center + law.spread * law.loc)[:, :3]
    torch.testing.assert_close(means, torch.ones(3, 3), rtol=0, atol=0.1)  # y / 2
    torch.testing.assert_close(law.stddev[:, :3], torch.full((3, 3), math.sqrt(0.5)), rtol=0, atol=0.1)


def test_latents_too_many_to_know_the_lengths_have_one_law_for_all():
    y = torch.linspace(-2.0, 2.0, 600)

    def model(y: Tensor) -> None:
        pyro.sample("mask", OrderedMask.uniform(256))
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    guide = AutoNested(model, latents="conditional")
    fit(model, guide, y, num_epochs=80, lr=0.1, progress=False)
    (tables,) = guide.conditional.tables
    assert not tables.knows_lengths
    means = (tables.center + tables.spread * tables.loc).squeeze()
    assert (means - y / 2).std() < 0.05
    assert "for all lengths" in repr(guide)
    torch.testing.assert_close(guide.laws["mask"].probs, torch.full((256,), 1 / 256))


def test_the_effective_number_of_parameters_is_that_of_the_posterior():
    """A guide that was not trained is corrected in both densities whose difference it is."""

    def model(y: Tensor) -> None:
        mask = pyro.sample("mask", OrderedMask.uniform(4))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mask.sum(-1), 1.0), obs=y)

    result = loo(to_arviz(model, AutoNested(model), torch.ones(10), num_samples=500))
    assert 0 <= result.p < 1
