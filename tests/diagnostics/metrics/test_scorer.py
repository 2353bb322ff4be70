"""Each likelihood's scores against slow oracles: loops over rows, draws and entries, quadrature and root finding."""

import copy
import math

import numpy as np
import pytest
import torch
import xarray as xr
from scipy import integrate, optimize, stats
from sklearn.metrics import jaccard_score
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pyro_vnd.diagnostics import (
    classification_metrics,
    evaluate,
    evaluate_learned,
    evaluate_widths,
    loo_widths,
    ood_metrics,
    plot_reliability,
    plot_widths,
    smallest_width,
)
from pyro_vnd.diagnostics.metrics.calibration import fit_temperature, scale_temperature
from pyro_vnd.diagnostics.metrics.regression import LEVELS, normal_mixture_crps
from pyro_vnd.infer import KLWeights, MaskSchedule, fit, module_local_params
from pyro_vnd.nn import (
    BernoulliLabels,
    NestedModel,
    NetLikelihood,
    NormalTargets,
    OrdinalLabels,
    PixelLabels,
    PoissonCounts,
    TokenLabels,
    narrow,
    nest,
    widths_for,
)

ROWS, DRAWS = 12, 4
QUIET = {"progress": False}


def real(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def integers(high, *shape, seed=1):
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed))


