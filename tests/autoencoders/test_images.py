"""What a model says of images that it does not take, in a fit and in every method; and its constructors."""

import inspect
import re
import warnings

import numpy as np
import pytest
import torch
from pyro.infer import SVI, TraceMeanField_ELBO
from pyro.optim import Adam

from pyro_vnd.autoencoders import (
    BernoulliLikelihood,
    LinearGaussianVAE,
    OrderedVAE,
    OrderedVQVAE,
    OrderedWAE,
    mlp_bodies,
)
from pyro_vnd.autoencoders.images import ImageCheck
from pyro_vnd.diagnostics import evaluate_prefixes
from pyro_vnd.infer import NestedELBO, fit

SHAPE, ONCE = (1, 4, 4), {"num_epochs": 1, "progress": False}
MODELS = {
    "vae": lambda: OrderedVAE(SHAPE, 3, bodies=mlp_bodies(SHAPE, hidden=(6,))),
    "enumerated": lambda: OrderedVAE(SHAPE, 3, enumerate_lengths=True, bodies=mlp_bodies(SHAPE, hidden=(6,))),
    "bernoulli": lambda: OrderedVAE(SHAPE, 3, likelihood=BernoulliLikelihood(), bodies=mlp_bodies(SHAPE, hidden=(6,))),
    "wae": lambda: OrderedWAE(SHAPE, 3, bodies=mlp_bodies(SHAPE, hidden=(6,))),
    "vqvae": lambda: OrderedVQVAE(SHAPE, 3, 2, 8, bodies=mlp_bodies(SHAPE, hidden=(6,))),
    "linear": lambda: LinearGaussianVAE(SHAPE, 3),
}
OBJECTIVES = {"wae": lambda model: model.objective()}

IMAGES = torch.rand(9, *SHAPE, generator=torch.Generator().manual_seed(0))  # of float32, as users have them
BAD = {
    "float64": (
        IMAGES.double(),
        "images of torch.float32, as the model's parameters are; got torch.float64: give x.",
    ),
    "bytes": ((255 * IMAGES).to(torch.uint8), "got torch.uint8: give x.to(torch.float32) / 255 of bytes, which"),
    "integers": ((255 * IMAGES).long(), "got torch.int64: give x.to(torch.float32) / 255"),
    "bits": (IMAGES > 0.5, "got torch.bool"),
    "flat": (IMAGES.flatten(1), "(N, 1, 4, 4); got (9, 16): give x.reshape(-1, 1, 4, 4)"),
    "without channel": (IMAGES[:, 0], "(N, 1, 4, 4); got (9, 4, 4): give x.reshape(-1, 1, 4, 4)"),
    "channels last": (IMAGES.movedim(1, -1), "got (9, 4, 4, 1): channels come first, x.movedim(-1, 1)"),
    "larger": (torch.zeros(9, 1, 5, 5), "got (9, 1, 5, 5)"),
}


@pytest.fixture(autouse=True)
def _float32():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    yield
    torch.set_default_dtype(before)


def refused(model, message):
    return pytest.raises(ValueError, match=rf"^{type(model).__name__}: argument `x` must .*{re.escape(message)}")


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("case", BAD)
def test_a_fit_refuses_images_in_its_first_evaluation(name, case):
    model, (x, message) = MODELS[name](), BAD[case]
    elbo = OBJECTIVES.get(name, lambda _: NestedELBO())(model)
    with refused(model, message):
        fit(model, model.guide, x, elbo=elbo, **ONCE)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("case", [*BAD, "numpy", "one image", "nan"])
def test_every_method_with_images_refuses_them(name, case):
    more = {
        "numpy": (IMAGES.numpy(), "got ndarray: give a tensor, torch.as_tensor(x)"),
        "one image": (IMAGES[0], "got (1, 4, 4): of a single image give x[None]"),
        "nan": (IMAGES * torch.nan, "finite images; got NaN or inf"),
    }
    model, (x, message) = MODELS[name](), (BAD | more)[case]
    methods = ["__call__", "guide", "check_images", "encode", "embed", "reconstruct", "elbo", "log_likelihood"]
    methods += ["tokens", "count_tokens", "mmd", "exact_log_likelihood"]
    found = [getattr(model, method) for method in methods if hasattr(model, method)]
    assert len(found) >= 6
    for call in found:
        with refused(model, message):
            call(x)
    if isinstance(x, torch.Tensor) and case != "nan":
        with refused(model, message):
            evaluate_prefixes(model, x, [1], progress=False)


@pytest.mark.parametrize("scale", [255.0, 1.5])
def test_a_bernoulli_takes_pixels_from_zero_to_one(scale):
    model = MODELS["bernoulli"]()
    advice = ": give x / 255" if scale > 2 else ""
    low, high = scale * IMAGES.min(), scale * IMAGES.max()
    message = f"pixels in [0, 1] for BernoulliLikelihood; got {low:.4g} to {high:.4g}{advice}"
    for call in (model, model.guide, model.encode, model.reconstruct, model.elbo):
        with refused(model, message):
            call(scale * IMAGES)
    with refused(model, message):
        fit(model, model.guide, scale * IMAGES, **ONCE)


