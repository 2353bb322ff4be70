"""Where masks come from: shares of the laws, budgets and full width, in nets and codes."""

from functools import cached_property

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from masked_mean import K, N, make_net, still
from pyro.nn import PyroModule
from torch import nn
from torch.distributions import kl_divergence

from pyro_vnd.distributions import OrderedMask, OrderedMaskStraightThrough
from pyro_vnd.infer import KLWeights, MaskSchedule, NestedELBO, fit
from pyro_vnd.infer._fit.held_out import mean_log_likelihood
from pyro_vnd.infer._fit.mask_sources import _CutCodes
from pyro_vnd.nn import NestedClassifier, Width


@pytest.mark.parametrize("num_particles", [1, 3])
@pytest.mark.parametrize("mask_per", ["example", "batch"])
def test_lengths_are_paid_for_where_masks_are_learned_only(mask_per, num_particles, labelled):
    net = make_net(mask_per)
    schedule = MaskSchedule(learned=0.25, budget=0.5, full=0.25, num_particles=num_particles)
    arguments = {"schedule": schedule, "optimizer": still, "progress": False}
    epochs = 20 if mask_per == "example" else 200 if num_particles == 1 else 70
    result = fit(NestedClassifier(net), net.guide, labelled, num_epochs=epochs, **arguments)
    width = net.widths["hidden"]
    kl = kl_divergence(width.law, width.prior).item() / (1 if mask_per == "example" else N)
    shares = torch.tensor(result.kl_lengths) / kl
    assert abs(shares.mean().item() - 0.25) < 3 * (0.25 * 0.75 / (20 * N if mask_per == "example" else 400)) ** 0.5
    assert list(result.lengths) == ["hidden.mask"]


@pytest.mark.parametrize("sliced", [False, True])
def test_every_width_is_trained_and_a_batch_has_one(sliced, labelled):
    net = make_net("batch")
    seen = []

    def note(layer, args):
        width = net.widths["hidden"]
        seen.append(width.kept if width.mask is None else int(width.mask.sum()))

    net.net[-1].register_forward_pre_hook(note)
    schedule = MaskSchedule(learned=0.0, budget=0.75, full=0.25, sliced=sliced)
    arguments = {"schedule": schedule, "progress": False}
    result = fit(NestedClassifier(net), net.guide, labelled, num_epochs=100, **arguments)
    seen = seen[1:]  # the first call, before the first step, is free
    assert set(seen) == {2, 4, 6, 8}
    assert 25 <= seen.count(8) <= 65  # 0.25 + 0.75 / 4 of 100
    assert sum(result.kl_lengths) == 0


@pytest.mark.parametrize("num_particles", [1, 3])
@pytest.mark.parametrize("mask_per", ["example", "batch"])
def test_sliced_particles_estimate_the_elbo_averaged_over_widths(mask_per, num_particles, labelled):
    net = make_net(mask_per)
    model, guide, probs = NestedClassifier(net), net.guide, torch.tensor([0.4, 0.3, 0.2, 0.1])
    schedule = MaskSchedule(0.0, 1.0, 0.0, OrderedMask(probs=probs), num_particles, sliced=True)
    arguments = {"schedule": schedule, "optimizer": still, "elbo": NestedELBO(local_reparam=True), "progress": False}
    result = fit(model, guide, labelled, num_epochs=200, **arguments)
    expected = {"elbo": 0.0, "kl_latents": 0.0}
    for width, prob in zip((0.25, 0.5, 0.75, 1.0), probs, strict=True):
        with net.cut(width, sliced=True):
            law = OrderedMask(probs=(torch.arange(1, 5) == 4 * width).double())
            only = MaskSchedule(0.0, 1.0, 0.0, law, sliced=True)
            at_width = fit(model, guide, labelled, num_epochs=50, **arguments | {"schedule": only})
        for name in expected:
            expected[name] += prob.item() * sum(getattr(at_width, name)) / 50
    for name, value in expected.items():
        values = torch.tensor(getattr(result, name))
        error = (values.std() / 200**0.5).item()
        assert abs(values.mean().item() - value) < 4 * error + 0.003
        assert abs(values.mean().item() - 1.2 * value) > 4 * error + 0.003  # the check would see a wrong weight


def test_systematic_particles_have_less_variance(labelled):
    net, variances = make_net(), {}
    for num_particles in (1, 4):
        schedule = MaskSchedule(0.0, 1.0, 0.0, num_particles=num_particles, sliced=True)
        arguments = {
            "schedule": schedule,
            "optimizer": still,
            "elbo": NestedELBO(local_reparam=True),
            "progress": False,
        }
        result = fit(NestedClassifier(net), net.guide, labelled, num_epochs=100, **arguments)
        variances[num_particles] = torch.tensor(result.kl_latents).var().item()
    assert variances[4] < 1e-3 * variances[1]  # each step has every width once; independent draws would give a quarter