def scored(outputs, y, likelihood, **more):
    """Scores of given outputs of draws; inputs are numbers of rows."""
    rows = torch.arange(len(y), dtype=torch.float64).unsqueeze(-1)
    half = max(1, len(y) // 2 - 1)
    data = [*zip(rows.split(half), y.split(half), strict=True)]  # in two or three batches

    def predict(x):
        return outputs[:, x[:, 0].long()]

    return evaluate(predict, data, likelihood, **QUIET, **more).sel(seed=0)


def mixture(laws):
    """The distribution function and the mean density of equal shares of laws."""
    return (lambda t: np.mean([law.cdf(t) for law in laws])), (lambda t: np.mean([law.pdf(t) for law in laws]))


@pytest.mark.parametrize("scale", ["learned", "predicted"])
def test_numbers(scale):
    outputs, y = real(DRAWS, ROWS, 2 if scale == "predicted" else 1), 2 * real(ROWS, seed=1)
    likelihood = NormalTargets("predicted" if scale == "predicted" else 0.7)
    found = scored(outputs, y, likelihood)
    nll, crps, squares, inside = [], [], [], {level: [] for level in LEVELS}
    for row, value in enumerate(y.tolist()):
        laws = [
            stats.norm(f[0], 1e-6 + math.log1p(math.exp(f[1])) if scale == "predicted" else 0.7)
            for f in outputs[:, row].tolist()
        ]
        cdf, density = mixture(laws)
        nll.append(-math.log(density(value)))
        below = integrate.quad(lambda t, F=cdf: F(t) ** 2, -15, value, limit=200)[0]
        crps.append(below + integrate.quad(lambda t, F=cdf: (1 - F(t)) ** 2, value, 15, limit=200)[0])
        squares.append((np.mean([law.mean() for law in laws]) - value) ** 2)
        for level, hits in inside.items():
            ends = [
                optimize.brentq(lambda t, F=cdf, p=p: F(t) - p, -50, 50) for p in (0.5 - level / 2, 0.5 + level / 2)
            ]
            hits.append(ends[0] <= value <= ends[1])
    assert found["nll"].item() == pytest.approx(np.mean(nll))
    assert found["nll_se"].item() == pytest.approx(np.std(nll) / ROWS**0.5)
    assert found["crps"].item() == pytest.approx(np.mean(crps), rel=1e-6)
    assert found["rmse"].item() == pytest.approx(np.mean(squares) ** 0.5)
    assert found["coverage"].values.tolist() == pytest.approx([np.mean(hits) for hits in inside.values()])
    assert found["coverage"]["level"].values.tolist() == list(LEVELS)
    assert 0 < found["coverage"].values.min() < found["coverage"].values.max() <= 1


def test_the_density_is_a_mixture_and_no_average_of_logarithms():
    """Two draws far apart, one of which is right: log 2 is lost, and not half of the distance."""
    outputs = torch.tensor([[[0.0]], [[100.0]]], dtype=torch.float64)
    found = scored(outputs, torch.zeros(1, dtype=torch.float64), NormalTargets(1.0))
    assert found["nll"].item() == pytest.approx(0.5 * math.log(2 * math.pi) + math.log(2))


def test_coverage_of_a_right_mixture_is_the_level_and_that_of_a_narrow_one_is_not():
    num_rows = 20_000
    outputs = 2 * real(3, num_rows, 1)
    draw = integers(3, num_rows)
    y = outputs[draw, torch.arange(num_rows), 0] + 0.5 * real(num_rows, seed=5)
    for scale, right in ((0.5, True), (0.45, False)):
        found = scored(outputs, y, NormalTargets(scale))["coverage"].values
        z = (found - LEVELS) / np.sqrt(np.array(LEVELS) * (1 - np.array(LEVELS)) / num_rows)
        assert bool(np.abs(z).max() < 4) is right
    # The score is proper: the scale that the data have is better than those beside it.
    crps = [scored(outputs, y, NormalTargets(scale))["crps"].item() for scale in (0.3, 0.5, 0.8)]
    assert min(crps) == crps[1]


def test_the_crps_of_a_single_normal_is_the_known_one():
    loc, scale, y = real(1, 7), real(1, 7, seed=1).exp(), real(7, seed=2)
    z = (y - loc[0]) / scale[0]
    normal = torch.distributions.Normal(0, 1)
    known = scale[0] * (z * (2 * normal.cdf(z) - 1) + 2 * normal.log_prob(z).exp() - 1 / math.sqrt(math.pi))
    torch.testing.assert_close(normal_mixture_crps(loc, scale, y), known)


def test_arrays_of_numbers_are_scored_entry_by_entry():
    outputs, y = real(DRAWS, ROWS, 3, 2), real(ROWS, 3, 2, seed=1)
    found = scored(outputs, y, NormalTargets(0.7))
    flat = scored(outputs.flatten(2).flatten(1).unsqueeze(-1), y.flatten(), NormalTargets(0.7))
    for name in ("nll", "rmse", "crps", "entropy", "mutual_information"):
        assert found[name].item() == pytest.approx(flat[name].item())
    np.testing.assert_allclose(found["coverage"], flat["coverage"])


def test_counts():
    outputs, y = 1 + real(DRAWS, ROWS, 1), integers(9, ROWS)
    found = scored(outputs, y, PoissonCounts())
    nll, deviance, inside = [], [], {level: [] for level in LEVELS}
    for row, value in enumerate(y.tolist()):
        laws = [stats.poisson(math.exp(f)) for f in outputs[:, row, 0].tolist()]
        probs = np.mean([law.pmf(np.arange(400)) for law in laws], 0)
        nll.append(-math.log(probs[value]))
        mean = np.mean([law.mean() for law in laws])
        deviance.append(2 * ((value * math.log(value / mean) if value else 0) - (value - mean)))
        for level, hits in inside.items():
            low, high = (int((probs.cumsum() < p).sum()) for p in (0.5 - level / 2, 0.5 + level / 2))
            hits.append(low <= value <= high)
    assert found["nll"].item() == pytest.approx(np.mean(nll))
    assert found["deviance"].item() == pytest.approx(np.mean(deviance))
    assert found["coverage"].values.tolist() == pytest.approx([np.mean(hits) for hits in inside.values()])
    assert set(found.data_vars) >= {"rmse", "rmse_se", "deviance_se", "entropy", "mutual_information"}
    assert "crps" not in found


def test_doubt_about_numbers_is_that_of_a_normal_with_the_mixture_s_variance():
    outputs = real(DRAWS, ROWS, 2)
    likelihood = NormalTargets("predicted")
    foreign = torch.arange(ROWS, dtype=torch.float64)[:, None]

    def predict(x):
        return outputs[:, x[:, 0].long()] * (1 + 3 * (x > 5))

    found = evaluate(predict, (foreign[:6], real(6)), likelihood, ood={"far": foreign[6:]}, **QUIET).sel(seed=0)
    scores = {"entropy": [], "mutual_information": []}
    for row in range(ROWS):
        f = predict(foreign)[:, row].numpy()
        means, variances = f[:, 0], (1e-6 + np.log1p(np.exp(f[:, 1]))) ** 2
        total = np.mean(variances) + np.var(means)
        scores["entropy"].append(stats.norm(0, total**0.5).entropy())
        scores["mutual_information"].append(0.5 * math.log(total / np.mean(variances)))
    assert found["score"].values.tolist() == list(scores)
    for name, values in scores.items():
        values = torch.tensor(np.array(values))
        assert found[name].item() == pytest.approx(values[:6].mean().item())
        expected = ood_metrics(values[:6], values[6:])
        for metric in ("auroc", "aupr", "fpr95"):
            assert found[metric].sel(ood="far", score=name).item() == pytest.approx(expected[metric])
    assert "score_count" not in found  # they have no largest value


def test_levels():
    likelihood = OrdinalLabels(4).double()
    outputs, y = 2 * real(DRAWS, ROWS, 1), integers(4, ROWS)
    found = scored(outputs, y, likelihood, calibrate=(torch.arange(ROWS).double()[:, None], y))
    cutpoints = [-math.inf, *likelihood.cutpoints.tolist(), math.inf]
    probs = np.array(
        [
            np.mean([np.diff(stats.logistic.cdf(np.array(cutpoints) - f)) for f in outputs[:, row, 0].tolist()], 0)
            for row in range(ROWS)
        ]
    )
    errors = np.abs(np.arange(4)[None, :, None] - np.arange(4)[None, None, :])
    best = (errors * probs[:, None, :]).sum(-1).argmin(1)  # the level of least expected error
    assert found["mae"].item() == pytest.approx(np.abs(best - y.numpy()).mean())
    known = classification_metrics(torch.tensor(probs), y)
    for name in ("nll", "accuracy", "brier", "ece"):
        assert found[name].item() == pytest.approx(known[name])
    assert found["nll_calibrated"] <= found["nll"]


@pytest.mark.parametrize("num_labels", [1, 3])
def test_bits(num_labels):
    outputs, y = 2 * real(DRAWS, ROWS, num_labels), integers(2, ROWS, num_labels).bool()
    found = scored(outputs, y, BernoulliLabels(), ood={"far": torch.arange(5.0).double()[:, None]})
    ones = outputs.sigmoid().mean(0).flatten()
    known = classification_metrics(torch.stack([1 - ones, ones], -1), y.flatten().long())
    for name in ("nll", "accuracy", "brier", "ece", "adaptive_ece"):
        assert found[name].item() == pytest.approx(known[name])
    entropy = stats.entropy(np.stack([ones, 1 - ones]), axis=0).reshape(ROWS, num_labels).mean(1)
    expected = ood_metrics(torch.tensor(entropy), torch.tensor(entropy[:5]))["auroc"]
    assert found["auroc"].sel(ood="far", score="entropy").item() == pytest.approx(expected)
    assert found["score_count"].sum("score_bin").values.tolist() == [[ROWS] * 3, [5] * 3]


def tokens():
    y = integers(5, ROWS, 6)
    for row, length in enumerate(integers(6, ROWS, seed=4).tolist()):
        y[row, length + 1 :] = -100  # padding: rows have one to six labels
    return real(DRAWS, ROWS, 6, 5), y


def by_entry(logits, y):
    """Averaged probabilities of entries that count, one by one, and their labels: logits (S, N, T, C)."""
    probs = logits.softmax(-1).mean(0)
    kept = [(probs[n, t], int(y[n, t])) for n in range(y.shape[0]) for t in range(y.shape[1]) if y[n, t] >= 0]
    return torch.stack([each for each, _ in kept]), torch.tensor([label for _, label in kept])


def test_tokens():
    logits, y = tokens()
    found = scored(logits, y, TokenLabels())
    probs, labels = by_entry(logits, y)
    known = classification_metrics(probs, labels)
    for name in ("nll", "accuracy", "brier", "ece"):
        assert found[name].item() == pytest.approx(known[name])
    assert found["perplexity"].item() == pytest.approx(math.exp(known["nll"]))
    assert found["bin_count"].sum() == len(labels)
    assert found.attrs["num_labels"] == len(labels) < y.numel()
    # What stands in the padding says nothing.
    other = torch.where((y < 0).unsqueeze(-1), 100 * real(DRAWS, ROWS, 6, 5, seed=7), logits)
    xr.testing.assert_allclose(scored(other, y, TokenLabels()), found)


def test_the_standard_error_of_tokens_is_over_rows():
    """Of many sets of rows with other lengths, the spread of the mean over tokens is what one set tells."""
    generator = np.random.default_rng(0)
    num_rows, repeats = 200, 150
    means, errors = [], []
    for _ in range(repeats):
        lengths = generator.integers(1, 6, num_rows)
        level = torch.tensor(generator.normal(size=num_rows))  # tokens of a row have much in common
        logits = torch.stack([torch.zeros(num_rows, 5), level.unsqueeze(-1).expand(-1, 5)], -1).double()
        y = torch.where(torch.arange(5) < torch.tensor(lengths)[:, None], 0, -100)
        found = scored(logits[None], y, TokenLabels())
        means.append(found["nll"].item())
        errors.append(found["nll_se"].item())
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.2)


