"""Parts of the automatic guide for ordered numbers that may be cut and for soft masks."""

import copy
import itertools
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from masked_mean import still
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO, config_enumerate
from torch.distributions import kl_divergence

from pyro_vnd.distributions import NestedAutoregressive, NestedNormal, OrderedMask, RelaxedOrderedMask
from pyro_vnd.infer import (
    AutoNested,
    MaskSchedule,
    NestedELBO,
    OptimizerSettings,
    cosine_to_zero,
    fit,
    module_local_params,
)

mean_field = partial(AutoNested, latents="mean_field")

ELBOS = [NestedELBO, TraceMeanField_ELBO, Trace_ELBO]
NOISE = 0.5


def regression(num_inputs, length=1):
    generator = torch.Generator().manual_seed(num_inputs)
    x = torch.randn(12, num_inputs, generator=generator)
    return x, x[:, :length].sum(-1) + NOISE * torch.randn(12, generator=generator)


def weights(x, y):
    num_inputs = x.shape[-1]
    w = pyro.sample("w", NestedNormal(torch.zeros(num_inputs), 2 * torch.ones(num_inputs), torch.zeros(num_inputs)))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal((x * w).sum(-1), NOISE), obs=y)


def bound(x, y, loc, scale, logits):
    """ELBO by enumeration: E (y - x w)^2 = (y - x m)^2 + x^2 s^2 for each length."""
    k = x.shape[-1]
    kept = torch.ones(k, k).tril()
    misfit = (y - (kept * loc) @ x.mT) ** 2 + (kept * scale**2) @ (x**2).mT
    likelihood = (-0.5 * misfit / NOISE**2 - dist.Normal(0.0, NOISE).log_prob(torch.tensor(0.0)).neg()).sum(-1)
    cost = kept @ kl_divergence(dist.Normal(loc, scale), dist.Normal(0.0, 2.0))
    log_q = logits.log_softmax(-1)
    return (log_q.exp() * (likelihood - cost - log_q - torch.tensor(float(k)).log())).sum()