def test_a_mask_schedule_makes_narrow_widths_useful(labelled):
    # One mask for the whole data set: left alone, its law ends at one length, and the narrowest net is never trained.
    narrow = {}
    for masks in (None, MaskSchedule()):
        net = make_net("batch")
        with torch.no_grad():
            net.widths["hidden"].logits.copy_(torch.tensor([-6.0, -6.0, -6.0, 0.0]))
        model = NestedClassifier(net)
        fit(
            model,
            net.guide,
            labelled,
            num_epochs=100,
            lr=0.05,
            weights=KLWeights(latents=0.1),
            schedule=masks,
            progress=False,
        )
        with net.cut(0.25):
            narrow[masks] = mean_log_likelihood(model, net.guide, list(labelled), N)
    assert narrow[MaskSchedule()] > narrow[None] + 0.1


class MaskedRows(PyroModule):
    """A model with a mask of its own for each row, perhaps beside a nested net, and its guide."""

    def __init__(self, net=None, wrap=lambda law: law):
        super().__init__()
        self.net, self.wrap, self.seen = net, wrap, []
        self.logits = nn.Parameter(torch.tensor([1.0, 0.0, -1.0, 0.5]))

    def forward(self, x, y):
        rows = pyro.plate("data", len(x), dim=-1)
        if self.net is not None:
            self.net(x, plate=rows)
        with rows:
            mask = pyro.sample("code", self.wrap(OrderedMask.uniform(K)))
            self.seen.append(mask.detach().sum(-1))
            pyro.sample("y", dist.Normal(mask.sum(-1), 1.0), obs=y.double())

    @cached_property
    def guide(self):
        return RowsGuide(self)


class RowsGuide(PyroModule):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, y):
        rows = pyro.plate("data", len(x), dim=-1)
        if self.model.net is not None:
            self.model.net.guide(x, plate=rows)
        with rows:
            pyro.sample("code", self.model.wrap(OrderedMaskStraightThrough(0.2, logits=self.model.logits)))


def test_masks_of_a_model_in_the_plate_of_the_data_are_cut(labelled):
    model = MaskedRows()
    schedule = MaskSchedule(learned=0.25, budget=0.5, full=0.25)
    result = fit(model, model.guide, labelled, num_epochs=50, schedule=schedule, optimizer=still, progress=False)
    law = OrderedMask(logits=model.logits.detach())
    share = sum(result.kl_lengths) / 50 / kl_divergence(law, OrderedMask.uniform(K)).item()
    assert abs(share - 0.25) < 3.5 * (0.25 * 0.75 / (50 * N)) ** 0.5
    # The lengths that the model sees are the mixture, those on record the law itself.
    seen = torch.bincount(torch.cat(model.seen[1:]).long(), minlength=K + 1)[1:]
    mixture = 0.25 * law.probs + 0.125 + torch.tensor([0.0, 0, 0, 0.25])
    z = (seen - 50 * N * mixture) / (50 * N * mixture * (1 - mixture)).sqrt()
    assert z.abs().max() < 3.5
    assert (seen - 50 * N * law.probs).abs().max() > 3.5 * (50 * N) ** 0.5
    assert result.lengths["code"].mean == pytest.approx(law.mean_length.item())


@pytest.mark.parametrize(("num_latents", "num_blocks"), [(8, 32), (16, 8), (32, 16), (3, 2), (54, 12), (90, 20)])
def test_a_budget_keeps_as_many_of_a_code_as_of_the_blocks_of_a_net(num_latents, num_blocks):
    """Also where float32 puts half a block just below the half, as 7 / 12 of 54."""
    fractions = torch.arange(num_blocks + 1, dtype=torch.float32) / num_blocks
    with poutine.trace() as trace, _CutCodes(fractions, {"code"}, "data"), pyro.plate("data", len(fractions)):
        pyro.sample("code", OrderedMask.uniform(num_latents))
    width = Width("hidden", num_latents)
    kept = [width.kept_blocks(fraction, rounding="nearest") for fraction in fractions[1:].tolist()]
    assert trace.trace.nodes["code"]["fn"].given.lengths.tolist() == [0, *kept]


def test_masks_of_nets_are_cut_once_beside_those_of_the_model(labelled):
    net = make_net()
    model = MaskedRows(net)
    schedule = MaskSchedule(learned=0.25, budget=0.5, full=0.25)
    arguments = {"schedule": schedule, "optimizer": still, "progress": False}
    result = fit(model, model.guide, labelled, num_epochs=50, **arguments)
    width = net.widths["hidden"]
    kl = kl_divergence(width.law, width.prior).item()
    kl += kl_divergence(OrderedMask(logits=model.logits.detach()), OrderedMask.uniform(K)).item()
    share = sum(result.kl_lengths) / 50 / kl
    assert abs(share - 0.25) < 3.5 * (0.25 * 0.75 / (50 * N)) ** 0.5
    assert set(result.lengths) == {"hidden.mask", "code"}


def test_masks_that_are_wrapped_are_not_cut(labelled):
    model = MaskedRows(wrap=lambda law: law.mask(torch.tensor(True)))
    with pytest.raises(ValueError, match="`schedule` needs a NestedNet in model or guide"):
        fit(model, model.guide, labelled, num_epochs=1, schedule=MaskSchedule(), progress=False)
