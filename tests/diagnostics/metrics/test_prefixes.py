"""Principal components of real digits, of which every score is known, and models made by hand."""

import copy
import math

import numpy as np
import pytest
import torch
import xarray as xr
from linear_vae import linear_vae
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pyro_vnd.diagnostics import evaluate_prefixes, plot_widths
from pyro_vnd.distributions import OrderedMask

K = 6
LENGTHS = [1, 3, 6]
BASIC = {"num_importance": 2, "progress": False}


class Pixels(nn.Flatten):
    num_features = 64


class Cut(nn.Module):
    """Codes are the first pixels; what the optional methods would tell, it does not have."""

    num_latents = 64

    def __init__(self, stock):
        super().__init__()
        self.register_buffer("stock", stock)

    def embed(self, x, length):
        return x * (torch.arange(64) < length)

    def reconstruct(self, x, length):
        return self.embed(x, length)

    def sample(self, num_samples, length):
        chosen = torch.randint(len(self.stock), (num_samples,))
        return self.embed(self.stock[chosen], 64 if length is None else length)


@pytest.fixture(scope="module")
def data(digits):
    return digits.test.images.double(), digits.test.labels


@pytest.fixture(scope="module")
def train(digits):
    return digits.train.images.double(), digits.train.labels


@pytest.fixture(scope="module")
def oracle(data):
    return linear_vae(data[0], K)


@pytest.fixture(scope="module")
def result(oracle, data, train):
    return evaluate_prefixes(oracle.model, data, LENGTHS, train=train, active_threshold=0.7, **BASIC)


def test_dimensions_and_attributes(result):
    assert result.sizes == {"seed": 1, "prefix": 3, "unit": K, "class": 10}
    assert result["elbo"].dims == ("seed", "prefix")
    assert result["elbo_learned"].dims == ("seed",)
    assert result["keep_probs"].dims == ("seed", "class", "unit")
    assert result["prefix"].values.tolist() == LENGTHS
    assert result["rate"].attrs == {"long_name": "rate", "units": "nats"}
    assert result["rate_learned"].attrs["long_name"] == "rate, lengths from the posterior"
    expected = {"num_rows": 359, "image_shape": [64], "num_latents": K, "num_samples": 10, "num_importance": 2}
    expected |= {"num_train": 1079, "probe_rows": 1079, "nearest_rows": 1000, "active_threshold": 0.7}
    assert result.attrs == expected


def test_reconstructions_lose_the_variance_of_the_components_that_are_cut(result, oracle):
    values, noise = oracle.eigenvalues, oracle.noise
    for length in LENGTHS:
        lost = values[length:].sum() + (noise**2 / values[:length]).sum()
        assert result["mse"].sel(prefix=length).item() == pytest.approx(lost.item() / 64, rel=1e-9)


def test_bounds_are_those_of_the_exact_posterior(result, oracle, data):
    values, noise = oracle.eigenvalues, oracle.noise
    for length in LENGTHS:
        at = result.sel(seed=0, prefix=length)
        exact = oracle.marginals[length - 1].log_prob(data[0]).mean().item()
        # With the exact posterior each weight of the importance-weighted bound is p(x).
        assert at["iw_bound"].item() == pytest.approx(exact, rel=1e-6)
        assert at["bits_per_dim"].item() == pytest.approx(-exact / 64 / math.log(2), rel=1e-6)
        assert at["rate"].item() == pytest.approx((values[:length] / noise).log().sum().item() / 2, rel=1e-6)
        assert at["kl_latents"].item() == at["rate"].item()
        distortion = 32 * math.log(2 * math.pi * noise) + (values[length:].sum().item() / noise + length) / 2
        # Estimated from 3,590 draws whose deviation is below 10 nats: standard error at most .17.
        assert at["distortion"].item() == pytest.approx(distortion, abs=0.5)
        assert at["elbo"].item() == pytest.approx(exact, abs=0.5)
        assert at["reconstruction_log_likelihood"].item() == -at["distortion"].item()
    assert (np.diff(result["iw_bound"].values) > 2).all()  # which such an error does not reach


