"""The log-uniform prior, and its KL from a Normal against quadrature, Dawson's function and Monte Carlo."""

import copy
import itertools
import math
import pickle

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal, init_to_value
from scipy.integrate import quad
from scipy.special import dawsn
from torch.autograd import gradcheck, gradgradcheck
from torch.distributions import Normal, kl_divergence
from torch.func import grad, jacrev, vmap

from pyro_vnd.distributions.weights import LogUniform

EULER_GAMMA = 0.57721566490153286
LIMIT = (EULER_GAMMA + math.log(2)) / 2  # of KL - log m


def kl_of(loc, scale):
    return kl_divergence(Normal(loc, scale), LogUniform())


def mean_log_abs(m):
    """E log|m + eps| by quadrature, with the singularity at zero as a weight."""

    def folded(t):
        return (math.exp(-((t - m) ** 2) / 2) + math.exp(-((t + m) ** 2) / 2)) / math.sqrt(2 * math.pi)

    below = quad(folded, 0, 1, weight="alg-loga", wvar=(0, 0), epsabs=1e-13, epsrel=1e-13)[0]
    edges = np.unique(np.clip([1, m - 9, m - 3, m, m + 3, m + 9, m + 40], 1, None))
    pairs = itertools.pairwise(edges)
    return below + sum(quad(lambda t: math.log(t) * folded(t), a, b, epsabs=1e-13, epsrel=1e-13)[0] for a, b in pairs)


def sigmoid_kl(m):
    """The fit of Molchanov et al., equation 14, with their constants."""
    log_alpha = -2 * m.abs().log()
    return 0.63576 * (1 - torch.sigmoid(1.87320 + 1.48695 * log_alpha)) + 0.5 * torch.log1p(m**2)


def test_kl_against_quadrature():
    m = torch.cat([torch.tensor([0.0, 0.01, 0.1]), torch.linspace(0.3, 12, 40), torch.logspace(1.1, 3, 10)])
    expected = torch.tensor([mean_log_abs(x) - mean_log_abs(0.0) for x in m.tolist()])
    torch.testing.assert_close(kl_of(m, 1.0), expected, rtol=1e-10, atol=1e-12)


def test_constant_is_the_mean_of_a_log_chi():
    assert mean_log_abs(0.0) == pytest.approx(-LIMIT, abs=1e-12)


def test_kl_near_zero():
    """The series m^2 / 2 - m^4 / 12: relative digits survive where the KL vanishes."""
    m = torch.logspace(-15, -3, 30)
    for dtype, rtol in ((torch.float64, 1e-11), (torch.float32, 1e-6)):
        expected = m**2 / 2 - m**4 / 12
        torch.testing.assert_close(kl_of(m.to(dtype), 1.0).double(), expected, rtol=rtol, atol=0)


def test_kl_far_away():
    """The asymptotic series, up to m = 1e20, whose square is more than float32 holds."""
    m = torch.logspace(2, 20, 60)
    for dtype, rtol in ((torch.float64, 1e-12), (torch.float32, 5e-7)):
        x = m.to(dtype)
        expected = x.double().log() + LIMIT - 1 / (2 * x.double() ** 2) - 3 / (4 * x.double() ** 4)
        torch.testing.assert_close(kl_of(x, 1.0).double(), expected, rtol=rtol, atol=0)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-9), (torch.float32, 2e-6)])
def test_gradient_is_dawsons_function(dtype, rtol):
    m = torch.cat([torch.logspace(-10, 10, 400), torch.linspace(0.01, 20, 400)]).to(dtype).requires_grad_()
    scale = torch.ones_like(m, requires_grad=True)
    kl_of(m, scale).sum().backward()
    ratio = m.detach().double()
    expected = math.sqrt(2) * torch.from_numpy(dawsn(ratio.numpy() / math.sqrt(2)))
    torch.testing.assert_close(m.grad.double(), expected, rtol=rtol, atol=0)
    torch.testing.assert_close(scale.grad.double(), -ratio * expected, rtol=rtol, atol=0)