@pytest.mark.parametrize("name", ["vae", "linear", "wae", "vqvae"])
@pytest.mark.filterwarnings("ignore::pyro_vnd.infer.LengthCollapseWarning")
def test_bytes_as_floats_are_legal_for_a_gaussian_but_hardly_meant(name):
    model = MODELS[name]()
    elbo = OBJECTIVES.get(name, lambda _: NestedELBO())(model)
    with pytest.warns(
        UserWarning, match="have pixels from .* to 25.*; weights and noise .* bytes to .* by x / 255"
    ) as found:
        fit(model, model.guide, 255 * IMAGES, elbo=elbo, num_epochs=3, progress=False)
    assert len([each for each in found if "have pixels" in str(each.message)]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(model, model.guide, 5 * torch.randn(9, *SHAPE), elbo=elbo, **ONCE)


def test_images_are_looked_at_in_each_step_on_the_cpu():
    model = MODELS["bernoulli"]()
    svi = SVI(model, model.guide, Adam({"lr": 0.01}), TraceMeanField_ELBO())
    svi.step(IMAGES)
    with refused(model, "pixels in [0, 1]"):
        svi.step(2 * IMAGES)


def test_a_look_is_due_again_after_a_change_of_mode():
    model = MODELS["vae"]()
    model.guide(IMAGES)
    assert model._images.look.done
    for change in (model.eval, model.train):
        change()
        assert not model._images.look.done
        model(IMAGES)
        assert model._images.look.done
    model.reconstruct(IMAGES)
    assert model._images is model.guide._images


def test_a_look_that_finds_fault_is_not_done():
    check, seen = ImageCheck("M", SHAPE, "L"), torch.full((2, *SHAPE), 3.0)
    for _ in range(2):
        with pytest.raises(ValueError, match="M: argument `x` must have pixels"):
            check.in_evaluation(seen, torch.float32)
        assert not check.look.done


def test_a_model_in_another_precision_takes_that_one():
    model = MODELS["vae"]().double()
    assert model.reconstruct(IMAGES.double()).dtype == torch.float64
    with refused(model, "images of torch.float64, as the model's parameters are; got torch.float32"):
        model.reconstruct(IMAGES)


def test_mixed_precision_takes_half():
    model = MODELS["vae"]()
    with torch.autocast("cpu", torch.bfloat16):
        model.guide(IMAGES.bfloat16())
        with refused(model, "got torch.uint8"):
            model.guide(IMAGES.to(torch.uint8))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["vae", "bernoulli", "vqvae"])
def test_steps_on_the_gpu_do_not_wait_for_the_values_of_images(name):
    model, x = MODELS[name]().cuda(), IMAGES.cuda()
    with refused(model, "finite"):
        model.guide(x * torch.nan)
    model.guide(x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            model._images.in_evaluation(x, torch.float32)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with refused(model, "finite"):
        model.encode(x * torch.nan)


# Constructors.

CLASSES = (OrderedVAE, OrderedVQVAE, OrderedWAE, LinearGaussianVAE)


@pytest.mark.parametrize("made", CLASSES)
def test_signatures_list_the_arguments(made):
    parameters = inspect.signature(made).parameters
    assert {"prior_lengths", "posterior_lengths", "tail"} <= set(parameters)
    assert ({"bodies", "likelihood"} <= set(parameters)) == (made is not LinearGaussianVAE)
    assert not [p for p in parameters.values() if p.kind is p.VAR_KEYWORD]
    with pytest.raises(TypeError, match=rf"{made.__name__}.__init__\(\) got an unexpected keyword argument 'latents'"):
        made(SHAPE, latents=3)


BAD_ARGUMENTS = {
    "tail": ({"tail": "ones"}, r"`tail` must be one of \('zeros', 'filler', 'mask', 'completion'\); got 'ones'"),
    "source": ({"posterior_lengths": "none"}, "`posterior_lengths` must be one of .*; got 'none'"),
    "prior": ({"prior_lengths": 3.0}, "`prior_lengths` must be an OrderedMask over"),
    "shape": ({"image_shape": 16}, r"`image_shape` must be a tuple, \(D,\) or \(C, H, W\); got 16"),
    "size of an image": ({"image_shape": (1, 0)}, r"`image_shape` must be positive; got \(1, 0\)"),
}
LATENTS = {
    "none": (0, "must be an integer >= 1; got 0"),
    "half a latent": (2.5, "must be an integer >= 1; got 2.5"),
    "truth": (True, "must be an integer >= 1; got True"),
}


@pytest.mark.parametrize("made", CLASSES)
def test_errors_name_the_class_that_was_made(made):
    for arguments, message in BAD_ARGUMENTS.values():
        with pytest.raises(ValueError, match=f"^{made.__name__}: argument {message}"):
            made(**{"image_shape": SHAPE} | arguments)
    for latents, message in LATENTS.values():
        name = "num_tokens" if made is OrderedVQVAE else "num_latents"
        with pytest.raises(ValueError, match=f"^{made.__name__}: argument `{name}` {message}"):
            made(SHAPE, latents)
    if made is not LinearGaussianVAE:
        with pytest.raises(
            ValueError, match=f"^{made.__name__}: argument `bodies` must be Bodies, see `mlp_bodies`; got i"
        ):
            made(SHAPE, bodies=3)
        with pytest.raises(ValueError, match=f"^{made.__name__}: argument `likelihood` must be a Likelihood; got type"):
            made(SHAPE, likelihood=BernoulliLikelihood)


def test_errors_of_a_class_of_ones_own_name_it():
    class Mine(OrderedVQVAE):
        pass

    for arguments in ({"tail": "ones"}, {"ordered": "none"}, {"commitment": -1}, {"dim": 0}):
        with pytest.raises(ValueError, match="Mine: argument `"):
            Mine(SHAPE, **arguments)


@pytest.mark.parametrize("made", CLASSES)
def test_sizes_are_integers_of_numpy_too(made):
    assert made((np.int64(1), np.int64(4), np.int64(4)), np.int64(3)).reconstruct(IMAGES).shape == IMAGES.shape
