"""ELBOs of nested nets against sums over every length, with the weights integrated by hand."""

import math
from contextlib import nullcontext

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import nn
from torch.distributions import Normal, StudentT, kl_divergence

from pyro_vnd.distributions import OrderedMask
from pyro_vnd.infer import LocalReparameterization, NestedELBO
from pyro_vnd.nn import NestedClassifier, NestedLayer, NestedNet, Width, nest

OBJECTIVES = [Trace_ELBO, TraceMeanField_ELBO, NestedELBO]
N, K = 4, 3


def make(mask_per, gated=None):
    """y = w (z * tanh(a x)) + b with point estimates a, so that all expectations over w and b are known."""
    width = Width("hidden", K, prior=OrderedMask.geometric(0.4, K))
    first = NestedLayer(nn.Linear(2, K), outputs=width, prior=None)
    last = NestedLayer(nn.Linear(K, 1), inputs=width, prior=Normal(0.2, 1.5), init_scale=0.3)
    net = NestedNet(nn.Sequential(first, nn.Tanh(), last), mask_per=mask_per, gated=gated)
    nn.init.normal_(width.logits)

    def model(x, y):
        rows = pyro.plate("data", len(x), dim=-1)
        mean = net(x, plate=rows).squeeze(-1)
        with rows:
            pyro.sample("y", dist.Normal(mean, 0.7), obs=y)

    return net, model


def log_likelihoods(net, x, y) -> torch.Tensor:
    """E_q log N(y_n; f(x_n), .7^2) for each row and length, shape (N, K)."""
    first, last = (net.net[i] for i in (0, 2))
    hidden = torch.tanh(x @ first.plain.weight.T + first.plain.bias)
    weight, bias = last.law("weight", "posterior").base, last.law("bias", "posterior").base
    table = torch.zeros(len(x), K)
    for n in range(len(x)):
        for length in range(1, K + 1):
            mean, variance = bias.mean[0], bias.variance[0]
            for k in range(length):
                mean = mean + weight.mean[0, k] * hidden[n, k]
                variance = variance + weight.variance[0, k] * hidden[n, k] ** 2
            table[n, length - 1] = Normal(mean, 0.7).log_prob(y[n]) - variance / (2 * 0.7**2)
    return table.detach()


def weight_costs(net) -> torch.Tensor:
    """KL of the weights of each hidden unit, shape (K,), after which comes that of the bias."""
    last = net.net[2]
    costs = [kl_divergence(last.law(name, "posterior").base, Normal(0.2, 1.5)).flatten() for name in ("weight", "bias")]
    return torch.cat(costs).detach()


def elbo_by_hand(net, x, y, rows_at=None) -> float:
    """Sum over lengths; `rows_at` has the lengths of rows that are cut, or 0."""
    q, p = net.widths["hidden"].law, net.widths["hidden"].prior
    table, costs = log_likelihoods(net, x, y), weight_costs(net)
    kl_of_length = kl_divergence(q, p)
    rows_at = [0] * N if rows_at is None else rows_at
    total = 0.0
    for n, length in enumerate(rows_at):
        total += (q.probs * table[n]).sum() if length == 0 else table[n, length - 1]
    if net.mask_per == "example":
        return total - costs.sum() - rows_at.count(0) * kl_of_length
    paid = 0.0
    for length in range(1, K + 1):
        probability = q.probs[length - 1] if rows_at[0] == 0 else float(length == rows_at[0])
        paid += probability * (costs[:length].sum() + costs[K])
    return total - paid - (kl_of_length if rows_at[0] == 0 else 0.0)


def assert_equal_on_average(losses, expected):
    losses = torch.tensor(losses)
    z = (losses.mean() + expected) / (losses.std() / math.sqrt(len(losses)))
    assert abs(z) < 4, f"{losses.mean()} and {-expected}"
    return z


@pytest.fixture
def data():
    return torch.randn(N, 2), torch.randn(N)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("mask_per", ["example", "batch"])
def test_elbo_is_the_sum_over_lengths(objective, mask_per, data):
    net, model = make(mask_per)
    losses = [objective().loss(model, net.guide, *data) for _ in range(200)]
    assert_equal_on_average(losses, elbo_by_hand(net, *data))


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("mask_per", ["example", "batch"])
@pytest.mark.parametrize("sliced", [False, True])
def test_elbo_of_a_cut(objective, mask_per, sliced, data):
    net, model = make(mask_per)
    with net.cut(2, sliced=sliced):
        losses = [objective().loss(model, net.guide, *data) for _ in range(120)]
    expected = elbo_by_hand(net, *data, rows_at=[2] * N)
    if mask_per == "example":  # weights that are not there cost nothing
        expected += weight_costs(net)[2]
    assert_equal_on_average(losses, expected)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_only_free_rows_pay_for_their_lengths(objective, data):
    net, model = make("example")
    with net.cut(torch.tensor([0.0, 1 / 3, 0.0, 1.0])):
        losses = [objective().loss(model, net.guide, *data) for _ in range(200)]
    expected = elbo_by_hand(net, *data, rows_at=[0, 1, 0, 3])
    assert_equal_on_average(losses, expected)
    kl = kl_divergence(net.widths["hidden"].law, net.widths["hidden"].prior).item()
    elbo = NestedELBO()
    for fractions, free in (([0.0, 0.5, 0.0, 1.0], 2), ([0.5] * 4, 0), ([0.0] * 4, 4)):
        with net.cut(torch.tensor(fractions)):
            elbo.loss(model, net.guide, *data)
        assert elbo.kl["hidden.mask"].item() == pytest.approx(free * kl, abs=1e-12)


