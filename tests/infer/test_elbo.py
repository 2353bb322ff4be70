"""NestedELBO: Pyro's mean-field ELBO without its needless scores, and with its parts."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal, AutoNormalMessenger
from pyro.nn import PyroModule
from torch.distributions import kl_divergence

from pyro_vnd.distributions import NestedNormal, OrderedMask, OrderedMaskStraightThrough
from pyro_vnd.infer import AutoNested, NestedELBO, module_local_params

N, K = 7, 3
Y = torch.linspace(-1, 2, N, dtype=torch.float64)


class Pair(PyroModule):
    """A model and a guide with parameters a, one for each test of the values below."""

    def __init__(self):
        super().__init__()
        self.a = torch.nn.Parameter(torch.tensor([0.3, -0.2, 0.5]))

    def run(self, elbo, **arguments):
        torch.manual_seed(2)
        self.a.grad = None
        loss = elbo(**arguments).differentiable_loss(self.model, self.guide)
        loss.backward()
        return loss.detach(), self.a.grad


class GlobalMask(Pair):
    def model(self):
        mask = pyro.sample("mask", OrderedMask.uniform(K))
        w = pyro.sample("w", dist.Normal(torch.zeros(K), 1.0).to_event(1))
        with pyro.plate("data", N):
            pyro.sample("y", dist.Normal((mask * w).sum(-1).unsqueeze(-1), 1.0), obs=Y)

    def guide(self):
        pyro.sample("mask", OrderedMaskStraightThrough(0.5, logits=self.a))
        pyro.sample("w", dist.Normal(self.a, self.a.exp()).to_event(1))


class MaskedPlates(Pair):
    """Masks and scales as effects, a latent in two plates."""

    def model(self):
        with pyro.plate("groups", K, dim=-2), pyro.plate("data", N), poutine.scale(scale=2.5), poutine.mask(mask=Y > 0):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=Y)

    def guide(self):
        with pyro.plate("groups", K, dim=-2), pyro.plate("data", N), poutine.scale(scale=2.5), poutine.mask(mask=Y > 0):
            pyro.sample("z", dist.Normal(self.a.unsqueeze(-1), 0.5))


class NoClosedForm(Pair):
    """KL(LogNormal || Gamma) is not registered, and an auxiliary site is in the guide alone."""

    def model(self):
        scale = pyro.sample("scale", dist.Gamma(torch.full((K,), 2.0), 1.0).to_event(1))
        shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
        with pyro.plate("data", N):
            pyro.sample("y", dist.Normal(shift, scale.sum(-1).unsqueeze(-1)), obs=Y)

    def guide(self):
        extra = pyro.sample("extra", dist.Normal(self.a[0], 0.5), infer={"is_auxiliary": True})
        pyro.sample("scale", dist.LogNormal(self.a, 0.3).to_event(1))
        pyro.sample("shift", dist.Normal(extra, self.a[1].exp()))


class NestedCodes(Pair):
    def model(self):
        with pyro.plate("data", N):
            code = pyro.sample("code", NestedNormal(torch.zeros(K), torch.ones(K), torch.zeros(K)))
            pyro.sample("y", dist.Normal(code.sum(-1), 1.0), obs=Y)

    def guide(self):
        with pyro.plate("data", N):
            pyro.sample("code", NestedNormal(self.a, self.a.exp(), self.a))


PAIRS = [GlobalMask, MaskedPlates, NoClosedForm, NestedCodes]
PARTICLES = [
    {},
    {"num_particles": 3},
    {"num_particles": 3, "vectorize_particles": True, "max_plate_nesting": 2},
    {"num_particles": 3, "vectorize_particles": True},
]


@pytest.mark.parametrize("arguments", PARTICLES, ids=["one", "three", "vectorized", "guessed"])
@pytest.mark.parametrize("pair", PAIRS)
def test_value_and_gradient_are_those_of_trace_mean_field(pair, arguments):
    if pair is NestedCodes and "max_plate_nesting" in arguments:
        arguments = {**arguments, "max_plate_nesting": 1}
    pair = pair()
    loss, gradient = pair.run(NestedELBO, **arguments)
    expected_loss, expected_gradient = pair.run(TraceMeanField_ELBO, **arguments)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-12, atol=1e-12)
    assert gradient.abs().min() > 0


@pytest.mark.parametrize("arguments", PARTICLES[:3], ids=["one", "three", "vectorized"])
def test_parts_add_up_and_are_what_they_say(arguments):
    pair, elbo = GlobalMask(), NestedELBO(**arguments)
    torch.manual_seed(2)
    loss = elbo.differentiable_loss(pair.model, pair.guide)
    assert list(elbo.kl) == ["mask", "w"]
    torch.testing.assert_close(elbo.log_likelihood - sum(elbo.kl.values()), -loss.detach())
    mask = kl_divergence(OrderedMask(logits=pair.a), OrderedMask.uniform(K))
    w = kl_divergence(dist.Normal(pair.a, pair.a.exp()), dist.Normal(0.0, 1.0)).sum()
    torch.testing.assert_close(elbo.kl, {"mask": mask.detach(), "w": w.detach()})
    assert not elbo.log_likelihood.requires_grad


def test_parts_are_those_of_the_last_call():
    pair, elbo = GlobalMask(), NestedELBO()
    losses = [elbo.differentiable_loss(pair.model, pair.guide).item() for _ in range(3)]
    assert elbo.log_likelihood - sum(elbo.kl.values()) == pytest.approx(-losses[-1])


def test_svi_trains_with_it():
    def guide():
        pyro.sample("mu", dist.Normal(pyro.param("loc", torch.tensor(0.0)), (N + 1) ** -0.5))

    def model():
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", N):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=Y)

    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), NestedELBO(num_particles=2))
    losses = [svi.step() for _ in range(100)]
    assert all(isinstance(loss, float) for loss in [*losses, svi.evaluate_loss(), NestedELBO().loss(model, guide)])
    assert pyro.param("loc").item() == pytest.approx(Y.sum().item() / (N + 1), abs=0.1)


class Unscored(dist.Normal):
    """A Normal that must not be scored."""

    def expand(self, batch_shape, _instance=None):
        return super().expand(batch_shape, self._get_checked_instance(Unscored, _instance))

    def log_prob(self, value):
        raise AssertionError("scored")


def test_sites_with_a_kl_are_never_scored():
    def model():
        w = pyro.sample("w", Unscored(torch.zeros(K), 1.0).to_event(1))
        with pyro.plate("data", N):
            z = pyro.sample("z", Unscored(0.0, 1.0))
            pyro.sample("y", dist.Normal(w.sum(-1).unsqueeze(-1) + z, 1.0), obs=Y)

    def guide():
        pyro.sample("w", Unscored(torch.ones(K), 2.0).to_event(1))
        with pyro.plate("data", N):
            pyro.sample("z", Unscored(1.0, 2.0))

    elbo = NestedELBO()
    assert torch.isfinite(elbo.differentiable_loss(model, guide))
    assert elbo.kl["z"] == pytest.approx(N * kl_divergence(dist.Normal(1.0, 2.0), dist.Normal(0.0, 1.0)).item())
    with pytest.raises(AssertionError, match="scored"):
        TraceMeanField_ELBO().differentiable_loss(model, guide)


def test_a_weight_scales_the_objective_and_not_the_reported_kl():
    pair = GlobalMask()
    weights = {"mask": 0.0, "w": 0.25}
    weigh = poutine.infer_config(config_fn=lambda site: {"kl_weight": weights.get(site["name"], 1.0)})
    plain, weighted = NestedELBO(), NestedELBO()
    torch.manual_seed(2)
    loss = plain.differentiable_loss(pair.model, pair.guide).item()
    torch.manual_seed(2)
    weighted_loss = weighted.differentiable_loss(weigh(pair.model), weigh(pair.guide)).item()
    assert weighted.kl == plain.kl
    assert weighted_loss == pytest.approx(loss - plain.kl["mask"].item() - 0.75 * plain.kl["w"].item())


def test_the_two_terms_of_a_nested_normal_have_weights_of_their_own():
    q = NestedNormal(torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0.5, 1.0, 2.0]), torch.tensor([0.3, 0.0, 1.0]))
    p = NestedNormal(torch.zeros(3), torch.ones(3), torch.zeros(3))

    def site(law):
        with pyro.plate("data", N):
            pyro.sample("code", law, infer={"kl_weight": 2.0, "length_weight": 5.0})

    lengths = N * kl_divergence(q.mask_law, p.mask_law)
    whole = N * kl_divergence(q, p)
    elbo = NestedELBO()
    loss = elbo.differentiable_loss(lambda: site(p), lambda: site(q))
    torch.testing.assert_close(elbo.kl["code"], whole)
    torch.testing.assert_close(elbo.kl_lengths["code"], lengths)
    torch.testing.assert_close(loss, 2 * (whole - lengths) + 5 * lengths)


@pytest.mark.parametrize(("infer", "weight"), [({"kl_weight": 2.0}, 2), ({"kl_weight": 2.0, "length_weight": 5.0}, 5)])
def test_a_mask_has_the_weight_of_lengths_or_else_that_of_its_kl(infer, weight):
    q, p = OrderedMaskStraightThrough(0.5, logits=torch.tensor([0.3, 0.0, 1.0])), OrderedMask.uniform(K)
    elbo = NestedELBO()
    loss = elbo.differentiable_loss(lambda: pyro.sample("mask", p), lambda: pyro.sample("mask", q, infer=infer))
    kl = kl_divergence(q, p)
    torch.testing.assert_close(loss, weight * kl)
    assert elbo.kl == elbo.kl_lengths == {"mask": kl}


def test_the_jacobian_of_a_positive_latent_is_kept():
    # The guide is the prior: ELBO zero, on every draw. Pyro's mean-field ELBO forgets the log-density of the guide.
    def model():
        pyro.sample("scale", dist.LogNormal(0.3, 0.7))

    guide = AutoNormal(model, init_loc_fn=lambda site: torch.tensor(0.3).exp(), init_scale=0.7)
    with module_local_params(guide):
        losses = {elbo: [float(elbo().loss(model, guide)) for _ in range(5)] for elbo in (Trace_ELBO, NestedELBO)}
    assert losses[NestedELBO] == pytest.approx([0.0] * 5, abs=1e-9)
    assert losses[Trace_ELBO] == pytest.approx([0.0] * 5, abs=1e-9)


def test_a_shape_that_does_not_fit_its_plates_is_refused():
    def wrong():
        with pyro.plate("data", N):
            z = pyro.sample("z", dist.Normal(torch.zeros(2, N), 1.0))  # a dimension of no plate
            pyro.sample("y", dist.Normal(z, 1.0), obs=Y)

    def guide():
        with pyro.plate("data", N):
            pyro.sample("z", dist.Normal(torch.zeros(2, N), 1.0))

    with pytest.raises(ValueError, match='at site "z", invalid log_prob shape'):
        NestedELBO(max_plate_nesting=2).differentiable_loss(wrong, guide)


def test_another_order_of_sites_warns():
    pair = GlobalMask()

    def guide():
        pyro.sample("w", dist.Normal(torch.zeros(K), 1.0).to_event(1))
        pyro.sample("mask", OrderedMaskStraightThrough(0.5, logits=pair.a))

    with pytest.warns(UserWarning, match="Failed to verify mean field restriction"):
        NestedELBO().differentiable_loss(pair.model, guide)


def test_a_mask_without_gradient_in_the_guide_is_refused():
    def guide():
        pyro.sample("mask", OrderedMask.uniform(K))
        pyro.sample("w", dist.Normal(torch.zeros(K), 1.0).to_event(1))

    with pytest.raises(NotImplementedError, match="site 'mask' of the guide must be reparameterised"):
        NestedELBO().differentiable_loss(GlobalMask().model, guide)


def test_a_latent_that_the_guide_lacks_is_drawn_from_the_model_and_costs_nothing():
    def model():
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        s = pyro.sample("s", dist.HalfNormal(1.0))
        with pyro.plate("data", N):
            pyro.sample("mask", OrderedMask.uniform(K))
            pyro.sample("y", dist.Normal(mu, s), obs=Y)

    def guide():
        pyro.sample("mu", dist.Normal(1.0, 1.0))

    elbo = NestedELBO()
    with pytest.warns(UserWarning, match="Found vars in model but not guide"):
        loss = elbo.differentiable_loss(model, guide)
    assert loss.item() == pytest.approx(0.5 - elbo.log_likelihood.item())
    assert elbo.kl == {"mu": pytest.approx(0.5)}


def test_a_gradient_that_a_lacking_latent_would_miss_is_refused():
    p = torch.tensor(0.4, requires_grad=True)

    def model():
        flip = pyro.sample("flip", dist.Bernoulli(p))
        pyro.sample("y", dist.Normal(flip, 1.0), obs=torch.tensor(0.0))

    with pytest.raises(NotImplementedError, match="site 'flip' is not in the guide, so that it is drawn"):
        NestedELBO().differentiable_loss(model, lambda: None)


def test_a_latent_of_the_guide_alone_is_named():
    def guide():
        pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("nu", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="site 'nu' of the guide is no latent of the model"):
        NestedELBO().differentiable_loss(lambda: pyro.sample("mu", dist.Normal(0.0, 1.0)), guide)


def of_order(x, y):
    mask = pyro.sample("mask", OrderedMask.uniform(K))
    w = pyro.sample("w", dist.Normal(torch.zeros(K), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ (mask * w), 0.5), obs=y)


def test_svi_trains_a_guide_whose_latents_know_the_lengths():
    x = torch.randn(40, K)
    y = x[:, 0] - 0.3 * x[:, 1] + 0.5 * torch.randn(40)
    kept = x * torch.ones(K, K).tril().unsqueeze(-2)
    exact = dist.LowRankMultivariateNormal(torch.zeros(40), kept, torch.full((40,), 0.25)).log_prob(y)
    assert exact.softmax(-1).max() < 0.95
    guide = AutoNested(of_order)
    svi = pyro.infer.SVI(of_order, guide, pyro.optim.Adam({"lr": 0.02, "betas": (0.9, 0.95)}), NestedELBO())
    for _ in range(400):
        svi.step(x, y)
    assert (guide.laws["mask"].probs - exact.softmax(-1)).abs().max() < 0.03
    with torch.no_grad():
        assert svi.evaluate_loss(x, y) == pytest.approx(-(exact.logsumexp(-1) - torch.tensor(K).log()).item(), abs=0.2)


def test_a_nested_normal_has_both_parts_of_its_kl_at_every_length():
    def model():
        w = pyro.sample("w", NestedNormal(torch.zeros(K), torch.ones(K), torch.zeros(K)))
        with pyro.plate("data", N):
            pyro.sample("y", dist.Normal(w.sum(-1).unsqueeze(-1), 1.0), obs=Y)

    guide, elbo = AutoNested(model), NestedELBO()
    elbo.loss(model, guide)
    # Of narrow laws: about log(1 / scale) for each unit that is kept, and nothing of the lengths at their prior.
    assert elbo.kl_lengths["w"].abs() < 1e-5
    assert elbo.kl["w"] > 3


def test_sites_are_checked_whenever_they_change():
    """Not only in the first evaluation, and again after one that failed."""
    rows = [3]

    def model():
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 3):
            pyro.sample("y", dist.Normal(w, 1.0), obs=torch.zeros(*rows))

    def guide():
        pyro.sample("w", dist.Normal(torch.tensor(0.5), 1.0))

    elbo = NestedELBO()
    elbo.differentiable_loss(model, guide)
    rows[:] = [2, 3]
    for _ in range(2):
        with pytest.raises(ValueError, match="invalid log_prob shape"):
            elbo.differentiable_loss(model, guide)
    rows[:] = [3]
    elbo.differentiable_loss(model, guide)


def test_a_setting_that_there_is_not_is_refused():
    with pytest.raises(
        ValueError, match="NestedELBO: argument `local_reparam` must be True, False or 'linear'; got 'c"
    ):
        NestedELBO(local_reparam="convolutions")


def test_laws_that_hide_all_entries_cost_nothing():
    """Pyro's KL of them is the number zero."""

    def site(loc):
        with pyro.plate("data", N):
            pyro.sample("w", dist.Normal(torch.full((N, K), loc), 1.0).mask(False).to_event(1))
        pyro.sample("u", dist.Uniform(0.0, 1.0))

    elbo = NestedELBO()
    loss = elbo.differentiable_loss(lambda: site(0.0), lambda: site(3.0))
    assert loss == elbo.kl["w"] == elbo.kl["u"] == 0
    assert isinstance(elbo.kl["w"], torch.Tensor)


def test_a_guide_that_is_a_messenger():
    """Its laws have no closed KL with those of the model: densities are compared, as Pyro's ELBO does."""

    def model():
        w = pyro.sample("w", dist.Normal(torch.zeros(K), 1.0).to_event(1))
        with pyro.plate("data", N):
            pyro.sample("y", dist.Normal(w.sum(-1).unsqueeze(-1), 1.0), obs=Y)

    guide, losses = AutoNormalMessenger(model, init_scale=0.3), []
    with module_local_params(guide):
        for elbo in (Trace_ELBO(), NestedELBO()):
            pyro.set_rng_seed(3)
            losses.append([elbo.loss(model, guide) for _ in range(5)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-12)
    assert len(set(losses[1])) == 5
