"""The module for other loops has the loss and the gradient of `fit`."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from masked_mean import MaskedMeanGuide, N, make_net, masked_mean, normal_mean
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoNormal

from pyro_vnd.distributions import OrderedMask
from pyro_vnd.infer import AutoNested, Callback, KLWeights, MiniBatchELBO, NestedELBO, fit
from pyro_vnd.nn import NestedClassifier


@pytest.mark.parametrize("elbo", [NestedELBO, Trace_ELBO])
@pytest.mark.parametrize("weights", [KLWeights(), KLWeights(0.1, 1.0, 0.5)], ids=["bayes", "cold"])
def test_loss_and_gradient_are_those_of_fit(elbo, weights, y):
    """In the first step, with the random numbers of it."""
    found = {}

    class Keep(Callback):
        def on_fit_start(self, run):
            torch.manual_seed(3)

        def on_step(self, run):
            found["elbo"] = run.last_step()["elbo"] / N
            found["gradient"] = [p.grad.clone() for p in run.guide.parameters()]
            run.stop()

    guide, batches = MaskedMeanGuide(), [(y[:15],), (y[15:30],)]
    arguments = {"num_data": N, "elbo": elbo(), "weights": weights, "num_epochs": 1, "progress": False}
    fit(masked_mean, guide, batches[:1], callbacks=[Keep()], **arguments)
    other = MaskedMeanGuide()
    loss = MiniBatchELBO(masked_mean, other, batches[1], num_data=N, elbo=elbo(), weights=weights)
    torch.manual_seed(3)
    value = loss(*batches[0])
    value.backward()
    assert -value.item() == pytest.approx(found["elbo"], rel=1e-12)
    for mine, its in zip(other.parameters(), found["gradient"], strict=True):
        torch.testing.assert_close(mine.grad * N, its, rtol=1e-10, atol=1e-12)


def test_batches_are_unbiased_for_whole_data(y):
    """With a point for a guide the loss of whole data is the mean over the batches of an epoch."""
    loss = MiniBatchELBO(normal_mean, AutoDelta(normal_mean), y, num_data=N)
    parts = torch.stack([loss(part) for part in y.split(10)])
    assert parts.mean().item() == pytest.approx(loss(y).item(), rel=1e-12)
    assert parts.std() > 0.01  # power: batches do differ


def test_a_mapping_goes_by_name():
    net = make_net()
    x, labels = torch.randn(N, 3), torch.randint(2, (N,))

    class ByName(NestedClassifier):
        def forward(self, images, labels=None):
            return super().forward(images, labels)

    class Guide(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, images, labels=None):
            return self.net.guide(images)

    loss = MiniBatchELBO(ByName(net), Guide(), {"images": x, "labels": labels}, num_data=N)
    assert torch.isfinite(loss(images=x[:4], labels=labels[:4]))


def test_a_guide_whose_latents_know_the_lengths_learns_its_laws():
    torch.manual_seed(0)
    x = torch.randn(200, 3)
    t = x[:, 0] + 0.3 * torch.randn(200)

    guide = AutoNested(regression)
    loss = MiniBatchELBO(regression, guide, (x[:50], t[:50]), num_data=200)
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.05, betas=(0.9, 0.95))
    for _ in range(80):
        for start in range(0, 200, 50):
            optimizer.zero_grad()
            loss(x[start : start + 50], t[start : start + 50]).backward()
            optimizer.step()
    assert guide.laws["mask"].probs[0] > 0.9
    assert len(pyro.get_param_store()) == 0


def regression(x, t):
    mask = pyro.sample("mask", OrderedMask.uniform(3))
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("t", dist.Normal(x @ (mask * w), 0.3), obs=t)


def test_bad_arguments(y):
    for num_data in (3, 0, -5, 2.5, True):
        with pytest.raises(ValueError, match=r"`num_data` must be the number of rows of all data.* not below the 5"):
            MiniBatchELBO(normal_mean, AutoNormal(normal_mean), y[:5], num_data=num_data)
    with pytest.raises(ValueError, match="MiniBatchELBO: argument `weights` must be numbers"):
        MiniBatchELBO(normal_mean, AutoNormal(normal_mean), y, num_data=N, weights=KLWeights(lambda t: t))
    with pytest.raises(ValueError, match="no site of the model is in a plate named 'rows'"):
        MiniBatchELBO(normal_mean, AutoNormal(normal_mean), y[:5], num_data=N, plate="rows")
