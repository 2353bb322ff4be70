"""Evaluation of any predictor: draws and single nets, batches, random numbers, modes and costs."""

from typing import NamedTuple

import pytest
import torch
import xarray as xr
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pyro_vnd.diagnostics import evaluate, net_cost, ood_metrics
from pyro_vnd.diagnostics.metrics.calibration import calibration_bins
from pyro_vnd.diagnostics.metrics.predictive import average_draws, predictive_metrics

ROWS, CLASSES = 101, 3


@pytest.fixture
def data():
    x = torch.randn(ROWS, 4)
    return x, x[:, :CLASSES].argmax(-1)


@pytest.fixture
def net():
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, CLASSES))


def draws(net):
    """A predictor that draws: as wide in its random numbers as its weights, whatever the batch."""

    def predict(x):
        return torch.stack([net(x) @ torch.randn(CLASSES, CLASSES) for _ in range(5)])

    return predict


def test_it_reports_what_the_metrics_say(net, data):
    x, y = data
    far = 5 * torch.randn(40, 4)
    result = evaluate(draws(net), data, ood={"far": far}, seed=3, progress=False)
    torch.manual_seed(3)
    inside = average_draws(logits=draws(net)(x))
    torch.manual_seed(3)
    outside = average_draws(logits=draws(net)(far))
    for name, value in predictive_metrics(inside, y).items():
        assert result[name].sel(seed=3).item() == pytest.approx(value)
    expected = ood_metrics(inside.mutual_information, outside.mutual_information)
    for name in ("auroc", "aupr", "fpr95"):
        found = result[name].sel(seed=3, ood="far", score="mutual_information").item()
        assert found == pytest.approx(expected[name])
    assert result["prevalence"].item() == 40 / 141
    assert result["bin_count"].values[0].tolist() == calibration_bins(inside.probs, y).count.tolist()
    assert result["score_count"].sum("score_bin").values[0].tolist() == [[ROWS] * 3, [40] * 3]
    assert result.attrs == {"num_samples": 5, "num_rows": ROWS, "num_classes": CLASSES, "num_bins": 15}


@pytest.mark.parametrize("shuffle", [False, True])
def test_batches_do_not_matter(net, data, shuffle):
    far = 5 * torch.randn(40, 4)
    whole = evaluate(draws(net), data, ood={"far": far}, batch_size=1000, progress=False)
    sevens = DataLoader(TensorDataset(*data), batch_size=7, shuffle=shuffle)
    other = evaluate(draws(net), sevens, ood={"far": DataLoader(far, batch_size=6)}, progress=False)
    xr.testing.assert_allclose(whole, other, rtol=1e-10)
    tensors = evaluate(draws(net), data, ood={"far": far}, batch_size=7, progress=False)
    xr.testing.assert_allclose(whole, tensors, rtol=1e-10)


def test_data_are_a_pair_a_mapping_or_batches(net, data):
    class Pair(NamedTuple):
        images: torch.Tensor
        labels: torch.Tensor

    x, y = data
    first = evaluate(draws(net), data, batch_size=40, progress=False)
    batches = [(x[:40], y[:40]), [x[40:80], y[40:80]], Pair(x[80:], y[80:])]
    for same in (Pair(x, y), [x, y], {"x": x, "y": y}, batches, iter(batches)):
        xr.testing.assert_identical(evaluate(draws(net), same, batch_size=40, progress=False), first)
    foreign = {"the same": {"x": x}}  # inputs alone
    found = evaluate(net, data, ood=foreign, batch_size=40, progress=False)
    assert found["auroc"].values.ravel() == pytest.approx(0.5)


def test_memory_holds_one_batch_of_logits(net, data):
    sizes = []

    def predict(x):
        sizes.append(len(x))
        return draws(net)(x)

    evaluate(predict, data, batch_size=40, progress=False)
    assert sizes == [40, 40, 21]


def test_seeds_decide_the_draws_and_the_caller_keeps_his_own(net, data):
    torch.manual_seed(11)
    first = evaluate(draws(net), data, seed=0, progress=False)
    after = torch.rand(3)
    torch.manual_seed(12)
    same = evaluate(draws(net), DataLoader(TensorDataset(*data), 50, shuffle=True), seed=0, progress=False)
    xr.testing.assert_allclose(first, same)
    torch.manual_seed(11)
    torch.testing.assert_close(torch.rand(3), after)
    other = evaluate(draws(net), data, seed=1, progress=False)
    assert other["nll"].item() != first["nll"].item()


