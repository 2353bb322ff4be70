"""What a model hides, by `poutine.mask` or `law.mask`, or scales, is so in the guide, under each ELBO."""

from contextlib import nullcontext
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from masked_mean import still
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO, config_enumerate
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from torch.distributions import kl_divergence

from pyro_vnd.distributions import NestedNormal, OrderedMask
from pyro_vnd.infer import AutoNested, NestedELBO, OptimizerSettings, cosine_to_zero, fit, module_local_params
from pyro_vnd.infer._model_sites import masked_like, visible_entries

mean_field = partial(AutoNested, latents="mean_field")

N, K = 12, 4
KEEP = torch.arange(N) < 5
Y = torch.linspace(1.0, 3.0, N, dtype=torch.float64)


def all_latents(y, mask=lambda law: law):
    """A mask, numbers that may be cut, a number, and a positive number of each row."""
    rows = len(y)
    length = pyro.sample("mask", mask(OrderedMask.uniform(K).expand([rows]))).sum(-1)
    code = pyro.sample("code", mask(NestedNormal(torch.zeros(K), torch.ones(K), torch.zeros(rows, K))))
    loc = length + code.sum(-1) + pyro.sample("z", mask(dist.Normal(torch.zeros(rows), 1.0)))
    scale = pyro.sample("s", mask(dist.LogNormal(torch.zeros(rows), 1.0)))
    pyro.sample("y", mask(dist.Normal(loc, scale)), obs=y)


def by_handler(y, keep):
    with pyro.plate("data", len(y)), poutine.mask(mask=keep):
        all_latents(y)


def by_law(y, keep):
    with pyro.plate("data", len(y)):
        all_latents(y, lambda law: law.mask(keep))


def by_both(y, keep):
    rows = torch.arange(len(y))
    with pyro.plate("data", len(y)), poutine.mask(mask=keep | (rows == 7)):
        all_latents(y, lambda law: law.mask(keep | (rows == 9)))


def without_them(y, keep):
    by_handler(y[keep], torch.tensor(True))


def called(model, *args, value=0.4):
    """A guide whose parameters all have one value, so that rows are alike."""
    guide = mean_field(model)
    with module_local_params(guide), torch.no_grad():
        guide(*args)
        for i, parameter in enumerate(guide.parameters()):
            parameter.copy_(value + 0.1 * i + torch.linspace(0, 1, parameter.shape[-1]) * (parameter.dim() > 1))
    return guide


@pytest.mark.parametrize("model", [by_handler, by_law, by_both])
def test_the_guide_scores_visible_rows_alone(model):
    """Under Pyro's ELBOs it is the guide that has to leave them out; exact for each draw."""
    guide = called(model, Y, KEEP)
    with module_local_params(guide):
        trace = poutine.trace(guide).get_trace(Y, KEEP)
        trace.compute_log_prob()
        for name in ("mask", "code", "z", "s", "z_unconstrained", "s_unconstrained"):
            site = trace.nodes[name]
            assert site["log_prob"][~KEEP].abs().max() == 0, name
            if name != "z":  # a point of density one
                assert site["log_prob"][KEEP].abs().min() > 0, name
        trace = poutine.trace(guide).get_trace(Y, ~KEEP)  # the mask of the call, not of the first one
        trace.compute_log_prob()
        assert trace.nodes["mask"]["log_prob"][KEEP].abs().max() == 0


@pytest.mark.parametrize("elbo", [NestedELBO, TraceMeanField_ELBO, Trace_ELBO])
@pytest.mark.parametrize("model", [by_handler, by_law, by_both])
def test_the_elbo_is_that_of_the_visible_rows(model, elbo):
    # The same draws for the visible rows: the noise of hidden ones is drawn after theirs, so by hand.
    few, all_rows = called(without_them, Y, KEEP), called(model, Y, KEEP)
    with module_local_params(few, all_rows):
        drawn = poutine.trace(few).get_trace(Y, KEEP)
        values = {name: site["value"] for name, site in drawn.iter_stochastic_nodes()}

        class Given(poutine.messenger.Messenger):
            def _pyro_post_sample(self, msg):
                if msg["name"] in values:
                    msg["value"][: KEEP.sum()] = values[msg["name"]]

        def loss(model, guide):
            with torch.no_grad(), Given():
                return elbo().loss(model, guide, Y, KEEP)

        expected = loss(without_them, few)
        assert loss(model, all_rows) == pytest.approx(expected, rel=1e-5)
        assert loss(model, all_rows) != pytest.approx(elbo().loss(model, all_rows, Y, ~KEEP), rel=1e-2)


