"""What an autoencoder with an ordered code promises: shapes, prefixes, plain smaller nets, checks of its input."""

import io
import pickle
from itertools import pairwise
from typing import Any

import pytest
import torch
from pyro.infer import TraceMeanField_ELBO
from shaken import shaken
from torch import Tensor, nn

from models.datasets import load
from pyro_vnd.autoencoders import (
    BernoulliLikelihood,
    Bodies,
    ContinuousBernoulliLikelihood,
    GaussianLikelihood,
    Likelihood,
    OrderedVAE,
    conv_bodies,
    full_width,
    mlp_bodies,
)
from pyro_vnd.distributions import NestedNormal, OrderedMask
from pyro_vnd.infer import MaskSchedule, cosine_to_zero, fit

K, N, SHAPE = 4, 3, (1, 8, 8)

BODIES = {
    "mlp": lambda: mlp_bodies(SHAPE, hidden=(12, 10)),
    "conv": lambda: conv_bodies(SHAPE, channels=(3, 5), hidden=10),
}
LIKELIHOODS = {
    "gaussian": lambda: GaussianLikelihood(K),
    "by_length": lambda: GaussianLikelihood(K, noise="by_length", mean="sigmoid"),
    "bernoulli": BernoulliLikelihood,
    "continuous": ContinuousBernoulliLikelihood,
}
TAILS = ("zeros", "filler", "mask", "completion")


def make_vae(bodies: Bodies | None = None, likelihood: Likelihood | None = None, **kwargs: Any) -> OrderedVAE:
    """A small one, all of whose parameters have moved from where they start."""
    torch.manual_seed(0)
    vae = OrderedVAE(SHAPE, K, bodies=BODIES["mlp"]() if bodies is None else bodies, likelihood=likelihood, **kwargs)
    return shaken(vae, 0.1)


@pytest.fixture
def x() -> Tensor:
    return torch.rand(N, *SHAPE)


# Shapes.


@pytest.mark.parametrize("posterior", ["prior", "global", "amortised"])
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("bodies", BODIES)
def test_shapes(bodies: str, likelihood: str, tail: str, posterior: str, x: Tensor):
    vae = make_vae(BODIES[bodies](), LIKELIHOODS[likelihood](), tail=tail, posterior_lengths=posterior)
    for length in (None, 2, torch.tensor([1, 4, 2])):
        code = vae.encode(x, length)
        assert isinstance(code, NestedNormal)
        assert (code.batch_shape, code.event_shape) == ((N,), (K,))
        assert vae.embed(x, length).shape == (N, K)
        assert vae.reconstruct(x, length).shape == x.shape
        assert all(term.shape == (N,) and torch.isfinite(term).all() for term in vae.elbo(x, length, num_samples=2))
        assert torch.isfinite(vae.log_likelihood(x, 3, length)).all()
        assert vae.decode(code.sample((2,))).shape == (2, *x.shape)
    for length in (None, 1, K):
        for noise in (False, True):
            assert vae.sample(5, length, noise=noise).shape == (5, *SHAPE)


def test_bits_per_dim_and_chunks(x: Tensor):
    """Chunks change which numbers are drawn together and not which numbers, here where nothing is random but z."""
    vae = make_vae(posterior_lengths="prior", prior_lengths=full_width(K))
    with torch.no_grad():
        vae.decoder.entry.weight.zero_()  # the likelihood ignores z,
        vae.encoder.heads.weight.zero_()  # and q is p: each weight is the likelihood
        vae.encoder.heads.bias[:K] = 0
        vae.encoder.heads.bias[K:] = torch.tensor(1 - 1e-4).expm1().log()
    nats = vae.log_likelihood(x, 7, chunk_size=N * 2)
    expected = vae.likelihood_given(torch.zeros(K), torch.ones(K)).log_prob(x)
    torch.testing.assert_close(nats, expected)
    bits = vae.log_likelihood(x, 1, unit="bits_per_dim")
    torch.testing.assert_close(bits * 64 * torch.tensor(2.0).log(), -expected)


# Prefixes.


@pytest.mark.parametrize("tail", TAILS)
def test_a_prefix_ignores_the_tail_of_the_code(tail: str, x: Tensor):
    """What the encoder says of dropped latents, and for zeros the decoder's weights for them, make no difference."""
    vae = make_vae(tail=tail)
    short, long = vae.reconstruct(x, 2), vae.reconstruct(x, 3)
    with torch.no_grad():
        vae.encoder.heads.bias[2:K] += 100
        if tail == "zeros":
            vae.decoder.entry.weight[:, 2:] += 100
    assert torch.equal(vae.reconstruct(x, 2), short)
    assert not torch.allclose(vae.reconstruct(x, 3), long)


@pytest.mark.parametrize("tail", ["filler", "mask", "completion"])
def test_the_tail_vanishes_at_full_width_only(tail: str, x: Tensor):
    vae, plain = make_vae(tail=tail), make_vae()
    plain.load_state_dict({name: value for name, value in vae.state_dict().items() if name in plain.state_dict()})
    torch.testing.assert_close(vae.reconstruct(x), plain.reconstruct(x))
    assert not torch.allclose(vae.reconstruct(x, K - 1), plain.reconstruct(x, K - 1))