@pytest.mark.parametrize("num_inputs", [2, 3])
def test_weights_that_know_their_length_end_at_the_best_bound(num_inputs):
    x, y = regression(num_inputs)
    free = [torch.zeros(num_inputs, dtype=torch.get_default_dtype(), requires_grad=True) for _ in range(3)]
    optimizer = torch.optim.LBFGS(free, max_iter=500, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = -bound(x, y, free[0], free[1].exp(), free[2])
        loss.backward()
        return loss

    optimizer.step(closure)
    best = bound(x, y, free[0], free[1].exp(), free[2]).item()
    guide = mean_field(weights)
    elbo = NestedELBO(num_particles=10, vectorize_particles=True, max_plate_nesting=1)
    fit(
        weights,
        guide,
        (x, y),
        num_epochs=800,
        lr=0.1,
        optimizer=OptimizerSettings(lr_schedule=cosine_to_zero()),
        elbo=elbo,
        progress=False,
    )
    part = guide[0]
    found = bound(x, y, part.loc.detach(), part.scale.detach(), part.logits.detach()).item()
    assert best - 0.15 < found < best + 1e-3
    exact = free[2].detach().softmax(-1)
    assert 0.05 < exact[0] < 0.95
    assert (guide.laws["w"].probs - exact).abs().sum() / 2 < 0.08


@pytest.mark.parametrize("elbo", ELBOS)
def test_each_elbo_is_on_average_the_bound(elbo):
    """To five standard errors of the mean of 2,000 draws."""
    x, y = regression(3)
    guide = mean_field(weights)
    with module_local_params(guide), torch.no_grad():
        guide(x, y)
        part = guide[0]
        part.loc_unconstrained.fill_(0.4)
        part.scale_unconstrained.fill_(-1.0)
        part.logits_unconstrained.copy_(torch.arange(3.0) / 2)
        losses = torch.tensor([float(elbo().loss(weights, guide, x, y)) for _ in range(2000)])
        expected = -bound(x, y, part.loc, part.scale, part.logits)
    error = losses.std() / 2000**0.5
    assert 0 < error < 0.5
    assert (losses.mean() - expected).abs() < 5 * error


def test_lengths_and_numbers_have_weights_of_their_own():
    def model():
        pyro.sample("w", NestedNormal(torch.zeros(3), torch.ones(3), torch.zeros(3)), infer={"length_weight": 5.0})

    guide, elbo = mean_field(model), NestedELBO()
    with module_local_params(guide), torch.no_grad():
        guide()
        guide[0].loc_unconstrained.add_(1.0)
        guide[0].logits_unconstrained.add_(torch.arange(3.0))
        loss = elbo.loss(model, guide)
    lengths = elbo.kl_lengths["w"].item()
    assert lengths > 0.1
    assert loss == pytest.approx(elbo.kl["w"].item() + 4 * lengths)


def autoregressive(x):
    return 0.5 * torch.nn.functional.pad(x[..., :-1], (1, 0)), 0.7 * torch.ones_like(x)


PRIORS = {
    "normal": lambda: NestedNormal(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.5, 1.0, 2.0]), torch.arange(3.0)),
    "impossible": lambda: NestedNormal(torch.zeros(3), torch.ones(3), probs=torch.tensor([0.5, 0.0, 0.5])),
    "autoregressive": lambda: NestedAutoregressive(autoregressive, torch.arange(3.0)),
}


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("prior", PRIORS)
def test_it_starts_at_the_prior_in_a_plate(prior, shared):
    prior = PRIORS[prior]()

    def model(y):
        with pyro.plate("groups", 2, dim=-2), pyro.plate("data", len(y), dim=-1):
            code = pyro.sample("code", prior)
            pyro.sample("y", dist.Normal(code.sum(-1), 1.0), obs=y)

    y = torch.linspace(-1, 1, 5)
    guide = mean_field(model, shared_plates=["data"] if shared else [])
    assert guide(y)["code"].shape == (2, 5, 3)
    given = prior.given(torch.zeros(3))
    torch.testing.assert_close(guide[0].loc, given.loc.expand(2, 5, 3))
    torch.testing.assert_close(guide[0].scale, given.scale.expand(2, 5, 3))
    assert guide.laws["code"].batch_shape == (2, 1 if shared else 5)
    torch.testing.assert_close(guide.laws["code"].probs, prior.length_probs.expand(2, 1 if shared else 5, 3))
    assert repr(guide).startswith("AutoNested(code: E[L] = ")
    for elbo in ELBOS:
        trained = mean_field(model, shared_plates=["data"] if shared else [])
        result = fit(model, trained, y, num_epochs=30, lr=0.05, elbo=elbo(), progress=False)
        assert torch.tensor(result.elbo).isfinite().all()
        assert all(p.grad.abs().max() > 0 for p in trained.parameters())
        assert list(result.lengths) == ["code"]


def test_the_divergence_from_an_autoregressive_law_is_zero_where_it_is_independent():
    def model():
        pyro.sample("code", NestedAutoregressive(lambda x: (torch.zeros_like(x), torch.ones_like(x)), torch.zeros(3)))

    guide, elbo = mean_field(model), NestedELBO()
    assert elbo.loss(model, guide) == pytest.approx(0, abs=1e-6)
    assert list(elbo.kl_lengths) == ["code"]


def test_quantiles_of_numbers_that_may_be_cut():
    """Against those of 200,000 draws: the share of draws below a quantile that is not zero, to five deviations."""

    def model():
        pyro.sample("code", PRIORS["normal"]())

    guide, levels, draws = mean_field(model), [0.02, 0.3, 0.5, 0.8, 0.97], 200_000
    guide()
    quantiles = guide.quantiles(levels)["code"]
    assert quantiles.shape == (5, 3)
    values = guide[0]._law().sample((draws,))
    for q, quantile in zip(levels, quantiles, strict=True):
        below, up_to = (values < quantile).float().mean(0), (values <= quantile).float().mean(0)
        error = 5 * (q * (1 - q) / draws) ** 0.5
        assert ((below <= q + error) & (up_to >= q - error)).all()
    assert (quantiles == 0).any()
    assert (quantiles != 0).any(-1).all()
    torch.testing.assert_close(guide.median()["code"], quantiles[2])


def soft(y):
    mask = pyro.sample("mask", RelaxedOrderedMask.geometric(0.5, 4, temperature=0.7))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mask.sum(-1), 1.0), obs=y)


