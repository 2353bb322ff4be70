"""What the demo compares itself with, and what it says about its laws."""

import json

import numpy as np
import pytest
import torch
from processes import torchrun
from sklearn.decomposition import PCA

from models.datasets import load
from models.demo import baselines
from models.demo.laws import LawBesidePrior
from models.demo.settings import SETTINGS, WIDTHS
from pyro_vnd.distributions import OrderedMask


def test_principal_components_are_those_of_scikit_learn():
    data = load("digits", flatten=True)
    train, test = data.train.images, data.test.images
    errors = baselines.principal_component_errors(train, test, 16)
    assert list(errors) == list(range(17))
    assert errors[0] == pytest.approx((test - train.mean(0)).square().mean().item())
    for k in (1, 5, 16):
        pca = PCA(k, svd_solver="full").fit(train.double().numpy())
        restored = pca.inverse_transform(pca.transform(test.double().numpy()))
        assert errors[k] == pytest.approx(np.square(restored - test.double().numpy()).mean(), rel=1e-4)


def test_a_cut_perceptron_is_the_narrow_one():
    torch.manual_seed(0)
    wide, narrow = baselines.Perceptron([5, 8, 8, 3]), baselines.Perceptron([5, 4, 4, 3])
    with torch.no_grad():
        for whole, part in zip(wide.layers, narrow.layers, strict=True):
            part.weight.copy_(whole.weight[: part.out_features, : part.in_features])
            part.bias.copy_(whole.bias[: part.out_features])
    x = torch.randn(6, 5)
    torch.testing.assert_close(wide(x, 0.5), narrow(x))
    torch.testing.assert_close(wide(x, 1.0), wide(x))


def test_nested_dropout_draws_widths_in_training_only():
    torch.manual_seed(0)
    net = baselines.Perceptron([5, 8, 3], law=OrderedMask(probs=torch.eye(8)[1]))
    x = torch.randn(6, 5)
    torch.testing.assert_close(net(x), net(x, 2 / 8))
    assert not torch.allclose(net.eval()(x), net(x, 2 / 8))


def test_baselines_leave_the_random_numbers_alone_and_are_the_same_each_time():
    data, settings = load("digits", flatten=True), SETTINGS["digits"].quick()
    law = OrderedMask.geometric(0.95, 64)
    state = torch.random.get_rng_state()
    first = baselines.classifiers(data, settings, law, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert first == baselines.classifiers(data, settings, law, seed=1)
    assert all([row["width"] for row in rows] == list(WIDTHS) for rows in first.values())
    # At full width the net that is cut is the net of that width.
    assert first["plain net, cut"][-1] == first["plain nets, one a width"][-1]
    assert first["plain net, cut"][0] != first["plain nets, one a width"][0]


@pytest.mark.parametrize(
    ("moved", "words"),
    [(0.0, "hardly left its prior"), (0.15, "hardly left"), (0.3, "part of the way"), (0.7, "the data decide")],
)
def test_words_about_a_law_follow_its_distance_from_the_prior(moved, words):
    prior = OrderedMask(probs=torch.tensor([0.75, 0.125, 0.125]))
    learned = LawBesidePrior.of(OrderedMask(probs=torch.tensor([0.75 - moved, 0.125, 0.125 + moved])), prior)
    assert learned.total_variation == pytest.approx(moved, abs=1e-6)
    assert words in learned.verdict()
    assert f"{moved:.2f}" in learned.verdict()
    assert learned.mean == pytest.approx(prior.mean_length.item() + 2 * moved, rel=1e-5)
    assert learned.prior_entropy == pytest.approx(prior.entropy().item())
    assert (learned.kl > 0) == (moved > 0)


def test_words_say_which_way_a_law_went():
    prior = OrderedMask.uniform(4)
    shorter, longer = (LawBesidePrior.of(OrderedMask(probs=torch.eye(4)[k]), prior) for k in (0, 3))
    assert "shorter lengths" in shorter.verdict()
    assert "longer lengths" in longer.verdict()
    assert "Less likely than a priori: lengths 2-4." in shorter.verdict()
    middle = LawBesidePrior.of(OrderedMask(probs=torch.tensor([0.0, 0.5, 0.5, 0.0])), prior)
    assert "Less likely than a priori: lengths 1, 4." in middle.verdict()
    assert "a priori" not in LawBesidePrior.of(prior, prior).verdict()


def test_a_law_for_each_image_is_described_by_means():
    law = OrderedMask(probs=torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    learned = LawBesidePrior.of(law, OrderedMask.uniform(2))
    assert (learned.mean, learned.stddev_between, learned.entropy) == (1.5, 0.5, 0.0)
    assert learned.total_variation == pytest.approx(0.5)


@pytest.mark.slow
def test_two_processes_train_and_one_of_them_reports(tmp_path):
    result = torchrun("-m", "models", "demo", "--quick", "--out", tmp_path / "demo")
    assert result.returncode == 0, result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]
    metrics = json.loads((tmp_path / "demo" / "metrics.json").read_text())
    assert metrics["vae"]["num_steps"] > 0
    assert result.stdout.count("Ordered-latent VAE on digits") == result.stdout.count("report: ") == 1
    assert result.stderr.count("fit:   0%") == 2  # a bar of each model