def test_gradcheck():
    loc = torch.tensor([0.0, -1e-3, 0.3, -1.0, 4.0, -30.0, 1e3]).requires_grad_()
    scale = torch.tensor([1.0, 0.5, 2.0, 0.7, 0.9, 3.0, 1.5]).requires_grad_()
    assert gradcheck(kl_of, (loc, scale), atol=1e-7, rtol=1e-6)


EXTREMES = {
    "zero mean": (0.0, 1.0),
    "zero mean, tiny scale": (0.0, 1e-30),
    "zero mean, huge scale": (0.0, 1e30),
    "tiny mean": (1e-30, 1.0),
    "both tiny": (-1e-30, 1e-30),
    "both huge": (1e30, 1e30),
    "tiny scale": (1.0, 1e-20),
    "tiniest scale": (-1.0, 2e-38),
    "at the bound of the ratio": (1e9, 1.0),
    "past the bound": (-1.001e9, 1.0),
    "huge mean": (1e20, 1.0),
    "huge mean, tiny scale": (-1e15, 1e-15),
}


@pytest.mark.parametrize(("loc", "scale"), EXTREMES.values(), ids=EXTREMES)
def test_float32_extremes(loc, scale):
    loc, scale = (torch.tensor(x, dtype=torch.float32, requires_grad=True) for x in (loc, scale))
    kl = kl_of(loc, scale)
    kl.backward()
    m = loc.item() / scale.item()
    slope = math.sqrt(2) * dawsn(m / math.sqrt(2))
    expected = math.log(abs(m)) + LIMIT if abs(m) > 1e4 else mean_log_abs(abs(m)) + LIMIT
    assert kl.item() == pytest.approx(expected, rel=1e-6, abs=1e-10)
    assert loc.grad.item() == pytest.approx(slope / scale.item(), rel=2e-6)
    assert scale.grad.item() == pytest.approx(-m * slope / scale.item(), rel=2e-6)


def test_pruned_weight_has_no_cost_and_no_slope():
    loc, scale = torch.zeros(3, requires_grad=True), torch.tensor([1e-300, 1.0, 1e300], requires_grad=True)
    kl = kl_of(loc, scale)
    kl.sum().backward()
    assert torch.equal(kl, torch.zeros(3))
    assert torch.equal(loc.grad, torch.zeros(3))
    assert torch.equal(scale.grad, torch.zeros(3))


def test_kl_falls_with_the_noise_and_pulls_to_zero():
    loc = torch.tensor([-50.0, -3.0, -0.1, 0.1, 3.0, 50.0], requires_grad=True)
    scale = torch.full_like(loc, 0.8, requires_grad=True)
    kl = kl_of(loc, scale)
    kl.sum().backward()
    assert (kl > 0).all()
    assert torch.equal(loc.grad.sign(), loc.detach().sign())
    assert (scale.grad < 0).all()
    assert torch.equal(kl, kl.flip(0))
    grid = kl_of(torch.logspace(-8, 12, 2000), 1.0)
    assert (grid.diff() > 0).all()


