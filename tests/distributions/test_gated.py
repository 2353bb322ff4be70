"""Arrays that count as far as a gate is open, against sums over their entries one by one."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch.distributions import Categorical, Laplace, MixtureSameFamily, Normal, kl_divergence

from pyro_vnd.distributions import Gated, LogUniform

SHAPE = (3, 4)
GATES = {
    "none": lambda: None,
    "number": lambda: torch.tensor(0.3),
    "rows": lambda: torch.rand(3, 1),
    "columns": lambda: torch.rand(4),
    "full": lambda: torch.rand(3, 4),
    "zeros": lambda: torch.tensor([[1.0], [0.5], [0.0]]),
}
PRIORS = {
    "one law": lambda: Normal(torch.tensor(0.3), 0.7),
    "one law in a vector": lambda: Normal(torch.zeros(1), torch.full((1,), 0.7)),
    "rows": lambda: Normal(torch.randn(3, 1), torch.rand(3, 1) + 0.5),
    "an entry each": lambda: Normal(torch.randn(3, 4), torch.rand(3, 4) + 0.5),
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def posterior(gate=None, rest=None):
    loc, scale = torch.randn(SHAPE), torch.rand(SHAPE) + 0.1
    return Gated(Normal(loc.requires_grad_(), scale.requires_grad_()), gate=gate, rest=rest)


def sum_over_entries(term, gate) -> float:
    """Sum gate[i, j] * term(i, j) in a loop."""
    gate = torch.ones(SHAPE) if gate is None else gate.expand(SHAPE)
    return sum(gate[i, j].item() * term(i, j) for i in range(SHAPE[0]) for j in range(SHAPE[1]))


def entry(law, i, j):
    loc, scale = (x.expand(SHAPE)[i, j].detach() for x in (law.loc, law.scale))
    return type(law)(loc, scale)


@pytest.mark.parametrize("gate", GATES.values(), ids=GATES)
@pytest.mark.parametrize("prior", PRIORS.values(), ids=PRIORS)
def test_kl_is_the_gated_sum_over_entries(prior, gate):
    gate, prior = gate(), prior()
    q, p = posterior(gate), Gated(prior, SHAPE)
    expected = sum_over_entries(lambda i, j: kl_divergence(entry(q.base, i, j), entry(prior, i, j)).item(), gate)
    kl = kl_divergence(q, p)
    assert kl.shape == ()
    assert kl.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("gate", GATES.values(), ids=GATES)
def test_log_prob_is_the_gated_sum_over_entries(gate):
    gate, rest = gate(), Laplace(0.0, 2.0)
    left = None if gate is None else 1 - gate
    for q in (posterior(gate), posterior(gate, rest)):
        value = q.sample((2,))
        for n in range(2):
            expected = sum_over_entries(lambda i, j: entry(q.base, i, j).log_prob(value[n, i, j]).item(), gate)  # noqa: B023
            if q.rest is not None and left is not None:
                expected += sum_over_entries(lambda i, j: rest.log_prob(value[n, i, j]).item(), left)  # noqa: B023
            assert q.log_prob(value)[n].item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("prior", PRIORS.values(), ids=PRIORS)
def test_gradients_are_those_of_torchs_kl(prior):
    prior, q = prior(), posterior()
    parameters = [q.base.loc, q.base.scale]
    got = torch.autograd.grad(kl_divergence(q, Gated(prior, SHAPE)), parameters)
    expected = torch.autograd.grad(kl_divergence(q.base, prior).sum(), parameters)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("prior", [Normal(0.0, 1.0), Laplace(0.0, 1.0)], ids=["Normal", "Laplace"])
def test_what_a_closed_gate_leaves_out_may_be_infinite(prior):
    loc, gate = torch.tensor([1e200, 1.0], requires_grad=True), torch.tensor([0.0, 0.5], requires_grad=True)
    family = type(prior)
    q = Gated(family(loc, torch.ones(2)), gate=gate, rest=prior)
    one = family(loc[1].detach(), 1.0)
    kl, score = kl_divergence(q, Gated(prior, (2,))), q.log_prob(torch.zeros(2))
    torch.testing.assert_close(kl, 0.5 * kl_divergence(one, prior))
    zero = torch.zeros(())
    torch.testing.assert_close(score, 0.5 * one.log_prob(zero) + 1.5 * prior.log_prob(zero))
    for gradient in torch.autograd.grad(kl + 2 * score, (loc, gate)):
        assert torch.isfinite(gradient).all()
        assert gradient[1] != 0


def test_a_closed_gate_has_a_gradient():
    gate = torch.zeros(2, requires_grad=True)
    kl_divergence(Gated(Normal(torch.ones(2), 1.0), gate=gate), Gated(Normal(0.0, 1.0), (2,))).backward()
    assert gate.grad.tolist() == [0.5, 0.5]


WRONG_GATES = {
    "above one": (torch.tensor([0.5, 2.0]), r"\[0, 1\]; got values from 0.5 to 2"),
    "negative": (torch.tensor([-1.0, 0.5]), r"\[0, 1\]; got values from -1 to 0.5"),
    "nan": (torch.tensor([torch.nan, 0.5]), r"\[0, 1\]; got values from nan to nan"),
    "booleans": (torch.tensor([True, False]), "floating-point tensor or None; got torch.bool"),
    "a number": (0.5, "floating-point tensor or None; got float"),
}


@pytest.mark.parametrize(("gate", "expected"), WRONG_GATES.values(), ids=WRONG_GATES)
def test_wrong_gates(gate, expected):
    with pytest.raises(ValueError, match=f"Gated: argument `gate` .*{expected}"):
        Gated(Normal(torch.zeros(2), 1.0), gate=gate)


def test_a_gate_gets_the_kl_of_its_entries_as_gradient():
    gate, prior = torch.rand(3, 1, requires_grad=True), Normal(0.0, 1.0)
    q = posterior(gate)
    kl_divergence(q, Gated(prior, SHAPE)).backward()
    torch.testing.assert_close(gate.grad, kl_divergence(q.base, prior).sum(1, keepdim=True).detach())


def test_a_learned_prior_gets_gradients_too():
    q, s = posterior(), torch.tensor(0.7, requires_grad=True)
    (got,) = torch.autograd.grad(kl_divergence(q, Gated(Normal(0.0, s), SHAPE)), s)
    (expected,) = torch.autograd.grad(kl_divergence(q.base, Normal(0.0, s)).sum(), s)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("gated", [False, True])
def test_float32_sum_of_a_million_entries(gated):
    loc, scale = 0.02 * torch.randn(1000, 1000), 1e-3 * (1 + torch.rand(1000, 1000))
    gate = torch.rand(1000, 1) if gated else None
    exact = kl_divergence(Gated(Normal(loc, scale), gate=gate), Gated(Normal(0.0, 0.05), loc.shape)).item()
    single = [None if x is None else x.float() for x in (loc, scale, gate)]
    prior = Normal(torch.tensor(0.0, dtype=torch.float32), torch.tensor(0.05, dtype=torch.float32))
    kl = kl_divergence(Gated(Normal(*single[:2]), gate=single[2]), Gated(prior, loc.shape))
    assert kl.dtype == torch.float32
    assert kl.item() == pytest.approx(exact, rel=1e-6)


def test_kl_of_equal_laws_is_zero():
    q = posterior()
    assert kl_divergence(q, Gated(q.base)).item() == pytest.approx(0, abs=1e-13)


def test_other_priors_with_a_registered_kl():
    gate = torch.rand(3, 1)
    q = posterior(gate)
    for prior in (LogUniform(), LogUniform().expand(SHAPE)):
        kl = kl_divergence(q, Gated(prior, SHAPE))
        torch.testing.assert_close(kl, (gate * kl_divergence(q.base, LogUniform())).sum())
    laplace = Gated(Laplace(torch.zeros(SHAPE), torch.rand(SHAPE) + 0.5), gate=gate)
    other = Laplace(0.0, 1.0)
    torch.testing.assert_close(
        kl_divergence(laplace, Gated(other, SHAPE)), (gate * kl_divergence(laplace.base, other)).sum()
    )


def scale_mixture():
    return MixtureSameFamily(Categorical(torch.tensor([0.5, 0.5])), Normal(torch.zeros(2), torch.tensor([1.0, 0.1])))


def test_a_scale_mixture_has_no_kl_but_an_elbo():
    q, p = posterior(), Gated(scale_mixture(), SHAPE)
    with pytest.raises(NotImplementedError):
        kl_divergence(q, p)

    def model():
        pyro.sample("w", p)

    def guide():
        pyro.sample("w", q)

    # Where guide and model are the same for many particles, both estimates are E_q[log q - log p].
    draws = q.sample((20_000,))
    terms = q.log_prob(draws) - p.log_prob(draws)
    for objective in (Trace_ELBO, TraceMeanField_ELBO):
        losses = torch.tensor([objective().loss(model, guide) for _ in range(300)])
        error = (terms.var() / len(terms) + losses.var() / len(losses)).sqrt()
        assert abs((losses.mean() - terms.mean()) / error) < 4


@pytest.mark.parametrize("objective", [Trace_ELBO, TraceMeanField_ELBO])
def test_a_guide_that_falls_back_to_the_prior_pays_the_gated_kl(objective):
    prior, gate = Normal(0.0, 1.0), torch.rand(3, 1)
    q = posterior(gate, prior)
    losses = torch.tensor(
        [
            objective().loss(lambda: pyro.sample("w", Gated(prior, SHAPE)), lambda: pyro.sample("w", q))
            for _ in range(400)
        ]
    )
    expected = (gate * kl_divergence(q.base, prior)).sum()
    assert abs(losses.mean() - expected) < 4 * losses.std() / 400**0.5 + 1e-9


def test_shapes_moments_and_expand():
    law = Gated(Normal(torch.randn(3, 1), 2.0), SHAPE, torch.rand(4))
    assert (law.batch_shape, law.event_shape, law.has_rsample) == ((), SHAPE, True)
    assert law.support.event_dim == 2
    big = law.expand((5,))
    assert type(big) is Gated
    assert big.rsample((2,)).shape == (2, 5, 3, 4)
    assert big.mean.shape == big.variance.shape == (5, 3, 4)
    value = big.sample()
    torch.testing.assert_close(big.log_prob(value), law.log_prob(value))
    assert len(big.sample().unique(dim=0)) == 5
    kl = kl_divergence(big, Gated(Normal(0.0, 1.0), SHAPE))
    torch.testing.assert_close(kl, kl_divergence(law, Gated(Normal(0.0, 1.0), SHAPE)).expand(5))
    assert repr(big).startswith("Gated(Normal, batch (5,), event (3, 4), gate 0.")
    assert repr(Gated(Normal(0.0, 1.0), SHAPE)) == "Gated(Normal, event (3, 4))"
    draws = law.sample((4000,))
    assert ((draws.mean(0) - law.mean).abs() < 5 * 2.0 / 4000**0.5).all()
    assert ((draws.var(0) / 4.0 - 1).abs() < 5 * (2 / 4000) ** 0.5).all()


def test_a_scalar_event():
    law = Gated(Normal(0.5, 1.0), gate=torch.tensor(0.5))
    assert law.log_prob(torch.tensor(0.5)).item() == pytest.approx(0.5 * Normal(0.0, 1.0).log_prob(torch.tensor(0.0)))
    assert kl_divergence(law, Gated(Normal(0.0, 1.0))).item() == pytest.approx(0.0625)


def test_the_law_of_a_gated_array_reparameterises_as_its_base():
    assert not Gated(scale_mixture(), SHAPE).has_rsample
    draw = posterior().rsample()
    assert draw.requires_grad


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((Normal(torch.zeros(5), 1.0), SHAPE), r"`base` of shape \(5,\) does not broadcast to the event \(3, 4\)"),
        ((Normal(torch.zeros(2, 3, 4), 1.0), SHAPE), "`base` of shape"),
        ((Normal(torch.zeros(SHAPE), 1.0), None, torch.ones(3)), r"`gate` of shape \(3,\)"),
        ((Normal(torch.zeros(4), 1.0), None, torch.ones(3, 1)), r"`gate` of shape \(3, 1\)"),
        ((Normal(torch.zeros(SHAPE), 1.0), None, None, Normal(torch.zeros(3), 1.0)), r"`rest` of shape \(3,\)"),
        ((dist.Normal(torch.zeros(3), 1.0).to_event(1),), "`base` must be univariate"),
    ],
)
def test_what_does_not_fit_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        Gated(*arguments)


def test_divergence_of_different_shapes_is_an_error():
    with pytest.raises(ValueError, match=r"\(3, 4\) and \(4, 3\)"):
        kl_divergence(posterior(), Gated(Normal(0.0, 1.0), (4, 3)))
    with pytest.raises(ValueError, match="cannot be expanded"):
        posterior().expand((2,)).expand((3,))
    with pytest.raises(NotImplementedError):
        Gated.infer_shapes(base=())


# The KL of a whole array from one prior has a backward pass of its own.


def whole_kl(loc, scale, prior_loc, prior_scale):
    return kl_divergence(Gated(Normal(loc, scale)), Gated(Normal(prior_loc, prior_scale), loc.shape))


@pytest.fixture
def whole():
    arrays = torch.randn(SHAPE), torch.rand(SHAPE) + 0.1, torch.tensor(0.3), torch.tensor([0.7])
    return tuple(array.requires_grad_() for array in arrays)


def test_gradients_of_the_kl_to_one_prior(whole):
    assert torch.autograd.gradcheck(whole_kl, whole)
    assert torch.autograd.gradgradcheck(whole_kl, whole)
    by_torch = torch.autograd.grad(kl_divergence(Normal(*whole[:2]), Normal(*whole[2:])).sum(), whole)
    for ours, theirs in zip(torch.autograd.grad(whole_kl(*whole), whole), by_torch, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_kl_to_one_prior_under_vmap(whole):
    locs = torch.randn(5, *SHAPE)
    values = torch.func.vmap(lambda loc: whole_kl(loc, *whole[1:]))(locs)
    torch.testing.assert_close(values, torch.stack([whole_kl(loc, *whole[1:]) for loc in locs]))
    slopes = torch.func.vmap(torch.func.grad(whole_kl), in_dims=(0, None, None, None))(locs, *whole[1:])
    torch.testing.assert_close(slopes, (locs - 0.3) / 0.49)


def test_the_kl_of_a_million_weights_is_exact_in_float32():
    loc, scale = torch.randn(1000, 1000, dtype=torch.float32), torch.rand(1000, 1000, dtype=torch.float32) + 0.01
    prior = torch.tensor(0.0), torch.tensor(0.5)
    exact = whole_kl(loc.double(), scale.double(), *prior)
    assert whole_kl(loc, scale, *(each.float() for each in prior)).item() == pytest.approx(exact.item(), rel=1e-6)
