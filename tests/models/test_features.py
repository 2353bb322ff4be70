"""The classifier whose features compare images: what it learns, and that it is kept."""

import hashlib
from dataclasses import replace

import pytest
import torch
from small_datasets import needs_fashion_mnist

from models import features
from models.datasets import Split, load
from models.features import FeatureNet, FeatureRecipe, train_features
from pyro_vnd.diagnostics import generative_metrics
from pyro_vnd.diagnostics.metrics.generative import weights_hash

QUICK = FeatureRecipe(channels=(8, 16), num_features=16, num_epochs=2)


@pytest.fixture(scope="module")
def digits():
    return load("digits")


@pytest.fixture(scope="module")
def trained(digits):
    return train_features(digits, folder=None, progress=False)


def test_the_classifier_has_learned_and_is_frozen(trained, digits):
    net, recipe, accuracy = trained
    x, y = digits.validation
    assert accuracy > 0.9  # chance is .1
    assert accuracy == pytest.approx((net.logits(x).argmax(-1) == y).double().mean().item())
    assert recipe == FeatureRecipe()
    assert not net.training
    assert not any(parameter.requires_grad for parameter in net.parameters())


def test_features_are_what_the_last_layer_sees(trained, digits):
    x = digits.validation.images
    seen = trained.net(x)
    assert seen.shape == (len(x), trained.net.num_features) == (359, 64)
    torch.testing.assert_close(trained.net.head(seen), trained.net.logits(x))
    torch.testing.assert_close(trained.net(x.flatten(1).double()), seen)  # flattened, and of another type
    assert (seen.var(0) > 1e-3).all()  # none is dead


def test_worse_images_are_further_away(trained, digits):
    real, other = digits.validation.images, digits.test.images
    noise = torch.randn(other.shape, generator=torch.Generator().manual_seed(0)).float()
    found = [generative_metrics(other + scale * noise, real, trained.net) for scale in (0.0, 0.1, 0.3)]
    for name in ("fid", "kid"):
        assert found[0][name] < found[1][name] < found[2][name]


def test_a_second_run_loads_what_the_first_has_trained(digits, tmp_path, monkeypatch):
    first = train_features(digits, QUICK, folder=tmp_path / "features", progress=False)
    (path,) = (tmp_path / "features").iterdir()  # nothing unfinished is left
    assert path.name.startswith("digits-")
    monkeypatch.setattr("models.features._train", lambda *_: pytest.fail("trained again"))
    second = train_features(digits, QUICK, folder=tmp_path / "features", progress=False)
    assert second.accuracy == first.accuracy
    assert not second.net.training
    torch.testing.assert_close(second.net.state_dict(), first.net.state_dict(), rtol=0, atol=0)


def test_another_recipe_or_other_data_are_trained_anew(digits, tmp_path):
    train_features(digits, QUICK, folder=tmp_path, progress=False)
    train_features(digits, replace(QUICK, seed=1), folder=tmp_path, progress=False)
    fewer = replace(digits, train=Split(*(part[:500] for part in digits.train)))
    train_features(fewer, QUICK, folder=tmp_path, progress=False)
    assert len(list(tmp_path.iterdir())) == 3


def test_an_interrupted_write_leaves_nothing(digits, tmp_path, monkeypatch):
    def stop(state, path):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("torch.save", stop)
    with pytest.raises(KeyboardInterrupt):
        train_features(digits, QUICK, folder=tmp_path, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_the_seed_decides_and_random_numbers_are_the_callers(digits):
    torch.manual_seed(5)
    first = train_features(digits, QUICK, folder=None, progress=False).net
    after = torch.rand(2)
    torch.manual_seed(5)
    torch.testing.assert_close(torch.rand(2), after)
    second = train_features(digits, QUICK, folder=None, progress=False).net
    other = train_features(digits, replace(QUICK, seed=1), folder=None, progress=False).net
    torch.testing.assert_close(first.state_dict(), second.state_dict(), rtol=0, atol=0)
    assert not torch.allclose(first.head.weight, other.head.weight)


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (1, 7, 9)], ids=str)
def test_images_of_any_size(shape):
    assert FeatureNet(shape, 10)(torch.rand(2, *shape)).shape == (2, 64)


@pytest.mark.parametrize("change", [{"num_epochs": 0}, {"batch_size": 0}, {"num_features": 0}, {"lr": 0.0}], ids=str)
def test_recipes_are_checked(change, digits):
    with pytest.raises(ValueError, match=f"`{next(iter(change))}`"):
        train_features(digits, replace(QUICK, **change), folder=None, progress=False)


@needs_fashion_mnist
def test_the_weights_for_fashion_mnist_come_with_the_code(tmp_path, monkeypatch):
    monkeypatch.setattr("models.features._train", lambda *_: pytest.fail("trained anew"))
    data = load("fashion-mnist")
    net, _, accuracy = train_features(data, folder=tmp_path, progress=False)
    assert list(tmp_path.iterdir()) == []
    assert accuracy == pytest.approx(features._accuracy(net, data.validation, 500), abs=1e-3)  # that was in float32
    assert weights_hash(net) == "2a375884028ec3ed31b172799f63b01cbe413de8d49f36b30defad43ccd0d4dd"
    with pytest.raises(pytest.fail.Exception, match="trained anew"):
        train_features(data, folder=tmp_path, committed=False, progress=False)


def test_committed_weights_are_taken_for_their_data_and_recipe_alone(digits, tmp_path, monkeypatch):
    first = train_features(digits, QUICK, folder=tmp_path, progress=False)
    (path,) = tmp_path.iterdir()
    monkeypatch.setattr(features, "_COMMITTED", tmp_path)
    monkeypatch.setattr(features, "_SHA256", {path.name: hashlib.sha256(path.read_bytes()).hexdigest()})
    other = train_features(digits, replace(QUICK, seed=1), folder=None, progress=False)
    monkeypatch.setattr("models.features._train", lambda *_: pytest.fail("trained anew"))
    again = train_features(digits, QUICK, folder=None, progress=False)
    torch.testing.assert_close(again.net.state_dict(), first.net.state_dict(), rtol=0, atol=0)
    assert not torch.equal(other.net.head.weight, first.net.head.weight)
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(ValueError, match="as it was committed, with SHA-256"):
        train_features(digits, QUICK, folder=None, progress=False)