@pytest.mark.parametrize("factor", [1e-12, 0.37, 1e12])
def test_kl_does_not_depend_on_the_scale(factor):
    loc, scale = 5 * torch.randn(1000), torch.rand(1000) + 0.01
    torch.testing.assert_close(kl_of(factor * loc, factor * scale), kl_of(loc, scale), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("m", [0.0, 0.4, -2.0, 5.8, 40.0])
def test_kl_is_the_mean_log_ratio_of_draws(m):
    """The constant of `log_prob` is that of the KL: a million draws have the same mean, for any scale."""
    q, prior = Normal(torch.tensor(3 * m), torch.tensor(3.0)), LogUniform()
    value = q.sample((1_000_000,))
    log_ratio = q.log_prob(value) - prior.log_prob(value)
    standard_error = log_ratio.std() / 1000
    assert ((log_ratio.mean() - kl_divergence(q, prior)) / standard_error).abs() < 4
    if m == 5.8:  # where the usual approximation is worst, so many draws reject it
        assert ((log_ratio.mean() - sigmoid_kl(torch.tensor(m))) / standard_error).abs() > 6


def test_the_usual_approximation_is_off_by_a_hundredth_of_a_nat():
    m = torch.logspace(-3, 3, 2000)
    error = sigmoid_kl(m) - kl_of(m, 1.0)
    worst = error.abs().argmax()
    assert error[worst].item() == pytest.approx(0.00937, abs=1e-5)
    assert m[worst].item() == pytest.approx(5.8, abs=0.05)
    assert (error.abs() / kl_of(m, 1.0)).max().item() == pytest.approx(0.034, abs=1e-3)


def test_float32_against_float64_on_a_net_of_weights():
    loc, scale = torch.randn(100_000).exp() * torch.randn(100_000), (3 * torch.randn(100_000)).exp()
    results = []
    for dtype in (torch.float32, torch.float64):
        leaves = [x.float().to(dtype).requires_grad_() for x in (loc, scale)]
        kl = kl_of(*leaves)
        results.append([x.double() for x in (kl.detach(), *torch.autograd.grad(kl.sum(), leaves))])
    torch.testing.assert_close(*results, rtol=3e-6, atol=0)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_is_cast_up(half):
    loc = torch.tensor([0.0, 0.5, 300.0], dtype=half, requires_grad=True)
    scale = torch.tensor([0.1, 0.5, 0.01], dtype=half)
    kl = kl_of(loc, scale)
    assert kl.dtype == torch.float32
    torch.testing.assert_close(kl, kl_of(loc.float(), scale.float()))
    kl.sum().backward()
    assert torch.isfinite(loc.grad).all()


@pytest.mark.parametrize(
    ("q_shape", "p_shape"), [((), ()), ((3,), ()), ((), (3,)), ((2, 1), (3,)), ((2, 3), (2, 3)), ((0,), ())]
)
def test_kl_has_one_value_an_element(q_shape, p_shape):
    loc, scale = torch.randn(q_shape), torch.rand(q_shape) + 0.1
    q, prior = dist.Normal(loc, scale), LogUniform(p_shape)
    shape = torch.broadcast_shapes(q_shape, p_shape)
    kl = kl_divergence(q, prior)
    assert torch.equal(kl, kl_of(loc, scale).expand(shape))
    assert torch.equal(kl_divergence(q.expand(shape), prior.expand(shape)), kl)
    if shape:
        event = kl_divergence(q.expand(shape).to_event(1), prior.expand(shape).to_event(1))
        torch.testing.assert_close(event, kl.sum(-1))


def test_shared_scale():
    """One learned scale for many weights: its gradient is the sum."""
    loc, scale = torch.randn(5), torch.tensor(0.5, requires_grad=True)
    kl_of(loc, scale).sum().backward()
    each = torch.full((5,), 0.5, requires_grad=True)
    kl_of(loc, each).sum().backward()
    torch.testing.assert_close(scale.grad, each.grad.sum())


@pytest.mark.parametrize("in_dims", [(0, 0), (0, None), (None, 0), (1, 0)], ids=str)
def test_vmap_equals_a_loop(in_dims):
    loc = torch.randn((4, 6) if in_dims[0] == 0 else (6, 4) if in_dims[0] == 1 else (6,))
    scale = torch.rand((4, 6) if in_dims[1] == 0 else (6,)) + 0.1
    weight = torch.randn(6)

    def divergence(loc, scale):
        return (weight * kl_divergence(Normal(loc, scale, validate_args=False), LogUniform())).sum()

    values = vmap(divergence, in_dims)(loc, scale)
    gradients = vmap(grad(divergence, argnums=(0, 1)), in_dims)(loc, scale)
    for row in range(4):
        leaves = [x if d is None else x.select(d, row) for x, d in zip((loc, scale), in_dims, strict=True)]
        leaves = [x.clone().requires_grad_() for x in leaves]
        value = divergence(*leaves)
        torch.testing.assert_close(values[row], value)
        torch.testing.assert_close(tuple(g[row] for g in gradients), torch.autograd.grad(value, leaves))


def test_jacobian():
    loc, scale = torch.randn(5), torch.rand(5) + 0.1
    jacobian = jacrev(lambda x: kl_divergence(Normal(x, scale, validate_args=False), LogUniform()))(loc)
    leaf = loc.clone().requires_grad_()
    torch.testing.assert_close(jacobian, torch.autograd.grad(kl_of(leaf, scale).sum(), leaf)[0].diag())


def test_second_derivative():
    """D'(x) = 1 - 2 x D(x), so that d^2 KL / dm^2 = 1 - m dKL/dm."""
    m = torch.linspace(-6, 6, 50, requires_grad=True)
    (first,) = torch.autograd.grad(kl_of(m, 1.0).sum(), m, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), m)
    torch.testing.assert_close(second, (1 - m * first).detach(), rtol=0, atol=1e-8)
    loc = torch.tensor([0.0, -0.3, 2.0, 1e10]).requires_grad_()
    scale = torch.tensor([1.0, 0.5, 0.4, 0.1]).requires_grad_()
    assert gradgradcheck(kl_of, (loc, scale))