@pytest.mark.parametrize("elbo", ELBOS)
def test_a_soft_mask_is_soft_in_the_guide(elbo):
    guide, y = mean_field(soft, temperature=0.1), torch.full((30,), 3.0)
    guide(y)
    law = guide[0]._law()
    assert type(law) is RelaxedOrderedMask
    assert law.temperature == pytest.approx(0.7)
    torch.testing.assert_close(guide.laws["mask"].probs, OrderedMask.geometric(0.5, 4).probs)
    guide = mean_field(soft)
    result = fit(soft, guide, y, num_epochs=5, optimizer=still, elbo=elbo(), progress=False)
    assert result.kl == pytest.approx([0.0] * 5, abs=1e-5)  # the guide is the prior, draw by draw
    result = fit(soft, guide, y, num_epochs=200, lr=0.05, elbo=elbo(), progress=False)
    assert guide.laws["mask"].mean_length > 2.5
    assert result.lengths["mask"].mean == pytest.approx(guide.laws["mask"].mean_length.item(), abs=0.05)
    assert guide.median()["mask"].sum() in (3, 4)
    if elbo is NestedELBO:
        assert result.kl_lengths[-1] > 0
        assert result.kl_latents[-1] == pytest.approx(0, abs=1e-6)


def test_temperature_and_noise_are_for_straight_through_masks_alone():
    cooler = MaskSchedule(1, 0, 0, temperature=0.3)
    with pytest.raises(ValueError, match=r"`temperature` names \['mask'\]; mask sites of the model: \[\]"):
        mean_field(soft, temperature={"mask": 0.1})(torch.ones(3))
    with pytest.raises(ValueError, match="`schedule` has a temperature, which is for masks of AutoNested"):
        fit(soft, mean_field(soft), torch.ones(3), schedule=cooler, progress=False)
    guide, data = mean_field(weights, noise="gumbel", temperature={"w": 0.6}), regression(3)
    guide(*data)
    assert (guide[0]._law().mask_law.noise, guide[0]._law().mask_law.temperature) == ("gumbel", 0.6)
    fit(weights, guide, data, num_epochs=1, schedule=cooler, progress=False)
    assert guide[0].temperature == 0.3


def test_all_kinds_beside_each_other():
    def model(x, y):
        mask = pyro.sample("mask", OrderedMask.uniform(3))
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        w = pyro.sample("w", NestedNormal(torch.zeros(3), torch.ones(3), torch.zeros(3)))
        v = pyro.sample("v", NestedNormal(torch.zeros(3), torch.ones(3), torch.zeros(3)))
        soft_mask = pyro.sample("soft", RelaxedOrderedMask.uniform(3, temperature=0.5))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal((x * (mask * w + soft_mask * v)).sum(-1), scale), obs=y)

    data = regression(3)
    for elbo in ELBOS:
        guide = mean_field(model)
        result = fit(model, guide, data, num_epochs=20, elbo=elbo(), progress=False)
        assert list(guide.laws) == list(result.lengths) == ["mask", "w", "v", "soft"]
        assert all(p.grad is not None for p in guide.parameters())
        names = [name for name in poutine.trace(guide).get_trace(*data).nodes if not name.endswith("_unconstrained")]
        assert [name for name in names if name in {"mask", "scale", "w", "v", "soft"}] == [
            "mask",
            "scale",
            "w",
            "v",
            "soft",
        ]
    copied = copy.deepcopy(guide)
    assert all(torch.equal(a, b) for a, b in itertools.zip_longest(copied.parameters(), guide.parameters()))