def test_pixels():
    logits, y = real(DRAWS, ROWS, 4, 3, 2), integers(3, ROWS, 3, 2)  # the fourth class is nowhere, but predicted
    y[y == 1] = torch.where(integers(2, *y[y == 1].shape, seed=8) > 0, 255, 1)
    found = scored(logits, y, PixelLabels(ignore_index=255))
    seen = torch.where(y == 255, -1, y)
    probs, labels = by_entry(logits.movedim(2, -1).flatten(2, 3), seen.flatten(1))
    known = classification_metrics(probs, labels)
    for name in ("nll", "accuracy", "brier", "ece"):
        assert found[name].item() == pytest.approx(known[name])
    overlap = jaccard_score(labels, probs.argmax(-1), labels=range(4), average=None, zero_division=0)
    np.testing.assert_allclose(found["iou"], overlap)
    assert found["miou"].item() == pytest.approx(overlap.mean())
    assert found["iou"].dims == ("class",)
    assert "perplexity" not in found


def test_tokens_and_pixels_have_a_temperature_of_those_that_count():
    logits, y = tokens()
    rows = torch.arange(ROWS, dtype=torch.float64)[:, None]
    validation = torch.roll(y, 1, 0)
    probs, labels = by_entry(4 * logits, validation)
    temperature = fit_temperature(probs.log(), labels)
    inside, known = by_entry(4 * logits, y)
    scaled = scale_temperature(inside.log(), temperature)
    expected = classification_metrics(scaled.exp(), known)
    by_pixel = (4 * logits).unflatten(2, (3, 2)).movedim(-1, 2)
    for found in (
        scored(4 * logits, y, TokenLabels(), calibrate=(rows, validation)),
        scored(by_pixel, y.unflatten(1, (3, 2)), PixelLabels(), calibrate=(rows, validation.unflatten(1, (3, 2)))),
    ):
        assert found["temperature"].item() == pytest.approx(temperature)
        for name in ("nll", "brier", "ece"):
            assert found[f"{name}_calibrated"].item() == pytest.approx(expected[name])
        assert found["nll_calibrated"] < 0.8 * found["nll"]
    with pytest.raises(ValueError, match="`calibrate` has no labels that count"):
        scored(logits, y, TokenLabels(), calibrate=(rows, torch.full_like(y, -100)))