def test_learned_lengths(oracle, data):
    found = evaluate_prefixes(oracle.model, data, range(1, K + 1), num_samples=50, **BASIC).sel(seed=0)
    # The guide's lengths are uniform and their own prior, so that the ELBO is the mean over the lengths.
    assert found["kl_lengths_learned"].item() == pytest.approx(0, abs=1e-9)
    assert found["elbo_learned"].item() == pytest.approx(found["elbo"].mean().item(), abs=0.5)
    assert found["rate_learned"].item() == pytest.approx(found["rate"].mean().item(), rel=1e-6)
    # log mean exp over two draws lies between their mean and the exact value.
    mixture = torch.stack([law.log_prob(data[0]) for law in oracle.marginals]).logsumexp(0) - math.log(K)
    assert found["elbo_learned"] < found["iw_bound_learned"] < mixture.mean().item()
    assert found["mean_length"].item() == pytest.approx((K + 1) / 2)
    assert found["entropy_length"].item() == pytest.approx(math.log(K))
    np.testing.assert_allclose(found["keep_probs"], np.tile(1 - np.arange(K) / K, (10, 1)))


def test_keep_probs_are_means_over_a_class(data):
    x, y = data
    model = linear_vae(x, K).model
    with torch.no_grad():  # the brighter the longer
        model.encoder.heads.weight[3 * K - 1] = 0.5
        model.encoder.heads.bias[3 * K - 1] -= 0.5 * x.sum(1).mean()
        laws = model.encode(x)
        found = evaluate_prefixes(model, data, [1], **BASIC).sel(seed=0)
    for label in (0, 7):
        expected = laws.keep_probs[y == label].mean(0)
        np.testing.assert_allclose(found["keep_probs"].sel({"class": label}), expected)
    assert np.ptp(found["keep_probs"].sel(unit=K).values) > 0.05
    assert found["mean_length"].item() == pytest.approx(laws.mean_length.mean().item())
    assert found["entropy_length"].item() == pytest.approx(laws.mask_law.entropy().mean().item())


def test_active_units(result, oracle):
    variance = 1 - oracle.noise / oracle.eigenvalues[:K]
    np.testing.assert_allclose(result["mean_code_variance"][0], variance, rtol=1e-9)
    assert result["active_units"].values.tolist() == [[1, 3, 6]]


def test_the_threshold_counts_units_up_to_the_prefix(oracle, data):
    variance = 1 - oracle.noise / oracle.eigenvalues[:K]
    between = (variance[1] + variance[2]).item() / 2
    found = evaluate_prefixes(oracle.model, data, LENGTHS, active_threshold=between, **BASIC)
    assert found["active_units"].values.tolist() == [[1, 2, 2]]


def test_the_probe_is_a_logistic_regression_on_standardised_codes(result, data, train):
    found = evaluate_prefixes(Cut(train[0]), data, [16, 64], train=train, **BASIC)["probe_accuracy"].values[0]
    fit, score = train[0].numpy(), data[0].numpy()
    mean, scale = fit.mean(0), fit.std(0)
    scale[scale == 0] = 1  # some pixels are never set
    for accuracy, length in zip(found, (16, 64), strict=True):
        first, second = (((codes - mean) / scale)[:, :length] for codes in (fit, score))
        probe = LogisticRegression(max_iter=1000).fit(first, train[1])
        assert accuracy == pytest.approx(probe.score(second, data[1]), abs=1e-9)
    raw = LogisticRegression(max_iter=1000).fit(fit[:, :16], train[1])
    assert raw.score(score[:, :16], data[1]) != found[0]
    assert result["probe_accuracy"].values[0, 0] < 0.5 < 0.8 < result["probe_accuracy"].values[0, 2]


def test_distances_to_training_images(result, data, train):
    every = (data[0][:, None] - train[0]).norm(dim=-1).min(1).values
    assert result["nearest_test"].item() == pytest.approx(every.median().item())
    assert (result["nearest_sample"] > 0.5).all()
    memory = evaluate_prefixes(Cut(train[0]), data, [8, 64], train=train[0], **BASIC)
    assert memory["nearest_sample"].values[0, 1] == 0  # its samples are training images
    assert memory["nearest_sample"].values[0, 0] > 0.5
    assert memory["nearest_sample_prior"].item() == 0
    assert "probe_accuracy" not in memory  # for want of labels


