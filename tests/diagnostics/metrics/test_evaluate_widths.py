"""A real nested net, trained on digits, scored at its widths."""

import copy

import numpy as np
import pyro
import pytest
import torch
import xarray as xr
from torch import nn

from pyro_vnd.diagnostics import evaluate, evaluate_learned, evaluate_widths, loo_widths
from pyro_vnd.diagnostics.metrics.predictive import average_draws, predictive_metrics
from pyro_vnd.infer import module_local_params
from pyro_vnd.nn import CategoricalLabels, NestedModel, narrow, nest

WIDTHS = [0.25, 0.5, 1.0]


@pytest.fixture(scope="module")
def foreign(digits):
    """Test digits with their pixels permuted, and noise."""
    generator = torch.Generator().manual_seed(0)
    images = digits.test.images
    return {"permuted": images[:, torch.randperm(64, generator=generator)], "noise": torch.rand_like(images[:100])}


@pytest.fixture(scope="module")
def result(trained, digits, foreign):
    return evaluate_widths(trained, digits.test, WIDTHS, 10, foreign, calibrate=digits.validation, progress=False)


def test_dimensions(result):
    sizes = {"seed": 1, "width": 3, "bin": 15, "ood": 2, "score": 3, "source": 3, "score_bin": 50}
    assert result.sizes == sizes
    assert result["nll"].dims == ("seed", "width")
    assert result["auroc"].dims == ("seed", "width", "ood", "score")
    assert result["prevalence"].dims == ("seed", "ood")
    assert result["width"].values.tolist() == WIDTHS
    assert result.attrs["num_samples"] == 10
    assert result["multiply_adds"].attrs["units"] == "per row"


def test_the_net_has_learned_every_width(result):
    accuracy = result["accuracy"].values[0].tolist()
    assert 0.5 < accuracy[0] < accuracy[-1]  # chance is .1
    assert min(accuracy[1:]) > 0.85
    assert result["auroc"].sel(width=1.0, ood="permuted", score="entropy") > 0.7


def test_costs_are_those_of_the_narrowed_net(result):
    for width, units in zip(WIDTHS, (8, 16, 32), strict=True):
        at = result.sel(seed=0, width=width)
        assert at["multiply_adds"] == 64 * units + units * units + units * 10
        assert at["parameters"] == at["multiply_adds"] + 2 * units + 10


def test_all_widths_have_the_same_draws_of_the_weights(trained, digits, result):
    x, y = digits.test
    torch.manual_seed(0)
    with module_local_params(trained), trained.cut(1.0), torch.no_grad():
        weights = [trained.guide(x[:1]) for _ in range(10)]
    for width in WIDTHS:
        with torch.no_grad():
            logits = torch.stack([narrow(trained, width, draw)(x) for draw in weights])
        expected = predictive_metrics(average_draws(logits=logits), y)
        assert result["nll"].sel(width=width).item() == pytest.approx(expected["nll"], rel=1e-5)
    # Its own width is all that a value depends on.
    alone = evaluate_widths(trained, digits.test, [0.5], 10, progress=False)
    assert alone["nll"].item() == pytest.approx(result["nll"].sel(width=0.5).item(), rel=1e-9)


def test_draws_agree_with_the_net_s_own_predictions(trained, digits, result):
    x, y = digits.test
    for width in WIDTHS:
        own = predictive_metrics(average_draws(logits=trained.predict(x, width=width, num_samples=40)), y)
        # Other draws: within the Monte Carlo error of 10 draws, of some 2 %.
        assert result["nll"].sel(width=width).item() == pytest.approx(own["nll"], rel=0.1)


def test_batches_do_not_matter_and_random_numbers_are_the_callers(trained, digits):
    torch.manual_seed(5)
    whole = evaluate_widths(trained, digits.test, [0.5, 1.0], 3, batch_size=1000, progress=False)
    after = torch.rand(2)
    torch.manual_seed(5)
    torch.testing.assert_close(torch.rand(2), after)
    sevens = evaluate_widths(trained, digits.test, [0.5, 1.0], 3, batch_size=7, progress=False)
    xr.testing.assert_allclose(whole, sevens, rtol=1e-5)


