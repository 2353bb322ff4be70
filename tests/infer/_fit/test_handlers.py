"""The scale of mini-batches, the weights of sites, and what is recorded of an evaluation."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from masked_mean import K, MaskedMeanGuide, N, lengths, masked_mean, normal_mean, still
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule
from torch import nn

from pyro_vnd.distributions import NestedNormal, OrderedMask, OrderedMaskStraightThrough
from pyro_vnd.infer import AutoNested, fit
from pyro_vnd.infer._fit.handlers import EvaluationRecord, ScaleToDataset
from pyro_vnd.infer.schedules import KLWeights


def test_mini_batch_losses_average_to_the_full_loss(y):
    # With the same draw of mu, the mean over a partition into batches is the full loss, exactly.
    guide = AutoNormal(normal_mean)
    guide(y)  # lazy: the first call would draw more
    elbo = Trace_ELBO()

    def loss(rows, scale):
        pyro.set_rng_seed(1)
        with scale:
            return elbo.differentiable_loss(normal_mean, guide, rows).item()

    full = loss(y, ScaleToDataset("data", N, N, KLWeights()))
    parts = [loss(rows, ScaleToDataset("data", N, 10, KLWeights())) for rows in y.split(10)]
    assert full == pytest.approx(sum(parts) / len(parts), rel=1e-12)
    unscaled = [loss(rows, ScaleToDataset("data", 10, 10, KLWeights())) for rows in y.split(10)]
    assert abs(full - sum(unscaled) / len(unscaled)) > 10


def test_a_plate_that_knows_the_full_size_is_not_scaled_twice(y):
    def model(rows):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", N, subsample_size=len(rows)):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=rows)

    with ScaleToDataset("data", N, 10, KLWeights()):
        trace = pyro.poutine.trace(model).get_trace(y[:10])
    assert trace.nodes["y"]["scale"] == N / 10


def test_the_weight_of_latents_scales_those_outside_the_plate_only(y):
    with ScaleToDataset("data", N, N, KLWeights(0.25)):
        trace = pyro.poutine.trace(normal_mean).get_trace(y)
    assert trace.nodes["mu"]["scale"] == 0.25
    assert trace.nodes["y"]["scale"] == 1


def test_parts_of_the_elbo(y):
    # One mask, exact KL: ELBO = log-likelihood of the drawn length - KL(q || p), both known.
    guide = AutoNested(lengths, latents="mean_field")
    record = EvaluationRecord()
    elbo = pyro.infer.TraceMeanField_ELBO()
    guide(y)
    with torch.no_grad():
        guide[0].logits_unconstrained.copy_(torch.tensor([0.0, 1.0, 2.0, 0.5]))
    with record:
        loss = elbo.differentiable_loss(lengths, guide, y).item()
    probs = guide.laws["mask"].probs
    exact_kl = (probs * (probs.log() - math.log(1 / K))).sum().item()
    assert record.log_likelihood + loss == pytest.approx(exact_kl, rel=1e-9)
    candidates = [dist.Normal(float(k), 3.0).log_prob(y).sum().item() for k in range(1, K + 1)]
    assert min(abs(record.log_likelihood - c) for c in candidates) < 1e-9


def test_the_weight_of_lengths_holds_for_masks_inside_the_plate_and_out_and_that_of_latents_outside(y):
    def model(rows):
        pyro.sample("global_mask", OrderedMask.uniform(K))
        pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(rows)):
            pyro.sample("mask", OrderedMask.uniform(K))
            pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(0.0, 1.0), obs=rows)

    with ScaleToDataset("data", 2 * N, N, KLWeights(latents=0.5, lengths=3.0)):
        trace = pyro.poutine.trace(model).get_trace(y)
    scales = {name: trace.nodes[name]["scale"] for name in ("global_mask", "w", "mask", "z", "y")}
    assert scales == {"global_mask": 3.0, "w": 0.5, "mask": 6.0, "z": 2.0, "y": 2.0}


class WeightsOfItsOwn(PyroModule):
    """A mask, a weight, a code and another latent of each row, some of which have weights of their own in the guide."""

    def __init__(self, **weights):
        super().__init__()
        self.loc, self.logits = nn.Parameter(torch.ones(K)), nn.Parameter(torch.linspace(0, 1, K))
        self.weights = weights

    def forward(self, rows):
        pyro.sample("mask", OrderedMaskStraightThrough(0.2, logits=self.logits), infer=self.weights.get("mask"))
        pyro.sample("w", dist.Normal(self.loc, 0.3).to_event(1), infer=self.weights.get("w"))
        with pyro.plate("data", len(rows)):
            code = NestedNormal(self.loc, torch.full((K,), 0.5), self.logits)
            pyro.sample("code", code, infer=self.weights.get("code"))
            pyro.sample("z", dist.Normal(self.loc[0], 0.5), infer=self.weights.get("z"))


def weighted_model(rows):
    pyro.sample("mask", OrderedMask.uniform(K))
    pyro.sample("w", dist.Normal(torch.zeros(K), 1.0).to_event(1))
    with pyro.plate("data", len(rows)):
        pyro.sample("code", NestedNormal(torch.zeros(K), torch.ones(K), torch.zeros(K)))
        pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(0.0, 1.0), obs=rows)


OWN = {
    "mask": {"length_weight": 2.0},
    "w": {"kl_weight": 3.0},
    "code": {"kl_weight": 5.0, "length_weight": 7.0},
    "z": {"kl_weight": 11.0},
}


@pytest.mark.parametrize("batch_size", [None, 10])
def test_weights_of_a_site_multiply_those_of_the_fit(batch_size, y):
    """The KL in the objective, minus that of a fit without weights, is linear in each weight."""

    def kl(own, **arguments):
        arguments = {"num_epochs": 2, "batch_size": batch_size, "optimizer": still, "progress": False} | arguments
        return fit(weighted_model, WeightsOfItsOwn(**own), y, **arguments).kl

    plain = kl({})
    extra = {name: [a - b for a, b in zip(kl({name: {"kl_weight": 2.0}}), plain, strict=True)] for name in OWN}
    lengths = [a - b for a, b in zip(kl({"code": {"length_weight": 2.0}}), plain, strict=True)]
    for epoch in range(2):  # a part's KL is what a second unit of weight adds
        assert min(*(values[epoch] for values in extra.values()), lengths[epoch]) > 1e-3
        assert sum(values[epoch] for values in extra.values()) == pytest.approx(plain[epoch])
        code = extra["code"][epoch] - lengths[epoch]
        weights = KLWeights(latents=0.5, local=0.25, lengths=0.125)
        expected = 0.125 * (2 * extra["mask"][epoch] + 7 * lengths[epoch]) + 0.5 * 3 * extra["w"][epoch]
        expected += 0.25 * (5 * code + 11 * extra["z"][epoch])
        assert kl(OWN, weights=weights)[epoch] == pytest.approx(expected)
    assert OWN["w"] == {"kl_weight": 3.0}  # the user's dict is left alone, step by step


def test_weights_of_a_site_hold_under_other_elbos(y):
    own = {"mask": {"kl_weight": 2.0}, "w": {"kl_weight": 3.0}}

    class Guide(MaskedMeanGuide):
        def forward(self, rows):
            pyro.sample("mask", OrderedMaskStraightThrough(0.2, logits=self.logits), infer=own["mask"])
            pyro.sample("w", dist.Normal(self.loc, 0.3).to_event(1), infer=own["w"])

    arguments = {
        "num_epochs": 3,
        "weights": KLWeights(latents=0.5, lengths=0.25),
        "optimizer": still,
        "progress": False,
    }
    ours = fit(masked_mean, Guide(), y, **arguments)
    assert fit(masked_mean, Guide(), y, elbo=TraceMeanField_ELBO(), **arguments).elbo == pytest.approx(ours.elbo)
    expected = [0.25 * 2 * a + 0.5 * 3 * b for a, b in zip(ours.kl_lengths, ours.kl_latents, strict=True)]
    assert ours.kl == pytest.approx(expected)


def test_laws_are_recorded_with_their_priors(y):
    guide = AutoNested(masked_mean, latents="mean_field")
    record = EvaluationRecord()
    for _ in range(2):
        with record:
            Trace_ELBO(num_particles=2).differentiable_loss(masked_mean, guide, y)
        (name,) = record.laws
        law, prior = record.laws[name]
        assert name == "mask"
        assert isinstance(law, OrderedMaskStraightThrough)
        assert type(prior) is OrderedMask
        torch.testing.assert_close(prior.probs, OrderedMask.geometric(0.5, K).probs)


def test_a_mask_that_the_guide_fixes_has_no_law(y):
    def guide(y):
        pyro.sample("mask", dist.Delta(torch.ones(K), event_dim=1))

    record = EvaluationRecord()
    with record:
        Trace_ELBO().differentiable_loss(lengths, guide, y)
    assert record.laws == record.visible == record.plates == {}
    assert record.log_likelihood.item() == pytest.approx(dist.Normal(float(K), 3.0).log_prob(y).sum().item())


def test_a_plate_for_other_data_is_refused(y):
    def model(rows):
        with pyro.plate("data", 50, subsample_size=len(rows)):
            pyro.sample("y", dist.Normal(0.0, 1.0), obs=rows)

    with (
        pytest.raises(ValueError, match="fit: plate 'data' is for 50 rows, but the data have 40"),
        ScaleToDataset("data", N, 10, KLWeights()),
    ):
        model(y[:10])


def weighted_sites(y, weights):
    with pyro.plate("f", 3):
        w = pyro.sample("w", dist.Normal(2.0, 1.0), infer=weights)
    mask = pyro.sample("mask", OrderedMask(probs=torch.tensor([0.8, 0.1, 0.1])), infer=weights)
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal((w * mask).sum(), 1.0), obs=y)


def test_auto_nested_takes_the_weights_that_sites_of_the_model_have(y):
    kl = {}
    for weight in (None, 0.5, 0.0):
        infer = {} if weight is None else {"kl_weight": weight}
        guide = AutoNested(lambda y, infer=infer: weighted_sites(y, infer), latents="mean_field")
        arguments = {"optimizer": still, "num_epochs": 3, "progress": False}
        kl[weight] = torch.tensor(fit(lambda y, infer=infer: weighted_sites(y, infer), guide, y, **arguments).kl)
    assert kl[None][0] > 0.1
    torch.testing.assert_close(kl[0.5], kl[None] / 2)
    assert (kl[0.0].abs() < 1e-9).all()


@pytest.mark.parametrize("weight", [-2.0, math.nan, math.inf, "2"])
def test_a_weight_that_is_none_is_refused(y, weight):
    def model(y):
        weighted_sites(y, {"kl_weight": weight})

    with pytest.raises(ValueError, match=r"`infer\['kl_weight'\]` of site 'w' must be a finite number >= 0; got "):
        fit(model, AutoNested(model), y, num_epochs=1, progress=False)