@pytest.mark.parametrize("model", [by_handler, by_law, by_both])
def test_parts_are_those_of_the_visible_rows(model):
    guide, elbo = called(model, Y, KEEP), NestedELBO()
    with module_local_params(guide), torch.no_grad():
        elbo.loss(model, guide, Y, KEEP)
    visible = KEEP.sum()
    mask, code = guide[0]._law(), guide[1]._law()
    prior = NestedNormal(torch.zeros(K), torch.ones(K), torch.zeros(K))
    torch.testing.assert_close(elbo.kl["mask"], visible * kl_divergence(mask, OrderedMask.uniform(K))[0])
    torch.testing.assert_close(elbo.kl["code"], visible * kl_divergence(code, prior)[0])
    lengths = visible * kl_divergence(code.mask_law, prior.mask_law)[0]
    torch.testing.assert_close(elbo.kl_lengths["code"], lengths)


@pytest.mark.parametrize(
    ("guide", "elbo"),
    [(mean_field, NestedELBO), (mean_field, TraceMeanField_ELBO), (mean_field, Trace_ELBO), (AutoNormal, NestedELBO)],
)
def test_latents_of_hidden_rows_stay_where_they_are(guide, elbo):
    def model(y, keep):
        with pyro.plate("data", len(y)), poutine.mask(mask=keep):
            z, s = pyro.sample("z", dist.Normal(0.0, 1.0)), pyro.sample("s", dist.LogNormal(0.0, 1.0))
            if guide is mean_field:
                pyro.sample("mask", OrderedMask.uniform(K))
            pyro.sample("y", dist.Normal(z, s), obs=y)

    made = guide(model)
    result = fit(model, made, (Y, KEEP), num_epochs=200, lr=0.05, elbo=elbo(), progress=False)
    normal = made[0] if guide is mean_field else made
    for scale in (normal.scales.z, normal.scales.s):
        torch.testing.assert_close(scale[~KEEP], torch.full([N - 5], 0.1))
        assert (scale[KEEP] > 0.2).all()
    assert result.elbo[-1] < 0


def test_an_event_that_is_hidden_in_part_costs_what_is_seen():
    keep = torch.rand(N, 3, generator=torch.Generator().manual_seed(0)) < 0.5

    def model(y):
        pyro.sample("mask", OrderedMask.uniform(K))
        with pyro.plate("data", N):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).expand([N, 3]).mask(keep).to_event(1))
            s = pyro.sample("s", dist.Gamma(torch.ones(3), 1.0).expand([N, 3]).mask(keep).to_event(1))
            pyro.sample("y", dist.Normal(z, s).mask(keep).to_event(1), obs=y)

    for elbo in (NestedELBO, Trace_ELBO):
        guide = mean_field(model)
        result = fit(model, guide, torch.randn(N, 3), num_epochs=150, lr=0.05, elbo=elbo(), progress=False)
        assert result.elbo[-1] < 0
        for values in (guide[1].scales.z, guide[1].scales.s, guide[1].locs.s):
            hidden = values[~keep]
            torch.testing.assert_close(hidden, hidden[:1].expand_as(hidden))
            assert (values[keep] - hidden[0]).abs().min() > 1e-3


def test_an_event_that_is_hidden_as_a_whole_hides_its_entries():
    keep = torch.tensor([True, False, True])
    law = dist.Normal(torch.zeros(3, 2), 1.0).to_event(1)
    for fn, mask in ((law.mask(keep), None), (law, keep), (law.mask(keep), torch.tensor([True, True, False]))):
        visible = visible_entries({"fn": fn, "mask": mask})
        expected = keep if mask is None or mask is keep else keep & mask
        assert torch.equal(visible.expand(3, 2), expected[:, None].expand(3, 2))
    assert visible_entries({"fn": law, "mask": None}) is None
    inside = dist.Normal(torch.zeros(3, 2), 1.0).mask(torch.eye(3, 2).bool()).to_event(1)
    assert torch.equal(visible_entries({"fn": inside, "mask": keep}), torch.eye(3, 2).bool() & keep[:, None])


def test_a_law_that_is_no_event_of_entries_keeps_no_mask_of_them():
    inside = dist.Normal(torch.zeros(3), 1.0).mask(torch.tensor([True, False, True])).to_event(1)
    joint = dist.MultivariateNormal(torch.zeros(3), torch.eye(3))
    assert masked_like(joint, inside) is joint
    split = masked_like(dist.Normal(torch.ones(3), 2.0).to_event(1), inside)
    expected = dist.Normal(torch.ones(3), 2.0).log_prob(torch.zeros(3))[[0, 2]].sum()
    torch.testing.assert_close(split.log_prob(torch.zeros(3)), expected)


@pytest.mark.parametrize("mask", [False, torch.zeros(N, dtype=torch.bool)])
def test_a_model_that_hides_all_rows_costs_nothing(mask):
    def model(y):
        pyro.sample("global", OrderedMask.uniform(K))
        with pyro.plate("data", len(y)), poutine.mask(mask=mask):
            all_latents(y)

    for elbo in (NestedELBO(), TraceMeanField_ELBO(), Trace_ELBO()):
        guide = mean_field(model)
        result = fit(model, guide, Y, num_epochs=2, optimizer=still, elbo=elbo, progress=False)
        assert result.elbo == pytest.approx([0.0, 0.0], abs=1e-6)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("elbo", [NestedELBO, TraceMeanField_ELBO, TraceEnum_ELBO])