def test_classes_that_are_nowhere_do_not_count_for_the_overlap():
    logits = torch.zeros(1, 2, 3, 2, 2).double()
    logits[:, :, 0] = 5
    found = scored(logits, torch.zeros(2, 2, 2).long(), PixelLabels())
    assert found["iou"].isnull().values.tolist() == [False, True, True]
    assert found["miou"] == 1


def test_foreign_tokens_are_scored_without_their_padding():
    logits, y = tokens()
    rows = torch.arange(ROWS, dtype=torch.float64)[:, None]
    found = scored(logits, y, TokenLabels(), ood={"same": (rows, y), "whole": rows, "other": (rows, rows)})
    assert found["auroc"].sel(ood="same").values == pytest.approx(0.5)
    assert (found["auroc"].sel(ood="whole", score="entropy") != 0.5).all()
    xr.testing.assert_equal(found["auroc"].sel(ood="whole", drop=True), found["auroc"].sel(ood="other", drop=True))
    probs = logits.softmax(-1).mean(0)
    entropy = torch.special.entr(probs).sum(-1)
    inside = torch.stack([entropy[n, y[n] >= 0].mean() for n in range(ROWS)])
    expected = ood_metrics(inside, entropy.mean(-1))
    assert found["auroc"].sel(ood="whole", score="entropy").item() == pytest.approx(expected["auroc"])