def test_noise_by_length_is_the_shared_one_at_full_width(x: Tensor):
    shared, by_length = (
        make_vae(likelihood=GaussianLikelihood(K)),
        make_vae(likelihood=GaussianLikelihood(K, noise="by_length")),
    )
    by_length.load_state_dict(shared.state_dict() | {"likelihood.log_scale": torch.tensor([0.5, 0.2, -0.3, -1.2])})
    with torch.no_grad():
        shared.likelihood.log_scale.fill_(-1.2)
    code = shared.encode(x).loc
    scores = [vae.likelihood_given(code, torch.ones(N, K)).log_prob(x) for vae in (shared, by_length)]
    torch.testing.assert_close(*scores)
    mask = (torch.arange(K) < 3).double().expand(N, K)
    law = by_length.likelihood_given(mask * code, mask)
    torch.testing.assert_close(law.stddev.log(), torch.full(x.shape, -0.3))


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("bodies", BODIES)
def test_narrowed_nets_are_the_cut_model_in_plain_torch(bodies: str, likelihood: str, tail: str):
    vae = make_vae(BODIES[bodies](), LIKELIHOODS[likelihood](), tail=tail).float()
    x = torch.rand(N, *SHAPE, dtype=torch.float32)
    for length in (1, 3, K):
        encoder, decoder = vae.narrow(length)
        code = encoder(x)
        assert code.shape == (N, length)
        torch.testing.assert_close(decoder(code), vae.reconstruct(x, length), atol=1e-5, rtol=1e-5)
        for net in (encoder, decoder):
            assert not {id(p) for p in net.parameters()} & {id(p) for p in vae.parameters()}  # weights of their own
            assert all(type(module).__module__.startswith("torch") for module in net.modules())
            assert not any(word in pickle.dumps(net) for word in (b"pyro", b"models"))


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_narrowed_nets_survive_a_file(likelihood: str, x: Tensor):
    encoder, decoder = make_vae(BODIES["conv"](), LIKELIHOODS[likelihood](), tail="mask").narrow(2)
    other = make_vae(BODIES["conv"](), LIKELIHOODS[likelihood](), tail="zeros").narrow(2)
    expected = decoder(encoder(x))
    assert not torch.allclose(other[1](other[0](x)), expected)
    for net, copy in zip((encoder, decoder), other, strict=True):
        file = io.BytesIO()
        torch.save(net.state_dict(), file)
        file.seek(0)
        copy.load_state_dict(torch.load(file, weights_only=True))
    torch.testing.assert_close(other[1](other[0](x)), expected)
    for load_copy in (lambda net: pickle.loads(pickle.dumps(net)), _through_file):
        torch.testing.assert_close(load_copy(decoder)(load_copy(encoder)(x)), expected)