# Rows of a plate that subsamples.
ROWS = 8
BY_ROW = torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5]], dtype=torch.float64).repeat_interleave(ROWS // 2, 0)


def plate(i):
    return pyro.plate("data", ROWS, subsample=i, dim=-1)


def numbered(i):
    with plate(i):
        mask = pyro.sample("mask", OrderedMask(probs=BY_ROW[i]))
        pyro.sample("y", dist.Normal(mask.sum(-1), 1.0), obs=torch.full((len(i),), 2.0))


def numbered_codes(i):
    with plate(i):
        ones = torch.ones(len(i), 4)
        code = pyro.sample("code", NestedNormal(i.unsqueeze(-1) * ones, (1 + i).unsqueeze(-1) * ones, probs=BY_ROW[i]))
        pyro.sample("y", dist.Normal(code.sum(-1), 1.0), obs=torch.full((len(i),), 2.0))


@pytest.mark.parametrize("create_plates", [None, plate])
@pytest.mark.parametrize("model", [numbered, numbered_codes])
def test_each_row_starts_at_its_own_prior(model, create_plates):
    guide, elbo = mean_field(model, create_plates=create_plates), NestedELBO()
    site = "mask" if model is numbered else "code"
    with module_local_params(guide), torch.no_grad():
        guide(torch.tensor([6, 1]))
        assert guide[0].seen.tolist() == [False, True] + 4 * [False] + [True, False]
        with pytest.raises(ValueError, match=f"laws at site '{site}' start at the prior of each row, and no call of"):
            _ = guide.laws
        assert f"{site}: E[L] = 2.5" in repr(guide)  # of the two rows
        guide[0].logits_unconstrained[1] = torch.tensor([0.0, 1.0, -1e3, -1e3])  # learned: stays
        for i in (torch.tensor([1, 0, 7]), torch.arange(5), torch.tensor([5, 6])):
            elbo.loss(model, guide, i)
        expected = BY_ROW.clone()
        expected[1] = torch.tensor([0.0, 1.0, -1e3, -1e3]).softmax(-1)
        torch.testing.assert_close(guide.laws[site].probs, expected)
        elbo.loss(model, guide, torch.tensor([0, 2, 3, 4, 5, 6, 7]))
    assert elbo.kl[site] == pytest.approx(0, abs=1e-4)
    other = mean_field(model, create_plates=create_plates)
    with module_local_params(other):
        other(torch.arange(3))
        other.load_state_dict(guide.state_dict())
    torch.testing.assert_close(other.laws[site].probs, guide.laws[site].probs)


def test_rows_that_a_plate_draws_itself_start_at_their_own_prior():
    def model():
        with pyro.plate("data", ROWS, subsample_size=2) as i:
            pyro.sample("mask", OrderedMask(probs=BY_ROW[i]))

    guide, elbo = mean_field(model), NestedELBO(num_particles=3)
    with module_local_params(guide):
        for _ in range(30):
            assert elbo.differentiable_loss(model, guide).item() == pytest.approx(0, abs=1e-4)
    torch.testing.assert_close(guide.laws["mask"].probs, BY_ROW)


@pytest.mark.parametrize("create_plates", [None, plate])
@pytest.mark.parametrize("elbo", [*ELBOS, TraceEnum_ELBO])
def test_rows_with_other_supports_are_fitted_in_batches(create_plates, elbo):
    model = config_enumerate(numbered) if elbo is TraceEnum_ELBO else numbered
    guide = mean_field(model, create_plates=create_plates)
    how = {
        "num_epochs": 300,
        "batch_size": 3,
        "lr": 0.05,
        "optimizer": OptimizerSettings(lr_schedule=cosine_to_zero()),
        "progress": False,
    }
    result = fit(model, guide, torch.arange(ROWS), elbo=elbo(max_plate_nesting=1), **how)
    assert torch.tensor(result.elbo).isfinite().all()
    exact = (BY_ROW.log() + dist.Normal(torch.arange(1.0, 5.0), 1.0).log_prob(torch.tensor(2.0))).softmax(-1)
    off = (guide.laws["mask"].probs - exact).abs().sum(-1).max() / 2
    assert off < (0.01 if elbo is TraceEnum_ELBO else 0.3)


def test_a_law_shared_by_rows_starts_where_all_of_them_allow_it():
    probs = torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.4, 0.4]])

    def model():
        with pyro.plate("data", 2):
            pyro.sample("mask", OrderedMask(probs=probs))

    guide = mean_field(model, shared_plates=["data"])
    guide()
    torch.testing.assert_close(guide.laws["mask"].probs[0], probs.log().mean(0).softmax(-1))


def test_a_law_shared_by_rows_is_one_whichever_rows_come_first():
    """Prior laws differ by row; what the rows of the first call share stays, and later rows begin with it."""

    def model(i):
        with plate(i):
            loc = i.unsqueeze(-1) * torch.ones(len(i), 4)
            pyro.sample("code", NestedNormal(loc, torch.ones(len(i), 4), torch.arange(4.0).expand(len(i), 4)))

    guide = mean_field(model, shared_plates=["data"])
    for i in ([6, 1], [3, 6, 7], range(ROWS)):
        guide(torch.tensor([*i]))
    part = guide[0]
    assert part.logits.shape == (1, 4)
    torch.testing.assert_close(part.logits[0].softmax(-1), torch.arange(4.0).softmax(-1))
    torch.testing.assert_close(part.loc, torch.arange(float(ROWS)).unsqueeze(-1).expand(ROWS, 4))