def test_widths_as_numbers_of_blocks(trained, digits, result):
    blocks = evaluate_widths(trained, digits.test, [2, 8], 10, progress=False)
    assert blocks["width"].values.tolist() == [0.25, 1.0]
    assert blocks["blocks"].values.tolist() == [2, 8]
    assert blocks["blocks"].dims == ("width",)
    assert blocks["nll"].values[0].tolist() == pytest.approx(result["nll"].sel(width=[0.25, 1.0]).values[0].tolist())


def test_the_width_of_a_row_is_the_one_in_effect(trained, digits, result):
    found = evaluate_widths(trained, digits.test, [0.3, 0.26, 0.5, 0.97], 10, rounding="nearest", progress=False)
    assert found["width"].values.tolist() == WIDTHS  # .3 and .26 are one and the same net
    assert found["blocks"].values.tolist() == [2, 4, 8]
    assert found["nll"].values[0].tolist() == pytest.approx(result["nll"].values[0].tolist(), rel=1e-9)
    assert evaluate_widths(trained, digits.test, [0.3], 2, rounding="up", progress=False)["blocks"].item() == 3
    with pytest.raises(ValueError, match=r"(?s)width 0.3 .* near it are 0.25 \(2 of 8 blocks\) and 0.375 \(3 of 8"):
        evaluate_widths(trained, untouched(), [0.5, 0.3], progress=False)


def test_groups_with_other_numbers_of_blocks(digits):
    plain = nn.Sequential(nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 4), nn.ReLU(), nn.Linear(4, 10))
    net = nest(plain, torch.zeros(1, 64), num_blocks={"0": 6, "2": 4}).float()
    found = evaluate_widths(net, digits.test, [0.25, 0.5, 1.0], 2, rounding="nearest", progress=False)
    assert found["blocks"].dims == ("width", "group")
    assert found["group"].values.tolist() == ["0", "2"]
    assert found["blocks"].values.tolist() == [[2, 1], [3, 2], [6, 4]]
    assert found["width"].values.tolist() == [(4 + 1) / (12 + 4), 0.5, 1.0]  # units kept, where fractions differ
    other = evaluate_widths(net, digits.test, [0.25, 0.5, 1.0], 2, rounding="nearest", seed=1, progress=False)
    assert xr.concat([found, other], "seed")["blocks"].dims == ("width", "group")


def test_fits_join_along_seed(trained, digits, foreign, result):
    other = evaluate_widths(
        trained, digits.test, WIDTHS, 10, foreign, calibrate=digits.validation, seed=1, progress=False
    )
    joined = xr.concat([result, other], "seed")
    assert joined["auroc"].dims == ("seed", "width", "ood", "score")
    assert joined["multiply_adds"].dims == ("seed", "width")
    assert (joined["nll"].std("seed") > 0).all()


def test_calibration_lowers_the_nll_of_what_it_was_fitted_on(trained, digits):
    validation = digits.validation
    found = evaluate_widths(trained, validation, WIDTHS, 5, calibrate=validation, progress=False)
    assert (found["nll_calibrated"] < found["nll"]).all()
    assert len(set(found["temperature"].values[0].tolist())) == 3


def test_the_learned_law_averages_over_widths(trained, digits, foreign, result):
    learned = evaluate_learned(trained, digits.test, 10, foreign, calibrate=digits.validation, progress=False)
    assert set(learned.data_vars) == set(result.data_vars) - {"multiply_adds", "parameters"}
    assert learned["nll"].dims == ("seed",)
    # Draws of the width disagree more than those of the weights alone.
    assert learned["mutual_information"].item() > result["mutual_information"].max()
    assert learned["accuracy"].item() > result["accuracy"].sel(width=0.25).item()


def test_the_net_is_left_as_it_was(trained, digits):
    trained.train()
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    evaluate_widths(trained, digits.test, [0.5], 2, progress=False)
    evaluate_learned(trained, digits.test, 2, progress=False)
    assert all(module.training for module in trained.modules())
    for name, value in trained.state_dict().items():
        torch.testing.assert_close(value, before[name])