def test_features(data):
    model = Cut(data[0])
    found = evaluate_prefixes(model, data, [32, 64], features=Pixels(), num_generated=5000, **BASIC).sel(seed=0)
    assert found["fid_reconstructions"].values[1] == pytest.approx(0, abs=1e-6)
    # Half of the pixels are lost: their means and variances are all that the distance loses at least.
    half = data[0][:, 32:]
    assert found["fid_reconstructions"].values[0] >= (half.mean(0).square().sum() + half.var(0).sum()).item() - 1e-6
    # Samples are test images, drawn with replacement.
    assert 0 <= found["fid_samples"].values[1] < 0.02 < 1 < found["fid_samples"].values[0]
    assert abs(found["kid_samples"].values[1]) < 0.01 < found["kid_samples"].values[0]
    assert found["fid_samples_prior"].item() == found["fid_samples"].values[1]
    assert found.attrs["num_generated"] == 5000
    assert len(found.attrs["features_hash"]) == 64
    assert "nearest_sample" not in found


def test_a_model_without_the_optional_methods(data):
    found = evaluate_prefixes(Cut(data[0]), data[0], [1, 64], **BASIC)
    assert set(found.data_vars) == {"mse", "mean_code_variance", "active_units"}
    assert found["mse"].values[0, 1] == 0
    assert found["mse"].values[0, 0] == pytest.approx(data[0][:, 1:].square().sum().item() / data[0].numel())


def test_laws_that_are_none_of_lengths_are_left_out(data):
    class Gaussian(Cut):
        def encode(self, x):
            return torch.distributions.Normal(x, 1.0)

    found = evaluate_prefixes(Gaussian(data[0]), data[0], [1, 64], **BASIC)
    assert set(found.data_vars) == {"mse", "mean_code_variance", "active_units"}


def test_latents_of_several_numbers_whose_law_is_that_of_their_mask(data):
    class Pairs(Cut):
        num_latents = 32

        def embed(self, x, length):
            return super().embed(x, 2 * length)

        def encode(self, x):
            return OrderedMask.geometric(0.9, 32).expand((len(x),))

    found = evaluate_prefixes(Pairs(data[0]), data, [1, 5, 32], train=data, active_threshold=0.05, **BASIC).sel(seed=0)
    larger = data[0].var(0, correction=0).reshape(32, 2).amax(1)
    np.testing.assert_allclose(found["mean_code_variance"], larger)
    assert found["active_units"].values.tolist() == [(larger[:k] > 0.05).sum().item() for k in (1, 5, 32)]
    assert found["probe_accuracy"].values[0] < 0.3 < 0.95 < found["probe_accuracy"].values[2]
    law = OrderedMask.geometric(0.9, 32)
    assert found["mean_length"].item() == pytest.approx(law.mean_length.item())
    np.testing.assert_allclose(found["keep_probs"].sel({"class": 4}), law.keep_probs)


def test_no_importance_weighted_bound_if_it_has_no_draws(oracle, data):
    found = evaluate_prefixes(oracle.model, data, [1], num_importance=0, progress=False)
    assert "elbo" in found
    assert not {"iw_bound", "bits_per_dim", "iw_bound_learned"} & set(found.data_vars)


def test_a_value_depends_on_its_own_length_only(oracle, data, train, result):
    alone = evaluate_prefixes(oracle.model, data, [3], train=train, active_threshold=0.7, **BASIC)
    xr.testing.assert_equal(alone, result.sel(prefix=[3]))
    without = evaluate_prefixes(oracle.model, data, [3], train=train, num_importance=0, progress=False)
    assert without["nearest_sample"].values == alone["nearest_sample"].values
    # Bounds without samples, and samples without bounds.
    for model, options in ((oracle.model, {}), (Cut(data[0]), {"features": Pixels(), "num_generated": 50})):
        several, alone = (evaluate_prefixes(model, data, lengths, **options, **BASIC) for lengths in ([1, 3], [3]))
        xr.testing.assert_equal(alone, several.sel(prefix=[3]))


def test_fits_join_along_seed_and_random_numbers_are_the_callers(oracle, data, train, result):
    torch.manual_seed(5)
    other = evaluate_prefixes(oracle.model, data, LENGTHS, train=train, active_threshold=0.7, seed=1, **BASIC)
    after = torch.rand(2)
    torch.manual_seed(5)
    torch.testing.assert_close(torch.rand(2), after)
    joined = xr.concat([result, other], "seed")
    assert joined["seed"].values.tolist() == [0, 1]
    assert joined["keep_probs"].dims == ("seed", "class", "unit")
    assert (joined["elbo"].std("seed") > 0).all()  # other draws
    assert (joined["mse"].std("seed") == 0).all()
    (ax,) = plot_widths(joined.rename(prefix="width"), ["elbo"])
    assert ax.get_xlabel() == "code length (latents)"


