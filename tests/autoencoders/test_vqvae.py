"""The ordered vector-quantised autoencoder: rate, prefixes, and the plain one as a special case."""

import math
import pickle
from itertools import pairwise

import pyro
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from scipy import stats
from torch import nn
from torch.distributions import kl_divergence

from pyro_vnd.autoencoders import OrderedVQVAE, full_length, mlp_bodies
from pyro_vnd.autoencoders.quantiser import TokenPrior
from pyro_vnd.distributions import OrderedMask
from pyro_vnd.infer import KLWeights, LengthCollapseWarning, MaskSchedule, NestedELBO, fit, module_local_params

T, D, V, N = 4, 3, 10, 20
collapses = pytest.mark.filterwarnings(f"ignore::{LengthCollapseWarning.__module__}.LengthCollapseWarning")
both = pytest.mark.parametrize("ordered", ["tokens", "dims"])


def small(ordered="tokens", **kwargs):
    torch.manual_seed(0)
    model = OrderedVQVAE((1, 8, 8), T, D, V, ordered=ordered, bodies=mlp_bodies((1, 8, 8), (32,)), **kwargs).double()
    with torch.no_grad():
        model.quantiser.codebook.mul_(0.3)
    return model


@pytest.fixture
def x(images):
    return images[:N]


# The objective.


def with_own_lengths(model):
    with torch.no_grad():
        model.encoder.heads.weight[T * D :].normal_()
    return model.eval()


@pytest.mark.parametrize("elbo", [NestedELBO, TraceMeanField_ELBO, Trace_ELBO])
def test_rate_is_the_expected_length_times_log_v(elbo, x):
    model, objective = with_own_lengths(small()), elbo()
    with module_local_params(model, model.guide):
        losses, rates = [], []
        for _ in range(100):
            losses.append(objective.loss(model, model.guide, x))
            rates.append(objective.kl["code"].item() if elbo is NestedELBO else math.nan)
    q = model.encode(x)
    rate = (q.mean_length.sum() * math.log(V)).item()
    if elbo is NestedELBO:
        rates = torch.tensor(rates)
        error = rates.std() / 10
        assert abs(rates.mean() - rate) < 3.5 * error
        assert abs(rates.mean() - rate * math.log2(V) / math.log(V)) > 3.5 * error  # bits for nats
        assert objective.kl["mask"].item() == pytest.approx(kl_divergence(q, model.prior()).sum().item())
    expected = rate + kl_divergence(q, model.prior()).sum().item()
    for k in range(1, T + 1):
        length = torch.full((N,), k)
        law = model.likelihood_given(model.embed(x, length), model._prefix(length))
        expected -= (q.probs[:, k - 1] * law.log_prob(x)).sum().item()
    losses = torch.tensor(losses)
    error = losses.std() / 10
    assert abs(losses.mean() - expected) < 3.5 * error
    assert abs(losses.mean() - expected + rate) > 3.5 * error


@both
def test_elbo_is_that_of_all_lengths_by_their_probability(ordered, x):
    torch.manual_seed(1)
    model = with_own_lengths(small(ordered))
    K, draws = model.num_latents, 2000
    q = model.encode(x)
    by_length = [model.elbo(x, k) for k in range(1, K + 1)]
    for k, terms in enumerate(by_length, 1):
        tokens = k if ordered == "tokens" else T
        assert torch.allclose(terms.kl_latents, torch.full((N,), tokens * math.log(V)).double())
        assert (terms.kl_lengths == 0).all()  # of log p(x | L)
        law = model.likelihood_given(model.embed(x, k), model._prefix(torch.full((N,), k)))
        torch.testing.assert_close(terms.log_likelihood, law.log_prob(x))
    terms = model.elbo(x, None, draws)
    torch.testing.assert_close(terms.kl_lengths, kl_divergence(q, model.prior()))
    torch.testing.assert_close(terms.kl_latents, (q.probs * torch.stack([e.kl_latents for e in by_length], -1)).sum(-1))
    likelihoods = torch.stack([each.log_likelihood for each in by_length], -1)
    mean = (q.probs * likelihoods).sum(-1)
    error = ((q.probs * likelihoods.square()).sum(-1) - mean.square()).clamp_min(0).sum().sqrt() / draws**0.5
    assert abs((terms.log_likelihood - mean).sum()) < 4 * error
    assert abs((terms.log_likelihood - likelihoods.mean(-1)).sum()) > 4 * error  # all lengths alike
    torch.testing.assert_close(model.elbo(x, torch.arange(N) % K + 1).elbo[K], by_length[0].elbo[K])


def test_rate_of_ordered_dimensions_is_that_of_all_tokens(x):
    model, objective = small("dims"), NestedELBO()
    with module_local_params(model, model.guide):
        objective.loss(model, model.guide, x)
    assert objective.kl["code"].item() == pytest.approx(N * T * math.log(V))
    assert model.bits(1) == model.bits() == pytest.approx(T * math.log2(V))
    assert small().bits(2) == pytest.approx(2 * math.log2(V))