def test_log_prob_is_scale_free():
    prior, value = LogUniform(), torch.tensor([1e-3, -0.5, 2.0, -1e6], requires_grad=True)
    log_prob = prior.log_prob(value)
    torch.testing.assert_close(log_prob, -value.abs().log() - (1 + EULER_GAMMA + math.log(4 * math.pi)) / 2)
    # The mass of an interval is that of the interval times any factor: p(aw) |a| = p(w).
    torch.testing.assert_close(prior.log_prob(-7 * value) + math.log(7), log_prob)
    log_prob.sum().backward()
    torch.testing.assert_close(value.grad, -1 / value.detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_prob_is_finite_at_zero(dtype):
    value = torch.tensor([0.0, -0.0, torch.finfo(dtype).tiny], dtype=dtype, requires_grad=True)
    log_prob = LogUniform().log_prob(value)
    log_prob.sum().backward()
    assert log_prob.dtype == dtype
    assert torch.isfinite(log_prob).all()
    assert torch.equal(log_prob, log_prob[2].expand(3))
    assert torch.equal(value.grad[:2], torch.zeros(2, dtype=dtype))


def test_shapes_and_expand():
    prior = LogUniform([3])
    assert (prior.batch_shape, prior.event_shape, prior.has_rsample) == ((3,), (), False)
    assert LogUniform.infer_shapes() == ((), ())
    big = prior.expand((2, 3))
    assert type(big) is LogUniform
    assert big.batch_shape == prior.expand_by([2]).batch_shape == (2, 3)
    assert big.log_prob(torch.ones(())).shape == (2, 3)
    assert big.log_prob(torch.ones(4, 1, 3)).shape == (4, 2, 3)
    assert "(2, 3)" in repr(big)
    for other in (copy.deepcopy(big), pickle.loads(pickle.dumps(big))):
        assert type(other) is LogUniform
        assert other.batch_shape == (2, 3)


@pytest.mark.parametrize("shape", [3, (-1,), ("a",), None], ids=repr)
def test_bad_batch_shape(shape):
    with pytest.raises(ValueError, match=r"argument `batch_shape` must be a sequence of sizes >= 0; got"):
        LogUniform(shape)


def test_bad_expand_and_values():
    prior = LogUniform([3], validate_args=True)
    with pytest.raises(ValueError, match=r"\(3,\) cannot be expanded to \(2,\)"):
        prior.expand((2,))
    for law in (prior, prior.expand((2, 3))):
        with pytest.raises(ValueError, match="within the support"):
            law.log_prob(torch.tensor([1.0, torch.nan, 1.0]))
    assert LogUniform([1], validate_args=False).log_prob(torch.tensor([torch.nan])).isnan().all()


@pytest.mark.parametrize("draw", ["sample", "rsample", "__call__"])
def test_sampling_raises_with_advice(draw):
    with pytest.raises(NotImplementedError, match=r"improper prior cannot be sampled.*init_to_value"):
        getattr(LogUniform([3]), draw)()


X = torch.linspace(-1, 1, 8, dtype=torch.float64).reshape(4, 2)
Y = torch.tensor([0.3, -0.2, 0.9, 0.4], dtype=torch.float64)


def model():
    with pyro.plate("inputs", 2):
        weight = pyro.sample("weight", LogUniform())
    with pyro.plate("data", 4):
        pyro.sample("y", dist.Normal(X @ weight, 0.5), obs=Y)


def guide():
    loc = pyro.param("loc", torch.tensor([0.7, -0.2], dtype=torch.float64))
    scale = pyro.param("scale", torch.tensor([0.3, 0.4], dtype=torch.float64), constraint=dist.constraints.positive)
    with pyro.plate("inputs", 2):
        pyro.sample("weight", dist.Normal(loc, scale))


def exact_elbo():
    """The expected log-likelihood of a linear model, less the KL by quadrature."""
    loc, scale = pyro.param("loc").detach(), pyro.param("scale").detach()
    variance = (X**2 @ scale**2) / 0.5**2
    log_likelihood = (Normal(X @ loc, 0.5).log_prob(Y) - variance / 2).sum()
    return log_likelihood - sum(mean_log_abs(m) + LIMIT for m in (loc / scale).abs().tolist())


def test_mean_field_elbo_uses_the_exact_kl():
    guide()
    # One draw, twice: what differs between them is the log-likelihood alone, so the KL is not a Monte Carlo estimate.
    torch.manual_seed(1)
    elbo = -TraceMeanField_ELBO().loss(model, guide)
    torch.manual_seed(1)
    weight = Normal(pyro.param("loc"), pyro.param("scale")).sample()
    kl = kl_of(pyro.param("loc"), pyro.param("scale")).sum()
    assert elbo == pytest.approx((Normal(X @ weight, 0.5).log_prob(Y).sum() - kl).item(), rel=1e-12)


@pytest.mark.parametrize("objective", [Trace_ELBO, TraceMeanField_ELBO])
def test_objectives_agree_on_the_elbo(objective):
    guide()
    estimate = objective(num_particles=50_000, vectorize_particles=True, max_plate_nesting=1)
    draws = torch.tensor([-objective().loss(model, guide) for _ in range(100)])  # for the standard deviation of one
    value = -estimate.loss(vectorised_model, guide)
    z_score = (value - exact_elbo()) / (draws.std() / 50_000**0.5)
    assert z_score.abs() < 4


def vectorised_model():
    with pyro.plate("inputs", 2):
        weight = pyro.sample("weight", LogUniform())
    with pyro.plate("data", 4):
        pyro.sample("y", dist.Normal((weight.unsqueeze(-2) * X).sum(-1).reshape(-1, 4).squeeze(0), 0.5), obs=Y)


def test_autoguide_with_a_starting_point():
    start = init_to_value(values={"weight": torch.tensor([0.5, 0.5], dtype=torch.float64)})
    auto = AutoNormal(model, init_loc_fn=start)
    svi = SVI(model, auto, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
    losses = [svi.step() for _ in range(200)]
    assert sum(losses[-50:]) < sum(losses[:50])


def test_irrelevant_weights_are_pruned():
    """A weight without data to hold it drifts to alpha = inf, one with data does not: sparse variational dropout."""
    torch.manual_seed(0)
    x = torch.randn(200, 2)
    y = 2 * x[:, 0] + 0.3 * torch.randn(200)
    loc = torch.tensor([1.0, 1.0], requires_grad=True)
    log_scale = torch.tensor([-2.0, -2.0], requires_grad=True)
    optimiser = torch.optim.Adam([loc, log_scale], 0.05)
    for _ in range(400):
        optimiser.zero_grad()
        scale = log_scale.exp()
        misfit = ((y - x @ loc) ** 2 + x**2 @ scale**2).sum() / (2 * 0.3**2)
        (misfit + kl_of(loc, scale).sum()).backward()
        optimiser.step()
    log_alpha = 2 * log_scale.detach() - 2 * loc.detach().abs().log()
    assert log_alpha[0] < -5
    assert log_alpha[1] > 3


@pytest.mark.gpu
def test_gpu():
    loc, scale = torch.randn(1000), torch.rand(1000) + 0.01
    leaves = [x.cuda().requires_grad_() for x in (loc, scale)]
    kl = kl_of(*leaves)
    kl.sum().backward()
    torch.testing.assert_close(kl.cpu(), kl_of(loc, scale))
    assert all(torch.isfinite(x.grad).all() for x in leaves)