def test_a_shared_law_is_that_of_the_visible_rows(elbo, nested):
    """q = softmax of the mean log-likelihood of the visible rows; straight through to .04 in total variation."""
    keep = torch.arange(40) < 8

    def model(y, keep):
        groups = pyro.plate("groups", 2, dim=-2) if nested else nullcontext()
        with groups, pyro.plate("data", len(y), dim=-1), poutine.mask(mask=keep):
            mask = pyro.sample("mask", OrderedMask.uniform(K))
            pyro.sample("y", dist.Normal(mask.sum(-1), 1.0), obs=y)

    y = torch.full((40,), 2.0)
    right = dist.Normal(torch.arange(1.0, K + 1), 1.0).log_prob(y[0]).softmax(-1)
    y = torch.where(keep, y, 4.0)
    if elbo is TraceEnum_ELBO:
        model = config_enumerate(model)
    guide = mean_field(model, shared_plates=["data"])
    objective = elbo(max_plate_nesting=2 if nested else 1)
    how = {
        "num_epochs": 600,
        "lr": 0.05,
        "optimizer": OptimizerSettings(lr_schedule=cosine_to_zero()),
        "progress": False,
    }
    result = fit(model, guide, (y, keep), elbo=objective, **how)
    off = (guide.laws["mask"].probs - right).abs().sum(-1).max() / 2
    assert off < (1e-3 if elbo is TraceEnum_ELBO else 0.04)
    assert result.lengths["mask"].mean == pytest.approx(guide.laws["mask"].mean_length.mean().item(), abs=0.02)


def test_summaries_leave_hidden_rows_out():
    def model(y, keep):
        with pyro.plate("data", len(y)), poutine.mask(mask=keep):
            mask = pyro.sample("mask", OrderedMask.uniform(K))
            pyro.sample("y", dist.Normal(mask.sum(-1), 0.3), obs=y)

    y = torch.where(KEEP, 1.0, 4.0)
    guide = mean_field(model)
    result = fit(model, guide, (y, KEEP), num_epochs=150, lr=0.2, progress=False)
    summary, law = result.lengths["mask"], guide.laws["mask"]
    assert summary.mean == pytest.approx(law.mean_length[KEEP].mean().item(), abs=0.02)
    assert summary.mode == 1
    assert law.mean_length[~KEEP].mean() == pytest.approx(2.5)
    assert summary.kl == pytest.approx(kl_divergence(law, OrderedMask.uniform(K))[KEEP].mean().item(), abs=0.05)


@pytest.mark.parametrize("elbo", [NestedELBO, TraceMeanField_ELBO, Trace_ELBO])
@pytest.mark.parametrize("size", [None, 2 * N])
def test_a_scale_of_the_model_holds_in_the_guide_once(elbo, size):
    """The guide is the prior, and no data: the ELBO is zero on each draw whatever the scales, of plates or not."""

    def model(i):
        with pyro.plate("data", size or N, subsample=i), poutine.scale(scale=3.0):
            pyro.sample("code", NestedNormal(torch.zeros(K), torch.ones(K), torch.zeros(K)))
            pyro.sample("mask", OrderedMask.geometric(0.5, K))

    guide = mean_field(model)
    with module_local_params(guide), torch.no_grad():
        assert float(elbo().loss(model, guide, torch.arange(N))) == pytest.approx(0, abs=1e-4)
        guide[0].loc_unconstrained.add_(1.0)
        loss = NestedELBO().loss(model, guide, torch.arange(N))
    assert loss == pytest.approx(3 * (size or N) * 0.5 * (4 + 3 + 2 + 1) / 4, rel=1e-4)


def test_what_a_guide_hides_itself_does_not_count():
    def model():
        with pyro.plate("data", N):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    def guide():
        with pyro.plate("data", N), poutine.mask(mask=KEEP), poutine.scale(scale=7.0):
            pyro.sample("z", dist.Normal(1.0, 1.0).expand([N]).mask(~KEEP))

    assert NestedELBO().loss(model, guide) == pytest.approx(N * 0.5)


def test_a_latent_drawn_with_others_cannot_be_hidden():
    def model(y, keep):
        with pyro.plate("data", len(y)), poutine.mask(mask=keep):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match=r"hides part of site 'z', which the guide draws with others at \['_Auto"):
        fit(model, AutoMultivariateNormal(model), (Y, KEEP), num_epochs=1, progress=False)
    guide = AutoMultivariateNormal(model)
    assert len(fit(model, guide, (Y, KEEP | True), num_epochs=1, progress=False).elbo) == 1
