"""The nested classifier: widths are prefixes, and training on real digits teaches them."""

import pytest
import torch
from pyro import poutine
from torch.nn.functional import relu

from models.datasets import load
from models.masked_perceptron import MaskedPerceptron
from pyro_vnd.diagnostics import classification_metrics
from pyro_vnd.infer import KLWeights, fit, module_local_params


@pytest.fixture
def untrained():
    model = MaskedPerceptron(64, 10, hidden=(16, 8))
    guide = model.guide
    x = torch.rand(5, 64)
    with module_local_params(guide):
        guide(x, torch.zeros(5, dtype=torch.long))
    return model, guide, x


@pytest.mark.parametrize("width", [0.25, 0.5, 1.0])
def test_a_width_equals_the_net_that_is_physically_cut(width, untrained):
    model, guide, x = untrained
    torch.manual_seed(1)
    probs = model.predict(x, [width], num_samples=1)[0, 0]
    torch.manual_seed(1)
    with module_local_params(guide), torch.no_grad():
        w = {name: site["value"] for name, site in poutine.trace(guide).get_trace(x).iter_stochastic_nodes()}
    first, second = round(16 * width), round(8 * width)
    units = relu(x @ w["weight1"][:, :first] + w["bias1"][:first])
    units = relu(units @ w["weight2"][:first, :second] + w["bias2"][:second])
    logits = units @ w["weight3"][:second] + w["bias3"]
    torch.testing.assert_close(probs, logits.softmax(-1))


def test_every_image_has_a_mask_of_its_own(untrained):
    _, guide, _ = untrained
    with module_local_params(guide):
        masks = guide(torch.rand(100, 64))["mask1"]
    assert masks.shape == (100, 16)
    assert len(masks.sum(-1).unique()) > 5


def test_learns_real_digits_at_every_width():
    data = load("digits", flatten=True)
    train, test = ([split.images.double(), split.labels] for split in (data.train, data.validation))
    model = MaskedPerceptron(64, 10, hidden=(32, 32))
    guide = model.guide
    result = fit(
        model, guide, train, num_epochs=40, batch_size=128, lr=0.02, weights=KLWeights(latents=0.05), progress=False
    )
    assert result.elbo[-1] > result.elbo[0]
    torch.manual_seed(0)
    probs = model.predict(test[0], [0.25, 1.0], num_samples=10).mean(1)
    narrow, full = (classification_metrics(p, test[1])["accuracy"] for p in probs)
    assert narrow > 0.75  # chance is .1
    assert full > 0.9
    # The prior is geometric, the same for all; data have moved both laws towards wider.
    prior = 0.95 ** torch.arange(32)
    for law in guide.laws.values():
        assert (law.keep_probs[0, 1:8] > prior[1:8]).all()


@pytest.mark.parametrize("width", [0.0, 1.5, -1.0])
def test_widths_are_checked(width, untrained):
    model, _, x = untrained
    with pytest.raises(ValueError, match=r"`widths` must be fractions in \(0, 1\]; got \["):
        model.predict(x, [0.5, width])