# Nets of every kind, at their widths.
X = real(40, 4, seed=9)
MODELS = {
    "numbers": (NormalTargets(0.5), (2,), real(40, 2), "rmse"),
    "predicted scale": (NormalTargets("predicted"), (2,), real(40), "crps"),
    "counts": (PoissonCounts(), (1,), integers(4, 40), "deviance"),
    "bits": (BernoulliLabels(), (3,), integers(2, 40, 3), "ece"),
    "levels": (OrdinalLabels(3), (1,), integers(3, 40), "mae"),
    "tokens": (TokenLabels(0), (3, 5), integers(5, 40, 3), "perplexity"),
    "pixels": (PixelLabels(), (3, 2, 2), integers(3, 40, 2, 2), "miou"),
}


@pytest.fixture(params=MODELS.values(), ids=MODELS)
def nested(request):
    likelihood, shape, y, metric = request.param
    size = math.prod(shape)
    plain = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, size), nn.Unflatten(-1, shape))
    net = nest(plain, X[:1], num_blocks=4, init_scale=0.3)
    return NestedModel(net, copy.deepcopy(likelihood).double()), y, metric


def test_widths_are_scored_by_the_likelihood(nested):
    model, y, metric = nested
    found = evaluate_widths(model, (X, y), [0.25, 1.0], 3, ood={"far": 5 * X}, **QUIET)
    assert found[metric].dims == ("seed", "width")
    assert found["auroc"].dims == ("seed", "width", "ood", "score")
    torch.manual_seed(0)
    with module_local_params(model.net), model.net.cut(1.0), torch.no_grad():
        weights = [model.guide(X[:1]) for _ in range(3)]
    for width in (0.25, 1.0):
        nets = [narrow(model.net, width, draw) for draw in weights]

        def predict(x, nets=nets):
            return torch.stack([net(x) for net in nets])

        alone = evaluate(predict, (X, y), model.likelihood, ood={"far": 5 * X}, **QUIET)
        xr.testing.assert_allclose(found.sel(width=width, drop=True)[list(alone)], alone)
    plot_widths(found, [metric, "nll"])
    if "bin_count" in found:
        plot_reliability(found)
    joined = xr.concat([found, found.assign_coords(seed=[1])], "seed")
    assert joined[metric].dims == ("seed", "width")


def test_one_pass_a_plain_net_and_the_learned_law(nested):
    model, y, metric = nested
    mean = evaluate_widths(model, (X, y), [0.5], None, **QUIET)
    alone = evaluate(narrow(model.net, 0.5), DataLoader(TensorDataset(X, y), 16), model.likelihood, **QUIET)
    assert mean[metric].item() == pytest.approx(alone[metric].item())
    assert alone.attrs["num_samples"] == 1
    assert mean["mutual_information"].item() == pytest.approx(0, abs=1e-12)
    learned = evaluate_learned(model, (X, y), 3, **QUIET)
    assert learned[metric].dims == ("seed",)
    assert learned["mutual_information"].item() > 0


@pytest.mark.filterwarnings("ignore::UserWarning")  # k-hat of an untrained net
def test_leave_one_out_is_of_rows(nested):
    model, y, _ = nested
    scores = loo_widths(model, (X, y), [0.25, 1.0], 40, **QUIET)
    torch.manual_seed(0)
    with module_local_params(model.net), model.net.cut(1.0), torch.no_grad():
        outputs = torch.stack([narrow(model.net, 1.0, model.guide(X[:1]))(X) for _ in range(40)])
        value = model.likelihood.targets("test", y, outputs[0])
        terms = torch.stack([model.likelihood.law(each).log_prob(value) for each in outputs])
    assert terms.shape == (40, 40)
    # Leaving a row out costs something of what it has of the mixture of all draws.
    mixed = (terms.logsumexp(0) - math.log(40)).sum().item()
    assert float(scores[1.0].elpd) < mixed < float(scores[1.0].elpd) + 2 * float(scores[1.0].p) + 1
    assert smallest_width(scores) in (0.25, 1.0)


