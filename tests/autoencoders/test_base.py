"""What an autoencoder with an ordered code promises: shapes, prefixes, plain smaller nets, checks of its input."""

import copy
import io
import pickle
import re
from itertools import pairwise
from typing import Any

import pytest
import torch
from pyro.infer import TraceEnum_ELBO, TraceMeanField_ELBO
from shaken import shaken
from torch import Tensor, nn

from pyro_vnd.autoencoders import (
    BernoulliLikelihood,
    Bodies,
    ContinuousBernoulliLikelihood,
    GaussianLikelihood,
    Likelihood,
    LinearGaussianVAE,
    OrderedVAE,
    OrderedVQVAE,
    OrderedWAE,
    conv_bodies,
    mlp_bodies,
)
from pyro_vnd.distributions import NestedNormal
from pyro_vnd.infer import MaskSchedule, OptimizerSettings, cosine_to_zero, fit

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
    for net, twin in zip((encoder, decoder), other, strict=True):
        file = io.BytesIO()
        torch.save(net.state_dict(), file)
        file.seek(0)
        twin.load_state_dict(torch.load(file, weights_only=True))
    torch.testing.assert_close(other[1](other[0](x)), expected)
    for load_copy in (lambda net: pickle.loads(pickle.dumps(net)), _through_file):
        torch.testing.assert_close(load_copy(decoder)(load_copy(encoder)(x)), expected)


def _through_file(net: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


# Guides.

MODELS = {
    "vae": lambda: OrderedVAE(SHAPE, K, bodies=BODIES["mlp"]()),
    "autoregressive": lambda: OrderedVAE(SHAPE, K, bodies=BODIES["mlp"](), prior_latents="autoregressive"),
    "enumerated": lambda: OrderedVAE(SHAPE, K, bodies=BODIES["mlp"](), enumerate_lengths=True),
    "wae": lambda: OrderedWAE(SHAPE, K, bodies=BODIES["mlp"]()),
    "vqvae": lambda: OrderedVQVAE(SHAPE, K, 2, 8, bodies=BODIES["mlp"]()),
    "linear": lambda: LinearGaussianVAE(SHAPE, K),
}
OBJECTIVES = {"wae": lambda model: model.objective(), "enumerated": lambda _: TraceEnum_ELBO(max_plate_nesting=1)}
every_model = pytest.mark.parametrize("name", MODELS)


@every_model
def test_the_guide_is_one_module_beside_the_model(name: str):
    model = MODELS[name]()
    names = list(model.state_dict())
    assert model.guide is model.guide
    assert list(model.state_dict()) == names
    assert model.guide not in set(model.modules())
    assert model.guide.encoder is model.encoder
    assert {id(p) for p in (*model.parameters(), *model.guide.parameters())} == {id(p) for p in model.parameters()}


@every_model
def test_copies_have_a_guide_of_their_own(name: str, x: Tensor):
    model = MODELS[name]()
    for guide_is_made in (False, True):
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert ("guide" in vars(copied)) == guide_is_made
            assert copied.guide.encoder is copied.encoder
            assert copied.encoder is not model.encoder
            assert {id(p) for p in copied.guide.parameters()} <= {id(p) for p in copied.parameters()}
            torch.testing.assert_close(copied.embed(x), model.embed(x))
        assert model.guide.encoder is model.encoder


@every_model
def test_a_fit_trains_the_nets_of_model_and_guide(name: str, x: Tensor):
    model = MODELS[name]()
    before = copy.deepcopy(model.state_dict())
    elbo = OBJECTIVES[name](model) if name in OBJECTIVES else None
    fit(model, model.guide, x, num_epochs=3, lr=0.01, elbo=elbo, progress=False)
    for parameter, value in model.named_parameters():
        assert not torch.equal(value, before[parameter]), parameter


def test_what_the_guide_depends_on_stays():
    vae = MODELS["enumerated"]()
    assert vae.enumerate_lengths
    with pytest.raises(AttributeError, match="enumerate_lengths"):
        vae.enumerate_lengths = False


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


# Real images.


def test_training_orders_the_code_of_digits(images: Tensor):
    """Each latent more lowers the error, and a few in the middle do better than as many principal components."""
    images = images.flatten(1)
    torch.manual_seed(0)
    vae = OrderedVAE((64,), num_latents=8, bodies=mlp_bodies((64,), hidden=(128,)))
    kwargs = {
        "batch_size": 180,
        "lr": 0.005,
        "optimizer": OptimizerSettings(lr_schedule=cosine_to_zero()),
        "schedule": MaskSchedule(0.1, 0.9, 0),
    }
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


def test_the_representation_says_what_the_code_is_like():
    vae = OrderedVAE((8,), 4, bodies=mlp_bodies((8,)), tail="completion", posterior_lengths="global")
    first = repr(vae).splitlines()[1].strip()
    assert first == "images (8,), codes of 4, a priori of mean length 2.5, lengths: global, tail: completion"


@pytest.mark.parametrize("shape", [(1, 6, 8), (1, 8, 6), (8, 8)])
def test_images_that_convolutions_cannot_halve_are_refused(shape):
    message = f"conv_bodies: argument `image_shape` must be (C, H, W) with H and W multiples of 4; got {shape}"
    with pytest.raises(ValueError, match=re.escape(message)):
        conv_bodies(shape, channels=(3, 5))