def test_a_plain_net_is_one_draw(net, data):
    result = evaluate(net, data, progress=False)
    assert result.attrs["num_samples"] == 1
    assert result["mutual_information"].item() == 0
    expected = predictive_metrics(average_draws(logits=net(data[0])[None]), data[1])
    assert result["nll"].item() == pytest.approx(expected["nll"])
    assert "auroc" not in result


def test_modules_are_evaluated_in_their_mode_and_put_back(data):
    net = nn.Sequential(nn.Dropout(0.9), nn.BatchNorm1d(4), nn.Linear(4, CLASSES))
    net.train()
    net[1].eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    first, second = (evaluate(net, data, seed=seed, progress=False)["nll"].item() for seed in (0, 1))
    assert first == second  # no dropout
    assert [module.training for module in net] == [True, False, True]
    for name, value in net.state_dict().items():
        torch.testing.assert_close(value, before[name])


def test_calibration_lowers_the_nll_of_validation_data(net, data):
    x, _ = data
    logits = 8 * net(x)  # far too sure
    labels = torch.distributions.Categorical(logits=logits / 8).sample()

    def predict(x):
        return 8 * net(x)

    result = evaluate(predict, (x, labels), calibrate=(x, labels), progress=False)
    assert result["nll_calibrated"].item() < 0.8 * result["nll"].item()
    assert result["ece_calibrated"].item() < result["ece"].item()
    assert 4 < result["temperature"].item() < 16
    # On other data the temperature is that of the validation data.
    other = evaluate(predict, (x[:50], labels[:50]), calibrate=(x, labels), progress=False)
    assert other["temperature"].item() == pytest.approx(result["temperature"].item())


def test_fits_join_along_seed(net, data, tmp_path):
    results = [
        evaluate(draws(net), data, ood={"far": data[0] * 3}, calibrate=data, seed=seed, progress=False)
        for seed in (0, 1, 2)
    ]
    joined = xr.concat(results, "seed")
    assert joined["nll"].dims == ("seed",)
    assert joined["auroc"].dims == ("seed", "ood", "score")
    assert joined["seed"].values.tolist() == [0, 1, 2]
    assert joined["nll"].attrs == {"long_name": "negative log-likelihood", "units": "nats"}
    joined.to_netcdf(tmp_path / "metrics.nc", engine="h5netcdf")
    xr.testing.assert_identical(xr.load_dataset(tmp_path / "metrics.nc", engine="h5netcdf"), joined)


def test_costs_by_hand():
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 25, 10))
    cost = net_cost(net, torch.zeros(2, 3, 5, 5))
    assert cost == {"multiply_adds": 25 * 8 * 27 + 2000, "parameters": 8 * 27 + 8 + 16 + 2010}


def test_labels_and_rows_are_needed(net, data):
    with pytest.raises(ValueError, match="`data` must give labels"):
        evaluate(net, data[0], progress=False)
    with pytest.raises(ValueError, match="`calibrate` must give labels"):
        evaluate(net, data, calibrate=data[0], progress=False)
    with pytest.raises(ValueError, match="`ood` has a set named 'test'"):
        evaluate(net, data, ood={"test": data[0]}, progress=False)
    with pytest.raises(ValueError, match="`data` has no rows") as caught:
        evaluate(net, data, ood={"far": []}, progress=False)
    assert caught.value.__notes__ == ["evaluate: in the foreign far data"]


def test_shapes_of_predictions_are_checked(data):
    with pytest.raises(ValueError, match=r"shape \(S, N, ...\); got \(101, 5, 3\) for 101 rows"):
        evaluate(lambda x: torch.zeros(ROWS, 5, CLASSES), data, progress=False)
    with pytest.raises(ValueError, match=r"`logits` must hold a distribution.*101 rows"):
        evaluate(lambda x: torch.full((1, len(x), CLASSES), torch.nan), data, progress=False)