def test_a_model_of_the_next_token_learns_it_at_every_width():
    """Text in which each token follows from the one before, padded at the end."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randint(0, 5, (200, 1), generator=generator)
    text = 1 + (start + 2 * torch.arange(9)) % 5
    text[torch.arange(9) >= torch.randint(4, 10, (200, 1), generator=generator)] = 0
    x, y = text[:, :-1], text[:, 1:]
    plain = nn.Sequential(nn.Embedding(6, 8), nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 6))
    net = nest(plain, x[:1], num_blocks=4, exclude=["0"])
    model = NestedModel(net, TokenLabels(ignore_index=0))
    how = {"num_epochs": 60, "lr": 0.05, "weights": KLWeights(latents=0.01), "schedule": MaskSchedule()}
    fit(model, model.guide, (x, y), **how, **QUIET)
    noise = torch.randint(1, 6, x.shape, generator=generator)
    found = evaluate_widths(model, (x, y), [0.25, 0.5, 1.0], 5, ood={"noise": (noise, y)}, **QUIET)
    assert found.attrs["num_labels"] == (y != 0).sum()
    assert (found["perplexity"] < 1.5).all()  # of five, for one who knows nothing
    assert (found["accuracy"] > 0.95).all()
    assert widths_for(model, 0.5, data=(x, y))["1"] in (1, 2)


def test_what_does_not_fit_is_said():
    model = NestedModel(nest(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1)), X[:1]), NormalTargets())
    y = real(40)
    with pytest.raises(ValueError, match=r"evaluate: argument `y` must be real numbers, shape \(40,\).*\(40, 2\)"):
        evaluate_widths(model, (X, real(40, 2)), [0.5], 2, rounding="nearest", **QUIET)
    with pytest.raises(ValueError, match=r"loo_widths: argument `y` must be real numbers, shape \(40,\).*\(40, 2\)"):
        loo_widths(model, (X, real(40, 2)), [1.0], 30, **QUIET)
    with pytest.raises(ValueError, match=r"`calibrate` finds a temperature, .*; got NormalTargets: leave it out"):
        evaluate_widths(model, (X, y), [1.0], 2, calibrate=(X, y), **QUIET)
    with pytest.raises(ValueError, match="evaluate: `data` must give labels"):
        evaluate_widths(model, X, [1.0], 2, **QUIET)
    with pytest.raises(ValueError, match="inputs must be finite; 1 of 40 rows"):
        evaluate_learned(model, (X.index_put((torch.tensor(3),), torch.tensor(math.nan).double()), y), 2, **QUIET)
    with pytest.raises(ValueError, match="outputs of the net must be finite; got NaN or inf"):
        evaluate(lambda x: torch.full((1, len(x), 1), math.inf), (X, y), NormalTargets(), **QUIET)
    with pytest.raises(ValueError, match=r"`data` has no labels that count: all are to be ignored"):
        evaluate(lambda x: torch.zeros(1, len(x), 2, 3), (X, torch.full((40, 2), -100)), TokenLabels(), **QUIET)
    with pytest.raises(ValueError, match=r"evaluate_widths: argument `model` must be a NestedModel, or .*; got Linear"):
        evaluate_widths(nn.Linear(4, 1), (X, y), [1.0], 2, **QUIET)

    class Own(NetLikelihood):
        pass

    with pytest.raises(ValueError, match=r"`likelihood` must be one of CategoricalLabels, .* got Own: score its log-l"):
        evaluate(lambda x: x, (X, y), Own(), **QUIET)

    class Rounded(NormalTargets):
        """Scored as what it derives from."""

    assert "rmse" in evaluate(lambda x: x[None, :, :1], (X, y), Rounded(), **QUIET)