@pytest.mark.parametrize("lengths", [[1, 1, 2, 3], [0, 0, 0, 0], [0, 0, 3, 1]])
def test_a_gate_by_example_is_the_share_of_rows_that_keep_a_unit(lengths, data):
    net, model = make("example", gated=True)
    elbo = NestedELBO()
    with net.cut(torch.tensor(lengths) / K):
        elbo.loss(model, net.guide, *data)
    q = net.widths["hidden"].law.probs
    shares = [
        sum(q[k:].sum() if length == 0 else float(length > k) for length in lengths) / len(lengths) for k in range(K)
    ]
    costs = weight_costs(net)
    assert elbo.kl["2.weight"].item() == pytest.approx(
        sum(s * c for s, c in zip(shares, costs[:K], strict=True)).item()
    )
    assert elbo.kl["2.bias"].item() == pytest.approx(costs[K].item())


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_one_fraction_for_the_batch(objective, data):
    net, model = make("batch")
    with net.cut(torch.tensor(2 / 3)):
        losses = [objective().loss(model, net.guide, *data) for _ in range(120)]
    assert_equal_on_average(losses, elbo_by_hand(net, *data, rows_at=[2] * N))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_fraction_of_zero_is_no_cut(objective, data):
    losses = []
    net, model = make("batch")
    for cut in (net.cut(torch.tensor(0.0)), nullcontext()):
        torch.manual_seed(0)
        with cut:
            losses.append([objective().loss(model, net.guide, *data) for _ in range(5)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


def test_sliced_draws_of_exact_masks_have_the_same_elbo(data):
    net, model = make("batch")
    with net.cut({}, sliced=True):
        losses = [Trace_ELBO().loss(model, net.guide, *data) for _ in range(300)]
    assert_equal_on_average(losses, elbo_by_hand(net, *data))


def test_a_wrong_gate_would_be_noticed(data):
    net, model = make("batch")
    losses = [TraceMeanField_ELBO().loss(model, net.guide, *data) for _ in range(200)]
    right = elbo_by_hand(net, *data)
    all_paid = right - (weight_costs(net)[:K] * (1 - net.widths["hidden"].law.keep_probs)).sum()
    with pytest.raises(AssertionError):
        assert_equal_on_average(losses, all_paid)


@pytest.mark.parametrize("mask_per", ["example", "batch"])
def test_kl_parts_are_exact_in_one_evaluation(mask_per, data):
    net, model = make(mask_per)
    elbo, costs, keep = NestedELBO(), weight_costs(net), net.widths["hidden"].law.keep_probs
    elbo.loss(model, net.guide, *data)
    gate = keep if mask_per == "batch" else torch.ones(K)
    length = kl_divergence(net.widths["hidden"].law, net.widths["hidden"].prior) * (N if mask_per == "example" else 1)
    torch.testing.assert_close(elbo.kl["hidden.mask"], length)
    torch.testing.assert_close(elbo.kl["2.weight"], (gate * costs[:K]).sum())
    torch.testing.assert_close(elbo.kl["2.bias"], costs[K])


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("mask_per", ["example", "batch"])
@pytest.mark.parametrize("noise", ["logistic", "gumbel"])
def test_every_parameter_gets_a_gradient(objective, mask_per, noise):
    plain = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 6), nn.Tanh(), nn.Linear(6, 2)
    )
    x, y = torch.randn(20, 1, 6, 6), torch.randn(20, 2)
    net = nest(plain, x[:2], mask_per=mask_per, noise=noise)

    def model(x, y):
        rows = pyro.plate("data", len(x), dim=-1)
        mean = net(x, plate=rows)
        with rows:
            pyro.sample("y", dist.Normal(mean, 1.0).to_event(1), obs=y)

    for _ in range(3):  # one draw of a mask may leave units out
        objective().differentiable_loss(model, net.guide, x, y).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name


def test_priors_without_a_kl_have_an_elbo_too(data):
    net, model = make("example")
    net.net[2] = last = NestedLayer(nn.Linear(K, 1), inputs=net.widths["hidden"], prior=StudentT(3.0))
    for objective in OBJECTIVES:
        loss = objective().differentiable_loss(model, net.guide, *data)
        loss.backward()
        assert torch.isfinite(loss)
        assert (last.log_scales["weight"].grad != 0).all()


@pytest.mark.parametrize("local_reparam", [False, True])
@pytest.mark.parametrize("mask_per", ["example", "batch"])
def test_a_prior_of_numbers_costs_what_a_law_with_these_numbers_costs(mask_per, local_reparam):
    """The first is computed beside the draws of the weights, the second entry by entry: value and all gradients."""
    x, y, found = torch.randn(5, 4), torch.randint(3, (5,)), []
    for prior in (0.7, Normal(0.0, 0.7)):
        torch.manual_seed(3)
        plain = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
        net = nest(plain, x, num_blocks=3, prior=prior, mask_per=mask_per)
        with LocalReparameterization() if local_reparam else nullcontext():
            torch.manual_seed(4)
            loss = NestedELBO().differentiable_loss(NestedClassifier(net), net.guide, x, y)
        found.append([loss.detach(), *torch.autograd.grad(loss, list(net.parameters()))])
    assert all(gradient.abs().sum() > 0 for gradient in found[0][1:])
    torch.testing.assert_close(found[0], found[1])
