"""Images, codes, lengths and prices that a model does not take are refused by name, whatever they are."""

import inspect

import numpy as np
import pytest
import torch
from odd import NO_NUMBERS, WITHOUT_VALUES
from torch import nn

from pyro_vnd.autoencoders import (
    GaussianLikelihood,
    LinearGaussianVAE,
    OrderedVAE,
    OrderedVQVAE,
    conv_bodies,
    full_length,
    mlp_bodies,
)

N, D, K = 6, 8, 4
MODELS = {
    "vae": lambda: OrderedVAE((D,), K),
    "priced": lambda: OrderedVAE((D,), K, posterior_lengths="priced"),
    "linear": lambda: LinearGaussianVAE((D,), K),
    "tokens": lambda: OrderedVQVAE((D,), num_tokens=K, dim=2, codebook_size=8),
}
WITH_IMAGES = ("encode", "embed", "reconstruct", "lengths", "elbo", "value_curve", "__call__", "guide")
BY_LENGTH = ("encode", "embed", "reconstruct", "elbo")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of torch, that nested tensors may change


@pytest.fixture(params=MODELS)
def model(request):
    torch.manual_seed(0)
    return MODELS[request.param]().eval()


@pytest.fixture
def x():
    return torch.rand(N, D)


def refused(argument, call, *args, **named):
    with pytest.raises(ValueError, match=rf"\w: arguments? `{argument}`"):
        call(*args, **named)


def test_images_and_codes(model, x):
    codes = model.embed(x).detach()
    for odd in [*(make(x) for make in WITHOUT_VALUES.values()), *NO_NUMBERS.values(), x.tolist(), x.numpy(), None]:
        for method in WITH_IMAGES:
            refused("x", getattr(model, method), odd)
    for odd in [*(make(codes) for make in WITHOUT_VALUES.values()), *NO_NUMBERS.values(), codes.tolist(), None]:
        refused("z", model.decode, odd)
    for dtype in (torch.float16, torch.float32, torch.int64, torch.uint8, torch.bool, torch.complex64):
        refused("x", model.encode, x.to(dtype))
        refused("z", model.decode, codes.to(dtype))


def test_model_and_guide_need_an_image(model, x):
    for run in (model, model.guide):
        refused("x", run, x[:0])


def test_lengths(model, x):
    odd = [*NO_NUMBERS.values(), True, 2.0, 0, K + 1, 2**70, torch.ones(N), torch.ones(N, dtype=torch.bool)]
    odd += [make(torch.full((N,), 2.0)) for make in WITHOUT_VALUES.values()]
    for length in odd:
        for method in BY_LENGTH:
            refused("length", getattr(model, method), x, length)
        for method in (model.prior, model.narrow, lambda length: model.sample(2, length)):
            refused("length", method, length)
        refused("lengths", model.value_curve, x, [length])
    for length in ([1, 2], torch.ones(N, 1, dtype=torch.int64), torch.ones(2, N, dtype=torch.int64)):
        for method in BY_LENGTH:
            refused("length", getattr(model, method), x, length)


def test_lengths_of_any_type_of_integers(model, x):
    expected = model.embed(x, torch.arange(N) % K + 1)
    for length in (np.arange(N) % K + 1, [1, 2, 3, 4, 1, 2], (torch.arange(N) % K + 1).to(torch.int8)):
        assert torch.equal(model.embed(x, length), expected)


def test_one_length_where_there_is_one(model):
    """Draws of several lengths would have a shape that nobody asked for."""
    for lengths in ([1, 2], torch.tensor([1, 2]), np.array([1, 2]), torch.ones(1, 2, dtype=torch.int64)):
        refused("length", model.sample, 2, lengths)
        refused("length", model.narrow, lengths)
    assert model.sample(3, torch.tensor([2])).shape == model.sample(3, np.int64(2)).shape == (3, D)


def test_counts(model, x):
    for count in [*NO_NUMBERS.values(), True, 2.0, -1, 2**70, [1, 2], torch.ones(2), None]:
        refused("num_samples", model.sample, count)
        refused("num_samples", model.elbo, x, num_samples=count)
        if count is not None:
            refused("exact", model.lengths, x, exact=count)


def test_prices(model, x):
    """Those of another shape would make laws of as many images as there are not."""
    odd = [*NO_NUMBERS.values(), True, torch.ones(N, dtype=torch.bool), torch.ones(2), torch.ones(N, 1)]
    odd += [make(torch.ones(N)) for make in WITHOUT_VALUES.values()]
    for price in odd:
        with pytest.raises(ValueError, match="argument `price`"):
            model.lengths(x, price=price, exact=2)
        with pytest.raises(ValueError, match="argument `mean_length`"):
            model.choose_lengths(x, mean_length=price, exact=2)
        with pytest.raises(ValueError, match="argument `temperature`"):
            model.lengths(x, temperature=price)
    assert model.lengths(x, price=torch.ones(1), exact=2).batch_shape == (N,)


NO_COUNTS = [*NO_NUMBERS.values(), True, 2.0, 0, -1, None, [2], (), "", torch.tensor(2.0)]
NO_SIZES = [*NO_NUMBERS.values(), 4, None, (), "", b"x", [0], [-1], [2.0], [True], ["4"], np.ones(2), torch.ones(2)]
NO_WORDS = [*NO_NUMBERS.values(), None, 1, [], np.array(["sigmoid"] * 2), torch.ones(2)]
PARTS = {
    (GaussianLikelihood, "num_latents"): NO_COUNTS,
    (GaussianLikelihood, "noise"): NO_WORDS,
    (GaussianLikelihood, "mean"): NO_WORDS,
    (GaussianLikelihood, "scale"): [
        *NO_NUMBERS.values(),
        True,
        0.0,
        -1.0,
        None,
        [0.3],
        torch.ones(2),
        torch.tensor(True),
    ],
    (OrderedVAE, "num_latents"): NO_COUNTS,
    (OrderedVAE, "tail"): NO_WORDS,
    (OrderedVAE, "posterior_lengths"): NO_WORDS,
    (OrderedVAE, "prior_latents"): NO_WORDS,
    (OrderedVAE, "image_shape"): NO_SIZES,
    **{(LinearGaussianVAE, name): NO_WORDS for name in ("tail", "prior_latents", "posterior_lengths")},
    (LinearGaussianVAE, "num_latents"): NO_COUNTS,
    **{(OrderedVQVAE, name): NO_COUNTS for name in ("num_tokens", "dim", "codebook_size")},
    (OrderedVQVAE, "ordered"): NO_WORDS,
    (full_length, "num_latents"): NO_COUNTS,
    (mlp_bodies, "image_shape"): NO_SIZES,
    (mlp_bodies, "hidden"): NO_SIZES,
    (mlp_bodies, "activation"): [*NO_NUMBERS.values(), None, int, lambda: 1, lambda x: x, torch.relu, nn.SiLU()],
    (conv_bodies, "image_shape"): [*NO_SIZES, (8,)],
    (conv_bodies, "channels"): NO_SIZES,
    (conv_bodies, "hidden"): NO_COUNTS,
}
USUAL = {"image_shape": (1, 8, 8), "num_latents": 4}


@pytest.mark.parametrize(("make", "argument"), PARTS, ids=[f"{make.__name__}.{name}" for make, name in PARTS])
def test_parts_of_models(make, argument):
    needed = {name: USUAL[name] for name in inspect.signature(make).parameters if name in USUAL}
    for odd in PARTS[make, argument]:
        with pytest.raises(ValueError, match=f"^{make.__name__}: argument `{argument}` must be "):
            make(**needed | {argument: odd})