@both
def test_at_full_width_it_is_a_plain_vqvae(ordered, x):
    num_units = T if ordered == "tokens" else D
    model = small(ordered, prior_lengths=full_length(num_units), posterior_lengths="prior", commitment=0.7).eval()
    guide = model.guide.eval()
    with module_local_params(model, guide):
        loss = NestedELBO().differentiable_loss(model, guide, x)
    loss.backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    z = model.encoder.heads(model.encoder.body(x))
    z = z.reshape(N, T, D) if ordered == "tokens" else z.reshape(N, D, T).transpose(1, 2)
    e = model.quantiser.codebook
    e = e[torch.cdist(z, e).argmin(-1)]
    penalty = (z.detach() - e).square().sum() + 0.7 * (z - e.detach()).square().sum()
    straight = e.detach() + (z - z.detach())
    straight = straight if ordered == "tokens" else straight.transpose(1, 2)
    outputs = model.decoder.body(model.decoder.entry(straight.flatten(1)))
    likelihood = torch.distributions.Normal(outputs, model.likelihood.log_scale.exp()).log_prob(x).sum()
    plain = -likelihood + N * T * math.log(V)  # the value of the penalty is left out, its gradient is not
    torch.testing.assert_close(loss, plain, rtol=1e-12, atol=0)
    (plain + penalty).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(ours[name], p.grad, rtol=1e-9, atol=1e-11)


@collapses
def test_mini_batches_and_weights_scale_the_rate(x):
    def still(parameters, lr):
        return torch.optim.SGD(parameters, lr=0.0)

    for batch_size in (5, N):
        model = small(posterior_lengths="prior", prior_lengths=full_length(T))
        arguments = {"batch_size": batch_size, "num_epochs": 1, "optimizer": still, "progress": False}
        result = fit(model, model.guide, x, weights=KLWeights(local=0.5), **arguments)
        assert result.kl_latents == pytest.approx([T * math.log(V)])
        assert result.kl == pytest.approx([0.5 * T * math.log(V)])


def test_a_rate_that_does_not_pay_shortens_codes(x):
    lengths = []
    for weight in (0.0, 20.0):
        model = small(posterior_lengths="global")
        fit(model, model.guide, x, num_epochs=150, lr=0.02, weights=KLWeights(local=weight), progress=False)
        lengths.append(model.encode(x).mean_length.mean().item())
    assert lengths[1] < 1.3 < 1.6 < lengths[0]


def test_svi_trains_it(x):
    pyro.clear_param_store()
    model = small(posterior_lengths="prior")
    svi = SVI(model, model.guide, pyro.optim.Adam({"lr": 0.003}), TraceMeanField_ELBO())
    losses = [svi.step(x) for _ in range(60)]
    assert sum(losses[-5:]) < sum(losses[:5]) - 5 * 10 * N
    pyro.clear_param_store()


# Codes.


@both
def test_a_prefix_ignores_the_tail(ordered, x):
    model = small(ordered)
    short, longer = model.reconstruct(x, 2), model.reconstruct(x, 3)
    size = model.blocks.size
    with torch.no_grad():
        model.encoder.heads.weight[2 * size : T * D] += 1.0
        model.decoder.entry.weight[:, 2 * size :] += 1.0
        if ordered == "dims":
            model.quantiser.codebook[:, 2:] += 1.0
    torch.testing.assert_close(model.reconstruct(x, 2), short)
    assert not torch.allclose(model.reconstruct(x, 3), longer)


@both
@pytest.mark.parametrize("tail", ["zeros", "filler", "mask", "completion"])
def test_narrowed_nets_make_the_same_tokens_and_images(ordered, tail, x):
    model = small(ordered, tail=tail)
    with torch.no_grad():
        for name, parameter in model.decoder.named_parameters():
            if name.startswith(("filler", "shift", "completion")):
                parameter.normal_()
    encoder, decoder = pickle.loads(pickle.dumps(model.narrow(2)))
    tokens = encoder(x)
    assert torch.equal(tokens, model.tokens(x, 2))
    assert tokens.shape == (N, 2 if ordered == "tokens" else T)
    torch.testing.assert_close(decoder(tokens), model.reconstruct(x, 2))
    assert not any("models" in type(part).__module__ for net in (encoder, decoder) for part in net.modules())
    model.encoder.heads.weight.data.zero_()
    assert torch.equal(tokens, encoder(x))


@both
def test_embedded_codes_decode_to_reconstructions(ordered, x):
    model = small(ordered)
    lengths = torch.arange(N) % model.num_latents + 1
    codes = model.embed(x, lengths)
    assert codes.shape == (N, T * D)
    kept = (codes.unflatten(-1, (model.num_latents, -1)) != 0).any(-1).sum(-1)
    assert torch.equal(kept, lengths)
    torch.testing.assert_close(model.decode(codes), model.reconstruct(x, lengths))
    torch.testing.assert_close(model.encode(x, lengths).mean_length, lengths.double())
    vectors = model.blocks.vectors(model.embed(x))
    assert torch.equal(vectors, model.quantiser.codebook[model.tokens(x)])
    assert torch.equal(model.blocks.flat(vectors), model.embed(x))


