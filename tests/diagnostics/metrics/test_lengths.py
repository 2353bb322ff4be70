"""Lengths of codes by hand: planted models whose error at each length is known, and sums over all of them."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pyro_vnd.autoencoders import OrderedVAE, OrderedVQVAE
from pyro_vnd.diagnostics import evaluate_lengths
from pyro_vnd.diagnostics.metrics.lengths import LAWS
from pyro_vnd.distributions import OrderedMask
from pyro_vnd.infer import MaskSchedule, distil_lengths, fit

K, D, N = 6, 8, 60
UNITS = torch.arange(1, K + 1)
QUIET = {"progress": False}
L8 = math.log(8)
SCALE = 20_000.0  # nats for an error of one


class Terms:
    def __init__(self, log_likelihood, kl_latents):
        self.log_likelihood, self.kl_latents = log_likelihood, kl_latents


class Planted:
    """No module: an image begins with its error by length, and all that is asked of it follows."""

    num_latents = K

    def errors(self, x):
        return x[:, :K]

    def reconstruct(self, x, length):
        return x + self.errors(x)[:, length - 1, None].sqrt()

    def value_curve(self, x, lengths):
        return -SCALE * self.errors(x)[:, torch.tensor([*lengths]) - 1] - 0.1 * torch.tensor([*lengths])

    def lengths(self, x, *, price=None, mean_length=None, exact=None):
        assert mean_length is None
        values = -SCALE * self.errors(x) - 0.1 * UNITS
        if exact is None:  # a model that sees half of it
            values = 0.5 * values + 0.01 * SCALE * x[:, K : K + 1] * UNITS
        elif exact < K:
            values = 0.7 * values
        law = OrderedMask(logits=values)
        return law if price is None else law.tilt(price)


class WithBound(Planted):
    def elbo(self, x, length, num_samples):
        noise = torch.randn(num_samples, len(x)).mean(0) * 1e-9
        return Terms(-SCALE * self.errors(x)[:, length - 1] + noise, 0.3 * length * (1 + x[:, 0]))


@pytest.fixture(scope="module")
def x():
    torch.manual_seed(0)
    pace = torch.rand(N, 1, dtype=torch.float64) * 1.5 + 0.1
    errors = 0.1 * torch.exp(-pace * UNITS) * (0.5 + torch.rand(N, 1, dtype=torch.float64))
    return torch.cat([errors, torch.rand(N, D - K, dtype=torch.float64)], -1)


def tilted(values: torch.Tensor, mean_length: float) -> torch.Tensor:
    """Laws of rows at the price, found by bisection, at which they have a mean length on average."""
    low, high = -1e4, 1e4
    for _ in range(200):
        price = (low + high) / 2
        probs = torch.stack([(row - price * UNITS - (row - price * UNITS).max()).exp() for row in values])
        probs = probs / probs.sum(-1, keepdim=True)
        low, high = (price, high) if (probs * UNITS).sum(-1).mean() > mean_length else (low, price)
    return probs


def laws_by_hand(model, x, mean_length: float) -> dict[str, torch.Tensor]:
    fixed = torch.zeros(K)
    below = min(int(mean_length), K - 1)
    fixed[below - 1], fixed[below] = 1 - (mean_length - below), mean_length - below
    laws = {"fixed": fixed.expand(len(x), K)}
    values = {
        "model": model.lengths(x).logits,
        "decoded": model.lengths(x, exact=3).logits,
        "exact": model.value_curve(x, range(1, K + 1)),
    }
    for name, curves in values.items():
        laws[name] = laws["fixed"] if mean_length in (1, K) else tilted(curves, mean_length)
    return laws


MEANS = [2, 1, 2.5, 4.75, K]


@pytest.mark.parametrize("batch_size", [7, 500])
def test_scores_by_hand(x, batch_size: int):
    labels = torch.arange(N) % 3
    model = WithBound()
    found = evaluate_lengths(model, (x, labels), MEANS, num_decoded=3, batch_size=batch_size, seed=4, **QUIET)
    assert found.sizes == {"seed": 1, "law": 4, "mean_length": len(MEANS), "image": N, "class": 3}
    assert found["law"].values.tolist() == list(LAWS)
    assert found["seed"].values.tolist() == [4]
    assert found.attrs == {"num_rows": N, "num_latents": K, "num_decoded": 3, "chosen": 0}
    for m in MEANS:
        laws = laws_by_hand(model, x, m)
        at = dict.fromkeys(laws, 0.0)
        for name, probs in laws.items():
            row = found.isel(seed=0).sel(law=name, mean_length=m)
            lengths, errors, rate, likelihood = torch.zeros(N), torch.zeros(N), 0.0, 0.0
            marginal = probs.mean(0)
            information = 0.0
            for n in range(N):
                for k in range(K):
                    p = probs[n, k].item()
                    lengths[n] += p * (k + 1)
                    errors[n] += p * x[n, k]
                    rate += p * 0.3 * (k + 1) * (1 + x[n, 0].item()) / N
                    likelihood += -SCALE * p * x[n, k].item() / N
                    information += p * math.log(p / marginal[k].item()) / N if p > 0 else 0
            at[name] = errors.mean().item()
            np.testing.assert_allclose(row["length"], lengths, rtol=1e-6)
            assert row["length"].mean().item() == pytest.approx(m)
            assert row["mse"].item() == pytest.approx(errors.mean().item())
            assert row["information"].item() == pytest.approx(information, abs=1e-9)
            assert row["rate"].item() == pytest.approx(rate + information)
            assert row["distortion"].item() == pytest.approx(-likelihood)
            assert row["elbo"].item() == pytest.approx(likelihood - rate - information)
            for label in range(3):
                of = labels == label
                assert row["length_by_class"].sel({"class": label}).item() == pytest.approx(lengths[of].mean().item())
                assert row["mse_by_class"].sel({"class": label}).item() == pytest.approx(errors[of].mean().item())
            if name != "fixed" and 1 < m < K:
                best = (laws["exact"] * UNITS).sum(-1)
                r = np.corrcoef(lengths, best)[0, 1]
                assert row["correlation"].item() == pytest.approx(r, rel=1e-5)
                assert 1e-3 < information <= math.log(K)
        if 1 < m < K:
            for name, mse in at.items():
                share = (at["fixed"] - mse) / (at["fixed"] - at["exact"])
                assert found["share_of_gain"].sel(law=name, mean_length=m).item() == pytest.approx(share, abs=1e-6)
            assert at["exact"] < 0.98 * min(at["model"], at["fixed"])  # so the shares say something


def test_chosen_lengths_by_hand(x):
    model = Planted()
    found = evaluate_lengths(model, x, [2, 2.5, 4.75], chosen=True, **QUIET).isel(seed=0)
    values = model.value_curve(x, range(1, K + 1))
    prices = sorted(((row[j] - row[i]) / (j - i)).item() for row in values for i in range(K) for j in range(i + 1, K))
    for m in (2, 2.5, 4.75):
        row = found.sel(law="exact", mean_length=m)
        best = [torch.stack([row - price * UNITS for row in values]).argmax(-1) for price in prices]
        wanted = max((b.double().mean().item() + 1, n) for n, b in enumerate(best) if b.double().mean() + 1 <= m)
        lengths = best[wanted[1]]
        assert row["length"].mean().item() == pytest.approx(wanted[0])
        assert m - 1 / 6 < wanted[0] <= m
        assert row["mse"].item() == pytest.approx(x.gather(-1, lengths.unsqueeze(-1)).mean().item())
        random = evaluate_lengths(model, x, [m], **QUIET).isel(seed=0).sel(law="exact")
        assert row["mse"].item() != pytest.approx(random["mse"].item())  # power
    assert found.attrs["chosen"] == 1


def test_what_gains_nothing_has_no_shares(x):
    class Misled(Planted):  # whose values are those of other images
        def value_curve(self, x, lengths):
            return super().value_curve(x, lengths).flip(-1)

    found = evaluate_lengths(Misled(), x, [2.0], **QUIET).isel(seed=0)["mse"]
    assert found.sel(law="exact").item() > found.sel(law="fixed").item()
    assert evaluate_lengths(Misled(), x, [2.0], **QUIET)["share_of_gain"].isnull().all()


def test_mean_lengths_are_by_default_those_that_are_shorter_than_codes(x):
    assert evaluate_lengths(Planted(), x, **QUIET)["mean_length"].values.tolist() == [2, 4]


def test_a_length_given_for_each_image(x):
    given = torch.arange(N) % K + 1
    law = OrderedMask(probs=torch.nn.functional.one_hot(given - 1, K).double())
    found = evaluate_lengths(Planted(), x, [given.double().mean().item()], laws={"mine": law}, chosen=True, **QUIET)
    np.testing.assert_allclose(found["length"].sel(law="mine").values.ravel(), given)
    few = OrderedMask(probs=torch.tensor([0.0, 0.5, 0.3, 0.0, 0.2, 0.0]).double().expand(N, -1))
    sharp = OrderedMask(logits=-(UNITS.float() ** 3) * 10).expand((N,))  # whose probabilities underflow
    found = evaluate_lengths(Planted(), x, [3.0], laws={"few": few, "sharp": sharp}, **QUIET).isel(seed=0)
    for law in ("few", "sharp"):
        np.testing.assert_allclose(found["length"].sel(law=law), 3, rtol=1e-5)


def test_one_length_for_all_knows_nothing_and_pays_nothing_for_it(x):
    found = evaluate_lengths(WithBound(), x, [2, 2.3], **QUIET).sel(law="fixed")
    assert found["correlation"].isnull().all()
    np.testing.assert_allclose(found["information"].values, 0, atol=1e-12)
    assert found["share_of_gain"].values.ravel().tolist() == [0, 0]


def test_a_mean_between_two_lengths_mixes_them(x):
    found = evaluate_lengths(Planted(), x, [2, 2.25, 3], **QUIET)["mse"].sel(law="fixed").isel(seed=0)
    assert found[1].item() == pytest.approx(0.75 * found[0].item() + 0.25 * found[2].item())
    assert found[0].item() == pytest.approx(x[:, 1].mean().item())


def test_models_may_lack_a_bound_and_data_labels(x):
    found = evaluate_lengths(Planted(), x, [2], **QUIET)
    assert set(found.data_vars) == {"mse", "share_of_gain", "correlation", "length"}
    assert "class" not in found.coords
    loader = DataLoader(TensorDataset(x), batch_size=16)
    torch.testing.assert_close(evaluate_lengths(Planted(), loader, [2], **QUIET)["mse"].values, found["mse"].values)


@pytest.fixture(scope="module")
def vae(digits):
    torch.manual_seed(0)
    model = OrderedVAE((64,), K, posterior_lengths="prior")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    distil_lengths(model, digits.train.images, num_steps=50, progress=False)
    return model


def test_an_autoencoder(vae, digits):
    x, y = digits.test.images, digits.test.labels
    vae.train()
    state, before = torch.get_rng_state(), {key: value.clone() for key, value in vae.state_dict().items()}
    found = evaluate_lengths(vae, (x, y), [1.5, 3], num_samples=2, seed=1, batch_size=100, **QUIET)
    assert torch.equal(torch.get_rng_state(), state)
    assert vae.training
    assert all(torch.equal(value, before[key]) for key, value in vae.state_dict().items())
    again = evaluate_lengths(vae, (x, y), [1.5, 3], num_samples=2, seed=1, batch_size=100, **QUIET)
    assert found.identical(again)
    # Errors and laws are those that the methods of the model have.
    at = found.isel(seed=0).sel(law="fixed", mean_length=3)
    assert at["mse"].item() == pytest.approx((vae.reconstruct(x, 3) - x).square().mean().item(), rel=1e-5)
    with torch.no_grad():
        values = vae.encoder.value_head(vae.value_inputs(x)).double()
        price = vae.encoder.value_head.price_at(3.0).item()
    expected = OrderedMask(logits=values).tilt(price).mean_length.mean().item()
    assert found["mean_length_at_price"].sel(mean_length=3).item() == pytest.approx(expected, rel=1e-5)
    shared = OrderedMask(logits=values).at_mean_length(3.0, shared=True).mean_length
    np.testing.assert_allclose(found["length"].isel(seed=0).sel(law="model", mean_length=3), shared, rtol=1e-4)
    exact = OrderedMask(logits=vae.value_curve(x).double()).at_mean_length(3.0, shared=True).mean_length
    np.testing.assert_allclose(found["length"].isel(seed=0).sel(law="exact", mean_length=3), exact, rtol=1e-4)
    assert (found["rate"] > 0).all()
    np.testing.assert_allclose(found["elbo"], -(found["rate"] + found["distortion"]), rtol=1e-9)


def test_laws_that_are_not_by_image_are_all_one(digits):
    vae = OrderedVAE((64,), K, posterior_lengths="prior")
    found = evaluate_lengths(vae, digits.test.images[:50].double(), [2.5], **QUIET).sel(law="model")
    assert "mean_length_at_price" not in found
    np.testing.assert_allclose(found["length"], 2.5, rtol=1e-6)
    assert found["correlation"].isnull().all()
    np.testing.assert_allclose(found["information"], 0, atol=1e-9)


class OneUnit(nn.Module):
    num_latents = 1

    def reconstruct(self, x, length):
        return x + 0.5

    def value_curve(self, x, lengths):
        return x.new_zeros(len(x), len([*lengths]))

    def lengths(self, x, *, price=None, exact=None):
        return OrderedMask(logits=x.new_zeros(len(x), 1))


def test_codes_of_one_unit():
    found = evaluate_lengths(OneUnit(), torch.rand(5, 3), [1], **QUIET)
    np.testing.assert_allclose(found["mse"], 0.25)
    np.testing.assert_allclose(found["length"], 1)


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (None, {"mean_lengths": []}, f"`mean_lengths` must be distinct numbers from 1 to {K}; got \\[\\]"),
        (None, {"mean_lengths": [2, 2.0]}, "must be distinct numbers"),
        (None, {"mean_lengths": [0.5]}, f"from 1 to {K}; got \\[0.5\\]"),
        (None, {"mean_lengths": [K + 1]}, f"from 1 to {K}"),
        (None, {"mean_lengths": [math.nan]}, f"from 1 to {K}; got \\[nan\\]"),
        (None, {"num_decoded": 0}, "evaluate_lengths: argument `num_decoded` must be an integer >= 1; got 0"),
        (None, {"num_samples": 0}, "`num_samples` must be an integer >= 1"),
        (None, {"batch_size": 1.5}, "`batch_size` must be an integer >= 1"),
        (torch.zeros(0, D), {}, "evaluate_lengths: argument `data` has no rows"),
        (
            None,
            {"laws": {"mine": torch.zeros(2)}},
            r"argument `laws` must have names other than .*; got 'mine': tensor",
        ),
        (None, {"laws": {"exact": OrderedMask.uniform(K).expand((3,))}}, "other than .*; got 'exact': OrderedMask"),
        (None, {"laws": {"mine": OrderedMask.uniform(K)}}, "laws of batch shape .*; got 'mine': OrderedMask"),
        (torch.rand(4, D), {"laws": {"mine": OrderedMask.uniform(2).expand((4,))}}, r"batch shape \(4,\) over 6 units"),
        ((torch.rand(4, D), torch.rand(4)), {}, "evaluate_lengths: .*labels|integers"),
    ],
)
def test_errors(x, data, options, message: str):
    with pytest.raises(ValueError, match=message):
        evaluate_lengths(Planted(), x if data is None else data, **{"mean_lengths": [2]} | QUIET | options)


def test_batches_without_rows_are_passed_over(x):
    parts = [x[:4], x[:0], x[4:9]]
    found, expected = (evaluate_lengths(Planted(), data, [2], **QUIET) for data in (iter(parts), x[:9]))
    np.testing.assert_allclose(found["mse"], expected["mse"])
    assert found.sizes["image"] == 9


def test_of_a_vqvae_the_rate_is_that_of_its_tokens(digits):
    torch.manual_seed(0)
    vae = OrderedVQVAE((64,), num_tokens=4, dim=2, codebook_size=8)
    x = digits.train.images[:100].double()
    fit(vae, vae.guide, x, num_epochs=5, batch_size=50, schedule=MaskSchedule(), progress=False)
    result = evaluate_lengths(vae, x, (2, 2.5), progress=False)
    fixed = result.sel(law="fixed")
    np.testing.assert_allclose(fixed["rate"].values.ravel() - fixed["information"].values.ravel(), [2 * L8, 2.5 * L8])
    own = result.sel(law="exact")
    np.testing.assert_allclose(own["rate"] - own["information"], fixed["rate"] - fixed["information"], rtol=1e-4)
    assert (own["information"] > 0).all()
    np.testing.assert_allclose(result["elbo"], -(result["distortion"] + result["rate"]))
