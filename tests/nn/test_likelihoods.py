"""What nets are trained on: each law against SciPy's, in Pyro, and what is said of what does not fit."""

import copy
import math

import numpy as np
import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import Predictive, TraceMeanField_ELBO
from scipy import stats
from torch import nn

from pyro_vnd.diagnostics import to_arviz
from pyro_vnd.infer import KLWeights, fit
from pyro_vnd.nn import (
    BernoulliLabels,
    CategoricalLabels,
    NestedModel,
    NormalTargets,
    OrdinalLabels,
    PixelLabels,
    PoissonCounts,
    TokenLabels,
    nest,
)
from pyro_vnd.nn.label_laws import PartlySeenCategorical, ordinal_log_probs

ROWS = 6
X = torch.randn(ROWS, 4, generator=torch.Generator().manual_seed(0)).double()


def draws(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def integers(high, *shape, seed=2):
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed))


def soft(logits):
    return stats.rv_discrete(values=(np.arange(len(logits)), np.exp(logits) / np.exp(logits).sum()))


def by_class(f, y):
    return soft(f).logpmf(y)


def by_level(f, y):
    cutpoints = [-1e9, *(math.log(k / (4 - k)) for k in (1, 2, 3)), 1e9]
    below, above = (stats.logistic.cdf(cutpoints[y + i] - f.item()) for i in (0, 1))
    return np.log(above - below)


def by_token(f, y):
    return sum(soft(logits).logpmf(label) for logits, label in zip(f, y, strict=True) if label not in (-100, 0))


def by_pixel(f, y):
    return by_token(f.reshape(3, -1).T, np.where(y == 0, 0, y).ravel()) + sum(
        soft(f[:, i, j]).logpmf(0) for i, j in zip(*np.nonzero(y == 0), strict=True)
    )


# The likelihood, outputs, what is observed, and the log-density of one row, one entry at a time.
CASES = {
    "classes": (CategoricalLabels(), draws(ROWS, 3), integers(3, ROWS), by_class),
    "yes or no": (
        BernoulliLabels(),
        draws(ROWS, 1),
        integers(2, ROWS).bool(),
        lambda f, y: stats.bernoulli(1 / (1 + np.exp(-f.item()))).logpmf(int(y)),
    ),
    "several labels": (
        BernoulliLabels(),
        draws(ROWS, 3),
        integers(2, ROWS, 3),
        lambda f, y: stats.bernoulli(1 / (1 + np.exp(-f))).logpmf(y).sum(),
    ),
    "a number": (NormalTargets(0.5), draws(ROWS, 1), draws(ROWS), lambda f, y: stats.norm(f.item(), 0.5).logpdf(y)),
    "numbers": (
        NormalTargets(torch.tensor([0.5, 2.0])),
        draws(ROWS, 2),
        draws(ROWS, 2, seed=3),
        lambda f, y: stats.norm(f, [0.5, 2.0]).logpdf(y).sum(),
    ),
    "a predicted scale": (
        NormalTargets("predicted"),
        draws(ROWS, 2),
        draws(ROWS, 1),
        lambda f, y: stats.norm(f[0], 1e-6 + np.log1p(np.exp(f[1]))).logpdf(y.item()),
    ),
    "predicted scales": (
        NormalTargets("predicted"),
        draws(ROWS, 4),
        draws(ROWS, 2),
        lambda f, y: stats.norm(f[:2], 1e-6 + np.log1p(np.exp(f[2:]))).logpdf(y).sum(),
    ),
    "images of numbers": (
        NormalTargets("predicted", dim=1),
        draws(ROWS, 4, 3, 2),
        draws(ROWS, 2, 3, 2),
        lambda f, y: stats.norm(f[:2], 1e-6 + np.log1p(np.exp(f[2:]))).logpdf(y).sum(),
    ),
    "counts": (
        PoissonCounts(),
        draws(ROWS, 2),
        integers(5, ROWS, 2),
        lambda f, y: stats.poisson(np.exp(f)).logpmf(y).sum(),
    ),
    "levels": (OrdinalLabels(4), draws(ROWS, 1), integers(4, ROWS), by_level),
    "tokens": (
        TokenLabels(ignore_index=(-100, 0)),
        draws(ROWS, 3, 5),
        integers(5, ROWS, 3).index_put((torch.tensor([1, 2]),), torch.tensor(-100)),
        by_token,
    ),
    "pixels": (
        PixelLabels(ignore_index=-100),
        draws(ROWS, 3, 2, 4),
        integers(3, ROWS, 2, 4).index_put((torch.tensor([1, 2]), torch.tensor([0, 1])), torch.tensor(-100)),
        by_pixel,
    ),
}