@both
def test_samples_draw_tokens_of_the_prior(ordered, x):
    model = small(ordered)
    code = pyro.poutine.trace(model).get_trace(x.expand(N, 1, 8, 8)).nodes["code"]["value"]
    vectors = model.blocks.vectors(code)
    full = code.unflatten(-1, (model.num_latents, -1))[:, -1].abs().sum(-1) > 0
    distances = torch.cdist(vectors[full].flatten(0, 1), model.quantiser.codebook)
    assert full.any()
    assert (distances.min(-1).values < 1e-6).all()
    assert model.sample(6, 2).shape == (6, 1, 8, 8)
    uniform = model.token_probs.clone()
    model.count_tokens(x)
    assert (uniform == 1 / V).all()
    counts = torch.stack([torch.bincount(model.tokens(x)[:, t], minlength=V) for t in range(T)])
    torch.testing.assert_close(model.token_probs, (counts + 1) / (N + V))
    assert model.sample(6).isfinite().all()


@both
def test_drawn_tokens_follow_their_probabilities(ordered):
    model, draws = small(ordered), 5_000
    probs = torch.rand(T, V) + 0.5
    probs /= probs.sum(-1, keepdim=True)
    mask = torch.ones(draws, model.num_latents)
    vectors = model.blocks.vectors(TokenPrior(model.quantiser.codebook, mask, model.blocks, probs).sample())
    tokens = model.quantiser.nearest(vectors, torch.ones_like(vectors))
    counts = torch.stack([torch.bincount(tokens[:, t], minlength=V) for t in range(T)])
    # A chi-square test over all places; at a uniform law it must reject.
    assert stats.chisquare(counts.flatten(), (draws * probs).flatten(), ddof=T - 1).pvalue > 1e-3
    assert stats.chisquare(counts.flatten(), torch.full((T * V,), draws / V), ddof=T - 1).pvalue < 1e-6


# Training.


def test_orders_tokens_of_real_digits(images):
    torch.manual_seed(0)
    model = OrderedVQVAE((1, 8, 8), 5, 4, 32, bodies=mlp_bodies((1, 8, 8), (64,)))
    masks = MaskSchedule(0.2, 0.5, 0.3)
    arguments = {"num_epochs": 25, "batch_size": 64, "lr": 0.005, "progress": False}
    result = fit(model, model.guide, images, schedule=masks, weights=KLWeights(local=0.1), **arguments)
    errors = [(model.reconstruct(images, k) - images).square().mean().item() for k in range(1, 6)]
    assert errors[0] < images.var(0).mean()
    assert all(longer < shorter for shorter, longer in pairwise(errors))
    assert errors[-1] < 0.6 * errors[0]
    assert len(model.tokens(images).unique()) > 16
    assert result.elbo[-1] > result.elbo[0] + 10
    assert result.lengths["mask"].mean == pytest.approx(model.encode(images[:64]).mean_length.mean().item(), abs=1.0)


# Bad input.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ordered": "vectors"}, r"`ordered` must be one of \('tokens', 'dims'\); got 'vectors'"),
        ({"commitment": -1.0}, "`commitment` must be finite and >= 0; got -1.0"),
        ({"num_tokens": 0}, "`num_tokens` must be an integer >= 1; got 0"),
        ({"codebook_size": 0}, "`codebook_size` must be an integer >= 1; got 0"),
        ({"prior_lengths": OrderedMask.uniform(3)}, "must be an OrderedMask over 8 units"),
        ({"tail": "none"}, "`tail` must be one of"),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        OrderedVQVAE((1, 8, 8), **arguments)


@pytest.mark.parametrize("length", [0, T + 1, 1.5])
@pytest.mark.parametrize("method", ["encode", "embed", "reconstruct", "tokens"])
def test_lengths_and_images_are_checked(length, method, x):
    model = small()
    with pytest.raises(ValueError, match=f"`length` must be integers from 1 to {T}; got {length}"):
        getattr(model, method)(x, length)
    with pytest.raises(ValueError, match="`x` must be images"):
        getattr(model, method)(x[:, 0], 1)
    with pytest.raises(ValueError, match="`x` must be images"):
        model.guide(x[:, 0])
    with pytest.raises(ValueError, match="`z` must be finite codes"):
        model.decode(torch.full((2, T * D), math.nan))
    with pytest.raises(ValueError, match="`length`"):
        model.narrow(T + 1)
    with pytest.raises(ValueError, match=f"`length` must be one for each of {N} images; got \\(3,\\)"):
        model.encode(x, torch.tensor([1, 2, 3]))
    with pytest.raises(ValueError, match=r"OrderedVQVAE.elbo: argument `num_samples` must be an integer >= 1; got 0"):
        model.elbo(x, num_samples=0)


def test_every_parameter_learns(x):
    model = small(tail="mask")
    with module_local_params(model, model.guide):
        NestedELBO().differentiable_loss(model, model.guide, x).backward()
    assert all(p.grad is not None and (p.grad != 0).any() for p in model.parameters())
    assert isinstance(model.encoder.heads, nn.Linear)