def _through_file(net: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


# Bad input.


@pytest.mark.parametrize("length", [0, K + 1, -1, 1.5, torch.tensor([1, 0, 2]), torch.tensor([1, 2, K + 1])], ids=str)
@pytest.mark.parametrize("method", ["encode", "embed", "reconstruct", "elbo", "log_likelihood", "sample", "narrow"])
def test_lengths_are_checked(method: str, length: Any, x: Tensor):
    call = {"log_likelihood": lambda v: v.log_likelihood(x, 2, length), "sample": lambda v: v.sample(3, length)}
    call["narrow"] = lambda v: v.narrow(length)
    with pytest.raises(ValueError, match=rf"`length` must be .*1 to {K}; got "):
        call.get(method, lambda v: getattr(v, method)(x, length))(make_vae())


def test_lengths_are_as_many_as_images(x: Tensor):
    with pytest.raises(ValueError, match=r"`length` must be one for each of 3 images; got \(2,\)"):
        make_vae().reconstruct(x, torch.tensor([1, 2]))


BAD_IMAGES = {
    "flat": (lambda x: x.flatten(1), r"shape \(N, 1, 8, 8\); got \(3, 64\)"),
    "one image": (lambda x: x[0], r"shape \(N, 1, 8, 8\); got \(1, 8, 8\)"),
    "larger": (lambda x: torch.zeros(3, 1, 9, 8), r"got \(3, 1, 9, 8\)"),
    "list": (lambda x: x.tolist(), "got list"),
    "NaN": (lambda x: x * torch.nan, "finite images; got NaN or inf"),
    "inf": (lambda x: x / 0, "finite images; got NaN or inf"),
}


@pytest.mark.parametrize("case", BAD_IMAGES)
@pytest.mark.parametrize("method", ["__call__", "encode", "embed", "reconstruct", "elbo", "log_likelihood"])
def test_images_are_checked(method: str, case: str, x: Tensor):
    spoil, message = BAD_IMAGES[case]
    with pytest.raises(ValueError, match=f"argument `x` must be .*{message}"):
        getattr(make_vae(), method)(spoil(x))


@pytest.mark.parametrize("case", BAD_IMAGES)
@pytest.mark.parametrize("enumerate_lengths", [False, True])
def test_images_are_checked_before_the_encoder_sees_them(enumerate_lengths: bool, case: str, x: Tensor):
    vae, (spoil, message) = make_vae(enumerate_lengths=enumerate_lengths), BAD_IMAGES[case]
    with pytest.raises(ValueError, match=f"argument `x` must be .*{message}"):
        TraceMeanField_ELBO().loss(vae, vae.guide, spoil(x))


@pytest.mark.parametrize("scale", [-0.1, 1.1])
def test_bounded_pixels_are_checked(scale: float, x: Tensor):
    for law in (BernoulliLikelihood, ContinuousBernoulliLikelihood):
        with pytest.raises(ValueError, match=rf"`x` must have pixels in \[0, 1\] for {law.__name__}; got "):
            make_vae(likelihood=law()).encode(x / x.max() * scale)
    make_vae().encode(x * scale)  # Gaussian likelihood are free


@pytest.mark.parametrize(
    ("z", "got"),
    [
        (torch.zeros(2, K - 1), r"\(2, 3\)"),
        (torch.tensor(0.0), r"\(\)"),
        (torch.full((2, K), torch.nan), r"\(2, 4\) with NaN or inf"),
    ],
)
def test_codes_are_checked(z: Tensor, got: str):
    with pytest.raises(ValueError, match=rf"`z` must be finite codes of shape \(\.\.\., {K}\); got {got}"):
        make_vae().decode(z)


NO_LENGTH_ONE = OrderedMask(probs=torch.tensor([0.0, 0.3, 0.3, 0.4]))
BAD_OPTIONS = {
    "tail": ({"tail": "ones"}, r"`tail` must be one of .* got 'ones'"),
    "posterior": ({"posterior_lengths": "none"}, "`posterior_lengths` must be one of .* got 'none'"),
    "units": ({"prior_lengths": OrderedMask.uniform(K + 1)}, f"`prior_lengths` must be an OrderedMask over {K} units"),
    "batch": ({"prior_lengths": OrderedMask.uniform(K).expand((2,))}, "without batch shape"),
    "kind": ({"prior_lengths": torch.ones(K)}, "`prior_lengths` must be an OrderedMask"),
    "zero global": ({"prior_lengths": NO_LENGTH_ONE, "posterior_lengths": "global"}, "no probability"),
    "zero amortised": ({"prior_lengths": full_width(K)}, "`prior_lengths` gives some lengths no probability"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_options_are_checked(case: str):
    options, message = BAD_OPTIONS[case]
    with pytest.raises(ValueError, match=message):
        make_vae(**options)
    make_vae(prior_lengths=NO_LENGTH_ONE, posterior_lengths="prior")  # lengths that nobody learns may be impossible


def test_numbers_and_units_are_checked(x: Tensor):
    vae = make_vae()
    with pytest.raises(ValueError, match="`num_samples` and `chunk_size` must be at least 1; got 0 and 10000"):
        vae.log_likelihood(x, 0)
    with pytest.raises(ValueError, match="must be at least 1; got 1 and 0"):
        vae.log_likelihood(x, 1, chunk_size=0)
    with pytest.raises(ValueError, match="`num_samples` must be at least 1; got 0"):
        vae.elbo(x, num_samples=0)
    with pytest.raises(ValueError, match="`unit` must be 'nats' or 'bits_per_dim'; got 'bits'"):
        vae.log_likelihood(x, unit="bits")
    for option, value in (("noise", "none"), ("mean", "tanh"), ("scale", 0.0)):
        with pytest.raises(ValueError, match=f"GaussianLikelihood: argument `{option}` must be .*; got "):
            GaussianLikelihood(K, **{option: value})


# Real images.


def test_training_orders_the_code_of_digits():
    """Each latent more lowers the error, and a few in the middle do better than as many principal components."""
    images = load("digits", flatten=True).train.images.double()
    torch.manual_seed(0)
    vae = OrderedVAE((64,), num_latents=8, bodies=mlp_bodies((64,), hidden=(128,)))
    kwargs = {"batch_size": 180, "lr": 0.005, "lr_schedule": cosine_to_zero(), "schedule": MaskSchedule(0.1, 0.9, 0)}
    fit(vae, vae.guide, images, num_epochs=120, progress=False, **kwargs)
    errors = [(vae.reconstruct(images, k) - images).square().sum(-1).mean().item() for k in range(1, 9)]
    spectrum = torch.linalg.eigvalsh(torch.cov(images.T, correction=0)).flip(0)
    pca = (spectrum.sum() - spectrum.cumsum(0)).tolist()
    assert all(longer < shorter for shorter, longer in pairwise([spectrum.sum().item(), *errors]))
    assert all(error < 0.95 * bound for error, bound in zip(errors[2:5], pca[2:5], strict=True))


@pytest.mark.parametrize("bodies", BODIES)
def test_no_images_are_images_too(bodies: str):
    vae, none = make_vae(BODIES[bodies](), tail="completion"), torch.rand(0, *SHAPE)
    assert vae.reconstruct(none, 2).shape == vae.sample(0).shape == (0, *SHAPE)
    assert vae.elbo(none).elbo.shape == vae.log_likelihood(none, 3).shape == (0,)