class Given(nn.Module):
    """A net with outputs of the shape of those given."""

    def __init__(self, outputs):
        super().__init__()
        self.hidden, self.last = nn.Linear(4, 8), nn.Linear(8, outputs[0].numel())
        self.shape = outputs.shape[1:]

    def forward(self, x):
        return self.last(self.hidden(x).relu()).unflatten(-1, self.shape)


@pytest.fixture(params=CASES.values(), ids=CASES)
def case(request):
    likelihood, *rest = request.param
    return copy.deepcopy(likelihood), *rest


def test_each_law_is_the_one_of_scipy(case):
    likelihood, outputs, y, oracle = case
    likelihood.check_outputs("test", outputs, ROWS)
    value = likelihood.targets("test", y, outputs)
    expected = torch.tensor([oracle(f, each) for f, each in zip(outputs.numpy(), y.numpy(), strict=True)])
    torch.testing.assert_close(likelihood.law(outputs).log_prob(value), expected, rtol=1e-7, atol=1e-7)
    # With draws before the rows, the same law of each.
    several = torch.stack([outputs, outputs.flip(0)])
    law = likelihood.law(several, batch_dim=2)
    assert law.batch_shape == (2, ROWS)
    torch.testing.assert_close(law.log_prob(value)[0], expected, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(law.log_prob(value.flip(0))[1], expected.flip(0), rtol=1e-7, atol=1e-7)


def test_the_model_scores_it_in_the_plate_of_the_rows(case):
    likelihood, outputs, y, _ = case
    model = NestedModel(nest(Given(outputs), X[:1], num_blocks=4), likelihood)
    assert model.guide is model.net.guide
    trace = poutine.trace(model).get_trace(X, y)
    site = trace.nodes[likelihood.site]
    assert site["is_observed"]
    assert [frame.name for frame in site["cond_indep_stack"]] == ["data"]
    drawn = trace.nodes["_RETURN"]["value"]
    expected = likelihood.law(drawn).log_prob(likelihood.targets("test", y, drawn))
    torch.testing.assert_close(site["fn"].log_prob(site["value"]), expected)
    assert site["fn"].batch_shape == (ROWS,)
    # Without y it is drawn.
    predicted = Predictive(model, guide=model.guide, num_samples=3)(X)[likelihood.site]
    assert predicted.shape == (3, *site["value"].shape)


def test_it_is_fitted_with_everything_that_it_learns(case):
    likelihood, outputs, y, _ = case
    net = nest(Given(outputs), X[:1], num_blocks=4)
    model = NestedModel(net, likelihood)
    before = {name: value.clone() for name, value in model.named_parameters()}
    result = fit(model, model.guide, (X, y), num_epochs=40, lr=0.05, weights=KLWeights(latents=0.01), progress=False)
    assert result.elbo[-1] > result.elbo[0]
    unchanged = [name for name, value in model.named_parameters() if torch.equal(value, before[name])]
    assert unchanged == []


def test_scores_of_rows_reach_arviz(case):
    likelihood, outputs, y, _ = case
    model = NestedModel(nest(Given(outputs), X[:1], num_blocks=4), likelihood)
    data = to_arviz(model, model.guide, (X, y), num_samples=5, num_prior=2)
    assert data.log_likelihood[likelihood.site].shape == (1, 5, ROWS)
    assert np.isfinite(data.log_likelihood[likelihood.site].values).all()


def test_ignored_labels_have_no_gradient_and_no_say():
    likelihood, logits = TokenLabels(ignore_index=-1), draws(2, 3, 4).requires_grad_()
    y = torch.tensor([[1, -1, 2], [-1, -1, -1]])
    law = likelihood.law(logits)
    (gradient,) = torch.autograd.grad(law.log_prob(y).sum(), logits)
    assert (gradient[y == -1] == 0).all()
    assert (gradient[y != -1] != 0).all()
    assert law.log_prob(y)[1] == 0


def test_a_law_of_partly_seen_labels_expands_and_draws_all_classes():
    law = PartlySeenCategorical(draws(3), (7,)).expand([1000])
    assert law.log_prob(torch.full((1000,), 7)).eq(0).all()
    assert set(law.sample().tolist()) == {0, 1, 2}
    with pyro.plate("rows", 5):
        assert pyro.sample("y", PartlySeenCategorical(draws(3), (7,))).shape == (5,)


def test_levels_far_out_keep_their_probabilities():
    location = torch.tensor([-800.0, -40.0, 0.0, 40.0, 800.0], dtype=torch.float64, requires_grad=True)
    log_probs = ordinal_log_probs(location, torch.tensor([-1.0, 0.5, 0.6], dtype=torch.float64))
    torch.testing.assert_close(log_probs.logsumexp(-1), torch.zeros(5, dtype=torch.float64))
    assert log_probs.isfinite().all()
    assert log_probs[-1, 0].item() == pytest.approx(-801)  # the probability itself is zero in float64
    log_probs.sum().backward()
    assert location.grad.isfinite().all()
    # Differences of sigmoids, which lose them all, are the same where they can be told.
    at = torch.tensor([-math.inf, -1.0, 0.5, 0.6, math.inf], dtype=torch.float64) - location.detach()[2]
    torch.testing.assert_close(log_probs[2].detach().exp(), at.sigmoid().diff())


def test_levels_stay_in_order():
    likelihood = OrdinalLabels(5)
    with torch.no_grad():
        likelihood.log_steps.copy_(torch.tensor([-9.0, 3.0, -2.0]))
    assert (likelihood.cutpoints.diff() > 0).all()


@pytest.mark.parametrize(("name", "factor"), [("a number", 1.0), ("a predicted scale", 3.0)])
def test_noise_is_learned(name, factor):
    """Half of the rows have three times the noise, which only a predicted scale can tell."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(600, 1, generator=generator).double()
    y = 0.5 * x[:, 0] + torch.where(x[:, 0] > 0, factor, 1.0) * 0.3 * torch.randn(600, generator=generator).double()
    likelihood = copy.deepcopy(CASES[name][0])
    outputs = 2 if likelihood.log_scale is None else 1
    net = nest(nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, outputs)), x[:1], num_blocks=4)
    model = NestedModel(net, likelihood)
    fit(model, model.guide, (x, y), num_epochs=250, lr=0.05, weights=KLWeights(latents=0.02), progress=False)
    scale = likelihood.entries(net.predict(x, width=1.0, num_samples=20), 2).scale.mean(0).detach().expand(600)
    for side, expected in ((x[:, 0] < -0.3, 0.3), (x[:, 0] > 0.3, 0.3 * factor)):
        assert scale[side].mean().item() == pytest.approx(expected, rel=0.15)


REFUSED = {
    "a mean for two": ("a number", draws(ROWS, 2), draws(ROWS), r"`y` must be real numbers, shape \(6, 2\).*\(6,\)"),
    "columns": ("a number", draws(ROWS, 1), draws(ROWS, 2), r"`y` must be real numbers, shape \(6,\) as.*\(6, 2\)"),
    "too few rows": ("a number", draws(ROWS, 1), draws(5), r"`y` must be real numbers, shape \(6,\).*\(5,\)"),
    "NaN": ("a number", draws(ROWS, 1), draws(ROWS) * math.nan, "`y` must be finite; 6 of 6 are not: nan"),
    "numpy": ("a number", draws(ROWS, 1), np.zeros(ROWS), r"got ndarray: give torch.as_tensor\(y\)"),
    "probabilities": ("yes or no", draws(ROWS, 1), torch.full((ROWS,), 0.3), "labels 0 or 1; 6 of 6 are not: 0.3"),
    "signs": ("yes or no", draws(ROWS, 1), draws(ROWS).sign(), "`y` must be labels 0 or 1; .* are not: -1"),
    "halves": ("counts", draws(ROWS, 2), draws(ROWS, 2), "`y` must be counts, whole numbers >= 0; 12 of 12"),
    "negative": ("counts", draws(ROWS, 2), -integers(5, ROWS, 2) - 1, "`y` must be counts, whole numbers >= 0"),
    "counted from one": ("levels", draws(ROWS, 1), integers(4, ROWS) + 1, r"integers from 0 to 3.*from 1 to 4: count"),
    "another padding": (
        "tokens",
        draws(ROWS, 3, 5),
        integers(5, ROWS, 3) - 1,
        r"integers from 0 to 4 or -100, 0; \d+ of 18 are not: -1",
    ),
    "too large": ("pixels", draws(ROWS, 3, 2, 4), integers(3, ROWS, 2, 4) + 253, "from 0 to 2 or -100; 48 of 48 are"),
    "channels": ("pixels", draws(ROWS, 3, 2, 4), integers(3, ROWS, 1, 2, 4), r"shape \(6, 2, 4\).*\(6, 1, 2, 4\)"),
    "floats": ("tokens", draws(ROWS, 3, 5), integers(5, ROWS, 3).double(), r"got torch.float64: give y.long\(\)"),
}


@pytest.mark.parametrize(("name", "outputs", "y", "message"), REFUSED.values(), ids=REFUSED)
def test_targets_that_do_not_fit_are_refused_and_never_broadcast(name, outputs, y, message):
    model = NestedModel(nest(Given(outputs), X[:1], num_blocks=4), copy.deepcopy(CASES[name][0]))
    with pytest.raises(ValueError, match=rf"(?s)^NestedModel: argument .*{message}"):
        model(X, y)


UNSEEN = {
    "yes or no": (torch.full((ROWS,), 0.25), torch.full((ROWS,), 0.25)),
    "a number": (torch.full((ROWS,), math.inf).float(), torch.full((ROWS,), math.inf)),
    "counts": (torch.full((ROWS, 2), -1), torch.full((ROWS, 2), -1.0)),
    "tokens": (torch.full((ROWS, 3), 99, dtype=torch.int16), torch.full((ROWS, 3), 99)),
}


@pytest.mark.parametrize("name", UNSEEN)
def test_values_of_targets_are_not_looked_at_where_that_would_wait(name):
    likelihood, (y, expected) = CASES[name][0], UNSEEN[name]
    outputs = draws(*{"tokens": (ROWS, 3, 5), "counts": (ROWS, 2)}.get(name, (ROWS, 1)))
    with pytest.raises(ValueError, match="caller: argument `labels` must be"):
        likelihood.targets("caller", y, outputs, argument="labels")
    found = likelihood.targets("caller", y, outputs, argument="labels", values=False)
    assert torch.equal(found, expected.to(found.dtype))
    assert found.dtype == (torch.int64 if name == "tokens" else torch.float64)


BAD_OUTPUTS = {
    "odd": (NormalTargets("predicted"), draws(ROWS, 3), r"means and as many scales along dimension -1.*\(6, 3\)"),
    "scales": (NormalTargets(torch.ones(3)), draws(ROWS, 2), r"means for the scales of shape \(3,\); got \(6, 2\)"),
    "levels": (OrdinalLabels(3), draws(ROWS, 3), r"one number for each row.*got \(6, 3\)"),
    "rows": (TokenLabels(), draws(ROWS, 3), r"logits of shape \(N, T, C\).*got \(6, 3\) for 6 rows"),
    "one class": (PixelLabels(), draws(ROWS, 1, 2, 2), r"logits of shape \(N, C, H, W\).*got \(6, 1, 2, 2\)"),
    "a single logit": (CategoricalLabels(), draws(ROWS, 1), r"Of two classes give each its logit.*BernoulliLabels"),
}


@pytest.mark.parametrize(("likelihood", "outputs", "message"), BAD_OUTPUTS.values(), ids=BAD_OUTPUTS)
def test_outputs_that_do_not_fit_are_refused(likelihood, outputs, message):
    model = NestedModel(nest(Given(outputs), X[:1], num_blocks=4), likelihood)
    with pytest.raises(ValueError, match=rf"NestedModel: argument `net` must return {message}|{message}"):
        model(X)


@pytest.mark.parametrize("likelihood", [BernoulliLabels(), NormalTargets(), PoissonCounts(), OrdinalLabels(2)])
def test_outputs_have_a_row_for_each_example(likelihood):
    for outputs in (torch.zeros(5, 1), {"out": torch.zeros(ROWS, 1)}, None):
        with pytest.raises(ValueError, match="caller: argument `net` must return"):
            likelihood.check_outputs("caller", outputs, ROWS)


def test_arguments_are_checked():
    net = nest(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1)), X[:1])
    with pytest.raises(ValueError, match=r"NestedModel: argument `likelihood` must be .*; got the class NormalTargets"):
        NestedModel(net, NormalTargets)
    with pytest.raises(ValueError, match=r"NestedModel: argument `likelihood` must be a NetLikelihood.*; got str"):
        NestedModel(net, "normal")
    with pytest.raises(ValueError, match="NestedModel: argument `net` must be a NestedNet; got Sequential: nest it"):
        NestedModel(net.net, NormalTargets())
    with pytest.raises(ValueError, match="`scale` must be finite and > 0; got 0"):
        NormalTargets(0)
    with pytest.raises(ValueError, match="`scale` must be numbers or \"predicted\"; got 'learned'"):
        NormalTargets("learned")
    with pytest.raises(ValueError, match="`num_levels` must be an integer, at least 2; got 1"):
        OrdinalLabels(1)
    with pytest.raises(ValueError, match="PixelLabels: argument `ignore_index` must be an integer or integers; got"):
        PixelLabels(ignore_index=[1.5])


def test_a_model_is_saved_and_copied_with_its_likelihood():
    def make():
        net = nest(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1)), X[:1], num_blocks=4)
        return NestedModel(net, OrdinalLabels(3))

    model, y = make(), integers(3, ROWS)
    fit(model, model.guide, (X, y), num_epochs=3, progress=False)
    other = make()
    other.load_state_dict(model.state_dict())
    for copied in (other, copy.deepcopy(model)):
        torch.testing.assert_close(copied.likelihood.cutpoints, model.likelihood.cutpoints)
        pyro.set_rng_seed(0)
        expected = TraceMeanField_ELBO().loss(model, model.guide, X, y)
        pyro.set_rng_seed(0)
        assert TraceMeanField_ELBO().loss(copied, copied.guide, X, y) == pytest.approx(expected)