def test_loaders_and_batches_do_not_matter(oracle, data, result):
    loader = DataLoader(TensorDataset(*data), batch_size=50)
    batched = evaluate_prefixes(oracle.model, loader, LENGTHS, batch_size=17, **BASIC)
    for name in ("mse", "rate", "iw_bound", "mean_code_variance", "keep_probs", "mean_length"):
        np.testing.assert_allclose(batched[name], result[name], rtol=1e-6)


def test_the_model_is_left_as_it_was(oracle, data):
    model = oracle.model.train()
    seen = []
    handle = model.encoder.register_forward_hook(
        lambda module, *_: seen.append((module.training, torch.is_grad_enabled()))
    )
    evaluate_prefixes(model, data, [1], **BASIC)
    handle.remove()
    assert set(seen) == {(False, False)}
    assert all(part.training for part in model.modules())
    assert torch.is_grad_enabled()


@pytest.mark.gpu
def test_a_model_on_the_gpu(oracle, data, train, result):
    model = copy.deepcopy(oracle.model).cuda()
    found = evaluate_prefixes(model, data, LENGTHS, train=train, features=Pixels(), num_generated=50, **BASIC)
    for name in ("mse", "rate", "iw_bound", "mean_code_variance", "keep_probs", "nearest_test"):
        np.testing.assert_allclose(found[name], result[name], rtol=1e-5)
    np.testing.assert_allclose(found["elbo"], result["elbo"], atol=0.5)  # other random numbers


@pytest.mark.parametrize("lengths", [[], [0], [7], [2, 2], [1.5]], ids=str)
def test_lengths_are_checked(lengths, oracle, data):
    with pytest.raises(ValueError, match="`prefixes` must be distinct integers from 1 to 6"):
        evaluate_prefixes(oracle.model, data, lengths, **BASIC)


@pytest.mark.parametrize(
    ("name", "value", "least"), [("num_samples", 0, 1), ("num_importance", -1, 0), ("num_generated", 0, 1)]
)
def test_numbers_are_checked(name, value, least, oracle, data):
    with pytest.raises(ValueError, match=f"`{name}` must be an integer >= {least}; got {value}"):
        evaluate_prefixes(oracle.model, data, [1], **BASIC | {name: value})


def test_data_are_checked(oracle, data):
    with pytest.raises(ValueError, match="`data` has no rows"):
        evaluate_prefixes(oracle.model, [], [1], **BASIC)
    with pytest.raises(ValueError, match="`data` has images with NaN or inf"):
        evaluate_prefixes(oracle.model, data[0] / 0, [1], **BASIC)
    with pytest.raises(ValueError, match="`train` has images with NaN or inf"):
        evaluate_prefixes(oracle.model, data, [1], train=data[0] / 0, **BASIC)


def test_what_the_model_returns_is_checked(data):
    model = Cut(data[0])
    model.reconstruct = lambda x, length: x[:, :8]  # would broadcast or fail in the middle of things
    with pytest.raises(
        ValueError, match=r"`model\.reconstruct` must return images of shape \(256, 64\); got \(256, 8\)"
    ):
        evaluate_prefixes(model, data, [1], **BASIC)
    model.reconstruct = lambda x, length: x * torch.nan
    with pytest.raises(ValueError, match="`mse` at length 1 is nan"):
        evaluate_prefixes(model, data, [1], **BASIC)
    model = Cut(data[0])
    model.embed = lambda x, length: x[:, :8]  # fewer than latents
    with pytest.raises(ValueError, match=r"`model\.embed` must return finite codes of shape \(359, 64\)"):
        evaluate_prefixes(model, data, [1], **BASIC)
    model = Cut(data[0])
    model.sample = lambda num_samples, length: data[0]
    with pytest.raises(ValueError, match=r"`model\.sample` must return images of shape"):
        evaluate_prefixes(model, data, [1], features=Pixels(), **BASIC)