def test_batchnorm_can_have_statistics_of_each_width(digits):
    plain = nn.Sequential(nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16), nn.BatchNorm1d(16))
    plain = nn.Sequential(*plain, nn.ReLU(), nn.Linear(16, 10))
    net = nest(plain, torch.zeros(2, 64), num_blocks=4).float()
    x = digits.train.images
    before = {name: value.clone() for name, value in net.state_dict().items()}
    test = digits.test.images, digits.test.labels
    raw, own = (
        evaluate_widths(net, test, [0.25, 1.0], 2, recalibrate=data, batch_size=len(x), progress=False)
        for data in (None, x)
    )
    assert (raw["nll"] != own["nll"]).all()
    for name, value in net.state_dict().items():
        torch.testing.assert_close(value, before[name])
    # By hand for one draw: the statistics of the second norm are those of the narrowed net's activations.
    torch.manual_seed(0)
    with module_local_params(net), net.cut(1.0), torch.no_grad():
        draw = net.guide(x[:1])
        cut = narrow(net, 0.25, draw).train()
        for norm in (cut[1], cut[4]):
            norm.momentum = 1.0
        cut(x)
        logits = cut.eval()(digits.test.images)
    single = evaluate_widths(net, test, [0.25], 1, recalibrate=x, batch_size=len(x), progress=False)
    expected = predictive_metrics(average_draws(logits=logits[None]), digits.test.labels)
    assert single["nll"].item() == pytest.approx(expected["nll"], rel=1e-5)
    # One row more than a batch holds is no batch of its own, which would have no variance.
    assert evaluate_widths(net, test, [0.25], 1, recalibrate=x[:257], progress=False)["nll"].item() > 0


@pytest.mark.gpu
def test_a_net_on_the_gpu(trained, digits, foreign, result):
    net = copy.deepcopy(trained).cuda()
    found = evaluate_widths(net, digits.test, WIDTHS, 10, foreign, calibrate=digits.validation, progress=False)
    # Other random numbers: within their Monte Carlo error.
    assert found["nll"].values[0].tolist() == pytest.approx(result["nll"].values[0].tolist(), rel=0.1)
    evaluate_learned(net, digits.test, 2, progress=False)


def test_rows_say_what_was_asked_for_and_what_was_scored(trained, digits):
    test = digits.test.images[:20], digits.test.labels[:20]
    found = evaluate_widths(trained, test, [0.3, 0.26, 0.5], 2, rounding="nearest", progress=False)
    assert found["width"].values.tolist() == [0.25, 0.5]
    assert found["requested"].values.tolist() == ["0.3, 0.26", "0.5"]
    assert found["blocks"].values.tolist() == [2, 4]
    found = evaluate_widths(trained, test, [np.int64(2), 4], 2, progress=False)
    assert found["requested"].values.tolist() == ["2", "4"]
    joined = xr.concat([found, found.assign_coords(seed=[1])], "seed")
    assert joined["requested"].dims == ("width",)


def untouched():
    raise AssertionError("nothing may run")
    yield


@pytest.mark.parametrize("widths", [[0.5, 0.0], [0.5, 1.5], [9], [0]])
def test_invalid_widths_are_refused_by_the_net_before_anything_is_run(widths, trained):
    with pytest.raises(ValueError, match=r"width .* is invalid for group"):
        evaluate_widths(trained, untouched(), widths, progress=False)


@pytest.mark.parametrize("widths", [[], [1, 0.5]])
def test_widths_are_fractions_or_numbers_of_blocks(widths, trained, digits):
    with pytest.raises(ValueError, match="`widths` must be fractions"):
        evaluate_widths(trained, digits.test, widths, progress=False)


def test_draws_are_needed(trained, digits):
    for score in (evaluate_widths, loo_widths):
        with pytest.raises(ValueError, match=f"{score.__name__}: `data` has no rows"):
            score(trained, [], [1.0])
    with pytest.raises(ValueError, match="`num_samples` must be at least 1; got 0"):
        evaluate_widths(trained, digits.test, [0.5], 0, progress=False)


def test_widths_are_several_of_any_kind_of_iterable(trained, digits):
    test = tuple(rows[:20] for rows in digits.test)
    for asked in ((k for k in (1, 2)), np.array([1, 2])):
        assert evaluate_widths(trained, test, asked, 2, progress=False)["blocks"].values.tolist() == [1, 2]
    with pytest.raises(ValueError, match=r"`widths` must be several widths in a list; got 1\.0"):
        evaluate_widths(trained, test, 1.0, 2, progress=False)


def test_draws_that_are_given_serve_all_scores(trained, digits, result):
    draws = trained.draws(10, seed=0)
    found = evaluate_widths(trained, digits.test, WIDTHS, draws=draws, progress=False)
    assert found.attrs["num_samples"] == 10
    xr.testing.assert_allclose(found, result[list(found.data_vars)].drop_dims(["ood", "source"], errors="ignore"))
    for keep in (True, False):
        same = trained.draws(10, seed=0, keep=keep)
        one = evaluate_widths(trained, digits.test, [0.5], draws=same, progress=False)
        xr.testing.assert_allclose(one["nll"], found["nll"].sel(width=[0.5]))
    by_hand = evaluate(draws.narrow(0.5), digits.test, progress=False)
    assert by_hand["nll"].item() == pytest.approx(found["nll"].sel(width=0.5).item(), rel=1e-9)
    learned = evaluate_learned(trained, digits.test, draws=draws, seed=3, progress=False)
    xr.testing.assert_allclose(learned, evaluate(draws, digits.test, seed=3, progress=False))
    assert learned.attrs["num_samples"] == 10
    model = NestedModel(trained, CategoricalLabels(), output=lambda logits: 2 * logits)
    doubled = evaluate_widths(model, digits.test, [0.5], draws=draws, progress=False)
    xr.testing.assert_allclose(doubled, evaluate_widths(model, digits.test, [0.5], 10, progress=False))
    assert doubled["nll"].item() != pytest.approx(one["nll"].item(), rel=1e-3)
    for wrong, got in ((copy.deepcopy(trained).draws(2), "those of another net"), ([], "list")):
        for score in (evaluate_widths, evaluate_learned):
            arguments = (trained, digits.test, *([[0.5]] if score is evaluate_widths else []))
            with pytest.raises(ValueError, match=rf"{score.__name__}: argument `draws` must be draws .*; got {got}"):
                score(*arguments, draws=wrong, progress=False)


@pytest.mark.parametrize("mask_per", ["example", "batch"])
def test_learned_laws_by_hand(mask_per, digits):
    """Weights are the same in all batches; masks of rows are not."""
    x, y = (rows[:60] for rows in digits.test)
    plain = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 10))
    net = nest(plain, x[:1].double(), num_blocks=4, mask_per=mask_per).float()
    found = evaluate_learned(net, (x, y), 4, seed=2, batch_size=25, progress=False)
    draws = net.draws(4, seed=2)
    torch.manual_seed(2)
    logits = []
    for rows in x.split(25):
        uniform = [torch.rand(4, len(rows), 1, dtype=torch.float32) for _ in net.widths]
        by_draw = []
        for number, draw in enumerate(draws):
            masks = {
                site: (law.keep_probs > u[number] * law.keep_probs[0]).float()
                for (site, law), u in zip(net.laws.items(), uniform, strict=True)
            }
            if mask_per == "batch":
                shares = {f"{name}.mask": torch.tensor(draws.lengths[name][number] / 4) for name in net.widths}
                masks = {
                    site: width.prefix(shares[site]) for site, width in zip(masks, net.widths.values(), strict=True)
                }
            with torch.no_grad(), pyro.poutine.condition(data={**draw, **masks}):
                by_draw.append(net(rows))
        logits.append(torch.stack(by_draw))
    expected = predictive_metrics(average_draws(logits=torch.cat(logits, 1)), y)
    for name in ("nll", "entropy", "mutual_information", "ece"):
        assert found[name].item() == pytest.approx(expected[name], rel=1e-4)


def test_draws_are_scored_in_evaluation_mode(digits):
    plain = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 10))
    net = nest(plain, torch.zeros(1, 64), num_blocks=4).float().train()
    draws = net.draws(3, seed=0)
    half = draws.narrow(0.5)
    found = evaluate(half, digits.test, progress=False)["nll"].item()
    assert found == evaluate_widths(net, digits.test, [0.5], draws=draws, progress=False)["nll"].item()
    evaluate(draws, digits.test, progress=False)
    assert all(part.training for module in (net, half.net) for part in module.modules())
